"""Preview of reward training for a dry run: the first pairs as tokens, and the size of the model."""

from typing import TYPE_CHECKING, Any

from ..core.errors import UserError
from ..models.memory import ModelSize, size_of
from ..training.preview import Sample


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def rows(dataset: "Dataset", tokenizer: "PreTrainedTokenizerBase", args: Any, config: Any, *_: Any) -> Sample:
    """Return the answers of the first pairs as they are scored in training."""
    from .rows import tokenized

    sides, limit = ("chosen_ids", "rejected_ids"), config.max_length
    pairs = tokenized(dataset, tokenizer, config)
    lengths = [max(len(pair[side]) for side in sides) for pair in pairs]
    kept = sum(limit is None or length <= limit for length in lengths)
    if not kept:
        raise UserError(f"max_length: all of the first {len(dataset):,} pairs are longer than {limit} tokens")
    tokens = [
        [(token, True) for token in pair[side]] for pair in pairs.select(range(min(2, len(pairs)))) for side in sides
    ]
    return Sample(tokens, lengths, limit, 1 - kept / len(pairs))


def size(tokenizer: Any, missing: set[str], args: Any, config: Any, model_args: Any, data: Any) -> ModelSize | None:
    """Return the size of the reward model."""
    from transformers import AutoModelForSequenceClassification

    return size_of(AutoModelForSequenceClassification, model_args.model_name_or_path, missing)
