"""Policy and critic as one module, with a forward pass that computes outputs at the response positions only."""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_model, save_file, save_model
from torch import nn
from transformers import AutoModelForSequenceClassification, GenerationConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME
from trl.trainer.utils import disable_dropout_in_model, selective_log_softmax_and_entropy

from ..models.loading import check_adapter, check_weights, forget_code, only_safetensors
from ..models.sampling import neutral_generation
from .inputs import forward_inputs, takes
from .parts import hidden_states, parts_of
from .shared_backbone import AdapterHead, Adapters, TrunkHead


# Models with a `save_pretrained` that `from_pretrained` reads.
SAVABLE = (PreTrainedModel, PeftModel, AdapterHead, TrunkHead)


def token_logprobs(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    responses: torch.Tensor,
    temperature: float,
    entropy_needs_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities of the response tokens and entropies at their positions, in nats at `temperature`.

    Args:
        model: a causal LM.
        input_ids, attention_mask (`(B, P + T - 1)`): prompts, left-padded, and all but the last response token.
        responses (`(B, T)`): the sampled tokens.

    Returns:
        Both `(B, T)`, float32. Logits exist for these positions only, never for the prompt.
    """
    width = responses.shape[1]
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    inputs = forward_inputs(base, input_ids, attention_mask)
    if takes(base, "logits_to_keep"):
        inputs["logits_to_keep"] = width
    logits = model(**inputs).logits[:, -width:]
    # On CUDA, TRL's kernel reads bfloat16 logits and computes in float32; elsewhere logits are converted to float32.
    logits = logits if logits.is_cuda else logits.float()
    return selective_log_softmax_and_entropy(logits, responses, entropy_needs_grad, temperature)


def token_values(
    value_model: PreTrainedModel | AdapterHead, input_ids: torch.Tensor, attention_mask: torch.Tensor, width: int
) -> torch.Tensor:
    """Return the critic's value before each of the `width` response tokens, `(B, T)` float32."""
    if isinstance(value_model, AdapterHead):
        return value_model.values(value_model.hidden_states(input_ids, attention_mask)[:, -width:])
    backbone, head = parts_of(value_model)
    return head(hidden_states(backbone, input_ids, attention_mask)[:, -width:]).squeeze(-1).float()


@contextlib.contextmanager
def head_inputs(policy: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the inputs of the policy's language-model head in the forward passes of the block."""
    seen: list[torch.Tensor] = []
    hook = policy.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        hook.remove()


class PolicyAndValue(nn.Module):
    """Policy and critic under one root, so that there is one optimizer and one distributed wrapper.

    Args:
        policy: a causal LM.
        value_model: a sequence classifier with one label and a linear `score` head, or a head on the policy's
            backbone.
        adapters: of the policy, if the critic is one of them.
    """

    # Sampling runs in eval mode, where activation checkpointing is inactive, so it need not be switched off.
    is_gradient_checkpointing = False

    def __init__(
        self,
        policy: nn.Module,
        value_model: PreTrainedModel | AdapterHead | TrunkHead,
        temperature: float,
        entropy_needs_grad: bool,
        adapters: Adapters | None = None,
    ):
        super().__init__()
        self.policy = policy
        self.value_model = value_model
        self.temperature = temperature
        self.entropy_needs_grad = entropy_needs_grad
        self.adapters = adapters
        super().train()

    def train(self, mode: bool = True) -> "PolicyAndValue":
        """Set the mode, and return at once if it is set already: Trainer calls this before every micro-batch."""
        return self if mode == self.training else super().train(mode)

    @property
    def config(self):
        """Return the policy's configuration, for callbacks, DeepSpeed and token alignment."""
        return self.policy.config

    @property
    def generation_config(self) -> GenerationConfig:
        return self.policy.generation_config

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, responses: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return log-probabilities, entropies and values, each `(B, T)`; arguments as in [`token_logprobs`]."""
        width = responses.shape[1]
        with head_inputs(self.policy) if isinstance(self.value_model, TrunkHead) else contextlib.nullcontext() as seen:
            logprobs, entropies = token_logprobs(
                self.policy, input_ids, attention_mask, responses, self.temperature, self.entropy_needs_grad
            )
        if seen:
            return logprobs, entropies, self.value_model.values(seen[-1][:, -width:])
        return logprobs, entropies, token_values(self.value_model, input_ids, attention_mask, width)

    def generate(self, **kwargs) -> torch.Tensor:
        """Call the policy's `generate`. As a method of the root it lets FSDP gather the root's weights first."""
        with neutral_generation(self.policy.get_base_model() if isinstance(self.policy, PeftModel) else self.policy):
            return self.policy.generate(**kwargs)

    @property
    def _no_split_modules(self) -> set[str]:
        """Return the names of layers that FSDP gathers one at a time; without them it would gather all at once."""
        models = (self.policy, self.value_model)
        return {name for model in models for name in getattr(model, "_no_split_modules", None) or ()}

    def tie_weights(self) -> None:
        """Tie weights again that a wrapper has separated (accelerate calls this while it makes shards)."""
        self.policy.tie_weights()

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None, **kwargs) -> None:
        for model in self._checkpointed():
            model.activation_checkpointing_enable(self._recomputing(activation_checkpointing_kwargs), **kwargs)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs) -> None:
        """Enable activation checkpointing, under the name of this method before transformers 5.2x."""
        for model in self._checkpointed():
            model.gradient_checkpointing_enable(self._recomputing(gradient_checkpointing_kwargs), **kwargs)

    def _checkpointed(self) -> list[nn.Module]:
        if isinstance(self.value_model, (AdapterHead, TrunkHead)):
            return [self.policy]
        critic = self.value_model
        # A critic of the user's own may have no such method, but its backbone does.
        return [self.policy, critic if isinstance(critic, (PreTrainedModel, PeftModel)) else parts_of(critic)[0]]

    def _recomputing(self, kwargs: dict | None) -> dict | None:
        if self.adapters is None:
            return kwargs
        return {**(kwargs or {}), "use_reentrant": False, "context_fn": self.adapters.recomputation}


def value_model_from_policy(policy: PreTrainedModel) -> PreTrainedModel:
    """Make a critic with a copy of the policy's backbone and a zero head, so that it starts at V = 0, not at noise."""
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    value_model = AutoModelForSequenceClassification.from_config(config, dtype=policy.dtype)
    value_model.base_model.load_state_dict(policy.base_model.state_dict())
    nn.init.zeros_(value_model.score.weight)
    return value_model


def given_or_loaded(auto_class: type, model: str | Path | nn.Module, **kwargs) -> nn.Module:
    """Return a given model, or load it from a path in float32 (bf16 weights do not move at PPO's learning rates)."""
    if not isinstance(model, (str, Path)):
        return model
    loaded = auto_class.from_pretrained(model, **only_safetensors(model, {"dtype": torch.float32, **kwargs}))
    forget_code(loaded)
    return loaded


def save_critic(critic: nn.Module, folder: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """Write a critic as a `from_pretrained` folder; of a module of the user's own only the weights."""
    if isinstance(critic, SAVABLE):
        critic.save_pretrained(folder, state_dict=state_dict)
        return
    folder.mkdir(parents=True, exist_ok=True)
    if state_dict is None:
        save_model(critic, str(folder / SAFE_WEIGHTS_NAME), metadata={"format": "pt"})
    else:
        save_file(state_dict, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})


def save_policy(policy: nn.Module, folder: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """Write a plain `from_pretrained` folder; for a policy with adapters, only its own adapter."""
    own = {"selected_adapters": [policy.active_adapter]} if isinstance(policy, PeftModel) else {}
    policy.save_pretrained(folder, state_dict=state_dict, **own)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load the weights that `save_pretrained` wrote into an existing model."""
    if isinstance(model, (AdapterHead, TrunkHead)):
        model.load_pretrained(folder)
    elif isinstance(model, PeftModel):
        check_adapter(folder, {})
        model.load_adapter(str(folder), model.active_adapter, is_trainable=True)
    elif not isinstance(model, SAVABLE):
        load_model(model, str(folder / SAFE_WEIGHTS_NAME))
    else:
        check_weights(folder, {})
        stored = type(model).from_pretrained(folder, dtype=model.dtype, use_safetensors=True)
        model.load_state_dict(stored.state_dict())


def disable_dropout(model: nn.Module) -> None:
    """Switch dropout off permanently, so that log-probs in training mode equal those in eval mode.

    TRL's function changes `nn.Dropout` modules; most of today's models hold attention dropout as a number instead.
    """
    disable_dropout_in_model(model)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def starts_a_critic(reward: nn.Module) -> bool:
    """Return whether a copy of a reward model can be a critic: a classifier with a linear `score` of one output."""
    parts = parts_of(reward) if isinstance(reward, (PreTrainedModel, PeftModel)) else None
    return parts is not None and getattr(parts[1], "out_features", None) == 1
