"""Prompts and answers as token ids. Every stage uses this module, so that all stages see the same tokens.

A row is the ids of its prompt, which are what `generate` gets, then the ids of the answer, then its stop token (see
[`sandan.models.tokens`]). Where a tokenizer would merge the end of the prompt with the beginning of the answer, the
two stay apart: the model must sample the answer after exactly these ids.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from jinja2 import TemplateError
from torch.nn import functional
from trl.trainer.utils import pad

from ..core.errors import UserError
from .tokens import PAD, answer_end, frame


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Turns = list[dict[str, Any]]
Prompt = str | Turns
IGNORED = -100
SYSTEM_ROLES, USER_ROLE = ("system", "developer"), "user"


# ---- Prompts ----


def render_turns(tokenizer: "PreTrainedTokenizerBase", turns: Turns, **options: Any) -> str:
    """Return a conversation as text, written by the chat template.

    Raises:
        UserError: if there is none, or it refuses these turns, with its own words.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            "prompt is a conversation but the tokenizer has no chat template; use text prompts, or give one "
            "(--chat_template_path in SFT)"
        )
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, **options)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        words = " ".join(str(error).split())[:200]
        raise UserError(
            f"the chat template refuses the turns {', '.join(turn['role'] for turn in turns)}: {words}"
        ) from error
    for turn in turns:
        for call in turn.get("tool_calls") or ():
            name = call.get("function", call).get("name", "")
            if name not in text:
                raise UserError(f"the chat template does not write tool calls (here {name!r}); take one that does")
    return text


def render_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: Prompt, **options: Any) -> str:
    """Return the exact text before an answer: plain text unchanged, a conversation through the chat template."""
    if isinstance(prompt, str) or not prompt:
        return prompt or ""
    return render_turns(tokenizer, prompt, add_generation_prompt=True, **options)


def template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the chat template that a row brings: its tools, and `chat_template_kwargs`."""
    tools, options = row.get("tools"), row.get("chat_template_kwargs")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return ({"tools": tools} if tools else {}) | (options if isinstance(options, dict) else {})


def encode_prompts(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt], **options: Any) -> list[list[int]]:
    """Return the token ids of rendered prompts; `options` as in [`encode_rows`].

    A chat template writes its own special tokens; plain text gets those that the tokenizer puts before a text.
    """
    return _encode(tokenizer, prompts, [render_prompt(tokenizer, prompt, **options) for prompt in prompts])


def shortened(
    tokenizer: "PreTrainedTokenizerBase",
    turns: Turns,
    max_tokens: int,
    as_prompt: Callable[[Turns], Prompt] = lambda turns: turns,
) -> Turns | None:
    """Return a conversation of at most `max_tokens` tokens: the oldest turns go, the system's turns at the start stay.

    What stays begins with a user's turn, as chat templates expect. None, if the last of these alone is too long.

    Args:
        as_prompt: makes the prompt that the model reads of the turns.
    """
    system = next((at for at, turn in enumerate(turns) if turn["role"] not in SYSTEM_ROLES), len(turns))
    starts = [at for at in range(system + 1, len(turns)) if turns[at]["role"] == USER_ROLE]
    shorter = (turns[:system] + turns[start:] for start in starts)
    fits = (kept for kept in (turns, *shorter) if len(encode_prompts(tokenizer, [as_prompt(kept)])[0]) <= max_tokens)
    return next(fits, None)


def _encode(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt], texts: list[str]) -> list[list[int]]:
    """Return the ids of texts that begin with rendered `prompts`."""
    if not texts:
        return []
    begin = frame(tokenizer) if any(isinstance(prompt, str) for prompt in prompts) else []
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [begin + ids if isinstance(prompt, str) else ids for prompt, ids in zip(prompts, encoded, strict=True)]


def pad_rows(
    rows: Sequence[Sequence[int]], side: Literal["left", "right"] = "left", more_columns: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return padded ids and their attention mask, both `(batch, longest + more_columns)`."""
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    masks = [torch.ones_like(row) for row in ids]
    columns = (more_columns, 0) if side == "left" else (0, more_columns)
    return (
        functional.pad(pad(ids, PAD, padding_side=side), columns, value=PAD),
        functional.pad(pad(masks, 0, padding_side=side), columns),
    )


# ---- Prompts with their answers ----


def encode_answers(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    ended: Sequence[bool] | None = None,
) -> list[list[int]]:
    """Return the token ids of prompt + answer + stop token, as SFT and the reward model see them.

    Args:
        ended: whether each answer has its stop token; by default all have.
    """
    return [ids for ids, _ in encode_rows(tokenizer, prompts, answers, ended)]


def encode_rows(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    answers: Sequence[str | dict[str, Any]],
    ended: Sequence[bool] | None = None,
    **options: Any,
) -> list[tuple[list[int], int]]:
    """Return, for each pair of prompt and answer, the ids of both with the stop token, and where the answer begins.

    Args:
        answers: texts, or assistant turns with whatever the chat template writes of them.
        ended: whether each answer has its stop token; by default all have.
        options: further arguments of the chat template (`tools`).
    """
    befores = [render_prompt(tokenizer, prompt, **options) for prompt in prompts]
    ends = {
        chat: _text_of(tokenizer, answer_end(tokenizer, chat))
        for chat in {isinstance(prompt, list) for prompt in prompts}
    }
    afters = []
    for prompt, before, answer, has_end in zip(prompts, befores, answers, ended or [True] * len(answers), strict=True):
        end = ends[isinstance(prompt, list)]
        text = answer if isinstance(prompt, str) else _answer_as_turn(tokenizer, prompt, before, answer, end, options)
        afters.append(text.removesuffix(end) + end * has_end)
    rows, starts = [], _encode(tokenizer, prompts, befores)
    wholes = _encode(tokenizer, prompts, [before + after for before, after in zip(befores, afters, strict=True)])
    for start, whole, after in zip(starts, wholes, afters, strict=True):
        if whole[: len(start)] != start:
            whole = start + tokenizer(after, add_special_tokens=False)["input_ids"]
        rows.append((whole, len(start)))
    return rows


def _text_of(tokenizer: "PreTrainedTokenizerBase", token: int | None) -> str:
    return "" if token is None else tokenizer.convert_ids_to_tokens(token)


def _answer_as_turn(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: Turns,
    before: str,
    answer: str | dict[str, Any],
    end: str,
    options: dict[str, Any],
) -> str:
    """Return the text after a rendered prompt: the answer as the chat template writes it, without what follows `end`."""
    turn = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
    whole = render_turns(tokenizer, [*prompt, turn], **options)
    if not whole.startswith(before):
        # Some templates write an answer differently from how they begin one (with empty thoughts, say).
        return turn.get("content") or ""
    text = whole[len(before) :]
    return text[: text.rindex(end) + len(end)] if end and end in text else text


# ---- Whole conversations ----


def encode_conversation(
    tokenizer: "PreTrainedTokenizerBase", turns: Turns, trained_from: int = 0, **options: Any
) -> tuple[list[int], list[int]]:
    """Return the ids of a conversation that ends with an answer, and labels that train the assistant's turns only.

    The stop token of each turn is trained with it. A turn that the chat template writes differently once others follow
    it (without its thoughts, say) is not trained.

    Args:
        trained_from: index of the first turn that may be trained.
        options: further arguments of the chat template (`tools`).

    Returns:
        Ids and labels of equal length; a label is -100 where nothing is trained.
    """
    ((ids, start),) = encode_rows(tokenizer, [turns[:-1]], [turns[-1]], **options)
    labels = [IGNORED] * start + ids[start:]
    for index in range(trained_from, len(turns) - 1):
        if turns[index]["role"] != "assistant":
            continue
        ((before, begin),) = encode_rows(tokenizer, [turns[:index]], [turns[index]], **options)
        if ids[: len(before)] == before:
            labels[begin : len(before)] = before[begin:]
    return ids, labels


def encode_document(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Return the ids of a whole text as SFT reads it: as the tokenizer begins a text, with EOS at its end."""
    end = tokenizer.eos_token or ""
    return _encode(tokenizer, [text], [text.removesuffix(end) + end])[0]


def batched(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Yield consecutive slices of `size` items (the last may be shorter)."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
