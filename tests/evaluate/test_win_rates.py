"""Win rates, plain and at equal length, on data whose rates are known."""

import numpy as np
import pytest

from sandan.evaluate.win_rates import length_controlled_rates, win_rates


def rates_of(wins, differences):
    return length_controlled_rates(np.asarray(wins, float), np.asarray(differences, float), np.ones((1, len(wins))))[0]


def test_the_rate_at_equal_length_is_the_one_that_the_data_were_made_with():
    random = np.random.default_rng(0)
    differences = random.normal(20, 15, 20_000)
    odds = 0.5 + 1.5 * np.tanh(differences / differences.std())
    wins = random.random(len(odds)) < 1 / (1 + np.exp(-odds))
    assert wins.mean() > 0.75, "the longer answer is liked"
    assert rates_of(wins, differences) == pytest.approx(1 / (1 + np.exp(-0.5)), abs=0.015)


def test_without_a_difference_of_length_both_rates_are_the_same():
    found = win_rates([1, 1, 1, 0, 0.5] * 40, [0, 0, 0, 1, 0.5] * 40, [7] * 200, [7] * 200)
    assert found["win_rate"] == pytest.approx(0.7), "a tie is half a win"
    assert found["win_rate_length_controlled"] == pytest.approx(0.7, abs=0.002)
    for name in ("win_rate", "win_rate_length_controlled"):
        assert 0.6 < found[f"{name}_low"] < 0.7 < found[f"{name}_high"] < 0.8


def test_a_judge_that_counts_words_sees_no_win_at_equal_length():
    random = np.random.default_rng(1)
    lengths, before = random.integers(20, 60, 400), random.integers(10, 50, 400)
    found = win_rates(lengths, before, lengths, before)
    assert found["win_rate_low"] > 0.6
    assert found["win_rate_length_controlled_low"] < 0.5 < found["win_rate_length_controlled_high"]


def test_a_model_that_always_wins_has_a_rate_below_1_and_no_overflow():
    with np.errstate(all="raise", under="ignore"):
        assert 0.98 < rates_of([1] * 300, [0, 1, -1] * 100) < 1
        assert 0.5 < rates_of([1] * 300, [-19.0, -20.0, -21.0] * 100) < 1
