"""One training run for `ppo_learning.py`, which writes the settings and starts this file in two environments:

    python benchmarks/ppo_learning_side.py sandan SETTINGS.json
    python benchmarks/ppo_learning_side.py trl SETTINGS.json

The two sides differ only in the import of PPOTrainer.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=["sandan", "trl"])
    parser.add_argument("settings", type=Path)
    args = parser.parse_args()
    if args.side == "sandan":
        from sandan import PPOConfig, PPOTrainer
    else:
        from trl.experimental.ppo import PPOConfig, PPOTrainer

    settings = json.loads(args.settings.read_text(encoding="utf-8"))
    policy, reward, (prompts,) = (
        settings.pop(name) for name in ("model_name_or_path", "reward_model_path", "data_files")
    )
    dtype = getattr(torch, settings.pop("dtype"))
    tokenizer = AutoTokenizer.from_pretrained(policy, padding_side="left")
    rows = [json.loads(line)["prompt"] for line in Path(prompts).read_text(encoding="utf-8").splitlines()]
    if isinstance(rows[0], str):
        ids = [tokenizer(row)["input_ids"] for row in rows]
    else:
        ids = [
            tokenizer.apply_chat_template(row, add_generation_prompt=True, return_dict=True)["input_ids"]
            for row in rows
        ]
    dataset = Dataset.from_dict({"input_ids": ids})
    trainer = PPOTrainer(
        args=PPOConfig(**settings),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(policy, dtype=dtype),
        ref_model=AutoModelForCausalLM.from_pretrained(policy, dtype=dtype),
        reward_model=AutoModelForSequenceClassification.from_pretrained(reward, num_labels=1, dtype=dtype),
        value_model=AutoModelForSequenceClassification.from_pretrained(reward, num_labels=1, dtype=dtype),
        train_dataset=dataset,
        eval_dataset=dataset.select(range(64)),
    )
    trainer.train()


if __name__ == "__main__":
    main()
