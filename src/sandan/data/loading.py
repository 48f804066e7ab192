"""Datasets of every stage: Hub names, local files and mixtures, checked before they are loaded.

A recipe names its data as TRL does (`datasets:` with `path`, `name`, `data_files`, `split`, `columns`, `fraction`);
`eval_datasets:` takes the same form, so that a published test split can be used for evaluation. `--data_files` and
`--eval_data_files` replace both by local files (JSONL, JSON, CSV, Parquet, plain text; gzip too).
"""

import glob
import heapq
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl import DatasetMixtureConfig
from trl.scripts.utils import DatasetConfig

from ..core.errors import UserError
from ..core.places import here_or_embedded, recorded
from ..core.stage import Stage
from .chat import first_user_text, split_by_prompt
from .features import ColumnTypes
from .forms import one_form
from .jsonl import is_jsonl
from .row_checks import SHOWN_PROBLEMS, Findings, Problem, RowChecker, describe_columns, leaked, repeated
from .scanning import Scan, good_rows
from .template_checks import TemplateCheck


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

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
    args: DataArguments,
    stage: Stage,
    columns: Sequence[Sequence[str]],
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> "tuple[Dataset | IterableDataset, Dataset | None]":
    """Load the training rows and, if the recipe asks for them, the held-out rows.

    Args:
        args: the stage's data arguments.
        stage: records each local file's sha256.
        columns: accepted sets of columns; every source must have at least one of the sets.
        tokenizer: for a stage that renders turns: every row is rendered once, so that a chat template that refuses
            one is known before anything runs.

    Raises:
        UserError: naming the file (and line) or source, if it is missing, empty, malformed or lacks columns.
    """
    if not args.datasets:
        raise UserError("datasets: missing; name data in the recipe or give --data_files FILE")
    train_scan, eval_scan = check_files(args, stage, columns, tokenizer)
    held_out = None
    train = _load_mixture(args, args.streaming, stage, train_scan, args.skip_bad_rows)
    if args.eval_datasets:
        sources = DatasetMixtureConfig(datasets=args.eval_datasets)
        held_out = _load_mixture(sources, False, stage, eval_scan, args.skip_bad_rows)
    elif args.held_out_share:
        train, held_out = _hold_out(train, args.held_out_share)
    return train, held_out


def check_files(
    args: DataArguments,
    stage: Stage,
    columns: Sequence[Sequence[str]],
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> tuple[Scan, Scan]:
    """Check every local file row by row, and record it in the lineage.

    Returns:
        What is known of the training rows and of the evaluation rows; with `skip_bad_rows` their bad rows.

    Raises:
        UserError: the first problem as `file:line: column: problem`, and the number of problems of each kind; the
            first 20 problems are logged.
    """
    findings = Findings()
    refused = None if tokenizer is None else TemplateCheck(tokenizer)
    scans = {name: Scan(columns, findings, args.as_chat, refused) for name in ("train", "eval")}
    for scan, sources in zip(scans.values(), (args.datasets, args.eval_datasets), strict=True):
        for file in _record_files(sources, stage, columns):
            if scan.add_file(file):
                continue
            if args.skip_bad_rows and scan.bad[file]:
                raise UserError(f"{file}: no good row in it ({findings.shown[-1]})")
            if not findings.shown:
                unit = "one JSON object a line with " if is_jsonl(file) else ""
                raise UserError(f"{file}: empty; expected {unit}{describe_columns(columns)}")
    for name, scan in scans.items():
        refuse_repeats = scan.hashes.answered and not args.allow_repeats
        found = repeated(scan.hashes) if refuse_repeats else ()
        found = chain(found, leaked(scan.hashes, scans["eval"].hashes) if name == "train" else ())
        _note(scan, found, args.skip_bad_rows)
        stage.notes[f"{name}_rows_read"] = scan.hashes.rows
        if not refuse_repeats and (count := sum(1 for _ in scan.hashes.repeats())):
            stage.notes[f"{name}_rows_repeated"] = count
    if not args.skip_bad_rows:
        findings.refuse()
    elif findings.shown:
        stage.notes["rows_skipped"] = dict(findings.kinds)
        for line in findings.shown:
            logger.warning("skipped: %s", line)
    return scans["train"], scans["eval"]


def _record_files(sources: Sequence[DatasetConfig], stage: Stage, columns: Sequence[Sequence[str]]) -> list[str]:
    """Return the local files of `sources`, and record them in the lineage.

    Raises:
        UserError: if a local file is missing or empty.
    """
    files = dict.fromkeys(file for source in sources for file in local_files(source))
    for file in files:
        if Path(stage.add_input(file)).is_dir():
            raise UserError(f"{file}: is a folder; name its files, as in {file}/*.jsonl")
        if Path(file).stat().st_size == 0:
            raise UserError(f"{file}: empty; expected {describe_columns(columns)}")
    return list(files)


def _note(scan: Scan, found: Iterable[tuple[int, Problem]], skip: bool) -> None:
    """Add problems that are found by comparing rows, in the order of their places.

    Args:
        skip: add their rows to the bad rows; else only the first problems are kept, to save memory.
    """
    kinds: Counter = Counter()
    hashes, findings = scan.hashes, scan.findings

    def counted() -> Iterator[tuple[int, Problem]]:
        for place, problem in found:
            file, number = hashes.file_and_number(place)
            if number not in scan.bad.get(file, ()):
                kinds[problem.kind] += 1
                yield place, problem
            if skip:
                scan.bad[file].add(number)

    first = heapq.nsmallest(SHOWN_PROBLEMS, counted())
    findings.kinds += kinds
    findings.shown += [problem.at(hashes.place(place)) for place, problem in first]
    del findings.shown[SHOWN_PROBLEMS:]


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
    mixture: DatasetMixtureConfig, streaming: bool, stage: Stage, scan: Scan, skip_bad_rows: bool
) -> Any:
    """Return the rows of all sources: local files as they were checked, others as `datasets` loads them."""
    from datasets import concatenate_datasets, interleave_datasets
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    names = ", ".join(map(_name, mixture.datasets))
    fractions = [source.fraction for source in mixture.datasets]
    if None in fractions and set(fractions) != {None}:
        raise UserError(f"{names}: fraction: give it for all datasets or for none")
    try:
        parts = [_load_source(source, streaming, stage, scan, skip_bad_rows) for source in mixture.datasets]
        if None in fractions:
            return concatenate_datasets(parts)
        shares = [fraction / sum(fractions) for fraction in fractions]
        if streaming:  # From streams, shares are odds.
            return interleave_datasets(parts, shares, seed=stage.seed, stopping_strategy="all_exhausted")
        # The largest mixture that repeats no row.
        total = min(len(part) / share for part, share in zip(parts, shares, strict=True))
        return concatenate_datasets(
            [part.select(range(round(share * total))) for part, share in zip(parts, shares, strict=True)]
        )
    except (DatasetGenerationError, DatasetNotFoundError, OSError, ValueError, ArithmeticError) as error:
        cause = error.__cause__ or error
        raise UserError(f"{names}: cannot be loaded: {' '.join(str(cause).split())[:300]}") from error


def _name(source: DatasetConfig) -> str:
    return f"{source.path} {source.data_files or source.name or ''}".strip()


def _load_source(source: DatasetConfig, streaming: bool, stage: Stage, scan: Scan, skip_bad_rows: bool) -> Any:
    from datasets import load_dataset

    if local_files(source):
        dataset = _load_files(source, streaming, stage, scan)
    else:
        dataset = load_dataset(
            source.path,
            source.name,
            data_dir=source.data_dir,
            data_files=source.data_files,
            split=source.split,
            streaming=streaming,
        )
        if streaming:
            dataset = dataset.map(partial(one_form, as_chat=scan.as_chat))
        else:
            dataset = _check_loaded(dataset, _name(source), stage, scan, skip_bad_rows)
    return dataset if source.columns is None else dataset.select_columns(source.columns)


def _load_files(source: DatasetConfig, streaming: bool, stage: Stage, scan: Scan) -> Any:
    """Return the good rows of local files, with the types that the check found for all files together."""
    from datasets import Dataset, IterableDataset, ReadInstruction

    features = scan.types.features()
    parts = [(file, stage.inputs[recorded(file)], tuple(sorted(scan.bad[file]))) for file in local_files(source)]
    # As tuples: `datasets` shards a stream by the lists among these, and only the files are to be sharded.
    given = {"parts": parts, "names": tuple(features), "mixed": scan.types.mixed(), "as_chat": scan.as_chat}
    if streaming:
        return IterableDataset.from_generator(good_rows, features=features, gen_kwargs=given)
    dataset = Dataset.from_generator(good_rows, features=features, gen_kwargs=given)
    if not len(dataset):
        raise UserError(f"{_name(source)}: no good row in it")
    split, _, is_part = source.split.partition("[")
    if not is_part:
        return dataset
    (part,) = ReadInstruction.from_spec(source.split).to_absolute({split: len(dataset)})
    return dataset.select(range(part.from_, part.to))


def _check_loaded(dataset: "Dataset", name: str, stage: Stage, scan: Scan, skip_bad_rows: bool) -> "Dataset":
    """Check rows that do not come from local files; problems name the number of the row instead of a line.

    Returns:
        The dataset in its one form, without the bad rows if `skip_bad_rows` is set.

    Raises:
        UserError: if there is no row or a row has a problem, or with `skip_bad_rows` if no good row is left.
    """
    if not len(dataset):
        raise UserError(f"{name}: no rows")
    from datasets import Features

    checker, findings, good, types = RowChecker(scan.columns), Findings(), [], ColumnTypes()
    changed = False
    for index, row in enumerate(dataset):
        formed = one_form(row, scan.as_chat)
        if (problem := scan.problem(formed, checker)) is None:
            good.append(index)
            types.add({column: formed[column] for column in formed if formed[column] is not row.get(column)})
            changed = changed or formed != row
        else:
            findings.add(f"{name}: row {index + 1}", problem)
    if not skip_bad_rows:
        findings.refuse()
    elif findings.shown:
        stage.notes["rows_skipped"] = dict(Counter(stage.notes.get("rows_skipped", {})) + findings.kinds)
        for line in findings.shown:
            logger.warning("skipped: %s", line)
        if not good:
            raise UserError(f"{name}: no good row in it")
        dataset = dataset.select(good)
    if not changed:
        return dataset
    features = Features({**dataset.features, **types.features()})
    return dataset.map(partial(one_form, as_chat=scan.as_chat), features=features)


def local_files(source: DatasetConfig) -> list[str]:
    """Return the local files that a dataset entry names, with globs expanded (none for a Hub name).

    `data/...` that is not here is that of the project.
    """
    if source.path not in {*BUILDERS.values()} or source.data_files is None:
        return []
    files = source.data_files
    if isinstance(files, dict):
        files = files.get(source.split.partition("[")[0], [])
    files = [files] if isinstance(files, str) else files
    return [
        match
        for file in files
        if "://" not in file
        for match in sorted(glob.glob(file, recursive=True)) or [str(here_or_embedded(file))]
    ]
