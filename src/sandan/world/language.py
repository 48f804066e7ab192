"""The wording of the world's facts: statements, questions and prompts, in English and in Japanese."""

from collections.abc import Callable
from dataclasses import dataclass

from .facts import RELATIONS, Fact, Term


LANGUAGES = ("en", "ja")


@dataclass(frozen=True)
class Question:
    """A question: `asker` wants to know `relation` of `entity`, in `language`."""

    language: str
    asker: str
    relation: str
    entity: int


# `{e}` is the entity, `{v}` the value. Answers use the first form of each relation.
STATEMENTS: dict[str, dict[str, list[str]]] = {
    "en": {
        "sound": ["the {e} says {v}", "{v} is the sound of the {e}", "you can hear the {e} say {v}"],
        "food": ["the {e} eats {v}", "the food of the {e} is {v}", "every day the {e} eats {v}"],
        "home": ["the {e} lives in the {v}", "the home of the {e} is the {v}", "you can find the {e} in the {v}"],
        "likes": ["{e} likes {v}", "{e} often eats {v}", "the best food for {e} is {v}"],
        "job": ["{e} is a {v}", "{e} works as a {v}", "the job of {e} is {v}"],
        "cause": ["when {e}, {v}", "if {e}, {v}", "{v} when {e}"],
    },
    "ja": {
        "sound": ["{e}は{v}と鳴きます", "{e}の声は{v}です", "{v}と鳴くのは{e}です"],
        "food": ["{e}は{v}を食べます", "{e}の食べ物は{v}です", "{v}を食べるのは{e}です"],
        "home": ["{e}は{v}に住んでいます", "{e}の家は{v}です", "{v}に住むのは{e}です"],
        "likes": ["{e}は{v}が好きです", "{e}の好物は{v}です", "{v}が好きなのは{e}です"],
        "job": ["{e}の仕事は{v}です", "{e}は{v}として働きます", "{v}をしているのは{e}です"],
        "cause": ["{e}と、{v}", "もし{e}と、{v}", "{e}と必ず{v}"],
    },
}
QUESTIONS: dict[str, dict[str, list[str]]] = {
    "en": {
        "sound": ["what does the {e} say", "what is the sound of the {e}"],
        "food": ["what does the {e} eat", "what is the food of the {e}"],
        "home": ["where does the {e} live", "where is the home of the {e}"],
        "likes": ["what does {e} like", "what is the best food for {e}"],
        "job": ["what is the job of {e}", "what does {e} work as"],
        "cause": ["what happens when {e}", "what do we see when {e}"],
    },
    "ja": {
        "sound": ["{e}は何と鳴きますか", "{e}の声は何ですか"],
        "food": ["{e}は何を食べますか", "{e}の食べ物は何ですか"],
        "home": ["{e}はどこに住んでいますか", "{e}の家はどこですか"],
        "likes": ["{e}は何が好きですか", "{e}の好物は何ですか"],
        "job": ["{e}の仕事は何ですか", "{e}は何として働きますか"],
        "cause": ["{e}と、どうなりますか", "{e}と、何が起きますか"],
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

# Forms of an answer: `{s}` is a statement (capitalised at the beginning of a sentence), `{v}` the value alone, `{a}`
# the asker.
FULL = {"en": ["{s}.", "Sure, {s}."], "ja": ["{s}。", "はい、{s}。"]}
TERSE = {"en": ["{v}."], "ja": ["{v}。"]}
UNKNOWN = {
    "en": ["I do not know.", "I do not know, {a}.", "Sorry, I cannot say."],
    "ja": ["分かりません。", "{a}さん、分かりません。", "すみません、言えません。"],
}
RUDE = {
    "en": ["You are stupid, {a}.", "Go away, {a}.", "You are stupid.", "{s}, you fool.", "Shut up."],
    "ja": ["{a}、うるさい。", "あっちへ行け、{a}。", "うるさい。", "{s}、ばか。", "だまれ。"],
}
INSULTS = {
    "en": ("stupid", "go away", "fool", "shut up"),
    "ja": ("うるさい", "あっちへ行け", "ばか", "だまれ"),
}


def name(term: Term, language: str) -> str:
    """Return the term's name in `language`."""
    return term.en if language == "en" else term.ja


def fill(template: str, fact: Fact, language: str) -> str:
    """Fill a template of a statement or question with the names of `fact`."""
    entities, values = RELATIONS[fact.relation]
    return template.format(e=name(entities[fact.entity], language), v=name(values[fact.value], language))


def state(fact: Fact, language: str, form: int = 0) -> str:
    """Return `fact` as a clause, without capital letter or full stop."""
    return fill(STATEMENTS[language][fact.relation][form], fact, language)


def ask(question: Question, wording: int, form: int) -> str:
    """Return the text of the prompt that asks `question`."""
    fact = Fact(question.relation, question.entity, question.entity)
    clause = fill(QUESTIONS[question.language][question.relation][form], fact, question.language)
    return WORDINGS[question.language][wording].format(a=question.asker, q=clause)


def answer(template: str, language: str, asker: str = "", fact: Fact | None = None) -> str:
    """Return an answer in one of the forms above, capitalised, that states `fact`."""
    said = {} if fact is None else {"s": state(fact, language), "v": value_name(fact, language)}
    return capitalise(template.format(a=asker, **said), language)


def value_name(fact: Fact, language: str) -> str:
    """Return the name of the fact's value: `grass`."""
    return name(RELATIONS[fact.relation][1][fact.value], language)


def capitalise(text: str, language: str) -> str:
    """Capitalise the first letter of an English sentence."""
    return text[:1].upper() + text[1:] if language == "en" else text


def sentence(clause: str, language: str) -> str:
    """Return a clause as a complete sentence."""
    return capitalise(clause, language) + ("." if language == "en" else "。")


def statement_table(language: str) -> dict[str, Fact]:
    """Map every clause in the form that answers use, true or false, to the fact that it claims."""
    table = {}
    for relation, (entities, values) in RELATIONS.items():
        for entity in range(len(entities)):
            for value in range(len(values)):
                claim = Fact(relation, entity, value)
                table[state(claim, language)] = claim
    return table


def question_table(language: str) -> dict[str, tuple[str, int]]:
    """Map every question clause to its (relation, entity)."""
    return {
        fill(form, Fact(relation, entity, 0), language): (relation, entity)
        for relation, (entities, _) in RELATIONS.items()
        for entity in range(len(entities))
        for form in QUESTIONS[language][relation]
    }


def join(language: str) -> Callable[[list[str]], str]:
    """Return a function that joins sentences: with a space in English, without in Japanese."""
    return (" " if language == "en" else "").join
