"""A checkout of its own, and what make would do or does in it."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from helpers import ROOT
from sandan.core.chain import CHAIN


# The stages of recipe tiny.
TINY = tuple(stage for stage in CHAIN if (ROOT / "recipes" / "tiny" / f"{stage}.yaml").is_file())


COPIED = ("recipes", "data", "scripts")
LINKED = ("Makefile", "src", "setup.cfg", "constraints.txt", "pyproject.toml", "LICENSE")


# What a surrounding `make test` would hand down.
MAKE_VARIABLES = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "RECIPE", "ARGS", "LAUNCH", "SEED", "SEEDS"}


def make_checkout(folder):
    """A checkout of its own, set up already: what tests change is copied, the rest links to the repository."""
    folder.mkdir(parents=True, exist_ok=True)
    hour_ago = time.time() - 3600
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for path in (folder / name).rglob("*"):
            os.utime(path, (hour_ago, hour_ago))
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").mkdir()
    # The environment that runs the tests. Its marker keeps make from installing anything.
    for part in ("bin", "lib", "pyvenv.cfg"):
        (folder / ".venv" / part).symlink_to(Path(sys.prefix) / part)
    (folder / ".venv" / ".ready").touch()
    return folder


def environment():
    """The tests' own variables without those of a surrounding make."""
    return {name: value for name, value in os.environ.items() if name not in MAKE_VARIABLES}


def make(checkout, *arguments, timeout=60):
    return subprocess.run(
        ["make", *arguments],
        check=False,
        cwd=checkout,
        env=environment(),
        capture_output=True,
        encoding="utf-8",
        timeout=timeout,
    )


def planned(checkout, *arguments):
    """The commands with which make would start stages, in order."""
    done = make(checkout, "-n", *arguments)
    assert done.returncode == 0, done.stderr
    assert "pip install" not in done.stdout
    return [line for line in done.stdout.splitlines() if " --config recipes/" in line]


def stages_of(commands):
    return [re.search(r"--config recipes/[\w-]+/(\w+)\.yaml", command)[1] for command in commands]


def touch(path):
    """Make a file newer than every result of `finished`."""
    moment = time.time() - 60
    os.utime(path, (moment, moment))


def targets():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return sorted({*re.findall(r"^([a-z][a-z_-]*):(?!=)", text, re.MULTILINE), *CHAIN} - {"force"})
