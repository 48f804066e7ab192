"""Prompts with constraints: the same for a seed, of kinds that fit together, in a form that IFEval's checkers read."""

import itertools
import json
import random
import string
from collections import Counter

import pytest
from helpers.scripts import run_script

from sandan.constraints.kinds import KINDS, contradict
from sandan.constraints.prompts import constraint_prompts, instructions_of, split_instructions


INSTRUCTIONS = [f"Describe the {thing} of a small garden" for thing in ("smell", "history", "purpose", "colours")]


def test_prompts_are_the_same_for_a_seed_and_others_for_another():
    assert constraint_prompts(INSTRUCTIONS, 5, seed=3) == constraint_prompts(INSTRUCTIONS, 5, seed=3)
    assert constraint_prompts(INSTRUCTIONS, 5, seed=3) != constraint_prompts(INSTRUCTIONS, 5, seed=4)


def test_a_prompt_says_its_instruction_and_all_of_its_constraints():
    rows = constraint_prompts(INSTRUCTIONS, 100, seed=0)
    by_id = {kind.instruction_id: kind for kind in KINDS}
    counts = Counter(len(row["instruction_id_list"]) for row in rows)
    assert set(counts) == {1, 2, 3} and min(counts.values()) > 40
    assert {name for row in rows for name in row["instruction_id_list"]} == set(by_id)
    for row in rows:
        (turn,) = row["prompt"]
        assert turn["role"] == "user" and any(turn["content"].startswith(f"{text}.") for text in INSTRUCTIONS)
        for name, kwargs in zip(row["instruction_id_list"], row["kwargs"], strict=True):
            shown = {key: ", ".join(value) if isinstance(value, list) else value for key, value in kwargs.items()}
            assert any(wording.format(**shown) in turn["content"] for wording in by_id[name].wordings)
        kinds = [by_id[name] for name in row["instruction_id_list"]]
        assert not any(contradict(*pair) for pair in itertools.combinations(kinds, 2))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.instruction_id)
def test_the_wordings_of_a_kind_name_all_that_its_checker_reads(kind):
    kwargs = kind.draw(random.Random(0), INSTRUCTIONS[0])
    named = {"prompt_to_repeat"} | {
        name for wording in kind.wordings[:1] for _, name, _, _ in string.Formatter().parse(wording) if name
    }
    assert set(kwargs) <= named
    assert contradict(kind, kind), "never twice in a prompt"


def test_instructions_are_the_first_user_turns_without_long_and_repeated_ones():
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Say hi"}]
    rows = [{"prompt": "Say hi"}, {"messages": turns}, {"prompt": "one " * 50}, {"prompt": "Say bye"}]
    assert instructions_of(rows, max_words=10) == ["Say hi", "Say bye"]


def test_no_instruction_is_on_both_sides():
    texts = [f"Write about number {number}" for number in range(500)]
    train, held_out = split_instructions(texts, 0.2)
    assert not set(train) & set(held_out) and len(train) + len(held_out) == 500
    assert 70 < len(held_out) < 130


@pytest.mark.slow
def test_the_stage_writes_prompts_and_takes_ifeval_as_it_is(tmp_path):
    own = [{"prompt": f"Write about number {number}"} for number in range(60)]
    ifeval = {
        "key": 1000,
        "prompt": "Say hi. Do not use commas.",
        "instruction_id_list": ["punctuation:no_comma", "keywords:frequency"],
        "kwargs": [{}, {"relation": "at least", "keyword": "hi", "frequency": 2}],
    }
    for name, rows in (("own", own), ("ifeval", [ifeval]), ("plain", [{"prompt": "No columns"}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["constraints", "--data_files", "own.jsonl", "--instruction_share", "0.2", "--output_dir"]
    done = run_script(*command, "out/constraints", "--eval_data_files", "ifeval.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = {name: (tmp_path / "out/constraints" / f"prompts_{name}.jsonl").read_text() for name in ("train", "eval")}
    train, judged = ([json.loads(line) for line in text.splitlines()] for text in files.values())
    assert all({"prompt", "instruction_id_list", "kwargs"} == set(row) for row in train)
    assert Counter(row["group"] for row in judged).keys() == {"seen kinds", "ifeval"}
    assert judged[-1] == {
        "prompt": [{"role": "user", "content": ifeval["prompt"]}],
        "instruction_id_list": ifeval["instruction_id_list"],
        "kwargs": ifeval["kwargs"],
        "group": "ifeval",
    }
    refused = run_script(*command, "out/other", "--eval_data_files", "plain.jsonl", cwd=tmp_path)
    assert refused.returncode == 2 and "instruction_id_list" in refused.stderr
    assert refused.stderr.strip().count("\n") == 0 or "error:" in refused.stderr.splitlines()[-1]
