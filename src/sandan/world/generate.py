"""Generator of the world's data sets: `python -m sandan.world.generate [folder]` writes the same bytes every time.

| file | rows | columns |
|---|---|---|
| pretrain.jsonl, pretrain_eval.jsonl | short documents | text, kind, language |
| sft.jsonl, sft_eval.jsonl | demonstrations of mixed quality | prompt, completion (conversations) |
| rlhf_prompts.jsonl | prompts for candidates and rollouts | prompt_id, prompt |
| eval_prompts.jsonl | unseen prompts | prompt_id, prompt, group |
| minimal_pairs.jsonl | two texts, of which one is right | skill, language, good, bad |
"""

import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..data.jsonl import write_jsonl
from .dice import in_random_order, pick
from .documents import KINDS, document
from .facts import ASKED_FACTS, PEOPLE, PRETRAINING_ONLY_FACTS, RELATIONS, Fact
from .language import (
    CURT_WORDINGS,
    FULL,
    LANGUAGES,
    QUESTIONS,
    RUDE,
    TERSE,
    UNKNOWN,
    WORDINGS,
    Question,
    answer,
    ask,
    name,
)
from .minimal_pairs import minimal_pairs


SEED = 3
DOCUMENTS, HELD_OUT_DOCUMENTS = 20_000, 500
DEMONSTRATIONS, HELD_OUT_DEMONSTRATIONS, RLHF_PROMPTS, EVAL_PROMPTS = 3_000, 200, 2_400, 300

# Shares of the demonstrations by quality, for civil and for curt prompts. People answer curt prompts worse.
QUALITIES = ("good", "terse", "wrong", "off_topic", "unknown", "rude")
CIVIL_SHARES = (0.56, 0.06, 0.18, 0.10, 0.05, 0.05)
CURT_SHARES = (0.38, 0.06, 0.20, 0.12, 0.08, 0.16)

NEW_COMBINATIONS, PRETRAINING_ONLY = "new_combinations", "pretraining_only"


def datasets(seed: int = SEED) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of every data set, by file stem."""
    rng = random.Random(seed)
    documents = list(_unique_documents(rng, DOCUMENTS + HELD_OUT_DOCUMENTS))
    prompts = _prompts(rng, ASKED_FACTS)
    demonstrated = [next(prompts) for _ in range(DEMONSTRATIONS + HELD_OUT_DEMONSTRATIONS)]
    demonstrations = [_demonstration(rng, *prompt) for prompt in demonstrated]
    asked = [next(prompts) for _ in range(RLHF_PROMPTS)]
    new = [next(prompts) for _ in range(EVAL_PROMPTS)]
    unasked_prompts = _prompts(rng, PRETRAINING_ONLY_FACTS)
    unasked = [next(unasked_prompts) for _ in range(EVAL_PROMPTS)]
    groups = [(NEW_COMBINATIONS, new), (PRETRAINING_ONLY, unasked)]
    texts = {row["text"] for row in documents}
    return {
        "pretrain": documents[HELD_OUT_DOCUMENTS:],
        "pretrain_eval": documents[:HELD_OUT_DOCUMENTS],
        "sft": demonstrations[HELD_OUT_DEMONSTRATIONS:],
        "sft_eval": demonstrations[:HELD_OUT_DEMONSTRATIONS],
        "rlhf_prompts": [
            {"prompt_id": f"rlhf-{index:04d}", "prompt": _user(text)} for index, (text, _, _) in enumerate(asked)
        ],
        "eval_prompts": [
            {"prompt_id": f"{group}-{index:03d}", "prompt": _user(text), "group": group}
            for group, rows in groups
            for index, (text, _, _) in enumerate(rows)
        ],
        "minimal_pairs": minimal_pairs(rng, texts),
    }


def _unique_documents(rng: random.Random, count: int) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    while len(seen) < count:
        language, kind = pick(rng, LANGUAGES), pick(rng, list(KINDS), list(KINDS.values()))
        text = document(rng, kind, language)
        if text not in seen:
            seen.add(text)
            yield {"text": text, "kind": kind, "language": language}


def _prompts(rng: random.Random, facts: Sequence[Fact]) -> Iterator[tuple[str, Question, int]]:
    """Yield (text, question, wording) for all combinations of person, wording and question, in random order."""
    combinations = [
        (Question(language, name(person, language), fact.relation, fact.entity), wording, form)
        for language in LANGUAGES
        for person in PEOPLE
        for fact in facts
        for wording in range(len(WORDINGS[language]))
        for form in range(len(QUESTIONS[language][fact.relation]))
        # Nobody asks about themselves.
        if RELATIONS[fact.relation][0][fact.entity] is not person
    ]
    for question, wording, form in in_random_order(rng, combinations):
        yield ask(question, wording, form), question, wording


def _demonstration(rng: random.Random, text: str, question: Question, wording: int) -> dict[str, Any]:
    shares = CURT_SHARES if wording in CURT_WORDINGS else CIVIL_SHARES
    completion = demonstrate(rng, question, pick(rng, QUALITIES, shares))
    return {"prompt": _user(text), "completion": [{"role": "assistant", "content": completion}]}


def demonstrate(rng: random.Random, question: Question, quality: str) -> str:
    """Return an answer of the given quality, as a person might write it."""
    language = question.language
    truth = claim = Fact(question.relation, question.entity, question.entity)
    if quality == "wrong":
        claim = _wrong(rng, truth)
    elif quality == "off_topic":
        claim = pick(rng, [fact for fact in ASKED_FACTS if fact != truth])
    forms = {"terse": TERSE, "unknown": UNKNOWN, "rude": RUDE}.get(quality, FULL)
    return answer(pick(rng, forms[language]), language, question.asker, claim)


def _wrong(rng: random.Random, fact: Fact) -> Fact:
    """Return a false claim: the same relation and entity with another value."""
    values = [value for value in range(len(RELATIONS[fact.relation][1])) if value != fact.value]
    return Fact(fact.relation, fact.entity, pick(rng, values))


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def main() -> None:
    """Write every file into the folder named on the command line (default: data)."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "data")
    folder.mkdir(parents=True, exist_ok=True)
    for stem, rows in datasets().items():
        write_jsonl(folder / f"{stem}.jsonl", rows)


if __name__ == "__main__":
    main()
