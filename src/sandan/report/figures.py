"""The figures of a report: their names, their groups and their formatting."""

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any


MODELS = {"base": "Base", "sft": "SFT", "ppo": "PPO"}


# The name of every figure in the report: key (without the prefix of its group) -> label.
LABELS = {
    "correct": "right in every respect",
    "score": "mean of the four scores",
    "helpful": "helpful",
    "accurate": "accurate",
    "safe": "safe",
    "natural": "natural",
    "reward_score": "reward model's score",
    "kl_to_sft": "KL to SFT (nats per answer)",
    "win_rate": "preferred to the model before",
    "win_rate_length_controlled": "the same at equal length",
    "response_tokens": "answer length (tokens)",
    "distinct_2": "distinct pairs of tokens (distinct-2)",
    "commonest_share": "prompts with the most frequent answer",
    "repeated_share": "repeated 3-grams of an answer",
    "entropy_per_token": "entropy (nats per token)",
    "stopped_share": "answers that end by themselves",
    "bits_per_byte": "bits per byte of unseen text",
    "eval_bits_per_byte": "bits per byte of unseen text",
    "untrained_bits_per_byte": "the same, untrained",
    "eval_loss": "loss on unseen rows (nats per token)",
    "eval_loss_before": "the same, before training",
    "eval_accuracy": "accuracy on unseen pairs",
    "ceiling_accuracy": "highest accuracy the labels allow",
    "longer_answer_accuracy": "accuracy of “longer is better”",
    "mean_margin": "mean margin, chosen over rejected",
    "length_correlation": "correlation of score and length",
    "human_agreement": "accuracy of one person for another",
    "calibration_error": "mean error of its certainty",
    "pairwise_agreement": "two rankers order a pair alike",
    "krippendorff_alpha": "Krippendorff’s alpha, ordinal",
    "self_consistency": "a ranker agrees with themselves",
    "position_bias": "the upper of two answers wins",
    "judgements": "judgements",
    "tied_pairs": "tied pairs, left out",
    "true_score_last": "true score, last evaluation",
    "true_score_best": "true score, best evaluation",
    "dropped_rows": "rows left out",
    "parameters": "parameters",
}


# Before the name of an independent judge, in the names of its figures.
JUDGE = "judge/"


GROUPS = {"New combinations": "oracle/", "Pretraining-only facts": "oracle_pretraining_only/"}


SCORES = ("helpful", "accurate", "safe", "natural")


SKILLS = ("grammar", "vocabulary", "common_sense", "context")


WINS = ("win_rate", "win_rate_length_controlled")


PERCENTAGES = ("correct", "accuracy", "share", "agreement", "consistency", "bias", *WINS)


def comparison_table(comparison: list[dict[str, Any]]) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the table base | SFT | PPO as text.

    Returns:
        `tuple`: the models that were compared, and groups of `title` and `rows`. A row has a `label` and `cells`; a
        cell is the figure and its 95% interval ("" if it has none).
    """
    by_model = {row["model"]: row for row in comparison}
    models = [model for model in MODELS if model in by_model]
    judged = {f"Independent judge: {name}": f"{JUDGE}{name}/" for name in judges_of(comparison)}
    prefixes = (*GROUPS.values(), JUDGE)
    others = [key for key in LABELS if not key.startswith(("eval_", "untrained"))]
    others += [key for key in dict.fromkeys(key for row in comparison for key in row) if key not in LABELS]
    others = [key for key in others if not key.startswith(prefixes) and not key.endswith(("_low", "_high"))]
    names = ("correct", "score", *SCORES, *WINS)
    named = [(title, [prefix + name for name in names]) for title, prefix in (GROUPS | judged).items()]
    groups = []
    for title, keys in [*named, ("Answers and text", others)]:
        rows = [
            {"label": label(key), "cells": [_cell(by_model[model], key) for model in models]}
            for key in keys
            if any(is_number(by_model[model].get(key)) for model in models)
        ]
        if rows:
            groups.append({"title": title, "rows": rows})
    return models, groups


def judges_of(comparison: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the independent judges with figures in these rows, the oracle aside."""
    found = {key.split("/")[1] for row in comparison for key in row if key.startswith(JUDGE)}
    return sorted(found)


def _cell(row: dict[str, Any], key: str) -> tuple[str, str]:
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    interval = f"{show(key, low)} – {show(key, high)}" if is_number(low) and is_number(high) else ""
    return show(key, row.get(key)), interval


def headline(report: dict[str, Any]) -> dict[str, Any]:
    """Return the main result: the same figure for base, SFT and PPO.

    Returns:
        `dict`: `text` ("29% → 61% → 97% ..."), `caption` and `steps`, each with `name`, `value`, `interval` and
        `height` (0 to 1).
    """
    captions = {
        "oracle/correct": "of the answers to new questions are right in every respect: "
        "helpful, accurate, safe and natural",
        "oracle/score": "mean of four scores of the answers to new questions: helpful, accurate, safe, natural",
        **{
            f"{JUDGE}{name}/score": f"is the mean score of answers to new questions by {name}, whom training never saw"
            for name in judges_of(report["comparison"])
        },
        "reward_score": "is what the reward model, on which PPO was trained, gives on average to answers to new questions",
        "bits_per_byte": "bits per byte of unseen text",
    }
    rows = [row for model in MODELS for row in report["comparison"] if row["model"] == model]
    for key, caption in captions.items():
        values = [row.get(key) for row in rows]
        if not values or not all(is_number(value) and math.isfinite(value) for value in values):
            continue
        # The oracle's scores start at zero. Other figures have no natural zero: their lowest step is a quarter as high
        # as the highest.
        low, high = (0.0, 1.0) if key.startswith("oracle") else (min(values), max(values))
        floor = 0.0 if key.startswith("oracle") else 0.25
        steps = [
            {
                "name": MODELS[row["model"]],
                "value": f"{row[key]:.0%}" if key == "oracle/correct" else show(key, row[key]),
                "interval": _cell(row, key)[1],
                "height": floor + (1 - floor) * (row[key] - low) / ((high - low) or 1.0),
            }
            for row in rows
        ]
        text = " → ".join(step["value"] for step in steps)
        return {"text": f"{text} {caption}", "caption": caption, "steps": steps}
    return {"text": "nothing to compare", "caption": "There is nothing to compare yet.", "steps": []}


def label(key: str) -> str:
    """Return the name of a metric for readers."""
    name = key.rpartition("/")[2] if key.startswith((*GROUPS.values(), JUDGE)) else key
    if key.startswith(JUDGE) and name == "score":
        return "mean score"
    return LABELS.get(name, name.replace("_", " "))


def is_number(value: Any) -> bool:
    """Return whether a metric is a number. NaN counts, so that its check fails instead of being left out."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def show(key: str, value: Any) -> str:
    """Return a metric as text: shares as percentages, other numbers with about three digits."""
    if not is_number(value):
        return "–" if value is None else str(value)
    if key.removesuffix("_low").removesuffix("_high").endswith(PERCENTAGES) or key.startswith("minimal_pairs/"):
        text = f"{value:.1%}"
    elif isinstance(value, int) or abs(value) >= 1000:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}" if 0 < abs(value) < 0.01 else f"{value:.2f}"
    return text.replace("-", "−", 1) if value < 0 else text


def busy_seconds(stages: Iterable[dict[str, Any]]) -> float:
    """Return for how long at least one of these stages ran, in seconds; some run side by side."""
    total, reached = 0.0, -math.inf
    ends = [(datetime.fromisoformat(stage["finished"]).timestamp(), stage["wall_seconds"]) for stage in stages]
    for begin, end in sorted((end - seconds, end) for end, seconds in ends):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def show_duration(seconds: float) -> str:
    """Return a duration as text, `3725.4` as `1 h 2 min`; seconds are shown below ten minutes."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 10:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, with None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
