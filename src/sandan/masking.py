"""Masking for masked language modelling that a resumed run repeats exactly."""

import zlib
from typing import Any

import torch
from transformers import DataCollatorForLanguageModeling

from .pretraining import BlockCollator


class ReproducibleMasking(DataCollatorForLanguageModeling):
    """[`transformers.DataCollatorForLanguageModeling`] for blocks; masks are a pure function of the seed and the batch.

    Data loaders draw a batch ahead of the step, so masks from the global random state, or from a generator that counts
    on, differ after a resumption. Batches differ between epochs, and so do their masks (with one row a batch they
    repeat); evaluation hides the same tokens every time.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Rows of one length -> `input_ids` and `labels` `(rows, block)`, -100 where nothing is hidden."""
        input_ids = BlockCollator()(examples)["input_ids"]
        self.generator = torch.Generator().manual_seed(
            1_000_003 * (self.seed or 0) + zlib.crc32(input_ids.numpy().tobytes())
        )
        special = torch.isin(input_ids, torch.tensor(self.tokenizer.all_special_ids))
        input_ids, labels = self.torch_mask_tokens(input_ids, special)
        return {"input_ids": input_ids, "labels": labels}
