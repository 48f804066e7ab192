"""Every line of a log is checked when it is read: odd ones are counted, and nothing that reads the log stops."""

import copy
import json

import pytest
from helpers.browser import read_lines, run_light_script, write_candidates
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandan.core.errors import UserError
from sandan.core.stage import Stage
from sandan.preference.agreement import analyse
from sandan.preference.item_queue import Queue, QueueSettings, load_items
from sandan.preference.judgement_event import event_from_line
from sandan.preference.judgement_log import JudgementLog
from sandan.preference.pairs import guidelines_of, make_preferences, read_logs, render_agreement, write_dataset
from sandan.preference.ranking_page import Desk, load_guidelines


PEOPLE = ("aki", "ken")
JUDGEMENT = {
    "event": "judgement", "ticket": "t", "annotator": "aki", "annotator_kind": "human", "item_id": "i", "prompt_id": "p",
    "showing": 0, "candidates": ["a", "b", "c"], "time": "2026-11-27T10:00:00.000+00:00", "prompt": "Q",
    "ranks": [1, 2, 2], "flags": [[], ["wrong"], []], "note": "", "seconds": 3.5, "guidelines": "0123456789ab",
}  # fmt: skip


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The candidates file and the lines of a log as people write them: shown, judged, skipped, undone."""
    folder = tmp_path_factory.mktemp("real")
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Go"},
    ]
    rows = [
        {"prompt": turns[: 1 if n % 2 else 3], "prompt_id": f"p{n}", "candidates": [f"{n}a", f"{n}b", f"{n}c"]}
        for n in range(6)
    ]
    candidates = write_candidates(folder / "candidates.jsonl", rows)
    queue = Queue(load_items(candidates), JudgementLog(folder / "log.jsonl"), QueueSettings(1, 2, 0.5, repeat_after=1))
    for number in range(4):
        for name in PEOPLE:
            ticket = queue.current(name)["ticket"]
            if number == 1:
                queue.skip(name, ticket, "unclear")
                queue.undo(name)
            queue.judge(name, ticket, [1, 2, 3], flags=[[], ["wrong"], []], note="n", seconds=2.5, guidelines="ab12")
    queue.skip("aki", queue.current("aki")["ticket"], "unclear", note="", seconds=1.0, guidelines="ab12")
    queue.current("ken")
    return candidates, read_lines(folder / "log.jsonl")


def test_real_lines_are_events(real):
    _, events = real
    assert {event["event"] for event in events} == {"shown", "judgement", "skip", "undo"}
    for event in events:
        assert event_from_line(json.dumps(event).encode()) == event


def test_a_line_of_simulated_rankers_is_an_event():
    line = {name: JUDGEMENT[name] for name in ("annotator", "prompt_id", "prompt", "candidates", "ranks")}
    assert event_from_line(b"\xef\xbb\xbf" + json.dumps(line).encode()) == line | {"event": "judgement"}


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"ranks": [1, 2, float("nan")]}, "NaN is not a number"),
        ({"ranks": [1, 2, "3"]}, "ranks: expected a list of whole numbers"),
        ({"ranks": [1, 2, True]}, "ranks: expected a list of whole numbers"),
        ({"ranks": [1, 2, 2.0]}, "ranks: expected a list of whole numbers"),
        ({"ranks": [1, 2, 10**9]}, "ranks: expected 3 from 1 to 3"),
        ({"ranks": [0, 1, 2]}, "ranks: expected 3 from 1 to 3"),
        ({"ranks": [1, 2]}, "ranks: 2 for 3 candidates"),
        ({"ranks": []}, "ranks: expected 3"),
        ({"candidates": ["a", "b", "b"]}, "candidates: expected a list of different texts"),
        ({"candidates": ["a", "b", {}]}, "candidates: expected"),
        ({"candidates": ["a", "b", "\ud800"]}, "candidates: expected"),
        ({"candidates": []}, "candidates: expected"),
        ({"seconds": "3"}, "seconds: expected a number"),
        ({"seconds": float("inf")}, "Infinity is not a number"),
        ({"seconds": -1}, "seconds: expected"),
        ({"flags": [[]]}, "flags: 1 for 3 candidates"),
        ({"flags": [["wrong"], 1, []]}, "flags: expected"),
        ({"prompt": [{"role": "user"}]}, "prompt: expected"),
        ({"prompt": [{"role": "user", "content": "Q", "name": "\ud800"}]}, "prompt: expected"),
        ({"prompt": 5}, "prompt: expected"),
        ({"annotator": "<b>"}, "annotator: expected 1 to 32 letters"),
        ({"ticket": ["t"]}, "ticket: expected"),
        ({"item_id": {}}, "item_id: expected"),
        ({"prompt_id": 7}, "prompt_id: expected"),
        ({"showing": "1"}, "showing: expected 0 or 1"),
        ({"time": "2026-11-27T10:00:00"}, "time: expected a date and time with its zone"),
        ({"event": "judgment"}, "event: expected shown, judgement, skip, undo"),
        ({"event": ["undo"]}, "event: expected"),
        ({"event": None}, "event: expected"),
    ],
)  # fmt: skip
def test_a_value_that_is_none_is_refused_with_its_column(change, reason):
    with pytest.raises(ValueError, match=reason):
        event_from_line(json.dumps(JUDGEMENT | change).encode())


@pytest.mark.parametrize("line", [b"[" * 100_000, b'{"ranks": 1e999}', b"1" * 5000, b"\x00\x00\x00{", b"{}", b'"x"'])
def test_a_line_that_is_no_event_is_a_value_error(line):
    with pytest.raises(ValueError):
        event_from_line(line)


def test_an_event_that_could_not_be_read_again_is_not_written(tmp_path):
    log = JudgementLog(tmp_path / "log.jsonl")
    for change in ({"note": "\ud800"}, {"ranks": [1, 2]}, {"seconds": float("nan")}):
        with pytest.raises(UserError, match="was not saved"):
            log.append(JUDGEMENT | change)
    assert not log.path.exists()


def test_nobody_undoes_anothers_judgement(tmp_path):
    log = JudgementLog(tmp_path / "log.jsonl")
    log.append(JUDGEMENT)
    log.append({"event": "undo", "ticket": "t", "annotator": "ken"})
    judgements, _, _ = read_logs([str(log.path)], Stage("preferences", "toy", tmp_path / "out", 0, {}).open())
    assert len(judgements) == 1


# --------------------------------------------------------------------------------------------------------------- fuzz

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(
        ["", "\ud800", "aki", "ken", "undo", "shown", "2026-11-27T10:00:00", "9999-12-31T23:59:59-23:59", 0, 1, 2, 10**30, 1e-320]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


def places(value, path=()):
    """Yield the path of every value inside an event."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        if isinstance(inner, (dict, list)):
            yield from places(inner, (*path, key))


@st.composite
def odd_events(draw, events):
    """Draw a real event with a value put in another place, or without one of its columns."""
    event = copy.deepcopy(draw(st.sampled_from(events)))
    for _ in range(draw(st.integers(1, 2))):
        *path, last = draw(st.sampled_from(list(places(event))))
        holder = event
        for key in path:
            holder = holder[key]
        if draw(st.booleans()) and isinstance(holder, dict) and len(holder) > 1:
            del holder[last]
        else:
            holder[last] = draw(values)
    return event


def everything_that_reads(candidates, path, folder):
    """Do with a log what the server, the agreement figures and the preference dataset do."""
    desk = Desk(Queue(load_items(candidates), JudgementLog(path), QueueSettings(1, 2, 0.5)), load_guidelines(None), "")
    for name in (*PEOPLE, "new"):
        json.dumps(desk.open_item(name, {}), allow_nan=False).encode()
    try:
        judgements, skips, left_out = read_logs([str(path)], Stage("preferences", "toy", folder, 0, {}).open())
        for form in ("given", "standard", "conversational"):
            splits, counts = make_preferences(judgements, form, 0.3, 0)
        analysis = analyse(judgements) | counts | {"skipped": len(skips), "guidelines": guidelines_of(judgements)}
        render_agreement(analysis)
    except UserError:
        return None
    write_dataset(splits, analysis, "other", [], folder)
    for name in PEOPLE:
        desk.undo_last(name, {})
        if item := desk.open_item(name, {})["item"]:
            count = len(item["candidates"])
            hash_ = desk.guidelines["en"].hash
            data = {"ticket": item["ticket"], "ranks": [1] * count, "flags": [[]] * count, "guidelines": hash_}
            desk.judge_item(name, data)
    return left_out


@given(data=st.data())
@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
def test_no_odd_line_stops_what_reads_the_log(data, real, tmp_path_factory):
    candidates, events = real
    odd = data.draw(st.lists(odd_events(events), min_size=1, max_size=6))
    at = data.draw(st.integers(0, len(events)))
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / "log.jsonl"
    lines = [json.dumps(event) for event in [*events[:at], *odd, *events[at:]]]
    path.write_text("".join(line + "\n" for line in lines))
    invalid = 0
    for line in lines:
        try:
            event_from_line(line.encode())
        except ValueError:
            invalid += 1
    assert everything_that_reads(candidates, path, folder / "out") in (None, invalid)


def test_the_script_counts_what_it_skips_and_keeps_the_old_outputs_if_nothing_is_left(tmp_path):
    log, out = tmp_path / "log.jsonl", tmp_path / "toy" / "preferences"
    judged = [JUDGEMENT | {"ticket": f"t{n}", "prompt_id": f"p{n}", "prompt": f"Q{n}"} for n in range(8)]
    odd = [JUDGEMENT | {"ranks": [1, 2, float("nan")]}, JUDGEMENT | {"candidates": ["a", "a", "b"]}] * 4
    log.write_text("".join(json.dumps(event) + "\n" for event in [*judged, *odd]))
    arguments = ["--output_dir", out, "--judgement_files", log]
    done = run_light_script("preferences", *arguments)
    assert done.returncode == 0, done.stderr
    assert "8 lines left out" in done.stdout
    assert f"{log}:9: left out: NaN is not a number" in done.stderr
    assert f"{log}:14" not in done.stderr, "five are named, all are counted"
    assert json.loads((out / "result.json").read_text())["metrics"]["invalid_lines"] == 8
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    log.write_text("".join(json.dumps(event) + "\n" for event in odd))
    done = run_light_script("preferences", *arguments)
    assert done.returncode == 2
    assert "no judgement that stands (8 lines are not valid events)" in done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
