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
    host: str = field(
        default="127.0.0.1", metadata={"help": "Address to listen at; others than loopback need --auth."}
    )
    port: int | None = field(default=None, metadata={"help": "Port; without it the first free one from 7860."})
    auth: bool = field(
        default=False, metadata={"help": "Ask for name and password, set in SANDAN_AUTH=name:password,..."}
    )


def main(args):
    import os
    import sys

    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

    from sandan.chat.speakers import Sampling, load_speakers
    from sandan.chat.terminal import TerminalChat
    from sandan.preference.judgement_log import JudgementLog, check_annotator

    annotator = check_annotator(args.annotator or "chat")
    sampling = Sampling(args.max_new_tokens, args.temperature, args.seed)
    log = JudgementLog(args.log_file)
    speakers = load_speakers(args.models)
    if not args.text:
        return serve_page(args, annotator, sampling, log, speakers)

    def write(text):
        sys.stdout.write(text)
        sys.stdout.flush()

    TerminalChat(speakers, sampling, args.blind, log, annotator, input, write).run()


def serve_page(args, annotator, sampling, log, speakers):
    from pathlib import Path

    from sandan.chat.chat_page import STYLE, ChatDesk, build_chat
    from sandan.core.places import command_for
    from sandan.preference.page import accounts_from_environment, asset, serve

    blocks = build_chat(ChatDesk(speakers, log, sampling, args.blind), annotator)
    accounts = accounts_from_environment() if args.auth else ()
    address = serve(blocks, args.host, args.port, accounts, block=False, style=asset(*STYLE))
    print(f"{', '.join(speaker.name for speaker in speakers)}: open {address}   (Ctrl+C ends it)", flush=True)
    blocks.block_thread()
    if log.path.exists():
        recipe = Path(args.log_file).parent.name
        print(f"next: {command_for('preferences', recipe, '--judgement_files', str(args.log_file))}")


if __name__ == "__main__":
    run(main, ChatArguments, stage=False)
