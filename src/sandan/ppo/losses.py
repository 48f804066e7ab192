"""The loss of a micro-batch: the formulas with the run's settings, summed over its tokens."""

from dataclasses import dataclass

import torch

from .config import PPOConfig
from .formulas import clipped_policy_loss, clipped_value_loss, masked_sum


@dataclass
class MicroBatchLoss:
    """Hold what a micro-batch adds to its optimizer step.

    Args:
        loss: L_policy + vf_coef L_value - entropy_coef H, over the tokens of the whole step, with its gradient.
        sums: over the tokens of the micro-batch, by the name of their metric.
        ratio, policy_clipped, value_clipped: `(B, T)`.
    """

    loss: torch.Tensor
    sums: dict[str, torch.Tensor]
    ratio: torch.Tensor
    policy_clipped: torch.Tensor
    value_clipped: torch.Tensor


def micro_batch_loss(
    inputs: dict[str, torch.Tensor],
    logprobs: torch.Tensor,
    entropies: torch.Tensor,
    values: torch.Tensor,
    args: PPOConfig,
) -> MicroBatchLoss:
    """Return the loss of a micro-batch.

    Args:
        inputs: of [`Experience.micro_batch`], with `tokens` and `value_tokens` of the whole step.
        logprobs, entropies, values (`(B, T)`): of the models as they are now.
    """
    mask, value_mask = inputs["old_policy_mask"], inputs["old_value_mask"]
    policy_losses, ratio, policy_clipped = clipped_policy_loss(
        logprobs, inputs["old_logprobs"], inputs["old_advantages"], args.cliprange, args.dual_clip, args.cliprange_high
    )
    if "old_weights" in inputs:
        policy_losses = policy_losses * inputs["old_weights"]
    value_losses, value_clipped = clipped_value_loss(
        values, inputs["old_values"], inputs["old_returns"], args.cliprange_value
    )
    policy_loss, value_loss = masked_sum(policy_losses, mask), masked_sum(value_losses, value_mask)
    entropy = masked_sum(entropies, mask)
    sums = {"loss/policy_avg": policy_loss, "loss/value_avg": value_loss, "policy/entropy_avg": entropy}
    tokens, value_tokens = inputs["tokens"], inputs["value_tokens"]
    loss = policy_loss / tokens + args.vf_coef * value_loss / value_tokens - args.entropy_coef * entropy / tokens
    return MicroBatchLoss(loss, sums, ratio, policy_clipped, value_clipped)
