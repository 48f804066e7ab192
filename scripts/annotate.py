"""Serve the page on which people rank candidate answers in a browser on this machine.

    python scripts/annotate.py --candidates_file outputs/tiny/candidates/candidates.jsonl \
        --log_file annotations/tiny/judgements.jsonl --annotator yuki

The same from a recipe. Further people open the same address with their own name (`/?annotator=ken`):
    make rank RECIPE=tiny ANNOTATOR=yuki

Ctrl+C stops it. Every judgement is saved to disk before the page shows the next item.
"""

from dataclasses import dataclass, field

from sandan.run.cli import run


@dataclass
class AnnotateArguments:
    """Settings of the ranking page: candidates, annotators, log and server."""

    candidates_file: str = field(metadata={"help": "JSONL with prompt and candidates (2 to 9 texts)."})
    log_file: str = field(metadata={"help": "The append-only log of judgements; made if it is not there."})
    annotator: str | None = field(default=None, metadata={"help": "Whose page opens; without it the page asks."})
    guidelines_file: str | None = field(default=None, metadata={"help": "Markdown shown beside the answers."})
    overlap_share: float = field(default=0.2, metadata={"help": "Share of the items that several people judge."})
    overlap_annotators: int = field(default=2, metadata={"help": "How many people judge each of those."})
    repeat_share: float = field(default=0.05, metadata={"help": "Share of the items that one sees again, unmarked."})
    host: str = field(
        default="127.0.0.1", metadata={"help": "Address to listen at; others than loopback need --auth."}
    )
    port: int | None = field(default=None, metadata={"help": "Port; without it the first free one from 7860."})
    auth: bool = field(
        default=False, metadata={"help": "Ask for name and password, set in SANDAN_AUTH=name:password,..."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of every order, of the overlap and of the repeats."})

    def __post_init__(self):
        for name in ("overlap_share", "repeat_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)}; a share lies between 0 and 1")


def main(args):
    import os
    from pathlib import Path

    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

    from sandan.core.places import command_for
    from sandan.core.stage import require_whole
    from sandan.preference.item_queue import Queue, QueueSettings, load_items
    from sandan.preference.judgement_log import JudgementLog, check_annotator
    from sandan.preference.page import accounts_from_environment, serve
    from sandan.preference.ranking_page import Desk, build_page, keep_guidelines, load_guidelines

    if args.annotator is not None:
        check_annotator(args.annotator)
    settings = QueueSettings(args.overlap_share, args.overlap_annotators, args.repeat_share, seed=args.seed)
    guidelines = load_guidelines(args.guidelines_file)
    require_whole(Path(args.candidates_file).parent)
    log = JudgementLog(args.log_file)
    queue = Queue(load_items(args.candidates_file), log, settings)
    keep_guidelines(guidelines, log.path.parent)
    recipe = Path(args.log_file).parent.name
    next_command = command_for("preferences", recipe, "--judgement_files", str(args.log_file))
    blocks = build_page(Desk(queue, guidelines, next_command), args.annotator)
    address = serve(blocks, args.host, args.port, accounts_from_environment() if args.auth else (), block=False)
    events = log.read()
    left_out = f", {log.left_out:,} lines left out" if log.left_out else ""
    print(f"{len(queue.items):,} items, {len(events):,} events in {args.log_file}{left_out}")
    print(f"open {address}{f'?annotator={args.annotator}' if args.annotator else ''}   (Ctrl+C ends it)", flush=True)
    blocks.block_thread()
    print(f"next: {next_command}")


if __name__ == "__main__":
    run(main, AnnotateArguments, stage=False)
