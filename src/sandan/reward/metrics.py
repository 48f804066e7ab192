"""Metrics of a reward model: accuracy and its ceiling, length bias, calibration, and the scale of its scores."""

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.bootstrap import bootstrap_interval
from ..core.errors import UserError
from ..core.stage import is_main_process
from ..data.chat import prompt_id, text_of
from ..models.loading import unquantized
from ..models.score_scale import ScoreScale
from ..models.scoring import score_rows
from ..preference.agreement import Order, compare_orders, interval, pairwise_agreement
from .rows import encode_pairs


if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The answers of so many pairs give the mean with an error of a few hundredths of a standard deviation.
SCALE_PAIRS = 1000


def init_head(head: "nn.Linear", seed: int) -> None:
    """Draw the score head from N(0, 1/sqrt(d + 1)) (Stiennon et al. 2020; Huang et al. 2024, arXiv 2403.17031)."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(head.weight.shape, generator=generator) / (head.in_features + 1) ** 0.5
    with torch.no_grad():
        head.weight.copy_(weight.to(head.weight))


def pair_metrics(
    chosen: Sequence[float],
    rejected: Sequence[float],
    chosen_tokens: Sequence[int],
    rejected_tokens: Sequence[int],
    groups: Sequence[str],
) -> dict[str, float]:
    """Return metrics of scored held-out pairs.

    Args:
        chosen, rejected: scores, one per pair.
        chosen_tokens, rejected_tokens: lengths in tokens; only their difference counts.
        groups: the pairs' prompt ids; pairs of one prompt are resampled together.
    """
    margin = np.asarray(chosen) - np.asarray(rejected)
    longer = np.asarray(chosen_tokens) - np.asarray(rejected_tokens)
    accuracy, low, high = bootstrap_interval(margin > 0, groups)
    longer_wins, longer_low, longer_high = bootstrap_interval(np.where(longer == 0, 0.5, longer > 0), groups)
    varies = margin.std() > 0 and longer.std() > 0
    return {
        "eval_accuracy": accuracy,
        "eval_accuracy_low": low,
        "eval_accuracy_high": high,
        "mean_margin": float(margin.mean()),
        "length_correlation": float(np.corrcoef(margin, longer)[0, 1]) if varies else 0.0,
        "longer_answer_accuracy": longer_wins,
        "longer_answer_accuracy_low": longer_low,
        "longer_answer_accuracy_high": longer_high,
    }


def evaluate_pairs(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[dict[str, Any]],
    oracle: str,
    max_length: int | None = None,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Score held-out preference rows.

    Args:
        max_length: the most tokens of a side; longer pairs are left out, as in the evaluations while training.

    Returns:
        `tuple`: [`pair_metrics`], with the ceiling if there is an oracle, and [`diagnose`].
    """
    tokens = encode_pairs(tokenizer, rows)
    lengths = [max(map(len, pair)) for pair in zip(*tokens.values(), strict=True)]
    kept = [index for index, length in enumerate(lengths) if max_length is None or length <= max_length]
    rows = [rows[index] for index in kept]
    tokens = {side: [ids[index] for index in kept] for side, ids in tokens.items()}
    scores = {side: score_rows(model, ids) for side, ids in tokens.items()}
    lengths = {side: list(map(len, ids)) for side, ids in tokens.items()}
    groups = [prompt_id(row) for row in rows]
    metrics = pair_metrics(scores["chosen"], scores["rejected"], lengths["chosen"], lengths["rejected"], groups)
    margins = np.subtract(scores["chosen"], scores["rejected"])
    diagnosis = diagnose(margins, np.subtract(lengths["chosen"], lengths["rejected"]), groups, rows)
    metrics["calibration_error"] = diagnosis["calibration_error"]
    if human := diagnosis["human_agreement"]:
        metrics |= {
            f"human_agreement{end}": human[key] for end, key in (("", "mean"), ("_low", "low"), ("_high", "high"))
        }
    if oracle == "world":
        from ..world.oracle import judge

        metrics["ceiling_accuracy"] = ceiling_accuracy(rows, judge)
    return metrics, diagnosis


def diagnose(
    margins: np.ndarray, longer: np.ndarray, groups: Sequence[str], rows: Sequence[dict[str, Any]], bins: int = 10
) -> dict[str, Any]:
    """Measure where a reward model is right, and how well its confidence matches its accuracy.

    Args:
        margins: score of the chosen minus score of the rejected answer, one per pair.
        longer: number of tokens by which the chosen answer is longer.
        groups: prompt ids; pairs of one prompt are resampled together.
        rows: the pairs; `annotator` and `margin` (difference of ranks) are used if present.
        bins: number of points of the calibration curve, each of equally many pairs.

    Returns:
        `dict`, JSON types only; an accuracy has `mean`, `low`, `high`, `count`:
        `calibration`: `confidence` (the model's own probability sigmoid(|margin|) that it is right) and accuracy;
        `calibration_error`: mean distance of the two; `by_annotator`; `by_rank_difference`; `by_length` (the chosen
        answer is `longer`, `shorter`, or of the `same` length); `human_agreement`: how often two annotators of a pair
        agree, which is the accuracy of a person as a reward model (None if no two annotators share a pair).
    """
    right = np.where(margins == 0, 0.5, margins > 0)
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    groups = np.asarray(groups)

    def accuracy(where: np.ndarray) -> dict[str, float] | None:
        return interval(right[where], groups[where])

    def split(values: Sequence[Any]) -> dict[str, Any]:
        values = np.asarray(values)
        return {str(value): accuracy(values == value) for value in np.unique(values)}

    parts = [part for part in np.array_split(np.argsort(confidence, kind="stable"), bins) if len(part)]
    curve = [{"confidence": float(confidence[part].mean()), **accuracy(part)} for part in parts]
    error = sum(point["count"] * abs(point["confidence"] - point["mean"]) for point in curve) / len(margins)
    known = [row for row in rows if row.get("annotator")]
    orders = [
        Order(group, row["annotator"], text_of(row["chosen"]), text_of(row["rejected"]))
        for group, row in zip(groups.tolist(), rows, strict=True)
        if row.get("annotator")
    ]
    return {
        "calibration": curve,
        "calibration_error": float(error),
        "by_annotator": split([row["annotator"] for row in rows]) if len(known) == len(rows) else {},
        "by_rank_difference": split([row["margin"] for row in rows]) if all("margin" in row for row in rows) else {},
        "by_length": split(np.where(longer > 0, "longer", np.where(longer < 0, "shorter", "same"))),
        "human_agreement": pairwise_agreement(compare_orders(orders)),
    }


def ceiling_accuracy(rows: Sequence[dict[str, Any]], judge: Callable[[Any, str], Any]) -> float:
    """Return the accuracy of a perfect judge on these noisy pairs; pairs of truly equal answers count half."""

    scores: dict[tuple[str, str], float] = {}  # of each answer, which a ranking has in several pairs

    def score(row: dict[str, Any], side: str) -> float:
        key = prompt_id(row), text_of(row[side])
        if key not in scores:
            scores[key] = judge(row["prompt"], key[1]).score
        return scores[key]

    def order(row: dict[str, Any]) -> float:
        chosen, rejected = score(row, "chosen"), score(row, "rejected")
        return 0.5 if chosen == rejected else float(chosen > rejected)

    return float(np.mean([order(row) for row in rows]))


def store_scale(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: Iterable[dict[str, Any]], folder: Path
) -> dict[str, float]:
    """Measure the scale of a reward model over the answers of preference pairs, and store it in the saved model.

    In a recipe these answers are samples of the SFT model, from which PPO starts. Each counts once, however often it was
    sampled, so that PPO's first mean score is near 0, not 0 (0.4 deviations in recipe tiny).

    Args:
        rows: pairs, of which the first `SCALE_PAIRS` are used.
        folder: the folder of the saved model; `adapter/` in it holds its adapter, if it has one.

    Returns:
        `score_mean` and `score_deviation`, of raw scores.
    """
    rows = list(itertools.islice(rows, SCALE_PAIRS))
    ids = {tuple(ids) for side in encode_pairs(tokenizer, rows).values() for ids in side}
    scale = ScoreScale.measured(score_rows(model, sorted(ids)))
    scale.store(model.config)
    if is_main_process():
        for saved in (folder, folder / "adapter"):
            if saved.is_dir():
                unquantized(model.config).save_pretrained(saved)
    return {"score_mean": scale.mean, "score_deviation": scale.deviation}


def check_disjoint(train: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]]) -> None:
    """Raise [`UserError`] if a prompt is in both splits, by `prompt_id` or by text: its answers would leak."""
    for name in (prompt_id, _prompt_words):
        shared = set(map(name, train)) & set(map(name, held_out)) - {None, ""}
        if shared:
            raise UserError(
                f"eval_data_files: {len(shared):,} prompts are in the training pairs too; split by prompt, not by pair"
            )


def _prompt_words(row: dict[str, Any]) -> str | None:
    # A pair of conversations without a column `prompt` has its prompt in all turns but the last.
    chosen = row.get("chosen")
    prompt = row.get("prompt", chosen[:-1] if isinstance(chosen, list) else None)
    return json.dumps(prompt, ensure_ascii=False) if prompt else None
