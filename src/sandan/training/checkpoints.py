"""Checkpoints that exist only when they are complete, and the choice of the checkpoint from which a run resumes.

A checkpoint is written into a temporary folder, every file is synced, `MANIFEST.json` with the size and sha256 of each
is written last, and then the folder is renamed: even if the process is killed, each folder `checkpoint-N` is complete.
The manifest also records the run (settings, data, number of processes), so that another run does not resume from it.
"""

import errno
import fnmatch
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.files import sha256


logger = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"
# The folder in which a checkpoint is written until it is complete.
ASIDE = ".saving"
BROKEN, PREVIOUS = ".broken", ".previous"

# Settings that change what is logged, saved, shown or uploaded, but no weights. All other settings are compared.
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

# What a run cannot resume without, and the names under which one process, FSDP or ZeRO saves it.
REQUIRED = {
    "weights": ("*.safetensors", "pytorch_model_fsdp*", "global_step*/*"),
    "optimizer": ("optimizer*", "global_step*/*"),
    "learning rate schedule": ("scheduler.pt", "global_step*/*"),
    "random state": ("rng_state*.pth",),
    "trainer_state.json": ("trainer_state.json",),
    "state of the run": ("run_state.json", "ppo_state.json"),
}

FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_WRITE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
SHOWN_CHANGES = 5


def comparable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that change the weights of a run, as JSON types."""
    kept = {
        key: value
        for key, value in settings.items()
        if key not in HARMLESS and not key.startswith(HARMLESS_PREFIXES) and not key.endswith("_token")
    }
    return json.loads(json.dumps(kept, default=str, sort_keys=True))


# ---- Writing ----


def seal(folder: Path, target: Path, step: int, identity: Mapping[str, Any]) -> None:
    """Turn the temporary `folder` into the checkpoint `target`: sync the files, write the manifest, rename the folder.

    Args:
        step: optimizer steps made.
        identity: description of the run: `world_size`, `settings`, `inputs`; see [`changes`].
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]
    files = {}
    for path in paths:
        _sync(path)
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": sha256(path)}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"step": step, **identity, "files": files}, indent=1), encoding="utf-8")
    _sync(manifest)
    for directory in (*{path.parent for path in paths}, folder):
        _sync(directory)
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
    """Delete a folder atomically: rename it first, so a kill never leaves half a checkpoint under its name."""
    if folder.exists():
        doomed = folder.with_name(f".{folder.name}.removed")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def rotate(output_dir: Path, limit: int | None, best: str | None) -> None:
    """Keep `limit` checkpoints: the best and the newest ones. (Trainer's own rotation counts broken folders too.)"""
    found = [folder for _, folder in numbered(output_dir)]
    if limit is None or limit <= 0 or len(found) <= limit:
        return
    kept = set(found[-limit:]) if best is None else {found[-1], Path(best), *found[len(found) - limit + 1 :]}
    for folder in found:
        if folder not in kept:
            remove(folder)


def disk_problem(error: BaseException) -> str | None:
    """Return the disk problem behind `error`, or None. safetensors and torch hide the errno in the message."""
    number = error.errno if isinstance(error, OSError) else None
    if found := re.search(r"os error (\d+)", str(error)):
        number = int(found[1])
    if number in FULL_DISK | NO_WRITE:
        return os.strerror(number)
    writer = ("PytorchStreamWriter failed", "inline_container.cc", "file write failed", "iostream error")
    if isinstance(error, RuntimeError) and any(text in str(error) for text in writer):
        return "the file could not be written to its end"
    return None


# ---- Finding ----


def numbered(output_dir: str | Path) -> list[tuple[int, Path]]:
    """Return the `checkpoint-N` folders with their numbers, oldest first, complete or not."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(output_dir).glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in found if match and path.is_dir())


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest.

    Raises:
        UserError: if there is none or it cannot be read.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for expected in manifest["files"].values():
            int(expected["size"]), str(expected["sha256"])
        int(manifest["step"])
    except FileNotFoundError:
        raise UserError(f"{folder}: no {MANIFEST}: not a checkpoint of sandan, or not written to its end") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}/{MANIFEST}: broken ({error})") from None
    return manifest


def problem_of(folder: str | Path) -> str | None:
    """Return why a checkpoint is incomplete or changed, or None.

    Every file of its manifest has the right size and sha256, every file that is there is in the manifest, nothing that
    a run cannot resume without is missing from both, and all that tell the step tell the same one.
    """
    folder = Path(folder)
    try:
        manifest = read_manifest(folder)
        files = manifest["files"]
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
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in {*files, MANIFEST}:
            return f"{name} is not in {MANIFEST}"
    for what, patterns in REQUIRED.items():
        if not any(fnmatch.fnmatchcase(name, pattern) for name in files for pattern in patterns):
            return f"{MANIFEST} lists no {what} ({' or '.join(patterns)})"
    return _problem_of_states(folder, manifest["step"])


def _problem_of_states(folder: Path, step: int) -> str | None:
    number = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    if number and int(number[1]) != step:
        return f"{MANIFEST} is of step {step}"
    for path in (folder / "trainer_state.json", folder / "run_state.json", folder / "ppo_state.json"):
        if not path.is_file():
            continue
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            if state.get("global_step", step) != step:
                return f"{path.name} is of step {state['global_step']}"
        except (ValueError, AttributeError):
            return f"{path.name} is no JSON object"
    return None


@contextmanager
def loading(folder: str | Path | None) -> Iterator[None]:
    """Raise [`UserError`] if the files of a checkpoint hold something else than the run saves."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError, OSError) as error:
        found = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"{folder}: holds something else than this run saves ({found}); go on from another checkpoint, or start anew "
            "with --resume never"
        ) from error


def newest_whole(output_dir: str | Path, set_aside: bool = True) -> Path | None:
    """Return the newest complete checkpoint, or None.

    Args:
        set_aside: rename newer checkpoints that are broken to `checkpoint-N.broken`, with one line each in the log.
    """
    for _, folder in reversed(numbered(output_dir)):
        problem = problem_of(folder)
        if problem is None:
            return folder
        if set_aside:
            logger.warning("%s: %s; set aside as %s", folder, problem, put_aside(folder, BROKEN).name)
    return None


def put_aside(folder: Path, suffix: str) -> Path:
    """Rename `checkpoint-N` so that no run resumes from it, and replace an older folder of the new name."""
    target = folder.with_name(folder.name + suffix)
    remove(target)
    return folder.rename(target)


def changes(folder: Path, identity: Mapping[str, Any]) -> list[str]:
    """Return the differences between the run that saved a checkpoint and the run that is to resume from it."""
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
                there, here = (run.get(key, "not there") for run in (before, after))
                yield f"{key}: {there} there, {here} now" if group == "settings" else f"{key}: other content"


def choose(
    output_dir: str | Path, resume: str, identity: Mapping[str, Any], finished: bool, anyway: bool
) -> Path | None:
    """Return the checkpoint from which a run resumes, or None to start from the beginning.

    Args:
        resume: `auto` (the newest complete checkpoint of an unfinished run), `never`, or a path.
        finished: whether the run that left checkpoints in `output_dir` finished.
        anyway: resume although [`changes`] found something.

    Raises:
        UserError: if `resume` is a path without a complete checkpoint, or the checkpoint is of another run.
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
    """Remove the remains of a killed save, and rename checkpoints of other runs, before a run writes.

    Args:
        start: the checkpoint from which the run resumes. Newer ones belong to another run; without it, all do.
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
