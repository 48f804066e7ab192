"""The one entry point of every `scripts/<stage>.py`: parse, open the stage, run it, turn mistakes into one line."""

import importlib
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from .errors import GateError, UserError
from .stage import Stage, effective_config, is_main_process


def run(main: Callable[..., None], *dataclass_specs: str | type, stage: bool = True) -> None:
    """Parse the command line into `dataclass_specs` and call `main(*values, stage)`.

    Args:
        main: the stage. Its module's docstring opens the `--help` text.
        dataclass_specs: dataclasses, or `"module:Class"` for those whose import takes seconds (they hold
            `transformers.TrainingArguments`): `--help` names them, `--help_all` imports them and lists their fields.
        stage: false for a program that makes no stage's folder; it is called as `main(*values)`.

    Exit codes: 0 done, 1 a gate was not reached or the program failed, 2 a mistake the user can mend.
    """
    # Set before any Hugging Face import reads them.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.INFO if is_main_process() else logging.ERROR, format="%(message)s")
    for noisy in ("httpx", "httpcore", "filelock", "datasets", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        _run(main, dataclass_specs, sys.argv[1:], stage)
    except (UserError, GateError) as error:
        if is_main_process():
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)


def _run(main: Callable[..., None], dataclass_specs: tuple[str | type, ...], argv: list[str], is_stage: bool) -> None:
    help_wanted = {"-h", "--help", "--help_all"} & set(argv)
    if help_wanted:
        print(_help(main, dataclass_specs, everything="--help_all" in help_wanted))
        return
    from .config import StrictParser, split_config_option

    values = StrictParser(_load(spec) for spec in dataclass_specs).parse(argv)
    if not is_stage:
        main(*values)
        return
    config_path, _ = split_config_option(argv)
    config = effective_config(values)
    if not config.get("output_dir"):
        raise UserError("--output_dir: missing; the convention is outputs/<recipe>/<stage>")
    output_dir = Path(config["output_dir"])
    name = Path(config_path).stem if config_path else output_dir.name
    recipe = Path(config_path).resolve().parent.name if config_path else output_dir.resolve().parent.name
    recipe_dir = Path(config_path).parent if config_path else None
    stage = Stage(name, recipe, output_dir, config.get("seed", 0), config, recipe_dir=recipe_dir).open()
    try:
        main(*values, stage)
    except UserError:
        stage.restore()
        raise
    if is_main_process():
        print(f"{stage.name}: done, see {stage.output_dir}/result.json")
        if stage.next_command():
            print(f"next: {stage.next_command()}")


def _load(spec: str | type) -> type:
    if isinstance(spec, type):
        return spec
    module, _, name = spec.partition(":")
    return getattr(importlib.import_module(module), name)


def _help(main: Callable[..., None], dataclass_specs: tuple[str | type, ...], everything: bool) -> str:
    from .config import StrictParser

    heavy = [spec for spec in dataclass_specs if isinstance(spec, str)]
    shown = [_load(spec) for spec in dataclass_specs if everything or spec not in heavy]
    parser = StrictParser(shown, description=None, add_help=False)
    text = f"{sys.modules[main.__module__].__doc__.strip()}\n\n{parser.format_help()}"
    if heavy and not everything:
        names = ", ".join(spec.replace(":", ".") for spec in heavy)
        text += f"\nand every field of {names} (--help_all lists them)"
    return text
