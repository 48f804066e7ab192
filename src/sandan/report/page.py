"""The report as one self-contained HTML page."""

import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ..core.chain import STAGES
from ..core.text import visible
from ..evaluate.overoptimisation import best_of_n_curve, ppo_curve
from .charts import diagnostic_charts, minimal_pairs_chart, overoptimisation_charts, scores_chart, stage_charts
from .figures import MODELS, _cell, busy_seconds, comparison_table, headline, is_number, label, show, show_duration


def render_html(
    report: dict[str, Any],
    histories: dict[str, list[dict[str, Any]]],
    samples: Sequence[dict[str, Any]] = (),
    details: dict[tuple[str, str], Any] | None = None,
) -> str:
    """Render the report as one HTML page that loads nothing from outside.

    Args:
        report: the content of `report.json`.
        histories: training stage -> its `log_history`.
        samples: prompts with each model's answer. They are untrusted: the template escapes everything.
        details: (stage, file) -> the content of that further JSON file of the stage.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters |= {"duration": show_duration, "date": _show_date, "language": _language}
    models, groups = comparison_table(report["comparison"])
    titles = {"new_combinations": "New combinations", "pretraining_only": "Pretraining-only facts"}
    by_group: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        name = sample.get("group") or ""
        by_group.setdefault(titles.get(name, name.replace("_", " ")), []).append(sample)
    return environment.get_template("report.html.j2").render(
        report=report,
        headline=headline(report),
        models=models,
        model_names=MODELS,
        groups=groups,
        scores=scores_chart(report["comparison"]),
        steps=training_steps(report, histories, details or {}),
        samples=by_group,
        titles={name: row.title for name, row in STAGES.items()},
        wall_seconds=busy_seconds(report["stages"].values()),
        devices=list(dict.fromkeys(stage["device"] for stage in report["stages"].values())),
        all_metrics={
            name: [(key, show(key, value)) for key, value in stage["metrics"].items()]
            for name, stage in report["stages"].items()
        },
    )


def _shown(value: Any) -> Any:
    # Every value that the template shows passes here. Markup is the template's own, and the charts.
    return visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _show_date(iso: str) -> str:
    moment = datetime.fromisoformat(iso)
    return f"{moment.day} {moment:%B %Y}"


def _language(sample: dict[str, Any]) -> str:
    # Browsers draw kanji with Chinese glyphs unless the page says that the text is Japanese.
    text = "".join(str(sample.get(key) or "") for key in ("prompt", *MODELS))
    return "ja" if re.search(r"[\u3040-\u30ff]", text) else "en"


def training_steps(
    report: dict[str, Any], histories: dict[str, list[dict[str, Any]]], details: dict[tuple[str, str], Any]
) -> list[dict[str, Any]]:
    """Return the three training steps with key figures and charts of their stages, without stages that did not run."""
    keys = {
        "pretrain": ("parameters", "eval_bits_per_byte", "untrained_bits_per_byte"),
        "pretrain_mlm": ("parameters", "eval_loss", "eval_loss_before"),
        "sft": ("eval_loss", "eval_loss_before", "dropped_rows"),
        "preferences": (
            "pairwise_agreement",
            "krippendorff_alpha",
            "self_consistency",
            "position_bias",
            "judgements",
            "tied_pairs",
        ),
        "reward": (
            "eval_accuracy",
            "human_agreement",
            "ceiling_accuracy",
            "longer_answer_accuracy",
            "mean_margin",
            "length_correlation",
            "calibration_error",
            "dropped_rows",
        ),
        "ppo": ("true_score_best", "true_score_last"),
    }
    steps = []
    for title, names in (
        ("Pre-training", ("pretrain", "pretrain_mlm")),
        ("Supervised fine-tuning", ("sft",)),
        ("Reinforcement learning from human feedback", ("preferences", "reward", "ppo")),
    ):
        stages = []
        for name in names:
            if name not in report["stages"]:
                continue
            metrics = report["stages"][name]["metrics"]
            facts = [(label(key), *_cell(metrics, key)) for key in keys[name] if is_number(metrics.get(key))]
            charts = stage_charts(name, histories.get(name, []), metrics)
            if name == "reward":
                charts += diagnostic_charts(details.get(("reward", "diagnostics.json"), {}))
            if name == "ppo":
                best_of_n = best_of_n_curve(report["stages"].get("reward", {}).get("metrics", {}))
                charts += overoptimisation_charts(ppo_curve(histories.get(name, [])), best_of_n)
            annotators = (
                annotator_rows(details.get(("preferences", "agreement.json"))) if name == "preferences" else []
            )
            watch = report["watch"] if name == "ppo" else None
            stages.append({"name": name, "facts": facts, "charts": charts, "annotators": annotators, "watch": watch})
        pairs = minimal_pairs_chart(report["stages"]["evaluate"]["metrics"]) if title == "Pre-training" else None
        if stages or pairs:
            compact = all(len(stage["charts"]) <= 1 for stage in stages)
            steps.append({"title": title, "stages": stages, "chart": pairs, "compact": compact})
    return steps


def annotator_rows(analysis: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the annotators of `agreement.json` as text; names and remarks are untrusted, like all text."""

    def cell(found: dict[str, float] | None) -> str:
        return f"{found['mean']:.1%}" if found else "–"

    return [
        {
            "name": row["annotator"],
            "kind": row["kind"],
            "judgements": f"{row['judgements']:,}",
            "seconds": "–" if row["seconds"] is None else f"{row['seconds']:.1f}",
            "agreement": cell(row["agreement"]),
            "self_consistency": cell(row["self_consistency"]),
            "remarks": "; ".join(row["remarks"]),
        }
        for row in (analysis or {}).get("annotators", [])
    ]
