"""Make a preference dataset from judgements of people, a model or simulated rankers, and measure their agreement.

From simulated rankers:
    python scripts/preferences.py --config recipes/tiny/preferences.yaml

From people:
    python scripts/preferences.py --config recipes/tiny/preferences.yaml \
        --judgement_files annotations/tiny/judgements.jsonl
"""

from dataclasses import dataclass, field
from typing import Literal

from sandan.run.cli import run


@dataclass
class PreferencesArguments:
    """Settings of the preference dataset: judgement logs, form of the pairs, split, card and Hub."""

    output_dir: str = field(metadata={"help": "Folder of preferences_*.jsonl, README.md (the card), agreement.json."})
    judgement_files: list[str] = field(metadata={"help": "Judgement logs; more than one are joined."})
    form: Literal["given", "standard", "conversational"] = field(
        default="given", metadata={"help": "Prompts and answers as they are, as text, or as chat turns."}
    )
    held_out_share: float = field(default=0.1, metadata={"help": "Share of prompts kept for reward-model evaluation."})
    licence: str = field(default="other", metadata={"help": "Licence on the card, as the Hub spells it (cc-by-4.0)."})
    language: list[str] | None = field(default=None, metadata={"help": "Languages on the card (en ja)."})
    push_to_hub: bool = field(default=False, metadata={"help": "Push pairs, card and agreement to the Hub when done."})
    hub_model_id: str | None = field(default=None, metadata={"help": "OWNER/NAME of that dataset."})
    hub_private_repo: bool | None = field(default=None, metadata={"help": "False makes a new dataset public."})
    seed: int = field(default=0, metadata={"help": "Seed of the split."})

    def __post_init__(self):
        if not 0 <= self.held_out_share < 1:
            raise ValueError(f"held_out_share: {self.held_out_share}; a share lies between 0 and 1")


def main(args, stage):
    from sandan.preference.agreement import analyse
    from sandan.preference.pairs import (
        guidelines_of,
        make_preferences,
        read_logs,
        render_agreement,
        write_dataset,
    )

    judgements, skips, left_out = read_logs(args.judgement_files, stage)
    splits, counts = make_preferences(judgements, args.form, args.held_out_share, args.seed)
    counts |= {"skipped": len(skips), "invalid_lines": left_out}
    analysis = analyse(judgements) | counts | {"guidelines": guidelines_of(judgements)}
    table = render_agreement(analysis)
    write_dataset(splits, analysis, args.licence, args.language or [], stage.begin_writing())
    print(table)
    if empty := [name for name, rows in splits.items() if not rows]:
        advice = "rank more prompts (100 or more), or give another --held_out_share, before you train a reward model"
        print(f"no pairs for {' and '.join(empty)}, of {len(judgements):,} judgements: {advice}")
    if left_out:
        print(f"{left_out:,} lines left out, because they are not valid events")
    metrics = {"judgements": len(judgements), **counts}
    metrics |= {f"{name}_pairs": len(rows) for name, rows in splits.items()}
    metrics["annotators"] = len(analysis["annotators"])
    metrics["annotators_with_remarks"] = sum(bool(row["remarks"]) for row in analysis["annotators"])
    for name in ("pairwise_agreement", "krippendorff_alpha", "self_consistency", "position_bias"):
        if found := analysis[name]:
            metrics |= {name: found["mean"], f"{name}_low": found["low"], f"{name}_high": found["high"]}
    stage.finish(metrics)


if __name__ == "__main__":
    run(main, PreferencesArguments)
