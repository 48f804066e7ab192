"""Find signs of trouble in the logged metrics of a PPO run that its reward does not show, and describe them as text.

A policy can raise the score that it is trained on while its answers get worse (over-optimisation: Gao et al. 2023,
arXiv 2210.10760). The signs are in the metrics of every update. The limits here are rules of thumb, far from the
values of a healthy run, and the findings are advice.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .collapse import verdicts


# Number of entries (updates, or logged means of several) averaged at the start and at the end of the history.
WINDOW = 3
# Number of entries in which the critic may explain nothing before this is reported.
CRITIC_PATIENCE = 10
# At one nat a sampled token is e times as likely as under the reference.
MAX_KL_PER_TOKEN = 1.0
# The reference's own answers carry its entropy in nats: a policy that chooses among them has a KL of about that at most.
# With several times as much it writes what the reference would not. The floor is for references of nearly no entropy.
LOST_KL_TO_ENTROPY, LOST_KL_NATS = 3.0, 5.0
MAX_LENGTH_GROWTH = 1.5
MAX_REPETITION_GROWTH = 0.2
MIN_ENDING_LEFT, FEW_ENDING_LEFT = 0.5, 0.1
# Figure of the rules of a collapse -> its name in the logs.
LOGGED = {
    "response_tokens": "val/response_tokens",
    "distinct_2": "val/distinct_2",
    "commonest_share": "val/commonest_share",
    "repeated_share": "val/repeated_share",
    "entropy_per_token": "policy/entropy_avg",
    "kl": "objective/kl",
}
ADVICE = {
    "length": "set length_penalty or missing_eos_penalty, train the reward model on pairs of like length, or raise kl_coef",
    "entropy": "it hardly explores any more; raise kl_coef or entropy_coef, or lower learning_rate",
    "kl_budget": "raise kl_coef, set target_kl or lower learning_rate",
}


@dataclass(frozen=True)
class Finding:
    """A problem that a user should look at.

    Args:
        kind: the short name of the rule.
        text: a sentence with the figures and advice.
        collapse: True if the policy has collapsed, False if the finding is only a warning.
    """

    kind: str
    text: str
    collapse: bool = False


def findings(history: Sequence[dict[str, Any]], max_kl_nats: float | None = None) -> list[Finding]:
    """Return the problems at the end of a log history, at most one of a kind.

    Args:
        history: `trainer.state.log_history` or a part of it; entries of evaluations are ignored.
        max_kl_nats: the budget of the KL, in nats per answer.
    """
    entries = _entries(history)
    if not is_long_enough(entries):
        return []
    first, last = _Means(entries[:WINDOW]), _Means(entries[-WINDOW:])
    found = list(_collapses(first, last, max_kl_nats))
    known = {finding.kind for finding in found}
    signs = [*_over_optimisation(first, last), *_broken_answers(first, last)]
    found += [finding for finding in signs if finding.kind not in known]
    recent = [entry["val/explained_variance"] for entry in entries[-CRITIC_PATIENCE:]]
    if len(recent) == CRITIC_PATIENCE and max(recent) <= 0:
        found.append(
            Finding(
                "critic",
                f"the critic explains nothing of the returns (explained variance at most {max(recent):.2f} in the "
                f"last {CRITIC_PATIENCE} logs): advantages are noise; raise critic_learning_rate or vf_coef, or start "
                "it from the reward model",
            )
        )
    return found


def is_long_enough(history: Sequence[dict[str, Any]]) -> bool:
    """Return whether a history has enough entries for [`findings`] to find anything."""
    return len(_entries(history)) >= 2 * WINDOW


def _entries(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in history if "objective/kl" in entry and "val/repeated_share" in entry]


class _Means:
    """Means of a few logged entries, under short names."""

    def __init__(self, entries: Sequence[dict[str, Any]]):
        def mean(name: str) -> float:
            return sum(entry[name] for entry in entries) / len(entries)

        self.score, self.kl, self.tokens = mean("objective/scores"), mean("objective/kl"), mean("val/response_tokens")
        self.repeated, self.stopped = mean("val/repeated_share"), mean("val/stopped_share")
        self.entropy = mean("policy/entropy_avg")
        logged = set.intersection(*map(set, entries))
        self.figures = {figure: mean(name) for figure, name in LOGGED.items() if name in logged}


def _collapses(first: _Means, last: _Means, max_kl_nats: float | None) -> Iterator[Finding]:
    """Yield what the rules of a collapse say of the last answers, compared with the first ones, the reference's.

    Lost entropy is only a warning while the score rises: on prompts with one right answer, learning looks the same.
    """
    for verdict in verdicts(first.figures, last.figures, max_kl_nats):
        if verdict.collapsed:
            kind = verdict.rule.kind
            advice = ADVICE.get(kind, "raise kl_coef, lower learning_rate, or train the reward model on more pairs")
            score = f"at a score of {first.score:.3g} to {last.score:.3g}"
            text = f"{verdict.rule.lost}, {score}: {verdict.text}; {advice}"
            yield Finding(kind, text, collapse=kind != "entropy" or last.score <= first.score)


def _over_optimisation(first: _Means, last: _Means) -> Iterator[Finding]:
    """Yield signs that the score rises in ways that make answers worse, or that the policy left its reference."""
    kl_per_token = last.kl / max(last.tokens, 1)
    rise = f"the score rises ({first.score:.3g} to {last.score:.3g}) while"
    advice = "read the samples, judge them by another measure than this reward, and"
    entropy = first.entropy * first.tokens
    if last.kl > max(LOST_KL_TO_ENTROPY * entropy, LOST_KL_NATS):
        yield Finding(
            "kl",
            f"the policy ran away from its reference (KL {last.kl:.3g} nats per answer, where the reference's own answers "
            f"carry {entropy:.3g}), at a score of {first.score:.3g} to {last.score:.3g}: it writes what the reward model "
            "never learned to judge; lower learning_rate, raise kl_coef, or train the reward model with "
            "broken_answer_share",
            collapse=True,
        )
    elif kl_per_token > MAX_KL_PER_TOKEN and last.score > first.score:
        yield Finding(
            "kl",
            f"{rise} the policy runs away from its reference (KL {last.kl:.3g} nats per answer, {kl_per_token:.2g} "
            f"per token): {advice} raise kl_coef, set target_kl or lower learning_rate",
        )
    elif kl_per_token > MAX_KL_PER_TOKEN:
        yield Finding(
            "kl",
            f"the policy left its reference (KL {last.kl:.3g} nats per answer, {kl_per_token:.2g} per token) and its "
            f"score did not rise ({first.score:.3g} to {last.score:.3g}): lower learning_rate, raise kl_coef or set "
            "max_approx_kl",
            collapse=last.score < first.score,
        )
    if last.tokens > MAX_LENGTH_GROWTH * first.tokens and last.score > first.score:
        yield Finding(
            "length",
            f"{rise} answers get longer ({first.tokens:.3g} to {last.tokens:.3g} tokens): {advice} set "
            "length_penalty or missing_eos_penalty, or train the reward model on pairs of like length",
        )
    if last.repeated > first.repeated + MAX_REPETITION_GROWTH and last.score > first.score:
        yield Finding(
            "repetition",
            f"{rise} answers repeat themselves ({first.repeated:.0%} to {last.repeated:.0%} of the 3-grams are "
            f"repeats): {advice} raise kl_coef",
        )


def _broken_answers(first: _Means, last: _Means) -> Iterator[Finding]:
    """Yield signs that answers no longer end."""
    if last.stopped < MIN_ENDING_LEFT * first.stopped:
        yield Finding(
            "endless",
            f"answers stop ending: {last.stopped:.0%} have the stop token, at first {first.stopped:.0%}; set "
            "missing_eos_penalty or a longer response_length",
            collapse=last.stopped < FEW_ENDING_LEFT * first.stopped,
        )
