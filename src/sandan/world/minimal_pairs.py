"""Minimal pairs: two texts that differ in one point and of which one is right; does a model find that one more likely?

There are pairs for four skills that pretraining should teach: *grammar*, *vocabulary*, *common sense* (facts) and
*context* (reference to earlier sentences). All texts are new: none is a pretraining document.
"""

import random
from collections.abc import Callable

from .dice import in_random_order, pick
from .documents import CATEGORIES, GREETINGS, SIZES
from .facts import ANIMALS, FACTS, FOODS, HOMES, PEOPLE, PLURALS, RELATIONS, SOUNDS, Fact
from .language import LANGUAGES, STATEMENTS, fill, name, sentence


PAIRS_PER_SKILL = 60  # in each language

Pair = tuple[str, str]


def minimal_pairs(rng: random.Random, seen_texts: set[str]) -> list[dict[str, str]]:
    """Make rows `{skill, language, good, bad}` whose texts are not in `seen_texts`."""
    rows = []
    skills: dict[str, Callable[[random.Random, str], Pair]] = {
        "grammar": _grammar,
        "vocabulary": _vocabulary,
        "common_sense": _common_sense,
        "context": _context,
    }
    for skill, make in skills.items():
        for language in LANGUAGES:
            pairs: dict[Pair, None] = {}
            while len(pairs) < PAIRS_PER_SKILL:
                pair = make(rng, language)
                if not seen_texts & set(pair):
                    pairs[pair] = None
            rows += [{"skill": skill, "language": language, "good": good, "bad": bad} for good, bad in pairs]
    return rows


def _grammar(rng: random.Random, language: str) -> Pair:
    index = int(rng.random() * len(ANIMALS))
    animal, food, home = name(ANIMALS[index], language), name(FOODS[index], language), name(HOMES[index], language)
    size = pick(rng, SIZES[language])
    if language == "en":
        plural = PLURALS[index]
        return pick(
            rng,
            [
                (f"This {animal} eats {food}.", f"This {animal} eat {food}."),
                (f"These {plural} are {size}.", f"These {plural} is {size}."),
                (f"Those {plural} live in the {home}.", f"Those {plural} lives in the {home}."),
                (f"That {animal} is in the {home}.", f"That {animal} are in the {home}."),
                (f"Many {plural} are {size}.", f"Many {animal} are {size}."),
            ],
        )
    return pick(
        rng,
        [
            (f"この{animal}は{size}です。", f"この{animal}を{size}です。"),
            (f"{home}に{animal}がいます。", f"{home}を{animal}がいます。"),
            (f"{animal}に{food}をあげます。", f"{animal}に{food}があげます。"),
            (f"{home}から{animal}が来ます。", f"{home}から{animal}を来ます。"),
            (f"{size}{animal}が{food}を食べます。", f"{size}{animal}が{food}に食べます。"),
        ],
    )


def _vocabulary(rng: random.Random, language: str) -> Pair:
    (terms, right), (_, wrong) = in_random_order(rng, CATEGORIES[language])[:2]
    word = name(pick(rng, terms), language)
    if language == "en":
        return f"The word {word} means {right}.", f"The word {word} means {wrong}."
    return f"{word}は{right}の名前です。", f"{word}は{wrong}の名前です。"


def _common_sense(rng: random.Random, language: str) -> Pair:
    fact = pick(rng, FACTS)
    others = [value for value in range(len(RELATIONS[fact.relation][1])) if value != fact.value]
    form = pick(rng, STATEMENTS[language][fact.relation])
    good, bad = (
        fill(form, Fact(fact.relation, fact.entity, value), language) for value in (fact.value, pick(rng, others))
    )
    return sentence(good, language), sentence(bad, language)


def _context(rng: random.Random, language: str) -> Pair:
    first, second, third = in_random_order(rng, range(len(PEOPLE)))[:3]
    animal, other = (in_random_order(rng, range(len(ANIMALS))))[:2]
    one, two, three = (name(PEOPLE[index], language) for index in (first, second, third))
    seen, unseen = name(ANIMALS[animal], language), name(ANIMALS[other], language)
    place, sound = name(HOMES[animal], language), name(SOUNDS[animal], language)
    words = pick(rng, GREETINGS[language])
    if language == "en":
        pronouns = ("She", "He") if first % 2 == 0 else ("He", "She")
        opening = f"{one} goes to the {place}. "
        return pick(
            rng,
            [
                tuple(f"{one} says: {words}, {two}. {two} says: {words}, {back}." for back in (one, three)),
                tuple(f"{opening}{pronoun} sees the {seen}." for pronoun in pronouns),
                tuple(f"{opening}There is a {seen}. The {subject} says {sound}." for subject in (seen, unseen)),
            ],
        )
    pronouns = ("彼女", "彼") if first % 2 == 0 else ("彼", "彼女")
    opening = f"{one}は{place}へ行きます。"
    return pick(
        rng,
        [
            tuple(
                f"{one}が言います。{words}、{two}さん。{two}が言います。{words}、{back}さん。" for back in (one, three)
            ),
            tuple(f"{opening}{pronoun}は{seen}を見ます。" for pronoun in pronouns),
            tuple(f"{opening}{seen}がいます。{subject}は{sound}と鳴きます。" for subject in (seen, unseen)),
        ],
    )
