"""The queue of items for annotators: the next item is a pure function of the candidates, the settings and the log.

Memory holds nothing that is not in the log. A restarted server, a second browser tab and a second server on the same
log therefore all continue with the same item, its answers in the same order.
"""

import hashlib
import json
import logging
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..data.chat import prompt_id
from ..data.jsonl import read_jsonl
from .judgement_event import is_prompt
from .judgement_log import JudgementLog, competition_ranks, new_ticket


logger = logging.getLogger(__name__)

MOST_CANDIDATES = 9
# An item that was shown to an annotator but not settled within this time is offered to others again.
CLAIM = timedelta(minutes=30)


class AlreadySettled(UserError):
    """A decision on a showing that has another one already, made in another tab or window of the same annotator."""


@dataclass(frozen=True)
class Item:
    """One prompt and its candidate answers, in the order of the candidates file."""

    item_id: str
    prompt_id: str
    prompt: str | list[dict[str, str]]
    candidates: tuple[str, ...]


@dataclass
class QueueSettings:
    """Settings of the queue: how many annotators judge an item, and how many items an annotator sees twice."""

    overlap_share: float = 0.2
    overlap_annotators: int = 2
    repeat_share: float = 0.05
    repeat_after: int = 8
    seed: int = 0
    annotator_kind: str = "human"

    def wanted(self, item: Item) -> int:
        """Return how many annotators should judge this item."""
        return self.overlap_annotators if hash_fraction(self.seed, "overlap", item.item_id) < self.overlap_share else 1

    def repeats(self, item: Item, annotator: str) -> bool:
        """Return whether this annotator sees this item a second time."""
        return hash_fraction(self.seed, "repeat", annotator, item.item_id) < self.repeat_share


def hash_fraction(*parts: Any) -> float:
    """Return a number in [0, 1) that is a hash of `parts` and depends on nothing else."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def item_identity(identity: str, prompt: Any, candidates: Sequence[str]) -> str:
    """Return a name for this prompt with this set of answers in any order; other answers give another name."""
    content = json.dumps([identity, prompt, sorted(candidates)], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def load_items(path: str | Path) -> list[Item]:
    """Load the items of a candidates file (JSONL with `prompt`, `candidates` and optionally `prompt_id`), each once.

    Half a surrogate pair cannot be written to a preference file. It is replaced by U+FFFD when shown and stored.

    Raises:
        UserError: if a row has no prompt that can be shown, or not 2 to 9 different candidates that are text; the
            message names the row.
    """
    items: dict[str, Item] = {}
    changed = 0
    for number, row in enumerate(read_jsonl(path, [("prompt", "candidates")], half_characters=True), start=1):
        prompt, candidates = (_whole(row[name]) for name in ("prompt", "candidates"))
        changed += [prompt, candidates] != [row["prompt"], row["candidates"]]
        if not (isinstance(candidates, list) and all(isinstance(text, str) for text in candidates)):
            raise UserError(f"{path}: row {number}: candidates: expected a list of texts")
        different = len(set(candidates))
        if not 2 <= len(candidates) <= MOST_CANDIDATES or different < len(candidates):
            raise UserError(
                f"{path}: row {number}: {len(candidates)} candidates, {different} of them different; "
                f"people rank 2 to {MOST_CANDIDATES} different answers"
            )
        if not is_prompt(prompt):
            raise UserError(f"{path}: row {number}: prompt: expected text, or a list of turns with role and content")
        identity = _whole(prompt_id(row | {"prompt": prompt}))
        name = item_identity(identity, prompt, candidates)
        items[name] = Item(name, identity, prompt, tuple(candidates))
    if changed:
        logger.warning("%s: %d rows held half a surrogate pair; it is shown and stored as U+FFFD", path, changed)
    return list(items.values())


def _whole(value: Any) -> Any:
    if isinstance(value, list):
        return [_whole(item) for item in value]
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if isinstance(value, str) else value


@dataclass
class Progress:
    """The progress of one annotator.

    Args:
        settled: ticket -> event of the judged or skipped ones, in the order of their last line.
        open: ticket -> event of those shown but not settled; the last one is shown next.
        before_undo: ticket -> the decision that was undone, to start from.
    """

    settled: dict[str, dict[str, Any]] = field(default_factory=dict)
    open: dict[str, dict[str, Any]] = field(default_factory=dict)
    before_undo: dict[str, dict[str, Any]] = field(default_factory=dict)

    def done(self, item_id: str) -> list[dict[str, Any]]:
        """Return the settled events of an item, first showing first."""
        return [event for event in self.settled.values() if event.get("item_id") == item_id]


class Queue:
    """A queue that hands items to annotators and logs their decisions.

    Args:
        items: the items to judge.
        log: the log that holds all events.
        settings: overlap and repeats.
    """

    def __init__(self, items: Sequence[Item], log: JudgementLog, settings: QueueSettings):
        self.items = {item.item_id: item for item in items}
        self.log, self.settings = log, settings
        self._everyone: dict[str, Progress] = {}
        self._followed = 0

    def _progress(self) -> dict[str, Progress]:
        """Return every annotator's progress, after a replay of new events only. Call it while holding the log."""
        events = self.log.read()
        follow(events[self._followed :], self._everyone)
        self._followed = len(events)
        return self._everyone

    def current(self, annotator: str) -> dict[str, Any] | None:
        """Return the `shown` event of the annotator's current item: an open one, else a new one, None at the end."""
        with self.log:
            everyone = self._progress()
            mine = everyone.setdefault(annotator, Progress())
            for event in reversed(mine.open.values()):
                if self._item_of(event):
                    return event
            item, showing = self._next(annotator, everyone)
            if item is None:
                return None
            return self.log.append(
                {
                    "event": "shown",
                    "ticket": new_ticket(),
                    "annotator": annotator,
                    "annotator_kind": self.settings.annotator_kind,
                    "item_id": item.item_id,
                    "prompt_id": item.prompt_id,
                    "showing": showing,
                    "candidates": self.order(annotator, item, showing),
                }
            )

    def _item_of(self, event: dict[str, Any]) -> Item | None:
        """Return the item of a showing; None if the candidates file lacks it, or the log names other candidates."""
        item = self.items.get(event["item_id"])
        return item if item and sorted(event["candidates"]) == sorted(item.candidates) else None

    def order(self, annotator: str, item: Item, showing: int) -> list[str]:
        """Return the candidates in this annotator's order; a second showing never has the order of the first."""
        orders: list[list[str]] = []
        for number in range(showing + 1):
            rng = random.Random(f"{self.settings.seed}:{annotator}:{item.item_id}:{number}")
            order = rng.sample(item.candidates, len(item.candidates))
            orders.append(order[1:] + order[:1] if order in orders else order)
        return orders[-1]

    def _next(self, annotator: str, everyone: dict[str, Progress]) -> tuple[Item | None, int]:
        mine = everyone[annotator]
        settled = [event["item_id"] for event in mine.settled.values()]
        for name in settled[: max(0, len(settled) - self.settings.repeat_after + 1)]:
            item = self.items.get(name)
            if item and self.settings.repeats(item, annotator) and list(map(_is_judgement, mine.done(name))) == [True]:
                return item, 1
        waiting = self.waiting(annotator, everyone)
        return (waiting[0], 0) if waiting else (None, 0)

    def waiting(self, annotator: str, everyone: dict[str, Progress]) -> list[Item]:
        """Return the items new to this annotator that still need a judgement, in the annotator's own order.

        Judgements by people and by models are counted separately: an item that a model judged still needs people.
        """
        taken: dict[str, set[str]] = {}
        now = datetime.now(timezone.utc)
        for name, progress in everyone.items():
            claims = [event for event in progress.open.values() if now - datetime.fromisoformat(event["time"]) < CLAIM]
            for event in [*filter(_is_judgement, progress.settled.values()), *claims]:
                if event.get("annotator_kind") == self.settings.annotator_kind:
                    taken.setdefault(event["item_id"], set()).add(name)
        mine = everyone.get(annotator, Progress())
        seen = {event.get("item_id") for event in [*mine.settled.values(), *mine.open.values()]}
        wanted = [
            item
            for name, item in self.items.items()
            if name not in seen and len(taken.get(name, ())) < self.settings.wanted(item)
        ]
        return sorted(wanted, key=lambda item: hash_fraction(self.settings.seed, "order", annotator, item.item_id))

    def judge(self, annotator: str, ticket: str, ranks: Sequence[int], **details: Any) -> dict[str, Any]:
        """Append the judgement of a showing. The same decision sent twice is written only once.

        A settled showing is judged anew only after [`undo`]: otherwise a second tab would overwrite the first unseen.

        Args:
            ranks: one per candidate in the order shown; smallest = best, equal = tie. Stored as competition ranks.
            details: further columns (flags, note, seconds, guidelines).

        Raises:
            UserError: if the ticket is not this annotator's, or the number of ranks is not that of the candidates.
            AlreadySettled: if the showing has another decision that stands.
        """
        return self._settle(annotator, ticket, {"event": "judgement", "ranks": ranks, **details})

    def skip(self, annotator: str, ticket: str, reason: str, **details: Any) -> dict[str, Any]:
        """Append that the annotator could not judge a showing, and why."""
        return self._settle(annotator, ticket, {"event": "skip", "reason": reason, **details})

    def _settle(self, annotator: str, ticket: str, decision: dict[str, Any]) -> dict[str, Any]:
        with self.log:
            mine = self._progress().get(annotator, Progress())
            shown = mine.open.get(ticket) or mine.settled.get(ticket)
            item = shown and self._item_of(shown)
            if not item:
                raise UserError("this item is no longer open; reload the page")
            candidates = shown["candidates"]
            if "ranks" in decision:
                ranks = decision["ranks"]
                if len(ranks) != len(candidates) or not all(type(rank) is int and rank >= 1 for rank in ranks):
                    raise UserError(f"ranks: expected {len(candidates)} whole numbers from 1, found {ranks!r:.80}")
                decision["ranks"] = competition_ranks(ranks)
            earlier = mine.settled.get(ticket, {})
            same = ("event", "ranks", "reason", "flags", "note")
            if earlier and all(earlier.get(key) == decision.get(key) for key in same):
                return earlier
            if earlier:
                raise AlreadySettled("this item was already judged in another tab or window; that decision stands")
            keys = ("ticket", "annotator", "annotator_kind", "item_id", "prompt_id", "showing")
            kept = {key: shown[key] for key in keys}
            return self.log.append(kept | {"prompt": item.prompt, "candidates": candidates} | decision)

    def undo(self, annotator: str) -> dict[str, Any] | None:
        """Undo the annotator's last standing decision and reopen its item; return None if there is none."""
        with self.log:
            mine = self._progress().get(annotator, Progress())
            last = next((event for event in reversed(mine.settled.values()) if self._item_of(event)), None)
            if last is None:
                return None
            return self.log.append({"event": "undo", "ticket": last["ticket"], "annotator": annotator})

    def summary(self, annotator: str) -> dict[str, Any]:
        """Return one annotator's progress: items judged, skipped and left, and the pace over the last items."""
        with self.log:
            everyone = self._progress()
            mine = everyone.setdefault(annotator, Progress())
            judged = [event for event in mine.settled.values() if _is_judgement(event)]
            left = len(self.waiting(annotator, everyone)) + sum(
                bool(self._item_of(event)) for event in mine.open.values()
            )
        seconds = [event["seconds"] for event in judged[-20:] if event.get("seconds")]
        mean = sum(seconds) / len(seconds) if seconds else None
        return {
            "judged": len(judged),
            "skipped": len(mine.settled) - len(judged),
            "left": left,
            "seconds_per_item": round(mean, 1) if mean else None,
            "items_per_hour": round(3600 / max(mean, 0.01)) if mean else None,
        }

    def draft(self, annotator: str, ticket: str) -> dict[str, Any] | None:
        """Return the undone decision on a showing, from which the annotator starts again."""
        with self.log:
            return self._progress().get(annotator, Progress()).before_undo.get(ticket)


def _is_judgement(event: dict[str, Any]) -> bool:
    return event.get("event") == "judgement"


def follow(events: Iterable[dict[str, Any]], everyone: dict[str, Progress]) -> None:
    """Replay events into each annotator's settled and open tickets; `everyone` is changed in place."""
    for event in events:
        ticket = event.get("ticket")
        if ticket is None:
            continue
        mine = everyone.setdefault(event["annotator"], Progress())
        kind = event["event"]
        if kind == "shown":
            mine.open[ticket] = event
        elif kind in ("judgement", "skip"):
            mine.open.pop(ticket, None)
            mine.settled.pop(ticket, None)
            mine.settled[ticket] = event
        elif kind == "undo" and ticket in mine.settled:
            taken_back = mine.settled.pop(ticket)
            mine.open[ticket] = mine.before_undo[ticket] = taken_back
