"""Episodes per second and peak memory of PPO at the 0.5B shape on one GPU: sandan's trainer and TRL 1.12.0's.

    python scripts/bench/ppo_update.py --sides sandan trl
    python scripts/bench/ppo_update.py --sides sandan one_backbone --micro_batch 16 --output ppo_update.json

Four models of random weights in Qwen2.5-0.5B's shape, bfloat16 weights, 64 episodes an update, prompts of 128 tokens,
answers of 256, 4 PPO epochs. Each side runs in a process of its own, one after the other, `--rounds` times; the first
updates (compilation, recording) are left out. TRL's micro-batch is 8 x 8, as it was measured before; "one_backbone" is
sandan with LoRA adapters for policy and critic on one frozen backbone. TRL is looked for in the environment that
ppo_parity.py makes. Prints JSON.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ppo_parity import DEFAULT_ENV_DIR, ROOT
from rollouts import SHAPE


SIDES = ("sandan", "one_backbone", "trl")
EPISODES, PROMPT_TOKENS, RESPONSE_TOKENS = 64, 128, 256


def run_here(side: str, micro_batch: int, updates: int, skipped: int, compiled: bool) -> dict[str, Any]:
    """One training run in this process; the seconds of each update that counts."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen2ForSequenceClassification,
        TrainerCallback,
    )

    if side == "trl":
        from trl.experimental.ppo import PPOConfig, PPOTrainer
    else:
        from sandan import PPOConfig, PPOTrainer

    class Clock(TrainerCallback):
        """Notes the time at each log, one an update, when all that was queued on the GPU is done."""

        def __init__(self):
            self.times, self.logs = [], []

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "objective/kl" in logs:
                torch.cuda.synchronize()
                self.times.append(time.perf_counter())
                self.logs.append({key: value for key, value in logs.items() if key.startswith("time/")})

    config = Qwen2Config(**SHAPE, pad_token_id=0, eos_token_id=1, num_labels=1)
    torch.manual_seed(0)

    def make(kind: type) -> torch.nn.Module:
        with torch.device("cuda"):
            return kind._from_config(config, dtype=torch.bfloat16)

    words = {"[PAD]": 0, "</s>": 1} | {f"w{number}": number for number in range(2, SHAPE["vocab_size"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w2")),
        pad_token="[PAD]",
        eos_token="</s>",
        padding_side="left",
    )
    numbers = torch.randint(2, 150_000, (EPISODES * 4, PROMPT_TOKENS)).tolist()
    settings = {
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": EPISODES // micro_batch,
        "local_rollout_forward_batch_size": EPISODES,
        "total_episodes": EPISODES * updates,
        "num_ppo_epochs": 4,
        "response_length": RESPONSE_TOKENS,
        "stop_token": "eos",
        "temperature": 1.0,
        "num_sample_generations": 0,
        "bf16": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1 if side == "trl" else 4,
        "learning_rate": 1e-6,
    }
    models_given: dict[str, Any] = {"model": make(Qwen2ForCausalLM)}
    if side == "one_backbone":
        from peft import LoraConfig

        models_given["peft_config"] = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")
        models_given["reward_model"] = lambda prompts, completions: [float(len(one)) for one in completions]
        settings["critic_backbone"] = "adapter"
    else:
        models_given |= {"ref_model": make(Qwen2ForCausalLM)}
        models_given |= {name: make(Qwen2ForSequenceClassification) for name in ("reward_model", "value_model")}
    if side == "trl":
        settings["local_rollout_forward_batch_size"] = micro_batch
    elif compiled:
        settings["torch_compile"] = True
    clock, dataset = Clock(), Dataset.from_dict({"input_ids": numbers})
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            args=PPOConfig(output_dir=folder, **settings),
            processing_class=tokenizer,
            train_dataset=dataset,
            eval_dataset=dataset,
            callbacks=[clock],
            **models_given,
        )
        trainer.train()
    seconds = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)][skipped:]
    return {
        "seconds": [round(one, 3) for one in seconds],
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "phases": {key: round(value, 3) for key, value in clock.logs[-1].items()},
    }


def run_side(side: str, args: argparse.Namespace) -> dict[str, Any]:
    """The same in a process of its own, with the packages of that side."""
    source = str(ROOT / "src") if side != "trl" else str(args.trl_path or "")
    path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH", ""))))
    micro_batch = 8 if side == "trl" else args.micro_batch
    python = args.env_dir / "bin" / "python" if side == "trl" and not args.trl_path else sys.executable
    command = [str(python), __file__, "--here", side, "--micro_batch", str(micro_batch)]
    command += ["--updates", str(args.updates), "--skipped", str(args.skipped)] + ["--compiled"] * args.compiled
    done = subprocess.run(
        command, check=False, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, encoding="utf-8"
    )
    if done.returncode:
        raise SystemExit(f"error: the side {side} failed")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--micro_batch", type=int, default=16, help="rows of a forward pass (sandan)")
    parser.add_argument("--compiled", action="store_true", help="sandan with torch_compile")
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--skipped", type=int, default=1, help="updates left out, besides the first")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--env_dir", type=Path, default=DEFAULT_ENV_DIR, help="environment of TRL")
    parser.add_argument("--trl_path", type=Path, help="a folder with TRL 1.12.0, instead of an environment")
    parser.add_argument("--here", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(run_here(args.here, args.micro_batch, args.updates, args.skipped, args.compiled)))
        return
    import torch
    import transformers

    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in args.sides}
    for _ in range(args.rounds):
        for side in args.sides:
            runs[side].append(run_side(side, args))
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "hardware": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "runs": runs,
        "episodes_per_second": {
            side: round(EPISODES / statistics.median(second for one in found for second in one["seconds"]), 2)
            for side, found in runs.items()
        },
        "peak_gib": {side: max(one["peak_gib"] for one in found) for side, found in runs.items()},
    }
    if "trl" in runs:
        for name in ("episodes_per_second", "peak_gib"):
            peer = result[name]["trl"]
            result[f"{name}_ratio"] = {side: round(value / peer, 2) for side, value in result[name].items()}
    text = json.dumps(result, indent=1)
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
