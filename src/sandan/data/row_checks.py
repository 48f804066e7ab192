"""Checks of data rows, row by row in constant memory, before anything is loaded.

Every problem is recorded with its place (`file:line: column: problem`); the first are shown, all are counted by kind.
Repeated rows, and rows that are in both training and evaluation data, are found by a hash of their normalised text.
"""

import gzip
import hashlib
import json
import logging
import re
import tempfile
import unicodedata
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from ..core.errors import UserError


if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

SHOWN_PROBLEMS = 20
MAX_ROW_BYTES = 16 << 20
CONVERSATIONS = ("messages", "prompt", "completion", "chosen", "rejected")
WRITTEN_BY_PEOPLE = ("text", "messages", "prompt", "completion")
# Rows with these columns are trained on directly, so a repeated row is a mistake. (The same prompt may be sampled from
# twice, and several people may judge the same pair, so repeats of those rows are only counted.)
ANSWERED = ("text", "messages", "completion")
NUMBERED_ROWS = (".json", ".parquet")
ROLES = ("system", "developer", "user", "assistant", "tool")


class Problem(NamedTuple):
    """A problem of a row: its column (empty for the row as a whole), a description and the kind of problem."""

    column: str
    text: str
    kind: str

    def at(self, place: str) -> str:
        return f"{place}: {f'{self.column}: ' if self.column else ''}{self.text}"


@dataclass
class Findings:
    """The problems found so far: the first ones as text, and the number of each kind."""

    shown: list[str] = field(default_factory=list)
    kinds: Counter = field(default_factory=Counter)

    def add(self, place: str, problem: Problem) -> None:
        self.kinds[problem.kind] += 1
        if len(self.shown) < SHOWN_PROBLEMS:
            self.shown.append(problem.at(place))

    def refuse(self) -> None:
        """Raise [`UserError`] with the first problem and the counts, after logging the other problems in `shown`."""
        if not self.shown:
            return
        for line in self.shown[1:]:
            logger.error(line)
        total = sum(self.kinds.values())
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.kinds.most_common())
        raise UserError(f"{self.shown[0]}{f' (and {total - 1:,} more; in all {kinds})' if total > 1 else ''}")


# ---- Rows ----


class RowChecker:
    """Checker of the rows of one source, which must all have the same columns and types as the first row.

    Args:
        columns: accepted sets of columns; a row must have all columns of one set, not null.
    """

    def __init__(self, columns: Sequence[Sequence[str]]):
        self.columns = columns
        self.first: dict[str, type] = {}

    def wanted(self, row: Mapping[str, Any]) -> Sequence[str] | None:
        accepted = [tuple(self.first)] if self.first else self.columns
        return next((names for names in accepted if all(row.get(name) is not None for name in names)), None)

    def problem(self, row: Any, escapes: bool = True) -> Problem | None:
        """Return the first problem of a row, or None.

        Args:
            escapes: look for characters that only a JSON escape can write (NUL, half a surrogate pair).
        """
        if not isinstance(row, dict):
            return Problem("", f"expected a JSON object, found {type(row).__name__}", "of another type")
        wanted = self.wanted(row)
        if wanted is None:
            shown = sorted(name if value is not None else f"{name} (null)" for name, value in row.items())
            accepted = [tuple(self.first)] if self.first else self.columns
            return Problem("", f"columns {shown}, expected {describe_columns(accepted)}", "without a column")
        found = _wrong_characters(row, wanted) if escapes and wanted else None
        found = found or next((problem for name in wanted if (problem := _wrong_value(name, row[name]))), None)
        found = found or _wrong_row(row, wanted)
        for name, kind in self.first.items():
            if found is None and type(row[name]) is not kind:
                text = f"{type(row[name]).__name__}, but {kind.__name__} in the rows before"
                found = Problem(name, text, "of another type")
        if not self.first and found is None:
            self.first = {name: type(row[name]) for name in wanted}
        return found


def describe_columns(columns: Sequence[Sequence[str]]) -> str:
    """Describe sets of columns: `("prompt", "completion"), ("messages",)` -> `prompt and completion, or messages`."""
    return ", or ".join(" and ".join(wanted) for wanted in columns) or "any columns"


def _wrong_characters(row: Mapping[str, Any], wanted: Sequence[str]) -> Problem | None:
    """Return a problem if a text has half a surrogate pair, which no file can hold, or a NUL character.

    NUL is refused only in columns that people write, because a model may sample it in the others.
    """
    for name, value in row.items():
        nul = name in wanted and name in WRITTEN_BY_PEOPLE
        found = next((match for text in _strings(value) if (match := re.search("[\x00\ud800-\udfff]", text))), None)
        if found and (nul or found[0] != "\0"):
            half = f"holds half a surrogate pair (\\u{ord(found[0]):x})"
            return Problem(name, "holds a NUL character" if found[0] == "\0" else half, "with a wrong character")
    return None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in [*value.keys(), *value.values()] if isinstance(value, dict) else value:
            yield from _strings(item)


def _wrong_value(name: str, value: Any) -> Problem | None:
    if name == "text" or (name in CONVERSATIONS and not isinstance(value, (str, list))):
        if not isinstance(value, str):
            return Problem(name, f"expected text, found {type(value).__name__}", "of another type")
    elif name not in CONVERSATIONS:
        return None
    if isinstance(value, str) and name != "messages":
        return Problem(name, "is empty", "empty") if name in WRITTEN_BY_PEOPLE and not value.strip() else None
    if isinstance(value, str) or not value:
        return Problem(name, f"expected a list of turns, found {value!r:.40}", "of another type")
    return next((found for number, turn in enumerate(value, 1) if (found := _wrong_turn(name, number, turn))), None)


def _wrong_turn(name: str, number: int, turn: Any) -> Problem | None:
    if not (isinstance(turn, dict) and isinstance(turn.get("role"), str) and "content" in turn):
        return Problem(name, f"expected turns of role and content, found {turn!r:.40}", "of another type")
    if turn["role"] not in ROLES:
        return Problem(name, f"turn {number}: role {turn['role']!r:.20}; expected one of {', '.join(ROLES)}", "turns")
    if turn.get("tool_calls"):
        return None
    if not isinstance(turn["content"], str):
        return Problem(name, f"content: expected text, found {turn['content']!r:.40}", "of another type")
    if name in WRITTEN_BY_PEOPLE and not turn["content"].strip():
        return Problem(name, f"turn {number}: its content is empty", "empty")
    return None


def _wrong_row(row: Mapping[str, Any], wanted: Sequence[str]) -> Problem | None:
    """Return a problem that shows only across columns: a wrong order of roles, or two equal answers."""
    prompt = row.get("prompt") if "prompt" in wanted and isinstance(row.get("prompt"), list) else []
    if prompt and (found := _wrong_order("prompt", prompt, last="user")):
        return found
    for name in ("messages", "completion", "chosen", "rejected"):
        if name not in wanted or not isinstance(row[name], list):
            continue
        before = prompt if name != "messages" else []
        if "prompt" in wanted and not before and name != "messages":
            before = [{"role": "user", "content": ""}]
        if found := _wrong_order(name, row[name], last="assistant", before=before):
            return found
    if {"chosen", "rejected"} <= set(wanted) and row["chosen"] == row["rejected"]:
        return Problem("rejected", "the same as chosen: nothing to prefer", "of equal answers")
    return None


def _wrong_order(
    name: str, turns: Sequence[Mapping[str, Any]], last: str, before: Sequence[Mapping[str, Any]] = ()
) -> Problem | None:
    roles = [turn["role"] for turn in (*before, *turns)]
    if any(role == "tool" for role in roles) or any(turn.get("tool_calls") for turn in turns):
        return None
    first = len(before) + 1
    if roles[0] in ("system", "developer"):
        roles, first = roles[1:], first - 1
    for number, role in enumerate(roles):
        expected = "user" if number % 2 == 0 else "assistant"
        if role != expected:
            place = number + 2 - first
            text = f"turn {place} is of the {role}, expected the {expected} (they take turns, the user begins)"
            return Problem(name, text, "turns")
    if not roles or roles[-1] != last:
        end = f"ends with the {roles[-1]}" if roles else "has only a system turn"
        return Problem(name, f"{end}, expected the {last} last", "turns")
    return None


# ---- Files ----


def kind_of(file: str | Path) -> str:
    """Return the suffix of a file, without .gz."""
    return Path(str(file).removesuffix(".gz")).suffix


def place_of(file: str | Path, number: int) -> str:
    """Return the place of a row: `file:line`, or `file: row N` in files without lines."""
    return f"{file}: row {number}" if kind_of(file) in NUMBERED_ROWS else f"{file}:{number}"


def open_lines(path: str | Path) -> IO[bytes]:
    """Open a file of lines, and unpack it if it is gzipped."""
    return gzip.open(path, "rb") if str(path).endswith(".gz") else open(path, "rb")


def bounded_lines(path: str | Path) -> Iterator[tuple[int, bytes | None]]:
    """Yield number and bytes of each line of a file, in constant memory; None for one that is too long."""
    with open_lines(path) as stream:
        number = 0
        while line := stream.readline(MAX_ROW_BYTES + 1):
            number += 1
            whole = len(line) <= MAX_ROW_BYTES
            yield number, line if whole else None
            while not whole and line and not line.endswith(b"\n"):
                line = stream.readline(1 << 20)


def too_long() -> Problem:
    """Return the problem of a row that is too long."""
    return Problem("", f"longer than {MAX_ROW_BYTES >> 20} MiB", "too long")


def read_rows(path: str | Path) -> Iterator[tuple[int, Any, bytes, Problem | None]]:
    """Yield line number, JSON value, line and problem of each line of a JSONL file that is not blank."""
    for number, line in bounded_lines(path):
        if line is None:
            yield number, None, b"", too_long()
        elif line.strip():
            yield number, *_parse(line)


def _parse(line: bytes) -> tuple[Any, bytes, Problem | None]:
    try:
        return json.loads(line.decode("utf-8-sig")), line, None
    except UnicodeDecodeError as error:
        return None, line, Problem("", f"not UTF-8 at byte {error.start}; save the file as UTF-8", "not UTF-8")
    except json.JSONDecodeError as error:
        cut = "; the line is cut off" if not line.endswith(b"\n") else ""
        return None, line, Problem("", f"not JSON ({error.msg} at column {error.colno}){cut}", "not JSON")
    except (RecursionError, ValueError) as error:
        return None, line, Problem("", f"not JSON that can be read ({error})", "not JSON")


def scan_file(
    path: str | Path,
    columns: Sequence[Sequence[str]],
    findings: Findings,
    hashes: "RowHashes | None" = None,
    half_characters: bool = False,
) -> int:
    """Check each row of a JSONL file (or .jsonl.gz) in constant memory, and return the number of good rows.

    Args:
        columns: as in [`RowChecker`].
        findings: collects the problems.
        hashes: collects the hashes of the good rows.
        half_characters: accept half surrogate pairs and NUL, which only a JSON escape can write.

    Raises:
        UserError: if the file cannot be read to its end.
    """
    checker, good = RowChecker(columns), 0
    place = hashes.add_file(path) if hashes is not None else 0
    with readable(path):
        for number, row, line, problem in read_rows(path):
            problem = problem or checker.problem(row, escapes=b"\\u" in line and not half_characters)
            if problem is not None:
                findings.add(f"{path}:{number}", problem)
                continue
            good += 1
            if hashes is not None:
                hashes.add(row, checker.wanted(row), place + number)
    return good


@contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """Raise [`UserError`] if a file cannot be read to its end."""
    try:
        yield
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def row_hash(row: Mapping[str, Any], names: Sequence[str]) -> int:
    """Return a 64-bit hash of a row's text. Case, width of characters and white space make no difference."""
    columns = ("\x1f".join(map(_normalised, _strings(row[name]))) for name in names)
    text = "\x1e".join(columns).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


@lru_cache(maxsize=4096)
def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


class RowHashes:
    """Hashes of any number of rows with their places, in constant memory: hashes that do not fit are kept on disk.

    Rows are assigned to buckets by hash, so that equal rows are in the same bucket and each bucket is searched alone.
    """

    BUCKETS = 64
    IN_MEMORY_ROWS = 1 << 18
    LINE_BITS = 40

    def __init__(self):
        self.files: list[str] = []
        self.rows = 0
        self.answered = False
        self._buckets = [array("Q") for _ in range(self.BUCKETS)]
        self._folder: tempfile.TemporaryDirectory | None = None

    def add_file(self, path: str | Path) -> int:
        """Add a file, and return the place of its line 0."""
        self.files.append(str(path))
        return (len(self.files) - 1) << self.LINE_BITS

    def add(self, row: Mapping[str, Any], names: Sequence[str], place: int) -> None:
        self.answered = self.answered or any(name in ANSWERED for name in names)
        value = row_hash(row, names)
        self._buckets[value % self.BUCKETS].extend((value, place))
        self.rows += 1
        if self.rows % self.IN_MEMORY_ROWS == 0:
            self._spill()

    def _spill(self) -> None:
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="sandan-")
        for number, bucket in enumerate(self._buckets):
            with open(Path(self._folder.name, str(number)), "ab") as stream:
                bucket.tofile(stream)
            del bucket[:]

    def _bucket(self, number: int) -> "np.ndarray":
        """Return a bucket's pairs of hash and place, sorted by hash, then place; `(rows, 2)`."""
        import numpy as np

        rows = np.array(self._buckets[number], dtype=np.uint64)
        if self._folder is not None:
            rows = np.concatenate([np.fromfile(Path(self._folder.name, str(number)), dtype=np.uint64), rows])
        rows = rows.reshape(-1, 2)
        return rows[np.lexsort((rows[:, 1], rows[:, 0]))]

    def file_and_number(self, place: int) -> tuple[str, int]:
        """Return the file of a place, and the line or row in it."""
        return self.files[int(place) >> self.LINE_BITS], int(place) & ((1 << self.LINE_BITS) - 1)

    def place(self, number: int) -> str:
        """Return a place as `file:line` (or row)."""
        return place_of(*self.file_and_number(number))

    def repeats(self) -> Iterator[tuple[int, int]]:
        """Yield the place of each row that repeats an earlier row, with the place of the earlier row."""
        import numpy as np

        for number in range(self.BUCKETS):
            rows = self._bucket(number)
            again = np.flatnonzero(rows[1:, 0] == rows[:-1, 0]) + 1
            for index in again.tolist():
                yield int(rows[index, 1]), int(rows[np.searchsorted(rows[:, 0], rows[index, 0]), 1])

    def shared_with(self, other: "RowHashes") -> Iterator[tuple[int, int]]:
        """Yield the place of each row that is in `other` too, with its place there."""
        import numpy as np

        for number in range(self.BUCKETS):
            mine, others = self._bucket(number), other._bucket(number)
            if len(others):
                found = np.searchsorted(others[:, 0], mine[:, 0]).clip(max=len(others) - 1)
                for index in np.flatnonzero(others[found, 0] == mine[:, 0]).tolist():
                    yield int(mine[index, 1]), int(others[found[index], 1])


def repeated(hashes: RowHashes) -> Iterator[tuple[int, Problem]]:
    """Yield place and problem of each row that repeats an earlier row."""
    for place, earlier in hashes.repeats():
        yield (
            place,
            Problem("", f"says the same as {hashes.place(earlier)} (--allow_repeats true: that is meant)", "repeated"),
        )


def leaked(train: RowHashes, held_out: RowHashes) -> Iterator[tuple[int, Problem]]:
    """Yield place and problem of each training row that is in the evaluation data too."""
    for place, there in train.shared_with(held_out):
        yield place, Problem("", f"is in the evaluation data too ({held_out.place(there)})", "also in evaluation data")
