"""The charts of the report page, drawn by matplotlib as SVG in the colours of the page."""

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .figures import MODELS, SCORES, SKILLS, is_number


if TYPE_CHECKING:
    from matplotlib.axes import Axes


# matplotlib draws with these colours; in the page each becomes a CSS variable, so that charts follow light and dark.
INK, FAINT, BASE, SFT, PPO = "#010101", "#020202", "#030303", "#040404", "#050505"


CSS_COLOURS = {INK: "--muted", FAINT: "--line", BASE: "--base", SFT: "--sft", PPO: "--accent"}


def stage_charts(name: str, history: Sequence[dict[str, Any]], metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Draw the curves of one training stage; curves without any point are left out."""
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
        # The log has no entry for the measurement before training, so it is added as step 0.
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
            # A line between two measurements would suggest a course that was not measured.
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
    """Draw bars of the oracle's four scores on new combinations; return None without an oracle."""
    rows = {row["model"]: row for row in comparison}
    bars = {MODELS[model]: [rows[model].get(f"oracle/{name}") for name in SCORES] for model in MODELS if model in rows}
    bars = {name: values for name, values in bars.items() if all(map(is_number, values))}
    colours = {"Base": BASE, "SFT": SFT, "PPO": PPO}
    return _bars("scores", "Four scores of the answers to new questions", SCORES, bars, colours) if bars else None


def minimal_pairs_chart(metrics: dict[str, Any]) -> dict[str, Any] | None:
    """Draw bars of the accuracy on minimal pairs with the chance line; return None if it was not measured."""
    kinds = {"causal": "clm", "masked": "mlm"}
    skills = [
        skill
        for skill in SKILLS
        if any(is_number(metrics.get(f"minimal_pairs/{kind}/{skill}")) for kind in kinds.values())
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
    # Accuracies are shown as percentages; the oracle's scores are not, although both lie between 0 and 1.
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
    """Draw the calibration of the reward model, and its accuracy by the difference of two ranks."""
    charts = []
    if curve := diagnosis.get("calibration"):
        points = [(point["confidence"], point["mean"]) for point in curve]

        def draw(axes: "Axes") -> None:
            axes.plot([0.5, 1], [0.5, 1], color=INK, linewidth=0.8, dashes=(3, 3))
            for point in curve:
                axes.plot([point["confidence"]] * 2, [point["low"], point["high"]], color=SFT, linewidth=1.2)
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
    """Draw true score and proxy reward over sqrt(KL): PPO, and best-of-n of the SFT model as the baseline."""
    charts = []
    titles = {"true": "True score on unseen prompts", "proxy": "Reward model’s score on unseen prompts"}
    for key, title in titles.items() if len(ppo) > 1 else ():
        lines = {"PPO": (ppo, PPO), "best of n": (best_of_n, SFT)}
        lines = {
            legend: ([(math.sqrt(point["kl"]), point[key]) for point in points], colour)
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


def _chart(
    name: str,
    title: str,
    draw: "Callable[[Axes], None]",
    legends: list[tuple[str, str]],
    described: str,
    wide: bool = False,
) -> dict[str, Any]:
    """Return a chart for the template: `svg` (trusted: it holds figures only), `title`, `legends`, `described`."""
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
    # Inside HTML an SVG needs neither prologue nor namespaces, and the page sets its size.
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    # Every chart numbers its groups from 1, but ids must be unique in a page: remove them.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for colour, variable in CSS_COLOURS.items():
        svg = svg.replace(colour, f"var({variable})")
    return re.sub(r"\n\s*", "\n", svg)
