"""Build the models of a PPO run from the caller's arguments: policy, critic, rewards and reference."""

import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from trl.models.utils import prepare_deepspeed
from trl.trainer.utils import use_adapter

from ..models.layer_compilation import compile_layers
from ..models.score_scale import fold_scale
from .config import PPOConfig
from .ema import EMA_FOLDER, PolicyAverage
from .parts import check_critic
from .policy_and_value import (
    PolicyAndValue,
    disable_dropout,
    given_or_loaded,
    load_weights,
    save_critic,
    save_policy,
    starts_a_critic,
    value_model_from_policy,
)
from .precision import warn_of_stuck_weights
from .rewards import ModelReward, Reward, RewardFunction, make_rewards
from .sharding import complete, exact_outputs, fsdp_plugin, shard_frozen, uses_deepspeed
from .shared_backbone import AdapterHead, Adapters, TrunkHead, critic_adapter


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

VALUE_MODEL_FOLDER = "value_model"


@dataclass
class Models:
    """The models of a run.

    Args:
        policy: a causal LM, with its adapters if it has any.
        rewards: models or functions that score the answers.
        reward_weights: a weight for each reward, `(rewards,)`.
        value_model: the critic.
        ref_model: the frozen reference; None if it is the policy with other adapters.
        adapters: of the policy, if critic and rewards are further adapters on the same backbone.
        critic_mean: the number to subtract from the critic's values, which begin on the reward model's scale.
        average: of the policy's weights, if it is kept.
    """

    policy: nn.Module
    rewards: list[Reward]
    reward_weights: torch.Tensor
    value_model: nn.Module
    ref_model: PreTrainedModel | None
    adapters: Adapters | None
    critic_mean: float
    average: PolicyAverage | None = None

    def all(self) -> list[nn.Module]:
        """Return all models in use. With a shared backbone, some of them are adapters."""
        models = (self.policy, self.value_model, self.ref_model, *self.reward_models())
        return [model for model in models if model is not None]

    def trained(self, args: PPOConfig) -> PolicyAndValue:
        """Return policy and critic as one module."""
        temperature, entropy = args.logits_temperature, args.entropy_coef > 0
        return PolicyAndValue(self.policy, self.value_model, temperature, entropy, self.adapters)

    def reward_models(self) -> list[PreTrainedModel | AdapterHead]:
        """Return the rewards that are models."""
        return [reward.model for reward in self.rewards if isinstance(reward, ModelReward)]

    def first_reward(self) -> "PreTrainedModel | AdapterHead | RewardFunction":
        """Return the first reward, a model or a function."""
        first = self.rewards[0]
        return first.model if isinstance(first, ModelReward) else first.function

    def make_ready(self, accelerator: Accelerator, args: PPOConfig, columns: Sequence[str] | None) -> None:
        """Place the frozen models, try the rewards, compile the layers of all models, start the policy's average.

        Args:
            columns: of the training data, if there is any.
        """
        if (fsdp := fsdp_plugin(accelerator)) is not None:
            exact_outputs(fsdp)
        self._place_frozen_models(accelerator)
        for reward in self.rewards:
            reward.check(columns)
        rates = {"model": args.learning_rate, "value_model": args.critic_learning_rate or args.learning_rate}
        for (name, rate), trained in zip(rates.items(), (self.policy, self.value_model), strict=True):
            warn_of_stuck_weights(name, trained.parameters(), rate)
        if args.torch_compile:
            self._compile(accelerator)
        if args.policy_ema_decay is not None:
            self.average = PolicyAverage(self.policy, args.policy_ema_decay)

    def _place_frozen_models(self, accelerator: Accelerator) -> None:
        fsdp = fsdp_plugin(accelerator) is not None
        for model in self.reward_models():
            if getattr(model, "is_quantized", False):
                continue
            if fsdp:
                complete(model, accelerator)
            else:
                model.to(accelerator.device)
        if self.ref_model is None:
            return
        if uses_deepspeed(accelerator):
            self.ref_model = prepare_deepspeed(self.ref_model, accelerator)
        elif fsdp:
            self.ref_model = shard_frozen(complete(self.ref_model, accelerator), accelerator)
        else:
            self.ref_model.to(accelerator.device)

    def _compile(self, accelerator: Accelerator) -> None:
        """Compile the layers of every model. Trainer would compile only the wrapper."""
        accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
        for model in self.all():
            compile_layers(model, dynamic=True)
        if self.adapters is not None:
            self.adapters.backbone.get_input_embeddings().register_forward_hook(
                # With a gradient at its input, the first layer can share the compiled code of the other layers.
                lambda module, args, output: output.requires_grad_(torch.is_grad_enabled())
            )

    @contextlib.contextmanager
    def reference(self, policy: nn.Module, adapter_name: str | None) -> Iterator[nn.Module]:
        """Give the reference model in the block; if it is the policy with other adapters (or none), switch adapters.

        Args:
            policy: the policy as it is trained.
            adapter_name: the name of the reference's adapter.
        """
        if self.ref_model is not None:
            yield self.ref_model
            return
        with use_adapter(policy, adapter_name) if self.adapters is None else self.adapters.using(adapter_name):
            yield policy

    def save(
        self,
        policy: nn.Module,
        value_model: nn.Module,
        tokenizer: "PreTrainedTokenizerBase",
        folder: Path,
        state_dict: dict[str, torch.Tensor] | None,
    ) -> None:
        """Write the policy at the root and the critic in `value_model/`, both plain `from_pretrained` folders.

        Args:
            policy, value_model: without wrappers.
            state_dict: weights of both together, if they had to be gathered from shards.
        """

        def part(name: str) -> dict[str, torch.Tensor] | None:
            return state_dict and {
                key.removeprefix(name): value for key, value in state_dict.items() if key.startswith(name)
            }

        save_policy(policy, folder, part("policy."))
        save_critic(value_model, folder / VALUE_MODEL_FOLDER, part("value_model."))
        tokenizer.save_pretrained(folder)
        if self.average is not None:
            self.average.save(folder)
            tokenizer.save_pretrained(folder / EMA_FOLDER)

    def load(self, folder: Path) -> None:
        """Load the weights that [`save`] wrote."""
        load_weights(self.policy, folder)
        load_weights(self.value_model, folder / VALUE_MODEL_FOLDER)
        if self.average is not None:
            self.average.load(folder)


def build_models(
    policy: nn.Module,
    rewards_given: tuple[Any, Any, "PreTrainedTokenizerBase"],
    value_model: Any,
    ref_model: Any,
    peft_config: PeftConfig | None,
    args: PPOConfig,
) -> Models:
    """Return the models of a run.

    Args:
        policy: a loaded model.
        rewards_given: rewards, their tokenizers and the policy's.
        value_model, ref_model, peft_config, args: as in [`PPOTrainer`].

    Raises:
        ValueError: if arguments exclude each other.
    """
    if ref_model is policy:
        raise ValueError("ref_model is the policy itself, which is trained; give a copy, or leave it out for one")
    if rewards_given[0] is None:
        raise ValueError("give reward_funcs (its name in TRL: reward_model)")
    adapters = None
    if args.critic_backbone == "own":
        # A critic with its own backbone must be made before adapters are added to the policy.
        rewards = make_rewards(*rewards_given)
        critic = _own_critic(value_model, rewards, policy, args)
        policy = _with_adapters(policy, peft_config, args)
    else:
        if value_model is not None:
            raise ValueError(f'value_model: with critic_backbone="{args.critic_backbone}" there is none to give')
        policy = _with_adapters(policy, peft_config, args)
        rewards, critic, adapters = _on_the_backbone(policy, rewards_given, args)
    weights = args.reward_weights or [1.0] * len(rewards)
    if len(weights) != len(rewards):
        raise ValueError(f"reward_weights: {len(weights)} for {len(rewards)} reward functions")
    reference = _reference(ref_model, policy)
    models = Models(policy, rewards, torch.tensor(weights), critic, reference, adapters, _fold_scale(critic))
    for model in models.all():
        disable_dropout(model)
    freeze_the_rest(models)
    return models


def _fold_scale(critic: nn.Module) -> float:
    """Return the number to subtract from the critic's values: it must be on the reward model's scale too."""
    head, config = getattr(critic, "score", None), getattr(critic, "config", None)
    return 0.0 if isinstance(critic, TrunkHead) or None in (head, config) else fold_scale(head, config)


def freeze_the_rest(models: Models) -> None:
    """Freeze rewards and reference, except what policy and critic share with them.

    In policy and critic trainable is what the caller left trainable.
    """
    if not any(weight.requires_grad for weight in models.policy.parameters()):
        logger.warning(
            "model: none of its weights is trainable (adapters need is_trainable=True), so only the critic learns"
        )
    trained = {id(weight) for model in (models.policy, models.value_model) for weight in model.parameters()}
    for model in (models.ref_model, *models.reward_models()):
        for weight in model.parameters() if model is not None else ():
            if id(weight) not in trained:
                weight.requires_grad_(False)


def _own_critic(value_model: Any, rewards: list[Reward], policy: nn.Module, args: PPOConfig) -> nn.Module:
    """Return the critic: the given model, else a copy of the first reward model, else of the policy's backbone."""
    first = rewards[0]
    if any(isinstance(reward, ModelReward) and value_model is reward.model for reward in rewards):
        raise ValueError("value_model is the reward model itself, which stays frozen; give a copy or leave it out")
    if value_model is not None:
        critic = given_or_loaded(AutoModelForSequenceClassification, value_model, num_labels=1)
    elif isinstance(first, ModelReward) and first.own_tokenizer is None and starts_a_critic(first.model):
        critic = copy.deepcopy(first.model)
        critic = critic.merge_and_unload() if isinstance(critic, PeftModel) else critic
        # The copy is ours, so that it does not matter whether the reward was frozen.
        critic.requires_grad_(True)
    elif isinstance(policy, PeftModel):
        raise ValueError("value_model: needed with a PeftModel; or give a plain model and peft_config")
    else:
        critic = value_model_from_policy(policy)
    check_critic(critic)
    if isinstance(critic, PeftModel) and args.gradient_checkpointing:
        critic.enable_input_require_grads()
    return critic


def _on_the_backbone(
    policy: nn.Module, rewards_given: tuple, args: PPOConfig
) -> tuple[list[Reward], nn.Module, Adapters | None]:
    """Return rewards, critic and adapters if the critic shares the policy's backbone."""
    if args.critic_backbone == "policy":
        return make_rewards(*rewards_given), TrunkHead(policy), None
    if not isinstance(policy, PeftModel):
        raise ValueError('critic_backbone: "adapter" needs peft_config, or a policy with adapters')  # noqa: TRY004
    adapters = Adapters(policy)
    rewards = make_rewards(*rewards_given, adapters)
    first = rewards[0].model if isinstance(rewards[0], ModelReward) else None
    critic = critic_adapter(adapters, first)
    shared = "policy, critic and reward" if isinstance(first, AdapterHead) else "policy and critic"
    logger.info("one backbone: %s are adapters on it", shared)
    return rewards, critic, adapters


def _with_adapters(policy: nn.Module, peft_config: PeftConfig | None, args: PPOConfig) -> nn.Module:
    """Add the adapters to be trained to the policy, if there are any, and return it."""
    if peft_config is not None:
        if isinstance(policy, PeftModel):
            raise ValueError("peft_config: the model has adapters already; merge them first or leave it out")
        policy = get_peft_model(policy, peft_config)
    if isinstance(policy, PeftModel):
        if args.model_adapter_name is not None:
            policy.set_adapter(args.model_adapter_name)
        if args.gradient_checkpointing:
            policy.enable_input_require_grads()
    return policy


def _reference(ref_model: str | PreTrainedModel | None, policy: nn.Module) -> PreTrainedModel | None:
    """Return the frozen reference, or None if it is the policy with other adapters."""
    if ref_model is not None:
        return given_or_loaded(AutoModelForCausalLM, ref_model).eval()
    if isinstance(policy, PeftModel):
        return None
    return copy.deepcopy(policy).eval().requires_grad_(False)
