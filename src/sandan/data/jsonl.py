"""Read, check and write JSONL files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from .row_checks import Findings, describe_columns, read_rows, scan_file


def is_jsonl(file: str) -> bool:
    """Return whether a file's name ends in .jsonl or .jsonl.gz."""
    return Path(file.removesuffix(".gz")).suffix == ".jsonl"


def check_jsonl(path: str | Path, columns: Sequence[Sequence[str]] = ((),), half_characters: bool = False) -> int:
    """Read a JSONL file (or .jsonl.gz) once, in constant memory, and return its number of rows.

    Args:
        path: the file.
        columns: accepted sets of columns; each row must have all columns of one set, not null.
        half_characters: accept half surrogate pairs, which only a JSON escape can write.

    Raises:
        UserError: the first problem as `file:line: column: problem`, and the number of further problems.
    """
    findings = Findings()
    rows = scan_file(path, columns, findings, half_characters=half_characters)
    findings.refuse()
    if rows == 0:
        raise UserError(f"{path}: empty; expected one JSON object a line with {describe_columns(columns)}")
    return rows


def read_jsonl(
    path: str | Path, columns: Sequence[Sequence[str]] = ((),), half_characters: bool = False
) -> list[dict[str, Any]]:
    """Return all rows of a (small) JSONL file, checked as in [`check_jsonl`]."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    check_jsonl(path, columns, half_characters)
    return [row for _, row, _, _ in read_rows(path)]


def write_jsonl(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as UTF-8 JSON lines."""
    with open(path, "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
