"""The chat in the terminal."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT
from helpers.browser import read_lines

from sandan.chat.terminal import TerminalChat
from sandan.preference.judgement_log import JudgementLog


@pytest.fixture
def talk(speakers, sampling, tmp_path):
    """`talk(line, ...)` is all that the terminal shows after these lines, and the path of the log."""

    def run(*lines, blind=False):
        typed, shown = iter(lines), []
        log = JudgementLog(tmp_path / "judgements.jsonl")

        def read(prompt):
            shown.append(prompt)
            line = next(typed, None)
            if line is None:
                raise EOFError
            return line

        TerminalChat(speakers, sampling, blind, log, "mei", read, shown.append).run()
        return "".join(shown), log.path

    return run


def test_answers_stream_under_the_models_names(talk):
    shown, path = talk("What does the cow eat?", "")
    assert [name for name in ("\nbase: ", "\nsft: ", "\nppo: ") if shown.count(name) != 1] == []
    assert "better (base, sft, ppo;" in shown and not path.exists()


def test_a_blind_vote_names_the_models_afterwards(talk):
    shown, path = talk("What does the cow eat?", "nonsense", "b", blind=True)
    before, _, after = shown.partition("saved: ")
    assert "sft" not in before and before.count("better (A, B, C;") == 2
    assert "A was " in after
    (event,) = read_lines(path)
    assert event["ranks"] == [2, 1, 2] and event["blind"] is True


def test_votes_end_where_the_conversations_part(talk):
    shown, path = talk("What does the cow eat?", "=", "And the frog?", "/new", "And the frog?", "1")
    assert shown.count("no vote: the models have answered differently") == 1
    assert [event["ranks"] for event in read_lines(path)] == [[1, 1, 1], [1, 2, 2]]


def test_mistakes_are_lines_and_the_chat_goes_on(talk):
    shown, _ = talk("/sed 3", "/seed x", "/temperature -1", "/seed 5", "x " * 500, "/quit", "never read")
    assert "/sed: no such command" in shown and "/seed x: expected a number" in shown
    assert "temperature: -1.0;" in shown and "the question is too long" in shown
    assert "\u2400" not in shown


def test_control_c_stops_the_answers_and_then_the_chat(speakers, sampling, tmp_path):
    shown = []

    def write(text):
        shown.append(text)
        if text == "\nsft: ":
            raise KeyboardInterrupt

    def read(prompt):
        if len(shown) > 1:
            raise KeyboardInterrupt
        return "What does the cow eat?"

    TerminalChat(speakers, sampling, False, JudgementLog(tmp_path / "log.jsonl"), "mei", read, write).run()
    said = "".join(shown)
    assert "\nppo: " not in said and "stopped\n(no vote: an answer is not complete)" in said


@pytest.mark.slow
def test_the_script_talks_in_the_terminal(folders, tmp_path):
    arguments = ["--models", *folders, "--log_file", tmp_path / "log.jsonl", "--text", "--max_new_tokens", "8"]
    command = [sys.executable, ROOT / "scripts" / "chat.py", *arguments, "--annotator", "mei"]
    done = subprocess.run(
        list(map(str, command)), input="What does the cow eat?\n2\n", capture_output=True, text=True, timeout=120,
        env=os.environ, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "saved: sft" in done.stdout and "Traceback" not in done.stderr
    assert read_lines(tmp_path / "log.jsonl")[0]["annotator"] == "mei"
