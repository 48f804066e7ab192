"""A row has one form: dialogues, whole conversations and mixed columns become prompt and answer."""

import json

import pytest

from sandan.core.errors import UserError
from sandan.core.stage import Stage
from sandan.data.chat import first_user_text, to_turns
from sandan.data.forms import one_form
from sandan.data.jsonl import write_jsonl
from sandan.data.loading import DataArguments, load_data


PAIRS = [("prompt", "chosen", "rejected"), ("chosen", "rejected")]
ANSWERS = [("prompt", "completion"), ("messages",), ("text",)]
START = "\n\nHuman: What does the cow eat?\n\nAssistant: Grass.\n\nHuman: Where does it live?\n\nAssistant:"


def user(text="Q"):
    return {"role": "user", "content": text}


def assistant(text="A"):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [user("What does the cow eat?"), assistant("Grass."), user("Where does it live?")]
PAIR = {"chosen": f"{START} On a farm.", "rejected": f"{START} I will not say."}
SPLIT = {"prompt": TURNS, "chosen": [assistant("On a farm.")], "rejected": [assistant("I will not say.")]}


@pytest.mark.parametrize(
    "prompt", [{}, {"prompt": START}, {"prompt": START.strip()}, {"prompt": TURNS}, {"prompt": ""}]
)
@pytest.mark.parametrize("strip", [False, True])
def test_dialogues_are_split_into_prompt_and_answer(prompt, strip):
    pair = {name: text.strip() if strip else text for name, text in PAIR.items()}
    assert one_form(pair | prompt, as_chat=True) == SPLIT


def test_dialogues_with_a_prompt_and_answers_of_text():
    row = {"prompt": START, "chosen": " On a farm.", "rejected": " I will not say."}
    assert one_form(row, as_chat=True) == SPLIT
    assert one_form(row) == row


@pytest.mark.parametrize("prompt", [{}, {"prompt": START}])
def test_dialogues_as_text_are_split_where_the_answer_begins(prompt):
    row = one_form(PAIR | prompt)
    assert row == {"prompt": START, "chosen": " On a farm.", "rejected": " I will not say."}
    assert row["prompt"] + row["chosen"] == PAIR["chosen"]


def test_a_dialogue_of_one_question():
    pair = {name: f"\n\nHuman: Q\n\nAssistant: {name}" for name in ("chosen", "rejected")}
    assert one_form(pair)["prompt"] == "\n\nHuman: Q\n\nAssistant:"
    assert one_form(pair, as_chat=True)["prompt"] == [user()]


def test_dialogues_for_fine_tuning():
    whole = PAIR["chosen"]
    answer = [assistant("On a farm.")]
    assert one_form({"prompt": START, "completion": whole}, as_chat=True) == {"prompt": TURNS, "completion": answer}
    assert one_form({"text": whole}, as_chat=True) == {"messages": [*TURNS, *answer]}
    assert one_form({"text": whole}) == {"text": whole}


@pytest.mark.parametrize("system", [[], [SYSTEM]])
@pytest.mark.parametrize("prompt", ["Q", " Q\n", [user()], [SYSTEM, user()], None])
def test_conversations_that_repeat_the_prompt_do_not_double_it(system, prompt):
    row = {
        "prompt": prompt,
        "chosen": [*system, user(), assistant("1")],
        "rejected": [*system, user(), assistant("2")],
    }
    kept = [SYSTEM] if system or (isinstance(prompt, list) and len(prompt) == 2) else []
    expected = {"prompt": [*kept, user()], "chosen": [assistant("1")], "rejected": [assistant("2")]}
    assert one_form(row) == expected == one_form(row, as_chat=True)


def test_conversations_that_part_before_the_last_turn_keep_what_differs():
    row = {
        "chosen": [user(), assistant("1"), user("2"), assistant("3")],
        "rejected": [user(), assistant("x"), user("2"), assistant("3")],
    }
    assert one_form(row)["prompt"] == [user()] and len(one_form(row)["chosen"]) == 3


def test_conversations_of_another_prompt_are_left_for_the_checks():
    row = {"prompt": "P", "chosen": [user(), assistant("1")], "rejected": [user(), assistant("2")]}
    assert one_form(row)["chosen"] == row["chosen"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user()], "chosen": "1", "rejected": "2"},
        {"prompt": "Q", "chosen": [assistant("1")], "rejected": [assistant("2")]},
        {"prompt": "Q", "chosen": [assistant("1")], "rejected": "2"},
        {"prompt": [user()], "chosen": "1", "rejected": [assistant("2")]},
        {"prompt": "Q", "chosen": [user(), assistant("1")], "rejected": "2"},
    ],
)
def test_mixed_columns_become_turns(row):
    assert one_form(row) == {"prompt": [user()], "chosen": [assistant("1")], "rejected": [assistant("2")]}


@pytest.mark.parametrize("kind", ["prompt", "messages", "chosen", "text"])
def test_rows_of_one_user_turn_stay_on_one_side(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = []
    for number in range(120):
        start, answer = [SYSTEM, user(f"Q{number % 40}")], assistant(f"A{number}")
        rows.append(
            {
                "prompt": {"prompt": start, "completion": [answer]},
                "messages": {"messages": [*start, answer]},
                "chosen": {"chosen": [*start, answer], "rejected": [*start, assistant("no")]},
                "text": {"prompt": f"\n\nHuman: Q{number % 40}\n\nAssistant: x\n\nHuman: {number}", "completion": "A"},
            }[kind]
        )
    write_jsonl("a.jsonl", rows)
    arguments = DataArguments(data_files=["a.jsonl"], held_out_share=0.3)
    train, held_out = load_data(arguments, Stage("sft", "t", tmp_path / "out", 0, {}), [*ANSWERS, *PAIRS])
    sides = [set(map(first_user_text, side)) for side in (train, held_out)]
    assert not sides[0] & sides[1] and sides[0] | sides[1] == {f"Q{number}" for number in range(40)}
    assert 0.1 < len(held_out) / 120 < 0.5


def test_text_that_only_mentions_a_speaker_is_no_dialogue():
    for text in ("Human: hello", "The Human: a study", "a\n\nAssistant: b"):
        assert to_turns(text) == [user(text)]


def test_rows_whose_columns_mix_forms_differently_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "Q", "completion": "A"}, {"prompt": [user("R")], "completion": "B"}]
    write_jsonl("a.jsonl", rows)
    stage = Stage("sft", "t", tmp_path / "out", 0, {})
    with pytest.raises(UserError, match="a.jsonl:2: prompt: list, but str in the rows before"):
        load_data(DataArguments(data_files=["a.jsonl"]), stage, ANSWERS)
    train, _ = load_data(DataArguments(data_files=["a.jsonl"], as_chat=True), stage, ANSWERS)
    assert json.dumps(train["prompt"][:]) == json.dumps([[user()], [user("R")]])
