"""What a `step` reports, under TRL 0.11's names."""

import contextlib
import logging
import time
from collections.abc import Sequence
from typing import Any

import torch

from ..ppo.formulas import Reduce, masked_sum
from ..ppo.reduction import OverRanks
from .batch import Experience


logger = logging.getLogger(__name__)

# What `step` sums over the trained tokens of all passes, in this order.
SUMMED = (
    "loss/policy",
    "loss/value",
    "policy/entropy",
    "policy/approxkl",
    "policy/policykl",
    "policy/clipfrac",
    "policy/advantages_mean",
    "val/vpred",
    "val/error",
    "val/clipfrac",
)


def describe(
    experience: Experience,
    trained: torch.Tensor,
    ratios: torch.Tensor,
    coef: float,
    vf_coef: float,
    over_ranks: OverRanks,
) -> dict[str, Any]:
    """Return the statistics of an update; numbers are over the rows of all ranks, arrays those of this rank."""
    mask, kl, mean, total = experience.batch.mask, experience.kl, over_ranks.mean, over_ranks.sum
    stats = {f"ppo/{name}": value for name, value in zip(SUMMED, trained.tolist(), strict=True)}
    stats["ppo/loss/total"] = stats["ppo/loss/policy"] + vf_coef * stats["ppo/loss/value"]
    stats |= {
        "objective/kl": mean(kl.sum(1)),
        "objective/kl_dist": kl.sum(1),
        "objective/kl_coef": coef,
        "objective/entropy": mean(-experience.logprobs.sum(1)),
        "objective/logprobs": experience.logprobs,
        "objective/ref_logprobs": experience.ref_logprobs,
        "ppo/mean_non_score_reward": -coef * moments(kl, mask, total)[0],
        "ppo/policy/advantages": experience.advantages[mask],
        "ppo/policy/ratio": ratios,
    }
    scores = experience.scores
    stats["ppo/mean_scores"], variance = moments(scores, torch.ones_like(scores, dtype=torch.bool), total)
    stats["ppo/std_scores"] = variance**0.5
    stats["ppo/returns/mean"], stats["ppo/returns/var"] = moments(experience.returns, mask, total)
    stats["ppo/val/mean"], stats["ppo/val/var"] = moments(experience.values, mask, total)
    stats["ppo/val/var_explained"] = 1 - stats["ppo/val/error"] / max(stats["ppo/returns/var"], 1e-8)
    if stats["objective/kl"] < -1:
        logger.warning(
            "objective/kl is %.2f: answers were not sampled from the policy as it is; sample with do_sample=True, "
            "temperature=1, top_k=0, top_p=1",
            stats["objective/kl"],
        )
    return {name: value.cpu().numpy() if torch.is_tensor(value) else value for name, value in stats.items()}


def moments(values: torch.Tensor, mask: torch.Tensor, reduce: Reduce) -> tuple[float, float]:
    """Return mean and unbiased variance over the positions in the masks of all ranks."""
    total, count = reduce(torch.stack([masked_sum(values, mask), mask.sum()])).tolist()
    deviations = reduce(masked_sum((values - total / count).square(), mask)).item()
    return total / count, deviations / max(count - 1, 1)


@contextlib.contextmanager
def timed(times: dict[str, float], name: str):
    """Note the seconds of the block."""
    start = time.perf_counter()
    yield
    times[name] = time.perf_counter() - start


def lengths_of(name: str, rows: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Return mean, deviation and all lengths of rows, under TRL's names."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.float)
    deviation = lengths.std(correction=min(1, len(rows) - 1)).item()
    return {
        f"tokens/{name}_len_mean": lengths.mean().item(),
        f"tokens/{name}_len_std": deviation,
        f"tokens/{name}_dist": lengths.numpy(),
    }
