"""Agreement as plain text for the terminal."""

from typing import Any

from ..core.text import aligned
from .pairs import number, share


def render_agreement(analysis: dict[str, Any]) -> str:
    """The figures of [`sandan.preference.agreement.analyse`] as an aligned table, remarks last."""
    lines = [
        ["two annotators order a pair alike", share(analysis["pairwise_agreement"])],
        ["Krippendorff's alpha, ordinal", number(analysis["krippendorff_alpha"])],
        ["an annotator agrees with themselves", share(analysis["self_consistency"])],
        ["the upper of two answers wins", share(analysis["position_bias"])],
    ]
    rows = [["annotator", "kind", "judgements", "seconds", "agrees with others", "with themselves", "ties"]]
    rows += [
        [
            one["annotator"],
            one["kind"],
            f"{one['judgements']:,}",
            "" if one["seconds"] is None else f"{one['seconds']:.1f}",
            share(one["agreement"]),
            share(one["self_consistency"]),
            f"{one['ties']:.0%}",
        ]
        for one in analysis["annotators"]
    ]
    remarks = [f"look at {one['annotator']}: {said}" for one in analysis["annotators"] for said in one["remarks"]]
    return "\n".join([aligned(lines), "", aligned(rows), *([""] if remarks else []), *remarks, ""])
