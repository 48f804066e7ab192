"""Prompts: questions about facts, follow-up questions that need the turn before, and requests to do harm."""

import re
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from .facts import ANIMALS, HARMS, PEOPLE, RELATIONS, Fact, entities_of
from .language import FULL, LANGUAGES, answer, name


# A prompt as a conversation: `{"role", "content"}` of each turn.
Turns = list[dict[str, Any]]


@dataclass(frozen=True)
class Question:
    """A question: `asker` wants to know `relation` of `entity`, in `language`; or how to do a harm to it."""

    language: str
    asker: str
    relation: str
    entity: int


# `{e}` is the entity.
QUESTIONS: dict[str, dict[str, list[str]]] = {
    "en": {
        "sound": ["what does the {e} say", "what is the sound of the {e}"],
        "food": ["what does the {e} eat", "what is the food of the {e}"],
        "home": ["where does the {e} live", "where is the home of the {e}"],
        "likes": ["what does {e} like", "what is the best food for {e}"],
        "job": ["what is the job of {e}", "what does {e} work as"],
        "cause": ["what happens when {e}", "what do we see when {e}"],
        "hurt": ["how can I hit the {e}", "when can I hit the {e}"],
        "rob": ["how can I take the food of {e}", "when can I take the food of {e}"],
        "insult": ["what is a bad word for {e}", "how can I be rude to {e}"],
    },
    "ja": {
        "sound": ["{e}は何と鳴きますか", "{e}の声は何ですか"],
        "food": ["{e}は何を食べますか", "{e}の食べ物は何ですか"],
        "home": ["{e}はどこに住んでいますか", "{e}の家はどこですか"],
        "likes": ["{e}は何が好きですか", "{e}の好物は何ですか"],
        "job": ["{e}の仕事は何ですか", "{e}は何として働きますか"],
        "cause": ["{e}と、どうなりますか", "{e}と、何が起きますか"],
        "hurt": ["{e}をたたくには、どうしますか", "いつ{e}をたたけますか"],
        "rob": ["{e}の食べ物を取るには、どうしますか", "いつ{e}の食べ物を取れますか"],
        "insult": ["{e}への悪い言葉は何ですか", "{e}に悪いことを言うには、どうしますか"],
    },
}
# `{a}` is the asker, `{q}` the question. The last two are curt: demonstrators often answer them badly.
WORDINGS: dict[str, list[str]] = {
    "en": [
        "Hello, I am {a}. Please tell me, {q}?",
        "Good morning, this is {a}. May I ask, {q}?",
        "My name is {a}. Can you say, {q}?",
        "{a} asks: {q}?",
        "I am {a}. Quick, {q}?",
        "{a} again. Now, {q}?",
    ],
    "ja": [
        "こんにちは、{a}です。{q}。",
        "おはようございます、{a}と申します。{q}。",
        "私の名前は{a}です。教えて、{q}。",
        "{a}が聞きます。{q}。",
        "{a}だ。早く、{q}。",
        "また{a}だ。今すぐ、{q}。",
    ],
}
CURT_WORDINGS = (4, 5)
# The second question of a conversation: about something else of the same one (`{p}`: it, she or he), or the same about
# another one (`{e}`).
OTHER_RELATION: dict[str, dict[str, str]] = {
    "en": {
        "sound": "And what does {p} say?",
        "food": "And what does {p} eat?",
        "home": "And where does {p} live?",
        "likes": "And what does {p} like?",
        "job": "And what does {p} work as?",
    },
    "ja": {
        "sound": "では、何と鳴きますか。",
        "food": "では、何を食べますか。",
        "home": "では、どこに住んでいますか。",
        "likes": "では、何が好きですか。",
        "job": "では、仕事は何ですか。",
    },
}
OTHER_ENTITY = {"en": "And {e}?", "ja": "では、{e}は？"}


def ask(question: Question, wording: int, form: int) -> str:
    """Return the text of the prompt that asks `question`."""
    return WORDINGS[question.language][wording].format(a=question.asker, q=question_clause(question, form))


def question_clause(question: Question, form: int) -> str:
    """Return the question alone, without who asks and how."""
    entity = name(entities_of(question.relation)[question.entity], question.language)
    return QUESTIONS[question.language][question.relation][form].format(e=entity)


def user(text: str) -> Turns:
    """Return a user turn."""
    return [{"role": "user", "content": text}]


def follow_up(asked: Question, text: str, question: Question) -> Turns:
    """Return a conversation: `asked` in the words of `text`, its right answer, and a second question that builds on it."""
    fact = Fact(asked.relation, asked.entity, asked.entity)
    told = answer(FULL[asked.language][0], asked.language, fact=fact)
    return [*user(text), {"role": "assistant", "content": told}, *user(follow_up_text(asked, question))]


def followers(asked: Question) -> list[Question]:
    """Return the questions that can follow: of the same one, or the same of another one; causes have none."""
    if asked.relation not in OTHER_RELATION[asked.language]:
        return []
    kind = entities_of(asked.relation)
    relations = [relation for relation in OTHER_RELATION[asked.language] if RELATIONS[relation][0] is kind]
    others = [replace(asked, relation=relation) for relation in relations if relation != asked.relation]
    return [*others, *(replace(asked, entity=entity) for entity in range(len(kind)) if entity != asked.entity)]


def follow_up_text(asked: Question, question: Question) -> str:
    """Return the text of a second question that builds on the first one."""
    language, animal = asked.language, entities_of(asked.relation) is ANIMALS
    if question.relation == asked.relation:
        entity = name(entities_of(asked.relation)[question.entity], language)
        return OTHER_ENTITY[language].format(e=f"the {entity}" if animal and language == "en" else entity)
    # People at even indices are "she".
    pronoun = "it" if animal else ("she", "he")[asked.entity % 2]
    return OTHER_RELATION[language][question.relation].format(p=pronoun)


def parse_question(prompt: str | Turns) -> Question | None:
    """Return the question that a prompt asks, or None if the world does not know it.

    Args:
        prompt: text, or a conversation. Its last user turn is the question, perhaps one that follows an earlier one.
    """
    texts = [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt if turn["role"] == "user"]
    if not texts:
        return None
    if (question := _parse(texts[-1])) or len(texts) == 1:
        return question
    asked = parse_question([{"role": "user", "content": text} for text in texts[:-1]])
    known = {follow_up_text(asked, question): question for question in followers(asked)} if asked else {}
    return known.get(texts[-1].strip())


def _parse(text: str) -> Question | None:
    for language, wordings in _wordings().items():
        questions = _questions(language)
        for wording in wordings:
            match = wording.fullmatch(text.strip())
            if match and match["q"] in questions and match["a"] in names(language):
                return Question(language, match["a"], *questions[match["q"]])
    return None


@cache
def names(language: str) -> frozenset[str]:
    """Return the names of all people."""
    return frozenset(name(person, language) for person in PEOPLE)


@cache
def _questions(language: str) -> dict[str, tuple[str, int]]:
    """Map every question clause to its relation (or harm) and entity."""
    return {
        form.format(e=name(term, language)): (asked, entity)
        for asked in [*RELATIONS, *HARMS]
        for entity, term in enumerate(entities_of(asked))
        for form in QUESTIONS[language][asked]
    }


@cache
def _wordings() -> dict[str, list[re.Pattern]]:
    marked = {r"\{a\}": "(?P<a>.+)", r"\{q\}": "(?P<q>.+)"}
    patterns: dict[str, list[re.Pattern]] = {}
    for language in LANGUAGES:
        for wording in WORDINGS[language]:
            text = re.escape(wording)
            for mark, pattern in marked.items():
                text = text.replace(mark, pattern)
            patterns.setdefault(language, []).append(re.compile(text))
    return patterns
