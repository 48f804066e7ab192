"""A conversation with several models: each hears the same questions and keeps its own answers."""

import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from ..models.rendering import Prompt, Turns
from ..preference.judgement_log import new_ticket
from .speakers import Sampling, Speaker


EQUAL = -1


@dataclass
class Reply:
    """The answer of one model to one question.

    Args:
        turns: the conversation that the model read, the question at its end.
        completed_at: when it ended, in seconds of the monotonic clock; None before.
    """

    speaker: Speaker
    turns: Turns
    text: str = ""
    completed_at: float | None = None

    @property
    def is_complete(self) -> bool:
        """Return whether the model will write no more."""
        return self.completed_at is not None

    def complete(self) -> None:
        """Note that the model will write no more."""
        if self.completed_at is None:
            self.completed_at = time.monotonic()


@dataclass
class Round:
    """A question and the replies to it, in the order in which people see them.

    Args:
        blind: whether the models' names are hidden until the vote.
        best: the place of the reply that was voted best, `EQUAL`, or None before the vote.
    """

    question: str
    replies: list[Reply]
    sampling: Sampling
    blind: bool
    ticket: str = field(default_factory=new_ticket)
    best: int | None = None
    error: str | None = None
    is_stopped: bool = False

    @property
    def is_complete(self) -> bool:
        """Return whether all replies are there."""
        return all(reply.is_complete for reply in self.replies)

    def seconds_since_complete(self) -> float:
        """Return how long all replies have been there."""
        return time.monotonic() - max(reply.completed_at or 0.0 for reply in self.replies)

    @property
    def names_are_shown(self) -> bool:
        """Return whether the models' names may be shown; where nothing can be voted on, hiding them has no end."""
        return not self.blind or self.best is not None or (self.is_complete and self.obstacle() is not None)

    def label(self, place: int) -> str:
        """Return the name of the model at a place, or a letter while names are hidden."""
        return self.replies[place].speaker.name if self.names_are_shown else chr(ord("A") + place)

    def obstacle(self) -> str | None:
        """Return why there can be no vote on these replies, or None if there can be one.

        A preference pair is two answers to one prompt. Hence the models must have read the same turns: those that
        answered an earlier question differently are in different conversations.
        """
        if len(self.replies) < 2:
            return "one_model"
        if not self.is_complete or self.is_stopped:
            return "incomplete"
        if any(reply.turns != self.replies[0].turns for reply in self.replies):
            return "other_conversations"
        if any(not reply.text.strip() for reply in self.replies):
            return "empty_answer"
        return "same_answers" if len(self.candidates()) < 2 else None

    def candidates(self) -> list[str]:
        """Return the different answers, in the order shown."""
        return list(dict.fromkeys(reply.text for reply in self.replies))

    def prompt(self) -> Prompt:
        """Return what the replies answer: turns, or text if all models continue text."""
        reply = next((reply for reply in self.replies if reply.speaker.chats), self.replies[0])
        return reply.speaker.prompt(reply.turns)


class Conversation:
    """A conversation, question by question.

    Args:
        speakers: the models.
        rng: shuffles the replies of blind rounds.
    """

    def __init__(self, speakers: Sequence[Speaker], rng: random.Random | None = None):
        self.speakers, self.rounds = list(speakers), list[Round]()
        self._rng = rng or random.SystemRandom()

    def ask(self, question: str, sampling: Sampling, blind: bool) -> Round:
        """Add a question, which nobody has answered yet."""
        speakers = self._rng.sample(self.speakers, len(self.speakers)) if blind else self.speakers
        replies = [Reply(speaker, self._turns(speaker, question)) for speaker in speakers]
        self.rounds.append(Round(question, replies, sampling, blind))
        return self.rounds[-1]

    def _turns(self, speaker: Speaker, question: str) -> Turns:
        """Return the conversation of one model with its own answers, and the question at its end."""
        before = [reply for earlier in self.rounds for reply in earlier.replies if reply.speaker is speaker]
        # A reply without words (an error, or stopped at once) is no turn that chat templates allow.
        turns = [[reply.turns[-1], {"role": "assistant", "content": reply.text}] for reply in before if reply.text]
        return [*(turn for pair in turns for turn in pair), {"role": "user", "content": question}]


def answer_round(
    asked: Round, show: Callable[[int, str], None] = lambda place, text: None, side_by_side: bool = False
) -> None:
    """Let the models of a round answer; each says the same whether they do so at once or one after the other.

    Args:
        show: gets the place of a reply and its text so far, whenever it has grown.
        side_by_side: give each model a thread of its own.

    Raises:
        UserError: if a model cannot answer.
    """

    def answer(place: int) -> None:
        reply = asked.replies[place]

        def grow(text: str) -> None:
            reply.text = text
            show(place, text)

        if not asked.is_stopped:
            reply.speaker.answer(reply.turns, asked.sampling, grow, lambda: asked.is_stopped)
        reply.complete()

    places = range(len(asked.replies))
    if not side_by_side:
        for place in places:
            answer(place)
        return
    with ThreadPoolExecutor(len(places)) as pool:
        list(pool.map(answer, places))
