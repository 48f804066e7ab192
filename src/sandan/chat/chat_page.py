"""The chat page: the models' answers side by side while they are written, and votes on them."""

import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..core.errors import UserError
from ..preference.judgement_log import JudgementLog, new_ticket
from ..preference.page import asset, page_of
from .conversation import EQUAL, Conversation, Round, answer_round
from .speakers import Sampling, Speaker
from .votes import take_back, vote


if TYPE_CHECKING:
    import gradio

logger = logging.getLogger(__name__)

STYLE = ("chat.css", __package__)
QUESTION_CHARACTERS = 8000
MOST_CONVERSATIONS = 100
MOST_ROUNDS = 100


@dataclass
class Talk:
    """A conversation of one annotator."""

    conversation: Conversation
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def last(self) -> Round | None:
        """Return the last question with its replies."""
        return self.conversation.rounds[-1] if self.conversation.rounds else None


class ChatDesk:
    """The server side of the page, as plain functions of JSON that can be tested without a browser.

    Answers are written by a thread of their own, while the page asks for the text so far. Conversations live in memory;
    what lasts are the votes.

    Args:
        speakers: the models.
        log: where votes go.
        sampling: what the page begins with.
        blind: whether the page begins with hidden names.
    """

    def __init__(self, speakers: Sequence[Speaker], log: JudgementLog, sampling: Sampling, blind: bool):
        self.speakers, self.log, self.sampling, self.blind = speakers, log, sampling, blind
        self._talks: OrderedDict[tuple[str, str], Talk] = OrderedDict()
        # One question at a time: answers of two would slow each other down.
        self._turn = threading.Lock()

    def open_chat(self, annotator: str, data: dict[str, Any]) -> dict[str, Any]:
        """Return the conversation that the page knows if it is still there, else a new one."""
        name = str(data.get("conversation"))
        if (annotator, name) not in self._talks:
            name = new_ticket()
            self._talks[annotator, name] = Talk(Conversation(self.speakers))
            while len(self._talks) > MOST_CONVERSATIONS:
                self._talks.popitem(last=False)
        return {"conversation": name, "rounds": list(map(state_of, self._talks[annotator, name].conversation.rounds))}

    def ask_models(self, annotator: str, data: dict[str, Any]) -> dict[str, Any]:
        """Begin to answer a question. The same request sent twice is one question."""
        talk = self._talk(annotator, data)
        question, number = data.get("question"), data.get("number")
        if not isinstance(question, str) or not question.strip() or len(question) > QUESTION_CHARACTERS:
            raise UserError(f"question: expected text of at most {QUESTION_CHARACTERS:,} characters")
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise UserError("number: expected the number of the question, from 0 on")
        sampling = Sampling(self.sampling.max_new_tokens, *map(_number, (data.get("temperature"), data.get("seed"))))
        with talk.lock:
            rounds = talk.conversation.rounds
            if number == len(rounds) - 1 and rounds[-1].question == _whole(question):
                return self.follow(annotator, data)
            if number != len(rounds) or (rounds and not rounds[-1].is_complete):
                raise UserError("another question is being answered; reload the page")
            if number >= MOST_ROUNDS:
                raise UserError(f"a conversation has at most {MOST_ROUNDS} questions; begin a new one")
            asked = talk.conversation.ask(_whole(question), sampling, bool(data.get("blind")))
        threading.Thread(target=self._answer, args=(talk, asked), daemon=True).start()
        return self.follow(annotator, data)

    def _answer(self, talk: Talk, asked: Round) -> None:
        """Let the models answer, in the thread of the question."""
        try:
            with self._turn:
                answer_round(asked, side_by_side=True)
        except UserError as error:
            asked.error = str(error)
        except Exception as error:
            logger.exception("a question was not answered")
            asked.error = f"this question was not answered: {type(error).__name__}"
        finally:
            asked.is_stopped |= asked.error is not None
            for reply in asked.replies:
                reply.complete()

    def follow(self, annotator: str, data: dict[str, Any]) -> dict[str, Any]:
        """Return the last question and the text of its answers so far."""
        last = self._talk(annotator, data).last
        return {"round": last and state_of(last)}

    def stop_answers(self, annotator: str, data: dict[str, Any]) -> dict[str, Any]:
        """End the answers where they are."""
        last = self._talk(annotator, data).last
        if last is not None and not last.is_complete:
            last.is_stopped = True
        return self.follow(annotator, data)

    def vote_for(self, annotator: str, data: dict[str, Any]) -> dict[str, Any]:
        """Log which of the last answers is better. The same vote sent twice is written once."""
        talk, best = self._talk(annotator, data), data.get("best")
        with talk.lock:
            judged = self._judged(talk, data)
            if type(best) is not int:
                raise UserError("best: expected the place of an answer")
            if judged.best != best:
                vote(self.log, annotator, judged, best)
        return self.follow(annotator, data)

    def take_back_vote(self, annotator: str, data: dict[str, Any]) -> dict[str, Any]:
        """Log that the vote on the last answers does not stand."""
        talk = self._talk(annotator, data)
        with talk.lock:
            judged = self._judged(talk, data)
            if judged.best is not None:
                take_back(self.log, annotator, judged)
        return self.follow(annotator, data)

    def _talk(self, annotator: str, data: dict[str, Any]) -> Talk:
        talk = self._talks.get((annotator, str(data.get("conversation"))))
        if talk is None:
            raise UserError("this conversation is no longer there; reload the page")
        self._talks.move_to_end((annotator, str(data.get("conversation"))))
        return talk

    @staticmethod
    def _judged(talk: Talk, data: dict[str, Any]) -> Round:
        """Return the last round, if it is the one that the page shows."""
        if talk.last is None or talk.last.ticket != data.get("ticket"):
            raise UserError("these answers are no longer the last ones; reload the page")
        return talk.last


def state_of(asked: Round) -> dict[str, Any]:
    """Return what the page shows of a round: nothing that names a model before its name may be shown."""
    return {
        "ticket": asked.ticket,
        "question": asked.question,
        "answers": [
            {"label": asked.label(place), "text": reply.text, "complete": reply.is_complete}
            for place, reply in enumerate(asked.replies)
        ],
        "temperature": asked.sampling.temperature,
        "seed": asked.sampling.seed,
        "complete": asked.is_complete,
        "obstacle": asked.obstacle(),
        "best": asked.best,
        "error": asked.error,
    }


def _number(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError("temperature and seed: expected numbers")
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _whole(text: str) -> str:
    """Return the text with half characters replaced, which no tokenizer reads."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").strip()


def build_chat(desk: ChatDesk, annotator: str) -> "gradio.Blocks":
    """Build the Gradio app around [`ChatDesk`].

    Args:
        annotator: whose votes they are if the address names nobody. The name of a login overrides both.
    """
    strings = json.loads(asset("strings.json"))
    own = json.loads(asset("chat.json", __package__))
    settings = {
        "strings": {language: strings[language] | own[language] for language in strings},
        "annotator": annotator,
        "temperature": desk.sampling.temperature,
        "seed": desk.sampling.seed,
        "blind": desk.blind,
        "equal": EQUAL,
        "question_characters": QUESTION_CHARACTERS,
    }
    actions = (desk.open_chat, desk.ask_models, desk.follow, desk.stop_answers, desk.vote_for, desk.take_back_vote)
    return page_of(settings, asset("chat.js", __package__), actions)
