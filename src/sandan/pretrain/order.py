"""The order of rows: a pure function of the seed and the step, the same for any number of processes and workers."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import RandomSampler, Sampler

from ..training.trainer import GuardedTrainer


class StepSampler(Sampler[int]):
    """Sampler of all rows in random order, without those that do not fill a step; each epoch leaves out other rows.

    An incomplete last step would have different rows on one process (fewer rows) and on several (filled up with the
    epoch's first rows). If there are fewer rows than a step takes, all rows make one step.

    Args:
        rows: number of rows.
        rows_per_step: rows of a step, over all processes and micro-batches.
        seed: of the order; each epoch adds its number, as in [`accelerate.data_loader.SeedableRandomSampler`].
    """

    def __init__(self, rows: int, rows_per_step: int, seed: int):
        self.rows = rows
        self.rows_per_step = rows_per_step
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows - self.rows % self.rows_per_step or self.rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from torch.randperm(self.rows, generator=generator)[: len(self)].tolist()


class OrderedTrainer(GuardedTrainer):
    """[`GuardedTrainer`] whose step `s` sees the same rows, however they are divided among processes.

    That is, for any number of processes, workers and micro-batches if the rows of a step over all processes are as
    many, and also for a resumed run.
    """

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if not isinstance(sampler, RandomSampler):
            return sampler
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return StepSampler(len(sampler.data_source), self.get_total_train_batch_size(self.args), seed)

    def _run_epoch(self, **kwargs: Any) -> None:
        # Set the epoch before Trainer wraps the loader to skip batches. Through the wrapper, on several processes,
        # accelerate 1.15 finds only its own samplers, and the rest of a resumed epoch would be that of the first one.
        if hasattr(kwargs["train_dataloader"], "set_epoch"):
            kwargs["train_dataloader"].set_epoch(kwargs["epoch"])
        super()._run_epoch(**kwargs)
