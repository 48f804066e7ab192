"""Time of a reward step on rankings, by the layout of its rows: padded, flat, or as a tree.

    python benchmarks/ranking_layouts.py --prompt_tokens 26 --answers 6

A batch has the pairs of some prompts, each with several answers of 8 to 14 tokens. The layouts take turns in one process;
the model is that of recipe tiny with random weights. Prints JSON: for each layout the tokens that it computes and the
median milliseconds of forward and backward, and how much faster the tree is than the flat rows.
"""

import argparse
import json
import random
import statistics
import time
from typing import Any

import torch
import yaml
from ppo_parity import ROOT
from transformers import AutoConfig, AutoModelForSequenceClassification

from sandan.models.scoring import score_last_tokens
from sandan.models.unpadded_attention import use_varlen
from sandan.reward.trainer import DistinctRows


LAYOUTS = ("padded", "flat", "tree")
VOCABULARY = 1307  # of recipe tiny


def make_model() -> Any:
    """Return a reward model of recipe tiny's shape."""
    recipe = yaml.safe_load((ROOT / "recipes" / "tiny" / "pretrain.yaml").read_text(encoding="utf-8"))
    torch.manual_seed(0)
    config = AutoConfig.for_model(**recipe["model_config"], vocab_size=VOCABULARY, num_labels=1, pad_token_id=0)
    model = AutoModelForSequenceClassification.from_config(config)
    score_last_tokens(model)
    use_varlen(model)
    return model


def make_pairs(args: argparse.Namespace) -> list[dict[str, list[int]]]:
    """Return the pairs of a batch: `pairs_per_prompt` of each prompt's answers."""
    draw = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(1, VOCABULARY) for _ in range(count)]

    pairs = []
    for _ in range(args.prompts):
        prompt = tokens(args.prompt_tokens)
        answers = [prompt + tokens(draw.randrange(8, 15)) for _ in range(args.answers)]
        for _ in range(args.pairs_per_prompt):
            chosen, rejected = draw.sample(answers, 2)
            pairs.append({"chosen_ids": chosen, "rejected_ids": rejected})
    return pairs


def step(model: Any, batch: dict[str, Any]) -> float:
    """Run forward and backward on a batch and return the milliseconds."""
    rows = {name: value for name, value in batch.items() if name not in ("place", "row_tokens")}
    model.zero_grad()
    began = time.perf_counter()
    chosen, rejected = model(**rows, use_cache=False).logits[batch["place"]].chunk(2)
    torch.nn.functional.logsigmoid(chosen - rejected).mean().neg().backward()
    return 1000 * (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt_tokens", type=int, default=26)
    parser.add_argument("--answers", type=int, default=6, help="of each prompt")
    parser.add_argument("--pairs_per_prompt", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    model, pairs = make_model(), make_pairs(args)
    batches = {layout: DistinctRows(layout)(pairs) for layout in LAYOUTS}
    times: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    for _ in range(args.rounds + 2):
        for layout, batch in batches.items():
            times[layout].append(step(model, batch))
    found = {
        layout: {"tokens": batches[layout]["input_ids"].numel(), "milliseconds": statistics.median(times[layout][2:])}
        for layout in LAYOUTS
    }
    ratio = found["flat"]["milliseconds"] / found["tree"]["milliseconds"]
    about = {"threads": torch.get_num_threads(), "kernels": torch.backends.cpu.get_cpu_capability()}
    print(
        json.dumps({"layouts": found, "flat_to_tree": round(ratio, 2), **about, "torch": torch.__version__}, indent=1)
    )


if __name__ == "__main__":
    main()
