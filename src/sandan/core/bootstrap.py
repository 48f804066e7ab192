"""Bootstrap intervals for values that were measured on a sample of prompts."""

from collections.abc import Sequence

import numpy as np


def bootstrap_interval(
    values: Sequence[float], groups: Sequence[str] | None = None, resamples: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Return the mean and its 95% percentile bootstrap interval: (mean, low, high).

    Args:
        values: one number per row.
        groups: rows that share a group (pairs of one prompt) are drawn together, as they are not independent.
        resamples: number of bootstrap samples.
    """
    values = np.asarray(values, dtype=float)
    _, index = np.unique(np.arange(len(values)) if groups is None else np.asarray(groups), return_inverse=True)
    sums, counts = np.bincount(index, weights=values), np.bincount(index)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)
