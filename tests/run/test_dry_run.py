"""`--dry_run`: what it shows, what it finds, and that it changes nothing."""

import json
import os
import re
import runpy
import shutil
import sys

import pytest
from helpers import ROOT
from helpers.checkout import TINY, make, make_checkout
from helpers.stages import finish

from sandan.data.jsonl import write_jsonl
from sandan.run.dry_run import DIM, RESET, histogram, shown_tokens


TURN = {"role": "user", "content": "What does the cow eat?"}
ANSWER = {"role": "assistant", "content": "Grass."}


@pytest.fixture
def here(tmp_path, tokenizer, model, monkeypatch):
    """A folder with data and models as the tiny recipes name them."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    (tmp_path / "data").mkdir()
    texts = [{"text": f"The cow number {number} eats grass."} for number in range(40)]
    rows = [{"prompt": [TURN], "completion": [{**ANSWER, "content": f"Grass {number}."}]} for number in range(40)]
    for name, content in (
        ("pretrain", texts),
        ("sft", rows),
        ("rlhf_prompts", [{"prompt": "Q 1"}, {"prompt": "Q 2"}]),
    ):
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", content[:-4] if len(content) > 4 else content)
        write_jsonl(tmp_path / "data" / f"{name}_eval.jsonl", content[-4:])
    write_jsonl(tmp_path / "data" / "eval_prompts.jsonl", [{"prompt": "Q 3"}])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def models(here, tokenizer, model, tiny_config):
    from transformers import LlamaForSequenceClassification

    for name in ("tokenizer", "pretrain", "sft", "reward"):
        folder = here / "outputs" / "tiny" / name
        finish(folder)
        tokenizer.save_pretrained(folder)
        if name != "tokenizer":
            (LlamaForSequenceClassification(tiny_config) if name == "reward" else model).save_pretrained(folder)
    rows = [{"prompt": "Q", "chosen": f"good {number}", "rejected": "bad"} for number in range(12)]
    finish(here / "outputs" / "tiny" / "preferences")
    for part in ("train", "eval"):
        write_jsonl(
            here / "outputs" / "tiny" / "preferences" / f"preferences_{part}.jsonl", rows[part == "train" :: 2]
        )
    return here


@pytest.fixture
def dry(monkeypatch, capsys):
    """Run a script with `--dry_run` in this process: (exit code, stdout, stderr)."""

    def run(stage, *arguments):
        script = str(ROOT / "scripts" / f"{stage.removesuffix('_mlm')}.py")
        monkeypatch.setattr(sys, "argv", [script, "--config", f"recipes/tiny/{stage}.yaml", "--dry_run", *arguments])
        code = 0
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as left:
            code = left.code
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("stage", TINY)
def test_every_stage_of_a_fresh_checkout_is_checked_and_nothing_changes(here, dry, stage):
    if stage == "evaluate":
        write_jsonl(here / "data" / "minimal_pairs.jsonl", [{"skill": "a", "good": "b", "bad": "c"}])
    before = snapshot(here)
    code, out, err = dry(stage)
    assert code == 0, err
    assert out.startswith(f"settings of tiny/{stage} (given)")
    earlier = {"sft": "pretrain", "reward": "sft", "ppo": "reward", "evaluate": "ppo", "rank": "candidates"}.get(stage)
    assert earlier is None or f"is not there yet; `make {earlier} RECIPE=" in out
    assert snapshot(here) == before


def test_settings_say_where_they_come_from(here, dry):
    _, out, _ = dry("sft", "--learning_rate", "1e-4", "--seed=3")
    assert re.search(r"  learning_rate: 0\.0001  .*command line", out)
    assert re.search(r"  seed: 3  .*command line", out)
    assert re.search(r"  num_train_epochs: 4\.0  .*recipes/tiny/sft\.yaml:11", out)
    default = next(line for line in out.splitlines() if "  default: " in line)
    assert "weight_decay=0.0" in default and "learning_rate" not in default


@pytest.mark.parametrize(
    "stage, wanted",
    [
        (
            "pretrain",
            [r"steps +3 epochs, about \d+ steps an epoch, 16 rows a step", r"memory +[\d,]+ parameters: about"],
        ),
        ("pretrain_mlm", [r"tokens +.*<\|mask\|>"]),
        ("sft", [r"0.0% are longer than 128 tokens; 0.0% are dropped", "about 3 steps an epoch"]),
        ("reward", [r"tokens +<\|bos\|>", "6 train rows read"]),
        ("ppo", ["48 updates of 128 answers, 192 optimizer steps"]),
        ("candidates", [r"lengths +of the first 2 rows"]),
    ],
)
def test_tokens_lengths_steps_and_sizes_are_shown(models, dry, stage, wanted):
    before = snapshot(models)
    code, out, err = dry(stage)
    assert code == 0, err
    for pattern in wanted:
        assert re.search(pattern, out), pattern
    assert snapshot(models) == before


def test_what_is_not_trained_is_dimmed(models, dry):
    _, out, _ = dry("sft")
    line = next(line for line in out.splitlines() if line.startswith("tokens"))
    dimmed, _, trained = line.partition(RESET)
    assert DIM in dimmed and "cow" in dimmed.replace("·", "") and "<|assistant|>" in dimmed
    assert "Grass" in trained.replace("·", "") and trained.endswith("<|eos|>") and DIM not in trained


def test_rows_that_are_too_long_show_as_shares(models, dry):
    long = [
        {"prompt": [{**TURN, "content": "cow " * (1 + 39 * (n % 2)) + str(n)}], "completion": [ANSWER]}
        for n in range(10)
    ]
    write_jsonl(models / "data" / "sft.jsonl", long)
    _, out, _ = dry("sft", "--max_length", "32")
    assert "50.0% are longer than 32 tokens; 50.0% are dropped" in out


def test_the_disk_is_checked(models, dry, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    code, _, err = dry("sft")
    assert code == 2 and "but only 1 kB are free" in err


@pytest.mark.parametrize(
    "stage, arguments, wanted",
    [
        ("sft", ["--learing_rate", "1"], "did you mean --learning_rate?"),
        ("sft", ["--data_files", "no.jsonl"], "no.jsonl: no such file"),
        ("sft", ["--model_name_or_path", "outputs/other/pretrain"], "no such folder"),
        ("rank", ["--candidates_file", "no.jsonl"], "no.jsonl: no such file"),
        ("ppo", ["--num_mini_batches", "0"], "num_mini_batches"),
        ("sft", ["--max_length", "2"], "max_length: all of the first 36 rows are longer than 2 tokens"),
        ("sft", ["--enable_jit_checkpoint", "true"], "enable_jit_checkpoint: True: refused: it saves in the middle"),
        ("sft", ["--logging_nan_inf_filter", "true"], "logging_nan_inf_filter: True: refused: it hides losses"),
        ("sft", ["--resume_from_checkpoint", "x"], "resume_from_checkpoint: x: refused: use resume"),
        ("sft", ["--output_dir", "data"], "data: holds other files"),
        (
            "sft",
            ["--model_name_or_path", "outputs/tiny/sft"],
            "outputs/tiny/sft: model_name_or_path: is the output_dir too",
        ),
    ],
)
def test_mistakes_are_found_as_the_stage_would(models, dry, stage, arguments, wanted):
    code, _, err = dry(stage, *arguments)
    assert code == 2 and "Traceback" not in err
    assert wanted in err, err
    assert err.splitlines()[-1].startswith("error: ")


def test_bad_data_are_found(models, dry):
    with (models / "data" / "sft.jsonl").open("a") as stream:
        stream.write(json.dumps({"prompt": [TURN], "completion": [TURN]}) + "\n")
    code, _, err = dry("sft", "--output_dir", "outputs/tiny/new")
    assert code == 2 and "data/sft.jsonl:37: completion: turn 1 is of the user, expected the assistant" in err


def test_bars_and_tokens(tokenizer):
    lines = histogram([1, 1, 1, 12])
    assert lines[0].endswith("median 1, longest 12 tokens") and lines[1].split()[1] == "3"
    assert sum(int(line.split()[1]) for line in lines[1:]) == 4
    ids = tokenizer("The cow", add_special_tokens=False)["input_ids"]
    assert "".join(shown_tokens([(one, True) for one in ids], tokenizer)).replace("·", "") == "The cow"


@pytest.mark.slow
def test_make_check_goes_through_all_stages_and_names_those_that_are_not_ready(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    checkout = make_checkout(tmp_path / "checkout")
    recipe = checkout / "recipes" / "tiny" / "ppo.yaml"
    recipe.write_text(recipe.read_text() + "learing_rate: 1\n")
    for name in ("pretrain", "pretrain_mlm", "sft", "candidates", "preferences", "evaluate", "reward", "report"):
        (checkout / "recipes" / "tiny" / f"{name}.yaml").unlink()
    done = make(checkout, "check", timeout=300)
    assert done.returncode == 2
    assert re.findall(r"── tiny: (\w+) ──", done.stdout) == ["tokenizer", "rank", "ppo"]
    assert "recipes/tiny/ppo.yaml:" in done.stderr and "not ready: rank ppo" in done.stderr, done.stderr
