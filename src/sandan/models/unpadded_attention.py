"""Rows without padding: one row `(1, tokens)` of segments that do not see each other, and the attention for it.

transformers and TRL mark the ends of segments with `cu_seq_lens_q` and `max_length_q`, which only the kernels of the
flash-attn package read. [`VARLEN`] is transformers' SDPA attention extended to read them too, because PyTorch also has
such a kernel (`torch.nn.attention.varlen`). Where it cannot run (CPU, float32), rows are padded inside attention only.
"""

import inspect
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer


VARLEN = "sdpa_varlen"
# Options that some models pass to their attention; [`varlen_attention`] supports none of them.
UNKNOWN = ("sliding_window", "softcap", "s_aux", "position_bias")
# torch 2.11 accepts keys with fewer heads than queries; later versions need this argument.
GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
LARGEST_HEAD = 256


def segments(lengths: Sequence[int]) -> dict[str, Any]:
    """Return the model inputs that mark where rows begin and end when they follow each other in one long row.

    Args:
        lengths: of the rows, in tokens; none is 0.

    Returns:
        `dict`: `position_ids` `(1, tokens)`, which start at 0 for each row; `cu_seq_lens_q` and `cu_seq_lens_k`
            `(rows + 1,)`, int32, where rows begin and the last row ends; `max_length_q` and `max_length_k`, `int`.
    """
    sizes = torch.tensor(lengths)
    ends = sizes.cumsum(0)
    bounds = nn.functional.pad(ends, (1, 0)).to(torch.int32)
    starts = (ends - sizes).repeat_interleave(sizes)
    longest = max(lengths)
    return {
        "position_ids": (torch.arange(len(starts)) - starts)[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def obstacle(model: PreTrainedModel) -> str | None:
    """Return the reason why a model cannot read rows without padding through [`VARLEN`], or None if it can."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    causal = {module.is_causal for module in model.modules() if isinstance(getattr(module, "is_causal", None), bool)}
    if model.config._attn_implementation not in ("sdpa", VARLEN):
        return f"its attention is {model.config._attn_implementation}, not sdpa"
    if config.is_encoder_decoder or not model._supports_attention_backend or causal != {True}:
        return f"{config.model_type} is no decoder with transformers' common attention"
    if not (model._can_set_attn_implementation() and _tell_attention(model)):
        return f"{config.model_type}'s layers do not tell attention where rows end"
    if kinds - {"full_attention"} or (not kinds and getattr(config, "sliding_window", None)):
        return "not all of its layers see the whole row"
    if getattr(config, "attn_logit_softcapping", None):
        return "it caps attention logits"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than the kernel for it"
    return None


def _tell_attention(model: PreTrainedModel) -> bool:
    """Return whether the layers pass their keyword arguments on to attention.

    Those of Nemotron drop them (transformers 5.17 to 5.23): rows would see each other, without any error.
    """
    kinds = {type(module) for module in model.modules() if isinstance(module, GradientCheckpointingLayer)}
    return all(len(re.findall(r"\*\*\w*kwargs", inspect.getsource(kind.forward))) > 1 for kind in kinds)


def use_varlen(model: PreTrainedModel) -> None:
    """Make a model without [`obstacle`] read segments. It still reads padded rows as before."""
    model.set_attn_implementation(VARLEN)


def varlen_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute transformers' SDPA attention, or causal attention within segments if there are any.

    Args:
        query, key, value: `(batch, heads, seq, head_dim)`; keys and values may have fewer heads; the batch is 1 if
            there are segments.
        cu_seq_lens_q: `(segments + 1,)`, from [`segments`].
        max_length_q: the longest segment.

    Returns:
        `(batch, seq, heads, head_dim)` and None.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if asked := [name for name in UNKNOWN if kwargs.get(name) is not None]:
        raise NotImplementedError(f"{VARLEN}: {', '.join(asked)}")
    tensors = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]
    device = query.device.type
    if torch.is_autocast_enabled(device):
        # Autocast does not cast for this kernel, and rotated queries are float32 if the residual stream is.
        tensors = [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]
    half = tensors[0].dtype in (torch.bfloat16, torch.float16)
    size = query.shape[-1]
    # In latent attention (DeepSeek V3) the values have another size than the queries.
    fused = device == "cuda" and half and dropout == 0.0 and size <= LARGEST_HEAD and size % 8 == 0
    fused = fused and value.shape[-1] == size
    attend = _by_kernel if fused else _by_padding
    return attend(*tensors, cu_seq_lens_q, max_length_q, scaling, dropout)[None], None


def _by_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    causal = (-1, 0)
    return varlen_attn(
        query, key, value, bounds, bounds, longest, longest, scale=scaling, window_size=causal, **GROUPED
    )


def _by_padding(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """Compute attention on padded rows. No mask is needed: padding comes last, causal attention only looks back."""
    tokens = torch.arange(len(query), device=query.device, dtype=bounds.dtype)
    row = torch.searchsorted(bounds[1:], tokens, right=True)
    column = tokens - bounds[row]

    def spread(flat: torch.Tensor) -> torch.Tensor:
        rows = flat.new_zeros(len(bounds) - 1, longest, *flat.shape[1:])
        return rows.index_put((row, column), flat).transpose(1, 2)

    attended = nn.functional.scaled_dot_product_attention(
        spread(query), spread(key), spread(value), dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True
    )
    return attended.transpose(1, 2)[row, column]


def _mask_of_padding(
    *, q_length: int, kv_length: int, attention_mask: torch.Tensor | None = None, **kwargs: Any
) -> torch.Tensor | None:
    """Return transformers' mask if there is padding or a cache, else None: causal attention and segments need none."""
    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(VARLEN, varlen_attention)
AttentionMaskInterface.register(VARLEN, _mask_of_padding)
