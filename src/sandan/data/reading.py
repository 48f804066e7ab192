"""Rows of local files of every kind, one after the other: the same rows from each kind.

    .jsonl     one JSON object a line
    .json      one list of JSON objects (or one object a line)
    .csv       a line of names, then cells: text as written, whatever it looks like; an empty cell is absent
    .parquet   rows in groups
    .txt       documents, parted by blank lines; in a file without blank lines each line is a document

Each may be gzipped, except Parquet. Byte order marks and CRLF are not part of the text.
"""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..core.errors import UserError
from .row_checks import MAX_ROW_BYTES, Problem, bounded_lines, kind_of, open_lines, read_rows, too_long


NUMBERS = ("margin",)
PARQUET_ROWS = 1024


class Read(NamedTuple):
    """A row that was read, or the problem of one that could not be.

    Args:
        number: of its first line, or of the row in a file without lines.
        row: the row.
        problem: why it is no row.
        escapes: whether its text may have been written with JSON escapes.
    """

    number: int
    row: Any = None
    problem: Problem | None = None
    escapes: bool = True


def rows_of(file: str | Path) -> Iterator[Read]:
    """Yield the rows of a file of any kind, in constant memory (except .json).

    Raises:
        UserError: if a file without lines cannot be read.
    """
    readers = {".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows, ".txt": _documents}
    yield from readers.get(kind_of(file), _jsonl_rows)(file)


def _jsonl_rows(file: str | Path) -> Iterator[Read]:
    for number, row, line, problem in read_rows(file):
        yield Read(number, row, problem, b"\\u" in line)


def _json_rows(file: str | Path) -> Iterator[Read]:
    with open_lines(file) as stream:
        content = stream.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _jsonl_rows(file)
            return
        raise UserError(f"{file}:{error.lineno}: not JSON ({error.msg} at column {error.colno})") from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{file}: not JSON that can be read ({error})") from None
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        yield Read(number, row)


def _parquet_rows(file: str | Path) -> Iterator[Read]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield Read(number, row)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {' '.join(str(error).split())[:200]}") from None


def _documents(file: str | Path) -> Iterator[Read]:
    blank_lines = any(_has_blank_lines(file))
    lines: list[str] = []
    first = size = 0
    for number, line, problem in _text_lines(file):
        if problem is not None:
            yield Read(number, None, problem)
            continue
        if line.strip():
            first = first if lines else number
            size += len(line)
            lines += [line] if size <= MAX_ROW_BYTES else []
        if lines and not (blank_lines and line.strip()):
            yield _document(first, lines, size)
            lines, size = [], 0
    if lines:
        yield _document(first, lines, size)


def _document(number: int, lines: list[str], size: int) -> Read:
    if size > MAX_ROW_BYTES:
        return Read(number, None, too_long())
    return Read(number, {"text": "\n".join(lines)})


def _has_blank_lines(file: str | Path) -> Iterator[bool]:
    """Yield True for each line of text that follows a blank line and earlier text."""
    state = ""
    for _, line, _ in _text_lines(file):
        if line.strip():
            if state == "blank":
                yield True
            state = "text"
        elif state:
            state = "blank"


def _text_lines(file: str | Path) -> Iterator[tuple[int, str, Problem | None]]:
    for number, line in bounded_lines(file):
        if line is None:
            yield number, "", too_long()
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            yield number, "", Problem("", f"not UTF-8 at byte {error.start}; save the file as UTF-8", "not UTF-8")
        else:
            yield number, text, None


def _csv_rows(file: str | Path) -> Iterator[Read]:
    csv.field_size_limit(MAX_ROW_BYTES)
    with open_lines(file) as binary:
        # Bytes that are not UTF-8 become half surrogate pairs, so that the row that holds them can be named.
        stream = io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="")
        rows = csv.reader(stream, strict=True)
        names: list[str] | None = None
        while True:
            number = rows.line_num + 1
            try:
                cells = next(rows, None)
            except csv.Error as error:
                yield Read(number, None, Problem("", f"not CSV ({error})", "not CSV"))
                if names is None or "unexpected end" in str(error):
                    return
                continue
            if cells is None:
                return
            if not any(map(str.strip, cells)) and (names is None or len(cells) < 2):
                continue
            if names is None:
                names = cells
                if len(set(names)) < len(names):
                    raise UserError(f"{file}:{number}: two columns have the same name: {', '.join(names)}")
                continue
            yield _csv_row(number, names, cells)


def _csv_row(number: int, names: list[str], cells: list[str]) -> Read:
    if len(cells) != len(names):
        text = f"{len(cells)} cells, expected {len(names)}; put text with a comma or a line break in quotes"
        return Read(number, None, Problem("", text, "not CSV"))
    if any("\ud800" <= character <= "\udfff" for cell in cells for character in cell):
        return Read(number, None, Problem("", "not UTF-8; save the file as UTF-8", "not UTF-8"))
    row = {name: _cell(name, cell) for name, cell in zip(names, cells, strict=True)}
    for name in NUMBERS:
        if isinstance(row.get(name), str):
            return Read(number, None, Problem(name, f"expected a number, found {row[name]!r:.20}", "of another type"))
    return Read(number, row)


def _cell(name: str, cell: str) -> Any:
    """Return the value of a cell: text as written, except numbers where they are needed, and turns, which are JSON."""
    if not cell:
        return None
    try:
        if name in NUMBERS:
            return float(cell)
        if cell.lstrip().startswith("[{"):
            value = json.loads(cell)
            if all(isinstance(turn, dict) and "role" in turn and "content" in turn for turn in value):
                return value
    except ValueError:
        pass
    return cell
