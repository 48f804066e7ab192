"""The rules of a collapse, and the figures that they read."""

import math

import pytest

from sandan.ppo.collapse import answer_figures, commonest, distinct_share, verdicts


HEALTHY = {
    "response_tokens": 20.0,
    "distinct_2": 0.5,
    "commonest_share": 0.01,
    "repeated_share": 0.02,
    "entropy_per_token": 1.0,
}


def test_figures_of_answers_equal_the_definitions():
    assert distinct_share([[1, 2, 3], [1, 2], [4]]) == pytest.approx(2 / 3)  # (1, 2), (2, 3), (1, 2)
    assert distinct_share([[5], []]) == 0.0
    assert commonest(["a", "b", "b", "c"], ["no", "no", "no", "yes"]) == ("no", pytest.approx(2 / 3))
    figures = answer_figures("abcd", [[7, 9]] * 4)
    assert figures == {"distinct_2": 0.25, "commonest_share": 1.0, "repeated_share": 0.0}
    assert answer_figures("ab", [[7, 7, 7, 7, 7, 7], [1, 2, 3, 4]])["repeated_share"] == pytest.approx(0.375)


def test_one_answer_to_one_prompt_is_knowledge_and_one_to_all_is_a_collapse():
    known = answer_figures(["a"] * 8 + ["b"] * 8, [[1, 2, 3]] * 8 + [[4, 5, 6]] * 8)
    assert known["distinct_2"] == 1.0 and known["commonest_share"] == 0.5
    same = answer_figures(["a"] * 8 + ["b"] * 8, [[1, 2, 3]] * 16)
    assert same["distinct_2"] == 0.5 and same["commonest_share"] == 1.0


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({}, []),
        ({"response_tokens": 10.0, "distinct_2": 0.21, "repeated_share": 0.3, "entropy_per_token": 0.1}, []),
        ({"response_tokens": 9.9}, ["length"]),
        ({"response_tokens": 40.1}, ["length"]),
        ({"distinct_2": 0.19}, ["variety"]),
        ({"commonest_share": 0.22}, ["sameness"]),
        ({"repeated_share": 0.33}, ["repetition"]),
        ({"entropy_per_token": 0.09}, ["entropy"]),
        ({"entropy_per_token": math.nan}, ["entropy"]),
        ({"kl": 5.1}, ["kl_budget"]),
        ({"kl": math.nan}, ["kl_budget"]),
        ({"kl": 4.9}, []),
    ],
)
def test_each_rule_has_its_limits(changes, kinds):
    found = verdicts(HEALTHY, HEALTHY | changes, max_kl_nats=5.0)
    assert [verdict.rule.kind for verdict in found if verdict.collapsed] == kinds


def test_rules_without_their_figures_say_nothing():
    assert verdicts({}, HEALTHY) == []
    assert [verdict.rule.kind for verdict in verdicts({"response_tokens": 21.0}, HEALTHY)] == ["length"]
    (verdict,) = verdicts({"response_tokens": 21.0}, {"response_tokens": 2.0, "kl": 9.0})
    assert verdict.text == "mean answer length in tokens: 21 → 2 (at least 10.5, at most 42)"
