"""Votes: which of the answers side by side is better, as a judgement in the log that the reward model is trained from."""

from typing import Any

from ..core.errors import UserError
from ..data.chat import prompt_id
from ..preference.item_queue import item_identity
from ..preference.judgement_event import DAY_SECONDS
from ..preference.judgement_log import JudgementLog
from .conversation import EQUAL, Round


OBSTACLES = {
    "one_model": "there is only one answer",
    "incomplete": "an answer is not complete",
    "other_conversations": "the models have answered differently before, so these answers are to different "
    "conversations; vote on the first question of a new one",
    "empty_answer": "an answer is empty",
    "same_answers": "the answers are the same",
}


def vote(log: JudgementLog, annotator: str, judged: Round, best: int) -> dict[str, Any]:
    """Log which answer is better than the others, which are equal among themselves, and return the event.

    A further vote on the same round replaces the one before.

    Args:
        best: the place of the better answer, or `EQUAL`.

    Raises:
        UserError: if there can be no vote on this round, or the log cannot be written.
    """
    if (obstacle := judged.obstacle()) is not None:
        raise UserError(f"no vote: {OBSTACLES[obstacle]}")
    if best != EQUAL and not 0 <= best < len(judged.replies):
        raise UserError(f"no vote: there is no answer {best + 1}")
    prompt, candidates = judged.prompt(), judged.candidates()
    chosen = candidates if best == EQUAL else [judged.replies[best].text]
    seconds = judged.seconds_since_complete()
    identity = prompt_id({"prompt": prompt})
    names = [[reply.speaker.name for reply in judged.replies if reply.text == text] for text in candidates]
    event = log.append(
        {
            "ticket": judged.ticket,
            "annotator": annotator,
            "annotator_kind": "human",
            "item_id": item_identity(identity, prompt, candidates),
            "prompt_id": identity,
            "showing": 0,
            "prompt": prompt,
            "candidates": candidates,
            "ranks": [1 if text in chosen else 2 for text in candidates],
            "seconds": round(seconds, 2) if seconds < DAY_SECONDS - 1 else None,
            "models": names,
            # Names are shown after the first vote, so one that replaces it is not blind.
            "blind": judged.blind and judged.best is None,
            "temperature": judged.sampling.temperature,
            "seed": judged.sampling.seed,
        }
    )
    judged.best = best
    return event


def take_back(log: JudgementLog, annotator: str, judged: Round) -> None:
    """Log that the vote on this round does not stand; names that it has shown stay shown."""
    if judged.best is None:
        raise UserError("there is no vote to take back")
    log.append({"event": "undo", "ticket": judged.ticket, "annotator": annotator})
    judged.best, judged.blind = None, False
