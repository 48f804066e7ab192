"""Rows with problems: each is named with its place, all are counted, memory stays small."""

import json
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandan.core.errors import UserError
from sandan.core.stage import Stage
from sandan.data import row_checks
from sandan.data.jsonl import read_jsonl, write_jsonl
from sandan.data.loading import DataArguments, load_data
from sandan.data.row_checks import SHOWN_PROBLEMS, Findings, RowHashes, leaked, repeated, row_hash, scan_file


TEXT = [("text",)]
ANSWERS = [("prompt", "completion"), ("messages",), ("text",)]
PAIRS = [("prompt", "chosen", "rejected"), ("chosen", "rejected")]


def user(text="Q"):
    return {"role": "user", "content": text}


def assistant(text="A"):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refusal(here):
    """The one line for a file of these rows."""

    def run(rows, columns=ANSWERS, **options):
        write_jsonl("a.jsonl", rows)
        with pytest.raises(UserError) as caught:
            load_data(
                DataArguments(data_files=["a.jsonl"], **options), Stage("sft", "tiny", here / "out", 0, {}), columns
            )
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return run


@pytest.mark.parametrize(
    "row, wanted",
    [
        ({"text": ""}, "a.jsonl:1: text: is empty"),
        ({"text": " \n\t"}, "a.jsonl:1: text: is empty"),
        ({"prompt": "", "completion": "A"}, "a.jsonl:1: prompt: is empty"),
        ({"prompt": "Q", "completion": "  "}, "a.jsonl:1: completion: is empty"),
        ({"messages": [user(), assistant("")]}, "messages: turn 2: its content is empty"),
        ({"messages": [user()]}, "messages: ends with the user, expected the assistant last"),
        ({"messages": [user(), assistant(), user()]}, "messages: ends with the user, expected the assistant last"),
        ({"messages": [SYSTEM]}, "messages: has only a system turn"),
        ({"messages": [assistant(), user(), assistant()]}, "messages: turn 1 is of the assistant, expected the user"),
        ({"messages": [user(), user(), assistant()]}, "messages: turn 2 is of the user, expected the assistant"),
        ({"messages": [SYSTEM, user(), assistant(), assistant()]}, "turn 4 is of the assistant, expected the user"),
        ({"messages": [user(), SYSTEM, assistant()]}, "turn 2 is of the system, expected the assistant"),
        ({"messages": [{"role": "human", "content": "Q"}, assistant()]}, "turn 1: role 'human'; expected one of"),
        ({"prompt": [user(), assistant()], "completion": [assistant()]}, "prompt: ends with the assistant"),
        ({"prompt": [user()], "completion": [user()]}, "completion: turn 1 is of the user, expected the assistant"),
        ({"prompt": [user()], "completion": [assistant(), user()]}, "completion: ends with the user"),
    ],
)
def test_broken_answers(row, wanted, refusal):
    assert wanted in refusal([row])


@pytest.mark.parametrize(
    "row, wanted",
    [
        ({"prompt": "Q", "chosen": "A", "rejected": "A"}, "a.jsonl:1: rejected: the same as chosen"),
        ({"prompt": [user()], "chosen": [assistant()], "rejected": [assistant()]}, "rejected: the same as chosen"),
        ({"chosen": [user(), assistant()], "rejected": [user(), assistant()]}, "rejected: the same as chosen"),
        ({"chosen": [assistant("1")], "rejected": [assistant("2")]}, "chosen: turn 1 is of the assistant"),
        ({"prompt": [user()], "chosen": [user("1")], "rejected": [assistant("2")]}, "chosen: turn 1 is of the user"),
        ({"prompt": "P", "chosen": [user(), assistant()], "rejected": [assistant()]}, "chosen: turn 1 is of the user"),
        ({"prompt": " ", "chosen": "1", "rejected": "2"}, "prompt: is empty"),
    ],
)
def test_broken_pairs(row, wanted, refusal):
    assert wanted in refusal([row], PAIRS)


@pytest.mark.parametrize(
    "row, columns",
    [
        ({"messages": [SYSTEM, user(), assistant(), user(), assistant()]}, ANSWERS),
        (
            {
                "messages": [
                    user(),
                    {"role": "assistant", "content": None, "tool_calls": [{"x": 1}]},
                    {"role": "tool", "content": "7"},
                    assistant(),
                ]
            },
            ANSWERS,
        ),
        ({"prompt": [SYSTEM, user(), assistant(), user("2")], "completion": [assistant()]}, ANSWERS),
        ({"prompt": "Q", "chosen": "", "rejected": "a\0"}, PAIRS),
        ({"prompt": "Q", "chosen": [assistant()], "rejected": [assistant("")]}, PAIRS),
        ({"chosen": [user(), assistant()], "rejected": [user(), assistant("B")]}, PAIRS),
    ],
)
def test_good_rows(row, columns, here):
    write_jsonl("a.jsonl", [row])
    assert read_jsonl("a.jsonl", columns) == [row]


def test_the_first_20_problems_are_shown_and_all_are_counted(refusal, caplog):
    message = refusal([{"text": ""}] * 30 + [{"txt": "a"}] * 12 + [{"text": "a"}], TEXT)
    assert message == "a.jsonl:1: text: is empty (and 41 more; in all 30 empty, 12 without a column)"
    assert [record.message for record in caplog.records] == [
        f"a.jsonl:{line}: text: is empty" for line in range(2, SHOWN_PROBLEMS + 1)
    ]


def test_a_row_of_many_megabytes_is_one_problem_and_the_next_is_read(here, monkeypatch):
    monkeypatch.setattr(row_checks, "MAX_ROW_BYTES", 1 << 20)
    (here / "a.jsonl").write_text(f'{{"text": "{"a" * (3 << 20)}"}}\n{{"text": ""}}\n')
    findings = Findings()
    scan_file("a.jsonl", TEXT, findings)
    assert findings.shown == ["a.jsonl:1: longer than 1 MiB", "a.jsonl:2: text: is empty"]


def test_json_that_is_nested_too_deeply_is_a_problem(here):
    (here / "a.jsonl").write_text("[" * 100_000 + "\n")
    with pytest.raises(UserError, match="a.jsonl:1: not JSON"):
        read_jsonl("a.jsonl", TEXT)


# ---- Repeats and leaks ----


def test_repeated_rows_are_found_whatever_their_case_and_spaces(refusal):
    message = refusal([{"text": "The cow\neats."}, {"text": "x"}, {"text": " the  COW eats. "}], TEXT)
    assert message == "a.jsonl:3: says the same as a.jsonl:1 (--allow_repeats true: that is meant)"


def test_training_rows_that_are_evaluated_on_are_found(refusal, here):
    write_jsonl("b.jsonl", [{"text": "b"}, {"text": "c"}])
    message = refusal([{"text": "a"}, {"text": "C"}], TEXT, eval_data_files=["b.jsonl"])
    assert message == "a.jsonl:2: is in the evaluation data too (b.jsonl:2)"


def test_several_judgements_of_a_pair_are_counted_not_refused(here):
    rows = [{"prompt": "Q", "chosen": "1", "rejected": "2"}] * 3
    write_jsonl("a.jsonl", rows)
    stage = Stage("reward", "tiny", here / "out", 0, {})
    train, _ = load_data(DataArguments(data_files=["a.jsonl"]), stage, PAIRS)
    assert len(train) == 3
    assert stage.notes == {"train_rows_read": 3, "train_rows_repeated": 2, "eval_rows_read": 0}


def test_repeats_that_are_meant_are_counted(here):
    write_jsonl("a.jsonl", [{"text": "a"}] * 4)
    stage = Stage("sft", "tiny", here / "out", 0, {})
    train, _ = load_data(DataArguments(data_files=["a.jsonl"], allow_repeats=True), stage, TEXT)
    assert len(train) == 4 and stage.notes["train_rows_repeated"] == 3


def test_bad_rows_can_be_left_out_and_are_counted(here):
    good = [{"text": f"row {number}"} for number in range(5)]
    write_jsonl("a.jsonl", [good[0], {"text": ""}, *good[1:], good[2], {"x": 1}])
    write_jsonl("b.jsonl", [good[4], {"text": "only here"}])
    stage = Stage("sft", "tiny", here / "out", 0, {})
    arguments = DataArguments(data_files=["a.jsonl"], eval_data_files=["b.jsonl"], skip_bad_rows=True)
    train, held_out = load_data(arguments, stage, TEXT)
    assert train.to_list() == good[:4] and held_out.to_list() == [good[4], {"text": "only here"}]
    assert stage.notes["rows_skipped"] == {
        "empty": 1,
        "without a column": 1,
        "repeated": 1,
        "also in evaluation data": 1,
    }
    assert set(stage.inputs) == {"a.jsonl", "b.jsonl"}


def test_bad_rows_of_other_files_can_be_left_out(here):
    (here / "a.csv").write_text("text,n\na,1\n,2\nb,3\n")
    stage = Stage("sft", "tiny", here / "out", 0, {})
    train, _ = load_data(DataArguments(data_files=["a.csv"], skip_bad_rows=True), stage, TEXT)
    assert train["text"][:] == ["a", "b"] and stage.notes["rows_skipped"] == {"without a column": 1}


def test_a_file_without_any_good_row_is_refused(refusal):
    assert "no good row" in refusal([{"text": ""}], TEXT, skip_bad_rows=True)


@pytest.mark.parametrize("in_memory", [3, 1 << 18])
def test_hashes_on_disk_find_what_hashes_in_memory_find(here, monkeypatch, in_memory):
    monkeypatch.setattr(RowHashes, "IN_MEMORY_ROWS", in_memory)
    parts = []
    for name, texts in (("a", "pqrpqp"), ("b", "xqy")):
        write_jsonl(f"{name}.jsonl", [{"text": text} for text in texts])
        parts.append(RowHashes())
        scan_file(f"{name}.jsonl", TEXT, Findings(), parts[-1])
    train, held_out = parts
    found = sorted((train.place(place), problem.text.split()[4]) for place, problem in repeated(train))
    assert found == [(f"a.jsonl:{n}", f"a.jsonl:{m}") for n, m in ((4, 1), (5, 2), (6, 1))]
    assert sorted(train.place(place) for place, _ in leaked(train, held_out)) == ["a.jsonl:2", "a.jsonl:5"]


MEMORY = """
import resource, sys
from sandan.data.row_checks import Findings, RowHashes, repeated, scan_file
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
hashes, findings = RowHashes(), Findings()
rows = scan_file(sys.argv[1], [("text",)], findings, hashes)
found = sum(1 for _ in repeated(hashes))
print(rows, found, sum(findings.kinds.values()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    """100 MB and 700,000 rows; what grows with the rows is on disk. (numpy, imported on the way, is 30 MB of it.)"""
    path, padding = tmp_path / "a.jsonl", "x" * 120
    with path.open("w") as stream:
        stream.writelines(f'{{"text": "{number % 699_990} {padding}"}}\n' for number in range(700_000))
        stream.write('{"text": ""}\n')
    done = subprocess.run([sys.executable, "-c", MEMORY, path], check=True, capture_output=True, encoding="utf-8")
    rows, repeats, problems, grown_kb = map(int, done.stdout.split())
    assert (rows, repeats, problems) == (700_000, 10, 1)
    assert path.stat().st_size > 90_000_000 and grown_kb < 80_000


# ---- Any input at all ----


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_any_bytes_are_rows_or_one_line(content, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    try:
        assert read_jsonl(path, ANSWERS)
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)
NAMES = st.sampled_from(["text", "prompt", "completion", "messages", "chosen", "rejected", "x"])


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.dictionaries(NAMES, JSON, max_size=4), min_size=1, max_size=3))
def test_any_json_is_rows_or_one_line(rows, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for columns in (ANSWERS, PAIRS, [("prompt",)]):
        try:
            read_jsonl(path, columns)
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error)


@given(
    words=st.lists(st.text("abcé牛ｱ", min_size=1), min_size=1), space=st.sampled_from([" ", "\n", " \t ", "\u3000"])
)
@settings(deadline=None)
def test_the_hash_ignores_case_width_and_white_space_only(words, space):
    one = row_hash({"text": " ".join(words)}, ["text"])
    assert one == row_hash({"text": f" {space.join(words).upper()}\n"}, ["text"])
    assert one == row_hash({"text": " ".join(words).replace("ｱ", "ア")}, ["text"])
    assert one != row_hash({"text": f"{' '.join(words)}b"}, ["text"])
