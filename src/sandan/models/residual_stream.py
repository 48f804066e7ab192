"""Keep the residual stream in bfloat16 under autocast."""

from typing import Any

import torch
from torch import nn


def keep_residual_stream_narrow(model: nn.Module) -> None:
    """Make embeddings return bfloat16 under bfloat16 autocast.

    Every layer's sum `x + f(x)` is then read and written in bfloat16, as in a model whose weights are bfloat16. The
    weights stay float32. float16 is left alone, because it would overflow.
    """

    def cast(_: nn.Module, __: Any, hidden: torch.Tensor) -> torch.Tensor:
        device = hidden.device.type
        low = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
        return hidden.bfloat16() if low else hidden

    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(cast)
