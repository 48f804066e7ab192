"""The first rows as fine-tuning prepares them, and the size of its model, for a dry run."""

import copy
from typing import TYPE_CHECKING, Any

from ..core.errors import UserError
from ..models.memory import ModelSize, size_of
from ..training.preview import SHOWN_ROWS, Sample, trained_tokens


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def rows(dataset: "Dataset", tokenizer: "PreTrainedTokenizerBase", config: Any, *_: Any) -> Sample:
    """Return the first rows as they are trained, unpacked."""
    from .rows import tokenized

    limit, unlimited = config.max_length, copy.copy(config)
    unlimited.max_length = None
    whole = tokenized(dataset, tokenizer, unlimited)
    lengths = [len(ids) for ids in whole["input_ids"]]
    cut = limit is None or config.dataset_text_field in dataset.column_names
    kept = [index for index, length in enumerate(lengths) if cut or length <= limit]
    if not kept:
        raise UserError(f"max_length: all of the first {len(dataset):,} rows are longer than {limit} tokens")
    shown = whole.select(kept[:SHOWN_ROWS])
    tokens = trained_tokens((row["input_ids"][:limit], row["labels"][:limit]) for row in shown)
    return Sample(tokens, lengths, limit, 1 - len(kept) / len(dataset))


def size(tokenizer: Any, missing: set[str], config: Any, model_args: Any, data: Any) -> ModelSize | None:
    """Return the size of the model to be fine-tuned."""
    from transformers import AutoModelForCausalLM

    return size_of(AutoModelForCausalLM, model_args.model_name_or_path, missing)
