"""One pass over all local files: every row in its one form, checked; its types and its hash are kept, not the row."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .features import ColumnTypes, as_text
from .forms import one_form
from .reading import rows_of
from .row_checks import Findings, Problem, RowChecker, RowHashes, place_of, readable


@dataclass
class Scan:
    """Collect what is known of the rows of several files.

    Args:
        columns: accepted sets of columns, as in [`RowChecker`].
        findings: collects the problems.
        as_chat: text becomes turns.
        template_problem: of a row and its columns, whether a chat template refuses it.
        types: of the columns of the good rows.
        hashes: of the good rows.
        bad: for each file the numbers of its bad rows.
    """

    columns: Sequence[Sequence[str]]
    findings: Findings
    as_chat: bool = False
    template_problem: Callable[[dict[str, Any], Sequence[str]], Problem | None] | None = None
    types: ColumnTypes = field(default_factory=ColumnTypes)
    hashes: RowHashes = field(default_factory=RowHashes)
    bad: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))

    def add_file(self, path: str | Path) -> int:
        """Check each row of a file in constant memory, and return the number of good rows.

        Raises:
            UserError: if the file cannot be read to its end.
        """
        checker, good, first = RowChecker(self.columns), 0, self.hashes.add_file(path)
        with readable(path):
            for read in rows_of(path):
                row = one_form(read.row, self.as_chat) if isinstance(read.row, dict) else read.row
                problem = read.problem or self.problem(row, checker, read.escapes)
                if problem is not None:
                    self.findings.add(place_of(path, read.number), problem)
                    self.bad[str(path)].add(read.number)
                    continue
                good += 1
                self.types.add(row)
                self.hashes.add(row, checker.wanted(row), first + read.number)
        return good

    def problem(self, row: Any, checker: RowChecker, escapes: bool = True) -> Problem | None:
        """Return the first problem of a row in its one form, or None."""
        problem = checker.problem(row, escapes)
        if problem is None and self.template_problem is not None:
            problem = self.template_problem(row, checker.wanted(row))
        return problem


def good_rows(
    parts: Sequence[tuple[str, str, tuple[int, ...]]], names: Sequence[str], mixed: Sequence[str], as_chat: bool
) -> Iterator[dict[str, Any]]:
    """Yield the good rows of files in their one form.

    Args:
        parts: for each file its name, its sha256 (so that a cache of the rows knows its content) and its bad rows.
        names: the columns.
        mixed: those with several kinds of values, which become text.
    """
    for file, _, bad in parts:
        left_out = frozenset(bad)
        for read in rows_of(file):
            if read.number not in left_out and isinstance(read.row, dict):
                row = one_form(read.row, as_chat)
                yield {name: row.get(name) for name in names} | {name: as_text(row.get(name)) for name in mixed}
