"""Sums and means over all processes."""

import torch
from accelerate import Accelerator


class OverRanks:
    """Reduction of tensors over the ranks of a run. Every rank must make the same calls in the same order."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator

    def sum(self, total: torch.Tensor) -> torch.Tensor:
        """Return the sum over all ranks, on every rank."""
        return self.accelerator.reduce(total, reduction="sum")

    def mean(self, values: torch.Tensor) -> float:
        """Return the mean over the episodes of all ranks, which have the same number each."""
        return self.sum(values.mean()).item() / self.accelerator.num_processes
