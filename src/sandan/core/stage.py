"""The output folder of a stage: who owns it, `recipe.yaml`, `result.json`, lineage.

Later stages read nothing but `outputs/<recipe>/<stage>/`: a standard Hugging Face folder (or JSONL files),
`recipe.yaml` (the settings of the run) and `result.json`, which is written last: if it exists, the stage is complete.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import yaml

from .._version import __version__
from .chain import CHAIN
from .errors import Interrupted, UserError
from .files import sha256, write_text
from .places import command_for, here_or_embedded, recorded
from .stage_folder import RECIPE, RESULT, UNFINISHED, StageFolder, read_settings, settings_of


VERSIONED = ("torch", "transformers", "trl", "datasets", "accelerate", "peft", "tokenizers")
logger = logging.getLogger(__name__)


@dataclass
class RunArguments:
    """The options that every script has."""

    dry_run: bool = field(
        default=False, metadata={"help": "Check settings, data and disk, show what would be trained, change nothing."}
    )


@dataclass
class TrainingRunArguments(RunArguments):
    """The options of every script that trains."""

    resume: str = field(
        default="auto",
        metadata={"help": "Go on from: auto (the newest whole checkpoint of an unfinished run), never, or a folder."},
    )
    resume_with_changes: bool = field(
        default=False, metadata={"help": "Go on from a checkpoint although settings or data have changed."}
    )


def is_main_process() -> bool:
    """Return whether this process writes files and messages (rank 0, or the only process)."""
    return os.environ.get("RANK", "0") == "0"


@dataclass
class Stage:
    """A run of a stage.

    Args:
        name (`str`): stage name, the stem of its YAML and the last part of `output_dir`.
        recipe (`str`): recipe name, the YAML's folder.
        output_dir (`Path`): where everything is written.
        seed (`int`): the run's seed.
        config (`dict`): effective settings, JSON types only.
        recipe_dir (`Path`, *optional*): the folder of the recipe's YAML files.
        run (`RunArguments`): the options of the script.
        given (`frozenset`): names of the options that the recipe or the command line gives.
        notes (`dict`): counts from the data checks, for `result.json`.
    """

    name: str
    recipe: str
    output_dir: Path
    seed: int
    config: dict[str, Any]
    inputs: dict[str, str] = field(default_factory=dict)
    recipe_dir: Path | None = None
    run: RunArguments = field(default_factory=TrainingRunArguments)
    given: frozenset[str] = frozenset()
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        self.folder = StageFolder(self.output_dir)
        self._has_begun = False

    # ---- The folder ----

    @contextlib.contextmanager
    def opened(self) -> Iterator["Stage"]:
        """Hold the folder during the block; if an error ends the block, a finished stage is back in its place.

        A signal changes nothing: the same command goes on, and without `result.json` everyone sees that it must.
        """
        self.open()
        try:
            yield self
        except Interrupted:
            raise
        except BaseException:
            self.restore()
            raise
        finally:
            self.close()

    def open(self) -> "Stage":
        """Take the output folder for this run, until [`close`]. Nothing that is in it changes.

        Raises:
            UserError: if the folder holds something that this stage of this recipe did not write, or if another run has
                it.
        """
        # Only the main process checks: another rank could see a half-created folder.
        if not is_main_process():
            return self
        self.check_owner()
        with self._changing_files():
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self.folder.lock()
            try:
                # Again: until the lock was taken, another run could have begun here.
                self.check_owner()
                if not self.folder.owner():
                    self._write_recipe()
            except BaseException:
                self.close()
                raise
        return self

    def close(self) -> None:
        """Let other runs have the folder."""
        if is_main_process():
            self.folder.unlock()

    def check_owner(self) -> None:
        """Raise [`UserError`] if the output folder holds something that this stage of this recipe did not write."""
        with self._changing_files():
            for folder in (self.output_dir, *self.output_dir.parents):
                if folder.is_symlink() and not folder.exists():
                    raise UserError(
                        f"{folder}: is a link to {folder.readlink()}, which is not there; make that folder"
                    )
            if self.output_dir.is_file():
                raise UserError(f"{self.output_dir}: is a file; give another --output_dir")
            if self.folder.is_free():
                return
        found = self.folder.owner()
        if (found.get("recipe"), found.get("stage")) != (self.recipe, self.name):
            holds = f"recipe {found['recipe']!r}, stage {found['stage']!r}" if found else "other files"
            raise UserError(
                f"{self.output_dir}: holds {holds}, not recipe {self.recipe!r}, stage {self.name!r}; "
                "nothing was changed: give another --output_dir"
            )

    def was_finished(self) -> bool:
        """Return whether the earlier run in this folder finished. Call before [`begin_writing`]."""
        return self.folder.is_finished() and not (self.output_dir / UNFINISHED).is_dir()

    def begin_writing(self) -> Path:
        """Put a finished stage away, write `recipe.yaml`, and return the folder, whose files change from here on.

        Call it when everything that can fail has been prepared.
        """
        self._has_begun = True
        if is_main_process():
            with self._changing_files():
                self.folder.put_away()
                self._write_recipe()
        return self.output_dir

    def has_begun_writing(self) -> bool:
        """Return whether everything has been prepared: what goes wrong from here on is no mistake in the settings."""
        return self._has_begun

    def restore(self) -> None:
        """Put the finished stage that this run has put away back in its place, unless this run has finished."""
        if not is_main_process():
            return
        try:
            if self.folder.put_back():
                logger.info("%s: as it was before; what this run wrote is in %s/", self.output_dir, UNFINISHED)
        except OSError as error:
            logger.warning("%s: cannot be put back (%s); the next run tries it again", self.output_dir, error)

    def _write_recipe(self) -> None:
        write_text(
            self.output_dir / RECIPE, yaml.safe_dump({"recipe": self.recipe, "stage": self.name, **self.config})
        )

    @contextlib.contextmanager
    def _changing_files(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.output_dir}: cannot be written ({error.strerror}); give another --output_dir"
            ) from None

    # ---- Inputs and result ----

    def add_input(self, path: str | Path) -> Path:
        """Record a file or an earlier stage's folder in the lineage, as path -> sha256.

        Raises:
            UserError: if a local path does not exist, or is of a stage that did not finish.
        """
        path = here_or_embedded(path)
        require_whole(path if path.is_dir() else path.parent)
        if path.is_dir():
            result = path / RESULT
            files = [result] if result.is_file() else sorted(path.glob("*.json")) + sorted(path.glob("*.safetensors"))
            digest = hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()
            self.inputs[str(result if result.is_file() else path)] = sha256(result) if result.is_file() else digest
        elif path.is_file():
            self.inputs[recorded(path)] = sha256(path)
        else:
            parts = path.parts
            earlier = parts[0] == "outputs" and len(parts) > 2
            hint = f"; run `{command_for(parts[2], parts[1])}` first" if earlier else ""
            raise UserError(f"{path}: no such file or folder{hint}")
        return path

    def finish(self, metrics: dict[str, Any], device: str = "cpu") -> None:
        """Write `result.json`. This is the last action of a stage."""
        if not is_main_process():
            return
        result = {
            "stage": self.name,
            "recipe": self.recipe,
            "seed": self.seed,
            "metrics": metrics,
            # From the start of the process: what a user waits for includes the seconds of the imports.
            "wall_seconds": round(time.time() - psutil.Process().create_time(), 2),
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "device": describe_device(device),
            **peak_memory(device),
            "versions": {"python": platform.python_version(), "sandan": __version__}
            | {name: metadata.version(name) for name in VERSIONED},
            "inputs": self.inputs,
            "data": self.notes,
            "config": self.config,
        }
        with self._changing_files():
            self._write_recipe()
            text = json.dumps(result, indent=1, ensure_ascii=False, sort_keys=False)
            self.folder.forget_unfinished()
            write_text(self.output_dir / RESULT, text + "\n")
            self.folder.settle()

    def next_command(self) -> str | None:
        """Return the command of the recipe's next stage, or None after the last."""
        later = CHAIN[CHAIN.index(self.name) + 1 :] if self.name in CHAIN else ()
        for name in later:
            if self.recipe_dir is None or (self.recipe_dir / f"{name}.yaml").is_file():
                return command_for(name, self.recipe)
        return None


def read_result(folder: str | Path) -> dict[str, Any]:
    """Return the contents of an earlier stage's `result.json`.

    Raises:
        UserError: if the stage has not been run, or the file is broken.
    """
    path = Path(folder) / RESULT
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(result, dict):
            raise ValueError("not a JSON object")  # noqa: TRY004
        return result
    except FileNotFoundError:
        raise UserError(
            f"{path}: not there; run `{command_for(path.parent.name, path.parent.parent.name)}` first"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: broken ({error}); run that stage again") from None


def require_whole(folder: Path) -> None:
    """Refuse the folder of a stage whose run did not finish, or whose files are not those of its `recipe.yaml`.

    A folder that no stage has written is left to those who load it.
    """
    owner = StageFolder(folder).owner()
    if not owner:
        return
    again = f"run `{command_for(owner['stage'], owner['recipe'])}`"
    if not (folder / RESULT).is_file():
        raise UserError(f"{folder}: its run did not finish (no {RESULT}); {again} first")
    result, settings = read_result(folder), read_settings(folder / RECIPE)
    if (folder / RECIPE).is_file():
        made = settings_of(result)
        # As text, because NaN is not equal to itself.
        other = [name for name in made.keys() | settings.keys() if _text(made, name) != _text(settings, name)]
        if other:
            raise UserError(
                f"{folder}: {RECIPE} is not that of {RESULT} ({', '.join(sorted(other)[:5])}); {again} again"
            )


def _text(settings: dict[str, Any], name: str) -> str:
    return json.dumps(settings.get(name), sort_keys=True, default=str)


def effective_config(values: tuple[Any, ...]) -> dict[str, Any]:
    """Return the settings of all parsed dataclasses as one mapping of JSON types, without access tokens."""
    # `TrainingArguments.to_dict` masks every `..._token`. These three are settings; all others are secrets.
    settings = ("eos_token", "pad_token", "stop_token")
    config: dict[str, Any] = {}
    for value in values:
        config |= value.to_dict() if hasattr(value, "to_dict") else dataclasses.asdict(value)
        config |= {name: getattr(value, name) for name in settings if hasattr(value, name)}
    config = {key: item for key, item in config.items() if not key.endswith("_token") or key in settings}
    return json.loads(json.dumps(config, default=str))


def peak_memory(device: str) -> dict[str, float]:
    """Return the peak memory of tensors on this process's GPU, in GiB; an empty mapping on a CPU."""
    if not device.startswith("cuda"):
        return {}
    import torch

    return {"peak_gpu_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}


def describe_device(device: str) -> str:
    """Return the number and name of the cards for `cuda`; the processor and the threads in use for `cpu`."""
    if device.startswith("cuda"):
        import torch

        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    threads = os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))
    return f"{device} ({platform.processor() or platform.machine()}, {threads} threads)"
