"""Simulated rankers: noisy rankings from true utilities, by the Plackett-Luce model.

One judgement is one line of an append-only JSONL file:
`{"prompt_id", "prompt", "candidates": [in the order shown], "ranks": [1 = best, equal = tie], "annotator", "time"}`.
The log of people and models (`sandan.preference.judgement_log`) has more columns.
"""

import itertools
import math
import random
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from ..models.sampling import Completion


def distinct_candidates(completions: "Sequence[Completion]") -> list[str]:
    """Return the answer texts without repeats and without empty ones, in the order of their first occurrence."""
    return list(dict.fromkeys(c.text for c in completions if c.text.strip()))


def agreement_probability(gap: float, temperature: float) -> float:
    """Return the probability that two Plackett-Luce rankers order two answers alike whose utilities differ by `gap`.

    Each ranks the better answer first with p = sigmoid(gap / temperature), so they agree with p² + (1 - p)².
    """
    p = 1 / (1 + math.exp(-gap / temperature))
    return p * p + (1 - p) * (1 - p)


def noise_temperature(utilities: Iterable[Sequence[float]], agreement: float) -> float:
    """Find the Plackett-Luce temperature at which two rankers agree on a share `agreement` of the pairs that differ.

    Args:
        utilities: for each prompt, the true utility of each candidate.
        agreement: target share in (0.5, 1); people reach about 0.75 (InstructGPT 0.73 to 0.77).
    """
    gaps = [abs(a - b) for row in utilities for a, b in itertools.combinations(row, 2) if a != b]
    if not gaps:
        return 1.0
    low, high = 1e-3, 1e3
    for _ in range(60):
        middle = math.sqrt(low * high)
        mean = sum(agreement_probability(gap, middle) for gap in gaps) / len(gaps)
        low, high = (middle, high) if mean > agreement else (low, middle)
    return math.sqrt(low * high)


def simulate_ranks(utilities: Sequence[float], temperature: float, rng: random.Random) -> list[int]:
    """Draw the ranks (1 = best) of a noisy ranker; answers of exactly equal utility are tied half of the time.

    Sorting by utility/temperature + Gumbel noise draws a ranking from the Plackett-Luce model (Gumbel trick).
    """
    noisy = [utility / temperature - math.log(-math.log(rng.random() or 1e-300)) for utility in utilities]
    order = sorted(range(len(noisy)), key=lambda index: -noisy[index])
    ranks = [0] * len(noisy)
    for place, index in enumerate(order, start=1):
        above = order[place - 2] if place > 1 else None
        tied = above is not None and utilities[above] == utilities[index] and rng.random() < 0.5
        ranks[index] = ranks[above] if tied else place
    return ranks
