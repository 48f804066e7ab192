"""One frozen backbone for policy, reference, critic and reward: adapters (Hu et al. 2021, arXiv 2106.09685) and heads.

A GPU holds one model instead of four. The policy is the backbone with its adapter, the reference is the backbone
without adapters, and the critic and a reward model trained on this backbone are further adapters with linear heads.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import CONFIG_NAME

from ..models.loading import check_adapter
from ..models.score_scale import ScoreScale
from .inputs import forward_inputs


CRITIC, REWARD = "critic", "reward"
HEAD_KEY = "base_model.model.score.weight"
HEAD_FILE = "value_head.safetensors"


class Adapters:
    """Switch for the adapters of a policy. Outside of [`using`] the policy's own adapter is active.

    PEFT's own `set_adapter` goes through all modules several times and makes only a single adapter trainable. Here
    layers are switched about a hundred times per update, and the backward pass goes through two adapters.

    Args:
        policy: with its own adapter active.

    Raises:
        ValueError: if the adapter trains whole modules, which cannot be switched off.
    """

    def __init__(self, policy: PeftModel):
        self.policy = policy
        self.active = self.own = policy.active_adapter
        if policy.peft_config[self.own].modules_to_save:
            raise ValueError('critic_backbone: "adapter" needs a peft_config without modules_to_save')
        self._find_layers()

    def _find_layers(self) -> None:
        self.layers = [module for module in self.policy.modules() if isinstance(module, BaseTunerLayer)]

    @property
    def backbone(self) -> nn.Module:
        """Return the transformer without a head, with the adapters in its layers."""
        return self.policy.get_base_model().base_model

    @contextlib.contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Use this adapter (None: no adapter) in forward passes of the block."""
        before = self.active
        try:
            self._activate(name)
            yield
        finally:
            self._activate(before)

    def _activate(self, name: str | None) -> None:
        if name == self.active:
            return
        for layer in self.layers:
            layer._disable_adapters = name is None
            layer._active_adapter = [name or self.own]
        self.active = name

    def add(self, name: str, config: PeftConfig, trained: bool) -> None:
        """Add an adapter with this configuration. A new adapter has no effect until it is trained or loaded."""
        config = copy.deepcopy(config)
        config.task_type, config.modules_to_save, config.inference_mode = TaskType.CAUSAL_LM, None, not trained
        self.policy.add_adapter(name, config)
        self.policy.set_requires_grad(self.own)
        self.policy.set_requires_grad(name, trained)
        self._find_layers()

    def load(self, name: str, weights: Mapping[str, torch.Tensor], source: Path | str) -> None:
        """Load weights that PEFT saved into an adapter.

        Raises:
            ValueError: if the weights are for other layers.
        """
        found = set_peft_model_state_dict(self.policy, dict(weights), adapter_name=name)
        missing = [key for key in found.missing_keys if f".{name}." in key]
        if found.unexpected_keys or missing:
            raise ValueError(f"{source}: an adapter for other layers: {(found.unexpected_keys + missing)[0]}")

    def recomputation(self) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        """Return the contexts for activation checkpointing (`context_fn`).

        They make sure that a layer is recomputed with the adapter that was active in the forward pass.
        """
        return contextlib.nullcontext(), self.using(self.active)


class ValueHead(nn.Module):
    """A linear head that starts at zero, on a backbone that belongs to another model."""

    def __init__(self, policy: nn.Module):
        super().__init__()
        width, device = policy.config.get_text_config().hidden_size, next(policy.parameters()).device
        self.score = nn.Linear(width, 1, bias=False, device=device, dtype=torch.float32)
        nn.init.zeros_(self.score.weight)

    def values(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return values `(B, T)`, float32, of hidden states `(B, T, H)`."""
        return self.score(hidden.to(self.score.weight.dtype)).squeeze(-1).float()


class TrunkHead(ValueHead):
    """A critic that reads the hidden states of the policy's forward pass. Both losses train the shared backbone."""

    def save_pretrained(self, folder: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Write only the head. It is useless without the policy with which it was trained."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state_dict or self.state_dict(), folder / HEAD_FILE, metadata={"format": "pt"})

    def load_pretrained(self, folder: Path) -> None:
        """Load the head that [`save_pretrained`] wrote."""
        self.load_state_dict(load_file(folder / HEAD_FILE))


class AdapterHead(ValueHead):
    """A critic or reward model made of an adapter on the policy's backbone and a linear head.

    Its folder is a PEFT sequence classifier: `AutoPeftModelForSequenceClassification` loads it.
    """

    def __init__(self, adapters: Adapters, name: str):
        super().__init__(adapters.policy)
        # Not registered as a submodule, because the optimizer and DDP already have the policy's weights.
        self.__dict__["adapters"] = adapters
        self.name = name
        # A copy, because this model has its own scale of scores.
        self.config = copy.deepcopy(adapters.policy.config)

    @property
    def device(self) -> torch.device:
        return self.score.weight.device

    def hidden_states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return hidden states `(B, L, H)` of the backbone with this adapter; arguments `(B, L)`."""
        with self.adapters.using(self.name):
            backbone = self.adapters.backbone
            return backbone(**forward_inputs(backbone, input_ids, attention_mask)).last_hidden_state

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SequenceClassifierOutput:
        """Return scores `(B, 1)` at the last token of each row, as a sequence classifier does."""
        hidden = self.hidden_states(input_ids, attention_mask)
        positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        last = (positions * attention_mask).argmax(1)
        rows = torch.arange(len(last), device=last.device)
        return SequenceClassifierOutput(logits=self.values(hidden[rows, last])[:, None])

    def save_pretrained(self, folder: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Write adapter and head as a PEFT folder."""
        policy = self.adapters.policy
        folder.mkdir(parents=True, exist_ok=True)
        config = copy.deepcopy(policy.peft_config[self.name])
        config.task_type, config.modules_to_save, config.inference_mode = TaskType.SEQ_CLS, ["score"], True
        config.base_model_name_or_path = policy.peft_config[self.adapters.own].base_model_name_or_path
        config.save_pretrained(str(folder))
        weights = get_peft_model_state_dict(policy, adapter_name=self.name) | {HEAD_KEY: self.score.weight}
        tensors = {key: value.detach().contiguous() for key, value in weights.items()}
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})

    @torch.no_grad()
    def load_pretrained(self, folder: Path | str) -> None:
        """Load a folder written by [`save_pretrained`], or by PEFT for a sequence classifier.

        Raises:
            ValueError: if it has no linear head with one output, or its adapter is for other layers.
        """
        weights: dict[str, Any] = load_file(Path(folder, SAFETENSORS_WEIGHTS_NAME))
        head = weights.pop(HEAD_KEY, None)
        if head is None or head.shape != self.score.weight.shape:
            raise ValueError(f"{folder}: the adapter has no linear `score` head with one output")
        self.adapters.load(self.name, weights, folder)
        self.score.weight.copy_(head)
        if Path(folder, CONFIG_NAME).is_file():
            ScoreScale.of(PretrainedConfig.from_pretrained(folder)).store(self.config)


def shared_reward(adapters: Adapters, source: Any) -> AdapterHead | None:
    """Return the reward model as an adapter on the policy's backbone, or None if it was trained on another base model.

    Args:
        source: the reward that the user gave; it can be such a model if it is a folder of a PEFT sequence classifier.
    """
    if not isinstance(source, (str, Path)) or not Path(source, "adapter_config.json").is_file():
        return None
    check_adapter(source, {})
    config = PeftConfig.from_pretrained(str(source))
    base = adapters.policy.peft_config[adapters.own].base_model_name_or_path
    if not base or not _same_model(config.base_model_name_or_path, base):
        return None
    adapters.add(REWARD, config, trained=False)
    reward = AdapterHead(adapters, REWARD)
    reward.load_pretrained(source)
    return reward


def _same_model(one: str | None, other: str) -> bool:
    return one == other or (one is not None and Path(one).exists() and Path(one).resolve() == Path(other).resolve())


def critic_adapter(adapters: Adapters, reward: Any) -> AdapterHead:
    """Return the critic as an adapter: a copy of the reward's if that shares the backbone, else a new one, V = 0."""
    shared = isinstance(reward, AdapterHead)
    source = adapters.policy.peft_config[REWARD if shared else adapters.own]
    adapters.add(CRITIC, source, trained=True)
    critic = AdapterHead(adapters, CRITIC)
    if shared:
        adapters.load(CRITIC, get_peft_model_state_dict(adapters.policy, adapter_name=REWARD), "reward")
        critic.score.load_state_dict(reward.score.state_dict())
        ScoreScale.of(reward.config).store(critic.config)
    return critic


def is_of_critic(parameter_name: str) -> bool:
    """Return whether a parameter of `PolicyAndValue` belongs to the critic (adapter, head or model)."""
    parts = parameter_name.split(".")
    return "value_model" in parts or CRITIC in parts


def drop_policy_gradients(model: nn.Module) -> None:
    """Leave only the critic's weights a gradient: without one, torch's optimizers change no weight and no moment.

    A weight that policy and critic share counts as the policy's.
    """
    for name, parameter in model.named_parameters():
        if not is_of_critic(name):
            parameter.grad = None


def give_critic_its_rate(optimizer: torch.optim.Optimizer, model: nn.Module, learning_rate: float) -> None:
    """Move the critic's weights of `PolicyAndValue` into separate parameter groups, with this learning rate."""
    critic = {id(parameter) for name, parameter in model.named_parameters() if is_of_critic(name)}
    for group in list(optimizer.param_groups):
        own = [parameter for parameter in group["params"] if id(parameter) in critic]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in critic]
        optimizer.add_param_group({**group, "params": own, "lr": learning_rate})
