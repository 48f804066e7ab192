"""What the training stages share."""

import copy
import json
import os
import runpy
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from helpers.disk import fillable
from helpers.scripts import PROCESSES
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import ModelConfig

from sandan.command.processes import become_script
from sandan.core.errors import UserError
from sandan.data.jsonl import write_jsonl
from sandan.models.loading import quantization, unquantized
from sandan.sft.trainer import GuardedSFTTrainer
from sandan.training.train_and_save import ShortProgress, on_whole_weights


class Bar:
    def __init__(self):
        self.lines = []

    def write(self, line):
        self.lines.append(line)


def test_short_progress_prints_only_what_is_watched(tmp_path):
    progress = ShortProgress(("objective/scores", "eval_objective/scores", "eps"))
    progress.training_bar = Bar()
    logs = {"loss": 1.0, "objective/scores": 0.25, "val/ratio": 1.0, "eps": 12.0}
    for one in (logs, {"train_runtime": 3.0}, {"eval_objective/scores": 0.5, "eval_runtime": 1.0}):
        progress.on_log(TrainingArguments(str(tmp_path)), TrainerState(), TrainerControl(), logs=one)
    assert progress.training_bar.lines == [
        "{'objective/scores': '0.25', 'eps': '12'}",
        "{'eval_objective/scores': '0.5'}",
    ]
    assert len(logs) == 4


# ---- Nothing trained is lost ----


@pytest.fixture
def run_here(tmp_path, tokenizer, model, monkeypatch):
    """Run a script in this process, in a folder with a model `m`, a reward model `r` and rows."""
    torch.manual_seed(0)
    for name, one in (("m", model), ("r", LlamaForSequenceClassification(model.config))):
        tokenizer.save_pretrained(tmp_path / name)
        one.save_pretrained(tmp_path / name)
    rows = [{"prompt": f"Q {number}", "completion": f"A {number}"} for number in range(24)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in rows])
    monkeypatch.chdir(tmp_path)

    def run(stage, *options):
        common = ["--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--output_dir", "out"]
        monkeypatch.setattr(sys, "argv", [stage, "--model_name_or_path", "m", *common, *options])
        runpy.run_path(str(ROOT / "scripts" / f"{stage}.py"), run_name="__main__")

    return run


SFT = ["--data_files", "rows.jsonl", "--max_steps", "1", "--max_length", "64", "--learning_rate", "0.1"]
PPO = ["--data_files", "prompts.jsonl", "--reward_model_path", "r", "--response_length", "4", "--total_episodes", "8"]


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("stage, options", [("sft", SFT), ("ppo", PPO)])
def test_a_failure_after_training_leaves_a_loadable_model(stage, options, adapters, run_here, model, monkeypatch):
    trained = []

    def evaluate(self, *args, **kwargs):
        if self.state.global_step:
            trained.append(self.state.global_step)
            raise RuntimeError("no memory")
        return {"eval_loss": 1.0}

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    with pytest.raises(RuntimeError, match="no memory"):
        run_here(stage, *options, "--held_out_share", "0.3", *(["--use_peft", "true"] if adapters else []))
    assert trained
    saved = AutoModelForCausalLM.from_pretrained("out")
    ids = torch.tensor([[5, 6, 7]])
    if stage == "sft":
        assert not torch.equal(saved(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_ppo_run_that_logged_nothing_is_finished(run_here):
    run_here("ppo", *PPO, "--logging_steps", "500")
    metrics = json.loads(Path("out/result.json").read_text())["metrics"]
    assert metrics["updates"] == 1 and metrics["train_seconds"] > 0
    AutoModelForCausalLM.from_pretrained("out")


def test_ppo_takes_a_tokenizer_with_an_added_pad_token(run_here, tokenizer, model):
    added = copy.deepcopy(tokenizer)
    added.add_special_tokens({"pad_token": "<added>"})
    assert added.pad_token_id >= model.config.vocab_size
    added.save_pretrained("m")
    run_here("ppo", *PPO, "--held_out_share", "0.3")
    assert AutoModelForCausalLM.from_pretrained("out").config.pad_token_id < model.config.vocab_size


def test_sft_streams_its_rows(run_here):
    run_here("sft", *SFT, "--streaming", "true")
    assert json.loads(Path("out/result.json").read_text())["metrics"]["train_steps"] == 1


def test_the_default_length_is_lowered_to_the_models_positions(run_here):
    run_here("sft", *[option for option in SFT if option not in ("--max_length", "64")])
    assert json.loads(Path("out/result.json").read_text())["config"]["max_length"] == 128


# ---- Runs again in the folder of a finished stage ----


LONGER = ["--max_steps", "4", "--save_strategy", "steps", "--save_steps", "1"]
AGAIN = ["--data_files", "rows.jsonl", "--max_length", "64", "--learning_rate", "0.2", *LONGER]


@pytest.fixture
def finished(run_here):
    """Finish a stage in `out`; return what tells whether it is still as it was."""
    run_here("sft", *SFT, "--save_strategy", "steps", "--save_steps", "1")

    def snapshot(checkpoints=True):
        paths = [path for path in sorted(Path("out").rglob("*")) if path.is_file()]
        kept = [path for path in paths if not path.parts[1].startswith((".unfinished", ".saving", "checkpoint-"))]
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (paths if checkpoints else kept)}

    return snapshot


def after_step(number, action, training_step=GuardedSFTTrainer.training_step):
    """Return a training step that does `action` first when `number` steps have been made."""

    def step(self, *args, **kwargs):
        if self.state.global_step == number:
            action()
        return training_step(self, *args, **kwargs)

    return step


def fail():
    raise RuntimeError("no memory")


@pytest.mark.parametrize(
    "steps, options, error",
    [
        (None, ["--adam_beta1", "1.5"], SystemExit),
        (None, ["--pad_to_multiple_of", "0"], SystemExit),
        (0, [], RuntimeError),
    ],
)
def test_an_error_before_the_first_optimizer_step_changes_nothing(
    steps, options, error, run_here, finished, monkeypatch
):
    before = finished()
    monkeypatch.setattr(GuardedSFTTrainer, "training_step", after_step(steps, fail))
    with pytest.raises(error) as caught:
        run_here("sft", *AGAIN, *options)
    assert error is RuntimeError or caught.value.code == 2
    assert finished() == before


@pytest.mark.parametrize("cause", ["exception", "full disk"])
def test_an_error_in_the_middle_of_training_puts_the_finished_stage_back(
    cause, run_here, finished, monkeypatch, caplog
):
    caplog.set_level("INFO")
    before = finished(checkpoints=False)
    with monkeypatch.context() as patch, fillable() as fill:
        action = fail if cause == "exception" else fill
        patch.setattr(GuardedSFTTrainer, "training_step", after_step(2, action))
        with pytest.raises((RuntimeError, SystemExit)) as caught:
            run_here("sft", *AGAIN)
    assert cause == "exception" or caught.value.code == 2
    assert finished(checkpoints=False) == before
    assert [path.name for path in Path("out").glob("checkpoint-*")].count("checkpoint-1.previous") == 1
    run_here("sft", *AGAIN)
    assert "going on from out/checkpoint-2" in caplog.text
    assert json.loads(Path("out/result.json").read_text())["metrics"]["train_steps"] == 4
    assert not list(Path("out").glob(".*"))


@pytest.mark.parametrize("sign", [".previous/recipe.yaml", "checkpoint-2"])
def test_a_rerun_that_is_killed_is_refused_as_an_input_and_then_put_back(sign, run_here, finished, tmp_path, capsys):
    before = finished(checkpoints=False)
    common = ["--model_name_or_path", "m", "--use_cpu", "true", "--bf16", "false", "--output_dir", "out"]
    endless = [*AGAIN, "--max_steps", "100000", "--save_total_limit", "2"]
    command = [str(ROOT / "scripts" / "sft.py"), *common, *endless]
    streams = {1: tmp_path / "stdout", 2: tmp_path / "stderr"}
    script = PROCESSES.Process(target=become_script, args=(command, tmp_path, dict(os.environ), streams))
    script.start()
    while script.is_alive() and not (tmp_path / "out" / sign).exists():
        time.sleep(0.01)
    with pytest.raises(SystemExit):
        run_here("sft", *AGAIN)
    assert "error: out: another run is writing here; wait" in capsys.readouterr().err
    script.kill()
    script.join()
    with pytest.raises(SystemExit) as caught:
        run_here("sft", *AGAIN, "--model_name_or_path", "out", "--output_dir", "next")
    error = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 2 and "error: out: its run did not finish (no result.json); run `make out" in error
    with pytest.raises(SystemExit):
        run_here("sft", *AGAIN, "--data_files", "no.jsonl")
    assert finished(checkpoints=False) == before


# ---- Quantized weights ----


@pytest.mark.parametrize("key", ["load_in_4bit", "load_in_8bit"])
def test_quantization_is_passed_on_or_refused(key, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"{key}: needs .*a GPU"):
        quantization(ModelConfig(**{key: True}))
    assert quantization(ModelConfig()) == {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda: True)
    monkeypatch.setattr("trl.get_quantization_config", lambda model_args: key)
    assert quantization(ModelConfig(**{key: True})) == {"quantization_config": key}


def test_adapters_of_a_quantized_model_are_merged_into_the_weights_before_it(tmp_path, model):
    model.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    ids = torch.tensor([[5, 6, 7]])
    expected = adapted.eval()(input_ids=ids).logits
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        base.get_input_embeddings().weight.mul_(1.5)  # as rounding changes what the adapters lie on
    found = on_whole_weights(adapted, str(tmp_path / "adapter")).merge_and_unload()
    torch.testing.assert_close(found(input_ids=ids).logits, expected)


def test_the_configuration_of_whole_weights_names_no_quantization(tiny_config):
    assert unquantized(tiny_config) is tiny_config
    quantized = copy.deepcopy(tiny_config)
    quantized.quantization_config, quantized.dtype = {"load_in_4bit": True}, torch.bfloat16
    whole = unquantized(quantized)
    assert "quantization_config" not in whole.to_dict() and whole.dtype == torch.float32
    assert quantized.quantization_config == {"load_in_4bit": True}
