"""torch.compile for the layers of a model: each kind once, in seconds, instead of whole models in minutes."""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


# Adapters switched on and off, with and without gradients, padded or not: each is a version of the same layer.
MAX_VERSIONS = 64


def compile_layers(model: nn.Module) -> None:
    """Compile the repeated layers of a transformer, in place; layers of one kind share what was compiled."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_VERSIONS)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile()
