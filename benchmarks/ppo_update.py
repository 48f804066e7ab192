"""Episodes per second and peak memory of PPO: sandan's trainer and TRL 1.12.0's, each in a separate process.

    python benchmarks/ppo_update.py --sides sandan trl                                # one GPU, 0.5B
    python benchmarks/ppo_update.py --sides sandan one_backbone --micro_batch 16 --output ppo_update.json
    python benchmarks/ppo_update.py --shape 0.9m --sides sandan trl --rounds 3        # CPU

"0.5b": four models of random weights in Qwen2.5-0.5B's shape, bfloat16 weights, prompts of 128 tokens, answers of 256.
"0.9m": a model for the CPU, float32, prompts of 16 tokens, answers of 20. Both have 64 episodes per update and 4 PPO
epochs. The sides take turns, `--rounds` times; the first updates (compilation, recording of CUDA graphs) are left out.
"one_backbone" is sandan with LoRA adapters for policy and critic on one frozen backbone. On the GPU TRL's micro-batch
is 8 rows; on the CPU every side processes all 64 rows at once. TRL runs in the environment that ppo_parity.py makes.
Prints JSON.
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
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppo_parity import DEFAULT_ENV_DIR, ROOT, processor
from rollouts import SHAPE


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SIDES = ("sandan", "one_backbone", "trl")
EPISODES = 64
SHAPES: dict[str, dict[str, Any]] = {
    "0.5b": {"device": "cuda", "model": SHAPE, "prompt_tokens": 128, "response_tokens": 256},
    "0.9m": {
        "device": "cpu",
        "model": SHAPE
        | {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
        | {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False},
        "prompt_tokens": 16,
        "response_tokens": 20,
    },
}


def make_tokenizer(vocabulary: int) -> "PreTrainedTokenizerFast":
    """Make a tokenizer with one word per id."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"[PAD]": 0, "</s>": 1} | {f"w{number}": number for number in range(2, vocabulary)}
    core = Tokenizer(models.WordLevel(words, unk_token="w2"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", eos_token="</s>", padding_side="left")


def make_models(side: str, shape: dict[str, Any]) -> dict[str, Any]:
    """Return the models for the trainer, with random weights."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification

    config = Qwen2Config(**shape["model"], pad_token_id=0, eos_token_id=1, num_labels=1)
    dtype = torch.bfloat16 if shape["device"] == "cuda" else torch.float32
    torch.manual_seed(0)

    def make(kind: type) -> torch.nn.Module:
        with torch.device(shape["device"]):
            return kind._from_config(config, dtype=dtype)

    if side == "one_backbone":
        from peft import LoraConfig

        lora = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")

        def length(prompts, completions):
            return [float(len(text)) for text in completions]

        return {"model": make(Qwen2ForCausalLM), "peft_config": lora, "reward_model": length}
    kinds = {"model": Qwen2ForCausalLM, "ref_model": Qwen2ForCausalLM}
    kinds |= {"reward_model": Qwen2ForSequenceClassification, "value_model": Qwen2ForSequenceClassification}
    return {name: make(kind) for name, kind in kinds.items()}


def make_settings(side: str, shape: dict[str, Any], micro_batch: int, updates: int, compiled: bool) -> dict[str, Any]:
    """Return the trainer's settings, the same for every side except for those that only one side has."""
    settings = {
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": EPISODES // micro_batch,
        "local_rollout_forward_batch_size": micro_batch if side == "trl" else EPISODES,
        "total_episodes": EPISODES * updates,
        "num_ppo_epochs": 4,
        "response_length": shape["response_tokens"],
        "stop_token": "eos",
        "temperature": 1.0,
        "num_sample_generations": 0,
        "bf16": shape["device"] == "cuda",
        "use_cpu": shape["device"] == "cpu",
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1 if side == "trl" else 4,
        "learning_rate": 1e-6,
    }
    if side == "one_backbone":
        settings["critic_backbone"] = "adapter"
    return settings | ({"torch_compile": True} if compiled else {})


def run_here(args: argparse.Namespace) -> dict[str, Any]:
    """Run one training in this process; return the seconds of each measured update."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    if args.here == "trl":
        from trl.experimental.ppo import PPOConfig, PPOTrainer
    else:
        from sandan import PPOConfig, PPOTrainer

    class Clock(TrainerCallback):
        """Callback that records the time at each log (one per update), after all queued GPU work is done."""

        def __init__(self):
            self.times, self.phases = [], []

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "objective/kl" in logs:
                if on_gpu:
                    torch.cuda.synchronize()
                self.times.append(time.perf_counter())
                self.phases.append({key: round(value, 3) for key, value in logs.items() if key.startswith("time/")})

    shape, clock = SHAPES[args.shape], Clock()
    on_gpu = shape["device"] == "cuda"
    given, vocabulary = make_models(args.here, shape), shape["model"]["vocab_size"]
    prompts = torch.randint(2, vocabulary, (EPISODES * 4, shape["prompt_tokens"])).tolist()
    dataset = Dataset.from_dict({"input_ids": prompts})
    with tempfile.TemporaryDirectory() as folder:
        settings = make_settings(args.here, shape, args.micro_batch, args.updates, args.compiled)
        trainer = PPOTrainer(
            args=PPOConfig(output_dir=folder, **settings),
            processing_class=make_tokenizer(vocabulary),
            train_dataset=dataset,
            eval_dataset=dataset,
            callbacks=[clock],
            **given,
        )
        trainer.train()
    seconds = [round(after - before, 3) for before, after in itertools.pairwise(clock.times)]
    peak = round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None
    return {"seconds": seconds[args.skipped :], "peak_gib": peak, "phases": clock.phases[-1]}


def run_side(side: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one training in a separate process, with the packages of that side."""
    source = str(ROOT / "src") if side != "trl" else str(args.trl_path or "")
    path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH", ""))))
    micro_batch = EPISODES if args.shape == "0.9m" else args.micro_batch if side != "trl" else 8
    python = args.env_dir / "bin" / "python" if side == "trl" and not args.trl_path else sys.executable
    command = [str(python), __file__, "--here", side, "--shape", args.shape, "--micro_batch", str(micro_batch)]
    command += ["--updates", str(args.updates), "--skipped", str(args.skipped)] + ["--compiled"] * (
        args.compiled and side != "trl"
    )
    done = subprocess.run(
        command, check=False, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, encoding="utf-8"
    )
    if done.returncode:
        raise SystemExit(f"error: the side {side} failed")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--shape", choices=list(SHAPES), default="0.5b")
    parser.add_argument("--micro_batch", type=int, default=16, help="rows of a forward pass (not TRL, GPU)")
    parser.add_argument("--compiled", action="store_true", help="sandan's sides with torch_compile")
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--skipped", type=int, default=1, help="updates left out, besides the first")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--env_dir", type=Path, default=DEFAULT_ENV_DIR, help="environment of TRL")
    parser.add_argument("--trl_path", type=Path, help="a folder with TRL 1.12.0, instead of an environment")
    parser.add_argument("--here", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(run_here(args)))
        return
    import torch
    import transformers

    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in args.sides}
    for _ in range(args.rounds):
        for side in args.sides:
            runs[side].append(run_side(side, args))
            print(f"{side}: {runs[side][-1]}", file=sys.stderr)
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "runs": runs,
        "episodes_per_second": {
            side: round(EPISODES / statistics.median(second for run in found for second in run["seconds"]), 2)
            for side, found in runs.items()
        },
        "peak_gib": {side: max(run["peak_gib"] or 0 for run in found) for side, found in runs.items()},
    }
    if "trl" in runs:
        for name in ("episodes_per_second", "peak_gib"):
            peer = result[name]["trl"] or 1
            result[f"{name}_ratio"] = {side: round(value / peer, 2) for side, value in result[name].items()}
    text = json.dumps(result, indent=1)
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
