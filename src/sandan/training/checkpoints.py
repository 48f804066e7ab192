"""Checkpoints that exist only when they are whole, and which of them a run may go on from.

A checkpoint is written into a folder aside, every file is synced, `MANIFEST.json` with the size and sha256 of each comes
last, and then the folder is renamed: whatever kills the process, a folder `checkpoint-N` is a whole checkpoint. The
manifest also says what the run was (settings, data, number of processes), so that another run does not go on from it.
"""

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.files import sha256


logger = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"
# Where a checkpoint is written until it is whole.
ASIDE = ".saving"
BROKEN, PREVIOUS = ".broken", ".previous"

# Settings that change what is logged, saved, shown or uploaded, but no weight. Whatever is not listed counts.
HARMLESS = {
    "output_dir",
    "disable_tqdm",
    "report_to",
    "run_name",
    "project",
    "push_to_hub",
    "dry_run",
    "ddp_timeout",
    "dataset_num_proc",
    "do_train",
    "do_eval",
    "do_predict",
    "skip_memory_metrics",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "dataloader_persistent_workers",
    "num_sample_generations",
    "stop_on_collapse",
    "local_rank",
}
HARMLESS_PREFIXES = ("logging_", "log_", "save_", "hub_", "resume", "trackio_", "include_")

FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_WRITE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
SHOWN_CHANGES = 5


def comparable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a run's trajectory depends on, as JSON types."""
    kept = {
        key: value
        for key, value in settings.items()
        if key not in HARMLESS and not key.startswith(HARMLESS_PREFIXES) and not key.endswith("_token")
    }
    return json.loads(json.dumps(kept, default=str, sort_keys=True))


# ---- Writing ----


def seal(folder: Path, target: Path, step: int, identity: Mapping[str, Any]) -> None:
    """Make `folder`, which was written aside, the checkpoint `target`: sync, write the manifest last, rename.

    Args:
        step: optimizer steps made.
        identity: what the run is: `world_size`, `settings`, `inputs`; see [`changes`].
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]
    files = {}
    for path in paths:
        _sync(path)
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": sha256(path)}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"step": step, **identity, "files": files}, indent=1), encoding="utf-8")
    _sync(manifest)
    for one in (*{path.parent for path in paths}, folder):
        _sync(one)
    remove(target)
    folder.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(folder: Path) -> None:
    """Delete a folder, if it is there, such that a kill in between leaves no half of it under its name."""
    if folder.exists():
        doomed = folder.with_name(f".{folder.name}.removed")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def rotate(output_dir: Path, limit: int | None, best: str | None) -> None:
    """Keep the newest `limit` checkpoints, and the best one. (Trainer's own rotation counts broken folders too.)"""
    found = [folder for _, folder in numbered(output_dir)]
    if limit is None or limit <= 0 or len(found) <= limit:
        return
    kept = set(found[-limit:]) if best is None else {found[-1], Path(best), *found[len(found) - limit + 1 :]}
    for folder in found:
        if folder not in kept:
            remove(folder)


def disk_problem(error: BaseException) -> str | None:
    """What is wrong with the disk, if that is why `error` came about; safetensors and torch hide the number."""
    number = error.errno if isinstance(error, OSError) else None
    if found := re.search(r"os error (\d+)", str(error)):
        number = int(found[1])
    if number in FULL_DISK | NO_WRITE:
        return os.strerror(number)
    writer = ("PytorchStreamWriter failed", "inline_container.cc", "file write failed")
    if isinstance(error, RuntimeError) and any(text in str(error) for text in writer):
        return "the file could not be written to its end"
    return None


# ---- Finding ----


def numbered(output_dir: str | Path) -> list[tuple[int, Path]]:
    """The `checkpoint-N` folders, oldest first, whole or not."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(output_dir).glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in found if match and path.is_dir())


def read_manifest(folder: Path) -> dict[str, Any]:
    """A checkpoint's manifest; raises [`UserError`] if there is none or it cannot be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        manifest["files"].items()
        int(manifest["step"])
    except FileNotFoundError:
        raise UserError(f"{folder}: no {MANIFEST}: not a checkpoint of sandan, or not written to its end") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}/{MANIFEST}: broken ({error})") from None
    return manifest


def problem_of(folder: str | Path) -> str | None:
    """Why a checkpoint is not whole, or None: every file of its manifest is there with its size and sha256."""
    folder = Path(folder)
    try:
        files = read_manifest(folder)["files"]
    except UserError as error:
        return str(error).removeprefix(f"{folder}").lstrip(":/ ")
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != expected["size"]:
            return f"{name} has {size:,} bytes instead of {expected['size']:,}"
        if sha256(path) != expected["sha256"]:
            return f"{name} has changed since it was saved (sha256)"
    return None


def newest_whole(output_dir: str | Path, set_aside: bool = True) -> Path | None:
    """The newest whole checkpoint, or None.

    Args:
        set_aside: rename newer ones that are broken to `checkpoint-N.broken`, each with one line in the log.
    """
    for _, folder in reversed(numbered(output_dir)):
        problem = problem_of(folder)
        if problem is None:
            return folder
        if set_aside:
            logger.warning("%s: %s; set aside as %s", folder, problem, put_aside(folder, BROKEN).name)
    return None


def put_aside(folder: Path, suffix: str) -> Path:
    """Rename `checkpoint-N` so that no run goes on from it; an older one of that name is replaced."""
    target = folder.with_name(folder.name + suffix)
    remove(target)
    return folder.rename(target)


def changes(folder: Path, identity: Mapping[str, Any]) -> list[str]:
    """What differs between the run that saved a checkpoint and the one that is to go on from it."""
    saved = read_manifest(folder)
    return [*_differences(saved, identity)]


def _differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in ("world_size", "train_rows"):
        if saved.get(name) != now.get(name):
            yield f"{name}: {saved.get(name)} there, {now.get(name)} now"
    for group in ("settings", "inputs"):
        before, after = saved.get(group) or {}, now.get(group) or {}
        for key in sorted(before.keys() | after.keys()):
            if before.get(key) != after.get(key):
                there, here = (one.get(key, "not there") for one in (before, after))
                yield f"{key}: {there} there, {here} now" if group == "settings" else f"{key}: other content"


def choose(
    output_dir: str | Path, resume: str, identity: Mapping[str, Any], finished: bool, anyway: bool
) -> Path | None:
    """Which checkpoint a run goes on from; None: from the beginning.

    Args:
        resume: `auto` (the newest whole one of a run that did not finish), `never`, or a path.
        finished: whether the run that left checkpoints in `output_dir` finished.
        anyway: go on although [`changes`] found something.

    Raises:
        UserError: if `resume` is a path without a whole checkpoint, or the checkpoint is of another run.
    """
    folder = None
    if resume not in ("auto", "never"):
        folder = Path(resume)
        if not folder.is_dir():
            raise UserError(f"--resume {resume}: no such folder; expected auto, never or a checkpoint's folder")
        if problem := problem_of(folder):
            raise UserError(f"--resume {resume}: {problem}")
    elif resume == "auto" and not finished:
        folder = newest_whole(output_dir)
    if folder is not None and (found := changes(folder, identity)):
        shown = "; ".join(found[:SHOWN_CHANGES]) + (f"; and {len(found) - SHOWN_CHANGES} more" * (len(found) > 5))
        if not anyway:
            raise UserError(
                f"{folder}: saved by another run ({shown}): going on from it would be neither run. Start anew with "
                "--resume never, or go on all the same with --resume_with_changes true"
            )
        logger.warning("%s: going on although this has changed: %s", folder, shown)
    return folder


def clear_the_way(output_dir: str | Path, start: Path | None) -> None:
    """Before a run writes: remove what a killed save left, and put checkpoints that are not of this run aside.

    Args:
        start: the checkpoint that the run goes on from. Newer ones, and without it all, belong to another run.
    """
    output_dir = Path(output_dir)
    for leftover in (output_dir / ASIDE, *output_dir.glob(".checkpoint-*.removed")):
        shutil.rmtree(leftover, ignore_errors=True)
    first = -1 if start is None else read_manifest(start)["step"]
    stale = [folder for number, folder in numbered(output_dir) if number > first]
    for folder in stale:
        put_aside(folder, PREVIOUS)
    if stale:
        logger.warning("%s: %d checkpoints of an earlier run are now named *%s", output_dir, len(stale), PREVIOUS)
