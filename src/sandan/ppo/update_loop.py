"""How an update looks to Trainer: one epoch over a loader of micro-batches.

(Apart from trainer.py, because that is to be read as PPO; nothing here is.)
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import DefaultFlowCallback


class UpdateFlow(DefaultFlowCallback):
    """Trainer's epoch is one update here; the strategy "epoch" keeps its meaning, a pass over the data.

    Args:
        rows: of the training data.
        after_step: called after each optimizer step.
    """

    def __init__(self, rows: Callable[[], int], after_step: Callable[[], None]):
        self.rows, self.after_step = rows, after_step

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.after_step()

    def on_epoch_end(self, args, state, control, **kwargs):
        rows, batch = self.rows(), args.batch_size
        ended = state.episode // rows > (state.episode - batch) // rows or state.global_step >= state.max_steps
        return super().on_epoch_end(args, state, control, **kwargs) if ended else control


class UpdateLoader:
    """What Trainer iterates over: for each update, the micro-batches of all its optimizer steps.

    Args:
        micro_batches: called with the number of the update.
        length: micro-batches of one update.
    """

    def __init__(self, micro_batches: Callable[[int], Iterator[dict[str, Any]]], length: int):
        self.micro_batches, self.length = micro_batches, length
        self.number = 0

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        self.number = epoch

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self.micro_batches(self.number)
