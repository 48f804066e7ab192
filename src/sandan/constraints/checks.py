"""Reward functions that check constraints, and IFEval's measures. The checkers are those of lm-evaluation-harness.

share_followed    the share of a prompt's constraints that the answer follows: a reward to train on
all_followed      1 if it follows all of them, else 0: IFEval's prompt-level strict score, a judge
long_enough       0, or a penalty down to -1 for an answer of a few words: keeps answers answers
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

from ..core.bootstrap import bootstrap_interval
from ..core.errors import UserError


try:
    import langdetect
    from lm_eval.tasks.ifeval import utils as ifeval
except ImportError as error:
    raise UserError(
        f"constraints: {error}: the checkers of IFEval are in lm-eval; install them: pip install 'sandan[eval]'"
    ) from error

# langdetect draws random numbers: without a seed an answer could pass once and fail once.
langdetect.DetectorFactory.seed = 0
# An answer below so many words is too short to be one; less if the prompt asks for fewer words.
ENOUGH_WORDS = 20


def followed(answer: str, instruction_ids: Sequence[str], kwargs: Sequence[dict[str, Any]]) -> list[bool]:
    """Return for each constraint whether an answer follows it, strictly: the answer as it is; an empty one never does.

    Raises:
        UserError: if lm-eval does not know a constraint, or if NLTK's data are missing.
    """
    example = ifeval.InputExample(key=0, instruction_id_list=list(instruction_ids), prompt="", kwargs=list(kwargs))
    try:
        return ifeval.test_instruction_following_strict(example, answer).follow_instruction_list
    except (KeyError, TypeError, ValueError) as error:
        given = ", ".join(f"{name} {values}" for name, values in zip(instruction_ids, kwargs, strict=False))
        raise UserError(f"constraints: {given}: {type(error).__name__}: {error}") from error
    except LookupError as error:  # NLTK's own message has 20 lines
        raise UserError(
            f"constraints: {', '.join(instruction_ids)}: needs NLTK's data: python -m nltk.downloader punkt_tab"
        ) from error


def share_followed(
    completions: list[str], instruction_id_list: list[list[str]], kwargs: list[list[dict[str, Any]]]
) -> list[float]:
    """Return the share of its constraints that each answer follows."""
    rows = zip(completions, instruction_id_list, kwargs, strict=True)
    return [sum(found) / len(found) for found in (followed(*row) for row in rows)]


def all_followed(
    completions: list[str], instruction_id_list: list[list[str]], kwargs: list[list[dict[str, Any]]]
) -> list[float]:
    """Return for each answer 1 if it follows all of its constraints, else 0."""
    return [float(share == 1) for share in share_followed(completions, instruction_id_list, kwargs)]


def long_enough(completions: list[str], kwargs: list[list[dict[str, Any]]]) -> list[float]:
    """Return 0 for answers of enough words, and down to -1 for an empty one.

    Most constraints are easier to follow in few words, and some in one.
    """
    return [
        min(len(text.split()) / _enough(given), 1.0) - 1.0 for text, given in zip(completions, kwargs, strict=True)
    ]


def _enough(kwargs: Sequence[dict[str, Any]]) -> float:
    limits = [
        given["num_words"] / 2 for given in kwargs if given.get("num_words") and given["relation"] == "less than"
    ]
    return max(min([ENOUGH_WORDS, *limits]), 1)


def strict_figures(rows: Sequence[dict[str, Any]], answers: Sequence[str]) -> dict[str, float]:
    """Return IFEval's strict scores with 95% intervals, prompt-level and instruction-level, of each group of prompts.

    The interval of the instruction level resamples prompts, because the constraints of a prompt share an answer.

    Args:
        rows: prompts with `instruction_id_list`, `kwargs` and optionally `group`.
        answers: one for each row.
    """
    checked = [
        followed(answer, row["instruction_id_list"], row["kwargs"]) for row, answer in zip(rows, answers, strict=True)
    ]
    figures: dict[str, float] = {}
    for group in dict.fromkeys(row.get("group", "all") for row in rows):
        own = [found for found, row in zip(checked, rows, strict=True) if row.get("group", "all") == group]
        prompts = [str(number) for number, found in enumerate(own) for _ in found]
        values = {
            "prompt_strict": bootstrap_interval([float(all(found)) for found in own]),
            "instruction_strict": bootstrap_interval([float(kept) for kept in chain(*own)], prompts),
        }
        for name, value in values.items():
            ends = (f"constraints/{group}/{name}{end}" for end in ("", "_low", "_high"))
            figures |= dict(zip(ends, value, strict=True))
    return figures
