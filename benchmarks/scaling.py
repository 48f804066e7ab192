"""Weak scaling: the stages on 1, 2, 4 and 8 GPUs of one host, with the same work for every GPU.

    python benchmarks/scaling.py --gpus 1 2 --output scaling.json
    python benchmarks/scaling.py --gpus 1 8 --modes pretrain_fsdp2 ppo_fsdp2 --torch_compile
    python benchmarks/scaling.py --gpus 1 2 --shape tiny --device cpu --modes pretrain_ddp ppo_ddp

Every run is started as users do: `accelerate launch` with a file of recipes/accelerate_configs (`single_gpu` on one
GPU, otherwise `ddp` or `fsdp2`), a script of scripts/ and a recipe. Models have random weights, texts random words.
The pace is that of the trainers' logs, without the first steps. (`include_num_input_tokens_seen` makes Trainer log its
clock.) MFU is (6 N + 12 L d T) x tokens/s over the card's dense bf16 peak, attention counted in full. The efficiency
is the pace of n GPUs over n times the pace of one. Prints JSON; with `--output` the file is rewritten after every run.

"tiny" on "cpu" only shows that everything runs (with gloo): its pace means nothing, and accelerate does not use FSDP
there.
"""

import argparse
import dataclasses
import json
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launching import (
    SHAPES,
    about,
    cause,
    history,
    launcher,
    make_model,
    make_tokenizer,
    start,
    wait,
    words,
    write_rows,
    write_yaml,
)
from ppo_parity import ROOT


# FLOP/s of dense bf16 products, from the vendor's data sheets.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
LOG_STEPS = 5
MOST_TOKENS = 8_000_000  # of data; longer runs repeat them
EPISODES = 64  # per GPU and update


@dataclass(frozen=True)
class Mode:
    """A stage with a model and data of a certain size.

    Args:
        launch: the file of recipes/accelerate_configs for several GPUs.
        rows: rows per GPU and step (for PPO: per micro-batch).
        tokens: length of a block or a row (for PPO: of prompt and answer).
        steps: how many steps are run, and how many of them are not measured (for PPO: updates).
    """

    stage: str
    launch: str
    shape: str
    rows: int
    tokens: int
    steps: tuple[int, int] = (40, 10)
    settings: dict[str, Any] = field(default_factory=dict)


PPO = {"num_ppo_epochs": 4, "temperature": 1.0, "num_sample_generations": 0, "local_rollout_forward_batch_size": 64}
MODES = {
    "pretrain_ddp": Mode("pretrain", "ddp", "124m", 32, 1024),
    "pretrain_fsdp2": Mode("pretrain", "fsdp2", "1b", 4, 2048, (30, 10)),
    "sft": Mode("sft", "ddp", "0.5b", 32, 256, (30, 10)),
    "reward": Mode("reward", "ddp", "0.5b", 16, 256, (30, 10)),
    "ppo_ddp": Mode("ppo", "ddp", "0.5b", 16, 384, (4, 2), PPO),
    "ppo_fsdp2": Mode("ppo", "fsdp2", "0.5b", 16, 384, (4, 2), PPO),
}
UNITS = {"pretrain": "tokens", "sft": "rows", "reward": "pairs", "ppo": "episodes"}


def tiny(mode: Mode) -> Mode:
    """Return the mode with a tiny model and few steps."""
    steps = (3, 1) if mode.stage == "ppo" else (15, 5)
    return Mode(mode.stage, mode.launch, "tiny", 2, 24, steps, mode.settings)


class Workshop:
    """A folder with models, data and recipes, which are made on demand."""

    def __init__(self, folder: Path, device: str, compiled: bool = False):
        self.folder, self.device, self.compiled = folder, device, compiled
        self.dice = random.Random(0)

    def model(self, shape: str, kind: str) -> str:
        folder = self.folder / f"{shape}-{kind}"
        return str(folder) if folder.is_dir() else make_model(folder, shape, kind)

    def data(self, mode: Mode, rows: int) -> str:
        """Return the file with `rows` rows for a stage, of `mode.tokens` tokens each."""
        path = self.folder / f"{mode.stage}-{rows}-{mode.tokens}.jsonl"
        if path.is_file():
            return str(path)
        prompt = mode.tokens // 3

        def text(tokens: int) -> str:
            return words(tokens, self.dice)

        def row() -> dict[str, str]:
            if mode.stage == "pretrain":
                return {"text": text(mode.tokens - 1)}
            if mode.stage == "ppo":
                return {"prompt": text(prompt)}
            names = ("completion",) if mode.stage == "sft" else ("chosen", "rejected")
            # Prompt and answer are joined without a space.
            return {"prompt": text(prompt)} | {name: " " + text(mode.tokens - prompt - 1) for name in names}

        return write_rows(path, [row() for _ in range(rows)])

    def recipe(self, name: str, mode: Mode, processes: int) -> tuple[Path, Path]:
        """Write the recipe of a run; return its file and the output folder."""
        output = self.folder / "outputs" / f"{name}-{processes}"
        settings = {
            "output_dir": str(output),
            "per_device_train_batch_size": mode.rows,
            "learning_rate": 1e-5,
            "logging_steps": LOG_STEPS,
            "logging_nan_inf_filter": False,
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": self.device == "cpu",
            "bf16": self.device == "cuda",
            "torch_compile": self.compiled,
            **mode.settings,
        }
        settings |= self.of_ppo(mode, processes) if mode.stage == "ppo" else self.of_steps(mode, processes)
        return write_yaml(self.folder / f"{name}-{processes}.yaml", settings), output

    def of_steps(self, mode: Mode, processes: int) -> dict[str, Any]:
        steps = min(mode.steps[0], MOST_TOKENS // (mode.rows * processes * mode.tokens))
        loaders = 4 if self.device == "cuda" else 0
        settings = {
            "max_steps": mode.steps[0],
            "data_files": [self.data(mode, steps * mode.rows * processes)],
            "dataloader_num_workers": loaders,
            "dataloader_persistent_workers": loaders > 0,
            "include_num_input_tokens_seen": True,
            "ddp_find_unused_parameters": False,
        }
        if mode.stage == "pretrain":
            model = dict(SHAPES[mode.shape])
            tokenizer = make_tokenizer(self.folder / "tokenizer")
            settings |= {"tokenizer_name_or_path": tokenizer, "model_config": model, "block_size_tokens": mode.tokens}
        else:
            settings |= {"model_name_or_path": self.model(mode.shape, "CausalLM"), "dtype": "float32"}
            settings |= {"max_length": mode.tokens, "gradient_checkpointing": False}
        return settings

    def of_ppo(self, mode: Mode, processes: int) -> dict[str, Any]:
        episodes = EPISODES if mode.shape != "tiny" else 4
        return {
            "model_name_or_path": self.model(mode.shape, "CausalLM"),
            "reward_model_path": self.model(mode.shape, "SequenceClassification"),
            "dtype": "float32",
            "data_files": [self.data(mode, episodes * processes)],
            "allow_repeats": True,
            "response_length": mode.tokens - mode.tokens // 3,
            "gradient_accumulation_steps": episodes // mode.rows,
            "total_episodes": episodes * processes * mode.steps[0],
            "logging_steps": mode.settings["num_ppo_epochs"],
        }


def run(workshop: Workshop, name: str, mode: Mode, processes: int, seconds: float) -> dict[str, Any]:
    """Run a stage; return its figures, or its error."""
    recipe, output = workshop.recipe(name, mode, processes)
    script = str(ROOT / "scripts" / f"{mode.stage}.py")
    log = workshop.folder / f"{name}-{processes}.log"
    command = [*launcher(mode.launch, processes, workshop.device), script, "--config", str(recipe)]
    started = time.monotonic()
    try:
        code = wait(start(command, log), seconds)
    except TimeoutError as error:
        return {"error": f"{error}: {cause(log)}"}
    if code:
        return {"error": f"exit code {code}: {cause(log)}"}
    result = json.loads((output / "result.json").read_text(encoding="utf-8"))
    logs = history(output)
    figures = ppo_figures(mode, logs) if mode.stage == "ppo" else step_figures(mode, logs, processes)
    if mode.stage == "pretrain":
        figures |= efficiency_of_cards(mode, figures, result["metrics"]["parameters"], processes)
    figures["peak_gpu_memory_gib"] = result.get("peak_gpu_memory_gib")
    return figures | {"wall_seconds": round(time.monotonic() - started, 1)}


def step_figures(mode: Mode, logs: list[dict[str, Any]], processes: int) -> dict[str, Any]:
    """Return the pace between the first measured log and the last one."""
    counted = [entry for entry in logs if "loss" in entry and entry["step"] >= mode.steps[1]]
    steps = counted[-1]["step"] - counted[0]["step"]
    seconds = (counted[-1]["train_runtime"] - counted[0]["train_runtime"]) / steps
    amount = mode.rows * processes * (mode.tokens if mode.stage == "pretrain" else 1)
    return {f"{UNITS[mode.stage]}_per_second": amount / seconds, "step_seconds": seconds, "steps": steps}


def ppo_figures(mode: Mode, logs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return means of the measured updates (one per log), and the shares of their phases in the time."""
    updates = [entry for entry in logs if "time/update_seconds" in entry][mode.steps[1] :]
    tokens = sum(entry["val/response_tokens"] for entry in updates)
    episodes = [
        after["episode"] - before["episode"]
        for after, before in zip(logs[1:], logs, strict=False)
        if "episode" in after
    ]
    seconds = sum(entry["val/response_tokens"] * episodes[0] / entry["time/tokens_per_second"] for entry in updates)
    names = [name for name in updates[0] if name.startswith("time/") and name.endswith("_seconds")]
    return {
        "episodes_per_second": episodes[0] * len(updates) / seconds,
        "update_seconds": seconds / len(updates),
        "shares": {
            name.removeprefix("time/").removesuffix("_seconds"): sum(entry[name] for entry in updates) / seconds
            for name in names
        },
        "response_tokens": tokens / len(updates),
        "updates": len(updates),
    }


def efficiency_of_cards(mode: Mode, figures: dict[str, Any], parameters: int, processes: int) -> dict[str, Any]:
    """Return tokens/s and MFU per GPU; the embedding is tied, so every parameter is part of a matrix product."""
    import torch

    shape, pace = SHAPES[mode.shape], figures["tokens_per_second"] / processes
    attention = 12 * shape["num_hidden_layers"] * shape["hidden_size"] * mode.tokens
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in card), None)
    mfu = None if peak is None else (6 * parameters + attention) * pace / peak
    return {"parameters": parameters, "tokens_per_second_per_gpu": pace, "mfu": mfu}


def add_efficiency(results: dict[str, dict[str, Any]], modes: dict[str, Mode]) -> None:
    """Add the weak-scaling efficiency to `results`, if there is a run on one GPU."""
    for name, runs in results.items():
        pace = f"{UNITS[modes[name].stage]}_per_second"
        single = runs.get("1", {}).get(pace)
        for processes, figures in runs.items():
            if single and pace in figures:
                figures["efficiency"] = figures[pace] / (int(processes) * single)


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 2, 4, 8], help="more than there are: left out")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=("full", "tiny"), default="full")
    parser.add_argument("--torch_compile", action="store_true")
    parser.add_argument("--rows", type=int, help="rows of one GPU and step, instead of the modes' own")
    parser.add_argument("--limit_seconds", type=float, default=240, help="longest time of one run")
    parser.add_argument("--total_seconds", type=float, default=3600, help="no run is begun after this time")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    args = parser.parse_args()
    started, result = time.monotonic(), about() | {"device": args.device, "torch_compile": args.torch_compile}
    modes = {name: tiny(MODES[name]) if args.shape == "tiny" else MODES[name] for name in args.modes}
    if args.rows:
        modes = {name: dataclasses.replace(mode, rows=args.rows) for name, mode in modes.items()}
    result["modes"] = {name: dataclasses.asdict(mode) for name, mode in modes.items()}
    result["results"] = runs = {name: {} for name in modes}
    known: dict[Any, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        workshop = Workshop(Path(folder), args.device, args.torch_compile)
        for name, processes in ((name, count) for name in modes for count in available(args)):
            if time.monotonic() - started > args.total_seconds:
                runs[name][str(processes)] = {"error": "not begun: --total_seconds"}
                continue
            mode = modes[name]
            # On one GPU all ways to launch a stage are the same run.
            key = (mode.stage, mode.shape, processes, processes > 1 and mode.launch)
            if key not in known:
                known[key] = run(workshop, name, mode, processes, args.limit_seconds)
            runs[name][str(processes)] = known[key]
            print(f"{name} on {processes}: {rounded(known[key])}", file=sys.stderr, flush=True)
            add_efficiency(runs, modes)
            text = json.dumps(rounded(result), indent=1)
            if args.output:
                args.output.write_text(text + "\n", encoding="utf-8")
    print(text)
    if any("error" in figures for found in runs.values() for figures in found.values()):
        sys.exit(1)


def available(args: argparse.Namespace) -> list[int]:
    import torch

    return [count for count in args.gpus if args.device == "cpu" or count <= torch.cuda.device_count()]


if __name__ == "__main__":
    main()
