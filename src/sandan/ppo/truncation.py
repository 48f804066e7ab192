"""Cut sampled answers after the first occurrence of a text (`truncate_after`), the sentence's period for example."""

import bisect
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..models.sampling import Completion
from .rollout import Rollout


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def end_after(
    tokenizer: "PreTrainedTokenizerBase", token_ids: Sequence[int], texts: Sequence[str], min_tokens: int = 0
) -> int | None:
    """Return how many tokens remain of an answer that is cut after the first occurrence of one of `texts`, or None.

    Ziegler et al. 2019 (arXiv 1909.08593, section 3, and their code: `truncate_token`, `truncate_after`) cut answers at
    the first period or newline after 16 tokens; N+ has `truncate_token`. Here a text may span tokens or lie inside one.
    A token is kept whole, so what it says after the text stays.

    Args:
        token_ids: of the answer, without its stop token.
        min_tokens: an occurrence that ends within fewer tokens does not count.
    """

    def decoded(count: int) -> str:
        return tokenizer.decode(token_ids[:count], skip_special_tokens=False)

    first = max(min_tokens, 1)
    passed = len(decoded(first - 1)) if first > 1 else 0

    def has_text(count: int) -> bool:
        answer = decoded(count)
        return any(answer.find(text, max(passed - len(text) + 1, 0)) >= 0 for text in texts)

    if len(token_ids) < first or not has_text(len(token_ids)):
        return None
    # Once an answer has the text it keeps it, so its first token count can be found by halving.
    return bisect.bisect_left(range(len(token_ids)), True, lo=first, key=has_text)


def truncate(
    tokenizer: "PreTrainedTokenizerBase", answer: Completion, texts: Sequence[str], min_tokens: int = 0
) -> Completion:
    """Return an answer cut as in [`end_after`]; it then counts as stopped, and a stop token after the text is gone."""
    ids = answer.token_ids[:-1] if answer.stopped else answer.token_ids
    end = end_after(tokenizer, ids, texts, min_tokens)
    if end is None:
        return answer
    return Completion(tokenizer.decode(ids[:end], skip_special_tokens=False), ids[:end], True)


def truncate_answers(
    tokenizer: "PreTrainedTokenizerBase", rollout: Rollout, texts: Sequence[str], min_tokens: int = 0
) -> Rollout:
    """Return a rollout with its answers cut as in [`truncate`], and the sampler's log-probs with them."""
    answers = [truncate(tokenizer, answer, texts, min_tokens) for answer in rollout.completions]
    logprobs = rollout.sampling_logprobs
    if logprobs is not None:
        logprobs = [row[: len(answer.token_ids)] for row, answer in zip(logprobs, answers, strict=True)]
    return dataclasses.replace(rollout, completions=answers, sampling_logprobs=logprobs)
