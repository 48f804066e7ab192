"""Talk to several models side by side, in the browser or in the terminal, and vote for the better answer.

Two or more folders or Hub names, each with a name of your choice:
    python scripts/chat.py --models sft=outputs/tiny/sft ppo=outputs/tiny/ppo \
        --log_file annotations/tiny/judgements.jsonl --text

The models of a recipe:
    make chat RECIPE=tiny

Votes go into the log that `make preferences` reads. Ctrl+C ends it.
"""

from dataclasses import dataclass, field

from sandan.run.cli import run


@dataclass
class ChatArguments:
    """Settings of the chat: models, sampling, votes and server."""

    models: list[str] = field(metadata={"help": "1 to 4 folders or Hub names, each as NAME=FOLDER or FOLDER."})
    log_file: str = field(metadata={"help": "The judgement log for the votes; made if it is not there."})
    annotator: str | None = field(default=None, metadata={"help": "Whose votes they are; by default `chat`."})
    text: bool = field(default=False, metadata={"help": "In the terminal instead of the browser."})
    blind: bool = field(default=False, metadata={"help": "Hide names and shuffle answers until the vote."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest answer; at most half of a model's positions."})
    temperature: float = field(default=0.7, metadata={"help": "Sampling temperature; 0 is greedy."})
    seed: int = field(default=0, metadata={"help": "The same question and seed give the same answers."})


def main(args):
    import sys

    from sandan.chat.speakers import Sampling, load_speakers
    from sandan.chat.terminal import TerminalChat
    from sandan.core.errors import UserError
    from sandan.preference.judgement_log import JudgementLog, check_annotator

    if not args.text:
        raise UserError("text: the chat is in the terminal only; give --text")
    annotator = check_annotator(args.annotator or "chat")
    sampling = Sampling(args.max_new_tokens, args.temperature, args.seed)
    log = JudgementLog(args.log_file)
    speakers = load_speakers(args.models)

    def write(text):
        sys.stdout.write(text)
        sys.stdout.flush()

    TerminalChat(speakers, sampling, args.blind, log, annotator, input, write).run()


if __name__ == "__main__":
    run(main, ChatArguments, stage=False)
