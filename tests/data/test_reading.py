"""The same rows in every kind of file are the same rows; what people wrote stays as they wrote it."""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sandan.core.errors import UserError
from sandan.core.stage import Stage
from sandan.data.jsonl import write_jsonl
from sandan.data.loading import DataArguments, load_data


KINDS = (".jsonl", ".json", ".csv", ".parquet")
ANSWERS = [("prompt", "completion"), ("messages",), ("text",)]
PAIRS = [("prompt", "chosen", "rejected"), ("chosen", "rejected")]
# What readers take for something else than text.
TREACHEROUS = [
    "2000-03-01",
    "2000-03-01T10:00:00Z",
    "10:30",
    "NA",
    "None",
    "null",
    "nan",
    "-",
    "5",
    "1e3",
    "007",
    "true",
]
TREACHEROUS += [
    '"',
    "a,b",
    "a\nb",
    "a\r\nb",
    " a ",
    "[1]",
    "{}",
    "#",
    "=1",
    "\ufeffx",
    "a\u2028b",
    "N/A",
    "inf",
    "0x1",
]


def write(path, rows):
    """Write rows as people's programs do."""
    if path.suffix == ".jsonl":
        write_jsonl(path, rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(
                {name: json.dumps(value) if isinstance(value, list) else value for name, value in row.items()}
                for row in rows
            )


def load(path, columns=ANSWERS, **options):
    stage = Stage("sft", "tiny", path.parent / "out", 0, {})
    train, held_out = load_data(DataArguments(data_files=[str(path)], **options), stage, columns)
    return list(train), held_out and held_out.to_list()


def outcome(path, columns=ANSWERS, **options):
    """Return the rows, or what is wrong without the place of it."""
    try:
        return load(path, columns, **options)
    except UserError as error:
        return str(error).rpartition(": ")[2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("texts", [TREACHEROUS, TREACHEROUS[:2], ["NA", "None"], ["1", "2.5"]])
def test_text_stays_text_whatever_it_looks_like(kind, texts, tmp_path):
    rows = [{"prompt": f"Q{number}", "completion": text} for number, text in enumerate(texts)]
    write(tmp_path / f"a{kind}", rows)
    assert load(tmp_path / f"a{kind}")[0] == rows


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.tuples(st.sampled_from(TREACHEROUS), st.text(st.characters(codec="utf-8"), min_size=1)),
        min_size=1,
        max_size=5,
    )
)
@example(rows=[("NA", "a"), ("NA", " ")])
def test_every_kind_of_file_has_the_same_outcome(rows, tmp_path):
    rows = [{"prompt": prompt, "completion": answer, "n": "7"} for prompt, answer in rows]
    found = []
    for kind in KINDS:
        write(tmp_path / f"a{kind}", rows)
        found.append(outcome(tmp_path / f"a{kind}", allow_repeats=True))
    assert all(other == found[0] for other in found)


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


CALL = {"type": "function", "function": {"name": "food_of", "arguments": {"animal": "cow"}}}
OTHER_CALL = {"type": "function", "function": {"name": "home_of", "arguments": {"place": "farm", "at": {"n": 1}}}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("streaming", [False, True])
def test_turns_with_calls_of_several_shapes_come_back_as_they_are(kind, streaming, tmp_path):
    rows = [
        {
            "messages": [
                turn("user", "Q"),
                turn("assistant", "", tool_calls=[CALL]),
                turn("tool", "grass", name="f"),
                turn("assistant", "A"),
            ]
        },
        {
            "messages": [
                turn("user", "R"),
                turn("assistant", "", tool_calls=[OTHER_CALL]),
                turn("tool", "x"),
                turn("assistant", "B"),
            ]
        },
        {"messages": [turn("system", "S"), turn("user", "T"), turn("assistant", "C")]},
    ]
    write(tmp_path / f"a{kind}", rows)
    assert load(tmp_path / f"a{kind}", streaming=streaming)[0] == rows


def test_null_and_empty_members_are_absent(tmp_path):
    plain = [{"messages": [turn("user", f"Q{number}"), turn("assistant", "A")]} for number in range(3)]
    full = [
        {"messages": [{**one, **more} for one in row["messages"]], "tools": None}
        for row, more in zip(
            plain,
            [
                {"tool_calls": None, "name": None},
                {"tool_calls": [], "function_call": {"name": None, "arguments": None}},
                {"tool_calls": [{"function": {"name": None, "arguments": {"animal": None}}}], "metadata": {}},
            ],
            strict=True,
        )
    ]
    for kind in (".jsonl", ".json"):
        write(tmp_path / f"a{kind}", full)
        assert [row["messages"] for row in load(tmp_path / f"a{kind}")[0]] == [row["messages"] for row in plain]
    write(tmp_path / "a.parquet", full[:1])
    assert load(tmp_path / "a.parquet")[0][0]["messages"] == plain[0]["messages"]


def test_a_call_without_arguments_or_content_stays(tmp_path):
    call = {"function": {"name": "now", "arguments": {}}}
    row = {
        "messages": [
            turn("user", "Q"),
            turn("assistant", None, tool_calls=[call]),
            turn("tool", "5"),
            turn("assistant", "A"),
        ]
    }
    write(tmp_path / "a.jsonl", [row])
    turns = load(tmp_path / "a.jsonl")[0][0]["messages"]
    assert turns[1] == turn("assistant", "", tool_calls=[call])


@pytest.mark.parametrize("name", ["prompt", "chosen", "rejected"])
def test_an_empty_cell_is_named_with_its_line(name, tmp_path):
    rows = [
        {"prompt": "Q", "chosen": "a", "rejected": "b"},
        {"prompt": "R", "chosen": "c", "rejected": "d"} | {name: ""},
    ]
    write(tmp_path / "a.csv", rows)
    with pytest.raises(UserError, match=rf"a\.csv:3: columns .*{name} \(null\)"):
        load(tmp_path / "a.csv", PAIRS)


def test_a_margin_is_a_number_in_every_kind_of_file(tmp_path):
    rows = [{"prompt": "Q", "chosen": "a", "rejected": "b", "margin": 1.5}]
    for kind in KINDS:
        write(tmp_path / f"a{kind}", rows)
        assert load(tmp_path / f"a{kind}", PAIRS)[0] == rows
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected,margin\nQ,a,b,much\n")
    with pytest.raises(UserError, match=r"a.csv:2: margin: expected a number, found 'much'"):
        load(tmp_path / "a.csv", PAIRS)


@pytest.mark.parametrize(
    "text, documents",
    [
        ("a\nb\n", ["a", "b"]),
        ("a\nb\n\nc\n", ["a\nb", "c"]),
        ("\n\n a\nb\n \t\n\n\nc", [" a\nb", "c"]),
        ("a\nb\n\n\n", ["a", "b"]),
        ("a\r\nb\r\n\r\nc\r\n", ["a\nb", "c"]),
    ],
)
def test_blank_lines_part_the_documents_of_a_text_file(text, documents, tmp_path):
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert [row["text"] for row in load(tmp_path / "a.txt")[0]] == documents


def test_a_changed_file_is_read_again(tmp_path):
    for text in ("a", "b"):
        write_jsonl(tmp_path / "a.jsonl", [{"text": text}])
        assert load(tmp_path / "a.jsonl")[0] == [{"text": text}]


def test_columns_of_several_kinds_of_values_become_text(tmp_path):
    rows = [
        {"text": "a", "x": 1, "y": None},
        {"text": "b", "x": "2", "y": {"z": [1, "2"]}},
        {"text": "c", "x": 1 << 70},
    ]
    write_jsonl(tmp_path / "a.jsonl", rows)
    loaded = load(tmp_path / "a.jsonl")[0]
    assert [row["x"] for row in loaded] == ["1", "2", str(1 << 70)]
    assert [row["y"] for row in loaded] == [None, {"z": [1, "2"]}, None]
