"""Pretraining speed: `scripts/pretrain.py` against stock `transformers.Trainer` and nanoGPT, each in its own process.

    python benchmarks/pretraining.py --nanogpt_dir nanoGPT                       # one GPU; git clone karpathy/nanoGPT
    python benchmarks/pretraining.py --shape 0.5b --sides sandan trainer
    python benchmarks/pretraining.py --shape tiny --sides sandan trainer         # CPU, to see that it runs

Text and weights are random. "124m" is GPT-2, T = 1024; "0.5b" is Qwen2.5-0.5B's shape, T = 2048. bfloat16 autocast,
AdamW, clipping and the log every 5 steps are part of the time; "sandan" also tokenizes, packs and loads as any run
does. The first logs (compilation) are left out. Prints JSON: tokens/s, MFU = (6N + 12 L d T) tokens/s / 989 TFLOP/s,
peak memory.
"""

import argparse
import datetime
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ppo_parity import ROOT, processor
from ppo_update import make_tokenizer
from rollouts import AS_LLAMA


PEAK_FLOPS = 989e12
GPT2 = {"model_type": "gpt2", "vocab_size": 50304, "n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024}
SHAPES: dict[str, dict[str, Any]] = {
    "124m": {"model": GPT2, "block": 1024, "rows": 64},
    "0.5b": {"model": AS_LLAMA, "block": 2048, "rows": 8},
    "tiny": {"model": GPT2 | {"vocab_size": 512, "n_layer": 2, "n_head": 2, "n_embd": 64}, "block": 64, "rows": 8},
}
LOGGING_STEPS = 5


def settings(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the training arguments of both trainers."""
    return {
        "output_dir": str(folder / "out"),
        "max_steps": args.steps,
        "per_device_train_batch_size": args.rows or SHAPES[args.shape]["rows"],
        "bf16": args.shape != "tiny",
        "use_cpu": args.shape == "tiny",
        "learning_rate": 3e-4,
        "adam_beta2": 0.95,
        "weight_decay": 0.1,
        "logging_steps": LOGGING_STEPS,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_num_workers": 0 if args.shape == "tiny" else 4,
        "torch_compile": args.compile and args.here != "trainer",
    }


def run_sandan(args: argparse.Namespace, folder: Path) -> list[float]:
    """Write a text file and a recipe and run the script; return the tokens/s of each log."""
    import runpy

    import yaml
    from tokenizers.pre_tokenizers import WhitespaceSplit

    shape = SHAPES[args.shape]
    vocabulary = shape["model"]["vocab_size"]
    tokenizer = make_tokenizer(vocabulary)
    tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save_pretrained(folder / "tokenizer")
    rows = settings(args, folder)["per_device_train_batch_size"] * args.steps
    draw = random.Random(0)
    words = [f"w{number}" for number in range(2, vocabulary)]
    with open(folder / "text.jsonl", "w", encoding="utf-8") as file:
        file.writelines(
            json.dumps({"text": " ".join(draw.choices(words, k=shape["block"]))}) + "\n"
            for _ in range(rows + rows // 50 + 2)
        )
    recipe = settings(args, folder) | {
        "tokenizer_name_or_path": str(folder / "tokenizer"),
        "model_config": shape["model"],
        "block_size_tokens": shape["block"],
        "datasets": [{"path": "json", "data_files": str(folder / "text.jsonl")}],
    }
    (folder / "pretrain.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    sys.argv = ["pretrain.py", "--config", str(folder / "pretrain.yaml")]
    try:
        runpy.run_path(str(ROOT / "scripts" / "pretrain.py"), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    state = json.loads((folder / "out" / "trainer_state.json").read_text())
    return [entry["tokens_per_second"] for entry in state["log_history"] if "tokens_per_second" in entry]


def run_trainer(args: argparse.Namespace, folder: Path) -> list[float]:
    """Train with `transformers.Trainer` as its users write it, on random tokens; return the tokens/s of each log."""
    import torch
    from datasets import Dataset
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        DefaultDataCollator,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    class Clock(TrainerCallback):
        def __init__(self):
            self.times: list[float] = []

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                self.times.append(time.perf_counter())

    shape = SHAPES[args.shape]
    fields = dict(shape["model"], attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, use_cache=False)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    options = settings(args, folder)
    rows = options["per_device_train_batch_size"]
    ids = torch.randint(0, config.vocab_size, (rows * args.steps, shape["block"])).numpy()
    data = Dataset.from_dict({"input_ids": ids, "labels": ids}).with_format("torch")
    clock = Clock()
    model = AutoModelForCausalLM.from_config(config)
    Trainer(model, TrainingArguments(**options), DefaultDataCollator(), data, callbacks=[clock]).train()
    tokens = rows * shape["block"] * LOGGING_STEPS
    return [tokens / (after - before) for before, after in itertools.pairwise(clock.times)]


def run_nanogpt(args: argparse.Namespace, folder: Path) -> list[float]:
    """Train nanoGPT's model with the loop of its train.py; return the tokens/s of each log.

    The model is compiled (unless switched off) and trained with bfloat16 autocast, fused AdamW and clipping.
    """
    import torch

    sys.path.insert(0, str(args.nanogpt_dir))
    from model import GPT, GPTConfig

    shape, device = SHAPES[args.shape], "cpu" if args.shape == "tiny" else "cuda"
    fields, rows = shape["model"], settings(args, folder)["per_device_train_batch_size"]
    sizes = {name: fields[name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    model = GPT(GPTConfig(block_size=shape["block"], dropout=0.0, bias=True, **sizes)).to(device)
    optimizer = model.configure_optimizers(0.1, 3e-4, (0.9, 0.95), device)
    step_of = torch.compile(model) if args.compile else model
    marks = []
    for step in range(args.steps):
        ids = torch.randint(0, fields["vocab_size"], (rows, shape["block"] + 1))
        if device == "cuda":
            ids = ids.pin_memory()
        ids = ids.to(device, non_blocking=True)
        with torch.autocast(device, torch.bfloat16):
            _, loss = step_of(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % LOGGING_STEPS == 0:
            loss.item()
            marks.append(time.perf_counter())
    tokens = rows * shape["block"] * LOGGING_STEPS
    return [tokens / (after - before) for before, after in itertools.pairwise(marks)]


RUNNERS = {"sandan": run_sandan, "trainer": run_trainer, "nanogpt": run_nanogpt}


def run_side(side: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run a side in a separate process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--here", side]
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH", ""))))
    done = subprocess.run(
        command, check=False, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, encoding="utf-8"
    )
    if done.returncode:
        print(done.stdout[-3000:], file=sys.stderr)
        return {"failed": done.returncode}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", choices=list(RUNNERS), default=list(RUNNERS))
    parser.add_argument("--shape", choices=list(SHAPES), default="124m")
    parser.add_argument("--rows", type=int, help="blocks of a step (default: of the shape)")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--nanogpt_dir", type=Path, default=Path("nanoGPT"), help="a clone of karpathy/nanoGPT")
    parser.add_argument("--here", choices=list(RUNNERS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    import torch

    if args.here:
        with tempfile.TemporaryDirectory() as folder:
            speeds = RUNNERS[args.here](args, Path(folder))[2:]
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
        print(
            json.dumps({"tokens_per_second": [round(speed) for speed in speeds], "peak_gib": peak and round(peak, 1)})
        )
        return
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = SHAPES[args.shape]
    config = AutoConfig.for_model(**shape["model"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    flops = 6 * model.num_parameters() + 12 * config.num_hidden_layers * config.hidden_size * shape["block"]
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "shape": args.shape,
        "parameters": model.num_parameters(),
        "sides": {},
    }
    for side in args.sides:
        found = run_side(side, args)
        if speeds := found.get("tokens_per_second"):
            speed = statistics.median(speeds)
            found |= {"tokens_per_second": speed, "all": speeds, "mfu": round(flops * speed / PEAK_FLOPS, 3)}
        result["sides"][side] = found
        print(f"{side}: {found}", file=sys.stderr, flush=True)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
