"""Keep the residual stream in bfloat16 under autocast."""

from typing import Any

import torch
from torch import nn


def keep_residual_stream_narrow(model: nn.Module) -> None:
    """Under bfloat16 autocast, let embeddings give bfloat16, so that every layer's sum `x + f(x)` is read and written
    in it, as in a model whose weights are bfloat16; the weights here stay float32. (float16 would overflow.)"""

    def cast(_: nn.Module, __: Any, hidden: torch.Tensor) -> torch.Tensor:
        device = hidden.device.type
        low = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
        return hidden.bfloat16() if low else hidden

    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(cast)
