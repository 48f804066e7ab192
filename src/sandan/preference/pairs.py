"""Preference dataset from judgement logs: pairs in either of TRL's formats, split by prompt, and a dataset card."""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from ..core.errors import UserError
from ..core.files import write_text
from ..core.places import ranking_command
from ..core.stage import Stage
from ..core.text import aligned, number, share
from ..data.chat import as_turn, split_by_prompt, to_text, to_turns
from ..data.jsonl import write_jsonl
from ..hub.cards import preference_card
from .judgement_log import JudgementLog, standing_events


Form = Literal["given", "standard", "conversational"]
FILES = {"train": "preferences_train.jsonl", "eval": "preferences_eval.jsonl"}


def read_logs(files: Sequence[str], stage: Stage) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """Read the standing judgements and skips of several logs.

    Returns:
        `tuple`: judgements, skips, and the number of lines left out because they are not valid events.

    Raises:
        UserError: if a log is missing, or if none of them holds a judgement.
    """
    for file in files:
        parts = Path(file).parts
        if parts[0] == "annotations" and len(parts) > 2 and not Path(file).exists():
            raise UserError(f"{file}: no such log; rank some items first: `{ranking_command(parts[1])}`")
    logs = [JudgementLog(stage.add_input(file)) for file in files]
    standing = [event for log in logs for event in standing_events(log.read())]
    left_out = sum(log.left_out for log in logs)
    judgements = [event for event in standing if event["event"] == "judgement"]
    if not judgements:
        said = f" ({left_out} lines are not valid events)" if left_out else ""
        raise UserError(f"{', '.join(files)}: no judgement that stands{said}; rank some items first (`make rank`)")
    return judgements, [event for event in standing if event["event"] == "skip"], left_out


def make_preferences(
    judgements: Iterable[dict[str, Any]], form: Form, held_out_share: float, seed: int
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, int]]:
    """Make train and eval pairs, with no prompt in both, and count the judgements left out.

    Args:
        judgements: standing judgements; second showings of an item are left out, as they only measure consistency.
        form: `given` keeps prompts as they are, `standard` converts them to text, `conversational` to turns.
        held_out_share: share of the prompts whose pairs go to `eval`.

    Returns:
        `tuple`: split name -> rows (`prompt, chosen, rejected, margin, prompt_id, annotator`), and the counts
        `tied_pairs` and `repeated_judgements`.
    """
    judgements = list(judgements)
    first = [judgement for judgement in judgements if not judgement.get("showing")]
    pairs, ties = preference_pairs(first)
    held_out = split_by_prompt([pair["prompt_id"] for pair in pairs], held_out_share, seed)
    splits: dict[str, list[dict[str, Any]]] = {name: [] for name in FILES}
    for pair, out in zip(pairs, held_out, strict=True):
        splits["eval" if out else "train"].append(in_form(pair, form))
    return splits, {"tied_pairs": ties, "repeated_judgements": len(judgements) - len(first)}


def in_form(pair: dict[str, Any], form: Form) -> dict[str, Any]:
    """Return a pair with prompt and answers as text (`standard`) or as turns (`conversational`)."""
    prompt, chosen, rejected = (pair[name] for name in ("prompt", "chosen", "rejected"))
    if form == "standard" and not isinstance(prompt, str):
        return pair | {"prompt": to_text(prompt), "chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}
    if form == "conversational" and isinstance(prompt, str):
        answers = {"chosen": chosen, "rejected": rejected}
        turns = {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}
        return pair | {"prompt": to_turns(prompt)} | turns
    return pair


def write_dataset(
    splits: dict[str, list[dict[str, Any]]], analysis: dict[str, Any], licence: str, language: list[str], folder: Path
) -> None:
    """Write the pairs, `agreement.json` and the card into a folder that `datasets.load_dataset(folder)` can load."""
    # Whatever can fail is computed before the first file changes.
    texts = {
        "agreement.json": json.dumps(analysis, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "README.md": preference_card(splits, FILES, analysis, licence, language),
    }
    for name, rows in splits.items():
        write_jsonl(folder / FILES[name], rows)
    for name, text in texts.items():
        write_text(folder / name, text)


def guidelines_of(judgements: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Count the judgements by the hash of the guidelines that they followed."""
    return dict(Counter(judgement["guidelines"] for judgement in judgements if judgement.get("guidelines")))


def preference_pairs(judgements: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """Make a pair of every two answers of a judgement that are not tied, and count the ties.

    Answers to a conversation become an assistant turn.

    Returns:
        `tuple`: pairs `{prompt, chosen, rejected, margin, prompt_id, annotator}`, where `margin` is the difference of
        the ranks, and the number of ties.
    """
    pairs, ties = [], 0
    for judgement in judgements:
        prompt = judgement["prompt"]
        ranked = zip(judgement["candidates"], judgement["ranks"], strict=True)
        for (first, first_rank), (second, second_rank) in itertools.combinations(ranked, 2):
            if first_rank == second_rank:
                ties += 1
                continue
            chosen, rejected = (first, second) if first_rank < second_rank else (second, first)
            pairs.append(
                {
                    "prompt": prompt,
                    "chosen": as_turn(prompt, chosen),
                    "rejected": as_turn(prompt, rejected),
                    "margin": abs(first_rank - second_rank),
                    "prompt_id": judgement["prompt_id"],
                    "annotator": judgement["annotator"],
                }
            )
    return pairs, ties


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
