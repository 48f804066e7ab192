"""What a model is called with."""

import inspect
from typing import Any

import torch
from torch import nn


def forward_inputs(model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, Any]:
    """What a left-padded batch needs so that each row gives what it would give alone.

    Positions count real tokens, and padding becomes token 0: a pad id may lie outside the embedding table.

    Args:
        input_ids, attention_mask (`(B, L)`).
    """
    inputs = {
        "input_ids": input_ids.masked_fill(attention_mask == 0, 0),
        "attention_mask": attention_mask,
        "use_cache": False,
    }
    # A few architectures (those with ALiBi) have no positions to give.
    if "position_ids" in inspect.signature(type(model).forward).parameters:
        inputs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return inputs
