"""Estimates of the memory and disk that a run needs, from the number of parameters; and the reuse of freed memory."""

import ctypes
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

# AdamW keeps two float32 moments for each trained weight.
OPTIMIZER_BYTES = 8
# Constants of <malloc.h>. mallopt(3) refuses a larger threshold.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_MMAP_THRESHOLD_BYTES = 32 * 1024 * 1024


def model_bytes(model: "nn.Module") -> int:
    """Return the bytes of a model's weights in a file."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def checkpoint_bytes(model: "nn.Module") -> int:
    """Return the bytes of a checkpoint: all weights, and the optimizer's state of the trained weights."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return model_bytes(model) + OPTIMIZER_BYTES * trained


def activation_bytes(config: "PretrainedConfig", tokens: int, bytes_per_number: int) -> int:
    """Return the bytes kept for the backward pass of a micro-batch, without activation checkpointing.

    Korthikanti et al. 2022 (arXiv 2205.05198, eq. 1): 34 h per token and layer at 2 bytes per number, without the
    attention scores, which today's kernels do not keep; and the logits with their gradient, in float32.

    Args:
        tokens: rows x length of a micro-batch.
    """
    layers = config.num_hidden_layers * config.hidden_size * 17 * bytes_per_number
    return tokens * (layers + 8 * config.vocab_size)


def keep_freed_memory() -> None:
    """Keep freed memory in this process, because each training step on the CPU needs the same memory as the last one.

    By default the GNU C library returns the step's tensors to the system, and every page of 4 kB that is used again
    costs a page fault: a fifth of the time of a step at 0.7M parameters. With another C library this does nothing.
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "gnu_get_libc_version"):
            library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
            library.mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD_BYTES)


def readable_bytes(count: float) -> str:
    """Return a number of bytes with a unit: `1_500_000` -> `1.5 MB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters of a stage's models, and the configuration of the trained model."""

    trained: int
    frozen: int
    config: "PretrainedConfig"


def size_of(auto_model: Any, path: str | None, missing: set[str]) -> ModelSize | None:
    """Return the size of a model whose weights are all trained, without loading it; None if it does not exist yet.

    Args:
        auto_model: the class of transformers that would load it.
        missing: paths that earlier stages have not made yet.
    """
    import torch
    from transformers import AutoConfig

    if path is None or path in missing:
        return None
    with torch.device("meta"):
        model = auto_model.from_config(AutoConfig.from_pretrained(path, trust_remote_code=False))
    return ModelSize(model.num_parameters(), 0, model.config)
