"""Let a model rank candidate answers, through any OpenAI-compatible endpoint; its judgements go into the same log.

A server on this machine (vLLM, llama.cpp, Ollama, ...):
    python scripts/judge.py --candidates_file outputs/tiny/candidates/candidates.jsonl \
        --log_file annotations/tiny/judgements.jsonl --base_url http://127.0.0.1:8000/v1 --model my-model

The key of the endpoint is read from SANDAN_JUDGE_API_KEY. Without --base_url the Hub's inference providers are used,
with HF_TOKEN. A second run continues where the first one ended. The prompts and answers are sent to the endpoint.
"""

from dataclasses import dataclass, field

from sandan.run.cli import run


@dataclass
class JudgeArguments:
    """Settings of a model as a judge: candidates, log, endpoint and limits."""

    candidates_file: str = field(metadata={"help": "JSONL with prompt and candidates (2 to 9 texts)."})
    log_file: str = field(metadata={"help": "The append-only log of judgements; made if it is not there."})
    model: str = field(metadata={"help": "The model's name at the endpoint."})
    base_url: str | None = field(
        default=None, metadata={"help": "The endpoint, up to /v1; default: the Hub's router."}
    )
    annotator: str | None = field(default=None, metadata={"help": "Its name in the log; default: from the model's."})
    guidelines_file: str | None = field(default=None, metadata={"help": "What it is told to judge by (markdown)."})
    max_items: int | None = field(default=None, metadata={"help": "Stop after so many items."})
    max_tokens: int = field(default=512, metadata={"help": "Longest reply, in tokens."})
    timeout_seconds: float = field(default=120.0, metadata={"help": "Longest wait for a reply."})


def main(args):
    import re
    from pathlib import Path

    from sandan.core.stage import require_whole
    from sandan.preference.item_queue import Queue, load_items
    from sandan.preference.judgement_log import JudgementLog, check_annotator
    from sandan.preference.llm_judge import EVERY_ITEM, connect, judge_all
    from sandan.preference.ranking_page import keep_guidelines, load_guidelines

    name = check_annotator(args.annotator or re.sub(r"[^A-Za-z0-9_-]+", "-", args.model)[-32:])
    guidelines = load_guidelines(args.guidelines_file)
    require_whole(Path(args.candidates_file).parent)
    log = JudgementLog(args.log_file)
    queue = Queue(load_items(args.candidates_file), log, EVERY_ITEM)
    keep_guidelines(guidelines, log.path.parent)
    send = connect(args.base_url, args.model, args.max_tokens, args.timeout_seconds)
    counts = judge_all(queue, name, send, guidelines["en"].text, guidelines["en"].hash, args.max_items)
    agree = (
        "" if counts["orders_agree"] is None else f"; both orders agree on {counts['orders_agree']:.0%} of the pairs"
    )
    print(f"{name}: {counts['judged']:,} judged, {counts['unparsable']:,} unparsable and left out{agree}")


if __name__ == "__main__":
    run(main, JudgeArguments, stage=False)
