"""An option that is given has an effect, or is refused; every option of every stage is looked at."""

import dataclasses
import runpy

import pytest
import yaml
from helpers import ROOT

import sandan.run.cli
from sandan.core.errors import UserError
from sandan.run.config import REFUSED, TOKEN_KEYS, StrictParser
from sandan.run.options import ALWAYS, CONDITIONS, NEVER, REPLACES, refuse_idle


SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py"))
CPU = "use_cpu: true\nbf16: false\n"


def types_of(script, monkeypatch):
    """The dataclasses that a script parses."""
    captured = []
    monkeypatch.setattr(
        sandan.run.cli,
        "run",
        lambda main, *specs, stage=True, preview=None, **_: captured.append((specs, stage, preview)),
    )
    runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), run_name="__main__")
    ((specs, stage, preview),) = captured
    options = [sandan.run.cli.options_of(preview)] if stage else []
    return [*(sandan.run.cli._load(spec) for spec in specs), *options]


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """Parse a recipe and a command line as a script does; returns the settings by name."""

    def run(script, recipe, *argv):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "stage.yaml").write_text(recipe)
        parser = StrictParser(types_of(script, monkeypatch))
        values = parser.parse(["--config", "stage.yaml", *argv])
        refuse_idle(script, values, parser.origins)
        return {
            field.name: getattr(value, field.name)
            for value in values
            for field in dataclasses.fields(value)
            if hasattr(value, field.name)
        }

    return run


@pytest.fixture
def refusal(parse):
    def run(script, recipe, *argv):
        with pytest.raises(UserError) as caught:
            parse(script, recipe, *argv)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return run


# ---- The tables are complete ----


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_of_every_stage_is_in_a_table(script, monkeypatch):
    fields = {field.name for kind in types_of(script, monkeypatch) for field in dataclasses.fields(kind) if field.init}
    known = set(ALWAYS) | {*REFUSED} | TOKEN_KEYS | {*NEVER.get(script, {})} | {*NEVER[""]}
    known |= {name for one in CONDITIONS for name in one.options.split() if one.covers(script, name)}
    assert not fields - known, f"{script}: say in src/sandan/run/options.py where these act"


def test_the_tables_name_no_option_that_is_not_there(monkeypatch):
    fields = {
        field.name
        for script in SCRIPTS
        for kind in types_of(script, monkeypatch)
        for field in dataclasses.fields(kind)
    }
    named = set(ALWAYS) | {name for one in CONDITIONS for name in (*one.options.split(), *one.reads)}
    named |= {name for table in NEVER.values() for name in table} | {*REPLACES}
    assert not named - fields
    assert {program for one in CONDITIONS for program in one.programs} | {*NEVER} <= {"", *SCRIPTS}


@pytest.mark.parametrize(
    "path",
    sorted(path for path in ROOT.glob("recipes/*/*.yaml") if path.parent.name != "accelerate_configs"),
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_no_line_of_a_committed_recipe_is_idle(path, monkeypatch):
    script = path.stem.removesuffix("_mlm")
    parser = StrictParser(types_of(script, monkeypatch))
    on_cpu = ["--use_cpu", "true", "--bf16", "false"] if "use_cpu" in parser.hints else []
    values = parser.parse(["--config", str(path), *on_cpu])
    refuse_idle(script, values, parser.origins)
    if "data_files" in yaml.safe_load(path.read_text()):
        parser = StrictParser(types_of(script, monkeypatch))
        values = parser.parse(["--config", str(path), *on_cpu, "--data_files", "my.jsonl", "--held_out_share", "0.2"])
        refuse_idle(script, values, parser.origins)


# ---- Options without effect ----

SFT = f"{CPU}output_dir: out\nmodel_name_or_path: m\ndata_files: [a.jsonl]\n"
OTHERS = {
    "pretrain": f"{CPU}output_dir: out\ntokenizer_name_or_path: t\ndata_files: [a.jsonl]\n",
    "ppo": f"{SFT}reward_model_path: r\n",
    "tokenizer": "output_dir: out\ndata_files: [a.jsonl]\n",
    "candidates": "output_dir: out\nmodel_name_or_path: m\ndata_files: [a.jsonl]\n",
}
IDLE = [
    ("sft", "lora_r: 8", "use_peft"),
    ("sft", "load_in_4bit: true", "use_peft"),
    ("sft", "use_peft: true\nbnb_4bit_quant_type: fp4", "load_in_4bit"),
    ("sft", "eval_data_files: [b.jsonl]\nheld_out_share: 0.2", "eval_data_files"),
    ("sft", "datasets: [{path: hub/x}]", "data_files"),
    ("sft", "eval_strategy: steps", "eval data"),
    ("sft", "eval_steps: 5", "eval_strategy"),
    ("sft", "held_out_share: 0.1\neval_steps: 5", "eval_strategy"),
    ("sft", "per_device_eval_batch_size: 2", "eval data"),
    ("sft", "optim_args: a=1", "optim"),
    ("sft", "optim: sgd\nadam_beta2: 0.9", "optim"),
    ("sft", "lr_scheduler_type: constant\nwarmup_steps: 5", "warmup"),
    ("sft", "lr_scheduler_kwargs: {a: 1}", "lr_scheduler_type"),
    ("sft", "max_steps: 3\nnum_train_epochs: 2", "max_steps"),
    ("sft", "save_strategy: 'no'\nsave_steps: 2", "save_strategy"),
    ("sft", "held_out_share: 0.1\nsave_strategy: 'no'\nload_best_model_at_end: true", "save_strategy"),
    ("sft", "activation_offloading: true", "GPU"),
    ("sft", "hub_model_id: a/b", "push_to_hub"),
    ("sft", "report_to: none\nrun_name: a", "report_to"),
    ("sft", "do_eval: true", "not in this stage"),
    ("sft", "torch_compile_mode: max-autotune", "not in this stage"),
    ("reward", "use_peft: true\nlora_task_type: CAUSAL_LM", "SEQ_CLS"),
    ("reward", "best_of_n_prompts: 5", "oracle"),
    ("reward", "streaming: true", "streaming: not in this stage"),
    ("ppo", "streaming: true", "streaming: not in this stage"),
    ("ppo", "kl_horizon: 100", "target_kl"),
    ("ppo", "truncate_min_tokens: 16", "truncate_after"),
    ("ppo", "long_prompts: shorten", "max_prompt_tokens"),
    ("ppo", "importance_cap: 2.0", "use_vllm"),
    ("ppo", "missing_eos_penalty_mode: replace", "missing_eos_penalty"),
    ("ppo", "total_episodes: 8\nmax_steps: 3", "total_episodes"),
    ("ppo", "vllm_mode: server", "use_vllm"),
    ("ppo", "batch_size: 8", "not in this stage"),
    ("ppo", "true_score_prompts: 8", "true_score"),
    ("ppo", "label_smoothing_factor: 0.1", "not in this stage"),
    ("pretrain", "model_name_or_path: m\nmodel_config: {model_type: llama}", "model_config"),
    ("pretrain", "dtype: bfloat16\nmodel_config: {model_type: llama}", "model_config"),
    ("pretrain", "use_peft: true", "not in this stage"),
    ("pretrain", "load_in_8bit: true", "not in this stage"),
    ("pretrain", "mlm_probability: 0.3", "mlm"),
    ("tokenizer", "streaming: true", "streaming: not in this stage"),
    ("candidates", "streaming: true", "streaming: not in this stage"),
]


@pytest.mark.parametrize("script, lines, wanted", IDLE, ids=[f"{script}-{lines}" for script, lines, _ in IDLE])
def test_an_idle_line_of_the_recipe_is_refused_with_its_line(script, lines, wanted, refusal):
    message = refusal(script, f"{OTHERS.get(script, SFT)}{lines}\n")
    assert message.startswith("stage.yaml:") and wanted in message
    assert "has no effect" in message or "not in this stage" in message


@pytest.mark.parametrize(
    "argv",
    [["--lora_r", "8"], ["--load_in_4bit"], ["--eval_steps=5"], ["--do_train", "true"], ["--save_total_limit", "1"]],
    ids=" ".join,
)
def test_an_idle_option_of_the_command_line_is_refused(argv, refusal):
    name = argv[0].partition("=")[0]
    assert refusal("sft", f"{SFT}save_strategy: 'no'\n", *argv).startswith(f"command line: {name}: ")


@pytest.mark.parametrize(
    ("line", "argv", "wanted"),
    [
        ('truncate_after: [".", "\\n"]', [], [".", "\n"]),
        ("truncate_after: [.]", ["--truncate_after", "!", "?"], ["!", "?"]),
    ],
)
def test_texts_that_cut_an_answer_are_a_list(line, argv, wanted, parse):
    assert parse("ppo", f"{OTHERS['ppo']}{line}\n", *argv)["truncate_after"] == wanted


@pytest.mark.parametrize("line", ["use_peft: false", "load_in_4bit: false", "streaming: false", "held_out_share: 0.0"])
def test_switching_off_what_is_off_is_no_mistake(line, parse):
    parse("sft", f"{SFT}eval_data_files: [b.jsonl]\n{line}\n")


# ---- The command line replaces lines of the recipe ----


def test_own_rows_replace_all_rows_of_the_recipe(parse):
    recipe = f"{SFT}eval_data_files: [b.jsonl]\nper_device_eval_batch_size: 4\n"
    found = parse("sft", recipe, "--data_files", "mine.jsonl", "--held_out_share", "0.2")
    assert [source.data_files for source in found["datasets"]] == [["mine.jsonl"]]
    assert found["eval_datasets"] == [] and found["held_out_share"] == 0.2
    assert parse("sft", recipe, "--data_files", "mine.jsonl")["eval_datasets"] == []
    found = parse("sft", recipe, "--data_files", "mine.jsonl", "--eval_data_files", "mine_eval.jsonl")
    assert [source.data_files for source in found["eval_datasets"]] == [["mine_eval.jsonl"]]


def test_datasets_of_the_recipe_are_replaced_by_own_files(parse):
    recipe = f"{CPU}output_dir: out\nmodel_name_or_path: m\ndatasets: [{{path: hub/x}}]\nheld_out_share: 0.1\n"
    found = parse("sft", recipe, "--data_files", "mine.jsonl")
    assert [source.data_files for source in found["datasets"]] == [["mine.jsonl"]] and found["held_out_share"] == 0.1
    assert parse("sft", recipe, "--eval_data_files", "mine.jsonl")["held_out_share"] == 0


def test_a_share_beside_the_recipes_eval_data_is_refused(refusal):
    message = refusal("sft", f"{SFT}eval_data_files: [b.jsonl]\n", "--held_out_share", "0.2")
    assert message.startswith("command line: --held_out_share: has no effect: the eval data are used")


@pytest.mark.parametrize(
    "line, argv",
    [
        ("num_train_epochs: 2", ["--max_steps", "2"]),
        ("warmup_steps: 0.1", ["--lr_scheduler_type", "constant"]),
        ("adam_beta2: 0.9", ["--optim", "sgd"]),
        ("save_steps: 5", ["--save_strategy", "no"]),
    ],
)
def test_a_line_that_the_command_line_makes_idle_is_no_mistake(line, argv, parse):
    parse("sft", f"{SFT}{line}\n", *argv)
