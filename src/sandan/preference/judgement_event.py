"""The lines of a judgement log: what an event must hold, checked once, when its line is read.

The ranking page, the agreement figures and the preference dataset all get their events from [`event_from_line`].
Therefore none of them meets a rank that is text, a time without a zone or a number that is not finite.
"""

import json
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any, NamedTuple


NAME = re.compile(r"[A-Za-z0-9_-]{1,32}")
DAY_SECONDS = 86400

SHOWING = ("ticket", "annotator", "annotator_kind", "item_id", "prompt_id", "showing", "candidates", "time")
# Simulated rankers write judgements without a showing. A judgement with a ticket has all columns of `SHOWING`, too.
REQUIRED = {
    "shown": SHOWING,
    "judgement": ("annotator", "prompt_id", "prompt", "candidates", "ranks"),
    "skip": (*SHOWING, "reason"),
    "undo": ("ticket", "annotator"),
}


class Column(NamedTuple):
    """A column of an event: a function that returns whether a value is allowed, and the words for what is."""

    allows: Callable[[Any], bool]
    expected: str


def is_text(value: Any) -> bool:
    """Return whether a value is text that can be written as UTF-8 (half surrogate pairs cannot)."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def is_whole_number(value: Any) -> bool:
    """Return whether a value is a whole number; `true` is not one, although Python calls it an `int`."""
    return type(value) is int


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and NAME.fullmatch(value) is not None


def is_prompt(value: Any) -> bool:
    """Return whether a value is a prompt: text, or turns whose `role` and `content` are text."""
    if isinstance(value, list):
        turns = all(
            isinstance(turn, dict) and is_text(turn.get("role")) and is_text(turn.get("content")) for turn in value
        )
        return bool(value) and turns and _can_be_written(value)
    return is_text(value)


def _can_be_written(value: Any) -> bool:
    """Return whether further keys of a turn can be written as JSON: no half surrogate pair, nothing infinite."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return False
    return True


def _are_candidates(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_text, value)) and len(set(value)) == len(value)


def _are_flags(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(flags, list) and all(map(is_text, flags)) for flags in value)


def _is_time(value: Any) -> bool:
    try:
        return isinstance(value, str) and datetime.fromisoformat(value).utcoffset() is not None
    except ValueError:
        return False


def _is_duration(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < DAY_SECONDS


def _optional(column: Column) -> Column:
    return Column(lambda value: value is None or column.allows(value), f"{column.expected}, or null")


TEXT = Column(lambda value: is_text(value) and value != "", "text of whole characters")
SHORT_NAME = Column(_is_name, "1 to 32 letters, digits, _ or -")
COLUMNS = {
    "annotator": SHORT_NAME,
    "annotator_kind": SHORT_NAME,
    "ticket": TEXT,
    "item_id": TEXT,
    "prompt_id": Column(is_text, "text of whole characters"),
    "reason": TEXT,
    "prompt": Column(is_prompt, "text, or a list of turns with role and content"),
    "candidates": Column(_are_candidates, "a list of different texts"),
    "ranks": Column(
        lambda value: isinstance(value, list) and all(map(is_whole_number, value)), "a list of whole numbers"
    ),
    "showing": Column(lambda value: is_whole_number(value) and value in (0, 1), "0 or 1"),
    "time": Column(_is_time, "a date and time with its zone"),
    "seconds": _optional(Column(_is_duration, "a number of seconds, less than a day")),
    "flags": _optional(Column(_are_flags, "a list of texts for each candidate")),
    "note": _optional(Column(is_text, "text of whole characters")),
    "guidelines": _optional(SHORT_NAME),
}


def event_from_line(line: bytes) -> dict[str, Any]:
    """Return the event of one line of a judgement log. A line without `event` is a judgement.

    Columns with other names than those of `COLUMNS` may hold any JSON; nothing reads them.

    Raises:
        ValueError: with the reason, if the line is not an event that can be used.
    """
    try:
        event = json.loads(line.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(event, dict):
        raise ValueError(f"not a JSON object but {type(event).__name__}")  # noqa: TRY004
    kind = event.setdefault("event", "judgement")
    if not isinstance(kind, str) or kind not in REQUIRED:
        raise ValueError(f"event: expected {', '.join(REQUIRED)}, found {kind!r:.40}")
    # A ticket of null is no ticket: simulated rankers have none.
    if kind == "judgement" and event.get("ticket", "") is None:
        del event["ticket"]
    required = REQUIRED[kind] + (SHOWING if kind == "judgement" and "ticket" in event else ())
    if missing := [name for name in required if name not in event]:
        raise ValueError(f"no {missing[0]}")
    for name, column in COLUMNS.items():
        if name in event and not column.allows(event[name]):
            raise ValueError(f"{name}: expected {column.expected}, found {event[name]!r:.40}")
    _check_lengths(event)
    return event


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number that JSON knows")


def _check_lengths(event: dict[str, Any]) -> None:
    """Refuse ranks and flags that are not one for each candidate, and ranks beyond the number of candidates."""
    candidates = event.get("candidates") or ()
    for name in ("ranks", "flags"):
        if event.get(name) and len(event[name]) != len(candidates):
            raise ValueError(f"{name}: {len(event[name])} for {len(candidates)} candidates")
    if event["event"] == "judgement":
        ranks = event["ranks"]
        if len(ranks) != len(candidates) or not all(1 <= rank <= len(candidates) for rank in ranks):
            raise ValueError(f"ranks: expected {len(candidates)} from 1 to {len(candidates)}, found {ranks!r:.60}")
