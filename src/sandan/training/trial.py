"""Try what the settings ask for, before any time is spent on it: optimizer, schedule, and a new model's sizes.

`Trainer` makes optimizer and schedule when training begins, which may be an hour of tokenizing later, and the formula of
a schedule runs only step by step.
"""

import copy
import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from transformers import Trainer, get_scheduler
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.trainer_optimizer import is_optimizer_factory

from ..core.errors import UserError
from ..models.memory import model_bytes, readable_bytes


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, TrainingArguments

# These read the layers of the model itself.
NEED_MODEL = ("galore", "apollo", "lomo")
# As many steps of a schedule are tried as the run has, or so many.
MOST_STEPS = 1000
# The names that every configuration of transformers has for its sizes, if it has them.
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
PROBE_TOKENS = 2
# Targets of `report_to` that transformers does not list although they may be installed.
UNLISTED = ("azure_ml", "flyte")


def try_optimizer(args: "TrainingArguments") -> None:
    """Make the optimizer, and refuse an entry of `optim_args` that it does not read.

    Raises:
        Exception: of a library, about the settings of the optimizer.
    """
    name = getattr(args.optim, "value", args.optim)
    if any(part in name for part in NEED_MODEL):
        return
    optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    if not is_optimizer_factory(optimizer_class):
        optimizer_class([torch.nn.Parameter(torch.zeros(1))], **kwargs)
    entries = [entry.partition("=") for entry in (args.optim_args or "").replace(" ", "").split(",") if entry]
    for key, _, value in entries:
        if not _is_read(args, key, value):
            raise UserError(f"optim_args: {key}: {name} has no such setting")


def _is_read(args: "TrainingArguments", key: str, value: str) -> bool:
    """Return whether another value of an entry of `optim_args` makes another optimizer."""
    made = []
    for other in (value, "False" if value.lower() in ("true", "1", "yes") else "1", "2"):
        changed = copy.copy(args)
        changed.optim_args = f"{key}={other}"
        try:
            made.append(str(Trainer.get_optimizer_cls_and_kwargs(changed)))
        except Exception:  # noqa: BLE001 (an entry that is refused is read)
            return True
    return len(set(made)) > 1


def try_schedule(args: "TrainingArguments") -> None:
    """Make the schedule and go through its steps.

    Raises:
        UserError: if a learning rate is negative or not finite.
        Exception: of a library, about the settings of the schedule.
    """
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    steps = min(args.max_steps, MOST_STEPS) if args.max_steps > 0 else MOST_STEPS
    schedule = get_scheduler(
        args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps, args.lr_scheduler_kwargs
    )
    by_metric = args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
    for step in range(steps):
        optimizer.step()
        schedule.step(*([0.0] if by_metric else []))
        rate = optimizer.param_groups[0]["lr"]
        if not (math.isfinite(rate) and rate >= 0):
            raise UserError(
                f"lr_scheduler_kwargs: the learning rate of step {step + 1} of {steps:,} would be {rate:g}"
            )


def try_reports(args: "TrainingArguments") -> None:
    """Refuse a target of `report_to` whose package is not installed, or that there is not.

    Raises:
        UserError: naming those that there are.
    """
    targets = [args.report_to] if isinstance(args.report_to, str) else args.report_to or []
    there = get_available_reporting_integrations()
    for target in targets:
        if target not in ("all", "none", *UNLISTED, *there):
            reason = "its package is not installed" if target in INTEGRATION_TO_CALLBACK else "not known"
            raise UserError(f"report_to: {target}: {reason}; installed here: {', '.join(there) or 'none'}")


def check_sizes(config: "PretrainedConfig", path: str) -> None:
    """Refuse a model without layers, heads or width; some architectures take 0 for a size and train nothing.

    Args:
        path: the model's folder, or the setting that describes it.
    """
    text = config.get_text_config()
    for name in SIZES:
        size = getattr(text, name, None)
        if isinstance(size, int) and size < 1:
            own_name = text.attribute_map.get(name, name)
            raise UserError(f"{path}: {own_name}: {size}: a model needs 1 or more")


def check_memory(make: Callable[[], "PreTrainedModel"], path: str) -> None:
    """Refuse a model whose weights do not fit into the memory of this machine; it is made without weights for that.

    Args:
        make: a function that makes the model.
        path: the model's folder, or the setting that describes it.
    """
    with torch.device("meta"):
        needed = model_bytes(make())
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UserError(
            f"{path}: the weights take {readable_bytes(needed)}, but this machine has {readable_bytes(there)} of "
            "memory; make the model smaller"
        )


def try_forward(model: "PreTrainedModel") -> None:
    """Run two tokens: sizes that do not fit each other are found in the first forward pass, not before.

    A model without weights in memory is left out.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    training = model.training
    # As in training, because dropout is checked there only; what is drawn for it must not change the run.
    model.train()
    with torch.no_grad(), torch.random.fork_rng([] if model.device.type == "cpu" else None):
        model(input_ids=torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=model.device))
    model.train(training)
