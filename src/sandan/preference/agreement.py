"""Agreement of annotators with one another and with themselves, and remarks on unusual annotators.

Everything is computed from standing judgements (`sandan.preference.judgement_log.standing_judgements`), by people or
models. A second showing of an item to the same annotator (`showing` 1) counts for self-consistency only.
"""

import itertools
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..core.bootstrap import bootstrap_interval


FAST_SECONDS = 2.0
SLOW_FACTOR = 3.0
FEWEST = 10


class Order(NamedTuple):
    """A strict preference: one annotator ranked one answer above another. A tie makes no `Order`."""

    prompt_id: str
    annotator: str
    better: str
    worse: str


class Comparison(NamedTuple):
    """Two annotators' orders of the same two answers; `alike` is true if they agree."""

    prompt_id: str
    one: str
    other: str
    alike: bool


def orders_of(judgement: dict[str, Any]) -> list[Order]:
    """Return all strict pairs of a judgement, in the order of its candidates."""
    ranked = zip(judgement["candidates"], judgement["ranks"], strict=True)
    return [
        Order(judgement["prompt_id"], judgement["annotator"], *((a, b) if rank_a < rank_b else (b, a)))
        for (a, rank_a), (b, rank_b) in itertools.combinations(ranked, 2)
        if rank_a != rank_b
    ]


def compare_orders(orders: Iterable[Order]) -> list[Comparison]:
    """Compare every two orders of the same two answers by different annotators."""
    by_pair: dict[tuple[str, frozenset[str]], list[Order]] = defaultdict(list)
    for order in orders:
        by_pair[order.prompt_id, frozenset((order.better, order.worse))].append(order)
    return [
        Comparison(prompt, first.annotator, second.annotator, first.better == second.better)
        for (prompt, _), same in by_pair.items()
        for first, second in itertools.combinations(same, 2)
        if first.annotator != second.annotator
    ]


def interval(values: Sequence[float], groups: Sequence[str]) -> dict[str, float] | None:
    """Return mean, 95% bootstrap interval (whole groups are drawn) and count; None if there are no values."""
    if not len(values):
        return None
    mean, low, high = bootstrap_interval(values, groups)
    return {"mean": mean, "low": low, "high": high, "count": len(values)}


def pairwise_agreement(comparisons: Sequence[Comparison]) -> dict[str, float] | None:
    """Return the share of pairs that two annotators order alike, with its interval over prompts.

    Returns:
        As [`interval`]; None if no two annotators judged the same pair.
    """
    return interval(
        [comparison.alike for comparison in comparisons], [comparison.prompt_id for comparison in comparisons]
    )


def krippendorff_alpha(
    judgements: Iterable[dict[str, Any]], resamples: int = 1000, seed: int = 0
) -> dict[str, float] | None:
    """Return Krippendorff's alpha for ordinal data with a 95% bootstrap interval over prompts.

    A unit is one answer; its values are the ranks that annotators gave it. 1 is full agreement, 0 is agreement by
    chance. Unlike pairwise agreement, alpha takes account of ties and of the distance of two ranks. (Krippendorff,
    Content Analysis, 4th ed., 12.3; coincidence matrices of prompts are summed, so a bootstrap sample costs one matrix
    product.)

    Returns:
        `dict` with `mean` (the alpha), `low`, `high`, `count` (units); None if no answer was ranked twice.
    """
    units: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for judgement in judgements:
        for answer, rank in zip(judgement["candidates"], judgement["ranks"], strict=True):
            units[judgement["prompt_id"]][answer].append(rank)
    values = max((rank for answers in units.values() for ranks in answers.values() for rank in ranks), default=1)
    matrices, count = [], 0
    for answers in units.values():
        shared = [ranks for ranks in answers.values() if len(ranks) > 1]
        if shared:
            matrices.append(sum(_coincidences(ranks, values) for ranks in shared))
            count += len(shared)
    if not matrices:
        return None
    coincidences = np.stack(matrices)
    drawn = np.random.default_rng(seed).multinomial(len(matrices), [1 / len(matrices)] * len(matrices), resamples)
    alphas = ordinal_alpha(np.tensordot(drawn, coincidences, axes=1))
    low, high = np.nanpercentile(alphas, [2.5, 97.5])
    return {"mean": float(ordinal_alpha(coincidences.sum(0))), "low": float(low), "high": float(high), "count": count}


def _coincidences(ranks: Sequence[int], values: int) -> np.ndarray:
    """Count how often each two values occur together in one unit, `(values, values)`; each annotator counts once."""
    counts = np.bincount(np.asarray(ranks) - 1, minlength=values).astype(float)
    return (np.outer(counts, counts) - np.diag(counts)) / (len(ranks) - 1)


def ordinal_alpha(coincidences: np.ndarray) -> np.ndarray:
    """Return alpha of coincidence matrices `(..., values, values)`; it is 1 where all values are the same."""
    totals = coincidences.sum(-1)
    cumulated = totals.cumsum(-1)
    # The number of values from c to k, both ends counted half, squared: (sum_{g=c..k} n_g - (n_c + n_k) / 2)^2.
    middle = cumulated - totals / 2
    distance = (middle[..., :, None] - middle[..., None, :]) ** 2
    count = totals.sum(-1)
    observed = (coincidences * distance).sum((-1, -2)) / count
    expected = (totals[..., :, None] * totals[..., None, :] * distance).sum((-1, -2)) / (count * (count - 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(expected > 0, 1 - observed / expected, 1.0)


def self_consistency(judgements: Iterable[dict[str, Any]]) -> dict[str, float] | None:
    """Return the share of pairs that an annotator orders the same way when an item is shown again, unmarked."""
    showings: dict[tuple[str, str], list[dict[tuple[str, str], bool]]] = defaultdict(list)
    for judgement in judgements:
        orders = {(order.better, order.worse): True for order in orders_of(judgement)}
        showings[judgement["annotator"], judgement.get("item_id", judgement["prompt_id"])].append(orders)
    alike, groups = [], []
    for (annotator, item), (first, *later) in showings.items():
        for again in later:
            for better, worse in first:
                if (better, worse) in again or (worse, better) in again:
                    alike.append((better, worse) in again)
                    groups.append(f"{annotator} {item}")
    return interval(alike, groups)


def position_bias(judgements: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """Return the share of strict pairs whose better answer was further up on the page; 0.5 means no bias."""
    earlier, groups = [], []
    for number, judgement in enumerate(judgements):
        for upper, lower in itertools.combinations(judgement["ranks"], 2):
            if upper != lower:
                earlier.append(upper < lower)
                groups.append(str(number))
    return interval(earlier, groups)


def analyse(judgements: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compute all agreement figures, as JSON types only.

    Returns:
        `dict`: `pairwise_agreement`, `krippendorff_alpha`, `self_consistency`, `position_bias` (each with interval and
        count, or None) and `annotators`, one row for each; its `remarks` name what is unusual.
    """
    first = [judgement for judgement in judgements if not judgement.get("showing")]
    comparisons = compare_orders(order for judgement in first for order in orders_of(judgement))
    mine: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for judgement in judgements:
        mine[judgement["annotator"]].append(judgement)
    rows = [annotator_row(name, own, comparisons) for name, own in sorted(mine.items())]
    for row in rows:
        others = [other["seconds"] for other in rows if other is not row and other["seconds"] is not None]
        row["remarks"] = remarks(row, others, [pair for pair in comparisons if row["annotator"] not in pair[1:3]])
    return {
        "judgements": len(judgements),
        "pairwise_agreement": pairwise_agreement(comparisons),
        "krippendorff_alpha": krippendorff_alpha(first),
        "self_consistency": self_consistency(judgements),
        "position_bias": position_bias(judgements),
        "annotators": rows,
    }


def annotator_row(name: str, own: Sequence[dict[str, Any]], comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Return one annotator's figures: pace, agreement with others and themselves, position bias, ties, patterns."""
    seconds = [judgement["seconds"] for judgement in own if judgement.get("seconds") is not None]
    longest = [tuple(judgement["ranks"]) for judgement in own if len(judgement["ranks"]) > 2]
    pairs = [ranks for judgement in own for ranks in itertools.combinations(judgement["ranks"], 2)]
    return {
        "annotator": name,
        "kind": own[-1].get("annotator_kind", "unknown"),
        "judgements": len(own),
        "seconds": statistics.median(seconds) if seconds else None,
        "agreement": pairwise_agreement([comparison for comparison in comparisons if name in comparison[1:3]]),
        "self_consistency": self_consistency(own),
        "position_bias": position_bias(own),
        "ties": sum(upper == lower for upper, lower in pairs) / len(pairs) if pairs else 0.0,
        "most_common_ranks": Counter(longest).most_common(1)[0][1] / len(longest) if longest else None,
    }


def remarks(row: dict[str, Any], other_seconds: Sequence[float], among_others: Sequence[Comparison]) -> list[str]:
    """Describe in words what is unusual about an annotator; an empty list if they made fewer than ten judgements.

    Args:
        row: from [`annotator_row`].
        other_seconds: the other annotators' median seconds per item.
        among_others: comparisons between other annotators only.
    """
    if row["judgements"] < FEWEST:
        return []
    said = []
    if row["seconds"] is not None and row["kind"] == "human":
        if row["seconds"] < FAST_SECONDS:
            said.append(f"fast: {row['seconds']:.1f} s an item")
        elif other_seconds and row["seconds"] > SLOW_FACTOR * statistics.median(other_seconds):
            said.append(f"slow: {row['seconds']:.0f} s an item, the others {statistics.median(other_seconds):.0f} s")
    agreement, rest = row["agreement"], pairwise_agreement(among_others)
    if agreement and agreement["low"] <= 0.5:
        said.append(f"agrees with the others no better than chance ({agreement['mean']:.0%})")
    elif agreement and rest and agreement["high"] < rest["low"]:
        said.append(f"agrees less ({agreement['mean']:.0%}) than the others do ({rest['mean']:.0%})")
    bias = row["position_bias"]
    if bias and not bias["low"] <= 0.5 <= bias["high"] and abs(bias["mean"] - 0.5) > 0.1:
        said.append(f"goes by position: the upper answer wins {bias['mean']:.0%} of the pairs")
    if row["most_common_ranks"] is not None and row["most_common_ranks"] > 0.5:
        said.append(f"the same ranks {row['most_common_ranks']:.0%} of the time")
    return said
