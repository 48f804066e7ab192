"""Pretraining on full blocks: the causal flash kernel, no logits outside of the compiled step, tokens/s in the log.

A plain `Trainer` wastes most of an H100, even with compilation, for these reasons:

1. Under `torch.compile`, transformers builds an explicit causal mask (torch < 2.14; pytorch#176499), and with a mask
   `scaled_dot_product_attention` cannot use its flash or cuDNN kernels. [`UNMASKED`] is transformers' own SDPA
   attention under a name for which no mask is built.
2. `model(...)` returns logits `(batch, seq, vocab)`, which autocast then copies to float32. Here `forward` returns
   only the loss, so that the logits stay inside the compiled step.
3. Autocast leaves the residual stream in float32; see [`keep_residual_stream_narrow`].
"""

import functools
import time
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..models.residual_stream import keep_residual_stream_narrow
from .order import OrderedTrainer


UNMASKED = "sdpa_without_mask"
AttentionInterface.register(UNMASKED, sdpa_attention_forward)
# In order of preference, the fastest first; the device and the head size decide which can be used.
KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def only_loss(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a model's `forward` so that it returns only the loss if it is given labels."""

    @functools.wraps(forward)
    def loss(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        return outputs if outputs.loss is None else {"loss": outputs.loss}

    return loss


class BlockTrainer(OrderedTrainer):
    """[`OrderedTrainer`] for causal language models and rows without padding, `(batch, block_size_tokens)`.

    It logs `tokens_per_second` over all processes, except in the first log of a run.
    """

    def __init__(self, model: PreTrainedModel, *args: Any, **kwargs: Any):
        if model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(UNMASKED)
        model.forward = only_loss(model.forward)
        keep_residual_stream_narrow(model)
        super().__init__(model, *args, **kwargs)
        self._flops_per_token = 6 * model.num_parameters(exclude_embeddings=True)
        self._last_log: tuple[int, float] | None = None

    def compute_loss_context_manager(self) -> Any:
        stack = super().compute_loss_context_manager()
        if self.args.device.type == "cuda":
            stack.enter_context(sdpa_kernel(KERNELS, set_priority=True))
        return stack

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return the operations of a batch. `Trainer`'s own method counts the model's parameters at every step."""
        return self._flops_per_token * inputs["input_ids"].numel()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            step, now = self.state.global_step, time.perf_counter()
            if self._last_log is not None:
                steps, seconds = step - self._last_log[0], now - self._last_log[1]
                logs["tokens_per_second"] = round(steps * self._tokens_per_step / seconds)
            self._last_log = step, now
        super().log(logs, start_time)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self._tokens_per_step = (
            inputs["input_ids"].numel() * self.args.gradient_accumulation_steps * self.args.world_size
        )
        return super().training_step(model, inputs, *args, **kwargs)
