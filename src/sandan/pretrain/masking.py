"""Batches of blocks: unchanged for causal language modelling; for masked, with masks that a resumed run repeats."""

import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import DataCollatorForLanguageModeling


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .model_and_blocks import PretrainArguments


class BlockCollator:
    """Collator for causal language modelling that stacks rows of equal length, with a single copy.

    Every token is trained, also the end of a document if the tokenizer pads with that token. There is no padding mask,
    so attention can use its causal kernel.
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Stack the rows' `input_ids`.

        Returns:
            `input_ids` and `labels`, int64 `(rows, block)`: one tensor under two names.
        """
        input_ids = torch.from_numpy(np.stack([row["input_ids"] for row in rows]).astype(np.int64, copy=False))
        return {"input_ids": input_ids, "labels": input_ids}


class ReproducibleMasking(DataCollatorForLanguageModeling):
    """[`transformers.DataCollatorForLanguageModeling`] for blocks. Masks are a pure function of the seed and batch.

    Data loaders draw a batch ahead of the step, so masks from the global random state, or from one generator for the
    whole run, would differ after a resumption. Batches differ between epochs, and so do their masks (with one row per
    batch they repeat); evaluation hides the same tokens every time.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Stack rows of equal length and mask them.

        Returns:
            `input_ids` and `labels`, both `(rows, block)`; labels are -100 where nothing is hidden.
        """
        input_ids = BlockCollator()(examples)["input_ids"]
        self.generator = torch.Generator().manual_seed(
            1_000_003 * (self.seed or 0) + zlib.crc32(input_ids.numpy().tobytes())
        )
        special = torch.isin(input_ids, torch.tensor(self.tokenizer.all_special_ids))
        input_ids, labels = self.torch_mask_tokens(input_ids, special)
        return {"input_ids": input_ids, "labels": labels}


def make_collator(
    args: "PretrainArguments", tokenizer: "PreTrainedTokenizerBase", seed: int
) -> BlockCollator | ReproducibleMasking:
    """Return the collator of `args.objective`."""
    if args.objective == "mlm":
        return ReproducibleMasking(tokenizer, mlm_probability=args.mlm_probability, seed=seed)
    return BlockCollator()
