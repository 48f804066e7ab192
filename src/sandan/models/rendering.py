"""Prompts and answers as token ids. Every stage uses this module, so that all stages see the same tokens."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from trl.trainer.utils import pad

from ..core.errors import UserError


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Prompt = str | list[dict[str, str]]


def render_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: Prompt) -> str:
    """Return the exact text before an answer: plain text unchanged, a conversation through the chat template."""
    if isinstance(prompt, str):
        return prompt
    if tokenizer.chat_template is None:
        raise UserError("prompt is a conversation but the tokenizer has no chat template; use text prompts or add one")
    return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)


def encode_prompts(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt]) -> list[list[int]]:
    """Return the token ids of rendered prompts.

    A chat template writes its own special tokens; plain text gets those of the tokenizer.
    """
    if not prompts:
        return []
    texts = [render_prompt(tokenizer, prompt) for prompt in prompts]
    plain = isinstance(prompts[0], str)
    return tokenizer(texts, add_special_tokens=plain)["input_ids"]


def pad_rows(
    rows: Sequence[Sequence[int]], pad_token_id: int, side: Literal["left", "right"] = "left"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return padded ids and their attention mask, both `(batch, longest)`."""
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    masks = [torch.ones_like(row) for row in ids]
    return pad(ids, pad_token_id, padding_side=side), pad(masks, 0, padding_side=side)


def encode_answers(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    ended: Sequence[bool] | None = None,
) -> list[list[int]]:
    """Return the token ids of prompt + answer + stop token, as SFT and the reward model see them.

    Args:
        ended: whether each answer has its stop token; by default all have. (A chat template always writes its own end.)
    """
    rows, eos = [], tokenizer.eos_token or ""
    for prompt, answer, has_end in zip(prompts, answers, ended or [True] * len(answers), strict=True):
        if isinstance(prompt, str):
            text = prompt + answer
            text += eos if has_end and not text.endswith(eos) else ""
            rows.append(tokenizer(text)["input_ids"])
        else:
            turns = [*prompt, {"role": "assistant", "content": answer}]
            rows.append(tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"])
    return rows


def batched(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Yield consecutive slices of `size` items (the last may be shorter)."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
