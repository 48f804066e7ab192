"""The checks of a report that no score can pass: whether PPO's answers collapsed, and who says that they are better."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..core.text import one_line
from ..evaluate.judges import GOLD
from ..ppo.collapse import RULES, Verdict, commonest, verdicts
from ..ppo.formulas import repeated_share
from .figures import is_number, judges_of


# The row of the comparison has the KL to SFT, which is PPO's reference.
COLUMNS = {rule.figure: rule.figure for rule in RULES} | {"kl": "kl_to_sft"}
TITLES = {
    "length": "answers keep their length",
    "variety": "answers keep their variety",
    "sameness": "different prompts, different answers",
    "repetition": "answers do not repeat themselves",
    "entropy": "entropy is left",
    "kl_budget": "KL within its budget",
}
EXAMPLE_COLUMNS = 60
NOT_JUDGED = (
    "no independent judge: not judged. Name one that training never saw in evaluate.yaml: oracle, gold_reward_model (a "
    "reward model trained on other pairs) or gold_functions"
)


def collapse_checks(
    sft: Mapping[str, Any], ppo: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], max_kl_nats: float | None
) -> list[dict[str, Any]]:
    """Check PPO's answers against SFT's; a check that fails shows an answer.

    Args:
        sft, ppo: rows of the comparison. Checks whose figures are missing are not listed.
        samples: prompts with each model's answer.
        max_kl_nats: PPO's budget of the KL.
    """
    before, after = (
        {figure: row[column] for figure, column in COLUMNS.items() if is_number(row.get(column))} for row in (sft, ppo)
    )
    return [
        {
            "name": TITLES[verdict.rule.kind],
            "passed": not verdict.collapsed,
            "detail": f"{verdict.rule.lost}: {verdict.text}{_example(verdict, samples)}"
            if verdict.collapsed
            else verdict.text,
        }
        for verdict in verdicts(before, after, max_kl_nats)
    ]


def _example(verdict: Verdict, samples: Sequence[Mapping[str, Any]]) -> str:
    """Return one of PPO's answers as text: the one that repeats itself most, or the most frequent one."""
    rows = [row for row in samples if isinstance(row.get("ppo"), str)]
    if not rows:
        return ""
    if verdict.rule.kind == "repetition":
        shown = max(rows, key=lambda row: repeated_share(row["ppo"].split()))
    else:
        answer, _ = commonest([str(row["prompt"]) for row in rows], [row["ppo"] for row in rows])
        shown = next(row for row in rows if row["ppo"] == answer)
    answer, prompt = (one_line(str(shown[key]), EXAMPLE_COLUMNS) for key in ("ppo", "prompt"))
    count = sum(row["ppo"] == shown["ppo"] for row in rows)
    return f"; for example “{answer}” to “{prompt}”" + (f", and {count} times in all" if count > 1 else "")


def judge_checks(sft: Mapping[str, Any], ppo: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Check that a judge that training never saw prefers PPO's answers to SFT's, and that none prefers SFT's.

    A reward model must prefer them at equal length too, since many like length for itself; a function that checks
    answers need not. The oracle has a check of its own. Without any judge the check fails.
    """
    names = judges_of([ppo])
    won, lost, details = [], [], []
    for name in names:
        keys = ("win_rate", "win_rate_length_controlled") if name == GOLD else ("win_rate",)
        lows, highs = ([ppo.get(f"judge/{name}/{key}_{end}") for key in keys] for end in ("low", "high"))
        if not all(map(is_number, [*lows, *highs])):
            continue
        won += [name] if all(low > 0.5 for low in lows) else []
        lost += [name] if any(high < 0.5 for high in highs) else []
        rates = [f"{low:.1%} to {high:.1%}" for low, high in zip(lows, highs, strict=True)]
        details.append(f"{name}: {' and at equal length '.join(rates)}")
    if details:
        detail = f"win rate over SFT, 95% interval, must be above 50%: {'; '.join(details)}"
        return [{"name": "PPO above SFT", "passed": bool(won) and not lost, "detail": detail}]
    if not (sft and ppo):
        return []
    scores = [row.get("reward_score") for row in (sft, ppo)]
    detail = NOT_JUDGED
    if all(map(is_number, scores)):
        own = "{:.3g} → {:.3g}".format(*scores)
        detail += f". The reward model that PPO was trained on says {own}, which proves nothing"
    return [{"name": "PPO above SFT", "passed": False, "detail": detail}]
