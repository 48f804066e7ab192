"""Score answers with a reward model, at the token at which it was trained: the last one of a row."""

import functools
from collections.abc import Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from .layer_compilation import is_compiled
from .rendering import Prompt, batched, encode_prompts, pad_rows
from .sampling import Completion
from .score_scale import ScoreScale


if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


def score_last_tokens(model: "PreTrainedModel | PeftModel") -> None:
    """Let a sequence classifier with a `score` head read the last token of each row or segment.

    transformers' own classifiers look for the last id that is not the pad token. If the model pads with the stop
    token, that is the token before it.

    The logits are `(rows, 1)` of right-padded rows with `attention_mask`, `(segments, 1)` of rows without padding with
    `cu_seq_lens_q`, and `(rows, 1)` of a [`sandan.models.prefix_tree`] with `last_tokens`. Without any of them, or with
    another head, the model's own forward runs.
    """
    model = model.get_base_model() if is_peft_model(model) else model
    if not (isinstance(model, PreTrainedModel) and hasattr(model, "score")):
        return
    forward = type(model).forward

    @functools.wraps(forward)
    def scored(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        # PEFT passes absent arguments as None.
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        starts, mask, last = kwargs.get("cu_seq_lens_q"), kwargs.get("attention_mask"), kwargs.pop("last_tokens", None)
        if starts is None and mask is None or kwargs.get("labels") is not None:
            return forward(self, *args, **kwargs)
        hidden = self.base_model(*args, **kwargs).last_hidden_state
        if last is not None:
            return SequenceClassifierOutputWithPast(logits=self.score(hidden[0, last]))
        if starts is not None:
            return SequenceClassifierOutputWithPast(logits=self.score(hidden[0, starts[1:] - 1]))
        rows = torch.arange(len(mask), device=mask.device)
        return SequenceClassifierOutputWithPast(logits=self.score(hidden)[rows, mask.sum(1) - 1])

    # Bound as a method, so that a deep copy (PPO's critic, made from a reward model) uses its own weights.
    model.forward = MethodType(scored, model)


def score_completions(
    model: PreTrainedModel,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    batch_size: int = 128,
) -> list[float]:
    """Return the reward-model scores of sampled completions, one for each pair of prompt and completion."""
    encoded = encode_prompts(tokenizer, prompts)
    rows = [ids + list(completion.token_ids) for ids, completion in zip(encoded, completions, strict=True)]
    return score_rows(model, rows, batch_size)


@torch.no_grad()
def score_rows(
    model: PreTrainedModel,
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
    scale = ScoreScale.of(getattr(model, "config", None))
    model.eval()
    score_last_tokens(model)
    more = int(is_compiled(model))
    for batch in batched(sorted(places, key=len), batch_size):
        ids, mask = (tensor.to(model.device) for tensor in pad_rows(batch, "right", more))
        logits = model(input_ids=ids, attention_mask=mask, **options).logits
        for row, score in zip(batch, scale.apply(logits.squeeze(-1).float()).tolist(), strict=True):
            for index in places[row]:
                scores[index] = score
    return scores
