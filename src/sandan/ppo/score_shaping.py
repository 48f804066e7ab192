"""Shape scores before they become rewards: weight, centre, scale, clip and penalise them."""

import logging
from typing import Any

import torch

from .config import PPOConfig
from .formulas import Moments, standard_deviation, updated_moments
from .reduction import OverRanks
from .rollout import Rollout


logger = logging.getLogger(__name__)


class ScoreShaping:
    """Combination of the scores of all rewards into a single score per answer.

    Args:
        reward_weights (`(rewards,)`): weights of the sum.

    Attributes:
        center (`float`, *optional*): the number to subtract; with `center_rewards` the mean of the first batch.
        moments: running moments of all scores so far, for `scale_scores`.
    """

    def __init__(self, args: PPOConfig, reward_weights: torch.Tensor, over_ranks: OverRanks):
        self.args, self.reward_weights, self.over_ranks = args, reward_weights, over_ranks
        self.center: float | None = None if args.center_rewards else 0.0
        self.moments: Moments = (0.0, 0.0, 0.0)

    def __call__(
        self, components: torch.Tensor, rollout: Rollout, training: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a score per answer, `(B,)`, before and after penalties.

        Args:
            components (`(B, rewards)`): the scores of each reward.
            training: use the batch to set the centre and to update the running deviation.
        """
        raw = components @ self.reward_weights.to(components.device)
        if training and self.center is None:
            self.center = self.over_ranks.mean(raw)
            logger.info("rewards are centred by the first batch's mean, %.4f", self.center)
        if training and self.args.scale_scores:
            self.moments = updated_moments(self.moments, raw, self.over_ranks.sum)
        before, scores = self.shape(raw, rollout.stopped(raw.device))
        if self.args.length_penalty is not None:
            scores = scores - self.args.length_penalty * rollout.lengths(raw.device)
        return before, scores

    def shape(self, scores: torch.Tensor, stopped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Centre, scale and clip scores `(B,)`, then penalise answers that did not stop.

        Returns:
            The scores before and after the penalty.
        """
        args = self.args
        scores = scores - (self.center or 0.0)
        if args.scale_scores:
            scores = scores / standard_deviation(self.moments)
        if args.score_clip is not None:
            scores = scores.clamp(-args.score_clip, args.score_clip)
        if args.missing_eos_penalty is None:
            return scores, scores
        if args.missing_eos_penalty_mode == "replace":
            penalised = torch.full_like(scores, -args.missing_eos_penalty)
        else:
            penalised = scores - args.missing_eos_penalty
        return scores, torch.where(stopped, scores, penalised)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that training changes, in JSON types."""
        return {"reward_center": self.center} | ({"score_moments": self.moments} if self.args.scale_scores else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of [`state_dict`]; other keys of `state` are ignored."""
        self.center = state["reward_center"]
        self.moments = tuple(state.get("score_moments", self.moments))
