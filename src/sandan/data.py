"""Datasets of every stage: Hub names, local files and mixtures, checked before they are loaded.

A recipe names its data as TRL does (`datasets:` with `path`, `name`, `data_files`, `split`, `columns`, `fraction`);
`eval_datasets:` takes the same form, so that a published test split stays a test split. `--data_files` and
`--eval_data_files` replace them by local files (JSONL, JSON, CSV, Parquet, plain text; gzip too).
"""

import glob
import gzip
import hashlib
import json
import logging
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl import DatasetMixtureConfig
from trl.scripts.utils import DatasetConfig

from .errors import UserError
from .stage import Stage


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
SHOWN_PROBLEMS = 20
CONVERSATIONS = ("messages", "prompt", "completion", "chosen", "rejected")
WRITTEN_BY_PEOPLE = ("text", "messages", "prompt", "completion")
STREAM_HELD_OUT_ROWS = 500


@dataclass
class DataArguments(DatasetMixtureConfig):
    """Where the rows come from."""

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

    def __post_init__(self):
        if self.test_split_size is not None:
            raise UserError("test_split_size: use held_out_share (it keeps all rows of one prompt on one side)")
        if self.data_files:
            # The recipe's eval_datasets belong to its datasets, not to these files.
            self.datasets, self.eval_datasets = [_local_source(self.data_files)], []
        if self.eval_data_files:
            self.eval_datasets = [_local_source(self.eval_data_files)]
        self.eval_datasets = [DatasetConfig(**one) if isinstance(one, dict) else one for one in self.eval_datasets]
        super().__post_init__()
        if any(one.fraction is not None and not one.fraction > 0 for one in [*self.datasets, *self.eval_datasets]):
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
    """Load the training rows and, if the recipe names any, the held-out rows.

    Args:
        args: the stage's data arguments.
        stage: records each local file's sha256.
        columns: accepted sets of columns; every source must have at least one of the sets.

    Raises:
        UserError: naming the file (and line) or source, if it is missing, empty, malformed or lacks columns.
    """
    if not args.datasets:
        raise UserError("datasets: missing; name data in the recipe or give --data_files FILE")
    train, held_out = _load_mixture(args, stage, columns), None
    if args.eval_datasets:
        held_out = _load_mixture(DatasetMixtureConfig(datasets=args.eval_datasets), stage, columns)
    elif args.held_out_share:
        train, held_out = _hold_out(train, args.held_out_share)
    if args.as_chat:
        train, held_out = (part and part.map(as_chat) for part in (train, held_out))
    return train, held_out


def _hold_out(dataset: "Dataset | IterableDataset", share: float) -> "tuple[Dataset | IterableDataset, Dataset]":
    """Split by the hash of what a row is about: a constant of the data, the same for every stage, seed and process."""
    from datasets import Dataset, IterableDataset

    def is_out(row: dict[str, Any]) -> bool:
        return split_by_prompt([first_user_text(row)], share, seed=0)[0]

    if isinstance(dataset, IterableDataset):
        # Of a stream only the first held-out rows are kept: enough to measure a loss, little enough for memory.
        rows = list(dataset.filter(is_out).take(STREAM_HELD_OUT_ROWS))
        return dataset.filter(lambda row: not is_out(row)), Dataset.from_list(rows)
    out = [is_out(row) for row in dataset]
    train = dataset.select([index for index, held in enumerate(out) if not held])
    held_out = dataset.select([index for index, held in enumerate(out) if held])
    if not len(train) or not len(held_out):
        raise UserError(f"held_out_share: {share} of {len(out):,} rows leaves one side empty")
    return train, held_out


def _load_mixture(mixture: DatasetMixtureConfig, stage: Stage, columns: Sequence[Sequence[str]]) -> Any:
    from datasets import interleave_datasets, load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
    from trl import get_dataset

    for source in mixture.datasets:
        for file in local_files(source):
            if Path(stage.add_input(file)).is_dir():
                raise UserError(f"{file}: is a folder; name its files, as in {file}/*.jsonl")
            if Path(file).stat().st_size == 0:
                raise UserError(f"{file}: empty; expected {describe_columns(columns)}")
            if Path(file.removesuffix(".gz")).suffix == ".jsonl":
                check_jsonl(file, columns)
    names = ", ".join(f"{source.path} {source.data_files or source.name or ''}".strip() for source in mixture.datasets)
    try:
        if mixture.streaming and any(source.fraction is not None for source in mixture.datasets):
            # trl.get_dataset weighs map-style sources only; a stream is drawn from its sources with these odds.
            streams = [
                load_dataset(one.path, one.name, data_files=one.data_files, split=one.split, streaming=True)
                for one in mixture.datasets
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
        _refuse_nulls(dataset, next(wanted for wanted in columns if set(wanted) <= set(dataset.column_names)), names)
    return dataset


def _refuse_nulls(dataset: "Dataset", wanted: Sequence[str], names: str) -> None:
    """`datasets` fills a column that a row lacks with None; a trainer would fail on it much later."""
    for name in wanted:
        kind = getattr(dataset.features[name], "dtype", None)
        if kind is not None and kind not in ("string", "large_string") and name in ("text", *CONVERSATIONS):
            raise UserError(
                f"{names}: column {name}: expected text{' or chat turns' * (name != 'text')}, found {kind}"
            )
        if not dataset.data.column(name).null_count:
            continue
        for number, value in enumerate(dataset[name], start=1):
            if value is None:
                raise UserError(f"{names}: row {number}: column {name} is empty (null)")


def local_files(source: DatasetConfig) -> list[str]:
    """The local files that a dataset entry names, globs expanded (none for a Hub name)."""
    if source.path not in {*BUILDERS.values()} or source.data_files is None:
        return []
    files = source.data_files
    files = (
        [files]
        if isinstance(files, str)
        else [f for v in files.values() for f in v]
        if isinstance(files, dict)
        else files
    )
    return [
        match for file in files if "://" not in file for match in sorted(glob.glob(file, recursive=True)) or [file]
    ]


def check_jsonl(path: str | Path, columns: Sequence[Sequence[str]] = ((),), half_characters: bool = False) -> int:
    """Read a JSONL file (or .jsonl.gz) once, in constant memory, and return its number of rows.

    Args:
        path: the file.
        columns: accepted sets of columns; each row must have all columns of one set, not null.
        half_characters: accept half surrogate pairs, which only a JSON escape can write.

    Raises:
        UserError: the first problems as `file:line: problem` and how many more there are.
    """
    rows, problems, count = 0, [], 0
    try:
        for line_number, problem in _jsonl_problems(path, columns, half_characters):
            if problem is None:
                rows += 1
                continue
            count += 1
            if count <= SHOWN_PROBLEMS:
                problems.append(f"{path}:{line_number}: {problem}")
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if problems:
        more = f" (and {count - 1:,} more)" if count > 1 else ""
        for problem in problems[1:]:
            logger.error(problem)
        raise UserError(problems[0] + more)
    if rows == 0:
        raise UserError(f"{path}: empty; expected one JSON object a line with {describe_columns(columns)}")
    return rows


def _jsonl_problems(
    path: str | Path, columns: Sequence[Sequence[str]], half_characters: bool
) -> Iterator[tuple[int, str | None]]:
    first: dict[str, type] = {}
    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "rb") as stream:
        for line_number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                yield line_number, f"not UTF-8 at byte {error.start}; save the file as UTF-8"
                continue
            except json.JSONDecodeError as error:
                cut = "; the line is cut off" if not line.endswith(b"\n") else ""
                yield line_number, f"not JSON ({error.msg} at column {error.colno}){cut}"
                continue
            if not isinstance(row, dict):
                yield line_number, f"expected a JSON object, found {type(row).__name__}"
                continue
            # Every row must have the columns of the first one, in the same form (text or turns).
            accepted = [tuple(first)] if first else columns
            wanted = next((one for one in accepted if all(row.get(name) is not None for name in one)), None)
            if wanted is None:
                shown = sorted(name if value is not None else f"{name} (null)" for name, value in row.items())
                yield line_number, f"columns {shown}, expected {describe_columns(accepted)}"
                continue
            problem = None
            if b"\\u" in line and wanted and not half_characters:
                # Answers that a model sampled may hold NUL: every byte is a token of it.
                written = [row[name] for name in wanted if name in WRITTEN_BY_PEOPLE]
                problem = _wrong_character(written, nul=True) or _wrong_character(row, nul=False)
            problem = problem or next((text for name in wanted if (text := _wrong_value(name, row[name]))), None)
            for name, kind in first.items():
                if problem is None and type(row[name]) is not kind:
                    problem = f"{name}: {type(row[name]).__name__}, but {kind.__name__} in the rows before"
            if not first and problem is None:
                first = {name: type(row[name]) for name in wanted}
            yield line_number, problem


def _wrong_character(value: Any, nul: bool) -> str | None:
    """What only an escape can write into JSON: half a character (no file can hold it), and NUL where `nul` is true."""
    if isinstance(value, (dict, list)):
        items = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        return next((problem for item in items if (problem := _wrong_character(item, nul))), None)
    found = re.search("[\x00\ud800-\udfff]" if nul else "[\ud800-\udfff]", value) if isinstance(value, str) else None
    if found is None:
        return None
    return "holds a NUL character" if found[0] == "\0" else f"holds half a surrogate pair (\\u{ord(found[0]):x})"


def _wrong_value(name: str, value: Any) -> str | None:
    if name == "text" or (name in CONVERSATIONS and not isinstance(value, (str, list))):
        return None if isinstance(value, str) else f"{name}: expected text, found {type(value).__name__}"
    if name not in CONVERSATIONS or (isinstance(value, str) and name != "messages"):
        return None
    if isinstance(value, str) or not value:
        return f"{name}: expected a list of turns, found {value!r:.40}"
    for turn in value:
        if not (isinstance(turn, dict) and isinstance(turn.get("role"), str) and "content" in turn):
            return f"{name}: expected turns of role and content, found {turn!r:.40}"
        if not isinstance(turn["content"], str) and "tool_calls" not in turn:
            return f"{name}: content: expected text, found {turn['content']!r:.40}"
    return None


def read_jsonl(
    path: str | Path, columns: Sequence[Sequence[str]] = ((),), half_characters: bool = False
) -> list[dict[str, Any]]:
    """All rows of a (small) JSONL file, checked as in [`check_jsonl`]."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    check_jsonl(path, columns, half_characters)
    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8-sig") as stream:
        return [json.loads(line) for line in stream if line.strip()]


def write_jsonl(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as UTF-8 JSON lines."""
    with open(path, "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def describe_columns(columns: Sequence[Sequence[str]]) -> str:
    """`("prompt", "completion"), ("messages",)` -> `prompt and completion, or messages`."""
    return ", or ".join(" and ".join(wanted) for wanted in columns) or "any columns"


def first_user_text(row: dict[str, Any]) -> str:
    """What a row is about: its text, or the first turn of its prompt. Rows that share it belong on one side of a split."""
    prompt = row.get("text") or row.get("prompt") or row.get("messages") or row.get("chosen")
    if isinstance(prompt, str):
        return to_turns(prompt)[0]["content"]
    return prompt[0]["content"]


def to_turns(prompt: str) -> list[dict[str, str]]:
    """A text prompt as chat turns: a dialogue in Anthropic's `Human:`/`Assistant:` form, or one user turn."""
    parts = re.split(r"\n\n(Human|Assistant): ?", prompt)
    if len(parts) < 3 or parts[0].strip():
        return [{"role": "user", "content": prompt.strip()}]
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [{"role": roles[who], "content": text.strip()} for who, text in zip(parts[1::2], parts[2::2], strict=True)]
    return turns[:-1] if turns[-1]["role"] == "assistant" and not turns[-1]["content"] else turns


def as_chat(row: dict[str, Any]) -> dict[str, Any]:
    """Text columns `prompt`, `completion`, `chosen`, `rejected` as chat turns; others as they are."""
    turned = {"prompt": to_turns(row["prompt"])} if isinstance(row.get("prompt"), str) else {}
    for name in ("completion", "chosen", "rejected"):
        if isinstance(row.get(name), str):
            turned[name] = [{"role": "assistant", "content": row[name].strip()}]
    return turned


def split_by_prompt(keys: Sequence[str], held_out_share: float, seed: int) -> list[bool]:
    """Whether each key is held out: a pure function of (key, seed), so one prompt never sits on both sides."""

    def position(key: str) -> float:
        digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    return [position(key) < held_out_share for key in keys]
