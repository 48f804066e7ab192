"""Random choices that use only `random.Random.random()`, whose sequence for a seed Python promises not to change."""

import random
from collections.abc import Sequence
from typing import TypeVar


T = TypeVar("T")


def pick(rng: random.Random, items: Sequence[T], shares: Sequence[float] | None = None) -> T:
    """Return a random item: all equally likely, or in proportion to `shares`."""
    if shares is None:
        return items[int(rng.random() * len(items))]
    point = rng.random() * sum(shares)
    for item, share in zip(items, shares, strict=True):
        point -= share
        if point < 0:
            return item
    return items[-1]


def in_random_order(rng: random.Random, items: Sequence[T]) -> list[T]:
    """Return the items in random order."""
    return [item for _, item in sorted(((rng.random(), item) for item in items), key=lambda pair: pair[0])]
