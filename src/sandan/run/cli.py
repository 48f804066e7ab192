"""The entry point of every `scripts/<stage>.py`: parse, open the stage, run it, report mistakes in one line."""

import contextlib
import gc
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..core import environment, signals
from ..core.errors import GateError, Interrupted, UserError
from ..core.stage import RunArguments, Stage, TrainingRunArguments, effective_config, is_main_process
from ..training.checkpoints import disk_problem


# The environment variable that shows where in the program a mistake was found.
TRACEBACK = "SANDAN_TRACEBACK"
REPORT = "the traceback below, the command, and the folder's recipe.yaml (SECURITY.md, if it is about security)"


def run(
    main: Callable[..., None],
    *dataclass_specs: str | type,
    stage: bool = True,
    preview: str | None = None,
    row: Callable[..., str] | None = None,
) -> None:
    """Parse the command line into `dataclass_specs` and call `main(*values, stage)`.

    Args:
        main: the stage. Its module's docstring opens the `--help` text.
        dataclass_specs: dataclasses, or `"module:Class"` for those whose import takes seconds (they import
            `transformers.TrainingArguments`): `--help` only names them, `--help_all` imports them and lists their
            fields.
        stage: false for a program without a stage folder; it is called as `main(*values)`.
        preview: for a stage that trains, the module that shows its rows and sizes in a dry run (see
            [`sandan.training.preview`]).
        row: for a script of several stages, a function of the values that names the row of [`sandan.core.chain`] that
            this run is; by default it is the script's own name.

    Exit codes: 0 done; 1 a gate was not passed, training diverged or the program failed; 2 a mistake that the user can
    correct; 75 stopped by SIGTERM or SIGINT (the same command resumes the run).
    """
    environment.set_defaults()
    logging.basicConfig(level=logging.INFO if is_main_process() else logging.ERROR, format="%(message)s")
    for noisy in ("httpx", "httpcore", "filelock", "datasets", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    guarded(lambda: _run(main, dataclass_specs, sys.argv[1:], stage, preview, row), interruptible=stage)


def guarded(action: Callable[[], None], interruptible: bool = True) -> None:
    """Call `action`; if an error or a signal ends it, print one line and exit with the code given in [`run`].

    Args:
        interruptible: whether to handle SIGTERM and SIGINT here. A server handles them itself.
    """
    line, code = "", 0
    try:
        with signals.handled() if interruptible else contextlib.nullcontext():
            action()
    except Interrupted as error:
        line, code = f"stopped by {error}; the same command goes on", signals.REQUEUE_EXIT_CODE
    except (GateError, FloatingPointError) as error:
        line, code = f"error: {error}", 1
    except UserError as error:
        line, code = f"error: {error}", 2
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
    except Exception as error:
        if (problem := disk_problem(error)) is None:
            logging.getLogger(__name__).error("This is a fault of the program. Please report it: %s", REPORT)
            raise
        line = f"error: {getattr(error, 'filename', None) or 'a file'}: cannot be read or written: {problem}"
        code = 2
    # Run after the except blocks, so the traceback no longer keeps the trainer alive.
    _destroy_process_group(together=code in (0, signals.REQUEUE_EXIT_CODE))
    if code:
        _exit(line, code)


def _destroy_process_group(together: bool) -> None:
    """Destroy the process group, if there is one.

    torch may abort a process that exits while it belongs to a group. A process that frees a distributed model while
    the interpreter shuts down can wait forever for torch's own threads, so the model is freed before.

    Args:
        together: whether all processes of the group exit now. If not, the group is left as it is.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        gc.collect()
        if together:
            distributed.destroy_process_group()


def _exit(line: str, code: int) -> NoReturn:
    """Print the line, below progress bars that are still open, and exit."""
    bars = sys.modules.get("tqdm")
    for bar in list(getattr(bars.tqdm, "_instances", ())) if bars else ():
        bar.close()
    if is_main_process():
        print(line, file=sys.stderr)
    sys.exit(code)


def _run(
    main: Callable[..., None],
    dataclass_specs: tuple[str | type, ...],
    argv: list[str],
    is_stage: bool,
    preview: str | None,
    row: Callable[..., str] | None,
) -> None:
    run_options = options_of(preview)
    help_wanted = {"-h", "--help", "--help_all"} & set(argv)
    if help_wanted:
        print(
            _help(
                main, [*dataclass_specs, *([run_options] if is_stage else [])], everything="--help_all" in help_wanted
            )
        )
        return
    from .config import StrictParser, split_config_option
    from .mistakes import preparing
    from .options import refuse_idle

    program = Path(main.__code__.co_filename).stem
    parser = StrictParser([*(_load(spec) for spec in dataclass_specs), *([run_options] if is_stage else [])])
    parsed = parser.parse(argv)
    refuse_idle(program, parsed, parser.origins)
    variables = {"env": parser.environment}
    origins = parser.origins | ({"env": parser.environment_origin} if parser.environment else {})
    with preparing(effective_config(parsed) | variables, origins):
        _try_out(parsed)
    if os.environ.get(environment.ONLY_SETTINGS):
        return
    if not is_stage:
        main(*parsed)
        return
    *values, options = parsed
    config_path, _ = split_config_option(argv)
    stage = _stage_of(parsed, config_path, frozenset(parser.origins))
    if options.dry_run:
        from .dry_run import DryRun

        shown = None if preview is None else importlib.import_module(preview)
        with preparing(stage.config | variables, origins):
            report = DryRun(stage, values, parser.origins, main.__globals__.get("COLUMNS"), shown).report()
        print(report)
        return
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        # Otherwise ZeRO-3 shards models while they are created (it ignores `zero3_init_flag: false`), and the initial
        # weights differ from those of a run with one process.
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
    mistakes = preparing(stage.config | variables, origins, stage.has_begun_writing)
    with stage.opened(), mistakes, pushed(stage, row(*values) if row else program, values):
        main(*values, stage)
    if is_main_process():
        print(f"{stage.name}: done, see {stage.output_dir}/result.json")
        if stage.next_command():
            print(f"next: {stage.next_command()}")


def _try_out(parsed: Sequence[Any]) -> None:
    """Make what the settings of a training ask for, as far as it needs no model."""
    for value in parsed:
        if hasattr(value, "lr_scheduler_type"):
            from ..training.trial import try_optimizer, try_reports, try_schedule

            try_optimizer(value)
            try_schedule(value)
            try_reports(value)


def _stage_of(parsed: Sequence[Any], config_path: str | None, given: frozenset[str]) -> Stage:
    """Return the stage that was asked for; a recipe file gives it its name and that of its recipe.

    Args:
        parsed: the values of all dataclasses, the run's own options last.
        given: names of the options that were given.
    """
    config = effective_config(tuple(parsed))
    if not config.get("output_dir"):
        raise UserError("--output_dir: missing; the convention is outputs/<recipe>/<stage>")
    output_dir = Path(config["output_dir"])
    name = Path(config_path).stem if config_path else output_dir.name
    recipe = Path(config_path).resolve().parent.name if config_path else output_dir.resolve().parent.name
    recipe_dir = Path(config_path).parent if config_path else None
    seed = config.get("seed", 0)
    return Stage(name, recipe, output_dir, seed, config, recipe_dir=recipe_dir, run=parsed[-1], given=given)


@contextlib.contextmanager
def pushed(stage: Stage, row: str, values: Sequence[Any]) -> Iterator[None]:
    """Push the stage's folder after the block if `push_to_hub` is set; check the rights to do so before the block.

    The push of `Trainer` is switched off: it would upload pickled files, and do so before the run has succeeded.
    """
    if not stage.config.get("push_to_hub"):
        yield
        return
    from huggingface_hub import HfApi

    from ..core.stage import read_result
    from ..hub.push import check_rights, one_stage, push, refuse_secrets

    for value in values:
        if hasattr(value, "push_to_hub"):
            value.push_to_hub = False
    api, repo_id = HfApi(), stage.config.get("hub_model_id")
    if is_main_process():
        check_rights(repo_id, api)
    yield
    if is_main_process():
        results = {row: read_result(stage.output_dir)}
        repository = one_stage(stage.output_dir, repo_id, results, row, None)
        refuse_secrets(repository)
        push([repository], stage.config.get("hub_private_repo") is False, api, logging.getLogger(__name__).info)


def options_of(preview: str | None) -> type[RunArguments]:
    """Return the class of run options: a stage with a preview trains, and has more options."""
    return RunArguments if preview is None else TrainingRunArguments


def _load(spec: str | type) -> type:
    if isinstance(spec, type):
        return spec
    module, _, name = spec.partition(":")
    return getattr(importlib.import_module(module), name)


def _help(main: Callable[..., None], dataclass_specs: Sequence[str | type], everything: bool) -> str:
    from .config import StrictParser

    heavy = [spec for spec in dataclass_specs if isinstance(spec, str)]
    shown = [_load(spec) for spec in dataclass_specs if everything or spec not in heavy]
    parser = StrictParser(shown, description=None, add_help=False)
    text = f"{sys.modules[main.__module__].__doc__.strip()}\n\n{parser.format_help()}"
    if heavy and not everything:
        names = ", ".join(spec.replace(":", ".") for spec in heavy)
        text += f"\nand every field of {names} (--help_all lists them)"
    return text
