"""Refuse values that mean nothing, whether or not a library would notice: numbers out of range, tokens, bad paths."""

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..core.credentials import SECRETS
from ..core.errors import UserError


TOKEN_KEYS = {"hub_token", "token", "hf_token", "push_to_hub_token", "use_auth_token"}
# The deepest value that a setting of any library has is a few levels deep.
DEEPEST = 20
# What the launcher tells each process; with other values it would wait for processes that are not there.
OF_LAUNCHER = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
# Bytes of a file's name, on all usual file systems.
LONGEST_NAME = 255
# From here on a number is a typo: libraries cannot count so far, and the size of a float is no longer exact.
TOO_LARGE = 2**53
PATHS = ("output_dir", "recipe_dir", "log_file")


@dataclass(frozen=True)
class Limit:
    """Say which numbers have a meaning.

    Args:
        text: the numbers, as the message says them.
        holds: whether a finite number is one of them.
        options: names of options, separated by spaces.
    """

    text: str
    holds: Callable[[float], bool]
    options: str


LIMITS = [
    Limit(
        "1 or more",
        lambda number: number >= 1,
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps batch_size max_length "
        "max_new_tokens annotators save_total_limit eval_accumulation_steps ddp_timeout dataset_num_proc "
        "pad_to_multiple_of torch_empty_cache_steps dataloader_prefetch_factor ddp_bucket_cap_mb lora_r "
        "best_of_n_prompts",
    ),
    Limit(
        "0 or more",
        lambda number: number >= 0,
        "learning_rate temperature weight_decay max_grad_norm neftune_noise_alpha dataloader_num_workers eval_delay "
        "adam_epsilon center_rewards_coefficient router_aux_loss_coef",
    ),
    Limit("above 0", lambda number: number > 0, "num_train_epochs save_steps logging_steps eval_steps lora_alpha"),
    Limit(
        "0 or more and below 1",
        lambda number: 0 <= number < 1,
        "adam_beta1 adam_beta2 label_smoothing_factor lora_dropout",
    ),
    Limit("above 0 and below 1", lambda number: 0 < number < 1, "mlm_probability"),
    Limit("from 1 to 2**24", lambda number: 1 <= number <= 2**24, "vocab_size"),
    Limit("0 or more and below 2**32", lambda number: 0 <= number < 2**32, "seed data_seed"),
    Limit(
        "a share below 1, or whole steps",
        lambda number: number >= 0 and (number < 1 or float(number).is_integer()),
        "warmup_steps",
    ),
    Limit(
        "1 or more, or -1 where num_train_epochs ends the run",
        lambda number: number >= 1 or number == -1,
        "max_steps",
    ),
]
LIMIT_OF = {option: limit for limit in LIMITS for option in limit.options.split()}


def check_value(value: Any, key: str, place: str, depth: int = 0) -> None:
    """Refuse tokens at any depth of a value, NaN, numbers without a meaning, and paths that cannot be meant.

    Raises:
        UserError: naming the place.
    """
    if depth > DEEPEST:
        raise UserError(f"{place[:200]}…: nested more than {DEEPEST} levels deep")
    if isinstance(value, str) and value.startswith(("{", "[")):
        # A mapping on the command line is JSON; the dataclasses parse it later and report its errors.
        with contextlib.suppress(ValueError):
            value = _json(value, place)
    if isinstance(value, (dict, list)):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            if name in TOKEN_KEYS and item is not None:
                raise UserError(token_message(f"{place}: {name}"))
            check_value(item, "", f"{place}: {name}", depth + 1)
    elif isinstance(value, str):
        _check_text(value, key, place)
    elif isinstance(value, (int, float)):
        limit = LIMIT_OF.get(key)
        if math.isnan(value) or (limit and not (math.isfinite(value) and limit.holds(value))):
            raise UserError(f"{place}: expected a number{f', {limit.text}' if limit else ''}, found {value}")
        if limit and value >= TOO_LARGE:
            raise UserError(f"{place}: expected a number below 2**53, found {value}")


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{place}: nested more than {DEEPEST} levels deep") from None


def _check_text(text: str, key: str, place: str) -> None:
    if any(re.search(pattern, text) for pattern in SECRETS.values()):
        raise UserError(token_message(place))
    if key in PATHS and text.startswith("~"):
        raise UserError(f"{place}: {text}: `~` is not expanded here; write the whole path, or $HOME in the shell")
    if key in PATHS and any(len(os.fsencode(part)) > LONGEST_NAME for part in text.split("/")):
        raise UserError(f"{place}: {text[:40]}…: a name in it is longer than {LONGEST_NAME} bytes; give a shorter one")
    if key in PATHS and not text.isprintable():
        raise UserError(f"{place}: {text!r}: has characters that cannot be seen; give another name")


def check_environment(environment: Any, place: str) -> None:
    """Refuse what cannot be variables of the environment, and tokens in them.

    Raises:
        UserError: naming the variable.
    """
    if not isinstance(environment, Mapping):
        raise UserError(f"{place}: env: expected a mapping of NAME: value")
    for name, value in environment.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UserError(f"{place}: env: {name!r}: not a name of a variable (letters, digits and _)")
        if name in OF_LAUNCHER or name.startswith("ACCELERATE_"):
            raise UserError(f"{place}: env: {name}: the launcher sets it; give its options to `accelerate launch`")
        if any(word in name.upper() for word in ("TOKEN", "SECRET", "PASSWORD", "API_KEY")):
            raise UserError(token_message(f"{place}: env: {name}"))
        if not isinstance(value, (str, int, float)) or "\0" in str(value):
            raise UserError(f"{place}: env: {name}: expected text or a number, found {value!r}")
        check_value(value, "", f"{place}: env: {name}")


def token_message(place: str) -> str:
    """Return the line about a token at a place."""
    return f"{place}: tokens do not belong here (they end up in checkpoints); set HF_TOKEN or run `hf auth login`"
