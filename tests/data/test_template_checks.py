"""A chat template that refuses a row, or leaves a part of it out, is known before anything runs, with the row's place."""

import pytest

from sandan.core.errors import UserError
from sandan.core.stage import Stage
from sandan.data.jsonl import write_jsonl
from sandan.data.loading import DataArguments, load_data


ANSWERS = [("prompt", "completion"), ("messages",), ("text",)]
PAIRS = [("prompt", "chosen", "rejected"), ("chosen", "rejected")]
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "food_of", "arguments": {"animal": "cow"}}}

NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
)
ADDS = "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}{% endfor %}"
TOOLS = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}"
)


def user(text="Q"):
    return {"role": "user", "content": text}


def assistant(text="A", **more):
    return {"role": "assistant", "content": text, **more}


@pytest.fixture
def load(tmp_path, monkeypatch, tokenizer):
    """Load rows as a stage whose tokenizer has this chat template does."""
    monkeypatch.chdir(tmp_path)

    def run(rows, template, columns=ANSWERS, **options):
        write_jsonl("a.jsonl", rows)
        monkeypatch.setattr(tokenizer, "chat_template", template)
        stage = Stage("sft", "tiny", tmp_path / "out", 0, {})
        train, _ = load_data(DataArguments(data_files=["a.jsonl"], **options), stage, columns, tokenizer)
        return train.to_list()

    return run


@pytest.mark.parametrize(
    "row, columns, name",
    [
        ({"messages": [SYSTEM, user(), assistant()]}, ANSWERS, "messages"),
        ({"prompt": [SYSTEM, user()], "completion": [assistant()]}, ANSWERS, "prompt"),
        ({"prompt": [SYSTEM, user()], "chosen": [assistant()], "rejected": [assistant("B")]}, PAIRS, "prompt"),
        ({"prompt": [SYSTEM, user()]}, [("prompt",)], "prompt"),
    ],
)
def test_a_row_that_the_template_refuses_is_named_with_the_templates_words(row, columns, name, load):
    fine = {key: [turn for turn in turns if turn is not SYSTEM] for key, turns in row.items()}
    fine = {key: [user("R"), *turns[1:]] if turns[0]["role"] == "user" else turns for key, turns in fine.items()}
    with pytest.raises(UserError) as caught:
        load([fine, row], NO_SYSTEM, columns)
    assert str(caught.value) == f"a.jsonl:2: {name}: the chat template refuses it: System role not supported"
    assert len(load([fine, row], NO_SYSTEM, columns, skip_bad_rows=True)) == 1


@pytest.mark.parametrize("content", [None, ""])
def test_tool_calls_are_rendered_or_refused(content, load):
    call = assistant(content, tool_calls=[CALL])
    row = {"messages": [user(), call, {"role": "tool", "content": "grass"}, assistant()]}
    assert load([row], TOOLS)[0]["messages"][1]["tool_calls"] == [CALL]
    with pytest.raises(
        UserError, match="a.jsonl:1: messages: the chat template leaves its tool calls out; use a model"
    ):
        load([row], ADDS)


def test_turns_without_a_template_are_named(load):
    with pytest.raises(UserError, match="a.jsonl:1: messages: has turns, but the tokenizer has no chat template"):
        load([{"messages": [user(), assistant()]}], None)
    assert load([{"prompt": "Q", "completion": "A"}], None)
