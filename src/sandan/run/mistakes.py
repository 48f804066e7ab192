"""Exceptions of libraries that a user's setting has caused, as the one line that names the setting.

The rule: until a run begins to write, it only builds what its settings ask for. An exception in that time which a given
setting explains is a mistake of the user, whichever library found it. Any other exception, and every exception later,
is a fault of the program and keeps its traceback.
"""

import contextlib
import fnmatch
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..core.errors import GateError, UserError
from ..models.loading import first_line
from ..training.checkpoints import disk_problem


OPTIMIZER = "optim optim_* adam_* learning_rate critic_learning_rate weight_decay"
SCHEDULE = "lr_scheduler_* warmup_steps learning_rate"
MODEL = "model_init_kwargs attn_implementation dtype model_revision load_in_* bnb_* *model_name_or_path *_model *_model_path"
# The functions (or files) that build a part of a run, ours and those of libraries, and the settings of that part.
PARTS = {
    "try_optimizer": OPTIMIZER,
    "create_optimizer": OPTIMIZER,
    "try_schedule": SCHEDULE,
    "create_scheduler": SCHEDULE,
    "new_model": "model_config objective",
    "from_pretrained": MODEL,
    "get_peft_model": "use_peft lora_* use_rslora use_dora *_adapter_name",
    "integration_utils.py": "report_to run_name project trackio_*",
    "gradient_checkpointing_enable": "gradient_checkpointing*",
    "create_accelerator_and_postprocess": "accelerator_config parallelism_config fsdp* deepspeed dataloader_*",
    "_get_dataloader": "dataloader_* per_device_*_batch_size accelerator_config train_sampling_strategy",
    "torch_call": "pad_to_multiple_of",
    "_prepare_dataset": "dataset_* max_length packing* chat_template_path pad_to_multiple_of",
    "apply_liger_kernel": "use_liger_kernel liger_kernel_config",
    "get_act_offloading_ctx_manager": "activation_offloading",
}
# Exceptions of wrong code, never of a wrong value.
FAULTS = (NameError, NotImplementedError, AssertionError, AttributeError)


@contextlib.contextmanager
def preparing(
    config: Mapping[str, Any], origins: Mapping[str, str], has_begun: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Turn an exception that a given setting explains into a [`UserError`], until `has_begun()`.

    Args:
        config: the settings, by name.
        origins: of each given setting: `command line`, or `file:line`.
        has_begun: whether the run has begun to write.
    """
    try:
        yield
    except (UserError, GateError, FloatingPointError):
        raise
    except Exception as error:
        settings = [] if has_begun() or disk_problem(error) else settings_behind(error, config, origins)
        if not settings:
            raise
        raise UserError(f"{places(settings, origins)}: {message_of(error)}") from error


def settings_behind(error: Exception, config: Mapping[str, Any], origins: Mapping[str, str]) -> list[str]:
    """Return the given settings that an exception is about; empty if there are none.

    They are those of the innermost part of the run ([`PARTS`]) that was being built, or those that the message names.
    Of several, those that the message is about are returned, else those of the command line: without it the recipe
    may well have run.
    """
    message = str(error)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        patterns = (PARTS.get(frame.name) or PARTS.get(Path(frame.filename).name, "")).split()
        part = [key for key in origins if any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)]
        if part:
            told = [key for key in part if _is_told(key, config.get(key), message)]
            return told or [key for key in part if origins[key] == "command line"] or part
    if isinstance(error, FAULTS):
        return []
    named = [key for key in origins if _names(key, config.get(key), message)]
    variables = config.get("env") or {}
    told = any(_has_word(message, text) for pair in variables.items() for text in pair)
    return named or (["env"] if told else [])


def places(settings: list[str], origins: Mapping[str, str]) -> str:
    """Return settings with the places where they were given: `command line: --optim, --adam_beta1`."""
    by_place: dict[str, list[str]] = {}
    for key in settings:
        by_place.setdefault(origins[key], []).append(f"--{key}" if origins[key] == "command line" else key)
    return "; ".join(f"{place}: {', '.join(keys)}" for place, keys in by_place.items())


def message_of(error: Exception) -> str:
    """Return the message of an exception on one line; a missing key alone would not say what is wrong."""
    text = first_line(error)
    return f"{text} is not known" if isinstance(error, KeyError) and " " not in text else text


def _is_told(key: str, value: Any, message: str) -> bool:
    texts = [text for text in value.values() if isinstance(text, str)] if isinstance(value, dict) else [str(value)]
    return _names(key, value, message) or any(_has_word(message, text) for text in texts)


def _names(key: str, value: Any, message: str) -> bool:
    """Return whether a message has the name of a setting, or of an entry of a setting that is a mapping."""
    names = [key, *(map(str, value) if isinstance(value, dict) else ())]
    # Names of one word (`seed`) are words of any message too.
    marked = [rf"(?:[`'\"-]|: ){re.escape(name)}\b" for name in names]
    return any(
        _has_word(message, name) and ("_" in name or re.search(pattern, message))
        for name, pattern in zip(names, marked, strict=True)
    )


def _has_word(message: str, word: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(word)}(?![\w]|\.\d)", message, re.IGNORECASE) is not None
