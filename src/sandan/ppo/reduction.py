"""Sums and means over all processes."""

import torch
from accelerate import Accelerator


class OverRanks:
    """Reduces tensors over the ranks of a run; every rank must ask, in the same order."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator

    def sum(self, total: torch.Tensor) -> torch.Tensor:
        """Return the sum over all ranks, on each of them."""
        return self.accelerator.reduce(total, reduction="sum")

    def mean(self, values: torch.Tensor) -> float:
        """Return the mean over the episodes of all ranks (each has as many)."""
        return self.sum(values.mean()).item() / self.accelerator.num_processes
