"""TRL's names: take a call that was written for TRL's PPOTrainer of 0.12 to 1.12, and point from older names to their place.

Both rules are applied to the keywords of a call, before anything else reads them.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainingArguments


# The order of `trl.PPOTrainer`'s arguments, and TRL's names for some (`reward_model` in all releases, the others in 0.12).
TRL_ORDER = (
    "args",
    "processing_class",
    "model",
    "ref_model",
    "reward_model",
    "train_dataset",
    "value_model",
    "data_collator",
    "eval_dataset",
    "optimizers",
    "callbacks",
    "peft_config",
)
RENAMED = {
    "reward_model": "reward_funcs",
    "config": "args",
    "policy": "model",
    "ref_policy": "ref_model",
    "tokenizer": "processing_class",
}
# What TRL 0.11 and older had: keywords of the trainer, its methods and attributes, and settings (with today's, if any).
OLD_KEYWORDS = ("dataset", "optimizer", "lr_scheduler", "num_shared_layers", "training_data_collator")
OLD_METHODS = (
    "step",
    "generate",
    "current_device",
    "dataloader",
    "kl_ctl",
    "log_stats",
    "prepare_dataloader",
    "prepare_model_inputs",
    "batched_forward_pass",
    "train_minibatch",
    "compute_rewards",
    "compute_advantages",
    "record_step_stats",
    "gather_stats",
)
OLD_SETTINGS = {
    "ppo_epochs": "num_ppo_epochs",
    "init_kl_coef": "kl_coef",
    "target": "target_kl",
    "horizon": "kl_horizon",
    "use_score_scaling": "scale_scores",
    "log_with": "report_to",
    "model_name": "the trainer's argument model",
    "query_dataset": "the trainer's argument train_dataset",
    "reward_model": "the trainer's argument reward_funcs",
    "steps": "total_episodes",
    "adap_kl_ctrl": "target_kl",
    "kl_penalty": "kl_estimator",
    "early_stopping": "max_approx_kl",
    "ratio_threshold": "max_approx_kl",
    "use_score_norm": "center_rewards",
    "tracker_project_name": "project",
    **dict.fromkeys(
        ("task_name", "tracker_kwargs", "accelerator_kwargs", "project_kwargs", "push_to_hub_if_best_kwargs")
    ),
    **dict.fromkeys(("forward_batch_size", "backward_batch_size", "global_batch_size", "compare_steps")),
    **dict.fromkeys(("global_backward_batch_size", "total_ppo_epochs")),
    **dict.fromkeys(("optimize_cuda_cache", "optimize_device_cache", "is_encoder_decoder", "is_peft_model")),
}
LEGACY = "of TRL 0.11 and older: from sandan.legacy import PPOConfig, PPOTrainer (docs/migration.md)"


def takes_trl_calls(init: Callable) -> Callable:
    """Let a trainer's `__init__` take TRL's order of arguments and TRL 0.12's names too."""
    own_order = init.__code__.co_varnames[1 : init.__code__.co_argcount]

    @functools.wraps(init)
    def wrapped(self: Any, *positional: Any, **keywords: Any) -> None:
        init(self, **named_arguments(positional, keywords, own_order))

    return wrapped


def named_arguments(positional: Sequence[Any], keywords: dict[str, Any], own_order: Sequence[str]) -> dict[str, Any]:
    """Return a trainer's arguments by their names of today. They are in TRL's order if the settings come first.

    Raises:
        TypeError: if they are those of TRL 0.11, or one is given twice.
    """
    in_trl_order = bool(positional) and isinstance(positional[0], TrainingArguments)
    order = TRL_ORDER if in_trl_order else own_order
    if in_trl_order and isinstance([*positional, None][1], nn.Module):
        raise TypeError(f"PPOTrainer(config, model, ...): the order of arguments {LEGACY}")
    if len(positional) > len(order):
        raise TypeError(f"PPOTrainer takes at most {len(order)} arguments, {len(positional)} given; name them")
    found: dict[str, Any] = {}
    for name, value in [*zip(order, positional, strict=False), *keywords.items()]:
        if name in OLD_KEYWORDS:
            raise TypeError(f"{name}: an argument {LEGACY}")
        today = RENAMED.get(name, name)
        if found.get(today) is not None and value is not None:
            raise TypeError(f"{name}: given twice" + (f", also as {today}" if today != name else ""))
        found[today] = value if found.get(today) is None else found[today]
    model = found.get("model")
    if "model" in found and not isinstance(model, (str, Path, nn.Module)):
        raise TypeError(f"model: expected a causal LM or a path, found {type(model).__name__}")
    if hasattr(model, "v_head"):
        raise TypeError("model: a value-head model is a policy in sandan.legacy; here give the causal LM inside it")
    args = found.get("args")
    if args is not None and not hasattr(args, "num_ppo_epochs"):
        raise TypeError(f"args: expected a sandan.PPOConfig, found {type(args).__module__}.{type(args).__name__}")
    return found


def no_attribute(trainer: Any, name: str) -> AttributeError:
    """Return the error for an attribute that a trainer lacks; for a method of TRL 0.11 it names its place."""
    if name in OLD_METHODS:
        return AttributeError(f"PPOTrainer.{name}: {LEGACY}")
    return AttributeError(f"'{type(trainer).__name__}' object has no attribute '{name}'")


def takes_trl_settings(config: type) -> type:
    """Let a settings class take TRL's `exp_name`, as `run_name`, and refuse the settings of TRL 0.11 in one line."""
    init = config.__init__

    @functools.wraps(init)
    def wrapped(self: Any, *positional: Any, **keywords: Any) -> None:
        for name in keywords:
            if name in OLD_SETTINGS:
                instead = OLD_SETTINGS[name]
                raise TypeError(f"{name}: a setting {LEGACY}" + (f" (here: {instead})" if instead else ""))
        experiment = keywords.pop("exp_name", None)
        if experiment is not None and keywords.get("run_name") is None:
            keywords["run_name"] = experiment
        init(self, *positional, **keywords)

    config.__init__ = wrapped
    return config
