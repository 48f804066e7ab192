"""Win rates of one model over another on the same prompts, plain and at equal length, with bootstrap intervals.

A judge that likes long answers prefers a model that writes long ones. Beside the plain win rate stands therefore the
one of AlpacaEval 2 LC (Dubois et al. 2024, arXiv 2404.04475, equation 2, without its term for single prompts): with y
the win (1, or 1/2 for a tie) and d the difference of the two lengths,

    P(y = 1) = sigmoid(theta + phi tanh(d / std(d)))

is fitted to all prompts, and sigmoid(theta) is the win rate of two answers of the same length. A mean over prompts with
answers of like length would be the alternative; it is empty where one model always writes more, as a collapsed one does.
"""

from collections.abc import Sequence

import numpy as np

from ..core.bootstrap import bootstrap_interval


# A normal prior on theta and phi of variance 1 / RIDGE keeps them finite if one model always wins.
RIDGE = 0.1
NEWTON_STEPS, LONGEST_STEP = 60, 1.0
RESAMPLES = 1000


def win_rates(
    scores: Sequence[float], scores_before: Sequence[float], lengths: Sequence[int], lengths_before: Sequence[int]
) -> dict[str, float]:
    """Return `win_rate` and `win_rate_length_controlled` of a model over the one before, with 95% intervals.

    Args:
        scores, scores_before: the judge's scores of the answers of the two models to each prompt.
        lengths, lengths_before: tokens of the answers.
    """
    margins = np.asarray(scores, dtype=float) - np.asarray(scores_before, dtype=float)
    wins = (1 + np.sign(margins)) / 2
    differences = np.asarray(lengths, dtype=float) - np.asarray(lengths_before, dtype=float)
    plain = bootstrap_interval(wins.tolist(), resamples=RESAMPLES)
    counts = np.random.default_rng(0).multinomial(len(wins), np.full(len(wins), 1 / len(wins)), size=RESAMPLES)
    whole = length_controlled_rates(wins, differences, np.ones((1, len(wins))))[0]
    low, high = np.percentile(length_controlled_rates(wins, differences, counts), [2.5, 97.5])
    return named("win_rate", *plain) | named("win_rate_length_controlled", whole, low, high)


def named(name: str, value: float, low: float, high: float) -> dict[str, float]:
    """Return a value and the ends of its interval under their names."""
    return {name: float(value), f"{name}_low": float(low), f"{name}_high": float(high)}


def length_controlled_rates(wins: np.ndarray, differences: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return sigmoid(theta) of the model above for each row of counts, by Newton's method.

    Args:
        wins (`(N,)`): 1, 0, or 1/2 for a tie.
        differences (`(N,)`): lengths of the model's answers less those of the other's.
        counts (`(R, N)`): how often each prompt counts, in each of R samples.
    """
    length = np.tanh(differences / (differences.std() or 1.0))
    features = np.stack([np.ones_like(length), length], axis=1)
    squares = features[:, :, None] * features[:, None, :]
    theta = np.zeros((len(counts), 2))
    for _step in range(NEWTON_STEPS):
        rates = 1 / (1 + np.exp(-theta @ features.T))
        gradient = (counts * (wins - rates)) @ features - RIDGE * theta
        curvature = np.tensordot(counts * rates * (1 - rates), squares, axes=1) + RIDGE * np.eye(2)
        step = np.linalg.solve(curvature, gradient[:, :, None])[:, :, 0]
        theta += np.clip(step, -LONGEST_STEP, LONGEST_STEP)
        if np.abs(step).max() < 1e-8:
            break
    return 1 / (1 + np.exp(-theta[:, 0]))
