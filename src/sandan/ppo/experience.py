"""The training data of an update: advantages and returns, computed from a scored rollout."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .config import PPOConfig
from .formulas import generalized_advantages, importance_weights, kl_estimate, response_masks, token_rewards, whiten
from .reduction import OverRanks
from .rollout import Rollout, queued


@dataclass
class Forward:
    """Per-token numbers of a rollout, from the models before the update, each `(B, T)`."""

    logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    values: torch.Tensor


@dataclass
class Experience:
    """The training data of an update, for this rank's `B` episodes and their `T` response positions.

    `kl` (`(B, T)`) is the estimated divergence per token, 0 outside the answers. `weights` (`(B, T)`) are those of the
    policy loss, with `importance_cap` (see [`importance_weights`]).
    """

    rollout: Rollout
    scores: torch.Tensor
    kl: torch.Tensor
    logprobs: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    policy_mask: torch.Tensor
    value_mask: torch.Tensor
    weights: torch.Tensor | None = None

    def micro_batch(
        self, indices: Sequence[int], response_length: int, device: torch.device, compiled: bool = False
    ) -> dict[str, torch.Tensor]:
        """Return model inputs of some rows ([`Rollout.tensors`]) and, as `old_...`, the other inputs of their loss."""
        inputs = self.rollout.tensors(indices, response_length, device, compiled)
        rows, width = queued(torch.tensor(indices), device), inputs["responses"].shape[1]
        names = ("logprobs", "values", "advantages", "returns", "policy_mask", "value_mask", "weights")
        names = names[:-1] if self.weights is None else names
        return inputs | {f"old_{name}": getattr(self, name)[rows, :width] for name in names}

    def not_finite(self, over_ranks: OverRanks) -> str | None:
        """Return a text that names the first numbers that are not finite, in the order of computation, or None."""
        named = {
            "log-probs": self.logprobs.masked_fill(~self.policy_mask, 0),
            "kl": self.kl,
            "values": self.values,
            "advantages": self.advantages,
            "returns": self.returns,
        }
        bad = torch.stack([(~numbers.isfinite()).any(1).sum() for numbers in named.values()])
        for name, answers in zip(named, over_ranks.sum(bad).tolist(), strict=True):
            if answers:
                return f"{name} not finite in {answers}"
        return None


def estimate(
    rollout: Rollout,
    old: Forward,
    scores: torch.Tensor,
    kl_coef: float,
    value_center: float,
    args: PPOConfig,
    over_ranks: OverRanks,
) -> Experience:
    """Convert scores `(B,)` to KL-penalised rewards per token, and these to advantages and returns.

    Args:
        value_center: the number to subtract from the critic's values.
    """
    lengths = rollout.lengths(scores.device)
    mask, value_mask = response_masks(lengths, old.logprobs.shape[1], args.score_at_stop_token)
    kl = kl_estimate(old.logprobs, old.ref_logprobs, args.kl_estimator).masked_fill(~mask, 0)
    values = (old.values - value_center).masked_fill(~value_mask, 0)
    rewards = token_rewards(kl, scores, lengths, kl_coef, args.score_at_stop_token)
    if args.whiten_rewards:
        rewards = whiten(rewards, value_mask, shift_mean=False, reduce=over_ranks.sum)
    advantages, returns = generalized_advantages(rewards, values, args.gamma, args.lam)
    if args.value_lam is not None:
        _, returns = generalized_advantages(rewards, values, args.gamma, args.value_lam)
    if args.whiten_advantages:
        advantages = whiten(advantages, mask, reduce=over_ranks.sum)
    weights = None
    if args.importance_cap is not None and rollout.sampling_logprobs is not None:
        sampled = torch.full_like(old.logprobs, torch.nan)
        sampled[mask] = torch.cat(rollout.sampling_logprobs).to(sampled)
        weights = importance_weights(old.logprobs, sampled, args.importance_cap)
    return Experience(rollout, scores, kl, old.logprobs, values, advantages, returns, mask, value_mask, weights)


def last_values(rollout: Rollout, values: torch.Tensor, args: PPOConfig) -> torch.Tensor:
    """Return the critic's values `(B,)` at the last positions of its mask, from values `(B, T)`."""
    _, value_mask = response_masks(rollout.lengths(values.device), values.shape[1], args.score_at_stop_token)
    return values.gather(1, value_mask.sum(1, keepdim=True) - 1).squeeze(1)
