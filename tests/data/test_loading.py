"""Data files: what is broken is named with file and line, what is fine loads."""

import gzip
import json

import pytest

from sandan.core.errors import UserError
from sandan.core.files import sha256
from sandan.core.stage import Stage
from sandan.data.chat import first_user_text, split_by_prompt, to_turns
from sandan.data.forms import one_form
from sandan.data.jsonl import check_jsonl, read_jsonl, write_jsonl
from sandan.data.loading import DataArguments, load_data


TEXT = [("text",)]
PAIRS = [("prompt", "completion"), ("messages",)]
ROW = b'{"text": "a"}\n'
TURN = '{"role": "user", "content": "a"}'


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def load(here):
    """Write `content` to a file and load it as a stage does: (train rows, held-out rows)."""

    def run(name=None, content=b"", columns=TEXT, **options):
        if name is not None:
            (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())
            options["data_files"] = [name]
        stage = Stage("sft", "tiny", here / "out", 0, {})
        train, held_out = load_data(DataArguments(**options), stage, columns)
        return train.to_list(), held_out and held_out.to_list()

    return run


@pytest.fixture
def refusal(load):
    def run(*args, **kwargs):
        with pytest.raises(UserError) as caught:
            load(*args, **kwargs)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return run


@pytest.mark.parametrize(
    "content, wanted",
    [
        (b"", "a.jsonl: empty"),
        (b"\n\n", "a.jsonl: empty"),
        (ROW + b'{"text": "b', "a.jsonl:2: not JSON"),
        (ROW + b'{"text": "b', "the line is cut off"),
        (ROW + '{"text": "é"}\n'.encode("latin-1"), "a.jsonl:2: not UTF-8 at byte 10"),
        (ROW + b'{"txet": "b"}\n', "a.jsonl:2: columns ['txet'], expected text"),
        (ROW + b'{"text": null}\n', "a.jsonl:2: columns ['text (null)'], expected text"),
        (ROW + b"[1]\n", "a.jsonl:2: expected a JSON object, found list"),
        (ROW + b'{"text": "\x00"}\n', "a.jsonl:2: not JSON"),
        (ROW + b'{"text": "\\u0000"}\n', "a.jsonl:2: text: holds a NUL"),
        (ROW + b'{"text": "b", "more": {"deep": ["\\udc00"]}}\n', "a.jsonl:2: more: holds half a surrogate pair"),
        (ROW + b'{"text": "\\ud800"}\n', "a.jsonl:2: text: holds half a surrogate pair (\\ud800)"),
        (ROW + b'{"text": "\xed\xa0\x80"}\n', "a.jsonl:2: not UTF-8"),
        (ROW + b'{"text": 5}\n', "a.jsonl:2: text: expected text, found int"),
        (ROW + b'{"text": ["b"]}\n', "a.jsonl:2: text: expected text, found list"),
        (b'{"text": 5}\n' + ROW, "a.jsonl:1: text: expected text, found int"),
        (b"x\n" * 3, "(and 2 more; in all 3 not JSON)"),
    ],
)
def test_broken_jsonl_names_file_and_line(content, wanted, refusal):
    assert wanted in refusal("a.jsonl", content)


@pytest.mark.parametrize(
    "rows, wanted",
    [
        ('{"prompt": "a"}', "a.jsonl:1: columns ['prompt'], expected prompt and completion, or messages"),
        ('{"prompt": "a", "completion": 5}', "completion: expected text, found int"),
        ('{"messages": []}', "messages: expected a list of turns"),
        ('{"messages": "a"}', "messages: expected a list of turns"),
        ('{"messages": ["a"]}', "messages: expected turns of role and content"),
        ('{"messages": [{"role": "user"}]}', "messages: expected turns of role and content"),
        ('{"messages": [{"role": "user", "content": 5}]}', "messages: content: expected text"),
        ('{"prompt": "a", "completion": "b"}\n{"messages": [' + TURN + "]}", "a.jsonl:2: columns ['messages']"),
        (
            '{"prompt": "a", "completion": "b"}\n{"prompt": [' + TURN + '], "completion": "b"}',
            "a.jsonl:2: prompt: list, but str in the rows before",
        ),
    ],
)
def test_broken_conversations(rows, wanted, refusal):
    assert wanted in refusal("a.jsonl", rows + "\n", PAIRS)


@pytest.mark.parametrize(
    "name, content, wanted",
    [
        ("a.csv", "", "a.csv: empty"),
        ("a.csv", "text,n\na,1\n,2\n", "a.csv:3: columns ['n', 'text (null)'], expected text"),
        ("a.csv", "text,n\na,1\nb\n", "a.csv:3: 1 cells, expected 2"),
        ("a.csv", "text,n\na,1\nb,c,2\n", "a.csv:3: 3 cells, expected 2"),
        ("a.csv", 'text\na\n"b\nc\n', "a.csv:3: not CSV"),
        ("a.csv", "text,text\na,b\n", "two columns have the same name"),
        ("a.csv", "text\n", "a.csv: empty"),
        ("a.txt", "\n \n\n", "a.txt: empty"),
        ("a.txt", "a\né\n".encode("latin-1"), "a.txt:2: not UTF-8"),
        ("a.csv", "txet\na\n", "columns ['txet'], expected text"),
        ("a.csv", "text\na\né\n".encode("latin-1"), "a.csv:3: not UTF-8"),
        ("a.txt", "", "a.txt: empty"),
        ("a.json", "", "a.json: empty"),
        ("a.json", '[{"text": "a"', "a.json"),
        ("a.json", '[{"text": "a"}, {"text": null}]', "row 2: columns ['text (null)'], expected text"),
        ("a.parquet", "junk", "a.parquet"),
        ("a.jsonl.gz", ROW, "a.jsonl.gz: cannot be read"),
        ("a.jsonl.gz", gzip.compress(ROW * 50, mtime=0)[:20], "a.jsonl.gz: cannot be read"),
    ],
)
def test_other_broken_files(name, content, wanted, refusal):
    assert wanted in refusal(name, content)


def test_missing_files(refusal, here):
    (here / "folder.jsonl").mkdir()
    assert refusal(data_files=["no.jsonl"]) == "no.jsonl: no such file or folder"
    assert "no*.jsonl: no such file" in refusal(data_files=["no*.jsonl"])
    assert "folder.jsonl: is a folder" in refusal(data_files=["folder.jsonl"])
    assert "datasets: missing" in refusal()
    with pytest.raises(UserError, match="no.jsonl: no such file"):
        read_jsonl("no.jsonl")


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl", b"\xef\xbb\xbf" + ROW + b"\n  \n" + b'{"text": "b"}'),
        ("a.jsonl", b'{"text": "a", "extra": 1}\r\n{"text": "b", "extra": null}\r\n'),
        ("a.jsonl.gz", gzip.compress(ROW + b'{"text": "b"}\n', mtime=0)),
        ("a.json", b'[{"text": "a"}, {"text": "b"}]'),
        ("a.csv", b"text\na\nb\n"),
        ("a.csv.gz", gzip.compress(b"text\na\nb\n", mtime=0)),
        ("a.txt", b"a\nb\n"),
        ("a.txt", b"\xef\xbb\xbfa\r\nb\r\n\r\n"),
        ("a.txt", b"\n\na\n\n \nb"),
        ("a.csv", b"\xef\xbb\xbftext\r\n\r\na\r\nb\r\n"),
        ("a.csv", b'n,text\n1,"a"\n2,"b"\n'),
    ],
)
def test_good_files_load(name, content, load):
    train, held_out = load(name, content)
    assert [row["text"] for row in train] == ["a", "b"] and held_out is None


def test_escapes_that_are_fine_stay_as_they_are(load):
    text = "\\u0000 牛 \U0001f42e \t"
    assert load("a.jsonl", json.dumps({"text": text}) + "\n")[0] == [{"text": text}]


def test_globs_are_expanded_checked_and_recorded(here):
    for name in ("b.jsonl", "a.jsonl"):
        write_jsonl(here / name, [{"text": name}])
    stage = Stage("sft", "tiny", here / "out", 0, {})
    train, _ = load_data(DataArguments(data_files=["*.jsonl"]), stage, TEXT)
    assert stage.inputs == {name: sha256(here / name) for name in ("a.jsonl", "b.jsonl")}
    assert len(train) == 2
    (here / "b.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="b.jsonl:1"):
        load_data(DataArguments(data_files=["*.jsonl"]), stage, TEXT)


@pytest.mark.parametrize("streaming", [False, True])
def test_mixture_by_fraction(streaming, here):
    for name in "ab":
        write_jsonl(here / f"{name}.jsonl", [{"text": f"{name} {number}"} for number in range(400)])
    sources = [
        {"path": "json", "data_files": f"{name}.jsonl", "fraction": share}
        for name, share in zip("ab", (3, 1), strict=True)
    ]
    arguments = DataArguments(datasets=sources, streaming=streaming)
    train, _ = load_data(arguments, Stage("sft", "tiny", here / "out", 0, {}), TEXT)
    texts = [row["text"] for row in (train.take(400) if streaming else train)]
    assert sum(text.startswith("a") for text in texts) / len(texts) == pytest.approx(
        0.75, abs=0.07 if streaming else 0.01
    )


@pytest.mark.parametrize("fractions", [(0.5, None), (0.0, 1.0), (-1.0, 2.0)])
def test_nonsense_fractions(fractions, refusal, here):
    write_jsonl(here / "a.jsonl", [{"text": "a"}])
    sources = [{"path": "json", "data_files": "a.jsonl", "fraction": share} for share in fractions]
    assert "fraction" in refusal(datasets=sources)


def test_eval_data_stay_eval_data(load, here):
    for name in ("train", "eval"):
        write_jsonl(here / f"{name}.jsonl", [{"text": name}])
    train, eval_ = ([{"path": "json", "data_files": f"{name}.jsonl"}] for name in ("train", "eval"))
    expected = ([{"text": "train"}], [{"text": "eval"}])
    assert load(datasets=train, eval_datasets=eval_) == expected
    assert load(data_files=["train.jsonl"], eval_data_files=["eval.jsonl"], held_out_share=0.5) == expected


def test_own_data_files_do_not_keep_the_recipes_eval_data():
    arguments = DataArguments(datasets=[{"path": "hub/x"}], eval_datasets=[{"path": "hub/x"}], data_files=["a.jsonl"])
    assert arguments.datasets[0].data_files == ["a.jsonl"] and arguments.eval_datasets == []


def test_broken_eval_file_is_found_before_training(refusal, here):
    (here / "eval.jsonl").write_text("{}\n")
    assert "eval.jsonl:1: columns [], expected text" in refusal("a.jsonl", ROW, eval_data_files=["eval.jsonl"])


def test_held_out_prompts_are_on_one_side_only(load):
    rows = [{"prompt": f"p{index % 40}", "completion": f"c{index}"} for index in range(120)]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    train, held_out = load("a.jsonl", content, PAIRS, held_out_share=0.3)
    sides = [{row["prompt"] for row in side} for side in (train, held_out)]
    assert not sides[0] & sides[1] and len(train) + len(held_out) == 120
    assert (train, held_out) == load("a.jsonl", content, PAIRS, held_out_share=0.3)


@pytest.mark.parametrize("share", [-1, 1.5])
def test_share_that_leaves_nothing(share, refusal):
    assert "held_out_share" in refusal("a.jsonl", ROW, held_out_share=share)


def test_split_by_prompt_is_pure_and_balanced():
    keys = [f"prompt {index}" for index in range(5000)]
    split = split_by_prompt(keys, 0.1, seed=3)
    assert split == split_by_prompt(keys, 0.1, seed=3) and split != split_by_prompt(keys, 0.1, seed=4)
    assert split[::-1] == split_by_prompt(keys[::-1], 0.1, seed=3)
    assert sum(split) / len(split) == pytest.approx(0.1, abs=0.02)
    assert not any(split_by_prompt(keys, 0.0, seed=3)) and all(split_by_prompt(keys, 1.0, seed=3))
    # A larger share only adds to a smaller one.
    assert all(more or not less for less, more in zip(split, split_by_prompt(keys, 0.2, seed=3), strict=True))


def test_dialogue_text_becomes_turns():
    dialogue = "\n\nHuman: What does the cow eat?\n\nAssistant: Grass.\n\nHuman: And the frog?\n\nAssistant:"
    assert [turn["role"] for turn in to_turns(dialogue)] == ["user", "assistant", "user"]
    assert to_turns(" a question ") == [{"role": "user", "content": "a question"}]
    row = one_form({"prompt": dialogue, "completion": " Flies. ", "prompt_id": 1}, as_chat=True)
    assert row["completion"] == [{"role": "assistant", "content": "Flies."}] and row["prompt_id"] == 1
    assert first_user_text({"prompt": dialogue}) == first_user_text(row) == "What does the cow eat?"


def test_nul_that_a_model_sampled_does_not_stop_the_chain(here):
    rows = [{"prompt": "Q", "chosen": "a\0", "rejected": "b"}]
    write_jsonl(here / "a.jsonl", rows)
    assert read_jsonl(here / "a.jsonl", [("prompt", "chosen", "rejected")]) == rows == read_jsonl(here / "a.jsonl")


def test_rows_written_are_the_rows_read(here):
    rows = [{"text": "牛\u2028\x85\n"}, {"text": " ."}]
    write_jsonl(here / "a.jsonl", rows)
    assert read_jsonl(here / "a.jsonl", TEXT) == rows and check_jsonl(here / "a.jsonl", TEXT) == 2
