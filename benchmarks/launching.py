"""Helpers of the benchmarks with several processes: start a stage as users do, with random models and data."""

import datetime
import json
import os
import platform
import random
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import yaml
from ppo_parity import ROOT, processor
from rollouts import AS_LLAMA


CONFIGS = ROOT / "recipes" / "accelerate_configs"
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets")
# Time that a launcher has to end its processes, which first finish a step and save.
STOP_SECONDS = 60
WORDS = 32_000
LLAMA = {"model_type": "llama", "vocab_size": WORDS, "max_position_embeddings": 4096, "tie_word_embeddings": True}
# Fields of model_config.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": LLAMA | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "1m": LLAMA
    | {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}
    | {"vocab_size": 2048},
    "10m": LLAMA
    | {"hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 6, "num_attention_heads": 5}
    | {"vocab_size": 8192},
    "124m": LLAMA
    | {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
    | {"vocab_size": 50_304},
    "350m": LLAMA
    | {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16}
    | {"vocab_size": 32_000},
    "1b": LLAMA
    | {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
    | {"num_key_value_heads": 4},
    "0.5b": AS_LLAMA,
}


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH", ""))))
    return os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


def launcher(launch: str, processes: int, device: str) -> list[str]:
    """Return the command `accelerate launch` with the project's file for one process, or with `launch` for several."""
    single = "cpu" if device == "cpu" else "single_gpu"
    config = CONFIGS / f"{launch if processes > 1 else single}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    if processes > 1:
        command += ["--num_processes", str(processes), "--main_process_port", "0"]
    return command + (["--mixed_precision", "no"] if device == "cpu" else [])


def start(command: list[str], log: Path) -> subprocess.Popen:
    """Start a launcher; its output and that of its processes are appended to `log`."""
    with log.open("a", encoding="utf-8") as stream:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=stream, stderr=stream, start_new_session=True
        )


def workers(process: subprocess.Popen) -> list[psutil.Process]:
    """Return the processes of a running launcher, by rank."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        rank = child.environ().get("RANK")
        if rank is not None and child.ppid() == process.pid:
            found.append((int(rank), child))
    return [child for _, child in sorted(found, key=lambda pair: pair[0])]


def wait(process: subprocess.Popen, seconds: float) -> int:
    """Wait for a launcher and return its exit code.

    Raises:
        TimeoutError: if it did not end in time and was terminated.
    """
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        left = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            for running in (process, *(child for child in left if child.is_running())):
                running.kill()
        raise TimeoutError(f"it did not end within {seconds:.0f} s") from None


def cause(log: Path, lines: int = 6) -> str:
    """Return the error lines of a log, or else its end. A launcher prints pages below the script's one line."""
    text = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in text if re.search(r"(Error: |Interrupted: |^error: |out of memory)", line)]
    return "\n".join(errors[:lines] or text[-lines:])


def history(output: Path) -> list[dict[str, Any]]:
    """Return the log history of a finished stage."""
    return json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


def about() -> dict[str, Any]:
    """Return date, hardware and versions."""
    import torch

    cards = torch.cuda.device_count()
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": f"{cards} x {torch.cuda.get_device_name()}" if cards else processor(),
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES},
    }


def write_yaml(path: Path, settings: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def words(count: int, dice: random.Random, vocabulary: int = 2000) -> str:
    """Return random text of `count` tokens of [`make_tokenizer`]."""
    return " ".join(f"w{number}" for number in dice.choices(range(4, vocabulary), k=count))


def make_tokenizer(folder: Path, vocabulary: int = 2000) -> str:
    """Save a tokenizer with one token for each word, and return the folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {"[PAD]": 0, "</s>": 1, "[UNK]": 2} | {f"w{number}": number for number in range(3, vocabulary)}
    core = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "eos_token": "</s>", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)
    return str(folder)


def make_model(folder: Path, shape: str, kind: str) -> str:
    """Save a model of random weights with its tokenizer, and return the folder.

    Args:
        kind: `CausalLM`, or `SequenceClassification` with one label.
    """
    import torch
    import transformers

    fields = dict(SHAPES[shape])
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "num_labels": 1}
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields, **special)
    torch.manual_seed(0)
    auto = getattr(transformers, f"AutoModelFor{kind}")
    auto.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return make_tokenizer(folder)
