"""Configuration: nothing misspelt, misread or secret gets past the parser."""

import os
import runpy

import pytest
import yaml
from helpers import ROOT
from helpers.arguments import Arguments
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from trl import ModelConfig, SFTConfig

import sandan.run.cli
from sandan.core.errors import UserError
from sandan.data.loading import DataArguments
from sandan.run.config import REMOVED_KEYS, StrictParser, check_type


CPU = "output_dir: out\nuse_cpu: true\nbf16: false\n"
RECIPES = sorted(path for path in ROOT.glob("recipes/*/*.yaml") if path.parent.name != "accelerate_configs")


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """Parse YAML text (written to stage.yaml) and a command line."""
    monkeypatch.chdir(tmp_path)

    def run(text="", *argv, types=(Arguments,)):
        (tmp_path / "stage.yaml").write_text(text, encoding="utf-8")
        return StrictParser(types).parse(["--config", "stage.yaml", *argv] if text else list(argv))[0]

    return run


@pytest.fixture
def refusal(parse):
    """The one line that a mistake ends in."""

    def run(text="", *argv, **kwargs):
        with pytest.raises(UserError) as caught:
            parse(text, *argv, **kwargs)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return run


def specs_of(script, monkeypatch):
    captured = []
    monkeypatch.setattr(
        sandan.run.cli, "run", lambda main, *specs, preview=None, **_: captured.append((specs, preview))
    )
    runpy.run_path(str(script), run_name="__main__")
    ((specs, preview),) = captured
    return [*(sandan.run.cli._load(spec) for spec in specs), sandan.run.cli.options_of(preview)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_committed_recipe_parses_with_its_own_script(path, monkeypatch):
    script = ROOT / "scripts" / f"{path.stem.removesuffix('_mlm')}.py"
    parser = StrictParser(specs_of(script, monkeypatch))
    on_cpu = ["--use_cpu", "true"] if "use_cpu" in parser.hints else []
    config = sandan.run.cli.effective_config(parser.parse(["--config", str(path), *on_cpu]))
    assert config["output_dir"] == f"outputs/{path.parent.name}/{path.stem}"


def test_typo_in_yaml_names_file_line_key_and_nearest_name(refusal):
    message = refusal("seed: 1\nlearing_rate: 1.0e-3\n")
    assert message == "stage.yaml:2: learing_rate: unknown key; did you mean learning_rate?"


@pytest.mark.parametrize("option", ["--learing_rate", "--learing_rate=1", "--learning_r", "--learing-rate"])
def test_typo_and_abbreviation_on_the_command_line(option, refusal):
    message = refusal("", option, "1")
    assert message.startswith(f"command line: {option.partition('=')[0]}: unknown option")
    assert "did you mean --learning_rate?" in message


def test_positional_word_is_refused(refusal):
    assert "stage.yaml: unknown option" in refusal("", "stage.yaml")


@pytest.mark.parametrize("key", sorted(REMOVED_KEYS))
def test_removed_key_names_its_replacement(key, refusal):
    types = (SFTConfig, ModelConfig, DataArguments)
    for message in (
        refusal(f"{CPU}{key}: 1\n", types=types),
        refusal(CPU, f"--{key}", "1", types=types),
        refusal(CPU, f"--{key.replace('_', '-')}", "1", types=types),
    ):
        assert "HF_TOKEN" in message if "token" in key and key != "tokenizer" else REMOVED_KEYS[key] in message


@pytest.mark.parametrize("form", [["--config", "stage.yaml"], ["--config=stage.yaml"]])
def test_both_forms_of_config(form, parse, tmp_path):
    (tmp_path / "stage.yaml").write_text("seed: 7\n")
    assert StrictParser([Arguments]).parse(form)[0].seed == 7


@pytest.mark.parametrize(
    "argv, wanted",
    [
        (["--config"], "needs a file"),
        (["--config="], "needs a file"),
        (["--config", "--seed", "1"], "needs a file"),
        (["--config", "a.yaml", "--config=b.yaml"], "given twice"),
        (["--config", "missing.yaml"], "missing.yaml: no such recipe file"),
        (["--config", "."], "cannot be read"),
    ],
)
def test_broken_config_option(argv, wanted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=wanted):
        StrictParser([Arguments]).parse(argv)


@pytest.mark.parametrize(
    "line, wanted",
    [
        ("learning_rate: fast", "a number"),
        ("learning_rate: [1, 2]", "a number"),
        ("learning_rate: true", "a number"),
        ("learning_rate: -1", "0 or more"),
        ("learning_rate: .nan", "a number"),
        ("seed: 1.5", "a whole number"),
        ("seed: null", "a whole number"),
        ("seed: '1'", "a whole number"),
        ("per_device_train_batch_size: 0", "1 or more"),
        ("max_length: -3", "1 or more"),
        ("shuffle: 1", "true or false"),
        ("output_dir: [out]", "text"),
        ("output_dir: 5", "text"),
        ("files: a.jsonl", "a list of text"),
        ("files: [1]", "a list of text"),
        ("objective: rtd", "one of 'clm', 'mlm'"),
        ("tied: 3", "a mapping"),
    ],
)
def test_wrong_value_in_yaml_names_line_key_and_what_was_expected(line, wanted, refusal):
    message = refusal(f"# recipe\n{line}\n")
    assert message.startswith(f"stage.yaml:2: {line.partition(':')[0]}: expected") and wanted in message


@pytest.mark.parametrize(
    "argv",
    [["--seed", "x"], ["--seed"], ["--objective", "rtd"], ["--shuffle", "maybe"], ["--max_length", "0"]],
)
def test_wrong_value_on_the_command_line(argv, refusal):
    message = refusal("", *argv)
    assert message.startswith("command line: ") and argv[0] in message


@pytest.mark.parametrize("argv", [["--max_length", str(2**63)], ["--learning_rate", "1e308"]])
def test_a_number_with_which_no_library_can_count_is_refused(argv, refusal):
    assert refusal("", *argv).startswith(f"command line: {argv[0]}: expected a number below 2**53")


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("seed: 1\nshuffle: true\nseed: 2\n", "stage.yaml:3: seed: given twice (first on line 1)"),
        ("tied:\n  a: 1\n  a: 2\n", "stage.yaml:3: a: given twice (first on line 2)"),
        ("files: [a]\ntied: {a: [{b: 1, b: 2}]}\n", "stage.yaml:2: b: given twice"),
        ("seed: [1\n", "stage.yaml:2: not valid YAML"),
        ("- seed\n", "expected a mapping"),
        ("# nothing\n", "expected a mapping"),
        ("1: x\n", "stage.yaml:1: 1: not a valid key"),
        ("? [a]\n: x\n", "not a valid key"),
        ("tied: {? [a] : x}\n", "not a valid key"),
        ("<<: {seed: 1}\n", "not a valid key"),
        ("tied: &a {b: *a}\n", "an alias that holds itself"),
    ],
)
def test_malformed_yaml(text, wanted, refusal):
    assert wanted in refusal(text)


def test_yaml_that_is_not_utf8(tmp_path):
    path = tmp_path / "stage.yaml"
    path.write_bytes("output_dir: é\n".encode("latin-1"))
    with pytest.raises(UserError, match="cannot be read as UTF-8"):
        StrictParser([Arguments]).parse(["--config", str(path)])


SECRET = "hf_" + "x" * 34


@pytest.mark.parametrize(
    "text, argv",
    [
        (f"{CPU}hub_token: {SECRET}\n", ()),
        (f"{CPU}token: {SECRET}\n", ()),
        (f"{CPU}env: {{HF_TOKEN: {SECRET}}}\n", ()),
        (f"{CPU}env: {{wandb_api_key: {SECRET}}}\n", ()),
        (f"{CPU}model_init_kwargs: {{token: {SECRET}}}\n", ()),
        (CPU, ("--hub_token", SECRET)),
        (CPU, (f"--hub_token={SECRET}",)),
        (CPU, ("--hub-token", SECRET)),
        (CPU, ("--model_init_kwargs", f'{{"token": "{SECRET}"}}')),
    ],
)
def test_tokens_are_refused_everywhere_and_never_repeated(text, argv, refusal):
    message = refusal(text, *argv, types=(SFTConfig, ModelConfig, DataArguments))
    assert "HF_TOKEN" in message and SECRET not in message
    assert os.environ.get("HF_TOKEN") != SECRET


def test_env_block_is_set(parse, monkeypatch):
    monkeypatch.setenv("SANDAN_TEST", "0")
    parse("env: {SANDAN_TEST: 5}\nseed: 1\n")
    assert os.environ["SANDAN_TEST"] == "5"


def test_keys_inside_a_mapping_may_be_numbers(parse):
    assert parse("tied: {0: good, 1: bad}\n").tied == {0: "good", 1: "bad"}


def test_command_line_wins_over_yaml(parse):
    values = parse("seed: 1\nlearning_rate: 0.5\nshuffle: true\n", "--seed", "2", "--shuffle", "false")
    assert (values.seed, values.learning_rate, values.shuffle) == (2, 0.5, False)


def test_floats_without_a_dot_are_numbers_also_inside_mappings(parse):
    values = parse("learning_rate: 5e-5\nschedule: {min_lr: 1e-6, name: cosine}\n")
    assert values.learning_rate == 5e-5
    assert values.schedule == {"min_lr": 1e-6, "name": "cosine"}


@pytest.mark.parametrize(
    "value, hint, wanted",
    [
        ("linear", float | str, "linear"),
        (3, int | float, 3),
        (3, float, 3.0),
        (None, int | None, None),
        ([], list, []),
    ],
)
def test_value_keeps_the_type_that_fits_exactly(value, hint, wanted):
    converted = check_type(value, hint, "place")
    assert converted == wanted and type(converted) is type(wanted)


@pytest.mark.parametrize(
    "line, wanted",
    [
        ("datasets: [{path: json, slpit: test}]", "slpit: unknown key; did you mean split?"),
        ("datasets: [json]", "expected a list of DatasetConfig"),
        ("datasets: {path: json}", "expected a list of DatasetConfig"),
        ("datasets: [{path: json, fraction: half}]", "fraction: expected a number"),
        ("datasets: [{path: json, fraction: 0}]", "fraction: expected a share above 0"),
        ("save_strategy: no", "expected one of 'no'"),
        ("optim: adam", "expected one of adamw_torch"),
        ("test_split_size: 0.1", "use held_out_share"),
        ("data_files: [a.xyz]", "expected files of one kind"),
        ("data_files: [a.csv, b.txt]", "expected files of one kind"),
    ],
)
def test_mistakes_in_the_fields_of_trl(line, wanted, refusal):
    assert wanted in refusal(f"{CPU}{line}\n", types=(SFTConfig, ModelConfig, DataArguments))


WORDS = st.sampled_from(
    ["seed", "learning_rate", "max_length", "files", "tied", "objective", "schedule", "x", "1", "<<", "~"]
)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.dates()
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORDS, inner, max_size=2))


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=60)
    | st.dictionaries(WORDS, VALUES, max_size=3).map(lambda one: yaml.dump(one).encode())
)
def test_any_recipe_is_settings_or_one_line(content, tmp_path):
    path = tmp_path / "stage.yaml"
    path.write_bytes(content)
    try:
        (values,) = StrictParser([Arguments]).parse(["--config", str(path)])
    except UserError as error:
        assert "\n" not in str(error) and "stage.yaml" in str(error)
    else:
        assert isinstance(values, Arguments)


@settings(max_examples=200, deadline=None)
@given(
    argv=st.lists(
        st.text(max_size=6) | WORDS.map("--{}".format) | st.sampled_from(["--seed=1", "--", "-x"]), max_size=4
    )
)
@example(argv=["\n"])
def test_any_command_line_is_settings_or_one_line(argv):
    try:
        StrictParser([Arguments]).parse(argv)
    except UserError as error:
        assert "\n" not in str(error)
