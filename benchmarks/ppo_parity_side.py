"""One side of `ppo_parity.py`: run one update of a PPOTrainer per case with given answers, and save its numbers.

`ppo_parity.py` writes WORK_DIR (models, tokenizer, `cases.json`) and starts this file twice, in two environments:

    python benchmarks/ppo_parity_side.py sandan WORK_DIR
    python benchmarks/ppo_parity_side.py trl WORK_DIR

Both trainers are made by the same call and run their own `train()`. Nothing of PPO is computed here: the values in the
trainers at the first backward pass and at every optimizer step are saved as WORK_DIR/<side>/<case>.safetensors.
"""

import argparse
import itertools
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    set_seed,
)


Record = dict[str, Any]
MODELS = {
    "model": AutoModelForCausalLM,
    "ref_model": AutoModelForCausalLM,
    "reward_model": AutoModelForSequenceClassification,
    "value_model": AutoModelForSequenceClassification,
}
# The local variables of TRL's train() at its first backward pass -> their names here.
TRL_LOCALS = {
    "logprobs": "log-probs",
    "ref_logprobs": "reference log-probs",
    "values": "values",
    "rewards": "token rewards",
    "advantages": "advantages",
    "returns": "returns",
}


def force_answers(policy: PreTrainedModel, prompts: list[list[int]], answers: list[list[int]]) -> None:
    """Make the policy's own `generate` draw the tokens of `answers`; cache, processors and stopping stay in use."""
    wanted = dict(zip(map(tuple, prompts), answers, strict=True))
    generate = policy.generate

    def forced(*args, **kwargs):
        pairs = zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True)
        rows = [wanted[tuple(ids[mask.bool()].tolist())] for ids, mask in pairs]
        positions = itertools.count()

        def draw(probabilities: torch.Tensor, num_samples: int) -> torch.Tensor:
            position = next(positions)
            return torch.tensor([[row[min(position, len(row) - 1)]] for row in rows])

        with mock.patch.object(torch, "multinomial", draw):
            return generate(*args, **kwargs)

    policy.generate = forced


def make_trainer(side: str, folder: Path, case: dict[str, Any], prompts: list[list[int]]) -> Any:
    """Make the trainer, by the same call on both sides; only the import and two of sandan's settings differ."""
    if side == "sandan":
        from sandan import PPOConfig, PPOTrainer

        # Sampling must go through `generate`, which force_answers replaces, and TRL has no bound on the size of an
        # update.
        own = {"rollout_engine": "generate", "max_approx_kl": 0.0}
    else:
        from trl.experimental.ppo import PPOConfig, PPOTrainer

        own = {}
    models = {name: auto_class.from_pretrained(folder / name) for name, auto_class in MODELS.items()}
    for name, value in case["generation"].items():
        setattr(models["model"].generation_config, name, value)
    force_answers(models["model"], prompts, [case["answers"][str(prompt)] for prompt in prompts])
    dataset = Dataset.from_dict({"input_ids": prompts})
    return PPOTrainer(
        args=PPOConfig(output_dir=str(folder / side / "run"), **case["settings"], **own),
        processing_class=AutoTokenizer.from_pretrained(folder / "tokenizer", padding_side="left"),
        train_dataset=dataset,
        eval_dataset=dataset,
        **models,
    )


def on_optimizer_step(optimizer: torch.optim.Optimizer, trainer: Any, record: Record, losses: Callable) -> None:
    """Record the losses at each step of the raw optimizer, the number of steps, and the gradient of the first one."""
    step = optimizer.step

    def recorded(*args, **kwargs):
        for name, loss in losses().items():
            record.setdefault(name, []).append(loss)
        if not record["optimizer steps"]:
            named = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
            gradients = [parameter.grad.flatten() for _, parameter in sorted(named, key=lambda pair: pair[0])]
            record["first gradient"] = torch.cat(gradients).clone()
        record["optimizer steps"] += 1
        return step(*args, **kwargs)

    optimizer.step = recorded


def watch_sandan(trainer: Any, record: Record) -> None:
    """Record values of sandan's trainer: arguments of its functions, its experience and its running sums of losses."""
    import sandan.ppo.experience as module

    kl_estimate, generalized_advantages = module.kl_estimate, module.generalized_advantages
    before = {"tokens": 0.0, "value_tokens": 0.0, "loss/policy_avg": 0.0, "loss/value_avg": 0.0}

    def spy_on_kl(logprobs, ref_logprobs, estimator):
        record["log-probs"], record["reference log-probs"] = logprobs, ref_logprobs
        return kl_estimate(logprobs, ref_logprobs, estimator)

    def spy_on_advantages(rewards, values, gamma, lam):
        record["token rewards"] = rewards
        return generalized_advantages(rewards, values, gamma, lam)

    def losses():
        if not record["optimizer steps"]:
            experience = trainer.experience
            for name in ("scores", "values", "advantages", "returns"):
                record[name] = getattr(experience, name)
            record["policy mask"], record["value mask"] = experience.policy_mask, experience.value_mask
            record["prompts"] = [row["input_ids"] for row in experience.rollout.rows]
        now = {name: trainer.metrics.sums[name].item() for name in before}
        step = {name: now[name] - before[name] for name in before}
        before.update(now)
        return {
            "policy loss": step["loss/policy_avg"] / step["tokens"],
            "value loss": step["loss/value_avg"] / step["value_tokens"],
        }

    module.kl_estimate, module.generalized_advantages = spy_on_kl, spy_on_advantages
    on_optimizer_step(trainer.create_optimizer(), trainer, record, losses)


def watch_trl(trainer: Any, record: Record) -> None:
    """Record values of TRL's trainer: the local variables of its `train()` at each backward pass."""
    backward, micro_batches = trainer.accelerator.backward, []

    def spy_on_backward(loss, **kwargs):
        names = sys._getframe(1).f_locals
        micro_batches.append((names["pg_loss"].item(), names["vf_loss"].item()))
        if "scores" not in record:
            for local, name in TRL_LOCALS.items():
                record[name] = names[local].clone()
            record["scores"] = names["scores"].clone()
            record["policy mask"], record["value mask"] = ~names["padding_mask"], ~names["padding_mask_p1"]
            pad = trainer.processing_class.pad_token_id
            record["prompts"] = [[token for token in row if token != pad] for row in names["queries"].tolist()]
        return backward(loss, **kwargs)

    def losses():
        # Accelerate accumulates the mean of the micro-batches into one step.
        policy, value = np.mean(micro_batches, axis=0)
        micro_batches.clear()
        return {"policy loss": policy, "value loss": value}

    trainer.accelerator.backward = spy_on_backward
    # A loader without shuffling, so that the first update takes the prompts of sandan's first update.
    loader = torch.utils.data.DataLoader(
        trainer.train_dataset,
        batch_size=trainer.args.local_batch_size,
        collate_fn=trainer.data_collator,
        drop_last=True,
    )
    trainer.dataloader = trainer.accelerator.prepare(loader)
    on_optimizer_step(trainer.optimizer.optimizer, trainer, record, losses)


def tensors_of(record: Record, trainer: Any, width: int) -> dict[str, torch.Tensor]:
    """Return the quantities to compare, as tensors of the same shape on both sides.

    Values per token are `(B, width)`, 0 where the trainer masked them out.
    """

    def widen(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(torch.where(mask, values.float(), 0), (0, width - values.shape[1]))

    policy_mask, value_mask = record["policy mask"], record["value mask"]
    masks = dict.fromkeys(("log-probs", "reference log-probs", "advantages", "policy mask"), policy_mask)
    masks |= dict.fromkeys(("values", "token rewards", "returns", "value mask"), value_mask)
    tensors = {name: widen(record[name], mask) for name, mask in masks.items()}
    state = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    # TRL's wrapper holds the critic's backbone under a second name.
    names = sorted(name for name in state if name.startswith(("policy.", "value_model.")))
    tensors["weights after the update"] = torch.cat([state[name].flatten().float() for name in names])
    for name in ("scores", "first gradient"):
        tensors[name] = record[name].float()
    for name in ("policy loss", "value loss"):
        tensors[f"{name}, first step"] = torch.tensor(record[name][0], dtype=torch.float64)
    tensors["optimizer steps"] = torch.tensor(float(record["optimizer steps"]))
    logs = next(entry for entry in reversed(trainer.state.log_history) if "objective/kl" in entry)
    logged = {f"log {name}": torch.tensor(float(value), dtype=torch.float64) for name, value in logs.items()}
    return {name: tensor.detach().contiguous() for name, tensor in (tensors | logged).items()}


def run_case(side: str, folder: Path, case: dict[str, Any], prompts: list[list[int]]) -> Record:
    """Run one update. The global seed is set because TRL does not seed its order of minibatches (T6)."""
    set_seed(case["settings"]["seed"])
    trainer, record = make_trainer(side, folder, case, prompts), {"optimizer steps": 0}
    watch = watch_sandan if side == "sandan" else watch_trl
    watch(trainer, record)
    trainer.train()
    record["tensors"] = tensors_of(record, trainer, case["settings"]["response_length"])
    return record


def versions() -> dict[str, str]:
    """Return the versions of the packages, as imported here."""
    from importlib.metadata import version

    names = ("torch", "transformers", "accelerate", "datasets", "trl", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=("sandan", "trl"))
    parser.add_argument("work_dir", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    cases = json.loads((args.work_dir / "cases.json").read_text(encoding="utf-8"))
    orders_file = args.work_dir / "orders.json"
    orders = json.loads(orders_file.read_text(encoding="utf-8")) if args.side == "trl" else {}
    (args.work_dir / args.side).mkdir()
    for name, case in cases.items():
        first = orders.get(name, [])
        prompts = first + [prompt for prompt in case["prompts"] if prompt not in first]
        record = run_case(args.side, args.work_dir, case, prompts)
        save_file(record["tensors"], args.work_dir / args.side / f"{name}.safetensors")
        if args.side == "sandan":
            orders[name] = record["prompts"]
        elif record["prompts"] != first:
            raise SystemExit(f"{name}: TRL did not take the prompts in the order given")
    if args.side == "sandan":
        orders_file.write_text(json.dumps(orders), encoding="utf-8")
    (args.work_dir / args.side / "versions.json").write_text(json.dumps(versions()), encoding="utf-8")


if __name__ == "__main__":
    main()
