"""The judgement log loses nothing: not to a crash in mid-line, not to two writers, not to an undo."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from helpers import ROOT

from sandan.core.errors import UserError
from sandan.preference.item_queue import AlreadySettled, Item, Queue, QueueSettings, item_identity, load_items
from sandan.preference.judgement_log import JudgementLog, check_annotator, competition_ranks, standing_judgements


SRC = str(ROOT / "src")


def lines(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


SHOWING = {
    "ticket": "t0", "annotator": "yuki", "annotator_kind": "human", "item_id": "i0", "prompt_id": "p0", "showing": 0,
    "candidates": ["a", "b"], "time": "2026-11-27T10:00:00.000+00:00",
}  # fmt: skip


def skipped(number=0, annotator="yuki"):
    return SHOWING | {
        "event": "skip", "reason": "unclear", "ticket": f"t{number}", "annotator": annotator, "number": number,
    }  # fmt: skip


def items(count=10, candidates=3):
    made = []
    for number in range(count):
        answers = tuple(f"answer {number}.{letter}" for letter in "abcdefghi"[:candidates])
        made.append(Item(item_identity(f"p{number}", f"Q{number}", answers), f"p{number}", f"Q{number}", answers))
    return made


@pytest.fixture
def path(tmp_path):
    return tmp_path / "annotations" / "judgements.jsonl"


@pytest.fixture
def queue(path):
    return Queue(items(), JudgementLog(path), QueueSettings(overlap_share=0, repeat_share=0))


def settle(queue, annotator, rng=None):
    """Judge the annotator's current item (best first, or at random); its event, or None at the end."""
    shown = queue.current(annotator)
    if shown is None:
        return None
    ranks = list(range(1, len(shown["candidates"]) + 1))
    if rng:
        rng.shuffle(ranks)
    return queue.judge(annotator, shown["ticket"], ranks)


# --------------------------------------------------------------------------------------------------------------- log


def test_a_line_is_on_the_disk_when_append_returns(path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    log = JudgementLog(path)
    event = log.append(skipped() | {"note": "猫 \x00 \u2028"})
    assert lines(path) == [event] == log.read()
    assert synced[0] == path.stat().st_size
    assert path.stat().st_mode & 0o077 == 0, "judgements are private to their owner"


@pytest.mark.parametrize("cut", range(2, 60, 7))
def test_a_torn_last_line_is_left_out_and_the_next_line_is_whole(path, cut):
    log = JudgementLog(path)
    log.append(skipped(1))
    log.append(skipped(2))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    again = JudgementLog(path)
    assert [event["number"] for event in again.read()] == [1]
    again.append(skipped(3))
    assert [event["number"] for event in again.read()] == [1, 3] == [e["number"] for e in JudgementLog(path).read()]
    assert path.read_bytes().startswith(whole[:-cut]), "what the crash left is not removed"


@pytest.mark.parametrize(
    "line",
    ["not json", "[1]", "null", '{"event": "judgement", "annotator": "a", "candidates": ["x"], "ranks": []}', "\xff"],
)
def test_a_broken_line_in_the_middle_is_named_and_the_rest_is_read(path, caplog, line):
    log = JudgementLog(path)
    log.append(skipped(1))
    with path.open("ab") as stream:
        stream.write(line.encode("latin-1") + b"\n")
    log.append(skipped(2))
    assert [event["number"] for event in log.read()] == [1, 2]
    assert f"{path}:2: left out" in caplog.text


def test_only_new_lines_are_read_again(path):
    one, other = JudgementLog(path), JudgementLog(path)
    for number in range(3):
        one.append(skipped(number))
        assert [event["number"] for event in other.read()] == list(range(number + 1))


@pytest.mark.parametrize("change", ["replace", "cut", "remove"])
def test_a_log_that_was_replaced_is_noticed(path, change):
    log = JudgementLog(path)
    log.append(skipped(1))
    log.read()
    if change == "replace":
        content = path.read_bytes()
        path.rename(path.with_suffix(".old"))
        path.write_bytes(content)
    elif change == "cut":
        path.write_bytes(b"")
    else:
        path.unlink()
    with pytest.raises(UserError, match="while in use"):
        log.read()


def test_a_full_disk_is_told_and_keeps_the_lines_before(path, monkeypatch):
    log = JudgementLog(path)
    log.append(skipped(1))
    write = os.write

    def half(descriptor, line):
        monkeypatch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        return write(descriptor, line[:20])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(UserError, match="not saved .No space left"):
        log.append(skipped(2))
    monkeypatch.setattr(os, "write", write)
    log.append(skipped(3))
    assert [event["number"] for event in log.read()] == [1, 3]


def test_threads_and_processes_write_whole_lines(path):
    code = textwrap.dedent(f"""
        from sandan.preference.judgement_log import JudgementLog
        log = JudgementLog({str(path)!r})
        for number in range(25):
            log.append({skipped()!r} | {{"number": number, "text": "x" * 9000}})
    """)
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": SRC}) for _ in range(2)
    ]
    log = JudgementLog(path)
    threads = [
        threading.Thread(target=lambda: [log.append(skipped(number)) for number in range(25)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert len(lines(path)) == 150


def test_kill_at_any_moment_keeps_every_line_that_was_acknowledged(path):
    code = textwrap.dedent(f"""
        import sys
        from sandan.preference.judgement_log import JudgementLog
        log = JudgementLog({str(path)!r})
        for number in range(10**6):
            log.append({skipped()!r} | {{"number": number, "text": "x" * 5000}})
            sys.stdout.write(f"{{number}}\\n"); sys.stdout.flush()
    """)
    rng, acknowledged = random.Random(0), 0
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": SRC}, stdout=subprocess.PIPE
        )
        process.stdout.readline()
        time.sleep(rng.random() / 10)
        process.send_signal(signal.SIGKILL)
        acknowledged += 1 + len(process.stdout.read().splitlines())
        process.wait()
    found = len(JudgementLog(path).read())
    assert acknowledged <= found <= acknowledged + 3


@pytest.mark.parametrize("name", ["", "a" * 33, "../x", "a b", "<b>", "名前", None, 5])
def test_names_that_are_not_names_are_refused(name):
    with pytest.raises(UserError, match="1 to 32 letters"):
        check_annotator(name)


def test_an_unwritable_place_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        JudgementLog(tmp_path / "file" / "log.jsonl").append(skipped())


def test_ranks_are_competition_ranks():
    assert competition_ranks([3, 1, 3, 9]) == [2, 1, 2, 4]
    assert competition_ranks([7, 7]) == [1, 1]


# ------------------------------------------------------------------------------------------------------------- queue


def test_the_orders_are_stored_and_every_annotator_has_others(path):
    queue = Queue(items(), JudgementLog(path), QueueSettings(overlap_share=1, repeat_share=0))
    for annotator in ("yuki", "ken"):
        shown = queue.current(annotator)
        assert queue.current(annotator) == shown, "a reload shows the same item in the same order"
        while settle(queue, annotator):
            pass
    shown = {name: [event for event in lines(path) if event["event"] == "shown" and event["annotator"] == name]
             for name in ("yuki", "ken")}  # fmt: skip
    of_items = {name: [event["item_id"] for event in events] for name, events in shown.items()}
    assert sorted(of_items["yuki"]) == sorted(of_items["ken"])
    assert of_items["yuki"] != of_items["ken"]
    answers = {name: {event["item_id"]: event["candidates"] for event in events} for name, events in shown.items()}
    assert sum(answers["yuki"][item] != answers["ken"][item] for item in of_items["yuki"]) >= 5
    for event in standing_judgements(lines(path)):
        assert event["candidates"] == answers[event["annotator"]][event["item_id"]]


def test_every_item_is_judged_once_and_an_overlap_twice(path):
    queue = Queue(items(200), JudgementLog(path), QueueSettings(overlap_share=0.25, repeat_share=0))
    for name in ("a", "b", "c"):
        for _ in range(100):
            settle(queue, name)
    judged = standing_judgements(queue.log.read())
    counts = {item: sum(event["item_id"] == item for event in judged) for item in queue.items}
    twice = sum(count == 2 for count in counts.values())
    assert set(counts.values()) == {1, 2}
    assert 30 <= twice <= 70
    pairs = [(event["item_id"], event["annotator"]) for event in judged]
    assert len(set(pairs)) == len(pairs)


def test_two_annotators_never_hold_the_same_single_item(queue):
    shown = [queue.current(f"annotator-{number}") for number in range(10)]
    assert len({event["item_id"] for event in shown}) == 10
    assert queue.current("one-too-many") is None


def test_hidden_repeats_come_later_and_in_another_order(path):
    settings = QueueSettings(overlap_share=0, repeat_share=0.5, repeat_after=8)
    queue = Queue(items(40, 2), JudgementLog(path), settings)
    done = []
    while settled := settle(queue, "a"):
        done.append(settled)
    first = {event["item_id"]: at for at, event in enumerate(done) if event["showing"] == 0}
    again = {event["item_id"]: at for at, event in enumerate(done) if event["showing"] == 1}
    assert len(first) == 40
    assert 10 <= len(again) <= 30
    assert all(again[name] - first[name] >= 8 for name in again)
    assert all(done[again[name]]["candidates"] != done[first[name]]["candidates"] for name in again)


def test_undo_is_a_new_line_and_reopens_the_item_with_what_was_decided(queue, path):
    first, second = settle(queue, "a"), settle(queue, "a")
    waiting = queue.current("a")
    before = path.read_bytes()
    assert queue.undo("a")["ticket"] == second["ticket"]
    assert path.read_bytes().startswith(before)
    assert queue.current("a")["ticket"] == second["ticket"]
    assert queue.draft("a", second["ticket"])["ranks"] == [1, 2, 3]
    assert queue.undo("a")["ticket"] == first["ticket"]
    assert queue.undo("a") is None
    assert standing_judgements(queue.log.read()) == []
    queue.judge("a", first["ticket"], [3, 2, 1])
    assert queue.current("a")["ticket"] == second["ticket"]
    settle(queue, "a")
    assert queue.current("a")["ticket"] == waiting["ticket"]
    assert [event["ranks"] for event in standing_judgements(queue.log.read())] == [[3, 2, 1], [1, 2, 3]]


def test_the_same_decision_sent_twice_is_one_line_and_another_one_needs_an_undo(queue, path):
    shown = queue.current("a")
    for _ in range(3):
        queue.judge("a", shown["ticket"], [1, 2, 3], flags=[[], [], []])
    assert len(lines(path)) == 2
    for decide in (
        lambda: queue.judge("a", shown["ticket"], [2, 1, 3]),
        lambda: queue.skip("a", shown["ticket"], "x"),
    ):
        with pytest.raises(AlreadySettled, match="another tab"):
            decide()
    assert len(lines(path)) == 2
    queue.undo("a")
    queue.judge("a", shown["ticket"], [2, 1, 3], flags=[[], [], []])
    assert [event["ranks"] for event in standing_judgements(queue.log.read())] == [[2, 1, 3]]


@pytest.mark.parametrize("ranks", [[1, 2], [1, 2, 0], [1, 2, 3, 4], [1, 2, "3"], [1, 2, True], []])
def test_ranks_that_are_none_are_refused(queue, ranks, path):
    shown = queue.current("a")
    before = path.read_bytes()
    with pytest.raises(UserError, match="ranks"):
        queue.judge("a", shown["ticket"], ranks)
    assert path.read_bytes() == before


def test_nobody_judges_with_anothers_ticket(queue):
    shown = queue.current("a")
    with pytest.raises(UserError, match="no longer open"):
        queue.judge("b", shown["ticket"], [1, 2, 3])


def test_a_skipped_item_goes_to_somebody_else(queue):
    shown = queue.current("a")
    queue.skip("a", shown["ticket"], "unclear")
    while settle(queue, "a"):
        pass
    assert queue.summary("a") | {"seconds_per_item": None, "items_per_hour": None} == {
        "judged": 9, "skipped": 1, "left": 0, "seconds_per_item": None, "items_per_hour": None,
    }  # fmt: skip
    assert queue.current("b")["item_id"] == shown["item_id"]


def test_what_a_model_judged_still_wants_people(path):
    machine = QueueSettings(overlap_share=1, overlap_annotators=99, repeat_share=0, annotator_kind="machine")
    judge = Queue(items(), JudgementLog(path), machine)
    while settle(judge, "judge"):
        pass
    people = Queue(items(), JudgementLog(path), QueueSettings(overlap_share=0, repeat_share=0))
    while settle(people, "yuki"):
        pass
    kinds = [event["annotator_kind"] for event in standing_judgements(lines(path))]
    assert kinds == ["machine"] * 10 + ["human"] * 10


def test_another_server_continues_where_the_log_ends(queue, path):
    settle(queue, "a")
    shown = queue.current("a")
    other = Queue(items(), JudgementLog(path), queue.settings)
    assert other.current("a") == shown
    other.judge("a", shown["ticket"], [1, 1, 3])
    assert queue.current("a")["ticket"] != shown["ticket"]
    assert queue.summary("a")["judged"] == 2


def test_items_that_the_candidates_file_lost_are_passed_over(queue, path):
    shown = queue.current("a")
    rest = [item for item in items() if item.item_id != shown["item_id"]]
    other = Queue(rest, JudgementLog(path), queue.settings)
    assert other.current("a")["item_id"] != shown["item_id"]


# ---------------------------------------------------------------------------------------------------- candidates file


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_candidates_are_read_once_each_and_half_characters_are_replaced(tmp_path, caplog):
    row = {"prompt": "Q \ud800", "candidates": ["a\udfff", "b", "😀\x00"], "model": "secret"}
    loaded = load_items(write(tmp_path / "candidates.jsonl", row, row))
    assert [(item.prompt, item.candidates) for item in loaded] == [("Q \ufffd", ("a\ufffd", "b", "😀\x00"))]
    assert "half a surrogate pair" in caplog.text


@pytest.mark.parametrize(
    "candidates, problem",
    [(["a"], "1 candidates"), (["a"] * 3, "1 of them different"), (list("abcdefghij"), "10 candidates"),
     ("ab", "a list of texts"), ([1, 2], "a list of texts")],
)  # fmt: skip
def test_rows_that_cannot_be_ranked_are_named(tmp_path, candidates, problem):
    with pytest.raises(UserError, match=f"row 1: .*{problem}"):
        load_items(write(tmp_path / "candidates.jsonl", {"prompt": "Q", "candidates": candidates}))
