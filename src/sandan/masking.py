"""Masking for masked language modelling that a resumed run repeats exactly."""

import zlib
from typing import Any

import torch
from transformers import DataCollatorForLanguageModeling


class ReproducibleMasking(DataCollatorForLanguageModeling):
    """[`transformers.DataCollatorForLanguageModeling`] whose masks are a pure function of the seed and the batch.

    Data loaders draw a batch ahead of the step, so masks from the global random state, or from a generator that counts
    on, differ after a resumption. Batches differ between epochs, and so do their masks (with one row a batch they
    repeat); evaluation hides the same tokens every time.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        content = repr([list(example["input_ids"]) for example in examples]).encode()
        self.generator = torch.Generator().manual_seed(1_000_003 * (self.seed or 0) + zlib.crc32(content))
        return super().torch_call(examples)
