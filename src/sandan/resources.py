"""What a run takes of memory and disk, estimated from the number of parameters."""

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from torch import nn

# AdamW keeps two float32 moments for each trained weight.
OPTIMIZER_BYTES = 8


def model_bytes(model: "nn.Module") -> int:
    """Bytes of a model's weights in a file."""
    return sum(one.numel() * one.element_size() for one in model.parameters())


def checkpoint_bytes(model: "nn.Module") -> int:
    """Bytes of a checkpoint: weights, and the optimizer's state of those that are trained."""
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    return model_bytes(model) + OPTIMIZER_BYTES * trained


def readable_bytes(count: float) -> str:
    """`1_500_000` -> `1.5 MB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"
