"""The fixed scale of a reward model: which raw scores count as 0 and as 1, kept in the model's `config.json`.

Training on comparisons determines only differences of scores: the mean is arbitrary, and the spread grows with every
epoch (Ziegler et al. 2019 set mean 0 and deviation 1 over samples of the starting policy). PPO weighs the score against
`kl_coef` nats, so without a scale the same `kl_coef` would have another effect with each reward model. The weights stay as they were trained: a difference of raw scores is a log odds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig

from ..core.errors import GateError


# A smaller deviation is only rounding in float32: all answers have the same score.
LEAST_DEVIATION = 1e-4


@dataclass(frozen=True)
class ScoreScale:
    """Mean and standard deviation of raw scores. The defaults, for models without a measured scale, change nothing."""

    mean: float = 0.0
    deviation: float = 1.0

    @classmethod
    def measured(cls, scores: Sequence[float]) -> "ScoreScale":
        """Return the scale of these raw scores.

        Raises:
            GateError: if they do not differ, because such a reward model teaches nothing.
        """
        mean, deviation = float(np.mean(scores)), float(np.std(scores))
        if not deviation > LEAST_DEVIATION:
            raise GateError(
                f"the reward model gives all {len(scores):,} answers the same score ({mean:.4g}): it has learned "
                "nothing; raise learning_rate or num_train_epochs, or rank more prompts"
            )
        return cls(mean, deviation)

    @classmethod
    def of(cls, config: PretrainedConfig | None) -> "ScoreScale":
        """Return the scale that is stored in a model's configuration, if it has one."""
        return cls(getattr(config, "score_mean", 0.0), getattr(config, "score_deviation", 1.0))

    def store(self, config: PretrainedConfig) -> None:
        """Write the scale into a model's configuration."""
        config.score_mean, config.score_deviation = self.mean, self.deviation

    def apply(self, scores: torch.Tensor) -> torch.Tensor:
        """Convert raw scores to this scale."""
        return (scores - self.mean) / self.deviation


def fold_scale(head: nn.Linear, config: PretrainedConfig) -> float:
    """Build the scale into the head of a critic that starts as a reward model, so that its values are on that scale.

    The head's weights are divided by the deviation, and the scale is removed from the configuration.

    Returns:
        The scaled mean, which the caller must subtract from the critic's values: a head without a bias cannot do it.
    """
    scale = ScoreScale.of(config)
    if scale == ScoreScale():
        return 0.0
    with torch.no_grad():
        head.weight.div_(scale.deviation)
        if head.bias is not None:
            head.bias.div_(scale.deviation)
    ScoreScale().store(config)
    return scale.mean / scale.deviation
