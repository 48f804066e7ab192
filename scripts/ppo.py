"""Train a policy with PPO (`sandan.PPOTrainer`) against a reward model, reward functions, or both.

CPU:
    accelerate launch --config_file recipes/accelerate_configs/cpu.yaml scripts/ppo.py \
        --config recipes/tiny/ppo.yaml

1 GPU:
    accelerate launch --config_file recipes/accelerate_configs/single_gpu.yaml scripts/ppo.py \
        --config recipes/english-small/ppo.yaml

8 GPUs:
    accelerate launch --config_file recipes/accelerate_configs/ddp.yaml scripts/ppo.py \
        --config recipes/english-small/ppo.yaml
"""

from sandan.evaluate.overoptimisation import TrueScoreArguments
from sandan.run.cli import run


COLUMNS = [("prompt",)]
WATCHED = (
    "episode",
    "objective/scores",
    "objective/kl",
    "val/response_tokens",
    "val/stopped_share",
    "eps",
    "eval_objective/scores",
    "eval_objective/kl",
)


def main(config, judge, model_args, data, stage):
    from transformers import ProgressCallback
    from trl import get_peft_config

    from sandan import PPOTrainer
    from sandan.core.errors import UserError
    from sandan.data.loading import load_data
    from sandan.evaluate.judges import refuse_known_judge
    from sandan.evaluate.overoptimisation import (
        curve_metrics,
        judged_prompts,
        keep_best_by,
        ppo_curve,
        true_score_function,
    )
    from sandan.models import loading as models
    from sandan.ppo.reward_functions import named_function
    from sandan.training import train_and_save as training

    keep_best_by(judge, config)
    policy_path = models.require_model(model_args.model_name_or_path or config.sft_model_path, stage)
    paths = [policy_path]
    if config.reward_model_path or not config.reward_funcs:
        paths.append(models.require_model(config.reward_model_path, stage, "reward_model_path"))
    tokenizer = models.load_tokenizer(policy_path, model_args.model_revision, padding_side="left")
    for reward_path in paths[1:]:
        models.check_same_tokens(tokenizer, reward_path, "reward_model_path")
    if judge.true_reward_model_path:
        refuse_known_judge(judge.true_reward_model_path, paths[1:], "true_reward_model_path")
    train, held_out = load_data(data, stage, COLUMNS, tokenizer)
    functions = [named_function(name, train.column_names, "reward_funcs") for name in config.reward_funcs or []]
    policy, *rewards = load_models(config, model_args, tokenizer, *paths)
    rewards += functions
    if judge.true_score != "none":
        held_out = judged_prompts(judge, held_out)
        # The true score is only measured: its weight is 0.
        config.reward_weights = [*(config.reward_weights or [1.0] * len(rewards)), 0.0]
        rewards.append(true_score_function(judge, tokenizer, stage))
    given = {"train_dataset": train, "eval_dataset": held_out, "processing_class": tokenizer}
    try:
        trainer = PPOTrainer(policy, rewards, config, **given, peft_config=get_peft_config(model_args))
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"{stage.output_dir}: {error}") from error
    check_lengths(trainer, paths)
    if trainer.pop_callback(ProgressCallback):
        trainer.add_callback(training.ShortProgress(WATCHED))
    output = training.train(trainer, stage)
    metrics = {"updates": trainer.args.num_total_batches, "dropped_prompts": trainer.dropped_prompts}
    if trainer.watch.stopped:
        metrics["stopped_at_step"] = trainer.state.global_step
    with training.saved_first(trainer, stage, trainer.policy_model):
        if held_out is not None:
            measured = trainer.evaluate().items()
            metrics |= {key: value for key, value in measured if not key.endswith(training.NOT_METRICS)}
            metrics |= curve_metrics(ppo_curve(trainer.state.log_history))
    stage.finish(summary(trainer.state.log_history, output.metrics["train_runtime"]) | metrics, config.device.type)


def load_models(config, model_args, tokenizer, policy_path, *reward_paths):
    """Return the policy, and of each reward model (one or none) the model, or its adapter's folder for the critic."""
    from pathlib import Path

    import torch
    from transformers import AutoModelForCausalLM

    from sandan.models import checks
    from sandan.models import loading as models

    # Trained weights are float32: at PPO's learning rates updates of bfloat16 weights are rounded away.
    defaults = {"dtype": model_args.dtype or torch.float32, **models.quantization(model_args)}
    policy = models.load_model(AutoModelForCausalLM, policy_path, **models.model_init_kwargs(model_args, defaults))
    models.check_vocabulary(policy.config, tokenizer, policy_path)
    checks.check_direction(policy, policy_path)
    checks.make_savable(policy, policy_path)
    rewards = []
    for reward_path in reward_paths:
        reward = adapter = Path(reward_path, "adapter")
        if config.critic_backbone != "adapter" or not adapter.is_dir():
            reward = models.load_classifier(reward_path, "reward_model_path", dtype=defaults["dtype"])
            models.check_vocabulary(reward.config, tokenizer, reward_path)
        rewards.append(reward)
    return policy, *rewards


def check_lengths(trainer, paths):
    """Refuse prompts that leave no room for an answer in the positions of one of the models."""
    from sandan.models.checks import check_prompts, config_of

    for rows in (trainer.train_dataset, trainer.eval_dataset):
        lengths = [len(ids) for ids in rows["input_ids"]] if rows is not None else []
        for path in paths:
            if (found := config_of(path)) is not None:
                new = trainer.args.response_length
                check_prompts(lengths, new, "response_length", found, path, "max_prompt_tokens")


def summary(history: list[dict], seconds: float) -> dict[str, float]:
    """Return the first and last logged values of the main metrics, and the pace of the run.

    A run that is shorter than `logging_steps` has logged none.
    """
    logs = [entry for entry in history if "objective/scores" in entry]
    if not logs:
        return {"train_seconds": seconds}
    names = ("objective/scores", "objective/kl", "val/response_tokens", "val/stopped_share", "val/explained_variance")
    metrics = {
        f"{name}_{when}": entry[name] for name in names for when, entry in (("first", logs[0]), ("last", logs[-1]))
    }
    episodes = logs[-1]["episode"]
    return metrics | {"episodes": episodes, "episodes_per_second": episodes / seconds, "train_seconds": seconds}


if __name__ == "__main__":
    run(
        main,
        "sandan.ppo:PPOConfig",
        TrueScoreArguments,
        "trl:ModelConfig",
        "sandan.data.loading:DataArguments",
        preview="sandan.ppo.preview",
    )
