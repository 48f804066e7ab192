"""Exceptions of libraries: one line that names the setting while a run is prepared, a traceback afterwards."""

import tempfile

import pytest
from helpers import bad_inputs

from sandan.core.errors import UserError
from sandan.core.stage import Stage
from sandan.run import cli
from sandan.run.mistakes import preparing
from sandan.run.values import check_environment, check_value


ORIGINS = {"adam_beta1": "command line", "optim": "r.yaml:3", "report_to": "r.yaml:4", "seed": "r.yaml:5"}
SETTINGS = {"adam_beta1": 1.5, "optim": "adamw_torch", "report_to": ["wandb"], "seed": 1}


def line_of(error, origins=ORIGINS, settings=SETTINGS, part=None):
    def create_optimizer():
        raise error

    def elsewhere():
        raise error

    with pytest.raises(UserError) as caught, preparing(settings, origins):
        create_optimizer() if part == "optimizer" else elsewhere()
    return str(caught.value)


def test_the_innermost_part_that_was_built_names_the_settings():
    assert line_of(ValueError("no"), part="optimizer") == "command line: --adam_beta1: no"
    assert (
        line_of(RuntimeError("adamw_torch:\n is missing"), part="optimizer")
        == "r.yaml:3: optim: adamw_torch: is missing"
    )
    recipe = {"optim": "r.yaml:3", "adam_beta1": "r.yaml:9"}
    assert (
        line_of(KeyError("x"), recipe, part="optimizer") == "r.yaml:3: optim; r.yaml:9: adam_beta1: 'x' is not known"
    )


def test_a_message_that_names_a_setting_is_enough():
    settings = {"lr_scheduler_kwargs": {"lr_end": 9}}
    named = line_of(ValueError("lr_end (9) must be smaller"), {"lr_scheduler_kwargs": "command line"}, settings)
    assert named == "command line: --lr_scheduler_kwargs: lr_end (9) must be smaller"
    assert line_of(ImportError("`report_to` needs a package")).startswith("r.yaml:4: report_to: `report_to` needs")
    origins, settings = {"env": "r.yaml:1"}, {"env": {"SOME_SWITCH": "maybe"}}
    assert line_of(ValueError("invalid truth value maybe"), origins, settings).startswith("r.yaml:1: env: invalid")


@pytest.mark.parametrize(
    "error", [ValueError("the seed is bad"), AttributeError("no attribute adam_beta1"), IndexError("3")]
)
def test_what_no_setting_explains_is_a_fault_of_the_program(error):
    with pytest.raises(type(error)), preparing(SETTINGS, ORIGINS):
        raise error


def test_after_the_first_file_an_exception_is_a_fault_of_the_program(tmp_path):
    stage = Stage("sft", "tiny", tmp_path / "out", 0, {})
    mistakes = preparing(SETTINGS, ORIGINS, stage.has_begun_writing)
    with stage.opened(), pytest.raises(ValueError, match="adam_beta1"), mistakes:
        stage.begin_writing()
        raise ValueError("adam_beta1")


def test_the_environment_variable_shows_where_it_was_found(monkeypatch, capsys):
    def action():
        raise UserError("no") from ValueError("deep inside")

    for variable, shown in (("", False), ("1", True)):
        monkeypatch.setenv(cli.TRACEBACK, variable)
        with pytest.raises(SystemExit) as left:
            cli.guarded(action)
        error = capsys.readouterr().err
        assert left.value.code == 2 and error.endswith("error: no\n")
        assert ("deep inside" in error) == shown == ("Traceback" in error)


@pytest.mark.parametrize(
    "key, good, bad",
    [
        ("max_steps", (-1, 1), (0, -2)),
        ("save_steps", (0.5, 1), (0, -1)),
        ("num_train_epochs", (0.5, 3), (0, -1)),
        ("adam_beta1", (0, 0.999), (1, -0.1)),
        ("label_smoothing_factor", (0, 0.1), (1, 5)),
        ("warmup_steps", (0, 0.5, 10.0), (-1, 1.5)),
        ("seed", (0, 2**32 - 1), (-1, 2**32)),
        ("learning_rate", (0, 1), (-1, float("inf"), float("nan"))),
    ],
)
def test_numbers_without_a_meaning(key, good, bad):
    for number in good:
        check_value(number, key, "p")
    for number in bad:
        with pytest.raises(UserError, match=f"p: expected a number, .*, found {number}".replace("+", r"\+")):
            check_value(number, key, "p")


@pytest.mark.parametrize(
    "value, key",
    [
        (bad_inputs.SECRET, "run_name"),
        (f"run-{bad_inputs.SECRET}-2", ""),
        ({"a": [f"{bad_inputs.SECRET}"]}, "model_init_kwargs"),
        ('{"use_auth_token": true}', "model_init_kwargs"),
        ("sk-" + "a1" * 15, "project"),
        ("[" * 5000 + "]" * 5000, "model_init_kwargs"),
        ("{" + '"a":{' * 30 + "}" * 31, "model_init_kwargs"),
        ("~/runs", "output_dir"),
        ("out\n", "output_dir"),
        ("out\0", "log_file"),
    ],
)
def test_texts_that_are_refused(value, key):
    with pytest.raises(UserError) as caught:
        check_value(value, key, "p")
    assert str(caught.value).startswith("p: ") and bad_inputs.SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "environment",
    [
        [1],
        {"A B": 1},
        {"": 1},
        {1: 2},
        {"A": None},
        {"A": {}},
        {"A": "\0"},
        {"WORLD_SIZE": 2},
        {"ACCELERATE_USE_FSDP": "maybe"},
        {"MY_TOKEN": 1},
    ],
)
def test_entries_that_are_no_variables(environment):
    with pytest.raises(UserError, match=r"^r.yaml:1: env: "):
        check_environment(environment, "r.yaml:1")
    check_environment({"OMP_NUM_THREADS": 2, "NAME": "a b"}, "r.yaml:1")


@pytest.mark.parametrize("error", [RuntimeError("basic_ios::clear: iostream error"), OSError(28, "", "out/model")])
def test_a_full_disk_is_one_line_whoever_wrote(error, capsys):
    def action():
        raise error

    with pytest.raises(SystemExit) as left:
        cli.guarded(action)
    message = capsys.readouterr().err
    assert left.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return bad_inputs.Bench(tmp_path_factory.mktemp("bench"))


def test_a_wrong_masked_model_is_found_before_anything_is_generated(bench, monkeypatch):
    def compare(*_):
        pytest.fail("generated")

    monkeypatch.setattr("sandan.evaluate.comparison.compare", compare)
    with bench.copy():
        code, error = bad_inputs.run_script("evaluate", bad_inputs.EVALUATED)
    assert code == 2 and bad_inputs.MODEL in error.splitlines()[-1], error


def test_a_dry_run_leaves_no_temporary_folder(bench, tmp_path, monkeypatch):
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    with bench.copy():
        assert bad_inputs.run_script("sft", ("--dry_run", "true"))[0] == 0
    assert not list(place.iterdir())
