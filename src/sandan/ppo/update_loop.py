"""Present an update to Trainer as an epoch over a loader of micro-batches.

(This is not part of PPO, so it is kept out of trainer.py.)
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import DefaultFlowCallback
from transformers.trainer_callback import CallbackHandler


class UpdateFlow(DefaultFlowCallback):
    """Callback that keeps the meaning of the strategy "epoch", a pass over the data, although an epoch is an update.

    Args:
        rows: returns the number of rows of the training data.
        after_step: called after each optimizer step.
    """

    def __init__(self, rows: Callable[[], int], after_step: Callable[[], None]):
        self.rows, self.after_step = rows, after_step

    def replace_default(self, handler: CallbackHandler) -> None:
        """Take the place of Trainer's own flow among its callbacks, as the first of them."""
        handler.remove_callback(DefaultFlowCallback)
        handler.callbacks.insert(0, self)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.after_step()

    def on_epoch_end(self, args, state, control, **kwargs):
        rows, batch = self.rows(), args.batch_size
        ended = state.episode // rows > (state.episode - batch) // rows or state.global_step >= state.max_steps
        return super().on_epoch_end(args, state, control, **kwargs) if ended else control


class UpdateLoader:
    """Loader for Trainer that yields, for each update, the micro-batches of all its optimizer steps.

    Args:
        micro_batches: called with the number of the update.
        length: number of micro-batches of an update.
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
