"""An average of the policy's weights over the optimizer steps."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from .policy_and_value import load_weights, save_policy
from .shared_backbone import is_of_critic


EMA_FOLDER = "ema_policy"


class PolicyAverage:
    """Average of the policy's weights: w_avg = d w_avg + (1 - d) w after each optimizer step.

    (Polyak and Juditsky 1992, exponential as in OpenRLHF.) To save or load the average, its weights are swapped into
    the policy for a moment, so that adapters and tied weights are handled as for the policy itself.

    Args:
        policy: already on its device; only its trainable weights are averaged.
        decay: d, between 0 and 1.

    Raises:
        ValueError: if trainable weights are not float32. In bf16 the average would not move, because (1 - d) of a step
            is too small a change.
    """

    def __init__(self, policy: nn.Module, decay: float):
        self.policy, self.decay = policy, decay
        named = policy.named_parameters()
        self.live = [parameter for name, parameter in named if parameter.requires_grad and not is_of_critic(name)]
        if any(parameter.dtype != torch.float32 for parameter in self.live):
            raise ValueError("policy_ema_decay: load the policy in float32 (its average would not move in bf16)")
        self.average = [parameter.detach().clone() for parameter in self.live]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average one step towards the policy's weights."""
        torch._foreach_lerp_(self.average, self.live, 1 - self.decay)

    @contextlib.contextmanager
    def in_policy(self) -> Iterator[nn.Module]:
        """Give the policy with the average's weights; weights loaded into it in the block become the average."""
        self._swap()
        try:
            yield self.policy
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, live in zip(self.average, self.live, strict=True):
            kept = live.detach().clone()
            live.copy_(average)
            average.copy_(kept)

    def save(self, folder: Path) -> None:
        """Write `ema_policy/` inside `folder`, a plain `from_pretrained` folder."""
        with self.in_policy() as policy:
            save_policy(policy, folder / EMA_FOLDER)

    def load(self, folder: Path) -> None:
        """Load the average that [`save`] wrote."""
        with self.in_policy() as policy:
            load_weights(policy, folder / EMA_FOLDER)
