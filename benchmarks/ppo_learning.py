"""Learning of `sandan.PPOTrainer` and TRL 1.12.0's (the last one), from the same models and with the same episodes.

    make reward                               # makes the SFT model and the reward model from which both start
    python benchmarks/ppo_learning.py --seeds 1 2 3 4 5 --output learning.json

Both run the settings of recipes/tiny/ppo.yaml (those that TRL knows), from the same script, for each seed. They use
one minibatch, because TRL's `num_mini_batches` has no effect (defect T1 of docs/ppo.md): so both make the same number
of optimizer steps. "sandan_recipe" is sandan with the recipe's two minibatches.

Six checkpoints of each run are judged on prompts that no stage has seen, by the oracle and by the KL to the SFT model,
as in scripts/evaluate.py. Prints JSON: the curve of each run, and range and mean of the last checkpoints over the
seeds. With --output a second start continues where the first one ended. TRL runs in the environment that ppo_parity.py
makes once.
"""

import argparse
import datetime
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from ppo_parity import DEFAULT_ENV_DIR, ROOT, make_environment, processor


SIDE = Path(__file__).with_name("ppo_learning_side.py")
SIDES = ("sandan", "trl", "sandan_recipe")
CHECKPOINTS = 6
# A run has collapsed if it ends below this share of its initial score.
COLLAPSED = 0.8


def run(side: str, interpreter: Path | str, seed: int, folder: Path) -> list[Path]:
    """Train once; return the folders of the checkpoints in the order in which they were written."""
    trainer = side.partition("_")[0]
    settings = yaml.safe_load((ROOT / "recipes/tiny/ppo.yaml").read_text(encoding="utf-8"))
    updates = settings["total_episodes"] // (
        settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    )
    # Checkpoints are judged here instead.
    for name in [key for key in settings if key.startswith(("eval_", "true_score", "per_device_eval"))]:
        del settings[name]
    if side != "sandan_recipe":
        settings["num_mini_batches"] = 1
    steps = settings["num_ppo_epochs"] * settings["num_mini_batches"]
    settings |= {"output_dir": str(folder), "seed": seed, "save_strategy": "steps", "disable_tqdm": True}
    # A step is an update in TRL and an optimizer step in sandan.
    settings["save_steps"] = updates // CHECKPOINTS * (steps if trainer == "sandan" else 1)
    settings["num_sample_generations"] = 0
    if trainer == "trl":
        del settings["center_rewards"]
        settings |= {"stop_token": "eos", "gradient_checkpointing": False}
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    environment = {"PYTHONPATH": str(ROOT / "src") if trainer == "sandan" else "", "HF_HUB_OFFLINE": "1"}
    with (folder / "log").open("w") as log:
        command = [str(interpreter), str(SIDE), trainer, str(folder / "settings.json")]
        if subprocess.run(
            command, check=False, cwd=ROOT, env=os.environ | environment, stdout=log, stderr=log
        ).returncode:
            raise SystemExit(f"error: {side}, seed {seed} failed\n{(folder / 'log').read_text()[-3000:]}")
    found = sorted(folder.glob("checkpoint-*"), key=lambda checkpoint: int(checkpoint.name.split("-")[1]))
    assert len(found) == CHECKPOINTS, found
    return found


def judge(checkpoints: Sequence[Path]) -> list[dict[str, float]]:
    """Return oracle score, share correct and KL on unseen prompts, of the SFT model and of each checkpoint."""
    from sandan.data.jsonl import read_jsonl
    from sandan.evaluate.comparison import EvaluateArguments, compare
    from sandan.models.loading import load_causal_lm, load_tokenizer

    settings = yaml.safe_load((ROOT / "recipes/tiny/evaluate.yaml").read_text(encoding="utf-8"))
    (data_file,) = settings.pop("data_files")
    args = EvaluateArguments(**settings)
    sft = ROOT / settings["sft_model"]
    models = {"sft": load_causal_lm(str(sft))} | {path.name: load_causal_lm(str(path)) for path in checkpoints}
    rows, _ = compare(models, load_tokenizer(str(sft)), read_jsonl(ROOT / data_file, columns=[("prompt",)]), args)
    names = {"kl": "kl_to_sft", "score": "oracle/score", "correct": "oracle/correct", "stopped": "stopped_share"}
    names["pretraining_only"] = "oracle_pretraining_only/correct"
    return [{short: round(row[name], 4) for short, name in names.items()} for row in rows]


def summary(runs: dict[str, dict[str, list[dict[str, float]]]]) -> dict[str, Any]:
    """Return range and mean over the seeds of each side's final figures, and how many runs collapsed."""
    found: dict[str, Any] = {}
    for side, curves in runs.items():
        ends = [curve[-1] for curve in curves.values()]
        columns = {name: [end[name] for end in ends] for name in (ends[0] if ends else ())}
        found[side] = {
            name: {"min": min(values), "max": max(values), "mean": round(statistics.mean(values), 4)}
            for name, values in columns.items()
        }
        found[side]["collapsed"] = sum(curve[-1]["score"] < COLLAPSED * curve[0]["score"] for curve in curves.values())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env_dir", type=Path, default=DEFAULT_ENV_DIR, help="environment of TRL")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--output", type=Path, help="also write the JSON to this file, after every run")
    args = parser.parse_args()
    interpreter = make_environment(args.env_dir, [])
    interpreters = {side: interpreter if side == "trl" else sys.executable for side in args.sides}
    result: dict[str, Any] = {"date": datetime.date.today().isoformat(), "hardware": processor()}
    result["runs"] = runs = {side: {} for side in args.sides}
    if args.output and args.output.exists():
        runs |= json.loads(args.output.read_text(encoding="utf-8"))["runs"]
    for seed, side in itertools.product(map(str, args.seeds), args.sides):
        if seed in runs[side]:
            continue
        with tempfile.TemporaryDirectory(prefix="ppo_learning_") as folder:
            runs[side][seed] = judge(run(side, interpreters[side], int(seed), Path(folder, "run")))
        print(f"seed {seed}, {side}: {runs[side][seed][-1]}", file=sys.stderr)
        result["summary"] = summary(runs)
        if args.output:
            args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
