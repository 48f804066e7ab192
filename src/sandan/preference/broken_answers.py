"""Preference pairs of a real answer and a damaged copy of it, so that the reward model learns to score damage low.

A reward model is trained on answers of the SFT policy. Its scores of meaningless text are arbitrary, and PPO finds the
meaningless text that happens to score high.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..data.chat import text_of


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = list[int]


def repeat_start(tokens: Tokens, other: Tokens, rng: random.Random) -> Tokens:
    """Return the answer after a false start: "I don't I don't know."."""
    return tokens[: rng.randint(1, len(tokens))] + tokens


def stutter(tokens: Tokens, other: Tokens, rng: random.Random) -> Tokens:
    """Return the answer with one passage repeated once or several times."""
    start = rng.randrange(len(tokens))
    end = rng.randint(start + 1, len(tokens))
    return tokens[:end] + tokens[start:end] * rng.randint(1, 3) + tokens[end:]


def cut(tokens: Tokens, other: Tokens, rng: random.Random) -> Tokens:
    """Return the beginning of the answer."""
    return tokens[: rng.randint(1, max(len(tokens) - 1, 1))]


def leave_out(tokens: Tokens, other: Tokens, rng: random.Random) -> Tokens:
    """Return the answer with one passage left out."""
    start = rng.randrange(len(tokens))
    return tokens[:start] + tokens[rng.randint(start + 1, len(tokens)) :]


def splice(tokens: Tokens, other: Tokens, rng: random.Random) -> Tokens:
    """Return the beginning of the answer and the end of another one."""
    return tokens[: rng.randint(1, len(tokens))] + other[rng.randrange(len(other)) :]


def shuffle(tokens: Tokens, other: Tokens, rng: random.Random) -> Tokens:
    """Return the tokens of the answer in another order."""
    return rng.sample(tokens, len(tokens))


DAMAGES: tuple[Callable[[Tokens, Tokens, random.Random], Tokens], ...] = (
    repeat_start,
    stutter,
    cut,
    leave_out,
    splice,
    shuffle,
)
TRIES = 10


def break_answer(answer: str, other: str, tokenizer: "PreTrainedTokenizerBase", rng: random.Random) -> str | None:
    """Return a damaged copy of an answer, or None if no attempt gave a text that differs from both answers.

    Args:
        other: another answer, whose end [`splice`] uses.
    """
    tokens, others = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (answer, other))
    if not tokens or not others:
        return None
    for _ in range(TRIES):
        text = tokenizer.decode(rng.choice(DAMAGES)(tokens, others, rng)).strip()
        if text and text not in (answer.strip(), other.strip()):
            return text
    return None


def broken_pairs(
    pairs: Sequence[dict[str, Any]], share: float, tokenizer: "PreTrainedTokenizerBase", seed: int
) -> Iterator[dict[str, Any]]:
    """Yield pairs of a real answer, chosen, and a damaged copy of it, rejected.

    Args:
        pairs: preference pairs, as text or as turns; the real answer is the chosen or the rejected one of a pair.
        share: how many pairs to make, as a share of `pairs`.
    """
    rng = random.Random(seed)
    for pair in rng.sample(pairs, round(share * len(pairs))):
        side = rng.choice(("chosen", "rejected"))
        answer = pair[side]
        text, other = map(text_of, (answer, rng.choice(pairs)[rng.choice(("chosen", "rejected"))]))
        if broken := break_answer(text, other, tokenizer, rng):
            damaged = broken if isinstance(answer, str) else [*answer[:-1], {**answer[-1], "content": broken}]
            yield {**pair, "chosen": answer, "rejected": damaged}
