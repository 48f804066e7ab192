"""Bootstrap intervals cover the truth, and know that answers to one prompt belong together."""

import numpy as np
import pytest

from sandan.core.bootstrap import bootstrap_interval


def test_interval_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        _, low, high = bootstrap_interval(rng.normal(0.3, 1.0, size=100), resamples=400, seed=seed)
        covered += low < 0.3 < high
    assert 0.88 < covered / 200 < 0.99


def test_rows_of_one_group_are_drawn_together():
    rng = np.random.default_rng(1)
    values = np.repeat(rng.normal(size=50), 10)
    groups = [f"prompt {index // 10}" for index in range(500)]
    mean, low, high = bootstrap_interval(values, groups)
    alone = bootstrap_interval(values)
    assert mean == alone[0] == pytest.approx(values.mean())
    assert high - low > 2 * (alone[2] - alone[1])


def test_groups_of_unequal_size_keep_the_mean_of_rows():
    mean, low, high = bootstrap_interval([1, 1, 1, 0], ["a", "a", "a", "b"])
    assert (mean, low, high) == (0.75, 0.0, 1.0)


def test_same_seed_same_interval():
    values = [0, 1, 1, 0, 1]
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval([1.0, 1.0]) == (1.0, 1.0, 1.0)
