"""torch.compile for the layers of a model: each kind of layer once, in seconds; a whole model takes minutes."""

from collections.abc import Callable

import torch
from torch import fx, nn
from transformers.modeling_layers import GradientCheckpointingLayer


# A layer is compiled again for each combination of adapters on or off, gradients or none, 16-bit or 32-bit.
MAX_VERSIONS = 64
# The share of activations that a layer keeps for its backward pass. The rest, if it is cheap to compute (the product
# inside a gated MLP), is computed again: 30 kB per token and layer instead of 43 at 0.5B, and no more matrix products.
ACTIVATION_MEMORY_BUDGET = 0.9
BACKEND = "inductor"


def compile_graph(graph: fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
    """Compile with torch.compile's default backend under the memory budget, which applies to nothing else."""
    backend = torch._dynamo.lookup_backend(BACKEND)
    with torch._functorch.config.patch(activation_memory_budget=ACTIVATION_MEMORY_BUDGET):
        return backend(graph, inputs)


def compile_layers(model: nn.Module, dynamic: bool | None = None) -> None:
    """Compile the repeated layers of a transformer in place; layers of the same kind share the compiled code.

    Args:
        dynamic: True if batches differ in size: compile once for all sizes, not again for each new size.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_VERSIONS)
    if dynamic:
        # Otherwise a batch that is by chance as wide as the model would tie the two sizes together.
        torch.fx.experimental._config.use_duck_shape = False
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(backend=compile_graph, dynamic=dynamic)


def is_compiled(model: nn.Module) -> bool:
    """Return whether a model's layers are compiled.

    Such a model should always get padding ([`pad_rows`]): a batch without any has no mask, and the layers would be
    compiled once more for it, whenever the first one comes.
    """
    return any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())
