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
from .facts import ASKED_FACTS, HARMS, PEOPLE, PRETRAINING_ONLY_FACTS, RELATIONS, Fact, entities_of
from .language import (
    CLUMSY,
    COMPLIANCE,
    FULL,
    LANGUAGES,
    REFUSALS,
    RUDE,
    TERSE,
    UNKNOWN,
    answer,
    capitalise,
    name,
    reason,
)
from .minimal_pairs import minimal_pairs
from .prompts import CURT_WORDINGS, QUESTIONS, WORDINGS, Question, Turns, ask, follow_up, followers, user


SEED = 3
DOCUMENTS, HELD_OUT_DOCUMENTS = 20_000, 500
DEMONSTRATIONS, HELD_OUT_DEMONSTRATIONS, RLHF_PROMPTS, EVAL_PROMPTS = 4_500, 200, 2_400, 300

# Shares of the prompts by kind.
PROMPT_KINDS = {"question": 0.61, "follow_up": 0.23, "request": 0.16}
# Shares of the demonstrations by quality, for civil and for curt prompts, and for requests to do harm. People answer
# curt prompts worse.
QUALITIES = ("good", "terse", "clumsy", "wrong", "off_topic", "unknown", "rude")
CIVIL_SHARES = (0.46, 0.06, 0.06, 0.16, 0.09, 0.05, 0.12)
CURT_SHARES = (0.32, 0.06, 0.06, 0.17, 0.10, 0.07, 0.22)
REQUEST_QUALITIES = ("refusal", "off_topic", "unknown", "compliant")
REQUEST_SHARES = (0.50, 0.10, 0.08, 0.32)

NEW_COMBINATIONS, PRETRAINING_ONLY = "new_combinations", "pretraining_only"

# A prompt, the question in it, and whether that is curt.
Prompt = tuple[Turns, Question, bool]


def datasets(seed: int = SEED) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of every data set, by file stem."""
    rng = random.Random(seed)
    prompts = _mixed_prompts(rng)
    demonstrated = [next(prompts) for _ in range(DEMONSTRATIONS + HELD_OUT_DEMONSTRATIONS)]
    demonstrations = [_demonstration(rng, *prompt) for prompt in demonstrated]
    asked = [next(prompts) for _ in range(RLHF_PROMPTS)]
    new = [next(prompts) for _ in range(EVAL_PROMPTS)]
    unasked_prompts = _prompts(rng, PRETRAINING_ONLY_FACTS)
    unasked = [next(unasked_prompts) for _ in range(EVAL_PROMPTS)]
    groups = [(NEW_COMBINATIONS, new), (PRETRAINING_ONLY, unasked)]
    unseen = {turns[0]["content"] for turns, _, _ in new + unasked}
    documents = list(_unique_documents(rng, DOCUMENTS + HELD_OUT_DOCUMENTS, unseen))
    texts = {row["text"] for row in documents}
    return {
        "pretrain": documents[HELD_OUT_DOCUMENTS:],
        "pretrain_eval": documents[:HELD_OUT_DOCUMENTS],
        "sft": demonstrations[HELD_OUT_DEMONSTRATIONS:],
        "sft_eval": demonstrations[:HELD_OUT_DEMONSTRATIONS],
        "rlhf_prompts": [
            {"prompt_id": f"rlhf-{index:04d}", "prompt": turns} for index, (turns, _, _) in enumerate(asked)
        ],
        "eval_prompts": [
            {"prompt_id": f"{group}-{index:03d}", "prompt": turns, "group": group}
            for group, rows in groups
            for index, (turns, _, _) in enumerate(rows)
        ],
        "minimal_pairs": minimal_pairs(rng, texts),
    }


def _unique_documents(rng: random.Random, count: int, unseen: set[str]) -> Iterator[dict[str, Any]]:
    """Yield documents of which no two are the same and none begins with a prompt that is to stay unseen."""
    seen, prompts = set[str](), tuple(unseen)
    while len(seen) < count:
        language, kind = pick(rng, LANGUAGES), pick(rng, list(KINDS), list(KINDS.values()))
        text = document(rng, kind, language)
        if text not in seen and not text.startswith(prompts):
            seen.add(text)
            yield {"text": text, "kind": kind, "language": language}


def _mixed_prompts(rng: random.Random) -> Iterator[Prompt]:
    """Yield questions about facts that may be asked, follow-up questions about them, and requests to do harm."""
    questions = _prompts(rng, ASKED_FACTS)
    requests = _prompts(
        rng, [Fact(harm, entity, entity) for harm in HARMS for entity in range(len(entities_of(harm)))]
    )
    may_be_asked = {(fact.relation, fact.entity) for fact in ASKED_FACTS}
    while True:
        kind = pick(rng, list(PROMPT_KINDS), list(PROMPT_KINDS.values()))
        turns, question, curt = next(requests if kind == "request" else questions)
        nexts = [one for one in followers(question) if (one.relation, one.entity) in may_be_asked]
        if kind == "follow_up" and nexts:
            second = pick(rng, nexts)
            yield follow_up(question, turns[0]["content"], second), second, False
        else:
            yield turns, question, curt


def _prompts(rng: random.Random, facts: Sequence[Fact]) -> Iterator[Prompt]:
    """Yield all combinations of person, wording and question, in random order."""
    combinations = [
        (Question(language, name(person, language), fact.relation, fact.entity), wording, form)
        for language in LANGUAGES
        for person in PEOPLE
        for fact in facts
        for wording in range(len(WORDINGS[language]))
        for form in range(len(QUESTIONS[language][fact.relation]))
        # Nobody asks about themselves.
        if entities_of(fact.relation)[fact.entity] is not person
    ]
    for question, wording, form in in_random_order(rng, combinations):
        yield user(ask(question, wording, form)), question, wording in CURT_WORDINGS


def _demonstration(rng: random.Random, prompt: Turns, question: Question, curt: bool) -> dict[str, Any]:
    if question.relation in HARMS:
        quality = pick(rng, REQUEST_QUALITIES, REQUEST_SHARES)
    else:
        quality = pick(rng, QUALITIES, CURT_SHARES if curt else CIVIL_SHARES)
    completion = demonstrate(rng, question, quality)
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": completion}]}


def demonstrate(rng: random.Random, question: Question, quality: str) -> str:
    """Return an answer of the given quality, as a person might write it."""
    language, asked, entity = question.language, question.relation, question.entity
    if quality == "refusal":
        return pick(rng, REFUSALS[language]).format(r=reason(asked, entity, language))
    if quality == "compliant":
        return pick(rng, COMPLIANCE[language][asked]).format(e=name(HARMS[asked][entity], language))
    claim = None if asked in HARMS else Fact(asked, entity, entity)
    if quality == "off_topic":
        claim = pick(rng, [fact for fact in ASKED_FACTS if fact != claim])
    elif quality == "wrong":
        claim = _wrong(rng, Fact(asked, entity, entity))
    forms = {"terse": TERSE, "clumsy": CLUMSY, "unknown": UNKNOWN, "rude": RUDE}.get(quality, FULL)
    return answer(pick(rng, forms[language]), language, question.asker, claim)


def _wrong(rng: random.Random, fact: Fact) -> Fact:
    """Return a false claim: the same relation and entity with another value."""
    values = [value for value in range(len(RELATIONS[fact.relation][1])) if value != fact.value]
    return Fact(fact.relation, fact.entity, pick(rng, values))


def main() -> None:
    """Write every file into the folder named on the command line (default: data)."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "data")
    folder.mkdir(parents=True, exist_ok=True)
    for stem, rows in datasets().items():
        write_jsonl(folder / f"{stem}.jsonl", rows)


if __name__ == "__main__":
    main()
