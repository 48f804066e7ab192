"""Rows whose answers would be cut: left out, because a model that never sees where an answer ends learns not to stop."""

import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from ..core.errors import UserError


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Rows = TypeVar("Rows", "Dataset", "IterableDataset")


def without_cut_answers(
    rows: Rows, tokenizer: "PreTrainedTokenizerBase", max_length: int | None, what: str = "training rows"
) -> Rows:
    """Return the rows whose prompt and answer (or conversation) fit whole; rows of text are kept, and may be cut.

    Raises:
        UserError: if no row is left.
    """
    from datasets import Dataset

    names = set(rows.column_names or ())
    if max_length is None or not ({"prompt", "completion"} <= names or "messages" in names):
        return rows
    fitting = rows.filter(lambda row: row_tokens(row, tokenizer) <= max_length)
    if not isinstance(rows, Dataset):
        return fitting
    if not len(fitting):
        raise UserError(f"max_length: all {len(rows):,} {what} are longer than {max_length} tokens; raise max_length")
    if dropped := len(rows) - len(fitting):
        text = "%s of %s %s are longer than %s tokens and were left out: cut, their answers would have no end"
        logger.warning(text, f"{dropped:,}", f"{len(rows):,}", what, max_length)
    return fitting


def row_tokens(row: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the number of tokens of a prompt with its answer and stop token, or of a conversation."""
    if isinstance(row.get("completion"), str):
        text = row["prompt"] + row["completion"]
        end = tokenizer.eos_token or ""
        return len(tokenizer(text if text.endswith(end) else text + end)["input_ids"])
    turns = row["prompt"] + row["completion"] if row.get("completion") else row["messages"]
    options = row.get("chat_template_kwargs") or {}
    tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) else row.get("tools")
    text = tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, **options)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])
