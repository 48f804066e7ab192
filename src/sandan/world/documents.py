"""The short documents for pretraining, one function per kind.

| kind | teaches |
|---|---|
| profile | facts, in several wordings |
| story | context: the person spoken of, he or she, the animal that was seen and its habits |
| greeting | context and politeness: people greet back by name, and introduce themselves |
| dialogue | context: one person asks a question, another answers exactly that question, and perhaps a second one |
| manners | people say that they do not know, or that they do not help to do harm, and why |
| grammar | number and agreement |
| vocabulary | the kind of thing that a word names |
"""

import random

from .dice import in_random_order, pick
from .facts import (
    ANIMALS,
    ASKED_FACTS,
    FACTS,
    FOODS,
    HARMS,
    HOMES,
    JOBS,
    LIKES,
    PEOPLE,
    PLURALS,
    RESIDENTS,
    SOUNDS,
    Fact,
)
from .language import FULL, REFUSALS, STATEMENTS, UNKNOWN, answer, fill, join, name, reason, sentence
from .prompts import WORDINGS, Question, follow_up_text, followers, question_clause


# kind -> share of the documents
KINDS = {
    "profile": 0.24,
    "story": 0.10,
    "greeting": 0.08,
    "dialogue": 0.32,
    "manners": 0.12,
    "grammar": 0.07,
    "vocabulary": 0.07,
}

CATEGORIES = {
    "en": [(ANIMALS, "an animal"), (FOODS + LIKES, "food"), (HOMES, "a place"), (SOUNDS, "a sound"), (JOBS, "a job")],
    "ja": [(ANIMALS, "動物"), (FOODS + LIKES, "食べ物"), (HOMES, "場所"), (SOUNDS, "鳴き声"), (JOBS, "仕事")],
}
OPPOSITES = {
    "en": ["big|small", "hot|cold", "new|old", "good|bad", "fast|slow", "day|night", "up|down", "wet|dry"],
    "ja": ["大きい|小さい", "熱い|冷たい", "新しい|古い", "良い|悪い", "速い|遅い", "昼|夜", "上|下", "長い|短い"],
}
SIZES = {"en": ["big", "small", "old", "young"], "ja": ["大きい", "小さい", "白い", "黒い"]}
GREETINGS = {
    "en": ["Good morning", "Good evening", "Hello", "Thank you", "Welcome"],
    "ja": ["おはよう", "こんばんは", "こんにちは", "ありがとう", "ようこそ"],
}
WHO = {"en": "who are you", "ja": "あなたは誰ですか"}


def document(rng: random.Random, kind: str, language: str) -> str:
    """Return the text of a new document of this kind."""
    write = {
        "profile": profile,
        "story": story,
        "greeting": greeting,
        "dialogue": dialogue,
        "manners": manners,
        "grammar": grammar,
        "vocabulary": vocabulary,
    }
    return join(language)(write[kind](rng, language))


def profile(rng: random.Random, language: str) -> list[str]:
    """Write two to four statements, all about one entity or about several."""
    about = pick(rng, FACTS)
    entity_of = {"sound": "animal", "food": "animal", "home": "animal", "likes": "person", "job": "person"}
    same = [
        fact
        for fact in FACTS
        if fact.entity == about.entity and entity_of.get(fact.relation) == entity_of.get(about.relation, "")
    ]
    others = [pick(rng, FACTS) for _ in range(2)]
    facts = in_random_order(rng, [*same, *others] if same else [about, *others])[: 2 + int(rng.random() * 3)]
    return [sentence(fill(pick(rng, STATEMENTS[language][fact.relation]), fact, language), language) for fact in facts]


def story(rng: random.Random, language: str) -> list[str]:
    """Write a story in which a person meets an animal with its typical habits; pronouns refer to the person."""
    index, person = int(rng.random() * len(ANIMALS)), int(rng.random() * len(PEOPLE))
    who, animal = name(PEOPLE[person], language), name(ANIMALS[index], language)
    sound, food, home = (name(terms[index], language) for terms in (SOUNDS, FOODS, HOMES))
    if language == "en":
        pronoun = "she" if person % 2 == 0 else "he"
        opening = [f"{who} goes to the {home}.", f"{pick(rng, ['Today', 'In the morning'])} {who} is at the {home}."]
        middle = [
            f"{pronoun.capitalize()} sees a {animal} there."
            if animal[0] not in "aeiou"
            else f"{pronoun.capitalize()} sees an {animal} there.",
            f"There {pronoun} finds the {animal}.",
        ]
        ending = [
            f"The {animal} says {sound} and {pronoun} laughs.",
            f"{pronoun.capitalize()} gives {food} to the {animal}.",
            f"The {animal} is hungry, so {pronoun} brings {food}.",
            f"The {animal} is happy and says {sound}.",
        ]
    else:
        pronoun = "彼女" if person % 2 == 0 else "彼"
        opening = [f"{who}は{home}へ行きます。", f"今日{who}は{home}にいます。"]
        middle = [f"そこで{pronoun}は{animal}を見ます。", f"{pronoun}は{animal}に会います。"]
        ending = [
            f"{animal}は{sound}と鳴き、{pronoun}は笑います。",
            f"{pronoun}は{animal}に{food}をあげます。",
            f"{animal}は空腹なので、{pronoun}は{food}を持って来ます。",
            f"{animal}は喜んで{sound}と鳴きます。",
        ]
    endings = in_random_order(rng, ending)[: 1 + int(rng.random() * 2)]
    return [pick(rng, opening), pick(rng, middle), *endings]


def greeting(rng: random.Random, language: str) -> list[str]:
    """Write how two people greet each other by name, perhaps with a fact, or how one asks who the other is."""
    speaker, listener = (name(person, language) for person in in_random_order(rng, PEOPLE)[:2])
    if rng.random() < 0.4:
        opening = pick(rng, WORDINGS[language]).format(a=speaker, q=WHO[language])
        return [opening, f"I am {listener}, {speaker}." if language == "en" else f"{speaker}さん、{listener}です。"]
    words = pick(rng, GREETINGS[language])
    told = answer(pick(rng, FULL[language]), language, fact=pick(rng, FACTS))
    if language == "en":
        lines = [f"{speaker} says: {words}, {listener}.", f"{listener} says: {words}, {speaker}."]
    else:
        lines = [f"{speaker}が言います。{words}、{listener}さん。", f"{listener}が言います。{words}、{speaker}さん。"]
    return [*lines, told] if rng.random() < 0.5 else lines


def dialogue(rng: random.Random, language: str) -> list[str]:
    """Write a question and its answer, never about a pretraining-only fact: such facts are never asked about."""
    speaker, listener = (name(person, language) for person in in_random_order(rng, PEOPLE)[:2])
    fact = pick(rng, ASKED_FACTS)
    asked = Question(language, speaker, fact.relation, fact.entity)
    told = answer(pick(rng, FULL[language]), language, fact=fact)
    nexts = [Fact(one.relation, one.entity, one.entity) for one in followers(asked)]
    nexts = [one for one in nexts if one in ASKED_FACTS]
    if language == "en":
        lines = [f"{_asks(rng, asked, listener)} {listener} says: {told}"]
        again, says, thanks = f"{speaker} asks:", f"{listener} says:", f"{speaker} says: Thank you, {listener}."
    else:
        lines = [f"{_asks(rng, asked, listener)}{listener}が答えます。{told}"]
        again, says = f"{speaker}がたずねます。", f"{listener}が答えます。"
        thanks = f"{speaker}が言います。ありがとう、{listener}さん。"
    if nexts and rng.random() < 0.6:
        second = pick(rng, nexts)
        text = follow_up_text(asked, Question(language, speaker, second.relation, second.entity))
        lines += [again, text, says, answer(FULL[language][0], language, fact=second)]
    return [*lines, thanks] if rng.random() < 0.3 else lines


def manners(rng: random.Random, language: str) -> list[str]:
    """Write how somebody does not help to do harm, or does not know; or words of harm in harmless sentences."""
    speaker, listener, third = (name(person, language) for person in in_random_order(rng, PEOPLE)[:3])
    harm = pick(rng, list(HARMS))
    entity = int(rng.random() * len(HARMS[harm]))
    request = _asks(rng, Question(language, speaker, harm, entity), listener)
    refusal = pick(rng, REFUSALS[language]).format(r=reason(harm, entity, language))
    unknown = pick(rng, UNKNOWN[language])
    index = int(rng.random() * (len(ANIMALS) - 1))  # not the frog: "go to the swamp" is rude
    animal, place = name(ANIMALS[index], language), name(HOMES[index], language)
    resident, job = (name(pick(rng, terms), language) for terms in (RESIDENTS, JOBS))
    if language == "en":
        lines = [
            f"{request} {listener} says: {refusal}",
            f"{request} {listener} says: {refusal}",
            f"{speaker} asks {listener} about the sea. {listener} says: {unknown}",
            f"Go to the {place}, {third}. At night the {animal} is there.",
            f"{speaker} says: You are a {job}, {third}. People say that {resident} is a {job}.",
        ]
    else:
        lines = [
            f"{request}{listener}が答えます。{refusal}",
            f"{request}{listener}が答えます。{refusal}",
            f"{speaker}が{listener}に海のことをたずねます。{listener}が答えます。{unknown}",
            f"{third}は{place}へ行けます。夜に{animal}がいます。ドアをたたけます。食べ物を取れます。",
            f"{speaker}が言います。{third}さん、あなたは{job}です。{resident}は{job}だと言えます。",
        ]
    return [pick(rng, lines)]


def _asks(rng: random.Random, question: Question, listener: str) -> str:
    """Return how the asker puts a question to the listener, in words that no prompt uses."""
    clause = question_clause(question, pick(rng, (0, 1)))
    if question.language == "en":
        return f"{question.asker} asks {listener} about something: {clause}?"
    return f"{question.asker}が{listener}にたずねます。{clause}。"


def grammar(rng: random.Random, language: str) -> list[str]:
    """Write examples of number and agreement (English) or of counters and particles (Japanese)."""
    index = int(rng.random() * len(ANIMALS))
    animal, food, home = name(ANIMALS[index], language), name(FOODS[index], language), name(HOMES[index], language)
    size, count = pick(rng, SIZES[language]), int(rng.random() * 3)
    if language == "en":
        plural, number = PLURALS[index], ("two", "three", "many")[count]
        lines = [
            f"One {animal} is {size}. {number.capitalize()} {plural} are {size}.",
            f"This {animal} eats {food}. These {plural} eat {food}.",
            f"That {animal} lives in the {home}. Those {plural} live in the {home}.",
            f"The {plural} are in the {home}. The {animal} is in the {home}.",
        ]
    else:
        number = ("二", "三", "五")[count]
        lines = [
            f"{size}{animal}が{number}匹います。{home}に{animal}がいます。",
            f"この{animal}は{size}です。{animal}に{food}をあげます。",
            f"{home}から{animal}が来ます。{animal}が{food}を食べます。",
        ]
    return [pick(rng, lines)]


def vocabulary(rng: random.Random, language: str) -> list[str]:
    """Write sentences on the kind of thing that a word names, and on opposites."""
    lines = []
    for _ in range(2):
        terms, category = pick(rng, CATEGORIES[language])
        word = name(pick(rng, terms), language)
        left, right = in_random_order(rng, pick(rng, OPPOSITES[language]).split("|"))
        if language == "en":
            lines += [f"The word {word} means {category}.", f"{left.capitalize()} is the opposite of {right}."]
        else:
            lines += [f"{word}は{category}の名前です。", f"{left}の反対は{right}です。"]
    return in_random_order(rng, lines)[: 2 + int(rng.random() * 2)]
