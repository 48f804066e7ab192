"""Text in a terminal: columns that line up, also with characters of double width, and no hidden characters."""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as columns, two spaces apart; characters of double width (Japanese) count as two."""
    columns = max(map(len, lines))
    # A row of one cell is a heading, which may be wider than its column.
    widths = [
        max((display_width(line[at]) for line in lines if at < len(line) > 1), default=0) for at in range(columns)
    ]
    return "\n".join(
        "  ".join(
            cell + " " * max(0, width - display_width(cell)) for cell, width in zip(line, widths, strict=False)
        ).rstrip()
        for line in lines
    )


def display_width(text: str) -> int:
    """Return the number of columns that the text takes in a terminal."""
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )


def one_line(text: str, columns: int) -> str:
    """Return the text as one line of at most `columns` columns; line breaks and control characters are escaped."""
    text = "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
    cut = text[: columns + 1]
    if display_width(cut) <= columns:
        return cut
    while display_width(cut) >= columns:
        cut = cut[:-1]
    return cut + "…"


def visible(text: Any) -> str:
    """Return the text with visible control characters: they become symbols, half surrogate pairs become U+FFFD."""

    def replace(match: re.Match) -> str:
        code = ord(match.group())
        return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"

    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", replace, str(text))


def share(found: dict[str, float] | None) -> str:
    """Return a share as text, `73.3% (72.1–74.5%)`, or "not measured"."""
    return f"{found['mean']:.1%} ({100 * found['low']:.1f}–{found['high']:.1%})" if found else "not measured"


def number(found: dict[str, float] | None) -> str:
    """Return a number as text, `0.61 (0.58–0.64)`, or "not measured"."""
    return f"{found['mean']:.2f} ({found['low']:.2f}–{found['high']:.2f})" if found else "not measured"
