"""Datasets of every stage: Hub names, local files and mixtures, checked before they are loaded.

A recipe names its data as TRL does (`datasets:` with `path`, `name`, `data_files`, `split`, `columns`, `fraction`);
`eval_datasets:` takes the same form, so that a published test split can be used for evaluation. `--data_files` and
`--eval_data_files` replace both by local files (JSONL, JSON, CSV, Parquet, plain text; gzip too).
"""

import glob
import hashlib
import heapq
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl import DatasetMixtureConfig
from trl.scripts.utils import DatasetConfig

from ..core.errors import UserError
from ..core.stage import GOOD_ROWS, Stage, is_main_process
from .chat import as_chat, first_user_text, split_by_prompt
from .jsonl import is_jsonl
from .row_checks import (
    SHOWN_PROBLEMS,
    Findings,
    Problem,
    RowChecker,
    RowHashes,
    describe_columns,
    leaked,
    repeated,
    scan_file,
)


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
STREAM_HELD_OUT_ROWS = 500


@dataclass
class DataArguments(DatasetMixtureConfig):
    """The sources of the rows, and how they are checked and split."""

    eval_datasets: list[DatasetConfig] = field(
        default_factory=list, metadata={"help": "Held-out data, in the form of `datasets`."}
    )
    data_files: list[str] | None = field(
        default=None, metadata={"help": "Local files to use instead of `datasets` (bring your own data)."}
    )
    eval_data_files: list[str] | None = field(
        default=None, metadata={"help": "Local files to use instead of `eval_datasets`."}
    )
    held_out_share: float = field(
        default=0.0,
        metadata={"help": "Without eval data: hold out this share of the prompts (or texts), by their hash."},
    )
    as_chat: bool = field(
        default=False,
        metadata={"help": "Turn text prompts and answers into chat turns (`Human:`/`Assistant:` dialogues too)."},
    )
    skip_bad_rows: bool = field(
        default=False,
        metadata={"help": "Leave out rows with problems, and count them in result.json, instead of stopping."},
    )
    allow_repeats: bool = field(
        default=False, metadata={"help": "Texts and answers that are there twice are meant to be: only count them."}
    )

    def __post_init__(self):
        if self.test_split_size is not None:
            raise UserError("test_split_size: use held_out_share (it keeps all rows of one prompt on one side)")
        if self.data_files:
            # The recipe's eval_datasets belong to its datasets, not to these files.
            self.datasets, self.eval_datasets = [_local_source(self.data_files)], []
        if self.eval_data_files:
            self.eval_datasets = [_local_source(self.eval_data_files)]
        self.eval_datasets = [
            DatasetConfig(**source) if isinstance(source, dict) else source for source in self.eval_datasets
        ]
        super().__post_init__()
        if any(
            source.fraction is not None and not source.fraction > 0 for source in [*self.datasets, *self.eval_datasets]
        ):
            raise UserError("datasets: fraction: expected a share above 0; remove the source instead")


def _local_source(files: Sequence[str]) -> DatasetConfig:
    suffixes = {Path(file.removesuffix(".gz")).suffix for file in files}
    builder = BUILDERS.get(suffixes.pop()) if len(suffixes) == 1 else None
    if builder is None:
        raise UserError(f"{', '.join(files)}: expected files of one kind, any of {', '.join(BUILDERS)} (or .gz)")
    return DatasetConfig(path=builder, data_files=list(files))


def load_data(
    args: DataArguments, stage: Stage, columns: Sequence[Sequence[str]]
) -> "tuple[Dataset | IterableDataset, Dataset | None]":
    """Load the training rows and, if the recipe asks for them, the held-out rows.

    Args:
        args: the stage's data arguments.
        stage: records each local file's sha256.
        columns: accepted sets of columns; every source must have at least one of the sets.

    Raises:
        UserError: naming the file (and line) or source, if it is missing, empty, malformed or lacks columns.
    """
    if not args.datasets:
        raise UserError("datasets: missing; name data in the recipe or give --data_files FILE")
    check_files(args, stage, columns)
    skip, held_out = args.skip_bad_rows, None
    train = _load_mixture(args, stage, columns, skip)
    if args.eval_datasets:
        held_out = _load_mixture(DatasetMixtureConfig(datasets=args.eval_datasets), stage, columns, skip)
    elif args.held_out_share:
        train, held_out = _hold_out(train, args.held_out_share)
    if args.as_chat:
        train, held_out = (part and part.map(as_chat) for part in (train, held_out))
    return train, held_out


def check_files(args: DataArguments, stage: Stage, columns: Sequence[Sequence[str]]) -> None:
    """Check every local JSONL file row by row, in constant memory, and record every local file in the lineage.

    With `skip_bad_rows` the sources of `args` are replaced by copies without the bad rows, in `output_dir`.

    Raises:
        UserError: the first problem as `file:line: column: problem`, and the number of problems of each kind; the
            first 20 problems are logged.
    """
    findings, parts = Findings(), {}
    for name, sources in (("train", args.datasets), ("eval", args.eval_datasets)):
        parts[name] = hashes = RowHashes()
        for file in _check_local_files(sources, stage, columns):
            if not scan_file(file, columns, findings, hashes) and not findings.shown:
                raise UserError(f"{file}: empty; expected one JSON object a line with {describe_columns(columns)}")
    left_out: dict[str, set[int]] = {"train": set(), "eval": set()}
    for name, hashes in parts.items():
        refused = hashes.answered and not args.allow_repeats
        found = repeated(hashes) if refused else ()
        found = chain(found, leaked(hashes, parts["eval"]) if name == "train" else ())
        _note(hashes, found, findings, left_out[name] if args.skip_bad_rows else None)
        stage.notes[f"{name}_rows_read"] = hashes.rows
        if not refused and (count := sum(1 for _ in hashes.repeats())):
            stage.notes[f"{name}_rows_repeated"] = count
    if not args.skip_bad_rows:
        findings.refuse()
    elif findings.shown:
        stage.notes["rows_skipped"] = dict(findings.kinds)
        for line in findings.shown:
            logger.warning("skipped: %s", line)
        for name, sources in (("train", args.datasets), ("eval", args.eval_datasets)):
            _copy_good_rows(sources, stage, columns, parts[name], left_out[name])


def _check_local_files(sources: Sequence[DatasetConfig], stage: Stage, columns: Sequence[Sequence[str]]) -> list[str]:
    """Return the local JSONL files of `sources`, and record all local files in the lineage.

    Raises:
        UserError: if a local file is missing or empty.
    """
    jsonl = []
    for source in sources:
        for file in local_files(source):
            if Path(stage.add_input(file)).is_dir():
                raise UserError(f"{file}: is a folder; name its files, as in {file}/*.jsonl")
            if Path(file).stat().st_size == 0:
                raise UserError(f"{file}: empty; expected {describe_columns(columns)}")
            if is_jsonl(file):
                jsonl.append(file)
    return list(dict.fromkeys(jsonl))


def _note(
    hashes: RowHashes, found: Iterable[tuple[int, Problem]], findings: Findings, left_out: set[int] | None
) -> None:
    """Add problems that are found by comparing rows, in the order of their places.

    Args:
        left_out: collects the places of all problems; None: only the first problems are kept, to save memory.
    """
    kinds: Counter = Counter()

    def counted() -> Iterator[tuple[int, Problem]]:
        for place, problem in found:
            if left_out is None or place not in left_out:
                kinds[problem.kind] += 1
                yield place, problem
            if left_out is not None:
                left_out.add(place)

    first = heapq.nsmallest(SHOWN_PROBLEMS, counted())
    findings.kinds += kinds
    findings.shown += [problem.at(hashes.place(place)) for place, problem in first]
    del findings.shown[SHOWN_PROBLEMS:]


def _copy_good_rows(
    sources: Sequence[DatasetConfig],
    stage: Stage,
    columns: Sequence[Sequence[str]],
    hashes: RowHashes,
    left_out: set[int],
) -> None:
    """Copy the JSONL files of `sources` without the bad rows, and make `sources` name the copies."""
    from accelerate import PartialState

    folder = stage.output_dir / GOOD_ROWS
    for source in sources:
        files = local_files(source)
        for index, file in enumerate(files):
            if not is_jsonl(file):
                continue
            number = hashes.files.index(file)
            lines = {
                place & ((1 << hashes.LINE_BITS) - 1) for place in left_out if place >> hashes.LINE_BITS == number
            }
            copy = folder / f"{hashlib.sha256(file.encode()).hexdigest()[:12]}-{Path(file).name.removesuffix('.gz')}"
            with PartialState().main_process_first():
                if is_main_process():
                    folder.mkdir(parents=True, exist_ok=True)
                    with copy.open("wb") as stream:
                        scan_file(file, columns, Findings(), keep=stream, left_out=lines)
            if copy.stat().st_size == 0:
                raise UserError(f"{file}: no good row in it")
            files[index] = str(copy)
        if files:
            source.data_files = files


def _hold_out(dataset: "Dataset | IterableDataset", share: float) -> "tuple[Dataset | IterableDataset, Dataset]":
    """Split rows by the hash of their split key, so that the split is the same for every stage, seed and process."""
    from datasets import Dataset, IterableDataset

    def is_out(row: dict[str, Any]) -> bool:
        return split_by_prompt([first_user_text(row)], share, seed=0)[0]

    if isinstance(dataset, IterableDataset):
        # From a stream only the first held-out rows are kept: enough to measure a loss, and they fit into memory.
        rows = list(dataset.filter(is_out).take(STREAM_HELD_OUT_ROWS))
        return dataset.filter(lambda row: not is_out(row)), Dataset.from_list(rows)
    out = [is_out(row) for row in dataset]
    train = dataset.select([index for index, held in enumerate(out) if not held])
    held_out = dataset.select([index for index, held in enumerate(out) if held])
    if not len(train) or not len(held_out):
        raise UserError(f"held_out_share: {share} of {len(out):,} rows leaves one side empty")
    return train, held_out


def _load_mixture(
    mixture: DatasetMixtureConfig, stage: Stage, columns: Sequence[Sequence[str]], skip_bad_rows: bool
) -> Any:
    from datasets import interleave_datasets, load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
    from trl import get_dataset

    names = ", ".join(f"{source.path} {source.data_files or source.name or ''}".strip() for source in mixture.datasets)
    try:
        if mixture.streaming and any(source.fraction is not None for source in mixture.datasets):
            # trl.get_dataset applies fractions to map-style sources only; for streams they are sampling probabilities.
            streams = [
                load_dataset(
                    source.path, source.name, data_files=source.data_files, split=source.split, streaming=True
                )
                for source in mixture.datasets
            ]
            odds = [source.fraction or 0.0 for source in mixture.datasets]
            return interleave_datasets(
                streams, [weight / sum(odds) for weight in odds], seed=stage.seed, stopping_strategy="all_exhausted"
            )
        dataset = get_dataset(mixture)["train"]
    except (DatasetGenerationError, DatasetNotFoundError, OSError, ValueError, ArithmeticError) as error:
        cause = error.__cause__ or error
        raise UserError(f"{names}: cannot be loaded: {' '.join(str(cause).split())[:300]}") from error
    if not mixture.streaming:
        if len(dataset) == 0:
            raise UserError(f"{names}: no rows")
        if not any(set(wanted) <= set(dataset.column_names) for wanted in columns):
            raise UserError(f"{names}: columns {dataset.column_names}, expected {describe_columns(columns)}")
        if any(not local_files(source) or not all(map(is_jsonl, local_files(source))) for source in mixture.datasets):
            wanted = next(wanted for wanted in columns if set(wanted) <= set(dataset.column_names))
            dataset = _check_loaded(dataset, wanted, names, stage, skip_bad_rows)
    return dataset


def _check_loaded(
    dataset: "Dataset", wanted: Sequence[str], names: str, stage: Stage, skip_bad_rows: bool
) -> "Dataset":
    """Check rows that do not come from JSONL files; problems name the number of the row instead of a line.

    Returns:
        The dataset, without the bad rows if `skip_bad_rows` is set.

    Raises:
        UserError: if a row has a problem, or with `skip_bad_rows` if no good row is left.
    """
    checker, findings, good = RowChecker([wanted]), Findings(), []
    for index, row in enumerate(dataset.select_columns(list(wanted))):
        if (problem := checker.problem(row)) is None:
            good.append(index)
        else:
            findings.add(f"{names}: row {index + 1}", problem)
    if not skip_bad_rows:
        findings.refuse()
    elif findings.shown:
        stage.notes["rows_skipped"] = dict(Counter(stage.notes.get("rows_skipped", {})) + findings.kinds)
        for line in findings.shown:
            logger.warning("skipped: %s", line)
        if not good:
            raise UserError(f"{names}: no good row in it")
        return dataset.select(good)
    return dataset


def local_files(source: DatasetConfig) -> list[str]:
    """Return the local files that a dataset entry names, with globs expanded (none for a Hub name)."""
    if source.path not in {*BUILDERS.values()} or source.data_files is None:
        return []
    files = source.data_files
    files = (
        [files]
        if isinstance(files, str)
        else [file for group in files.values() for file in group]
        if isinstance(files, dict)
        else files
    )
    return [
        match for file in files if "://" not in file for match in sorted(glob.glob(file, recursive=True)) or [file]
    ]
