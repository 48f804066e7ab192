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


# A character class, in a form that Python and JavaScript both read, of what draws nothing or turns the writing direction:
# controls except tab and line feed, line separators, half surrogate pairs, and format and filler characters.
# Joiners and variation selectors are not in it, because emoji, Japanese and Persian are written with them.
HIDDEN = (
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\u3164\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e00ff\U000e01f0-\U000e0fff"
    "\ud800-\udfff]"
)


def visible(text: Any) -> str:
    """Return the text with its hidden characters shown: controls as symbols, others as `[U+202E]`.

    Half surrogate pairs, which cannot be written as UTF-8, become U+FFFD.
    """

    def replace(match: re.Match) -> str:
        code = ord(match.group())
        if 0xD800 <= code < 0xE000:
            return "\ufffd"
        return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else f"[U+{code:04X}]"

    return re.sub(HIDDEN, replace, str(text))


def share(found: dict[str, float] | None) -> str:
    """Return a share as text, `73.3% (72.1–74.5%)`, or "not measured"."""
    return f"{found['mean']:.1%} ({100 * found['low']:.1f}–{found['high']:.1%})" if found else "not measured"


def number(found: dict[str, float] | None) -> str:
    """Return a number as text, `0.61 (0.58–0.64)`, or "not measured"."""
    return f"{found['mean']:.2f} ({found['low']:.2f}–{found['high']:.2f})" if found else "not measured"
