"""Small helpers that tutorials import from `trl.core`."""

import numpy as np
import torch
from transformers import set_seed


__all__ = ["LengthSampler", "respond_to_batch", "set_seed"]


class LengthSampler:
    """A number of new tokens, drawn anew for each batch: at least `min_value`, less than `max_value`."""

    def __init__(self, min_value: int, max_value: int):
        if min_value >= max_value:
            raise ValueError(f"LengthSampler: no length is at least {min_value} and less than {max_value}")
        self.values = list(range(min_value, max_value))

    def __call__(self) -> int:
        return int(np.random.choice(self.values))


def respond_to_batch(model, queries: torch.Tensor, txt_len: int = 20, top_k: int = 0, top_p: float = 1.0):
    """Return `txt_len` sampled tokens after each row of `queries`, `(batch, txt_len)`; EOS does not end a row."""
    options = {"do_sample": True, "top_k": top_k, "top_p": top_p}
    whole = model.generate(
        input_ids=queries,
        attention_mask=torch.ones_like(queries),
        min_new_tokens=txt_len,
        max_new_tokens=txt_len,
        **options,
    )
    return whole[:, -txt_len:]
