"""The chat in the terminal: questions, answers that stream, votes."""

from collections.abc import Callable
from dataclasses import replace

from ..core.errors import UserError
from ..core.text import visible
from ..preference.judgement_log import JudgementLog
from .conversation import EQUAL, Conversation, Round, answer_round
from .speakers import Sampling, Speaker
from .votes import OBSTACLES, vote


HELP = "a question, or: /new (conversation), /seed N, /temperature T, /quit"
EQUAL_KEY = "="


class TerminalChat:
    """A conversation by lines of text.

    Args:
        read: shows a prompt and returns a line; raises EOFError at the end.
        write: shows text as it is.
        log: where votes go.
        annotator: whose votes they are.
    """

    def __init__(
        self,
        speakers: list[Speaker],
        sampling: Sampling,
        blind: bool,
        log: JudgementLog,
        annotator: str,
        read: Callable[[str], str],
        write: Callable[[str], None],
    ):
        self.speakers, self.sampling, self.blind = speakers, sampling, blind
        self.log, self.annotator, self.read, self.write = log, annotator, read, write
        self.conversation = Conversation(speakers)

    def run(self) -> None:
        """Talk until `/quit`, Ctrl+C or the end of the input."""
        self.write(f"{HELP}\n")
        while True:
            try:
                line = self.read("\n> ").strip()
                if line == "/quit":
                    return
                self._follow(line)
            except (EOFError, KeyboardInterrupt):
                self.write("\n")
                return
            except UserError as error:
                self.write(f"{error}\n")

    def _follow(self, line: str) -> None:
        """Do what a line says."""
        word, _, value = line.partition(" ")
        if word == "/new":
            self.conversation = Conversation(self.speakers)
        elif word in ("/seed", "/temperature"):
            self._set(word[1:], value)
        elif word.startswith("/"):
            raise UserError(f"{word}: no such command; {HELP}")
        elif line:
            self._ask(line)

    def _set(self, name: str, value: str) -> None:
        try:
            number = int(value) if name == "seed" else float(value)
        except ValueError:
            raise UserError(f"/{name} {value}: expected a number") from None
        self.sampling = replace(self.sampling, **{name: number})

    def _ask(self, question: str) -> None:
        # What was typed can hold half characters, which no tokenizer reads.
        question = question.encode("utf-8", "replace").decode()
        asked = self.conversation.ask(question, self.sampling, self.blind)
        shown: dict[int, str] = {}

        def show(place: int, text: str) -> None:
            before, now = shown.get(place), visible(text)
            if before is None:
                self.write(f"\n{asked.label(place)}: ")
            elif not now.startswith(before):
                # A few tokenizers decode the same tokens differently once others follow.
                self.write(f"\n{asked.label(place)}: ")
                before = None
            self.write(now[len(before or "") :])
            shown[place] = now

        try:
            answer_round(asked, show)
        except KeyboardInterrupt:
            asked.is_stopped = True
            self.write("\nstopped")
        except UserError:
            self.conversation.rounds.remove(asked)
            raise
        self.write("\n")
        if (obstacle := asked.obstacle()) is None:
            self._ask_for_vote(asked)
        elif len(asked.replies) > 1:
            self.write(f"(no vote: {OBSTACLES[obstacle]})\n")

    def _ask_for_vote(self, asked: Round) -> None:
        places = {asked.label(place).lower(): place for place in range(len(asked.replies))}
        places |= {str(place + 1): place for place in range(len(asked.replies))} | {EQUAL_KEY: EQUAL}
        labels = ", ".join(asked.label(place) for place in range(len(asked.replies)))
        while line := self.read(f"better ({labels}; {EQUAL_KEY} equal, Enter none)? ").strip().lower():
            if line in places:
                vote(self.log, self.annotator, asked, places[line])
                said = "equal" if places[line] == EQUAL else asked.label(places[line])
                self.write(f"saved: {said}" + (f"   ({_order(asked)})" if asked.blind else "") + "\n")
                return


def _order(asked: Round) -> str:
    return ", ".join(f"{chr(ord('A') + at)} was {reply.speaker.name}" for at, reply in enumerate(asked.replies))
