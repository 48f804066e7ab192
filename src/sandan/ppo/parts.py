"""Find the backbone and the head of a model that gives a number for every token: a critic, or a reward in TRL's form.

TRL reads both the same way: the backbone is under the model's `base_model_prefix`, the head is `score`. Here the backbone
may also be the only transformers model inside, and the head a `v_head`, as in value-head models of TRL 0.11.
"""

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from .inputs import forward_inputs, taken


Parts = tuple[nn.Module, Callable[[torch.Tensor], torch.Tensor]]


def parts_of(model: nn.Module) -> Parts | None:
    """Return a model's backbone and head, or None if it has no such parts.

    Adapters are in the layers of the backbone, so they take part. (Prompt learning is not, so it is refused.)
    """
    if isinstance(model, PeftModel):
        if model.active_peft_config.is_prompt_learning:
            return None
        return parts_of(model.get_base_model())
    head = getattr(model, "score", None)
    backbone = getattr(model, getattr(model, "base_model_prefix", None) or "-", None)
    if head is None:
        head, backbone = getattr(model, "v_head", None), getattr(model, "pretrained_model", None)
    if not isinstance(backbone, nn.Module):
        inner = [child for child in model.children() if isinstance(child, (PreTrainedModel, PeftModel))]
        backbone = inner[0] if len(inner) == 1 else None
    return (_bare(backbone), head) if callable(head) and backbone is not None else None


def _bare(backbone: nn.Module) -> nn.Module:
    """Return a transformers model without its language-model head, with the adapters that are in its layers."""
    if isinstance(backbone, PeftModel):
        backbone = backbone.get_base_model()
    return backbone.base_model if isinstance(backbone, PreTrainedModel) else backbone


def hidden_states(backbone: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Return the last hidden states `(B, L, H)` of left- or right-padded rows `(B, L)`."""
    inputs = forward_inputs(backbone, input_ids, attention_mask)
    if not isinstance(backbone, PreTrainedModel):
        inputs = _as_trl_calls(backbone, inputs)
    output = backbone(**inputs)
    hidden = getattr(output, "last_hidden_state", None)
    return output.hidden_states[-1] if hidden is None else hidden


def _as_trl_calls(backbone: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with which TRL calls a backbone of the user's own, those of them that it takes."""
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
    trl = {
        "attention_mask": mask,
        "position_ids": mask.cumsum(1) - mask,
        "return_dict": True,
        "output_hidden_states": True,
    }
    return taken(backbone, inputs | trl)


def last_scores(model: nn.Module, parts: Parts, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return the head's numbers at the last token of right-padded rows, `(B, 1)`."""
    backbone, head = parts
    rows = torch.arange(len(input_ids), device=input_ids.device)
    return head(hidden_states(backbone, input_ids, attention_mask))[rows, attention_mask.sum(1) - 1]


def check_critic(model: nn.Module) -> None:
    """Refuse a critic that does not give one value for each token, after trying it on two tokens.

    Raises:
        ValueError: naming what may be given instead.
    """
    parts, name = parts_of(model), type(model).__name__
    instead = (
        'give a sequence classifier with num_labels=1, leave value_model out, or set critic_backbone="policy" for a value '
        "head on the policy"
    )
    if parts is None:
        raise ValueError(f"value_model: {name} has no linear `score` head with one output on a backbone; {instead}")
    backbone, head = parts
    if isinstance(head, nn.Linear) and isinstance(backbone, PreTrainedModel):
        found = (1, 2, head.out_features)
    else:
        found = _tried(model, parts, f"value_model: {name}", instead)
    if found != (1, 2, 1):
        raise ValueError(
            f"value_model: {name}: its head gives {found} for (1, 2) tokens, not one value for each token; {instead}"
        )


@torch.no_grad()
def _tried(model: nn.Module, parts: Parts, what: str, instead: str) -> tuple[int, ...]:
    backbone, head = parts
    ids = torch.zeros(1, 2, dtype=torch.long, device=device_of(model))
    try:
        return tuple(head(hidden_states(backbone, ids, None)).shape)
    except Exception as error:
        raise ValueError(f"{what}: tried on two tokens: {type(error).__name__}: {error}; {instead}") from error


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's weights; the CPU for a module without any."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device
