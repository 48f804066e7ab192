"""The first rows, as a dry run shows them. Each script names the `preview` module of its stage, with two functions.

    rows(dataset, tokenizer, *values) -> Sample                the rows as the trainer of that stage prepares them
    size(tokenizer, missing, *values) -> ModelSize | None      the models it would hold, None if they do not exist yet

`values` are the parsed dataclasses, as the script's `main` takes them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..models.rendering import encode_prompts


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


SHOWN_ROWS = 3


@dataclass
class Sample:
    """The first rows as the stage sees them.

    Args:
        tokens: for each row, pairs of a token id and whether the token is trained.
        lengths: of each row, in tokens, before anything is cut.
        limit: the most tokens of a row that is not cut or dropped.
        dropped: share of the rows that is left out.
        rows_per_document: training rows made from one row of data, on average.
        longest: tokens of the longest training row, if it is not the longest row of data.
    """

    tokens: list[list[tuple[int, bool]]]
    lengths: list[int]
    limit: int | None = None
    dropped: float = 0.0
    rows_per_document: float = 1.0
    longest: int | None = None


def prompt_rows(dataset: "Dataset", tokenizer: "PreTrainedTokenizerBase", limit: int | None = None) -> Sample:
    """Return prompts as a model reads them before it samples answers; none of their tokens is trained.

    Args:
        limit: the most tokens of a prompt that is kept.
    """
    if "prompt" not in dataset.column_names:
        return Sample([], [len(tokenizer(str(row))["input_ids"]) for row in dataset])
    prompts = encode_prompts(tokenizer, dataset["prompt"][:])
    lengths = [len(ids) for ids in prompts]
    dropped = 0.0 if limit is None else sum(length > limit for length in lengths) / len(lengths)
    return Sample([[(token, False) for token in ids] for ids in prompts[:SHOWN_ROWS]], lengths, limit, dropped)


def trained_tokens(rows: Iterable[tuple[Sequence[int], Sequence[int]]]) -> list[list[tuple[int, bool]]]:
    """Return rows of ids and labels as pairs of the token and whether it is trained."""
    return [[(token, label != -100) for token, label in zip(ids, labels, strict=True)] for ids, labels in rows]
