"""A few prompts and answers as a table of plain text, for the log."""

import unicodedata
from collections.abc import Sequence
from typing import Any

from ..generation import Completion


PROMPT_COLUMNS, ANSWER_COLUMNS = 60, 120


def samples_table(prompts: Sequence[Any], completions: Sequence[Completion], scores: Sequence[float]) -> str:
    """Score, tokens, whether the answer ended, prompt and answer, one row each; of long texts the start.

    Args:
        prompts: texts or conversations (of which the last message is shown).
    """
    rows = [("score", "tokens", "ended", "prompt", "answer")]
    for prompt, completion, score in zip(prompts, completions, scores, strict=True):
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        ended = "yes" if completion.stopped else "no"
        texts = _shown(text, PROMPT_COLUMNS), _shown(completion.text, ANSWER_COLUMNS)
        rows.append((f"{score:.3f}", str(len(completion.token_ids)), ended, *texts))
    widths = [max(map(_columns, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        padding = [" " * (width - _columns(cell)) for cell, width in zip(row, widths, strict=True)]
        numbers = [pad + cell for pad, cell in zip(padding[:2], row[:2], strict=True)]
        words = [cell + pad for pad, cell in zip(padding[2:], row[2:], strict=True)]
        lines.append(" | ".join([*numbers, *words]).rstrip())
    return "\n".join([lines[0], "-+-".join("-" * width for width in widths), *lines[1:]])


def _shown(text: str, columns: int) -> str:
    """One line of at most so many columns: line breaks and control characters are escaped."""
    text = "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)
    cut = text[: columns + 1]
    if _columns(cut) <= columns:
        return cut
    while _columns(cut) >= columns:
        cut = cut[:-1]
    return cut + "…"


def _columns(text: str) -> int:
    """Columns in a terminal; most East Asian characters take two."""
    return sum(2 if unicodedata.east_asian_width(one) in "WF" else 1 for one in text)
