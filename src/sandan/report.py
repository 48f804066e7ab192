"""One report of a whole recipe: `report.json`, one self-contained `report.html` and a table for the terminal.

Everything comes from the `result.json` of each stage, so the three can not disagree.
"""

import dataclasses
import json
import logging
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data import read_jsonl
from .errors import UserError
from .overoptimisation import best_of_n_curve, ppo_curve
from .stage import CHAIN, RESULT, Stage, read_result, sha256, write_text
from .watch import findings, is_long_enough


if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

MODELS = {"base": "Base", "sft": "SFT", "ppo": "PPO"}
TITLES = {
    "tokenizer": "Tokenizer",
    "pretrain": "Pre-training, causal",
    "pretrain_mlm": "Pre-training, masked",
    "sft": "Supervised fine-tuning",
    "candidates": "Candidate answers",
    "rank": "Ranking",
    "preferences": "Preferences",
    "reward": "Reward model",
    "ppo": "PPO",
    "evaluate": "Evaluation",
}
# The name of every figure that readers meet: key (without its group's prefix) -> label.
LABELS = {
    "correct": "right in every respect",
    "score": "mean of the four scores",
    "helpful": "helpful",
    "accurate": "accurate",
    "safe": "safe",
    "natural": "natural",
    "reward_score": "reward model's score",
    "kl_to_sft": "KL to SFT (nats per answer)",
    "response_tokens": "answer length (tokens)",
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
GROUPS = {"New combinations": "oracle/", "Pretraining-only facts": "oracle_pretraining_only/"}
SCORES = ("helpful", "accurate", "safe", "natural")
SKILLS = ("grammar", "vocabulary", "common_sense", "context")
PERCENTAGES = ("correct", "accuracy", "share", "agreement", "consistency", "bias")

# matplotlib draws with these; in the page each becomes a CSS variable, so that charts follow light and dark.
INK, FAINT, BASE, SFT, PPO = "#010101", "#020202", "#030303", "#040404", "#050505"
CSS_COLOURS = {INK: "--muted", FAINT: "--line", BASE: "--base", SFT: "--sft", PPO: "--accent"}


def write_report(recipe_dir: Path, stage: Stage) -> dict[str, Any]:
    """Write `report.json` and `report.html` into the stage's folder and log the table.

    Args:
        recipe_dir: where the stage folders lie, e.g. `outputs/tiny`.
        stage: the report stage; every other stage's result becomes one of its inputs.

    Returns:
        `dict`: what `report.json` holds.

    Raises:
        UserError: if the evaluation has not been run, or a file is broken.
    """
    folder = recipe_dir / "evaluate"
    read_result(folder)
    comparison = _read_json(folder / "comparison.json")
    samples_path = folder / "samples.jsonl"
    samples = read_jsonl(samples_path) if samples_path.is_file() and samples_path.stat().st_size else []
    names = [name for name in CHAIN if name != "report" and (recipe_dir / name / RESULT).is_file()]
    results = {name: read_result(recipe_dir / name) for name in names}
    for name in names:
        stage.add_input(recipe_dir / name)
    logs = {name: recipe_dir / name / "trainer_state.json" for name in names}
    histories = {name: _read_json(path)["log_history"] for name, path in logs.items() if path.is_file()}

    details = {
        (name, file): _read_json(recipe_dir / name / file)
        for name, file in (("preferences", "agreement.json"), ("reward", "diagnostics.json"))
        if (recipe_dir / name / file).is_file()
    }
    report = build_report(stage.recipe, results, comparison, recipe_dir, histories.get("ppo", []))
    text = json.dumps(finite(report), indent=1, ensure_ascii=False, allow_nan=False)
    write_text(stage.output_dir / "report.json", text + "\n")
    write_text(stage.output_dir / "report.html", render_html(report, histories, samples, details))
    logger.info("%s\nreport: %s", render_table(report, samples), stage.output_dir / "report.html")
    return report


def build_report(
    recipe: str,
    results: dict[str, dict[str, Any]],
    comparison: list[dict[str, Any]],
    recipe_dir: Path,
    ppo_history: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Everything that `report.json` holds, from each stage's `result.json` and the evaluation's comparison.

    Args:
        ppo_history: the log history of PPO; `watch` is what it shows, None if it is too short to show anything.
    """
    kept = ("metrics", "wall_seconds", "device", "seed", "finished")
    lineage = {name: result["inputs"] for name, result in results.items()}
    stale = stale_inputs(lineage, recipe_dir)
    measured = run_checks({name: result["metrics"] for name, result in results.items()}, comparison)
    # An intact lineage alone shows nothing about the models.
    passed = bool(measured) and all(check["passed"] for check in measured) and not any(stale.values())
    versions: dict[str, list[str]] = {}
    for result in results.values():
        for package, version in result["versions"].items():
            versions[package] = sorted({*versions.get(package, []), version})
    return {
        "recipe": recipe,
        "passed": passed,
        "checks": measured + lineage_check(lineage, stale),
        "stages": {name: {key: result[key] for key in kept} for name, result in results.items()},
        "comparison": comparison,
        "watch": [dataclasses.asdict(one) for one in findings(ppo_history)] if is_long_enough(ppo_history) else None,
        "versions": {package: ", ".join(found) for package, found in versions.items()},
        "lineage": lineage,
        "stale": stale,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def run_checks(metrics: dict[str, dict[str, Any]], comparison: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the recipe must have reached. A check whose figures are missing is not listed.

    Args:
        metrics: stage -> its metrics.
        comparison: one row per model.

    Returns:
        `list[dict]`: `name`, `passed` and `detail` (the figures) of each check.
    """
    rows = {row["model"]: row for row in comparison}
    base, sft, ppo = (rows.get(model, {}) for model in MODELS)
    reward, pretrain, tuned = (metrics.get(name, {}) for name in ("reward", "pretrain", "sft"))
    checks: list[dict[str, Any]] = []

    def check(name: str, low: Any, high: Any, detail: str) -> None:
        if is_number(low) and is_number(high):
            detail = detail.format(low=f"{low:.3g}", high=f"{high:.3g}", sign="<" if low < high else "≥")
            checks.append({"name": name, "passed": low < high, "detail": detail})

    if any(is_number(row.get("oracle/score")) for row in comparison):
        detail = "oracle score, 95% intervals: {0} at most {{low}} {{sign}} {1} at least {{high}}"
        ends = base.get("oracle/score_high"), sft.get("oracle/score_low")
        check("SFT above base", *ends, detail.format("base", "SFT"))
        ends = sft.get("oracle/score_high"), ppo.get("oracle/score_low")
        check("PPO above SFT", *ends, detail.format("SFT", "PPO"))
        detail = "oracle score of the reward model's choice: one answer {low} {sign} best of eight {high}"
        check("best of 8 above best of 1", reward.get("best_of_n/1"), reward.get("best_of_n/8"), detail)
    else:
        detail = "loss on unseen rows: after {low} {sign} before {high}"
        check("SFT lowers the loss", tuned.get("eval_loss"), tuned.get("eval_loss_before"), detail)
        detail = "accuracy on unseen pairs: chance {low} {sign} at least {high} (95% interval)"
        check("reward model above chance", 0.5, reward.get("eval_accuracy_low"), detail)
        detail = "reward model's score on unseen prompts: SFT {low} {sign} PPO {high}"
        check("PPO above SFT", sft.get("reward_score"), ppo.get("reward_score"), detail)
    detail = "bits per byte of unseen text: trained {low} {sign} untrained {high}"
    ends = pretrain.get("eval_bits_per_byte"), pretrain.get("untrained_bits_per_byte")
    check("pre-training learned", *ends, detail)
    return checks


def stale_inputs(lineage: dict[str, dict[str, str]], recipe_dir: Path) -> dict[str, list[str]]:
    """Stage -> those of its inputs that are an earlier stage's `result.json` and have changed or gone since."""
    return {
        name: [
            path
            for path, digest in inputs.items()
            if Path(path).name == RESULT and not _is_unchanged(Path(path), digest, recipe_dir)
        ]
        for name, inputs in lineage.items()
    }


def _is_unchanged(path: Path, digest: str, recipe_dir: Path) -> bool:
    # Paths are recorded relative to where the stage ran; the recipe's folder may have been moved since.
    if path.parent.parent.name == recipe_dir.resolve().name:
        path = recipe_dir / path.parent.name / RESULT
    return path.is_file() and sha256(path) == digest


def lineage_check(lineage: dict[str, dict[str, str]], stale: dict[str, list[str]]) -> list[dict[str, Any]]:
    """The check that every stage used the results that are there now; empty if no stage used another's."""
    count = sum(Path(path).name == RESULT for inputs in lineage.values() for path in inputs)
    if not count:
        return []
    changed = [f"{name} used another version of {path}" for name, paths in stale.items() for path in paths]
    detail = "; ".join(changed) if changed else f"sha256 of all {count} results of earlier stages unchanged"
    return [{"name": "lineage", "passed": not changed, "detail": detail}]


def comparison_table(comparison: list[dict[str, Any]]) -> tuple[list[str], list[dict[str, Any]]]:
    """The table base | SFT | PPO as text.

    Returns:
        `tuple`: the models there are, and groups of `title` and `rows`; a row is its `label` and its `cells`, a cell
        the figure and its 95% interval ("" if it has none).
    """
    by_model = {row["model"]: row for row in comparison}
    models = [model for model in MODELS if model in by_model]
    prefixes = tuple(GROUPS.values())
    others = [key for key in LABELS if not key.startswith(("eval_", "untrained"))]
    others += [key for key in dict.fromkeys(key for row in comparison for key in row) if key not in LABELS]
    others = [key for key in others if not key.startswith(prefixes) and not key.endswith(("_low", "_high"))]
    named = [(title, [prefix + name for name in ("correct", "score", *SCORES)]) for title, prefix in GROUPS.items()]
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


def _cell(row: dict[str, Any], key: str) -> tuple[str, str]:
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    interval = f"{show(key, low)} – {show(key, high)}" if is_number(low) and is_number(high) else ""
    return show(key, row.get(key)), interval


def render_table(report: dict[str, Any], samples: Sequence[dict[str, Any]] = (), shown: int = 3) -> str:
    """The comparison, the checks and a few answers as aligned plain text."""
    models, groups = comparison_table(report["comparison"])
    lines = [["", *(MODELS[model] for model in models)]]
    for group in groups:
        lines.append([group["title"]])
        for row in group["rows"]:
            cells = [
                f"{value} ({interval.replace(' ', '')})" if interval else value for value, interval in row["cells"]
            ]
            lines.append([f"  {row['label']}", *cells])
    text = aligned(lines) + "\n"
    for check in report["checks"]:
        text += f"\n{'ok    ' if check['passed'] else 'FAILED'}  {check['name']}: {check['detail']}"
    for sample in samples[:shown]:
        text += "\n\n" + aligned([["prompt", "", _clip(sample["prompt"])]] + [_answer(sample, m) for m in models])
    return f"\n{report['recipe']}: {headline(report)['text']}\n\n{text}\n"


def _answer(sample: dict[str, Any], model: str) -> list[str]:
    mark = {True: "+", False: "-", None: ""}[sample.get(f"{model}_correct")]
    return [f"  {MODELS[model]}", mark, _clip(sample.get(model) or "")]


def _clip(text: str, width: int = 88) -> str:
    text = visible(text).replace("\n", "␊").replace("\t", "␉")
    used = 0
    for at, character in enumerate(text):
        used += display_width(character)
        if used > width:
            return text[:at] + "…"
    return text


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells as columns, two spaces apart; characters of double width (Japanese) count as two."""
    columns = max(map(len, lines))
    # A row of one cell is a heading, which may reach over the other columns.
    widths = [
        max((display_width(line[at]) for line in lines if at < len(line) > 1), default=0) for at in range(columns)
    ]
    return "\n".join(
        "  ".join(
            cell + " " * max(0, width - display_width(cell)) for cell, width in zip(line, widths, strict=False)
        ).rstrip()
        for line in lines
    )


def display_width(text: str) -> int:
    """Columns that the text takes in a terminal."""
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )


def visible(text: Any) -> str:
    """Text that shows all of its characters: control characters become pictures, half surrogates U+FFFD."""

    def replace(match: re.Match) -> str:
        code = ord(match.group())
        return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"

    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", replace, str(text))


def headline(report: dict[str, Any]) -> dict[str, Any]:
    """The one result to remember: the same figure for base, SFT and PPO.

    Returns:
        `dict`: `text` ("29% → 61% → 97% ..."), `caption` and `steps`, each with `name`, `value`, `interval` and
        `height` (0 to 1).
    """
    captions = {
        "oracle/correct": "of the answers to new questions are right in every respect: "
        "helpful, accurate, safe and natural",
        "oracle/score": "mean of four scores of the answers to new questions: helpful, accurate, safe, natural",
        "reward_score": "is what the reward model gives on average to answers to new questions",
        "bits_per_byte": "bits per byte of unseen text",
    }
    rows = [row for model in MODELS for row in report["comparison"] if row["model"] == model]
    for key, caption in captions.items():
        values = [row.get(key) for row in rows]
        if not values or not all(is_number(value) and math.isfinite(value) for value in values):
            continue
        # Shares rise from zero. A reward has no zero: there, the lowest step is a quarter of the highest.
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
    """What readers call a metric."""
    name = key.partition("/")[2] if key.startswith(tuple(GROUPS.values())) else key
    return LABELS.get(name, name.replace("_", " "))


def is_number(value: Any) -> bool:
    """Whether a metric is there; a NaN counts as there, so that no check passes for lack of it."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def show(key: str, value: Any) -> str:
    """A metric as text: shares as percentages, everything else with three digits or so."""
    if not is_number(value):
        return "–" if value is None else str(value)
    if key.removesuffix("_low").removesuffix("_high").endswith(PERCENTAGES) or key.startswith("minimal_pairs/"):
        text = f"{value:.1%}"
    elif isinstance(value, int) or abs(value) >= 1000:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}" if 0 < abs(value) < 0.01 else f"{value:.2f}"
    return text.replace("-", "−", 1) if value < 0 else text


def show_duration(seconds: float) -> str:
    """`3725.4` -> `1 h 2 min`; seconds are shown below ten minutes."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 10:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def finite(value: Any) -> Any:
    """The same JSON with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        command = f"make {path.parent.name} RECIPE={path.parent.parent.name}"
        raise UserError(f"{path}: not there; run `{command}` again") from None
    except ValueError as error:
        raise UserError(f"{path}: broken ({error}); run that stage again") from None


# ------------------------------------------------------------------------------------------------------------- page


def render_html(
    report: dict[str, Any],
    histories: dict[str, list[dict[str, Any]]],
    samples: Sequence[dict[str, Any]] = (),
    details: dict[tuple[str, str], Any] | None = None,
) -> str:
    """The report as one page that asks for nothing from outside.

    Args:
        report: what `report.json` holds.
        histories: trainer stage -> its `log_history`.
        samples: prompts with each model's answer. They are untrusted: the template escapes everything.
        details: (stage, file) -> what that further JSON file of the stage holds.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"visible": visible, "duration": show_duration, "date": _show_date, "language": _language}
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
        titles=TITLES,
        wall_seconds=sum(one["wall_seconds"] for one in report["stages"].values()),
        devices=list(dict.fromkeys(one["device"] for one in report["stages"].values())),
        all_metrics={
            name: [(key, show(key, value)) for key, value in one["metrics"].items()]
            for name, one in report["stages"].items()
        },
    )


def _show_date(iso: str) -> str:
    moment = datetime.fromisoformat(iso)
    return f"{moment.day} {moment:%B %Y}"


def _language(sample: dict[str, Any]) -> str:
    # Kanji alone are drawn with Chinese glyphs unless the page says that they are Japanese.
    text = "".join(str(sample.get(key) or "") for key in ("prompt", *MODELS))
    return "ja" if re.search(r"[\u3040-\u30ff]", text) else "en"


def training_steps(
    report: dict[str, Any], histories: dict[str, list[dict[str, Any]]], details: dict[tuple[str, str], Any]
) -> list[dict[str, Any]]:
    """The three steps, each with its stages' key figures and charts; a stage that did not run is left out."""
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


def stage_charts(name: str, history: Sequence[dict[str, Any]], metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """The curves of one trainer stage; those without a single point are left out."""
    if name == "ppo":
        panels = {
            "Reward model's score": {"objective/scores": "score"},
            "KL to SFT, nats per answer": {"objective/kl": "KL"},
            "Answer length, tokens": {"val/response_tokens": "length"},
            "Answers that end by themselves": {"val/stopped_share": "share"},
            "Entropy of the policy, nats per answer": {"objective/entropy": "entropy"},
            "Critic: variance explained": {"val/explained_variance": "share"},
        }
    else:
        unit = "Loss" if name == "reward" else "Loss, nats per token"
        panels = {unit: {"loss": "training", "eval_loss": "unseen"}}
        if name == "reward":
            panels["Accuracy on pairs"] = {"accuracy": "training", "eval_accuracy": "unseen"}
    charts = []
    for title, keys in panels.items():
        lines = {keys[key]: _points(history, key) for key in keys}
        before = metrics.get("eval_loss_before")
        # The trainer's log starts after the measurement before training.
        if is_number(before) and lines.get("unseen") and "eval_loss" in keys and lines["unseen"][0][0] > 0:
            lines["unseen"].insert(0, (0, before))
        lines = {legend: points for legend, points in lines.items() if points}
        ceiling = metrics.get("ceiling_accuracy") if title.startswith("Accuracy") else None
        if lines:
            charts.append(_curves(f"{name}-{len(charts)}", title, lines, ceiling))
    best = {n: metrics.get(f"best_of_n/{n}") for n in (1, 2, 4, 8)}
    if name == "reward" and all(map(is_number, best.values())):
        charts.append(_best_of_n_chart(best))
    return charts


def _points(history: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in history if is_number(row.get(key)) and is_number(row.get("step"))]


def _curves(
    name: str, title: str, lines: dict[str, list[tuple[float, float]]], ceiling: float | None
) -> dict[str, Any]:
    colours = dict(zip(lines, [SFT, PPO] if len(lines) > 1 else [PPO], strict=True))

    def draw(axes: "Axes") -> None:
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        for legend, points in lines.items():
            marker = "o" if len(points) < 2 or legend == "unseen" else None
            # A line through two measurements would claim a course that nobody measured.
            width = 0 if legend == "unseen" and len(points) < 3 else 1.3
            axes.plot(
                *zip(*points, strict=True), color=colours[legend], marker=marker, markersize=2.6, linewidth=width
            )
        if ceiling is not None:
            axes.axhline(ceiling, color=INK, linewidth=0.8, dashes=(3, 3))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.set_xlabel("step")

    legends = [(legend, CSS_COLOURS[colour]) for legend, colour in colours.items()] if len(lines) > 1 else []
    if ceiling is not None:
        legends.append((f"ceiling {ceiling:.1%}", "dashed"))
    ends = ", ".join(f"{legend} from {points[0][1]:.3g} to {points[-1][1]:.3g}" for legend, points in lines.items())
    return _chart(name, title, draw, legends, f"{title}: {ends}")


def scores_chart(comparison: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Bars of the oracle's four scores on new combinations, or None without an oracle."""
    rows = {row["model"]: row for row in comparison}
    bars = {MODELS[model]: [rows[model].get(f"oracle/{name}") for name in SCORES] for model in MODELS if model in rows}
    bars = {name: values for name, values in bars.items() if all(map(is_number, values))}
    colours = {"Base": BASE, "SFT": SFT, "PPO": PPO}
    return _bars("scores", "Four scores on new combinations", SCORES, bars, colours) if bars else None


def minimal_pairs_chart(metrics: dict[str, Any]) -> dict[str, Any] | None:
    """Bars of the accuracy on minimal pairs with the chance line, or None if they were not measured."""
    kinds = {"causal": "clm", "masked": "mlm"}
    skills = [
        skill for skill in SKILLS if any(is_number(metrics.get(f"minimal_pairs/{k}/{skill}")) for k in kinds.values())
    ]
    bars = {name: [metrics.get(f"minimal_pairs/{kind}/{skill}") for skill in skills] for name, kind in kinds.items()}
    bars = {name: values for name, values in bars.items() if values and all(map(is_number, values))}
    names = [skill.replace("_", " ") for skill in skills]
    title = "Minimal pairs: the right sentence is the likelier one"
    return _bars("pairs", title, names, bars, {"causal": PPO, "masked": SFT}, chance=0.5) if bars else None


def _bars(
    name: str,
    title: str,
    ticks: Sequence[str],
    bars: dict[str, list[float]],
    colours: dict[str, str],
    chance: float | None = None,
) -> dict[str, Any]:
    # Accuracies are shares; the oracle's scores are not, although both lie between 0 and 1.
    def show_bar(value: float) -> str:
        return f"{value:.2f}" if chance is None else f"{value:.0%}"

    def draw(axes: "Axes") -> None:
        width = 0.8 / len(bars)
        for index, (legend, values) in enumerate(bars.items()):
            places = [at + (index - (len(bars) - 1) / 2) * width for at in range(len(ticks))]
            axes.bar(places, values, width=width * 0.88, color=colours[legend])
            for place, value in zip(places, values, strict=True):
                axes.text(place, value + 0.02, show_bar(value), ha="center", va="bottom", fontsize=6.5, color=INK)
        if chance is not None:
            axes.axhline(chance, color=INK, linewidth=0.8, dashes=(3, 3))
        axes.set_xticks(range(len(ticks)), [tick.replace(" ", "\n") for tick in ticks])
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], [show_bar(0.0), "", show_bar(0.5), "", show_bar(1.0)])
        axes.set_ylim(0, 1.12)

    legends = [(legend, CSS_COLOURS[colours[legend]]) for legend in bars]
    legends += [] if chance is None else [(f"chance {chance:.0%}", "dashed")]
    described = "; ".join(
        f"{legend}: " + ", ".join(f"{tick} {show_bar(value)}" for tick, value in zip(ticks, values, strict=True))
        for legend, values in bars.items()
    )
    return _chart(name, title, draw, legends, f"{title}. {described}", wide=len(bars) > 2)


def _best_of_n_chart(best: dict[int, float]) -> dict[str, Any]:
    def draw(axes: "Axes") -> None:
        axes.plot(range(len(best)), best.values(), color=PPO, marker="o", markersize=3.5, linewidth=1.3)
        for at, value in enumerate(best.values()):
            axes.annotate(f"{value:.2f}", (at, value), (-2, 4), textcoords="offset points", ha="right", color=INK)
        axes.set_xticks(range(len(best)), map(str, best))
        axes.set_xlabel("answers to choose from")
        axes.margins(x=0.14, y=0.22)

    described = ", ".join(f"{n}: {value:.2f}" for n, value in best.items())
    title = "Oracle score of the reward model's choice"
    return _chart("best-of-n", title, draw, [], f"{title}. {described}")


def diagnostic_charts(diagnosis: dict[str, Any]) -> list[dict[str, Any]]:
    """How sure the reward model may be, and how its accuracy grows with the distance of two ranks."""
    charts = []
    if curve := diagnosis.get("calibration"):
        points = [(one["confidence"], one["mean"]) for one in curve]

        def draw(axes: "Axes") -> None:
            axes.plot([0.5, 1], [0.5, 1], color=INK, linewidth=0.8, dashes=(3, 3))
            for one in curve:
                axes.plot([one["confidence"]] * 2, [one["low"], one["high"]], color=SFT, linewidth=1.2)
            axes.plot(*zip(*points, strict=True), color=PPO, marker="o", markersize=2.6, linewidth=0)
            axes.set_xlabel("its own probability of being right")

        title = "Calibration: how often it is right"
        described = ", ".join(f"{sure:.0%} sure: {right:.0%} right" for sure, right in points)
        charts.append(_chart("calibration", title, draw, [("perfect", "dashed")], f"{title}. {described}"))
    if (differences := diagnosis.get("by_rank_difference")) and len(differences) > 1:
        ticks = sorted(differences, key=float)
        bars = {"accuracy": [differences[tick]["mean"] for tick in ticks]}
        title = "Accuracy by difference of the two ranks"
        chart = _bars("rank-difference", title, ticks, bars, {"accuracy": PPO}, chance=0.5)
        charts.append(chart | {"legends": chart["legends"][1:]})
    return charts


def overoptimisation_charts(
    ppo: Sequence[dict[str, float]], best_of_n: Sequence[dict[str, float]]
) -> list[dict[str, Any]]:
    """True score and proxy reward over sqrt(KL): PPO, with best-of-n of the SFT model as the baseline."""
    charts = []
    titles = {"true": "True score on unseen prompts", "proxy": "Reward model’s score on unseen prompts"}
    for key, title in titles.items() if len(ppo) > 1 else ():
        lines = {"PPO": (ppo, PPO), "best of n": (best_of_n, SFT)}
        lines = {
            legend: ([(math.sqrt(one["kl"]), one[key]) for one in points], colour)
            for legend, (points, colour) in lines.items()
            if points
        }

        def draw(axes: "Axes", lines: dict[str, Any] = lines) -> None:
            for points, colour in lines.values():
                axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=2.6, linewidth=1.3)
            axes.set_xlabel("√KL to SFT, √nats per answer")

        legends = [(legend, CSS_COLOURS[colour]) for legend, (_, colour) in lines.items()]
        described = "; ".join(
            f"{legend}: from {points[0][1]:.2f} to {points[-1][1]:.2f}" for legend, (points, _) in lines.items()
        )
        charts.append(_chart(f"over-{key}", title, draw, legends, f"{title}. {described}"))
    return charts


def annotator_rows(analysis: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The annotators of `agreement.json` as text; names and remarks are untrusted as all else."""

    def cell(found: dict[str, float] | None) -> str:
        return f"{found['mean']:.1%}" if found else "–"

    return [
        {
            "name": one["annotator"],
            "kind": one["kind"],
            "judgements": f"{one['judgements']:,}",
            "seconds": "–" if one["seconds"] is None else f"{one['seconds']:.1f}",
            "agreement": cell(one["agreement"]),
            "self_consistency": cell(one["self_consistency"]),
            "remarks": "; ".join(one["remarks"]),
        }
        for one in (analysis or {}).get("annotators", [])
    ]


def _chart(
    name: str,
    title: str,
    draw: "Callable[[Axes], None]",
    legends: list[tuple[str, str]],
    described: str,
    wide: bool = False,
) -> dict[str, Any]:
    """One chart for the template: `svg` (trusted, from figures alone), `title`, `legends` and `described`."""
    import io

    from markupsafe import Markup
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 8,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "grid.color": FAINT,
        "axes.spines.left": False,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
    }
    with rc_context(style):
        figure = Figure(figsize=(4.0, 2.1) if wide else (3.3, 1.9), layout="tight")
        axes = figure.add_subplot()
        draw(axes)
        axes.grid(axis="y", linewidth=0.6)
        axes.set_axisbelow(True)
        stream = io.StringIO()
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=no_metadata)
    return {"svg": Markup(_inline(stream.getvalue())), "title": title, "legends": legends, "described": described}


def _inline(svg: str) -> str:
    # In HTML an SVG needs neither its prologue nor namespaces, and its size comes from the page.
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    # Groups are numbered per chart, and two of one page may not share an id.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for colour, variable in CSS_COLOURS.items():
        svg = svg.replace(colour, f"var({variable})")
    return re.sub(r"\n\s*", "\n", svg)
