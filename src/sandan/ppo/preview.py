"""The first prompts as PPO reads them, and the size of its four models, for a dry run."""

from typing import TYPE_CHECKING, Any

from ..models.memory import ModelSize, size_of
from ..training.preview import Sample, prompt_rows


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def rows(dataset: "Dataset", tokenizer: "PreTrainedTokenizerBase", config: Any, *_: Any) -> Sample:
    """Return the first prompts."""
    return prompt_rows(dataset, tokenizer, config.max_prompt_tokens)


def size(tokenizer: Any, missing: set[str], config: Any, judge: Any, model_args: Any, data: Any) -> ModelSize | None:
    """Return the size of policy and critic (trained) and of reference and reward model (frozen)."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    policy = size_of(AutoModelForCausalLM, model_args.model_name_or_path, missing)
    # Without a reward model the critic starts from the policy.
    critic_path = config.reward_model_path or model_args.model_name_or_path
    critic = size_of(AutoModelForSequenceClassification, critic_path, missing)
    if policy is None or critic is None:
        return None
    return ModelSize(policy.trained + critic.trained, policy.trained + critic.trained, policy.config)
