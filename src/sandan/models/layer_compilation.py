"""torch.compile for the layers of a model: each kind once, in seconds, instead of whole models in minutes."""

from collections.abc import Callable

import torch
from torch import fx, nn
from transformers.modeling_layers import GradientCheckpointingLayer


# Adapters switched on and off, with and without gradients, padded or not: each is a version of the same layer.
MAX_VERSIONS = 64
# Of what a layer keeps for its backward pass: the rest, as far as it is cheap (the product inside a gated MLP), is
# computed again. 30 kB a token and layer instead of 43 at 0.5B, without a matrix product more.
ACTIVATION_MEMORY_BUDGET = 0.9
BACKEND = "inductor"


def compile_graph(graph: fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
    """torch.compile's own backend under the budget, which is not for whatever else a program compiles."""
    backend = torch._dynamo.lookup_backend(BACKEND)
    with torch._functorch.config.patch(activation_memory_budget=ACTIVATION_MEMORY_BUDGET):
        return backend(graph, inputs)


def compile_layers(model: nn.Module, dynamic: bool | None = None) -> None:
    """Compile the repeated layers of a transformer, in place; layers of one kind share what was compiled.

    Args:
        dynamic: True if batches differ in size: compiled once for all sizes, not for the first one and then again.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_VERSIONS)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(backend=compile_graph, dynamic=dynamic)
