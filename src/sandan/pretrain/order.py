"""The order of rows: a pure function of the seed and the step, the same for any number of processes and workers."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import RandomSampler, Sampler

from ..training.trainer import GuardedTrainer


class StepSampler(Sampler[int]):
    """All rows in random order, but for those that would not fill the last step; each epoch leaves out others.

    A last step that is not full would be another one on one process (fewer rows) than on several (filled up with the
    epoch's first rows). Where there are fewer rows than a step takes, they are a step.

    Args:
        rows: how many there are.
        rows_per_step: how many a step takes, over all processes and micro-batches.
        seed: of the order; epochs follow each other as in [`accelerate.data_loader.SeedableRandomSampler`].
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
    """[`GuardedTrainer`] whose step `s` sees the same rows for any way to share them out.

    That is, for any number of processes, workers and micro-batches whose product with the micro-batch's size is the
    same, and for a run that was resumed.
    """

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if not isinstance(sampler, RandomSampler):
            return sampler
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return StepSampler(len(sampler.data_source), self.get_total_train_batch_size(self.args), seed)

    def _run_epoch(self, **kwargs: Any) -> None:
        # Said before Trainer wraps the loader to skip batches: through the wrapper, on several processes, accelerate
        # 1.15 finds none but its own samplers, and the rest of a resumed epoch would be the first epoch's.
        if hasattr(kwargs["train_dataloader"], "set_epoch"):
            kwargs["train_dataloader"].set_epoch(kwargs["epoch"])
        super()._run_epoch(**kwargs)
