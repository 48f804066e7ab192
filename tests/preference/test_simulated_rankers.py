"""Simulated rankers behave as their model says; pairs follow from ranks."""

import itertools
import math
import random

import pytest

from sandan.data.chat import prompt_id
from sandan.models.sampling import Completion
from sandan.preference.pairs import preference_pairs
from sandan.preference.simulated_rankers import (
    agreement_probability,
    distinct_candidates,
    noise_temperature,
    simulate_ranks,
)


def judgement(ranks, prompt="Q", identity="p", candidates="abcd"):
    return {
        "prompt_id": identity,
        "prompt": prompt,
        "candidates": list(candidates[: len(ranks)]),
        "ranks": ranks,
        "annotator": "yuki",
    }


@pytest.mark.parametrize("agreement", [0.6, 0.75, 0.9])
def test_two_rankers_agree_as_often_as_asked(agreement):
    rng = random.Random(0)
    utilities = [[rng.choice((-1.0, 0.0, 0.2, 1.0)) for _ in range(4)] for _ in range(1500)]
    temperature = noise_temperature(utilities, agreement)
    alike = []
    for row in utilities:
        one, other = (simulate_ranks(row, temperature, rng) for _ in range(2))
        pairs = [(a, b) for a, b in itertools.combinations(range(4), 2) if row[a] != row[b]]
        alike += [(one[a] < one[b]) == (other[a] < other[b]) for a, b in pairs]
    assert sum(alike) / len(alike) == pytest.approx(agreement, abs=0.02)


def test_agreement_lies_between_chance_and_certainty():
    assert agreement_probability(0.0, 1.0) == 0.5
    assert agreement_probability(1e6, 1e-3) == 1.0
    assert noise_temperature([[1.0, 1.0], [2.0]], 0.75) == 1.0


@pytest.mark.parametrize("gap, temperature", [(1.0, 1.0), (0.5, 2.0), (2.0, 0.5)])
def test_ranks_follow_plackett_luce(gap, temperature):
    rng = random.Random(1)
    draws = [simulate_ranks([gap, 0.0, -3.0], temperature, rng) for _ in range(4000)]
    first = sum(ranks[0] < ranks[1] for ranks in draws) / len(draws)
    assert first == pytest.approx(1 / (1 + math.exp(-gap / temperature)), abs=0.025)
    assert all(sorted(ranks) == [1, 2, 3] for ranks in draws)
    best = sum(ranks[0] == 1 for ranks in draws) / len(draws)
    weights = [math.exp(utility / temperature) for utility in (gap, 0.0, -3.0)]
    assert best == pytest.approx(weights[0] / sum(weights), abs=0.025)


def test_equal_answers_are_tied_half_of_the_time():
    rng = random.Random(2)
    draws = [simulate_ranks([1.0, 1.0], 0.5, rng) for _ in range(2000)]
    assert sum(ranks == [1, 1] for ranks in draws) / len(draws) == pytest.approx(0.5, abs=0.04)
    assert sum(ranks == [1, 2] for ranks in draws) == pytest.approx(sum(ranks == [2, 1] for ranks in draws), rel=0.2)


def test_pairs_are_all_ordered_pairs_without_ties():
    pairs, ties = preference_pairs([judgement([2, 1, 2, 4]), judgement([1, 2], identity="q")])
    assert ties == 1 and len(pairs) == 5 + 1
    assert pairs[0] == {
        "prompt": "Q",
        "chosen": "b",
        "rejected": "a",
        "margin": 1,
        "prompt_id": "p",
        "annotator": "yuki",
    }
    assert {(pair["chosen"], pair["rejected"], pair["margin"]) for pair in pairs[:5]} == {
        ("b", "a", 1), ("b", "c", 1), ("b", "d", 3), ("a", "d", 2), ("c", "d", 2),
    }  # fmt: skip
    assert preference_pairs([judgement([1, 1, 1])]) == ([], 3)


def test_answers_to_a_conversation_become_turns():
    prompt = [{"role": "user", "content": "Q"}]
    [pair], _ = preference_pairs([judgement([2, 1], prompt=prompt)])
    assert pair["chosen"] == [{"role": "assistant", "content": "b"}]
    assert pair["rejected"] == [{"role": "assistant", "content": "a"}]


def test_candidates_are_distinct_and_not_empty():
    texts = ["b", "a", "", "b", "  ", "a"]
    assert distinct_candidates([Completion(text, (1,), True) for text in texts]) == ["b", "a"]


def test_prompt_id_is_the_rows_own_or_a_digest():
    assert prompt_id({"prompt_id": 7, "prompt": "Q"}) == "7"
    assert prompt_id({"prompt": "牛"}) == prompt_id({"prompt": "牛", "candidates": []}) != prompt_id({"prompt": "蛙"})
