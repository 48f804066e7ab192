"""The judgement log: one append-only JSONL file, from which everything else is computed.

Lines of four kinds, told apart by `event`:

- `shown`: a candidate set was put before an annotator, in this order. Its `ticket` names the showing.
- `judgement`: the ranks of that showing. It is the `rank` stage's record
  (`prompt_id, prompt, candidates, ranks, annotator, time`) with more columns, so either log feeds `make preferences`.
- `skip`: the annotator could not judge it, with the reason.
- `undo`: the annotator took the ticket's last judgement or skip back.

Nothing is ever rewritten: an edit is a further line, and the last line of a ticket holds.
"""

import json
import logging
import os
import re
import threading
import uuid
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..core.errors import UserError


logger = logging.getLogger(__name__)

ANNOTATOR = re.compile(r"[A-Za-z0-9_-]{1,32}")
LOCK_SECONDS = 10.0


class JudgementLog:
    """Append-only log that several threads and processes may write at once.

    Args:
        path: the file; it and its folder are made by the first [`append`].
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lock = FileLock(f"{self.path}.lock", timeout=LOCK_SECONDS)
        self._thread = threading.RLock()
        self._events: list[dict[str, Any]] = []
        self._offset, self._line_number, self._file_id = 0, 0, None

    def __enter__(self) -> "JudgementLog":  # noqa: PYI034 (Self needs Python 3.11)
        """Hold the log: nobody else appends until the end of the `with` block."""
        self._thread.acquire()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout:
            self._thread.release()
            raise UserError(f"{self.path}: another process has held its lock for {LOCK_SECONDS:.0f} s") from None
        except OSError as error:
            self._thread.release()
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); is the folder yours?") from None
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        self._thread.release()

    def append(self, event: dict[str, Any]) -> dict[str, Any]:
        """Write one line and return it; on return it is on the disk (fsync), whatever happens to the process.

        Raises:
            UserError: if the line could not be written whole.
        """
        event = {"event": "judgement", **event, "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds")}
        line = json.dumps(event, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with self:
            try:
                self._write(line)
            except OSError as error:
                raise UserError(f"{self.path}: the judgement was not saved ({error.strerror})") from None
        return event

    def _write(self, line: bytes) -> None:
        is_new = not self.path.exists()
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                # What a crash left of a line stays where it is, as a line of its own.
                line = b"\n" + line
            while line:
                line = line[os.write(descriptor, line) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if is_new:
            folder = os.open(self.path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)

    def read(self) -> list[dict[str, Any]]:
        """All events so far, in order. Only what was appended since the last call is read from the disk.

        A torn last line (a crash in mid-write) is left out; a broken line before it is left out with a warning.

        Raises:
            UserError: if the file shrank or was replaced while it was in use.
        """
        with self._thread:
            if not self.path.is_file():
                if self._events:
                    raise UserError(f"{self.path}: was removed while in use; put it back and start again")
                return []
            with self.path.open("rb") as stream:
                state = os.fstat(stream.fileno())
                file_id = (state.st_dev, state.st_ino)
                if self._file_id not in (None, file_id) or state.st_size < self._offset:
                    raise UserError(f"{self.path}: was replaced or cut while in use; start again")
                self._file_id = file_id
                stream.seek(self._offset)
                for line in stream:
                    if not line.endswith(b"\n"):
                        break
                    self._offset += len(line)
                    self._line_number += 1
                    self._parse(line)
            return list(self._events)

    def _parse(self, line: bytes) -> None:
        if not line.strip():
            return
        try:
            event = json.loads(line)
            check_event(event)
        except ValueError as error:
            logger.warning("%s:%d: left out: %s", self.path, self._line_number, error)
            return
        self._events.append(event)


def check_event(event: Any) -> None:
    """Raise `ValueError` with the reason if a line is not an event that [`standing_judgements`] can use."""
    if not isinstance(event, dict):
        raise ValueError(f"not a JSON object but {type(event).__name__}")  # noqa: TRY004
    kind = event.get("event", "judgement")
    if not isinstance(event.get("annotator"), str):
        raise ValueError("no annotator")  # noqa: TRY004
    if kind in ("shown", "judgement") and not isinstance(event.get("candidates"), list):
        raise ValueError("no candidates")
    if kind == "judgement" and len(event.get("ranks") or ()) != len(event["candidates"]):
        raise ValueError("not one rank a candidate")
    if kind in ("skip", "undo", "shown") and not isinstance(event.get("ticket"), str):
        raise ValueError("no ticket")


def new_ticket() -> str:
    """A name for one showing, unguessable and never used again."""
    return uuid.uuid4().hex


def check_annotator(name: Any) -> str:
    """The name itself, if it is one.

    Raises:
        UserError: if it is not 1 to 32 letters, digits, `_` or `-`.
    """
    if not isinstance(name, str) or not ANNOTATOR.fullmatch(name):
        raise UserError(f"annotator: expected 1 to 32 letters, digits, _ or -, found {str(name)[:40]!r}")
    return name


def standing_events(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The judgements and skips that stand: of each ticket the last one, unless it was undone.

    Records without a ticket (simulated rankers) stand as they are.
    """
    standing: dict[str, dict[str, Any]] = {}
    for number, event in enumerate(events):
        kind = event.get("event", "judgement")
        ticket = event.get("ticket", f"line {number}")
        if kind == "undo":
            standing.pop(ticket, None)
        elif kind in ("judgement", "skip"):
            # An edit takes the place that it was made at, not that of what it replaces.
            standing.pop(ticket, None)
            standing[ticket] = event
    return list(standing.values())


def standing_judgements(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of [`standing_events`] the judgements."""
    return [event for event in standing_events(events) if event.get("event", "judgement") == "judgement"]


def competition_ranks(values: Iterable[int]) -> list[int]:
    """Ranks as the log holds them (1 = best, equal = tie, `1 2 2 4`) from any numbers that order alike.

    >>> competition_ranks([2, 5, 2, 9])
    [1, 3, 1, 4]
    """
    values = list(values)
    return [1 + sum(other < value for other in values) for value in values]
