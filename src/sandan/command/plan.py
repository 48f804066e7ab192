"""Which stages of a recipe have to run, and the command that starts each of them.

A stage runs again only if its recipe file, its script, a data file named in its recipe or an earlier stage's
`result.json` is newer than its own `result.json`, or if it is given options or a seed.
"""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..core.chain import StageRow
from ..core.places import HOME, shown
from .recipes import RESULT, Recipe, find_launch_file


CPU = "cpu"


@dataclass(frozen=True)
class Job:
    """A stage that is to run.

    Args:
        name: of the stage.
        recipe: of the recipe.
        command: the program and its arguments.
        environment: variables that it gets beside those of this process.
        needs: the stages, of those that are to run, which must have run before.
        log: where its output goes if another stage has the terminal.
        python: whether the command is a script of this project on the CPU, so that it can be forked.
        launched: whether `accelerate launch` starts it.
    """

    name: str
    recipe: str
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    needs: frozenset[str] = frozenset()
    log: Path = Path(os.devnull)
    python: bool = False
    launched: bool = False

    def __str__(self) -> str:
        return shlex.join([*(f"{name}={value}" for name, value in self.environment.items()), *self.command])


@dataclass(frozen=True)
class Request:
    """Hold what the user asks for.

    Args:
        recipe: whose stages run.
        launch: the name of a launch file.
        until: the last stage; None for the whole recipe.
        options: for the script of the last stage.
        seed: for all stages, or None.
    """

    recipe: Recipe
    launch: str = CPU
    until: str | None = None
    options: tuple[str, ...] = ()
    seed: str | None = None


def plan(request: Request) -> list[Job]:
    """Return the stages that have to run, in the order of the chain.

    Raises:
        UserError: if the recipe lacks the stage that was asked for, or the launch file is not there.
    """
    launch_file = find_launch_file(request.launch)
    planned: dict[str, Job] = {}
    for row in wanted(request.recipe, request.until):
        needs = frozenset(row.needs) & planned.keys()
        seed = () if request.seed is None else ("--seed", request.seed)
        options = (*seed, *(request.options if row.name == request.until else ()))
        if options or needs or is_stale(row, request.recipe):
            planned[row.name] = make_job(row, request, launch_file, options, needs)
    return list(planned.values())


def wanted(recipe: Recipe, until: str | None) -> list[StageRow]:
    """Return the rows of the recipe that the stage needs, directly or not, itself the last."""
    if until is None:
        return recipe.rows
    recipe.require(until)
    names = {until}
    for row in reversed(recipe.rows):
        if row.name in names:
            names.update(row.needs)
    return [row for row in recipe.rows if row.name in names]


def is_stale(row: StageRow, recipe: Recipe) -> bool:
    """Return whether the stage has no result, or something that it is made of is newer than its result."""
    result = recipe.output_dir(row.name) / RESULT
    if not result.is_file():
        return True
    available = {earlier.name for earlier in recipe.rows}
    earlier = [recipe.output_dir(need) / RESULT for need in row.needs if need in available]
    sources = [recipe.file(row.name), script_of(row), *recipe.local_inputs(row.name), *earlier]
    return any(source.stat().st_mtime_ns > result.stat().st_mtime_ns for source in sources)


def script_of(row: StageRow) -> Path:
    """Return the path of the stage's script."""
    return script(row.script or row.name)


def script(name: str) -> Path:
    """Return the path of a script of the project."""
    return HOME / "scripts" / f"{name}.py"


def make_job(
    row: StageRow, request: Request, launch_file: Path, options: Sequence[str], needs: frozenset[str] = frozenset()
) -> Job:
    """Return the job of a stage: a plain process on the CPU, else the processes of `accelerate launch`."""
    recipe_file = request.recipe.file(row.name)
    arguments = (shown(script_of(row)), "--config", shown(recipe_file), *options)
    on_cpu = row.cpu_only or request.launch == CPU
    launcher = (beside_python("accelerate"), "launch", "--config_file", shown(launch_file), "--quiet")
    return Job(
        row.name,
        request.recipe.name,
        ((this_python(),) if on_cpu else launcher) + arguments,
        # One process on the CPU needs no launcher, which takes 2.5 s to start: it reads this from cpu.yaml.
        {"ACCELERATE_USE_CPU": "true"} if on_cpu else {},
        needs,
        request.recipe.output_dir(row.name).with_name(f"{row.name}.log"),
        # Variables that a recipe sets would come after the imports that read them.
        python=on_cpu and not re.search(r"^env:", request.recipe.text(row.name), re.MULTILINE),
        launched=not on_cpu,
    )


def this_python() -> str:
    """Return the path of the running Python, relative if it lies in the current folder."""
    return shown(Path(sys.executable))


def beside_python(program: str) -> str:
    """Return the path of a program that is installed beside this Python."""
    return shown(Path(sys.executable).with_name(program))
