"""Constraints are checked as IFEval checks them: a right and a wrong answer of every kind, and the reward functions."""

import builtins
import importlib
import sys

import pytest
from helpers.tiny_ppo import make_policy, make_tokenizer

from sandan.core.errors import UserError
from sandan.evaluate.comparison import EvaluateArguments, compare


def test_without_lm_eval_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **named):
        if name.startswith("lm_eval"):
            raise ImportError("No module named 'lm_eval'")
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, "sandan.constraints.checks", raising=False)
    with pytest.raises(UserError, match=r"^constraints: .*pip install 'sandan\[eval\]'$"):
        importlib.import_module("sandan.constraints.checks")


# A right and a wrong answer of each kind that prompts are made of.
ANSWERS = [
    ("punctuation:no_comma", {}, "no commas here", "one, two"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "one two three", "one two"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "one two", "one two three"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one\n***\ntwo", "one\n\ntwo"),
    ("keywords:existence", {"keywords": ["reason"]}, "For this reason.", "For this."),
    ("keywords:frequency", {"keyword": "sea", "frequency": 2, "relation": "at least"}, "sea, sea", "sea"),
    ("keywords:forbidden_words", {"forbidden_words": ["sea"]}, "the ocean", "the sea"),
    ("keywords:letter_frequency", {"letter": "e", "let_frequency": 3, "let_relation": "at least"}, "eee", "ee"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one* and *two*", "*one*"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n* two", "* one"),
    ("detectable_format:title", {}, "<<a title>> text", "a title"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Part", "num_sections": 2},
        "Part 1 one Part 2 two",
        "Part 1",
    ),
    ("detectable_format:json_format", {}, '{"answer": 1}', "answer: 1"),
    ("detectable_content:number_placeholders", {"num_placeholders": 1}, "Dear [name]", "Dear you"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP.S. And hi.", "Bye."),
    ("startend:end_checker", {"end_phrase": "The end."}, "So it was. The end.", "The end. Or not."),
    ("startend:quotation", {}, '"all of it"', 'some "of it"'),
    ("change_case:english_capital", {}, "THIS IS A LOUD AND CLEAR ANSWER TO THE QUESTION", "This is not loud"),
    ("change_case:english_lowercase", {}, "this is a quiet answer to the question of the day", "This is not"),
    ("combination:two_responses", {}, "one way ****** another way", "only one way"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi"}, "Say hi\nHi!", "Hi!"),
]


@pytest.fixture
def checks():
    pytest.importorskip("langdetect", reason="extra eval")
    pytest.importorskip("lm_eval", reason="extra eval")
    return importlib.import_module("sandan.constraints.checks")


@pytest.mark.parametrize(("name", "kwargs", "right", "wrong"), ANSWERS)
def test_a_right_answer_is_told_from_a_wrong_one(checks, name, kwargs, right, wrong):
    assert checks.followed(right, [name], [kwargs]) == [True]
    assert checks.followed(wrong, [name], [kwargs]) == [False]
    assert checks.followed("  ", [name], [kwargs]) == [False], "an empty answer follows nothing"


def test_every_kind_of_the_prompts_has_answers_above():
    from sandan.constraints.kinds import KINDS

    assert {kind.instruction_id for kind in KINDS} == {name for name, *_ in ANSWERS}


def test_rewards_are_the_share_that_is_followed_and_whether_it_is_all(checks):
    names = [["punctuation:no_comma", "detectable_format:title"]] * 3
    kwargs = [[{}, {}]] * 3
    answers = ["<<good>> yes", "no title", "neither, nor"]
    assert checks.share_followed(answers, names, kwargs) == [1.0, 0.5, 0.0]
    assert checks.all_followed(answers, names, kwargs) == [1.0, 0.0, 0.0]


def test_columns_with_nulls_as_arrow_writes_them_are_read(checks):
    kwargs = [{"num_words": None, "keywords": None}, {"num_words": 2, "relation": "at least", "keywords": None}]
    names = ["punctuation:no_comma", "length_constraints:number_words"]
    assert checks.followed("two words", names, kwargs) == [True, True]
    assert checks.long_enough(["two words"], [kwargs]) == [2 / checks.ENOUGH_WORDS - 1]


def test_a_short_answer_costs_unless_the_prompt_asks_for_one(checks):
    few = [{"num_words": 4, "relation": "less than"}]
    assert checks.long_enough(["", "No", "one two", "word " * 50], [[{}], [{}], few, [{}]]) == [
        -1.0,
        1 / checks.ENOUGH_WORDS - 1,
        0.0,
        0.0,
    ]


def test_a_constraint_that_the_checkers_do_not_know_is_one_line(checks):
    with pytest.raises(UserError, match=r"^constraints: no:such \{\}: KeyError"):
        checks.followed("text", ["no:such"], [{}])


def test_the_strict_scores_of_each_group_have_intervals(checks):
    names = ["punctuation:no_comma", "detectable_format:title"]
    rows = [{"instruction_id_list": names, "kwargs": [{}, {}], "group": group} for group in "aaab"]
    figures = checks.strict_figures(rows, ["<<x>>", "plain", "one, two", "<<x>>"])
    assert figures["constraints/a/prompt_strict"] == pytest.approx(1 / 3)
    assert figures["constraints/a/instruction_strict"] == pytest.approx(3 / 6)
    assert figures["constraints/b/prompt_strict"] == figures["constraints/b/prompt_strict_low"] == 1
    assert (
        0 <= figures["constraints/a/instruction_strict_low"] < 0.5 < figures["constraints/a/instruction_strict_high"]
    )


def test_a_comparison_without_a_base_model_has_the_strict_scores_of_each_group(checks):
    rows = [
        {
            "prompt": f"w{number} w{number + 1}",
            "instruction_id_list": ["punctuation:no_comma"],
            "kwargs": [{}],
            "group": ("seen kinds", "ifeval")[number % 2],
        }
        for number in range(6)
    ]
    models = {"sft": make_policy(), "ppo": make_policy()}
    args = EvaluateArguments("out", "sft", "ppo", max_new_tokens=6, batch_size=4)
    (sft, ppo), _ = compare(models, make_tokenizer(), rows, args)
    assert sft["constraints/seen kinds/prompt_strict"] == ppo["constraints/ifeval/instruction_strict"] == 1
