"""The judgement log: one append-only JSONL file, from which everything else is computed.

There are four kinds of lines, named by `event`:

- `shown`: an annotator was shown a candidate set, in this order. Its `ticket` names the showing.
- `judgement`: the ranks of that showing. It has the columns of the `rank` stage
  (`prompt_id, prompt, candidates, ranks, annotator, time`) and more, so `make preferences` reads either log.
- `skip`: the annotator could not judge it, with the reason.
- `undo`: the annotator took back the ticket's last judgement or skip.

No line is ever rewritten: an edit appends a line, and the last line of a ticket is the valid one.
"""

import json
import logging
import os
import threading
import uuid
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..core.errors import UserError
from .judgement_event import NAME, event_from_line


logger = logging.getLogger(__name__)

LOCK_SECONDS = 10.0
NAMED_LINES = 5


class JudgementLog:
    """An append-only log that several threads and processes may write at the same time.

    Args:
        path: the file; the first [`append`] creates it and its folder.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lock = FileLock(f"{self.path}.lock", timeout=LOCK_SECONDS)
        self._thread = threading.RLock()
        self._events: list[dict[str, Any]] = []
        self._offset, self._line_number, self._file_id = 0, 0, None
        self.left_out = 0

    def __enter__(self) -> "JudgementLog":  # noqa: PYI034 (Self needs Python 3.11)
        """Lock the log: nobody else appends until the end of the `with` block."""
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
        """Append one line and return its event; the line is on the disk (fsync) before this method returns.

        Raises:
            UserError: if the line is not a valid event, or could not be written completely.
        """
        event = {"event": "judgement", **event, "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds")}
        try:
            line = json.dumps(event, ensure_ascii=False, allow_nan=False).encode()
            event = event_from_line(line)
        except ValueError as error:
            # What could not be read again must not be written.
            raise UserError(f"{self.path}: the judgement was not saved ({error})") from None
        line += b"\n"
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
                # A crash left an incomplete line at the end: end it, so that the new line stands alone.
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
        """Return all events so far, in order. Only lines added since the last call are read from the disk.

        An incomplete last line (a crash while writing) is left out. Any other line that is not a valid event is left out,
        counted in `left_out`, and the first of them are named with their number and the reason.

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
            self._events.append(event_from_line(line))
        except ValueError as error:
            self.left_out += 1
            if self.left_out <= NAMED_LINES:
                logger.warning("%s:%d: left out: %s", self.path, self._line_number, error)
            elif self.left_out == NAMED_LINES + 1:
                logger.warning("%s: further lines are left out without being named, but counted", self.path)


def new_ticket() -> str:
    """Return a name for one showing that cannot be guessed and is never used again."""
    return uuid.uuid4().hex


def check_annotator(name: Any) -> str:
    """Return the name if it is a valid name of an annotator.

    Raises:
        UserError: if it is not 1 to 32 letters, digits, `_` or `-`.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(f"annotator: expected 1 to 32 letters, digits, _ or -, found {str(name)[:40]!r}")
    return name


def standing_events(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the judgements and skips that stand: the last one of each ticket, unless it was undone.

    Records without a ticket (of simulated rankers) always stand. Nobody can undo another annotator's ticket.
    """
    standing: dict[tuple[str, str | int], dict[str, Any]] = {}
    for number, event in enumerate(events):
        kind = event.get("event", "judgement")
        ticket = (event["annotator"], event.get("ticket", number))
        if kind == "undo":
            standing.pop(ticket, None)
        elif kind in ("judgement", "skip"):
            # An edited event moves to the position of its edit.
            standing.pop(ticket, None)
            standing[ticket] = event
    return list(standing.values())


def standing_judgements(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the judgements among [`standing_events`]."""
    return [event for event in standing_events(events) if event.get("event", "judgement") == "judgement"]


def competition_ranks(values: Iterable[int]) -> list[int]:
    """Return ranks as the log holds them (1 = best, equal = tie, `1 2 2 4`), from any numbers in the same order.

    >>> competition_ranks([2, 5, 2, 9])
    [1, 3, 1, 4]
    """
    values = list(values)
    return [1 + sum(other < value for other in values) for value in values]
