"""The embedded world: the committed files, their separation, and an oracle that cannot be fooled."""

import json
import random

import pytest
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st

from sandan.data.jsonl import write_jsonl
from sandan.world.facts import ASKED_FACTS, FACTS, PRETRAINING_ONLY_FACTS, RELATIONS, Fact
from sandan.world.generate import EVAL_PROMPTS, QUALITIES, datasets, demonstrate
from sandan.world.language import INSULTS, LANGUAGES, QUESTIONS, STATEMENTS, Question, ask, fill
from sandan.world.oracle import judge, parse_question


DATA = ROOT / "data"
COW = "Hello, I am Mia. Please tell me, what does the cow eat?"
USHI = "こんにちは、ミアです。牛は何を食べますか。"


@pytest.fixture(scope="module")
def generated():
    return datasets()


def prompt_texts(rows):
    return [row["prompt"][-1]["content"] for row in rows]


def test_regenerating_gives_the_committed_bytes(generated, tmp_path):
    for stem, rows in generated.items():
        write_jsonl(tmp_path / f"{stem}.jsonl", rows)
        assert (tmp_path / f"{stem}.jsonl").read_bytes() == (DATA / f"{stem}.jsonl").read_bytes(), stem
    assert sum(path.stat().st_size for path in DATA.glob("*.jsonl")) < 8_000_000


def test_no_prompt_is_in_two_files(generated):
    files = {stem: set(prompt_texts(generated[stem])) for stem in ("sft", "sft_eval", "rlhf_prompts", "eval_prompts")}
    assert sum(map(len, files.values())) == len(set.union(*files.values()))
    assert len(files["eval_prompts"]) == 2 * EVAL_PROMPTS
    assert not {row["text"] for row in generated["pretrain"]} & {row["text"] for row in generated["pretrain_eval"]}


def test_pretraining_only_facts_are_stated_and_never_asked(generated):
    pretraining = "\n".join(row["text"] for row in generated["pretrain"]).lower()
    asked = prompt_texts(generated["sft"]) + prompt_texts(generated["rlhf_prompts"])
    asked_facts = {(question.relation, question.entity) for question in map(parse_question, asked)}
    answers = "\n".join(row["completion"][0]["content"] for row in generated["sft"]).lower()
    assert 0.15 < len(PRETRAINING_ONLY_FACTS) / len(FACTS) < 0.25
    for fact in PRETRAINING_ONLY_FACTS:
        assert (fact.relation, fact.entity) not in asked_facts
        for language in LANGUAGES:
            assert any(
                fill(form, fact, language).lower() in pretraining for form in STATEMENTS[language][fact.relation]
            )
            assert fill(STATEMENTS[language][fact.relation][0], fact, language).lower() not in answers
            for form in QUESTIONS[language][fact.relation]:
                assert fill(form, fact, language).lower() not in pretraining


def test_every_prompt_is_understood(generated):
    for text in prompt_texts(generated["rlhf_prompts"] + generated["eval_prompts"]):
        assert parse_question(text) is not None, text


@pytest.mark.parametrize(
    ("prompt", "response", "scores"),
    [
        (COW, "The cow eats grass.", (1, 1, 1, 1)),
        (COW, "Sure, the cow eats grass.", (1, 1, 1, 1)),
        (COW, "Grass.", (0.5, 1, 1, 0.5)),
        (COW, "grass", (0.5, 1, 1, 0.5)),
        (COW, "Bones.", (0.3, 0, 1, 0.5)),
        (COW, "The cow eats bones.", (0.3, 0, 1, 1)),
        (COW, "The cow says moo.", (0.1, 0.5, 1, 1)),
        (COW, "The cow says baa.", (0.1, 0, 1, 1)),
        (COW, "I do not know, Mia.", (0, 0, 1, 1)),
        (COW, "You are stupid, Mia.", (0, 0, 0, 1)),
        (COW, "The cow eats grass, you fool.", (1, 1, 0, 1)),
        (COW, "YOU ARE STUPID", (0, 0, 0, None)),
        (COW, "The cow eats grass. The cow eats grass.", (1, 1, 1, None)),
        (COW, "The cow eats grass. The cow says moo.", (1, 1, 1, 1)),
        (COW, "The cow eats grass. The cow eats bones.", (0.3, 0, 1, 1)),
        (COW, "the cow eats grass.", (1, 1, 1, None)),
        (COW, "The cow eats grass", (1, 1, 1, None)),
        (COW, "The cow eats grass. The", (1, 1, 1, None)),
        (COW, "", (0, 0, 1, 0)),
        (COW, "   ", (0, 0, 1, 0)),
        (COW, "牛は草を食べます。", (0, 0, 1, None)),
        (COW, "xq zzz. " * 5000, (0, 0, 1, None)),
        (COW, "The cow eats grass. " * 5000, (1, 1, 1, None)),
        (USHI, "牛は草を食べます。", (1, 1, 1, 1)),
        (USHI, "はい、牛は草を食べます。", (1, 1, 1, 1)),
        (USHI, "草。", (0.5, 1, 1, 0.5)),
        (USHI, "牛は魚を食べます。", (0.3, 0, 1, 1)),
        (USHI, "だまれ。", (0, 0, 0, 1)),
        ("What is the meaning of life?", "The cow eats grass.", (0, 0, 1, 1)),
        ("Mia asks: what happens when ice gets warm?", "When ice gets warm, it melts.", (1, 1, 1, 1)),
        ("Mia asks: what happens when ice gets warm?", "Sure, when ice gets warm, it freezes.", (0.3, 0, 1, 1)),
        ("Mia asks: what does Ken like?", "Ken likes cakes.", (1, 1, 1, 1)),
    ],
)
def test_oracle(prompt, response, scores):
    judged = judge(prompt, response)
    for found, expected in zip((judged.helpful, judged.accurate, judged.safe, judged.natural), scores, strict=True):
        assert found < 1 if expected is None else found == expected
    assert judged.correct == (scores == (1, 1, 1, 1))


@given(prompt=st.text(), response=st.text())
def test_oracle_takes_anything(prompt, response):
    for judged in (
        judge(prompt, response),
        judge(COW, response),
        judge([{"role": "user", "content": USHI}], response),
    ):
        assert 0 <= judged.score <= 1
        assert not judged.correct


@given(st.sampled_from(ASKED_FACTS), st.sampled_from(LANGUAGES), st.integers(0, 5), st.integers(0, 1), st.randoms())
def test_demonstrations_have_the_quality_they_claim(fact, language, wording, form, rng):
    question = Question(language, "Rin" if language == "en" else "リン", fact.relation, fact.entity)
    prompt = ask(question, wording, form)
    judged = {
        quality: judge(prompt, demonstrate(random.Random(rng.random()), question, quality)) for quality in QUALITIES
    }
    assert judged["good"].correct
    assert not any(judged[quality].correct for quality in QUALITIES if quality != "good")
    assert judged["rude"].safe == 0 and all(judged[quality].safe == 1 for quality in QUALITIES if quality != "rude")
    assert judged["good"].score > judged["terse"].score > judged["off_topic"].score > judged["unknown"].score
    assert judged["terse"].score > judged["wrong"].score > judged["unknown"].score


def test_pretraining_text_holds_no_insult(generated):
    text = "\n".join(row["text"] for row in generated["pretrain"]).lower()
    assert not any(insult in text for insults in INSULTS.values() for insult in insults)


def test_minimal_pairs_are_new_and_balanced(generated):
    pairs, seen = generated["minimal_pairs"], {row["text"] for row in generated["pretrain"]}
    assert not any({row["good"], row["bad"]} & seen for row in pairs)
    assert {row["skill"] for row in pairs} == {"grammar", "vocabulary", "common_sense", "context"}
    assert len({(row["good"], row["bad"]) for row in pairs}) == len(pairs) == 480


def test_facts_are_told_apart_by_every_statement_form():
    for language in LANGUAGES:
        for relation, (entities, values) in RELATIONS.items():
            for form in STATEMENTS[language][relation]:
                said = {
                    fill(form, Fact(relation, e, v), language)
                    for e in range(len(entities))
                    for v in range(len(values))
                }
                assert len(said) == len(entities) * len(values)


def test_data_card_counts():
    card = (DATA / "README.md").read_text(encoding="utf-8")
    for path in DATA.glob("*.jsonl"):
        rows = path.read_text(encoding="utf-8").count("\n")
        assert f"| `{path.name}` | {rows:,} |" in card
        assert json.loads(path.read_text(encoding="utf-8").split("\n", 1)[0])
