"""One frozen backbone for policy, reference, critic and reward: adapters (Hu et al. 2021, arXiv 2106.09685) and heads.

Instead of four models a GPU holds one. The policy is the backbone with its adapter, the reference the backbone with
none, the critic and a reward model that was trained on this backbone are further adapters with a linear head each.
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
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import CONFIG_NAME

from ..models.score_scale import ScoreScale
from .inputs import forward_inputs


CRITIC, REWARD = "critic", "reward"
HEAD_KEY = "base_model.model.score.weight"
HEAD_FILE = "value_head.safetensors"


class Adapters:
    """Switches the adapters of a policy. Outside of [`using`] the policy's own is active.

    PEFT's own `set_adapter` walks through all modules several times and lets one adapter learn; here layers are switched
    some hundred times an update, and the backward pass goes through two adapters.

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
        """The transformer without a head; adapters sit in its layers."""
        return self.policy.get_base_model().base_model

    @contextlib.contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Forward passes inside read the backbone with this adapter, None for none."""
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
        """Add an adapter of this kind, at first without effect."""
        config = copy.deepcopy(config)
        config.task_type, config.modules_to_save, config.inference_mode = TaskType.CAUSAL_LM, None, not trained
        self.policy.add_adapter(name, config)
        self.policy.set_requires_grad(self.own)
        self.policy.set_requires_grad(name, trained)
        self._find_layers()

    def load(self, name: str, weights: Mapping[str, torch.Tensor], source: Path | str) -> None:
        """Fill an adapter with weights that PEFT saved.

        Raises:
            ValueError: if they are for other layers.
        """
        found = set_peft_model_state_dict(self.policy, dict(weights), adapter_name=name)
        missing = [key for key in found.missing_keys if f".{name}." in key]
        if found.unexpected_keys or missing:
            raise ValueError(f"{source}: an adapter for other layers: {(found.unexpected_keys + missing)[0]}")

    def recomputation(self) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        """`context_fn` of activation checkpointing: a layer is computed again with the adapter it was computed with."""
        return contextlib.nullcontext(), self.using(self.active)


class ValueHead(nn.Module):
    """A linear head, from zero, on a backbone that is not its own."""

    def __init__(self, policy: nn.Module):
        super().__init__()
        width, device = policy.config.get_text_config().hidden_size, next(policy.parameters()).device
        self.score = nn.Linear(width, 1, bias=False, device=device, dtype=torch.float32)
        nn.init.zeros_(self.score.weight)

    def values(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(B, T, H)` to `(B, T)`, float32."""
        return self.score(hidden.to(self.score.weight.dtype)).squeeze(-1).float()


class TrunkHead(ValueHead):
    """A critic that reads the hidden states of the policy's own forward pass: a backbone that both train."""

    def save_pretrained(self, folder: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Write the head alone; it means nothing without the policy it was trained with."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state_dict or self.state_dict(), folder / HEAD_FILE, metadata={"format": "pt"})

    def load_pretrained(self, folder: Path) -> None:
        """Read what [`save_pretrained`] wrote."""
        self.load_state_dict(load_file(folder / HEAD_FILE))


class AdapterHead(ValueHead):
    """A critic or reward model made of an adapter on the policy's backbone and a linear head.

    Its folder is a PEFT sequence classifier: `AutoPeftModelForSequenceClassification` loads it.
    """

    def __init__(self, adapters: Adapters, name: str):
        super().__init__(adapters.policy)
        # Not a submodule: the optimizer and DDP have the policy's weights once already.
        self.__dict__["adapters"] = adapters
        self.name = name
        # A copy: the scale of its scores is its own.
        self.config = copy.deepcopy(adapters.policy.config)

    @property
    def device(self) -> torch.device:
        return self.score.weight.device

    def hidden_states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """`(B, L, H)` of the backbone with this adapter; arguments `(B, L)`."""
        with self.adapters.using(self.name):
            backbone = self.adapters.backbone
            return backbone(**forward_inputs(backbone, input_ids, attention_mask)).last_hidden_state

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SequenceClassifierOutput:
        """Scores `(B, 1)` at the last token of each row, as a sequence classifier gives them."""
        hidden = self.hidden_states(input_ids, attention_mask)
        positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        last = (positions * attention_mask).argmax(1)
        rows = torch.arange(len(last), device=last.device)
        return SequenceClassifierOutput(logits=self.values(hidden[rows, last])[:, None])

    def save_pretrained(self, folder: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Write adapter and head."""
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
        """Read a folder that [`save_pretrained`], or PEFT for a sequence classifier, wrote.

        Raises:
            ValueError: if it has no linear head with one output, or is for other layers.
        """
        weights: dict[str, Any] = load_peft_weights(str(folder), device="cpu")
        head = weights.pop(HEAD_KEY, None)
        if head is None or head.shape != self.score.weight.shape:
            raise ValueError(f"{folder}: the adapter has no linear `score` head with one output")
        self.adapters.load(self.name, weights, folder)
        self.score.weight.copy_(head)
        if Path(folder, CONFIG_NAME).is_file():
            ScoreScale.of(PretrainedConfig.from_pretrained(folder)).store(self.config)


def shared_reward(adapters: Adapters, source: Any) -> AdapterHead | None:
    """The reward model as an adapter on the policy's backbone, or None if it is none that was trained on it.

    Args:
        source: what the user gave; a folder with a PEFT sequence classifier is one.
    """
    if not isinstance(source, (str, Path)) or not Path(source, "adapter_config.json").is_file():
        return None
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
    """The critic as an adapter of its own: a copy of the reward's if that shares the backbone, else from V = 0."""
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
    """Whether a parameter of `PolicyAndValue` is the critic's, adapter or head or model."""
    parts = parameter_name.split(".")
    return "value_model" in parts or CRITIC in parts


def give_critic_its_rate(optimizer: torch.optim.Optimizer, model: nn.Module, learning_rate: float) -> None:
    """Put the critic's weights of `PolicyAndValue` into groups of their own, with this learning rate."""
    critic = {id(parameter) for name, parameter in model.named_parameters() if is_of_critic(name)}
    for group in list(optimizer.param_groups):
        own = [parameter for parameter in group["params"] if id(parameter) in critic]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in critic]
        optimizer.add_param_group({**group, "params": own, "lr": learning_rate})
