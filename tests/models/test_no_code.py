"""No Python file of a model's folder is run and no pickle is read, by any entry; nobody is asked whether it should be."""

import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from datasets import Dataset
from helpers import loopback_hub, zoo
from helpers.scripts import run_script
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import ModelConfig, SFTConfig

from sandan import PPOConfig, PPOTrainer, legacy
from sandan.core.errors import UserError
from sandan.models import checks, loading, memory
from sandan.sft.trainer import GuardedSFTTrainer
from sandan.training.train_and_save import make_trl_trainer


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
    "trainer of TRL": lambda path: make_trl_trainer(
        GuardedSFTTrainer,
        path,
        SFTConfig("out", use_cpu=True, bf16=False),
        ModelConfig(path),
        (Dataset.from_dict({"prompt": ["Q"], "completion": ["A"]}), None),
        loading.load_tokenizer(path),
    ),
}
# Entries that read no weights, so that what is wrong with those does not concern them.
WITHOUT_WEIGHTS = ("tokenizer", "size", "head", "config")


@pytest.fixture(scope="module")
def harmless(tmp_path_factory):
    return zoo.write("llama instruct", tmp_path_factory.mktemp("models") / "harmless")


@pytest.fixture
def hostile(harmless, tmp_path):
    """A model folder that would run its own code, and the file that this code would leave."""
    folder, ran = Path(shutil.copytree(harmless, tmp_path / "hostile")), tmp_path / "ran"
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


@pytest.fixture
def scripts_refuse(tmp_path):
    """Run a stage's script with a hostile folder as every model; it must end in one line."""

    def run(stage, folder):
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
        return done.stderr

    return run


STAGES = ["pretrain", "sft", "reward", "candidates", "ppo", "evaluate"]


@pytest.mark.parametrize("stage", STAGES)
def test_scripts_refuse_a_folder_with_code_in_one_line(stage, hostile, scripts_refuse):
    folder, ran = hostile
    scripts_refuse(stage, folder)
    assert not ran.exists()


def test_settings_cannot_ask_for_code_or_pickles():
    for name, value in (("trust_remote_code", True), ("use_safetensors", False)):
        with pytest.raises(UserError, match=f"model_init_kwargs: {name}: only"):
            loading.model_init_kwargs(ModelConfig(), {name: value})
    for name in ("gguf_file", "variant", "adapter_kwargs", "allow_all_kernels", "weights_only"):
        with pytest.raises(UserError, match=f"model_init_kwargs: {name}: is not supported"):
            loading.model_init_kwargs(ModelConfig(), {name: "x"})


def test_entries_that_name_code_are_not_saved_again(harmless, tmp_path):
    folder = Path(shutil.copytree(harmless, tmp_path / "named"))
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        settings(folder / name, auto_map={"AutoModelForCausalLM": "code.Model"})
    model = loading.load_causal_lm(str(folder))
    model.save_pretrained(tmp_path / "again")
    loading.load_tokenizer(str(folder)).save_pretrained(tmp_path / "again")
    assert "code.Model" not in "".join(path.read_text() for path in (tmp_path / "again").glob("*.json"))


# ---- Pickles ----


class Payload:
    """Leaves a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def settings(path, **values):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | values))


def by_index(folder, shard, name="model.safetensors"):
    """Replace the weights by an index that names the pickle."""
    names = weight_names(folder)
    (folder / "model.safetensors").unlink()
    settings(folder / f"{name}.index.json", metadata={}, weight_map=dict.fromkeys(names, str(shard)))


def weight_names(folder):
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as weights:
        return list(weights.keys())


def renamed(folder, name):
    (folder / "model.safetensors").unlink()
    shutil.copy(folder / "x.bin", folder / name)


def linked(folder):
    (folder / "x.safetensors").symlink_to("x.bin")
    by_index(folder, "x.safetensors")


def adapter(folder, base="harmless", weights="adapter_model.bin", **values):
    """Make an adapter of the folder, above another folder beside it."""
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    if weights.endswith(".bin"):
        (folder / "adapter_model.safetensors").unlink()
        shutil.copy(folder / "x.bin", folder / weights)
    base = folder.parent / base
    settings(folder / "adapter_config.json", peft_type="LORA", base_model_name_or_path=str(base), **values)


def above_a_pickle(folder):
    base = Path(shutil.copytree(folder, folder.parent / "base"))
    by_index(base, "x.bin")
    adapter(folder, "base", "adapter_model.safetensors")


# The library says so when it opens the file. A masked model of this kind does not exist, which is said before.
NOT_READ = "header|AutoModelForMaskedLM"
NOT_SAFE = "only safetensors of the same folder are read"
# How a model's folder leads to a pickle, `x.bin`, and what is said.
PICKLES = {
    "an index names it": (lambda folder: by_index(folder, "x.bin"), "'x.bin': only safe"),
    "an index names it above": (lambda folder: by_index(folder, "../hostile/x.bin"), NOT_SAFE),
    "an index names it elsewhere": (lambda folder: by_index(folder, folder.parent / "x.safetensors"), NOT_SAFE),
    "an index names another kind": (lambda folder: by_index(folder, 7), NOT_SAFE),
    "an index is a list": (
        lambda folder: (by_index(folder, "x"), (folder / "model.safetensors.index.json").write_text("[]")),
        "index.json: holds no JSON object",
    ),
    "an index names a link to it": (linked, NOT_READ),
    "it is named as safetensors": (lambda folder: renamed(folder, "model.safetensors"), NOT_READ),
    "pytorch_model.bin": (lambda folder: renamed(folder, "pytorch_model.bin"), "no model.safetensors in it"),
    "model.pt": (lambda folder: renamed(folder, "model.pt"), "no model.safetensors in it"),
    "model.ckpt": (lambda folder: renamed(folder, "model.ckpt"), "no model.safetensors in it"),
    "tf_model.h5": (lambda folder: renamed(folder, "tf_model.h5"), "no model.safetensors in it"),
    "config.json names it": (
        lambda folder: (
            renamed(folder, "adapter_model.bin"),
            settings(folder / "config.json", transformers_weights="adapter_model.bin"),
        ),
        "transformers_weights: 'adapter_model.bin'",
    ),
    "the settings of a part name it": (
        lambda folder: settings(folder / "config.json", text_config={"transformers_weights": "adapter_model.bin"}),
        "transformers_weights: 'adapter_model.bin'",
    ),
    "config.json names it by another name": (
        lambda folder: settings(
            folder / "config.json", attribute_map={"transformers_weights": "other"}, other="adapter_model.bin"
        ),
        "attribute_map: is not supported",
    ),
    "an index without weights": (
        lambda folder: (by_index(folder, "x"), settings(folder / "model.safetensors.index.json", weight_map={})),
        "no `weight_map`",
    ),
    "config.json names an index that names it": (
        lambda folder: (
            by_index(folder, "x.bin", "other.safetensors"),
            settings(folder / "config.json", transformers_weights="other.safetensors.index.json"),
        ),
        "other.safetensors.index.json: weight_map: 'x.bin'",
    ),
    "an adapter": (adapter, "no adapter_model.safetensors in it"),
    "an adapter above one": (above_a_pickle, "base: model.safetensors.index.json: weight_map: 'x.bin'"),
    "an adapter that starts with one": (
        lambda folder: adapter(
            folder, weights="adapter_model.safetensors", prompt_tuning_init_state_dict_path="x.bin"
        ),
        "prompt_tuning_init_state_dict_path: is not supported",
    ),
}


@pytest.fixture
def pickled(harmless, tmp_path, monkeypatch):
    """Make a folder that leads to a pickle; whoever reads that fails the test."""
    monkeypatch.setattr("torch.load", lambda *_, **__: pytest.fail("a pickle was read"))

    def make(kind):
        folder = Path(shutil.copytree(harmless, tmp_path / "hostile"))
        shutil.copytree(harmless, tmp_path / "harmless")
        torch.save(Payload(tmp_path / "ran"), folder / "x.bin")
        PICKLES[kind][0](folder)
        return folder

    yield make
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry not in WITHOUT_WEIGHTS])
@pytest.mark.parametrize("kind", PICKLES)
def test_no_entry_reads_a_pickle(entry, kind, pickled, tmp_path, monkeypatch):
    folder = pickled(kind)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match=PICKLES[kind][1]) as caught:
        ENTRIES[entry](str(folder))
    assert "\n" not in str(caught.value)


def test_a_subfolder_is_checked_as_the_folder(pickled, tmp_path):
    folder = pickled("an index names it")
    outer = tmp_path / "outer"
    shutil.copytree(folder, outer / "inner")
    with pytest.raises(UserError, match="'x.bin': only safetensors"):
        loading.load_model(AutoModelForCausalLM, str(outer), subfolder="inner")
    with pytest.raises(UserError, match="'x.bin': only safetensors"):
        loading.model_init_kwargs(ModelConfig(str(outer)), {"subfolder": "inner"})


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with loopback_hub.serve() as server:
        for name, value in {
            "HF_HUB_OFFLINE": False,
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": True,
        }.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        huggingface_hub.utils._http.close_session()
        yield server
    huggingface_hub.utils._http.close_session()


@pytest.mark.parametrize(
    "kind", [None, "an index names it", "pytorch_model.bin", "an adapter", "an adapter above one"]
)
def test_a_model_of_the_hub_is_checked_before_its_weights_are_downloaded(kind, hub, pickled, harmless, tmp_path):
    folder = harmless if kind is None else pickled(kind)
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    hub.repos["models", "eve/model"] = {"private": False, "files": files, "commits": 1}
    if kind is None:
        assert loading.load_causal_lm("eve/model").config.model_type == "llama"
        assert loading.only_safetensors("eve/model", {})["revision"] == f"{1:040x}"
        return
    for load in (loading.load_causal_lm, lambda path: loading.model_init_kwargs(ModelConfig(path))):
        with pytest.raises(UserError, match=PICKLES[kind][1]):
            load("eve/model")
    assert not [request for request in hub.requests if request.startswith("GET") and request.endswith(".bin")]


@pytest.mark.parametrize("stage", STAGES)
def test_scripts_refuse_a_pickle_in_one_line(stage, pickled, scripts_refuse):
    assert "'x.bin': only safetensors" in scripts_refuse(stage, pickled("an index names it"))
