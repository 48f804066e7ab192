"""Over-optimisation: whether the true score still rises while PPO raises the proxy reward that it optimises.

PPO is judged on held-out prompts by a score that it is not trained on, and compared with the best of n samples of the
SFT model, chosen by the same reward model. Both are plotted over sqrt(KL), as in Gao et al. 2023 (arXiv 2210.10760).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..core.errors import UserError
from ..core.stage import Stage


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from ..ppo.config import PPOConfig

TRUE_SCORE = "true_score"


@dataclass
class TrueScoreArguments:
    """Settings of the true score, which judges PPO during training but is not part of its reward."""

    true_score: Literal["world", "reward_model", "none"] = field(
        default="none",
        metadata={"help": "Judge of the held-out answers: the embedded world's oracle, a reward model, or nobody."},
    )
    true_reward_model_path: str | None = field(
        default=None, metadata={"help": "A reward model held back from PPO, for true_score: reward_model."}
    )
    true_score_prompts: int = field(default=150, metadata={"help": "How many held-out prompts it judges, the first."})

    def __post_init__(self):
        if (self.true_score == "reward_model") != (self.true_reward_model_path is not None):
            raise ValueError("true_reward_model_path: goes with true_score: reward_model, and only with it")


def judged_prompts(args: TrueScoreArguments, held_out: "Dataset | None") -> "Dataset":
    """Return the held-out prompts whose answers are judged.

    Raises:
        UserError: if there is no held-out data.
    """
    if held_out is None:
        raise UserError(f"true_score: {args.true_score}: nothing to judge; name eval_data_files or held_out_share")
    return held_out.select(range(min(args.true_score_prompts, len(held_out))))


def true_score_function(
    args: TrueScoreArguments, tokenizer: "PreTrainedTokenizerBase", stage: Stage
) -> Callable[..., list[float]]:
    """Return a reward function `(prompts, completions) -> scores` for `PPOTrainer`, to be used with weight 0."""
    if args.true_score == "world":
        from ..world.oracle import judge

        def true_score(prompts: list[Any], completions: list[str]) -> list[float]:
            return [judge(prompt, text).score for prompt, text in zip(prompts, completions, strict=True)]

        return true_score

    from ..models.loading import check_same_tokens, load_reward_model, require_model
    from ..models.rendering import encode_answers
    from ..models.scoring import score_rows

    path = require_model(args.true_reward_model_path, stage, "true_reward_model_path")
    check_same_tokens(tokenizer, path, "true_reward_model_path")
    model = load_reward_model(path, key="true_reward_model_path")

    def true_score(prompts: list[Any], completions: list[str]) -> list[float]:
        return score_rows(model, encode_answers(tokenizer, prompts, completions))

    return true_score


def keep_best_by(args: TrueScoreArguments, config: "PPOConfig") -> None:
    """Let `load_best_model_at_end` keep the checkpoint that the true score likes best.

    Raises:
        UserError: if there is no true score and no `metric_for_best_model`, so that nothing says which is best.
    """
    # "loss" is the default of TrainingArguments, and PPO's evaluation has no loss.
    if not config.load_best_model_at_end or config.metric_for_best_model != "loss":
        return
    if args.true_score == "none":
        raise UserError(
            "load_best_model_at_end: no judge says which checkpoint is best; give true_score (a judge that is not part "
            "of the reward), or metric_for_best_model"
        )
    config.metric_for_best_model, config.greater_is_better = f"eval_rewards/{TRUE_SCORE}", True


def ppo_curve(history: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Return a point for each evaluation in a `log_history`: `step`, `kl` (nats per answer), `proxy`, `true`.

    The list is empty if the log has no true score.
    """
    points = []
    for entry in history:
        if f"eval_rewards/{TRUE_SCORE}" not in entry:
            continue
        names = [name for name in entry if name.startswith("eval_rewards/") and not name.endswith(TRUE_SCORE)]
        points.append(
            {
                "step": entry["step"],
                "kl": max(entry["eval_objective/kl"], 0.0),
                "proxy": sum(entry[name] for name in names),
                "true": entry[f"eval_rewards/{TRUE_SCORE}"],
            }
        )
    return points


def best_of_n_curve(metrics: dict[str, Any]) -> list[dict[str, float]]:
    """Return the best-of-n measurement of the reward stage in the form of [`ppo_curve`], with `n` for `step`.

    The KL of best-of-n is at most log n - (n - 1) / n (Stiennon et al. 2020, appendix G.3; Beirami et al. 2024).
    """
    numbers = sorted(int(name.rpartition("/")[2]) for name in metrics if name.startswith("best_of_n_proxy/"))
    return [
        {
            "n": n,
            "kl": math.log(n) - (n - 1) / n,
            "proxy": metrics[f"best_of_n_proxy/{n}"],
            "true": metrics[f"best_of_n/{n}"],
        }
        for n in numbers
    ]


def curve_metrics(points: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the first, best and last true score of a PPO curve, and the KL at the best."""
    if not points:
        return {}
    best = max(points, key=lambda point: point["true"])
    return {
        "true_score_first": points[0]["true"],
        "true_score_best": best["true"],
        "true_score_last": points[-1]["true"],
        "true_score_best_kl": best["kl"],
    }
