"""Build the forward arguments for left-padded batches."""

import functools
import inspect
from typing import Any

import torch
from torch import nn


@functools.cache
def _parameters(kind: type) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def takes(model: nn.Module, name: str) -> bool:
    """Return whether a model's forward has a parameter of this name."""
    return name in _parameters(type(model))


@functools.cache
def _takes_any_keyword(kind: type) -> bool:
    kinds = [parameter.kind for parameter in inspect.signature(kind.forward).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds


def taken(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return those of the keywords that a model's forward takes."""
    return {name: value for name, value in inputs.items() if takes(model, name) or _takes_any_keyword(type(model))}


def forward_inputs(model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> dict[str, Any]:
    """Return the forward arguments for a left-padded batch, so that each row gives the same result as it would alone.

    Positions count real tokens, and padding becomes token 0, because a pad id may be outside the embedding table.

    Args:
        input_ids, attention_mask (`(B, L)`): the mask is None if nothing is padded.
    """
    if attention_mask is None:
        return {"input_ids": input_ids, "use_cache": False}
    inputs = {
        "input_ids": input_ids.masked_fill(attention_mask == 0, 0),
        "attention_mask": attention_mask,
        "use_cache": False,
    }
    # A few architectures (those with ALiBi) have no position ids.
    if takes(model, "position_ids"):
        inputs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return inputs
