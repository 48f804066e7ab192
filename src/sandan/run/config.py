"""Strict configuration: parse YAML and the command line into dataclasses, and refuse every typo.

`trl.TrlParser` does the parsing. Mistakes that it accepts are refused here, with file, line, key and the nearest valid
name: unknown or misspelt keys, abbreviations, duplicate keys, wrong types, keys that recent releases removed, and
tokens (which belong in the environment, never in a file or on a command line).
"""

import dataclasses
import difflib
import os
import re
import sys
import types
import typing
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

import yaml
from trl import TrlParser

from ..core.errors import UserError
from .mistakes import message_of
from .options import replaced_by_command_line
from .values import DEEPEST, TOKEN_KEYS, check_environment, check_value, token_message


# Keys that recent transformers and trl releases removed or renamed, and their replacement.
REMOVED_KEYS = {
    "evaluation_strategy": "eval_strategy",
    "fp16_backend": "fp16",
    "group_by_length": "train_sampling_strategy: group_by_length",
    "logging_dir": "the environment variable TENSORBOARD_LOGGING_DIR",
    "max_prompt_length": "nothing (over-long prompts are counted and dropped)",
    "max_seq_length": "max_length",
    "no_cuda": "use_cpu",
    "overwrite_output_dir": "nothing (a stage only replaces its own recipe's output)",
    "push_to_hub_token": "the environment variable HF_TOKEN, or `hf auth login`",
    "save_safetensors": "nothing (weights are always safetensors)",
    "tokenizer": "processing_class (in Python) or tokenizer_name_or_path",
    "torch_dtype": "dtype",
    "torchdynamo": "torch_compile_backend",
    "use_mps_device": "nothing (the device is found by itself)",
    "warmup_ratio": "warmup_steps (a value below 1 is a ratio)",
}

# Settings that would break what a stage promises: the values that are allowed, and the reason or the alternative.
REFUSED = {
    "enable_jit_checkpoint": (
        (False,),
        "it saves in the middle of a step, and dropout then resumes otherwise; SIGTERM is handled here after the step",
    ),
    "logging_nan_inf_filter": ((False,), "it hides losses that are not finite; a run stops at one here"),
    "resume_from_checkpoint": ((None,), "use resume: auto, never, or a checkpoint's folder"),
    "save_only_model": ((False,), "such a checkpoint cannot be resumed; the final model is saved alone anyway"),
    "hub_always_push": ((False,), "a stage is pushed once, when it is finished"),
    "hub_strategy": (("end", "every_save"), "a stage is pushed once, when it is finished; checkpoints stay here"),
    "trust_remote_code": ((False,), "no code from the Hub is run; use an architecture of transformers"),
}


class StrictParser(TrlParser):
    """A [`trl.TrlParser`] that raises [`UserError`] for every input that would otherwise be ignored or misread.

    Args:
        dataclass_types: dataclasses whose fields are the valid keys.
    """

    def __init__(self, dataclass_types: Iterable[type], **kwargs):
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(list(dataclass_types), **kwargs)
        self.hints: dict[str, Any] = {}
        # Where each given value came from; every key that is not here has its default.
        self.origins: dict[str, str] = {}
        # The variables of the environment that the recipe sets.
        self.environment: dict[str, str] = {}
        self.environment_origin = ""
        for dataclass_type in self.dataclass_types:
            self.hints |= {
                name: hint
                for name, hint in typing.get_type_hints(dataclass_type).items()
                if name in dataclass_type.__dataclass_fields__ and dataclass_type.__dataclass_fields__[name].init
            }

    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message} (--help lists the options)")

    def parse(self, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
        """Parse `argv` (default: `sys.argv[1:]`), with `--config FILE` or `--config=FILE` giving YAML defaults.

        Returns:
            `tuple`: one instance per dataclass type, in their order.

        Raises:
            UserError: with one line that names the file, the line, the key and the fix.
        """
        arguments = list(sys.argv[1:] if argv is None else argv)
        config_path, arguments = split_config_option(arguments)
        for argument in arguments:
            key = argument.removeprefix("--").partition("=")[0].replace("-", "_")
            if argument.startswith("--") and key in TOKEN_KEYS:
                raise UserError(token_message(f"command line: --{key}"))
            if argument.startswith("--") and argument.partition("=")[0] not in self._option_string_actions:
                # Checked before argparse complains about a missing option, which may be this one, misspelt.
                self._unknown("command line", argument.partition("=")[0], prefix="--")
        given = self._given(arguments)
        lines: dict[str, int] = {}
        if config_path is not None:
            values, lines = self._read_config(config_path)
            for key in replaced_by_command_line(given) & values.keys():
                del values[key], lines[key]
            self.set_defaults_with_config(**values)
        namespace, unknown = self.parse_known_args(arguments)
        if unknown:
            option = next((word for word in unknown if word.startswith("-")), unknown[0])
            self._unknown("command line", option.partition("=")[0], prefix="--")
        place = f"{config_path} and the command line" if config_path else "command line"
        for key, value in vars(namespace).items():
            from_file = key in lines and key not in given
            where = f"{config_path}:{lines[key]}: {key}" if from_file else f"command line: --{key}"
            if from_file or key in given:
                self.origins[key] = f"{config_path}:{lines[key]}" if from_file else "command line"
            check_value(value, key, where)
            if key in REFUSED and (from_file or key in given) and value not in REFUSED[key][0]:
                raise UserError(f"{where}: {value}: refused: {REFUSED[key][1]}")
        try:
            return self.parse_args_into_dataclasses(args=arguments, look_for_args_file=False)
        except UserError:
            raise
        except Exception as error:  # nothing but settings is in play here
            raise UserError(f"{place}: {message_of(error)}") from error

    def _given(self, arguments: Sequence[str]) -> set[str]:
        """Return the names of the options on the command line; `--no_x` gives `x`."""
        names = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
        return {self._option_string_actions[name].dest for name in names if name in self._option_string_actions}

    def _read_config(self, path: str) -> tuple[dict[str, Any], dict[str, int]]:
        values, lines = read_yaml(path)
        environment = values.pop("env", None) or {}
        check_environment(environment, f"{path}:{lines.get('env')}")
        for key, value in values.items():
            place = f"{path}:{lines[key]}"
            if key in TOKEN_KEYS:
                raise UserError(token_message(f"{place}: {key}"))
            if key not in self.hints:
                self._unknown(place, key)
            values[key] = check_type(value, self.hints[key], f"{place}: {key}")
            choices = next((action.choices for action in self._actions if action.dest == key), None)
            if choices and value is not None and value not in choices:
                raise UserError(f"{place}: {key}: expected one of {', '.join(map(str, choices))}, found {value!r}")
        self.environment = {name: str(value) for name, value in environment.items()}
        self.environment_origin = f"{path}:{lines.get('env')}"
        os.environ |= self.environment
        return values, lines

    def _unknown(self, place: str, key: str, prefix: str = "") -> NoReturn:
        name = key.removeprefix("--").replace("-", "_")
        key = key if key.isprintable() else repr(key)
        if name in REMOVED_KEYS:
            raise UserError(f"{place}: {key}: removed from this release; use {REMOVED_KEYS[name]}")
        close = difflib.get_close_matches(name, self.hints, n=1, cutoff=0.6)
        fix = f"did you mean {prefix}{close[0]}?" if close else "--help lists the valid names"
        raise UserError(f"{place}: {key}: unknown {'option' if prefix else 'key'}; {fix}")


def split_config_option(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Take `--config FILE` or `--config=FILE` out of `arguments`; return FILE or None, and the rest."""
    paths, rest, remaining = [], [], iter(arguments)
    for argument in remaining:
        if argument == "--config":
            paths.append(next(remaining, ""))
        elif argument.startswith("--config="):
            paths.append(argument.partition("=")[2])
        else:
            rest.append(argument)
    if len(paths) > 1:
        raise UserError("command line: --config: given twice; a stage has one recipe file")
    if paths and (not paths[0] or paths[0].startswith("--")):
        raise UserError("command line: --config: needs a file, as in --config recipes/tiny/sft.yaml")
    return (paths[0] if paths else None), rest


def read_yaml(path: str | Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Read a YAML mapping; return its values and the line of each top-level key (1-based). Refuse duplicate keys."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe file; `ls recipes/*/` shows those there are") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None:
            _refuse_duplicates(root, path)
        values = yaml.safe_load(text)
    except RecursionError:
        raise UserError(f"{path}: nested more than {DEEPEST} levels deep") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{path}{line}: not valid YAML: {problem}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of `key: value` lines, found {type(values).__name__}")
    return values, {key.value: key.start_mark.line + 1 for key, _ in root.value}


def _refuse_duplicates(node: yaml.Node, path: str | Path, above: tuple[yaml.Node, ...] = ()) -> None:
    """Refuse keys given twice, top-level keys that are not plain names (numbers, lists, `<<`), and endless depth."""
    if node in above:
        raise UserError(f"{path}:{node.start_mark.line + 1}: not valid YAML: an alias that holds itself")
    if len(above) > DEEPEST:
        raise UserError(f"{path}:{node.start_mark.line + 1}: nested more than {DEEPEST} levels deep")
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or (not above and key.tag != "tag:yaml.org,2002:str"):
                shown = key.value if isinstance(key, yaml.ScalarNode) else "[...]"
                raise UserError(f"{path}:{line}: {shown}: not a valid key; expected a plain name")
            if key.value in seen:
                raise UserError(f"{path}:{line}: {key.value}: given twice (first on line {seen[key.value]}); keep one")
            seen[key.value] = line
    children = [child for pair in node.value for child in pair] if isinstance(node, yaml.MappingNode) else node.value
    for child in children if isinstance(node, yaml.CollectionNode) else ():
        _refuse_duplicates(child, path, (*above, node))


def check_type(value: Any, hint: Any, place: str) -> Any:
    """Return `value`, converted to `hint` where YAML 1.1 reads a number as text (`5e-5`).

    Raises:
        UserError: if `value` does not fit `hint`; the message names `place` and the expected type.
    """
    matched, converted = _match(value, hint, place)
    if not matched:
        raise UserError(f"{place}: expected {_describe(hint)}, found {value!r} ({type(value).__name__})")
    return converted


def _match(value: Any, hint: Any, place: str) -> tuple[bool, Any]:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True, value
    if origin in (Union, types.UnionType):
        # Exact types first: `float | str` must leave "linear" a string and `int | float` leave 3 an integer.
        for option in sorted(arguments, key=lambda option: type(value) is not (get_origin(option) or option)):
            matched, converted = _match(value, option, place)
            if matched:
                return True, converted
        return False, value
    if origin is Literal:
        return value in arguments, value
    if origin is list:
        if not isinstance(value, list):
            return False, value
        items = [_match(item, arguments[0], f"{place}[{index}]") for index, item in enumerate(value)]
        return all(matched for matched, _ in items), [converted for _, converted in items]
    if dict in (origin, hint):
        return isinstance(value, dict), _read_numbers(value)
    if dataclasses.is_dataclass(hint):
        return (True, _match_dataclass(value, hint, place)) if isinstance(value, dict) else (False, value)
    return _match_scalar(value, hint)


def _match_scalar(value: Any, hint: Any) -> tuple[bool, Any]:
    if hint is type(None) or value is None:
        return hint is type(None) and value is None, value
    if isinstance(hint, type) and issubclass(hint, Enum):
        return value in [member.value for member in hint], value
    if hint is float and not isinstance(value, bool) and isinstance(value, (int, float, str)):
        try:
            return True, float(value)
        except ValueError:
            return False, value
    if hint in (int, float, str, bool, dict, list):
        return type(value) is hint, value
    return True, value


def _read_numbers(value: Any) -> Any:
    """Convert numbers inside a mapping that YAML 1.1 reads as text (`min_lr: 1e-6`)."""
    if isinstance(value, dict):
        return {key: _read_numbers(item) for key, item in value.items()}
    return float(value) if isinstance(value, str) and re.fullmatch(r"[-+]?\d+e[-+]?\d+", value) else value


def _match_dataclass(value: dict[str, Any], hint: type, place: str) -> dict[str, Any]:
    hints = typing.get_type_hints(hint)
    for key in value:
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.6)
            fix = f"did you mean {close[0]}?" if close else f"valid: {', '.join(hints)}"
            raise UserError(f"{place}: {key}: unknown key; {fix}")
    return {key: check_type(item, hints[key], f"{place}: {key}") for key, item in value.items()}


def _describe(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in arguments if option is not type(None))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(repr(member.value) for member in hint)
    names = {float: "a number", int: "a whole number", str: "text", bool: "true or false", dict: "a mapping"}
    if origin is list:
        return f"a list of {_describe(arguments[0])}"
    return names.get(hint, getattr(hint, "__name__", str(hint)))
