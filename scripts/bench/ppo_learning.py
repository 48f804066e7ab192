"""What `sandan.PPOTrainer` and TRL 1.12.0's, the last one, make of the same models with the same number of episodes.

    make reward                               # the SFT model and the reward model that both start from
    python scripts/bench/ppo_learning.py --seeds 1 2 3 4 5 --output learning.json

Both run the settings of recipes/tiny/ppo.yaml (those that TRL knows) from the same script, for each seed. TRL runs
twice: as the recipe says, and with as many optimizer steps as sandan makes ("trl_matched": its `num_mini_batches` has
no effect, defect T1 of docs/ppo.md, so that it makes half of them).

Six checkpoints of each run are judged on prompts that no stage has seen, by the oracle and by the KL to the SFT model,
as scripts/evaluate.py does. Prints JSON: of each run its curve, and sandan's oracle score at the KL where TRL ended
(between two checkpoints, a straight line). The environment of TRL is that of ppo_parity.py, which makes it once.
"""

import argparse
import datetime
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from ppo_parity import DEFAULT_ENV_DIR, ROOT, make_environment, processor


SIDE = Path(__file__).with_name("ppo_learning_side.py")
CHECKPOINTS = 6
# A run that lost a fifth of what it started with did not merely fail to learn.
COLLAPSED = 0.8


def run(side: str, interpreter: Path | str, seed: int, folder: Path) -> list[Path]:
    """Train once; the folders of the checkpoints in the order they were written."""
    trainer = "sandan" if side == "sandan" else "trl"
    settings = yaml.safe_load((ROOT / "recipes/tiny/ppo.yaml").read_text(encoding="utf-8"))
    updates = settings["total_episodes"] // (
        settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    )
    steps = settings["num_ppo_epochs"] * settings["num_mini_batches"]
    settings |= {"output_dir": str(folder), "seed": seed, "save_strategy": "steps", "disable_tqdm": True}
    # TRL's step is an update, sandan's an optimizer step.
    settings["save_steps"] = updates // CHECKPOINTS * (steps if trainer == "sandan" else 1)
    settings["num_sample_generations"] = 0
    if trainer == "trl":
        del settings["center_rewards"]
        settings |= {"stop_token": "eos", "gradient_checkpointing": False}
    if side == "trl_matched":
        settings |= {"num_ppo_epochs": steps, "num_mini_batches": 1}
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    environment = {"PYTHONPATH": str(ROOT / "src") if trainer == "sandan" else "", "HF_HUB_OFFLINE": "1"}
    with (folder / "log").open("w") as log:
        command = [str(interpreter), str(SIDE), trainer, str(folder / "settings.json")]
        if subprocess.run(
            command, check=False, cwd=ROOT, env=os.environ | environment, stdout=log, stderr=log
        ).returncode:
            raise SystemExit(f"error: {side}, seed {seed} failed\n{(folder / 'log').read_text()[-3000:]}")
    found = sorted(folder.glob("checkpoint-*"), key=lambda one: int(one.name.split("-")[1]))
    assert len(found) == CHECKPOINTS, found
    return found


def judge(checkpoints: Sequence[Path]) -> list[dict[str, float]]:
    """Oracle score, share correct and KL of the start (the SFT model) and of each checkpoint, on unseen prompts."""
    from sandan.data import read_jsonl
    from sandan.evaluation import EvaluateArguments, compare
    from sandan.models import load_causal_lm, load_tokenizer

    settings = yaml.safe_load((ROOT / "recipes/tiny/evaluate.yaml").read_text(encoding="utf-8"))
    (data_file,) = settings.pop("data_files")
    args = EvaluateArguments(**settings)
    sft = ROOT / settings["sft_model"]
    models = {"sft": load_causal_lm(str(sft))} | {one.name: load_causal_lm(str(one)) for one in checkpoints}
    rows, _ = compare(models, load_tokenizer(str(sft)), read_jsonl(ROOT / data_file, columns=[("prompt",)]), args)
    names = {"kl": "kl_to_sft", "score": "oracle/score", "correct": "oracle/correct", "stopped": "stopped_share"}
    return [{short: round(row[name], 4) for short, name in names.items()} for row in rows]


def score_at(kl: float, curve: Sequence[dict[str, float]]) -> float | None:
    """The score where a curve, from its start on, first reaches a KL; None if it never does."""
    for before, after in itertools.pairwise(curve):
        if before["kl"] <= kl <= after["kl"]:
            share = (kl - before["kl"]) / max(after["kl"] - before["kl"], 1e-9)
            return round(before["score"] + share * (after["score"] - before["score"]), 4)
    return None


def summary(runs: dict[str, dict[int, list[dict[str, float]]]]) -> dict[str, Any]:
    """Ranges over the seeds, and sandan's score where each of TRL's runs ended."""
    found: dict[str, Any] = {}
    for side, curves in runs.items():
        last = [curve[-1] for curve in curves.values()]
        found[side] = {f"{name}_range": [min(x), max(x)] for name in last[0] if (x := [one[name] for one in last])}
        found[side]["collapsed"] = sum(curve[-1]["score"] < COLLAPSED * curve[0]["score"] for curve in curves.values())
        if side != "sandan":
            found[side]["at_the_same_kl"] = {
                seed: {
                    "kl": curve[-1]["kl"],
                    side: curve[-1]["score"],
                    "sandan": score_at(curve[-1]["kl"], runs["sandan"][seed]),
                }
                for seed, curve in curves.items()
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env_dir", type=Path, default=DEFAULT_ENV_DIR, help="environment of TRL")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--output", type=Path, help="also write the JSON to this file, after every run")
    args = parser.parse_args()
    interpreter = make_environment(args.env_dir, [])
    sides = {"sandan": sys.executable, "trl": interpreter, "trl_matched": interpreter}
    runs: dict[str, dict[int, list[dict[str, float]]]] = {side: {} for side in sides}
    result = {"date": datetime.date.today().isoformat(), "hardware": processor(), "runs": runs}
    for seed in args.seeds:
        for side, python in sides.items():
            with tempfile.TemporaryDirectory(prefix="ppo_learning_") as folder:
                runs[side][seed] = judge(run(side, python, seed, Path(folder, "run")))
            print(f"seed {seed}, {side}: {runs[side][seed][-1]}", file=sys.stderr)
        result["summary"] = summary(runs)
        if args.output:
            args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
