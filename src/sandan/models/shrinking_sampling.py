"""Fast sampling on a CPU, where the computation costs more than the overhead of starting it.

A prompt with several answers is read once, not once per answer, and a finished answer is removed from the batch;
`generate` keeps computing it until the longest answer ends. The answers are draws from the same distribution.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from accelerate.utils import is_peft_model
from transformers import DynamicCache


if TYPE_CHECKING:
    from transformers import PreTrainedModel

# To remove finished rows, the cache must be copied. This is done when this share of the rows has finished.
ENDED_SHARE = 0.1


def shrinks(model: "PreTrainedModel") -> bool:
    """Return whether [`sample_shrinking`] supports a model: a decoder on the CPU whose layers all see every token."""
    config = model.config.get_text_config()
    window = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    return (
        model.device.type == "cpu"
        and getattr(model, "_can_compile_fullgraph", False)
        and not getattr(model, "_is_stateful", False)
        and not config.is_encoder_decoder
        # With prompt learning PEFT adds virtual tokens before each row and makes positions and masks itself.
        and not (is_peft_model(model) and model.active_peft_config.is_prompt_learning)
        and set(getattr(config, "layer_types", None) or [window]) == {"full_attention"}
    )


@torch.no_grad()
def sample_shrinking(
    model: "PreTrainedModel",
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    max_new_tokens: int,
    temperature: float,
    stop_token_ids: Sequence[int],
    suppressed: Sequence[int] = (),
    answers_per_prompt: int = 1,
) -> torch.Tensor:
    """Sample answers to left-padded prompts, with the default random generator.

    Args:
        input_ids, attention_mask (`(B, P)`).
        temperature: 0 is greedy.
        suppressed: ids that are never sampled.

    Returns:
        `(B * answers_per_prompt, max_new_tokens)`; the answers to one prompt follow each other, and positions after
        the stop token are filled with the first of `stop_token_ids`.
    """
    cache = DynamicCache(config=model.config)
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    logits = model(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, **inputs).logits[:, -1]
    cache.batch_repeat_interleave(answers_per_prompt)
    logits, mask, positions = (
        tensor.repeat_interleave(answers_per_prompt, 0) for tensor in (logits, attention_mask, positions[:, -1:])
    )
    answers = torch.full((len(mask), max_new_tokens), stop_token_ids[0])
    rows, ended = torch.arange(len(mask)), torch.zeros(len(mask), dtype=torch.bool)
    bias, stops = torch.zeros(logits.shape[1]), torch.tensor(stop_token_ids)
    bias[[token for token in suppressed if token < len(bias)]] = -torch.inf
    for at in range(max_new_tokens):
        drawn = _draw(logits + bias, temperature).masked_fill(ended, stop_token_ids[0])
        answers[rows, at] = drawn
        ended = torch.isin(drawn, stops)
        if at + 1 == max_new_tokens or ended.all():
            break
        if ended.sum() > ENDED_SHARE * len(rows):
            kept = (~ended).nonzero().squeeze(1)
            cache.batch_select_indices(kept)
            rows, drawn, ended, mask, positions = (tensor[kept] for tensor in (rows, drawn, ended, mask, positions))
        mask, positions = torch.nn.functional.pad(mask, (0, 1), value=1), positions + 1
        logits = model(input_ids=drawn[:, None], attention_mask=mask, position_ids=positions, **inputs).logits[:, -1]
    return answers


def _draw(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Draw token ids `(B,)` from softmax(logits / temperature); with temperature 0 take the most likely ones.

    The cumulative distribution is inverted, with one random number per row. `torch.multinomial` draws one for each
    token of the vocabulary; with replacement it may draw a token of probability 0.

    Raises:
        RuntimeError: if the probabilities are not finite numbers.
    """
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)
    if not cumulative[:, -1].isfinite().all():
        raise RuntimeError("the model gives logits that are not numbers: no answer can be sampled from them")
    point = (1 - torch.rand(len(logits), 1, dtype=torch.double)) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, point).squeeze(1)
