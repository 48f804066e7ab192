"""Mistakes through the real scripts: exit code 2, one line that says what to do, and nothing overwritten."""

import copy
import json
import re
import shutil

import pytest
from helpers import ROOT
from helpers.scripts import run_script
from helpers.stages import finish
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from sandan.data.jsonl import write_jsonl
from sandan.pretrain.tokenizer import train_tokenizer


pytestmark = pytest.mark.slow

RECIPES = ROOT / "recipes" / "tiny"
ROWS = [
    {"prompt": [{"role": "user", "content": f"Q{n}"}], "completion": [{"role": "assistant", "content": "A"}]}
    for n in range(16)
]


@pytest.fixture
def here(tmp_path, tokenizer, model):
    """A folder with good data and an earlier stage's model, as the tiny recipes name them."""
    (tmp_path / "data").mkdir()
    for name, rows in (("sft", ROWS[:8]), ("sft_eval", ROWS[8:])):
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", rows)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "outputs" / "tiny" / "pretrain")
    return tmp_path


@pytest.fixture
def refusal(here):
    """The one error line of a script that must fail; files that were there before must be as they were."""

    def run(stage, *args):
        before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
        done = run_script(stage, "--config", RECIPES / f"{stage}.yaml", *args, cwd=here)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and done.stderr.rstrip().endswith(lines[0])
        assert {path: path.read_bytes() for path in before} == before
        assert not list(here.rglob("out*/result.json"))
        return lines[0].removeprefix("error: ")

    return run


def test_missing_data_file(refusal):
    assert refusal("sft", "--data_files", "no.jsonl") == "no.jsonl: no such file or folder"


@pytest.mark.parametrize(
    "tail, wanted",
    [
        ('{"prompt": "Q", "comple', r"data/sft.jsonl:9: not JSON .*; the line is cut off"),
        ('{"question": "Q", "answer": "A"}\n', r"data/sft.jsonl:9: columns .*, expected prompt and completion"),
    ],
    ids=["truncated", "wrong column"],
)
def test_broken_data(tail, wanted, refusal, here):
    with (here / "data" / "sft.jsonl").open("a") as stream:
        stream.write(tail)
    assert re.match(wanted, refusal("sft"))


def test_vocabulary_of_another_tokenizer(refusal, here, tiny_config):
    smaller = copy.deepcopy(tiny_config)
    smaller.vocab_size = 280
    LlamaForCausalLM(smaller).save_pretrained(here / "outputs" / "tiny" / "pretrain")
    assert "vocabulary mismatch: the tokenizer has 320 tokens, the model 280 rows" in refusal("sft")


def test_vocabulary_of_the_same_size_with_other_ids(refusal, here, tiny_config, tokenizer):
    outputs = here / "outputs" / "tiny"
    shutil.copytree(outputs / "pretrain", outputs / "sft")
    LlamaForSequenceClassification(tiny_config).save_pretrained(outputs / "reward")
    train_tokenizer(["entirely other words, of the same number"] * 9, len(tokenizer)).save_pretrained(
        outputs / "reward"
    )
    write_jsonl(here / "data" / "rlhf_prompts.jsonl", [{"prompt": "Q"}] * 8)
    assert "reward_model_path: vocabulary mismatch" in refusal("ppo")


def test_reward_model_with_fewer_rows_than_the_tokenizer_has_tokens(refusal, here, tiny_config):
    outputs, smaller = here / "outputs" / "tiny", copy.deepcopy(tiny_config)
    smaller.vocab_size = 280
    shutil.copytree(outputs / "pretrain", outputs / "sft")
    shutil.copytree(outputs / "pretrain", outputs / "reward")
    LlamaForSequenceClassification(smaller).save_pretrained(outputs / "reward")
    write_jsonl(here / "data" / "rlhf_prompts.jsonl", [{"prompt": "Q"}] * 8)
    write_jsonl(here / "data" / "eval_prompts.jsonl", [{"prompt": "Q9"}])
    assert "outputs/tiny/reward: vocabulary mismatch: the tokenizer has 320 tokens, the model 280" in refusal("ppo")


@pytest.mark.parametrize(
    "stage, earlier, wanted",
    [
        ("sft", "pretrain", "run `make pretrain RECIPE=tiny` first"),
        ("rank", None, "run `make candidates RECIPE=tiny`"),
    ],
)
def test_earlier_stage_that_has_not_run(stage, earlier, wanted, refusal, here):
    if earlier:
        shutil.rmtree(here / "outputs" / "tiny" / earlier)
    assert wanted in refusal(stage)


def test_folder_of_another_recipe(refusal, here):
    folder = here / "mine"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("recipe: other\nstage: sft\n")
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "result.json").write_text(json.dumps({}))
    message = refusal("sft", "--output_dir", "mine")
    assert message.startswith("mine: holds recipe 'other', stage 'sft'") and "nothing was changed" in message


def test_folder_that_is_not_a_model(refusal, here, tokenizer):
    tokenizer.save_pretrained(here / "only_tokenizer")
    assert "no config.json in it" in refusal("sft", "--model_name_or_path", "only_tokenizer")


@pytest.mark.parametrize("script, options", [("annotate", []), ("judge", ["--model", "m", "--base_url", "http://x"])])
def test_candidates_of_a_stage_that_did_not_finish(script, options, here):
    folder = here / "outputs" / "tiny" / "candidates"
    finish(folder)
    (folder / "result.json").unlink()
    write_jsonl(folder / "candidates.jsonl", [{"prompt": "Q", "candidates": ["A", "B"]}])
    files = ["--candidates_file", folder / "candidates.jsonl", "--log_file", here / "log.jsonl"]
    done = run_script(script, *files, *options, cwd=here)
    assert done.returncode == 2 and not (here / "log.jsonl").exists()
    assert done.stderr.endswith("did not finish (no result.json); run `make candidates RECIPE=tiny` first\n")
