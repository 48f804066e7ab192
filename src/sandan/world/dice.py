"""Random choices from `random.Random.random()` alone, whose sequence Python promises to keep for a seed."""

import random
from collections.abc import Sequence
from typing import TypeVar


T = TypeVar("T")


def pick(rng: random.Random, items: Sequence[T], shares: Sequence[float] | None = None) -> T:
    """One item, each with the same chance or in proportion to `shares`."""
    if shares is None:
        return items[int(rng.random() * len(items))]
    point = rng.random() * sum(shares)
    for item, share in zip(items, shares, strict=True):
        point -= share
        if point < 0:
            return item
    return items[-1]


def shuffled(rng: random.Random, items: Sequence[T]) -> list[T]:
    """The items in random order."""
    return [item for _, item in sorted(((rng.random(), item) for item in items), key=lambda pair: pair[0])]
