"""The report as plain text for the terminal."""

from collections.abc import Sequence
from typing import Any

from ..core.text import aligned, display_width, visible
from .figures import MODELS, comparison_table, headline


def render_table(report: dict[str, Any], samples: Sequence[dict[str, Any]] = (), shown: int = 3) -> str:
    """Return the comparison, the checks and a few sample answers as aligned plain text."""
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
    text += "".join(f"\nlook    {remark}" for remark in report["remarks"])
    for sample in samples[:shown]:
        text += "\n\n" + aligned(
            [["prompt", "", _clip(sample["prompt"])]] + [_answer(sample, model) for model in models]
        )
    return visible(f"\n{report['recipe']}: {headline(report)['text']}\n\n{text}\n")


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
