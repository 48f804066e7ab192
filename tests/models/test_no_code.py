"""No Python file of a model's folder is run, by any entry, and nobody is asked whether it should be."""

import json

import pytest
from helpers import zoo
from helpers.scripts import run_script
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import ModelConfig

from sandan import PPOConfig, PPOTrainer, legacy
from sandan.core.errors import UserError
from sandan.models import checks, loading, memory


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
Path({ran!r}).touch()
class Config(LlamaConfig):
    model_type = "hostile"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""
ENTRIES = {
    "tokenizer": lambda path: loading.load_tokenizer(path),
    "causal": lambda path: loading.load_causal_lm(path),
    "masked": lambda path: loading.load_masked_lm(path),
    "reward": lambda path: loading.load_reward_model(path),
    "size": lambda path: memory.size_of(AutoModelForCausalLM, path, set()),
    "head": lambda path: memory.size_of(AutoModelForSequenceClassification, path, set()),
    "config": lambda path: checks.config_of(path),
    "policy": lambda path: PPOTrainer(model=path, reward_funcs=len, args=PPOConfig("out", use_cpu=True, bf16=False)),
    "value head": lambda path: legacy.AutoModelForCausalLMWithValueHead.from_pretrained(path),
    "value head, asked for": lambda path: legacy.AutoModelForCausalLMWithValueHead.from_pretrained(
        path, trust_remote_code=True
    ),
}


@pytest.fixture
def hostile(tmp_path):
    """A model folder that would run its own code, and the file that this code would leave."""
    folder, ran = zoo.write("llama instruct", tmp_path / "hostile"), tmp_path / "ran"
    (folder / "code.py").write_text(CODE.format(ran=str(ran)))
    maps = {
        "config.json": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
        "tokenizer_config.json": {"AutoTokenizer": [None, "code.Tokenizer"]},
    }
    for name, auto_map in maps.items():
        content = json.loads((folder / name).read_text()) | {"auto_map": auto_map}
        content |= {"model_type": "hostile"} if name == "config.json" else {"tokenizer_class": "Tokenizer"}
        (folder / name).write_text(json.dumps(content))
    return folder, ran


@pytest.mark.parametrize("entry", ENTRIES)
def test_code_of_a_model_folder_is_not_run(entry, hostile, tmp_path, monkeypatch):
    folder, ran = hostile
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked whether to run code"))
    try:
        ENTRIES[entry](str(folder))
    except (UserError, ValueError, KeyError, OSError, TypeError):
        pass
    assert not ran.exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "candidates", "ppo", "evaluate"])
def test_scripts_refuse_a_folder_with_code_in_one_line(stage, hostile, tmp_path):
    folder, ran = hostile
    keys = {
        "pretrain": ("model_name_or_path", "tokenizer_name_or_path"),
        "ppo": ("model_name_or_path", "reward_model_path"),
        "evaluate": ("base_model", "sft_model", "ppo_model"),
    }.get(stage, ("model_name_or_path",))
    rows = {"prompt": "Q ", "completion": "A", "chosen": "A", "rejected": "B", "text": "Q A"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows) + "\n")
    training = () if stage in ("candidates", "evaluate") else ("--use_cpu", "true", "--bf16", "false")
    models = [word for key in keys for word in (f"--{key}", folder)]
    done = run_script(stage, *models, "--data_files", "rows.jsonl", "--output_dir", "out", *training, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert not ran.exists()


def test_settings_cannot_ask_for_code_or_pickles():
    for name, value in (("trust_remote_code", True), ("use_safetensors", False)):
        with pytest.raises(UserError, match=f"model_init_kwargs: {name}: only"):
            loading.model_init_kwargs(ModelConfig(), {name: value})
