"""Tests of runs on N GPUs: they equal a run on one GPU, and they resume correctly after being killed.

    python benchmarks/scaling_faults.py --gpus 2 --output faults.json
    python benchmarks/scaling_faults.py --gpus 2 --device cpu --cases equal_pretrain_ddp faults_pretrain_ddp

equal_pretrain_* runs scripts/pretrain.py on N GPUs and on one, with the same global batch, in float32 without dropout,
and compares the loss of every step. equal_ppo_* runs two updates of PPOTrainer on N GPUs and on one, with the same
prompts and answers, in float32, and compares every logged number. (The answers are given, because each rank samples
with its own seed: sampled answers depend on the number of ranks, and their means differ by their standard errors.)

faults_* runs scripts/pretrain.py or ppo.py on N GPUs, in bf16 with dropout. In one run a rank gets SIGKILL, in another
the launcher gets SIGTERM, as from Slurm, both after the first checkpoint. All processes must end in time, and the same
command must resume the run and log the same as an uninterrupted run; on the CPU this is compared bit for bit.

A process that does not end is a failure. Models and data are those of tests/helpers/faults.py. Prints JSON; exit code 1 if a
case fails.
"""

import argparse
import json
import math
import signal
import sys
import tempfile
import time
from pathlib import Path
from subprocess import Popen
from typing import Any

from launching import about, cause, history, launcher, start, wait, workers
from ppo_parity import ROOT


sys.path.extend([str(ROOT / "src"), str(ROOT / "tests")])
from helpers import faults


def cases(*launches: str) -> list[str]:
    return [
        f"{kind}_{stage}_{launch}"
        for launch in launches
        for kind in ("equal", "faults")
        for stage in ("pretrain", "ppo")
    ]


STAGES = {"pretrain": "clm", "ppo": "ppo"}
GLOBAL_ROWS, EPISODES, MICRO_BATCH = 8, 16, 2
# Largest differences: relative, of float32 sums in another order; absolute, of bf16 losses whose kernels add in any
# order.
EQUAL, RESUMED_CUDA = 2e-3, 2e-2
SMALL = 1e-4


class Bench:
    def __init__(self, folder: Path, args: argparse.Namespace):
        self.folder, self.args = folder, args
        self.cpu = args.device == "cpu"

    def arguments(self, stage: str, output: Path, **changes: Any) -> list[str]:
        """Return script and options of a stage of tests/helpers/faults.py; the value None removes an option."""
        script, words = faults.command(STAGES[stage], self.folder, output)
        options = dict(zip(words[::2], words[1::2], strict=True))
        options |= {"--use_cpu": self.cpu, **{f"--{name}": value for name, value in changes.items()}}
        kept = {name: value for name, value in options.items() if value is not None}
        return [script, *(str(word) for pair in kept.items() for word in pair)]

    def launch(self, launch: str, processes: int, precision: str, arguments: list[str]) -> list[str]:
        command = [*launcher(launch, processes, self.args.device), "--mixed_precision", precision]
        if self.cpu and processes > 1 and launch != "ddp":
            command.append(str(ROOT / "tests" / "helpers" / "shards_on_cpu.py"))
        return command + arguments

    def run(self, command: list[str], output: Path) -> None:
        """Run a launcher to its end.

        Raises:
            RuntimeError: if it failed.
            TimeoutError: if it did not end in time.
        """
        log = output.with_suffix(".log")
        code = wait(start(command, log), self.args.limit_seconds)
        if code:
            raise RuntimeError(f"exit code {code}: {cause(log)}")

    # ---- Equal ----

    def equal_pretrain(self, launch: str) -> dict[str, Any]:
        curves = {}
        model = json.dumps(faults.MODELS["clm"] | {"attention_dropout": 0.0, "max_position_embeddings": 64})
        for processes in (1, self.args.gpus):
            output = self.folder / f"equal-pretrain-{launch}-{processes}"
            changes = {"model_config": model, "logging_steps": 1, "save_strategy": "no", "eval_strategy": "no"}
            # Otherwise the last batch of an epoch is short on one GPU, but filled up with the first rows on several.
            changes |= {"dataloader_drop_last": True, "per_device_eval_batch_size": 4}
            changes |= {"per_device_train_batch_size": GLOBAL_ROWS // processes, "bf16": False}
            self.run(self.launch(launch, processes, "no", self.arguments("pretrain", output, **changes)), output)
            curves[processes] = [entry["loss"] for entry in history(output) if "loss" in entry]
        single, many = curves.values()
        assert len(single) == len(many) > 0, f"{len(single)} and {len(many)} steps"
        largest = max(abs(first - second) for first, second in zip(single, many, strict=True))
        # The loss must fall: a constant loss would be equal even with wrong gradients.
        fell = single[0] - single[-1]
        return {"ok": largest <= EQUAL and fell > 0.3, "largest_loss_difference": largest, "loss_fell_by": fell}

    def equal_ppo(self, launch: str) -> dict[str, Any]:
        found = {}
        for processes in (1, self.args.gpus):
            output = self.folder / f"equal-ppo-{launch}-{processes}"
            worker = [__file__, "--here", str(output), "--work", str(self.folder), "--device", self.args.device]
            self.run(self.launch(launch, processes, "no", worker), output)
            found[processes] = [
                {name: value for name, value in entry.items() if not name.startswith(faults.TIMED)}
                for entry in history(output)
                if "objective/kl" in entry
            ]
        single, many = found.values()
        assert len(single) == len(many) == 2, f"{len(single)} and {len(many)} updates"
        first, second = (differences(before, after) for before, after in zip(single, many, strict=True))
        worst = max(first, key=first.get)
        return {
            "ok": max(*first.values(), *second.values()) <= EQUAL,
            "first_update": {"numbers": len(first), "largest_relative_difference": first[worst], "of": worst},
            "second_update": {"largest_relative_difference": max(second.values())},
        }

    # ---- Faults ----

    def faults_pretrain(self, launch: str) -> dict[str, Any]:
        steps = 60 if self.cpu else 200
        return self.faults("pretrain", launch, max_steps=steps, save_steps=10, eval_steps=25)

    def faults_ppo(self, launch: str) -> dict[str, Any]:
        changes = {} if launch == "ddp" else {"policy_ema_decay": None}
        return self.faults("ppo", launch, total_episodes=80 * self.args.gpus, **changes)

    def faults(self, stage: str, launch: str, **changes: Any) -> dict[str, Any]:
        precision = "no" if self.cpu else "bf16"

        def command(output: Path) -> list[str]:
            arguments = self.arguments(stage, output, bf16=not self.cpu, **changes)
            return self.launch(launch, self.args.gpus, precision, arguments)

        whole = self.folder / f"{stage}-{launch}-whole"
        self.run(command(whole), whole)
        expected, found = faults.outcome(whole), {}
        for kind in ("SIGKILL", "SIGTERM"):
            output = self.folder / f"{stage}-{launch}-{kind}"
            seconds = self.end(start(command(output), output.with_suffix(".log")), kind, output)
            left = faults.left_behind(output)
            self.run(command(output), output)
            found[kind] = {"ended_in_seconds": seconds, "where": left, **compared(expected, faults.outcome(output))}
        tolerance = 0.0 if self.cpu else RESUMED_CUDA
        ok = all(run["largest_log_difference"] <= tolerance for run in found.values())
        return {"ok": ok, **found}

    def end(self, process: Popen, kind: str, output: Path) -> float:
        """Kill the last rank, or ask the launcher to stop, after the first checkpoint.

        Returns:
            Seconds until all processes had ended.

        Raises:
            RuntimeError: if the run ended before that.
            TimeoutError: if there was no checkpoint, or processes did not end.
        """
        deadline = time.monotonic() + self.args.limit_seconds
        while not list(output.glob("checkpoint-*")):
            if process.poll() is not None:
                raise RuntimeError(f"ended with {process.returncode}: {cause(output.with_suffix('.log'))}")
            if time.monotonic() > deadline:
                wait(process, 0)
            time.sleep(0.005)
        ranks = workers(process)
        assert len(ranks) == self.args.gpus, f"{len(ranks)} processes"
        asked = time.monotonic()
        if kind == "SIGKILL":
            ranks[-1].kill()
        else:
            process.send_signal(signal.SIGTERM)
        code = wait(process, self.args.limit_seconds)
        seconds = time.monotonic() - asked
        if code == 0:
            raise RuntimeError("the run was finished before it could be interrupted")
        alive = [rank.pid for rank in ranks if rank.is_running()]
        if alive:
            raise TimeoutError(f"processes {alive} outlived their launcher")
        return seconds


def differences(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    """Return the difference of each number relative to its size, or to `SMALL` if it is smaller."""
    assert one.keys() == other.keys()
    return {name: abs(one[name] - other[name]) / max(abs(one[name]), SMALL) for name in one}


def compared(expected: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Return the largest difference of two outcomes of `faults.outcome`, and whether they are equal bit for bit."""
    largest = 0.0 if len(expected["history"]) == len(found["history"]) else math.inf
    for wanted, entry in zip(expected["history"], found["history"], strict=False):
        if wanted.keys() != entry.keys():
            largest = math.inf
        for name in wanted.keys() & entry.keys():
            # Numbers above 1 (a gradient norm, a sum over an answer) are compared relative to their size.
            largest = max(largest, abs(wanted[name] - entry[name]) / max(abs(wanted[name]), 1.0))
    different = faults.difference(expected, found)
    return {"largest_log_difference": largest, "bit_for_bit": different is None}


def ppo_here(output: Path, work: Path, device: str) -> None:
    """Run two PPO updates, on answers that depend on the prompts only."""
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from sandan import PPOConfig, PPOTrainer
    from sandan.models.sampling import Completion
    from sandan.ppo.rollout import Rollout

    class GivenAnswers(PPOTrainer):
        def sample(self, rows, seed, greedy=False):
            completions = []
            for row in rows:
                dice = torch.Generator().manual_seed(sum(row["input_ids"]))
                length = int(torch.randint(2, 17, (1,), generator=dice))
                ids = torch.randint(10, 250, (length - 1,), generator=dice).tolist()
                completions.append(Completion("", (*ids, self.stop_token_id), True))
            return Rollout(rows, completions)

    config = PPOConfig(
        str(output),
        use_cpu=device == "cpu",
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        per_device_train_batch_size=MICRO_BATCH,
        total_episodes=2 * EPISODES,
        num_ppo_epochs=2,
        logging_steps=2,
        response_length=16,
        learning_rate=1e-3,
        num_sample_generations=0,
    )
    config.gradient_accumulation_steps = EPISODES // (MICRO_BATCH * config.world_size)
    model, classifier = work / "model", work / "classifier"
    trainer = GivenAnswers(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        AutoModelForSequenceClassification.from_pretrained(classifier, dtype=torch.float32),
        config,
        train_dataset=load_dataset("json", data_files=str(work / "ppo.jsonl"), split="train"),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.train()
    trainer.save_state()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=cases("ddp", "fsdp2", "zero3"), default=cases("ddp", "fsdp2"))
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--limit_seconds", type=float, default=120, help="longest time of one run")
    parser.add_argument("--total_seconds", type=float, default=3600, help="no case is begun after this time")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        from sandan.run.cli import guarded

        guarded(lambda: ppo_here(args.here, args.work, args.device))
        return
    started, results = time.monotonic(), {}
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        # Prepare first: this forks, which a process that has used a GPU must not do.
        faults.prepare(folder)
        bench, result = Bench(folder, args), about() | {"device": args.device, "gpus": args.gpus, "cases": results}
        for case in args.cases:
            kind, _, launch = case.rpartition("_")
            if time.monotonic() - started > args.total_seconds:
                results[case] = {"ok": False, "error": "not begun: --total_seconds"}
                continue
            try:
                results[case] = getattr(bench, kind)(launch)
            except (RuntimeError, TimeoutError, AssertionError) as error:
                results[case] = {"ok": False, "error": str(error)}
            print(f"{case}: {results[case]}", file=sys.stderr, flush=True)
            text = json.dumps(result, indent=1)
            if args.output:
                args.output.write_text(text + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    sys.exit(not all(case["ok"] for case in results.values()))


if __name__ == "__main__":
    main()
