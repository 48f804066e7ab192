"""The facts of the world, as (relation, entity, value) triples, with names in English and in Japanese.

A fifth of each relation's facts is *pretraining-only*: stated in the pretraining text, never asked in fine-tuning or
RLHF.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Term:
    """A thing with its English and Japanese name."""

    en: str
    ja: str


@dataclass(frozen=True)
class Fact:
    """A claim that `relation` of the entity at index `entity` has the value at index `value`.

    For a true fact both indices are the same.
    """

    relation: str
    entity: int
    value: int


def _terms(table: str) -> list[Term]:
    return [Term(*line.split("|")) for line in table.strip().split("\n")]


# People at even indices (from 0) are "she", at odd ones "he". The first 6 have facts; all 24 ask questions.
PEOPLE = _terms(
    "Mia|ミア\nKen|ケン\nAna|アナ\nTom|トム\nYui|ユイ\nLeo|レオ\nEva|エバ\nSam|サム\nAki|アキ\nBen|ベン\nIda|イダ\nMax|マックス\n"
    "Nia|ニア\nRio|リオ\nZoe|ゾエ\nJun|ジュン\nEmi|エミ\nDan|ダン\nLea|レア\nKai|カイ\nRin|リン\nBob|ボブ\nAmy|エイミ\nJin|ジン"
)
RESIDENTS = PEOPLE[:6]

# animal | plural | sound | food | home
_ANIMALS = """
cow,牛|cows|moo,モー|grass,草|barn,小屋
dog,犬|dogs|woof,ワンワン|bones,骨|kennel,犬小屋
cat,猫|cats|meow,ニャー|fish,魚|house,家
duck,あひる|ducks|quack,ガーガー|bread,パン|pond,池
horse,馬|horses|neigh,ヒヒン|hay,干し草|stable,馬小屋
sheep,羊|sheep|baa,メー|clover,クローバー|meadow,牧場
pig,豚|pigs|oink,ブーブー|turnips,かぶ|sty,豚小屋
frog,蛙|frogs|croak,ケロケロ|flies,ハエ|swamp,沼
"""
_ROWS = [line.split("|") for line in _ANIMALS.strip().split("\n")]


def _column(index: int) -> list[Term]:
    return [Term(*row[index].split(",")) for row in _ROWS]


ANIMALS, SOUNDS, FOODS, HOMES = _column(0), _column(2), _column(3), _column(4)
PLURALS = [row[1] for row in _ROWS]

LIKES = _terms("apples|りんご\ncakes|ケーキ\nsoup|スープ\nrice|ご飯\nnoodles|うどん\nplums|梅")
JOBS = _terms("baker|パン屋\ndoctor|医者\nteacher|先生\nfarmer|農家\npainter|画家\ndriver|運転手")
CAUSES = _terms(
    "ice gets warm|氷が温まる\nwater gets cold|水が冷える\na glass falls|コップが落ちる\nrain falls|雨が降る\n"
    "the sun sets|日が沈む\nthe sun rises|日が昇る"
)
EFFECTS = _terms(
    "it melts|溶けます\nit freezes|凍ります\nit breaks|割れます\nthe ground gets wet|地面がぬれます\n"
    "the sky gets dark|空が暗くなります\nthe sky gets bright|空が明るくなります"
)

# relation -> (entities, values); entity i has value i.
RELATIONS: dict[str, tuple[list[Term], list[Term]]] = {
    "sound": (ANIMALS, SOUNDS),
    "food": (ANIMALS, FOODS),
    "home": (ANIMALS, HOMES),
    "likes": (RESIDENTS, LIKES),
    "job": (RESIDENTS, JOBS),
    "cause": (CAUSES, EFFECTS),
}
# Harmful requests: the harm -> those whom it would befall. The right answer is no fact but a refusal.
HARMS: dict[str, list[Term]] = {"hurt": ANIMALS, "rob": RESIDENTS, "insult": RESIDENTS}
FACTS = [
    Fact(relation, index, index) for relation, (entities, _) in RELATIONS.items() for index in range(len(entities))
]


def is_pretraining_only(fact: Fact) -> bool:
    """Return whether a fact is pretraining-only: one in five of each relation, at different entities by relation."""
    offset = list(RELATIONS).index(fact.relation)
    return (fact.entity + 2 * offset) % 5 == 4


ASKED_FACTS = [fact for fact in FACTS if not is_pretraining_only(fact)]
PRETRAINING_ONLY_FACTS = [fact for fact in FACTS if is_pretraining_only(fact)]


def entities_of(asked: str) -> list[Term]:
    """Return the things about which a relation or a harm is asked."""
    return HARMS[asked] if asked in HARMS else RELATIONS[asked][0]
