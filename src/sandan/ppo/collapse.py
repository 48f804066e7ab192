"""Say whether a policy's answers have collapsed, compared with its reference's, whatever any score says.

The same table of rules stops PPO (diagnosis.py) and fails a report (report/collapse_checks.py). Its limits are far from what
healthy runs show: in recipe tiny distinct-2 falls to 0.62 and the entropy to 0.3 of SFT's, as most answers are right
then and there are fewer ways to be right than to be wrong.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from .formulas import repeated_share


@dataclass(frozen=True)
class Rule:
    """Bound a figure of a policy's answers by the reference's: from `low` to `high` times that, plus `growth`.

    Args:
        kind: the short name of the rule.
        figure: the name of the figure.
        title: what the figure is.
        lost: what has happened when the figure is out of bounds.
    """

    kind: str
    figure: str
    title: str
    lost: str
    low: float = 0.0
    high: float = math.inf
    growth: float = 0.0


RULES = (
    Rule(
        "length", "response_tokens", "mean answer length in tokens",
        "answers are less than half or more than twice as long as the reference's", low=0.5, high=2.0,
    ),
    Rule(
        "variety", "distinct_2", "distinct pairs of tokens, of all (distinct-2)",
        "answers to different prompts are made of the same few phrases", low=0.4,
    ),
    Rule(
        "sameness", "commonest_share", "share of prompts that get the most frequent answer",
        "different prompts get the same answer", high=1.0, growth=0.2,
    ),
    Rule(
        "repetition", "repeated_share", "share of 3-grams that an answer had before",
        "answers repeat themselves", high=1.0, growth=0.3,
    ),
    Rule(
        "entropy", "entropy_per_token", "entropy in nats per token",
        "the policy's entropy fell to less than a tenth of the reference's", low=0.1,
    ),
)  # fmt: skip
KL_BUDGET = Rule(
    "kl_budget", "kl", "KL to the reference in nats per answer",
    "the policy is further from its reference than max_kl_nats allows",
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """Hold a policy's figure against the bounds of a rule. NaN is out of bounds."""

    rule: Rule
    before: float | None
    after: float
    low: float
    high: float

    @property
    def collapsed(self) -> bool:
        """Return whether the figure is out of bounds."""
        return not self.low <= self.after <= self.high

    @property
    def text(self) -> str:
        """Return the figures as text, for example `mean answer length in tokens: 21 → 2 (at least 10.5, at most 42)`."""
        bounds = [f"at least {self.low:.3g}"] if self.low > 0 else []
        bounds += [f"at most {self.high:.3g}"] if self.high < math.inf else []
        start = "" if self.before is None else f"{self.before:.3g} → "
        return f"{self.rule.title}: {start}{self.after:.3g} ({', '.join(bounds)})"


def verdicts(
    before: Mapping[str, float], after: Mapping[str, float], max_kl_nats: float | None = None
) -> list[Verdict]:
    """Return the verdict of each rule whose figure is known of both.

    Args:
        before: figures of the reference's answers, by name.
        after: those of the policy's answers, and its `kl` to the reference.
        max_kl_nats: the budget of the KL, if there is one.
    """
    found = [
        Verdict(
            rule,
            before[rule.figure],
            after[rule.figure],
            rule.low * before[rule.figure],
            rule.high * before[rule.figure] + rule.growth if rule.high < math.inf else math.inf,
        )
        for rule in RULES
        if rule.figure in before and rule.figure in after
    ]
    if max_kl_nats is not None and KL_BUDGET.figure in after:
        found.append(Verdict(KL_BUDGET, None, after[KL_BUDGET.figure], -math.inf, max_kl_nats))
    return found


# ---- Figures ----


def answer_figures(prompts: Sequence[Hashable], answers: Sequence[Sequence[int]]) -> dict[str, float]:
    """Return variety, sameness and repetition of answers (token ids). The same answer to a prompt again counts once.

    So a policy may know one answer to a prompt; it may not have one answer to all prompts.
    """
    different = {(prompt, tuple(answer)) for prompt, answer in zip(prompts, answers, strict=True)}
    return {
        "distinct_2": distinct_share([answer for _, answer in different]),
        "commonest_share": commonest(prompts, [tuple(answer) for answer in answers])[1],
        "repeated_share": sum(map(repeated_share, answers)) / len(answers),
    }


def distinct_share(rows: Sequence[Sequence[int]], size: int = 2) -> float:
    """Return distinct-n: the different n-grams of all rows, divided by all (Li et al. 2016, arXiv 1510.03055, 5.3)."""
    grams = [tuple(row[start : start + size]) for row in rows for start in range(len(row) - size + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def commonest(prompts: Sequence[Hashable], answers: Sequence[Hashable]) -> tuple[Hashable, float]:
    """Return the answer that most different prompts get, and their share of the different prompts."""
    asked: dict[Hashable, set[Hashable]] = {}
    for prompt, answer in zip(prompts, answers, strict=True):
        asked.setdefault(answer, set()).add(prompt)
    answer = max(asked, key=lambda given: len(asked[given]))
    return answer, len(asked[answer]) / len(set(prompts))
