"""How an update looks to Trainer: one epoch over a loader of micro-batches."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from transformers import DefaultFlowCallback


if TYPE_CHECKING:
    from .trainer import PPOTrainer


class UpdateFlow(DefaultFlowCallback):
    """Trainer's epoch is one update here; the strategy "epoch" keeps its meaning, a pass over the data."""

    def __init__(self, trainer: "PPOTrainer"):
        self.trainer = trainer

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.after_optimizer_step()

    def on_epoch_end(self, args, state, control, **kwargs):
        rows, batch = len(self.trainer.train_dataset), args.batch_size
        ended = state.episode // rows > (state.episode - batch) // rows or state.global_step >= state.max_steps
        return super().on_epoch_end(args, state, control, **kwargs) if ended else control


class UpdateLoader:
    """What Trainer iterates over: for each update, the micro-batches of all its optimizer steps."""

    def __init__(self, trainer: "PPOTrainer"):
        self.trainer = trainer
        self.update = 0

    def __len__(self) -> int:
        return self.trainer.steps_per_update * self.trainer.args.gradient_accumulation_steps

    def set_epoch(self, epoch: int) -> None:
        self.update = epoch

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self.trainer.micro_batches(self.update)
