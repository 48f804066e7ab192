"""The states of a stage's folder: a run may end at any line, and nothing that was finished is lost.

The rule: prepare everything that can fail, then touch the folder. Until the first optimizer step (without training:
until the first file is written) a run only holds the lock. Then `put_away` moves the finished stage into `.previous/`,
the run writes, and `result.json`, written last, makes it finished; `settle` then drops `.previous/`. As long as there
is an `.unfinished/`, the checkpoints in the folder are of a run that did not finish, and the next one goes on from them.

| state | in the folder | `.previous/` | `.unfinished/` |
|---|---|---|---|
| finished | `result.json` and what the run made | | |
| begun, or killed | what the new run has written, no `result.json` | the finished stage | |
| ended by an error (`put_back`) | the finished stage again | | what the new run had written |

Every change is a row of renames whose order tells, after a kill between any two, where to go on: as long as
`.previous/recipe.yaml` is there, everything in the folder is of the new run; as long as it is not, everything is of the
finished one. Checkpoints stay where they are.
"""

import contextlib
import errno
import fnmatch
import itertools
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .errors import UserError
from .files import temporary_name, write_text


if TYPE_CHECKING:
    from filelock import BaseFileLock

RESULT, RECIPE = "result.json", "recipe.yaml"
PREVIOUS, UNFINISHED, LOCK = ".previous", ".unfinished", ".lock"
# Names that are in a folder before its `recipe.yaml`: a folder with nothing else belongs to nobody.
SCRATCH = {LOCK, *(temporary_name(name) for name in (RECIPE, RESULT))}
# Event files (`runs`) are open while a run writes, and no run writes over those of another.
STAYS = (".*", "checkpoint-*", "runs")
# What `from_pretrained` and later stages would load: of an earlier model, it must not lie beside the new one.
OF_A_MODEL = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter",
    "ema_policy",
)
WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}

logger = logging.getLogger(__name__)


class StageFolder:
    """The output folder of a stage; only the main process uses it."""

    def __init__(self, path: Path):
        self.path = path
        self._lock: BaseFileLock | None = None

    # ---- Whose it is ----

    def owner(self) -> dict[str, Any]:
        """Return the settings (`recipe` and `stage` among them) of the run that wrote here; empty if there are none."""
        for place in (self.path, self.path / PREVIOUS):
            for name in (RECIPE, RESULT):
                found = read_settings(place / name)
                if "recipe" in found and "stage" in found:
                    return found
        return {}

    def is_free(self) -> bool:
        """Return whether nothing but the remains of a run that was killed while it opened the folder is here."""
        return not self.path.is_dir() or all(entry.name in SCRATCH for entry in self.path.iterdir())

    def is_finished(self) -> bool:
        """Return whether a whole `result.json` is here."""
        return bool(read_settings(self.path / RESULT))

    def lock(self) -> None:
        """Take the folder for this process, until [`unlock`] or its end, also by SIGKILL.

        Raises:
            UserError: if another run has it.
        """
        from filelock import FileLock, Timeout

        if self._lock is None:
            lock = FileLock(self.path / LOCK)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise UserError(
                    f"{self.path}: another run is writing here; wait for its end or give another --output_dir"
                ) from None
            except OSError as error:
                if error.errno not in WITHOUT_LOCKS:
                    raise
                logger.warning("%s: this disk has no locks; let no second run write here", self.path)
            self._lock = lock

    def unlock(self) -> None:
        """Let other runs have the folder."""
        if self._lock is not None:
            try:
                # Removed before it is released: afterwards it could be the lock of another run.
                (self.path / LOCK).unlink(missing_ok=True)
            finally:
                self._lock.release()
                self._lock = None

    # ---- From state to state ----

    def put_away(self) -> None:
        """Move the finished stage into `.previous/`; an unfinished one stays where it is."""
        previous = self.path / PREVIOUS
        if self.is_finished():
            self.settle()
            if not (self.path / RECIPE).exists():
                # The order of the renames is told by this file, so there has to be one.
                write_text(self.path / RECIPE, yaml.safe_dump(settings_of(read_settings(self.path / RESULT))))
            previous.mkdir()
        elif not previous.is_dir() or (previous / RECIPE).exists():
            return
        for entry in _ordered(self._entries(), RESULT, RECIPE):
            if not (previous / entry.name).exists():
                entry.rename(previous / entry.name)

    def put_back(self) -> bool:
        """Undo [`put_away`] unless the run has finished; return whether there was something to undo."""
        previous = self.path / PREVIOUS
        if self.is_finished() or not (previous / RESULT).is_file():
            return False
        if (previous / RECIPE).exists():
            for entry in _ordered(self._entries(), None, RECIPE):
                self._lay_aside(entry)
        for entry in _ordered(previous.iterdir(), RECIPE, RESULT):
            self._lay_aside(self.path / entry.name)
            entry.rename(self.path / entry.name)
        previous.rmdir()
        for name in SCRATCH - {LOCK}:
            (self.path / name).unlink(missing_ok=True)
        return True

    def forget_unfinished(self) -> None:
        """Drop what earlier runs that did not finish have left; their checkpoints stay."""
        shutil.rmtree(self.path / UNFINISHED, ignore_errors=True)

    def settle(self) -> None:
        """Drop what the finished run has replaced, and move back what it has not: notes of a user, say."""
        previous = self.path / PREVIOUS
        for entry in previous.iterdir() if previous.is_dir() else ():
            stale = any(fnmatch.fnmatch(entry.name, pattern) for pattern in OF_A_MODEL)
            if not stale and not (self.path / entry.name).exists():
                entry.rename(self.path / entry.name)
        shutil.rmtree(previous, ignore_errors=True)

    def _entries(self) -> Iterator[Path]:
        """Return what a run has written, without its checkpoints."""
        for entry in self.path.iterdir():
            if not any(fnmatch.fnmatch(entry.name, pattern) for pattern in STAYS):
                yield entry

    def _lay_aside(self, entry: Path) -> None:
        """Move an entry, if there is one, into `.unfinished/`, beside those of earlier unfinished runs."""
        if entry.exists():
            folder = self.path / UNFINISHED
            folder.mkdir(exist_ok=True)
            numbered = (f"{entry.name}.{number}" for number in itertools.count(2))
            names = itertools.chain([entry.name], numbered)
            entry.rename(next(folder / name for name in names if not os.path.lexists(folder / name)))


def _ordered(entries: Iterable[Path], first: str | None, last: str) -> list[Path]:
    """Return the entries in the order in which they move."""
    return sorted(entries, key=lambda entry: (entry.name == last, entry.name != first, entry.name))


def settings_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the `recipe.yaml` of the run with this result says."""
    return {"recipe": result.get("recipe"), "stage": result.get("stage"), **(result.get("config") or {})}


def read_settings(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON or YAML file; empty if the file is not there or broken."""
    read = json.loads if path.suffix == ".json" else yaml.safe_load
    with contextlib.suppress(OSError, ValueError, RecursionError, yaml.YAMLError):
        found = read(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}
