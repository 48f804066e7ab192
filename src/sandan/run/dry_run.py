"""The dry run of a stage: settings and their origins, data, tokens, steps, memory and disk, without running it.

Data files are checked completely; tokens and lengths are those of the first rows, prepared by the trainer that would
train on them. A missing output of an earlier stage is not an error if this recipe has that stage.
"""

import math
import os
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..core.errors import UserError
from ..core.places import command_for
from ..core.stage import Stage
from ..data.forms import one_form
from ..data.loading import DataArguments, check_files, local_files
from ..data.reading import rows_of
from ..models.loading import load_tokenizer, quantization, require_model
from ..models.memory import OPTIMIZER_BYTES, ModelSize, activation_bytes, readable_bytes
from ..training.preview import SHOWN_ROWS, Sample, prompt_rows


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments

MODEL_KEYS = (
    "tokenizer_name_or_path",
    "model_name_or_path",
    "sft_model",
    "base_model",
    "ppo_model",
    "reward_model_path",
    "reward_model",
    "masked_model",
)
REWARD_KEYS = ("reward_model_path", "reward_model", "true_reward_model_path")
FILE_KEYS = ("candidates_file", "text_file", "minimal_pairs_file", "best_of_n_prompt_file")
SAMPLED_ROWS, SHOWN_TOKENS, BAR = 256, 160, 40
DIM, RESET = "\033[2m", "\033[0m"


@dataclass
class DryRun:
    """A report of what a stage would do.

    Args:
        stage: the stage.
        values: the stage's parsed dataclasses.
        origins: where each given setting came from.
        columns: sets of columns that the stage accepts.
        preview: for a stage that trains, the module with its `rows` and `size` (see [`sandan.training.preview`]).
        lines: the lines of the report so far.
    """

    stage: Stage
    values: Sequence[Any]
    origins: Mapping[str, str]
    columns: Sequence[Sequence[str]] | None
    preview: ModuleType | None = None
    lines: list[str] = field(default_factory=list)

    def report(self) -> str:
        """Run all checks and return the report.

        Raises:
            UserError: as the stage itself would, before training.
        """
        self.stage.check_owner()
        self._settings()
        missing = self._inputs()
        rows, total = self._data(missing)
        self._models(missing)
        tokenizer, sample = self._tokenizer(missing), None
        if rows and tokenizer is not None:
            sample = self._tokens(rows, tokenizer)
            self._room_for_answers(sample, missing)
        if self._arguments() is not None:
            self._steps(total, sample)
            self._resources(tokenizer, sample, missing)
        self._hub()
        return "\n".join(self.lines)

    def _say(self, title: str, text: str) -> None:
        self.lines.append(f"{title:<10} {text}")

    def _value(self, kind: type) -> Any:
        return next((value for value in self.values if isinstance(value, kind)), None)

    def _arguments(self) -> "TrainingArguments | None":
        from transformers import TrainingArguments

        return self._value(TrainingArguments)

    # ---- Settings and inputs ----

    def _settings(self) -> None:
        config = self.stage.config
        self.lines.append(f"settings of {self.stage.recipe}/{self.stage.name} (given)")
        for key, origin in self.origins.items():
            self.lines.append(f"  {key}: {config.get(key)}  {DIM}{origin}{RESET}")
        rest = ", ".join(f"{key}={value}" for key, value in config.items() if key not in self.origins)
        self.lines.append(f"{DIM}  default: {rest}{RESET}")

    def _inputs(self) -> set[str]:
        """Report the inputs; return those that an earlier stage has yet to make."""
        missing = set()
        for key in (*MODEL_KEYS, *FILE_KEYS):
            path = self.stage.config.get(key)
            if not path:
                continue
            if maker := self._maker(path):
                missing.add(path)
                self._say(
                    "input", f"{key}: {path} is not there yet; `{command_for(maker, self.stage.recipe)}` makes it"
                )
            elif key in MODEL_KEYS:
                require_model(path, self.stage, key)
                self._say("input", f"{key}: {path}")
            else:
                self.stage.add_input(path)
                self._say("input", f"{key}: {path}")
        return missing

    def _models(self, missing: set[str]) -> None:
        """Check the models that are there, as the stage does before it trains."""
        from ..models.checks import check_length, check_reward_folder, config_of, fit_max_length, savable_at

        config, args = self.stage.config, self._arguments()
        for key in REWARD_KEYS:
            path = config.get(key)
            if path and path not in missing and Path(path).is_dir():
                check_reward_folder(path, key)
        if args is None:
            return
        quantization(self._value_with("load_in_4bit"))
        path = config.get("model_name_or_path")
        if path is None or path in missing or config.get("model_config"):
            return
        if hasattr(args, "max_length"):
            fit_max_length(args, path, "max_length" in self.origins)
        if "block_size_tokens" in config and (found := config_of(path)) is not None:
            check_length("block_size_tokens", config["block_size_tokens"], found, path)
        savable_at(path)

    def _room_for_answers(self, sample: Sample, missing: set[str]) -> None:
        """Check that the longest prompt of the first rows leaves room for an answer in every model that reads both."""
        from ..models.checks import check_prompts, config_of

        config = self.stage.config
        key = "response_length" if "response_length" in config else "max_new_tokens"
        if key not in config or (self._arguments() is not None and key == "max_new_tokens"):
            return
        limit = config.get("max_prompt_tokens")
        lengths = [length for length in sample.lengths if limit is None or length <= limit]
        for name in MODEL_KEYS:
            path = config.get(name)
            if path and path not in missing and name not in ("tokenizer_name_or_path", "masked_model"):
                found = config_of(path)
                if found is not None:
                    option = "max_prompt_tokens" if "max_prompt_tokens" in config else None
                    check_prompts(lengths, config[key], key, found, path, option)

    def _maker(self, path: str) -> str | None:
        """Return the stage of this recipe that makes a missing path, or None."""
        if Path(path).exists() or self.stage.recipe_dir is None:
            return None
        for recipe in self.stage.recipe_dir.glob("*.yaml"):
            if Path(path).is_relative_to(self.stage.output_dir.parent / recipe.stem):
                return recipe.stem
        return None

    # ---- Data ----

    def _data(self, missing: set[str]) -> tuple[list[dict[str, Any]], int | None]:
        """Report the data; return the first training rows, and the number of all rows if it is known."""
        data = self._value(DataArguments)
        if data is None or self.columns is None:
            return [], None
        if not data.datasets:
            raise UserError("datasets: missing; name data in the recipe or give --data_files FILE")
        for source in [*data.datasets, *data.eval_datasets]:
            for file in local_files(source):
                if maker := self._maker(file):
                    self._say("data", f"{file} is not there yet; `{command_for(maker, self.stage.recipe)}` makes it")
                    return [], None
        if data.skip_bad_rows:
            self._say("data", "rows with problems are skipped (skip_bad_rows); they are not listed here")
        else:
            check_files(data, self.stage, self.columns, self._tokenizer(missing))
        rows = [one_form(row, data.as_chat) for source in data.datasets for row in self._first_rows(source)]
        total = self.stage.notes.get("train_rows_read") or None
        counts = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in self.stage.notes.items() if count)
        self._say("data", counts or "rows are not counted before they are loaded")
        return rows, total

    def _first_rows(self, source: Any) -> list[dict[str, Any]]:
        files = local_files(source)
        if files:
            rows = (read.row for file in files for read in rows_of(file) if read.problem is None)
            return list(islice(rows, SAMPLED_ROWS))
        from datasets import load_dataset

        name = f"{source.path} {source.name or ''}".strip()
        try:
            stream = load_dataset(
                source.path,
                source.name,
                data_files=source.data_files,
                split=source.split.partition("[")[0],
                streaming=True,
            )
            return list(stream.take(SAMPLED_ROWS))
        except Exception as error:  # noqa: BLE001 (each library below has its own for a network that is not there)
            self._say("data", f"{name}: cannot be reached now ({type(error).__name__}): its rows were not looked at")
            return []

    def _tokenizer(self, missing: set[str]) -> "PreTrainedTokenizerBase | None":
        path = next((self.stage.config[key] for key in MODEL_KEYS if self.stage.config.get(key)), None)
        return None if path is None or path in missing else load_tokenizer(path)

    def _tokens(self, rows: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase") -> Sample:
        from datasets import Dataset

        wanted = next(names for names in self.columns if set(names) <= rows[0].keys())
        dataset = Dataset.from_list([{name: row[name] for name in wanted} for row in rows])
        if self.preview is None:
            sample = prompt_rows(dataset, tokenizer)
        else:
            sample = self.preview.rows(dataset, tokenizer, *self.values)
        for tokens in sample.tokens[:SHOWN_ROWS]:
            self._say("tokens", "".join(shown_tokens(tokens[:SHOWN_TOKENS], tokenizer)))
        self.lines += histogram(sample.lengths)
        if sample.limit is not None:
            longer = sum(length > sample.limit for length in sample.lengths) / len(sample.lengths)
            self._say(
                "lengths", f"{longer:.1%} are longer than {sample.limit} tokens; {sample.dropped:.1%} are dropped"
            )
        return sample

    # ---- Training ----

    def _steps(self, total: int | None, sample: Sample | None) -> None:
        args, world = self._arguments(), int(os.environ.get("WORLD_SIZE", "1"))
        episodes = getattr(args, "total_episodes", None)
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * world
        if episodes is not None:
            updates = math.ceil(episodes / batch)
            steps = updates * args.num_ppo_epochs * args.num_mini_batches
            self._say("steps", f"{updates:,} updates of {batch:,} answers, {steps:,} optimizer steps")
            return
        rows = None
        if total is not None:
            share = 1.0 if sample is None else sample.rows_per_document * (1 - sample.dropped)
            held_out = getattr(self._value(DataArguments), "held_out_share", 0.0)
            rows = total * share * (1 - held_out)
        epoch = f"about {math.ceil(rows / batch):,} steps an epoch" if rows else "steps an epoch are not known yet"
        length = f"{args.max_steps:,} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
        self._say("steps", f"{length}, {epoch}, {batch:,} rows a step ({world} processes)")

    def _resources(
        self, tokenizer: "PreTrainedTokenizerBase | None", sample: Sample | None, missing: set[str]
    ) -> None:
        size = self.preview.size(tokenizer, missing, *self.values)
        parent = next(folder for folder in (self.stage.output_dir, *self.stage.output_dir.parents) if folder.is_dir())
        free = shutil.disk_usage(parent).free
        if size is None:
            self._say("memory", "not known before the earlier stage has made its model")
            self._say("disk", f"{readable_bytes(free)} free")
            return
        self._say("memory", self._memory(size, sample))
        checkpoint, model = (4 + OPTIMIZER_BYTES) * size.trained, 4 * size.trained
        self._say("disk", f"{readable_bytes(free)} free; a checkpoint takes about {readable_bytes(checkpoint)}")
        if free < checkpoint + model:
            raise UserError(
                f"{self.stage.output_dir}: a checkpoint and the final model take about "
                f"{readable_bytes(checkpoint + model)}, but only {readable_bytes(free)} are free"
            )

    def _memory(self, size: ModelSize, sample: Sample | None) -> str:
        args, lora = self._arguments(), getattr(self._value_with("use_peft"), "use_peft", False)
        held = (4 if lora else 8 + OPTIMIZER_BYTES) * size.trained + 4 * size.frozen
        what = "weights (LoRA: little more)" if lora else "weights, gradients, AdamW in float32"
        text = f"{size.trained + size.frozen:,} parameters: about {readable_bytes(held)} for {what}"
        if sample is None or args.gradient_checkpointing:
            return f"{text}, and activations"
        longest = sample.longest or max(sample.lengths)
        tokens = args.per_device_train_batch_size * (longest + getattr(args, "response_length", 0))
        activations = activation_bytes(size.config, tokens, 2 if args.bf16 or args.fp16 else 4)
        return f"{text}, {readable_bytes(activations)} for activations of {tokens:,} tokens"

    def _value_with(self, name: str) -> Any:
        return next((value for value in self.values if hasattr(value, name)), None)

    def _hub(self) -> None:
        args = self._arguments()
        if args is not None and args.push_to_hub:
            from ..hub.push import check_rights

            self._say("hub", check_rights(args.hub_model_id))


# ---- Display ----


def shown_tokens(tokens: Sequence[tuple[int, bool]], tokenizer: "PreTrainedTokenizerBase") -> Iterator[str]:
    """Yield tokens as text, dimmed where they are not trained, with a dot between tokens of the same kind."""
    previous = None
    run: list[int] = []
    for token_id, trained in [*tokens, (-1, None)]:
        if trained is not previous and run:
            text = "·".join(tokenizer.decode([token]).replace("\n", "⏎") for token in run)
            yield text if previous else f"{DIM}{text}{RESET}"
            run = []
        run.append(token_id)
        previous = trained


def histogram(lengths: Sequence[int], bins: int = 6) -> list[str]:
    """Return a histogram of lengths in tokens, as lines of text."""
    low, high = min(lengths), max(lengths)
    width = max(math.ceil((high - low + 1) / bins), 1)
    counts = [sum(low + n * width <= length < low + (n + 1) * width for length in lengths) for n in range(bins)]
    lines = [
        f"lengths    of the first {len(lengths):,} rows: median {statistics.median(lengths):g}, longest {high} tokens"
    ]
    for number, count in enumerate(counts):
        if low + number * width <= high:
            bar = "█" * math.ceil(BAR * count / max(counts))
            lines.append(f"  {low + number * width:>6}–{low + (number + 1) * width - 1:<6} {count:>5,} {bar}")
    return lines
