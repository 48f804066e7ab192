"""Weights of half precision that a small learning rate cannot move, because the step is rounded away."""

import logging
from collections.abc import Iterable

import torch


logger = logging.getLogger(__name__)

# Weights of a tensor that are looked at, and the share of moving weights below which a run is warned.
LOOKED_AT, FEW = 100_000, 0.9


@torch.no_grad()
def movable(weights: Iterable[torch.Tensor], step: float) -> tuple[int, int]:
    """Return how many numbers of the trained half-precision tensors a step of this size can change, and their count."""
    moved = total = 0
    for weight in weights:
        if weight.requires_grad and weight.dtype in (torch.bfloat16, torch.float16):
            seen = weight.detach().flatten()[:: max(weight.numel() // LOOKED_AT, 1)]
            changed = [(seen.float() + way).to(seen.dtype) != seen for way in (step, -step)]
            moved += round(torch.stack(changed).float().mean().item() * weight.numel())
            total += weight.numel()
    return moved, total


def warn_of_stuck_weights(name: str, weights: Iterable[torch.Tensor], learning_rate: float) -> None:
    """Say once that most weights of a model cannot move, and what to do. (A step of AdamW is about `learning_rate`.)"""
    moved, total = movable(weights, learning_rate)
    if moved < FEW * total:
        logger.warning(
            "%s: only %s of %s half-precision weights (%.1f%%) can move at learning_rate %g, the others round the step "
            "away; load it with dtype=torch.float32 (bf16=True still computes in bfloat16) or train adapters (peft_config)",
            name,
            f"{moved:,}",
            f"{total:,}",
            100 * moved / total,
            learning_rate,
        )
