"""The command `sandan`: read the command line, and do what it says.

Nothing but the standard library is imported until a stage starts, so `--help` answers at once.
"""

import os
import shlex
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from ..core.chain import STAGES
from ..core.errors import UserError
from ..core.places import command_for, shown
from .arguments import COMMANDS, make_parser
from .names import nearest
from .plan import CPU, Job, Request, find_launch_file, make_job, plan, script, this_python
from .recipes import RESULT, Recipe, all_recipes, copy_recipe, find_recipe


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command and exit: 0 done, 2 a mistake of the user, else the exit code of the stage that failed."""
    try:
        code = run(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of the output has enough, as in `sandan chain --plan | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    sys.exit(code)


def run(argv: list[str]) -> int:
    """Run the command line and return its exit code."""
    parser = make_parser()
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        raise UserError(f"{argv[0]}: no such command of sandan; {nearest(argv[0], COMMANDS)}")
    args, options = parser.parse_known_args(argv or ["--help"])
    if getattr(args, "help", False) or getattr(args, "help_all", False):
        return show_help(args)
    return COMMAND_FUNCTIONS.get(args.command, run_stages)(args, options)


def show_help(args: Namespace) -> int:
    """Print the help of a command that has a script, and then that of the script."""
    print(f"{args.own_help()}\n── the script ──\n", flush=True)
    name = STAGES[args.command].script or args.command if args.command in STAGES else args.command
    return run_program(
        (this_python(), str(script(name)), "--help_all" if args.help_all else "--help"), only_plan=False
    )


# ---- Stages ----


def run_stages(args: Namespace, options: list[str]) -> int:
    """Run a stage and what it needs, or the chain of a recipe, each stage only if something before it has changed."""
    recipe = find_recipe(args.recipe)
    if getattr(args, "annotator", None) is not None:
        return open_ranking_page(recipe, args, options)
    until = args.command if args.command in STAGES else getattr(args, "until", None)
    if options and until is None:
        own = [f"--{name}" for name in vars(args) if name in ("recipe", "launch", "seed", "until", "plan")]
        raise UserError(
            f"{options[0]}: no option of sandan {args.command}; {nearest(options[0], own)} Options of a stage are for that "
            "stage, as in: sandan sft --learning_rate 1e-3"
        )
    request = Request(recipe, args.launch, until, tuple(options), getattr(args, "seed", None))
    return run_jobs(plan(request), args)


def open_ranking_page(recipe: Recipe, args: Namespace, options: list[str]) -> int:
    """Open the page on which a person ranks the candidate answers; candidates are made before if there are none.

    What people did lies outside `outputs/`, where `make clean` does not reach.
    """
    jobs = plan(Request(recipe, args.launch, "candidates"))
    candidates_file = str(recipe.output_dir("candidates") / "candidates.jsonl")
    files = ("--candidates_file", candidates_file, "--log_file", recipe.judgement_file())
    arguments = (*files, "--annotator", args.annotator)
    command = (this_python(), shown(script("annotate")), *arguments, *options)
    page = Job("rank", recipe.name, command, needs=frozenset(job.name for job in jobs))
    return run_jobs([*jobs, page], args)


def run_jobs(jobs: list[Job], args: Namespace) -> int:
    """Run the jobs, or print them if only the plan is wanted."""
    if args.plan:
        for job in jobs:
            print(job)
        return 0
    if not jobs:
        print("nothing to do: no stage has to run again")
        return 0
    from .runner import Runner

    began = time.monotonic()
    code = Runner(side_by_side=args.launch == CPU).run(jobs)
    if not code and len(jobs) > 1:
        print(f"{len(jobs)} stages in {time.monotonic() - began:,.0f} s")
    return code


def check(args: Namespace, options: list[str]) -> int:
    """Check every stage of a recipe without training; return 2 if one is not ready."""
    recipe = find_recipe(args.recipe)
    launch_file = find_launch_file(CPU)
    jobs = [make_job(row, Request(recipe), launch_file, ("--dry_run", "true", *options)) for row in recipe.rows]
    if args.plan:
        return run_jobs(jobs, args)
    from .runner import Runner

    runner = Runner(side_by_side=False, keep_going=True)
    runner.run(jobs)
    if runner.failed:
        raise UserError(f"not ready: {' '.join(runner.failed)}")
    return runner.code


# ---- Recipes, results, this program ----


def init(args: Namespace, options: list[str]) -> int:
    """Copy a recipe to the current folder."""
    refuse(options)
    folder = copy_recipe(args.name, find_recipe(args.recipe))
    print(f"{folder}: edit its files; next: sandan check --recipe {args.name}")
    return 0


def list_recipes(args: Namespace, options: list[str]) -> int:
    """List the recipes, each with the folder and the heading of its README."""
    refuse(options)
    recipes = all_recipes()
    width = max(map(len, recipes))
    for name, recipe in recipes.items():
        print(f"{name:<{width}}  {recipe.description()}  ({shown(recipe.folder)})")
    return 0


def push(args: Namespace, options: list[str]) -> int:
    """Push the results of a recipe to the Hub."""
    folder = find_recipe(args.recipe).output_dir("report").parent
    command = (this_python(), shown(script("push")), "--recipe_dir", str(folder), *options)
    return run_program(command, args.plan)


def chat(args: Namespace, options: list[str]) -> int:
    """Talk to the models of a recipe, or to those that the options name."""
    recipe = find_recipe(args.recipe)
    given = {option.partition("=")[0] for option in options}
    # What people did lies outside `outputs/`, as that of the ranking page.
    log = () if "--log_file" in given else ("--log_file", recipe.judgement_file())
    models = () if "--models" in given else ("--models", *models_of(recipe, only_finished=not args.plan))
    return run_program((this_python(), shown(script("chat")), *models, *log, *options), args.plan)


def models_of(recipe: Recipe, only_finished: bool) -> list[str]:
    """Return the models that the recipe compares, each as `NAME=FOLDER`.

    Args:
        only_finished: leave out the stages that have not made theirs yet.

    Raises:
        UserError: if none is left of those that the recipe trains.
    """
    models, own = recipe.evaluated_models(), {str(recipe.output_dir(row.name)) for row in recipe.rows}
    missing = {name for name, path in models.items() if path in own and not (Path(path) / RESULT).is_file()}
    if only_finished and missing >= {name for name, path in models.items() if path in own}:
        raise UserError(f"{recipe.name}: no model is trained yet; run `{command_for('chain', recipe.name)}` first")
    return [f"{name}={path}" for name, path in models.items() if not only_finished or name not in missing]


def completion(args: Namespace, options: list[str]) -> int:
    """Print the completion script of a shell."""
    refuse(options)
    try:
        import shtab
    except ImportError:
        raise UserError("completion needs the package shtab: pip install shtab") from None
    print(shtab.complete(make_parser(), args.shell))
    return 0


def run_program(command: tuple[str, ...], only_plan: bool) -> int:
    """Become the program, or print its command if only the plan is wanted."""
    if only_plan:
        print(shlex.join(command))
        return 0
    sys.stdout.flush()
    os.execv(command[0], command)


def refuse(options: list[str]) -> None:
    """Refuse options of a command that has no script to hand them to."""
    if options:
        raise UserError(f"{options[0]}: no such option (--help lists them)")


COMMAND_FUNCTIONS = {
    "chat": chat,
    "check": check,
    "completion": completion,
    "init": init,
    "push": push,
    "recipes": list_recipes,
}
