"""Agreement as plain text for the terminal."""

from typing import Any

from ..core.text import aligned
from .pairs import number, share


def render_agreement(analysis: dict[str, Any]) -> str:
    """Return the figures of [`sandan.preference.agreement.analyse`] as an aligned table, remarks last."""
    lines = [
        ["two annotators order a pair alike", share(analysis["pairwise_agreement"])],
        ["Krippendorff's alpha, ordinal", number(analysis["krippendorff_alpha"])],
        ["an annotator agrees with themselves", share(analysis["self_consistency"])],
        ["the upper of two answers wins", share(analysis["position_bias"])],
    ]
    rows = [["annotator", "kind", "judgements", "seconds", "agrees with others", "with themselves", "ties"]]
    rows += [
        [
            row["annotator"],
            row["kind"],
            f"{row['judgements']:,}",
            "" if row["seconds"] is None else f"{row['seconds']:.1f}",
            share(row["agreement"]),
            share(row["self_consistency"]),
            f"{row['ties']:.0%}",
        ]
        for row in analysis["annotators"]
    ]
    remarks = [f"look at {row['annotator']}: {said}" for row in analysis["annotators"] for said in row["remarks"]]
    return "\n".join([aligned(lines), "", aligned(rows), *([""] if remarks else []), *remarks, ""])
