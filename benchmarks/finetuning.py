"""Speed of SFT and reward training: `scripts/sft.py` and `scripts/reward.py` against stock TRL.

    python benchmarks/finetuning.py sft --data instructions.jsonl       # one GPU; prompt and completion
    python benchmarks/finetuning.py reward --data pairs.jsonl           # prompt, chosen and rejected
    python benchmarks/finetuning.py reward --shape tiny                 # CPU, to see that it runs

The model has Qwen2.5-0.5B's shape with random weights (or is given by `--model`), the tokenizer is a byte-level BPE
trained on the data (the repository's own by default). Every side runs in its own process and sees the same rows once,
with the same learning rate and the same rows per step: "stock_8" is TRL with its defaults (micro-batches of 8,
gradient checkpointing), "stock_32" has micro-batches of 32 and no checkpointing, "sandan" is the script with
`torch_compile`, "packed" also packs rows into 1,024 tokens. All use bfloat16 autocast. AdamW, clipping, data loading
and logs are part of the time, the first logs (compilation) are not. Afterwards the same code measures all sides on
held-out rows. Prints JSON: real tokens/s (no padding), pairs/s, MFU = 6 x parameters without embeddings x tokens/s /
989 TFLOP/s, peak memory, held-out loss per token or accuracy.
"""

import argparse
import gzip
import json
import random
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launching import about, environment, write_rows, write_yaml
from ppo_parity import ROOT
from rollouts import SHAPE


PEAK_FLOPS = 989e12
TINY = SHAPE | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_window_layers": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "0.5b": {"model": SHAPE, "vocabulary": 32_000, "max_length": 1024},
    "tiny": {"model": TINY, "vocabulary": 1024, "max_length": 128},
}
# Training rows, rows per step, held-out rows.
ROWS = {("sft", "0.5b"): (6144, 128, 500), ("reward", "0.5b"): (1536, 32, 300)}
ROWS |= {("sft", "tiny"): (96, 16, 32), ("reward", "tiny"): (96, 16, 32)}
SIDES = {"sft": ["stock_8", "stock_32", "sandan", "packed"], "reward": ["stock_8", "stock_32", "sandan"]}
PACKED_ROWS = 8  # rows of 122 tokens (the mean, about) that fit in max_length
SPARE_IDS = 64  # rows of the embedding without a token, so that its number of rows is round
LOGGING_STEPS = 4
SKIPPED_LOGS = 3


def read(path: Path) -> list[dict[str, str]]:
    """Read distinct rows of texts; chat turns are joined, so that no template is needed."""

    def text(value: Any) -> str:
        return value if isinstance(value, str) else "\n".join(turn["content"] for turn in value)

    names = ("prompt", "completion", "chosen", "rejected")
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        rows = ({name: text(value) for name, value in json.loads(line).items() if name in names} for line in file)
        return list({json.dumps(row): row for row in rows}.values())


def own_pairs() -> list[dict[str, str]]:
    """Make pairs from the repository's instructions: the answer, and the answer to another question."""
    rows = read(ROOT / "data" / "sft.jsonl")
    return [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other["completion"]}
        for row, other in zip(rows, [*rows[1:], rows[0]], strict=True)
        if row["completion"] != other["completion"]
    ]


def split(rows: list[dict[str, str]], trained: int, held_out: int) -> tuple[list[dict[str, str]], ...]:
    """Split rows into training and held-out rows that have no prompt in common."""
    prompts = sorted({row["prompt"] for row in rows})
    random.Random(0).shuffle(prompts)
    place = {prompt: number for number, prompt in enumerate(prompts)}
    rows = sorted(rows, key=lambda row: place[row["prompt"]])
    last = {row["prompt"] for row in rows[-held_out:]}
    return [row for row in rows if row["prompt"] not in last][:trained], rows[-held_out:]


def prepare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write data, tokenizer and a model of random weights to `folder`; return their description."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from sandan.pretrain.tokenizer import train_tokenizer

    trained, _, held_out = ROWS[args.stage, args.shape]
    rows = read(args.data) if args.data else own_pairs() if args.stage == "reward" else read(ROOT / "data/sft.jsonl")
    train, held = split(rows, args.rows or trained, held_out)
    write_rows(folder / "train.jsonl", train)
    write_rows(folder / "held_out.jsonl", held)
    shape = SHAPES[args.shape]
    if args.model is None:
        texts = (text for row in rows for text in row.values())
        tokenizer = train_tokenizer(texts, shape["vocabulary"] - SPARE_IDS)
        special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        config = AutoConfig.for_model("qwen2", **shape["model"] | special | {"vocab_size": shape["vocabulary"]})
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
    return {"rows": len(train), "held_out_rows": len(held), "data": args.data.name if args.data else "data/sft.jsonl"}


def settings(side: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the training arguments of a side."""
    per_step, tiny = ROWS[args.stage, args.shape][1], args.shape == "tiny"
    stock = side.startswith("stock_")
    rows = min(int(side.removeprefix("stock_")), per_step) if stock else per_step
    ours = {"torch_compile": args.compile, "gradient_checkpointing": False}
    if side == "packed":
        ours |= {"packing": True}
    return {
        "output_dir": str(folder / side),
        "num_train_epochs": 1,
        "per_device_train_batch_size": per_step // PACKED_ROWS if side == "packed" else rows,
        "gradient_accumulation_steps": per_step // rows,
        "max_length": SHAPES[args.shape]["max_length"],
        "learning_rate": args.learning_rate,
        "warmup_steps": 0.1,
        "bf16": not tiny,
        "use_cpu": tiny,
        "logging_steps": 1 if tiny else LOGGING_STEPS,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_num_workers": 0 if tiny else 4,
        **({"gradient_checkpointing": side == "stock_8"} if stock else ours),
    }


def run_stock(side: str, args: argparse.Namespace, folder: Path) -> None:
    """Train with TRL's trainer as its users write it."""
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer

    name = {"sft": "SFT", "reward": "Reward"}[args.stage]
    model = str(args.model or folder / "model")
    trainer = getattr(trl, f"{name}Trainer")(
        model,
        getattr(trl, f"{name}Config")(**settings(side, args, folder)),
        train_dataset=Dataset.from_json(str(folder / "train.jsonl")),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.train()
    trainer.save_model()


def run_script(side: str, args: argparse.Namespace, folder: Path) -> None:
    """Write a recipe and run the script with it."""
    recipe = settings(side, args, folder) | {
        "model_name_or_path": str(args.model or folder / "model"),
        "dtype": "float32",
        "data_files": [str(folder / "train.jsonl")],
        "allow_repeats": True,
        "logging_nan_inf_filter": False,
    }
    sys.argv = [f"{args.stage}.py", "--config", str(write_yaml(folder / f"{side}.yaml", recipe))]
    try:
        runpy.run_path(str(ROOT / "scripts" / f"{args.stage}.py"), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise


def run_here(side: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train in this process; return figures from its logs, without the first ones."""
    import torch
    from transformers import TrainerCallback, trainer

    marks: list[tuple[float, int, float]] = []

    class Clock(TrainerCallback):
        def on_log(self, _: Any, state: Any, __: Any, logs: dict[str, float], **___: Any) -> None:
            if "loss" in logs:
                marks.append((time.perf_counter(), state.global_step, logs["num_tokens"]))

    trainer.DEFAULT_CALLBACKS.append(Clock)
    begun = time.perf_counter()
    (run_stock if side.startswith("stock_") else run_script)(side, args, folder)
    counted = marks[1 if args.shape == "tiny" else SKIPPED_LOGS :]
    seconds, steps, tokens = (last - first for first, last in zip(counted[0], counted[-1], strict=True))
    figures = {"tokens_per_second": tokens / seconds, "step_seconds": seconds / steps, "steps": marks[-1][1]}
    if args.stage == "reward":
        figures["pairs_per_second"] = ROWS[args.stage, args.shape][1] * steps / seconds
    if torch.cuda.is_available():
        figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return figures | {"seconds_in_all": time.perf_counter() - begun} | held_out(args, folder, folder / side)


def held_out(args: argparse.Namespace, folder: Path, model: Path) -> dict[str, float]:
    """Return loss per answer token, or accuracy, of a saved model on padded held-out rows in float32."""
    import torch
    from torch.nn.functional import cross_entropy

    loss = tokens = 0.0
    right: list[bool] = []
    for network, batch in batches(args, folder, model):
        with torch.no_grad():
            logits = network(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
        if args.stage == "reward":
            chosen, rejected = logits.squeeze(-1).chunk(2)
            right += (chosen > rejected).tolist()
        else:
            labels = batch["labels"][:, 1:].flatten()
            loss += cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="sum").item()
            tokens += (labels != -100).sum().item()
    return {"held_out_accuracy": statistics.mean(right)} if right else {"held_out_loss": loss / tokens}


def batches(args: argparse.Namespace, folder: Path, model: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield the model with each batch that stock TRL makes of the held-out rows."""
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer

    name = {"sft": "SFT", "reward": "Reward"}[args.stage]
    options = {"max_length": SHAPES[args.shape]["max_length"], "bf16": False, "use_cpu": args.shape == "tiny"}
    trainer = getattr(trl, f"{name}Trainer")(
        str(model),
        getattr(trl, f"{name}Config")(str(folder / "scored"), report_to="none", **options),
        train_dataset=Dataset.from_json(str(folder / "held_out.jsonl")),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.model.eval()
    for batch in trainer.get_train_dataloader():
        yield trainer.model, batch


def run_side(side: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train and measure in a separate process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--here", side, "--folder", str(folder)]
    done = subprocess.run(command, check=False, env=environment(), stdout=subprocess.PIPE, encoding="utf-8")
    if done.returncode:
        print(done.stdout[-3000:], file=sys.stderr)
        return {"failed": done.returncode}
    return json.loads(done.stdout.splitlines()[-1])


def parameters(model: Path) -> int:
    """Return the number of parameters without embeddings."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).num_parameters(
            exclude_embeddings=True
        )


def median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median of each figure over the runs that did not fail."""
    whole = [run for run in runs if "failed" not in run]
    return {name: float(f"{statistics.median(run[name] for run in whole):.5g}") for name in (whole or [{}])[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("sft", "reward"))
    parser.add_argument("--sides", nargs="+", help="stock_8, stock_32, sandan, packed; any number of stock_N")
    parser.add_argument("--shape", choices=list(SHAPES), default="0.5b")
    parser.add_argument("--data", type=Path, help="JSONL, also gzipped, instead of the repository's own")
    parser.add_argument("--model", type=Path, help="folder of a causal LM with tokenizer, instead of random weights")
    parser.add_argument("--rows", type=int, help="rows that are trained on")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--rounds", type=int, default=1, help="how often the sides take turns")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        print(json.dumps(run_here(args.here, args, args.folder)))
        return
    sys.path.insert(0, str(ROOT / "src"))
    sides = args.sides or SIDES[args.stage]
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory(prefix="finetuning-") as folder:
        result = about() | {"stage": args.stage, "shape": args.shape} | prepare(args, Path(folder))
        result["parameters"] = count = parameters(args.model or Path(folder, "model"))
        for _ in range(args.rounds):
            for side in sides:
                runs[side].append(run_side(side, args, Path(folder)))
                print(f"{side}: {runs[side][-1]}", file=sys.stderr, flush=True)
    result["sides"] = {side: median(found) for side, found in runs.items()}
    for figures in result["sides"].values():
        if args.shape != "tiny" and figures:
            figures["mfu"] = round(6 * count * figures["tokens_per_second"] / PEAK_FLOPS, 3)
    result["runs"] = runs
    text = json.dumps(result, indent=1)
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
