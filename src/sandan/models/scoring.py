"""Score answers with a reward model, at the token at which it was trained."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .rendering import Prompt, batched, encode_prompts, pad_rows
from .sampling import Completion
from .score_scale import ScoreScale


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def score_completions(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    batch_size: int = 128,
) -> list[float]:
    """Return the reward-model scores of sampled completions, one for each pair of prompt and completion."""
    encoded = encode_prompts(tokenizer, prompts)
    rows = [ids + list(completion.token_ids) for ids, completion in zip(encoded, completions, strict=True)]
    return score_rows(model, tokenizer, rows, batch_size)


@torch.no_grad()
def score_rows(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Sequence[int]],
    batch_size: int = 128,
    **options: Any,
) -> list[float]:
    """Return the reward model's scores of token rows, read at the last token, where `trl.RewardTrainer` trains it.

    They are on the scale that is stored with the model ([`ScoreScale`]). Equal rows (every answer of a ranking is in
    several pairs) are scored once.

    Args:
        options: further arguments of the model's forward.
    """
    places: dict[tuple[int, ...], list[int]] = {}
    for index, row in enumerate(rows):
        places.setdefault(tuple(row), []).append(index)
    scores = [0.0] * len(rows)
    scale = ScoreScale.of(model.config)
    model.eval()
    for batch in batched(sorted(places, key=len), batch_size):
        # Right padding: a sequence classifier reads the last token that is not padding.
        ids, mask = (tensor.to(model.device) for tensor in pad_rows(batch, tokenizer.pad_token_id, "right"))
        logits = model(input_ids=ids, attention_mask=mask, **options).logits
        for row, score in zip(batch, scale.apply(logits.squeeze(-1).float()).tolist(), strict=True):
            for index in places[row]:
                scores[index] = score
    return scores
