"""Names of TRL 0.11's PPO, whose loop of `generate` and `step` is in `sandan.legacy`: each is refused with one line."""

from typing import Any, NoReturn


OLD_ATTRIBUTES = ("current_device", "dataloader", "generate", "kl_ctl", "log_stats", "prepare_dataloader", "step")
OLD_SETTINGS = (
    "accelerator_kwargs",
    "adap_kl_ctrl",
    "backward_batch_size",
    "compare_steps",
    "early_stopping",
    "exp_name",
    "forward_batch_size",
    "global_backward_batch_size",
    "global_batch_size",
    "horizon",
    "init_kl_coef",
    "is_encoder_decoder",
    "is_peft_model",
    "kl_penalty",
    "log_with",
    "model_name",
    "optimize_cuda_cache",
    "optimize_device_cache",
    "ppo_epochs",
    "project_kwargs",
    "push_to_hub_if_best_kwargs",
    "query_dataset",
    "ratio_threshold",
    "reward_model",
    "steps",
    "target",
    "task_name",
    "total_ppo_epochs",
    "tracker_kwargs",
    "tracker_project_name",
    "use_score_norm",
    "use_score_scaling",
)
# Those whose meaning a setting of `sandan.PPOConfig` has.
NOW = {
    "early_stopping": "max_approx_kl",
    "horizon": "kl_horizon",
    "init_kl_coef": "kl_coef",
    "log_with": "report_to",
    "ppo_epochs": "num_ppo_epochs",
    "target": "target_kl",
    "use_score_scaling": "scale_scores",
}


def refuse_old_settings(settings: dict[str, Any]) -> None:
    """Refuse settings of TRL 0.11 in one line.

    Raises:
        TypeError: as for every unknown setting.
    """
    old = sorted(set(OLD_SETTINGS) & set(settings))
    if old:
        now = ", ".join(f"{name} is {NOW[name]}" for name in old if name in NOW)
        raise TypeError(
            f"PPOConfig: {', '.join(old)}: of TRL <= 0.11, for which there is sandan.legacy: from sandan.legacy import "
            f"PPOConfig, PPOTrainer{f'; here {now}' if now else ''} (docs/migration.md)"
        )


def missing_attribute(trainer: Any, name: str) -> NoReturn:
    """Say that a trainer has no such attribute; of a name of TRL 0.11 where it is (`PPOTrainer.__getattr__`)."""
    where = ""
    if name in OLD_ATTRIBUTES:
        where = (
            ", which is of TRL <= 0.11; use from sandan.legacy import PPOConfig, PPOTrainer, or train() "
            "(docs/migration.md)"
        )
    raise AttributeError(f"{type(trainer).__name__!r} object has no attribute {name!r}{where}")
