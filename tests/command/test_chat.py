"""`sandan chat`: which models of a recipe talk."""

import shlex

import pytest

from sandan.command.main import main


@pytest.fixture
def chat(capsys, monkeypatch):
    """`chat(option, ...)` is the exit code, the arguments that the script would get, and the message of a mistake."""
    started = []
    monkeypatch.setattr("sandan.command.main.os.execv", lambda program, command: started.append(command))

    def run(*options):
        started.clear()
        with pytest.raises(SystemExit) as ended:
            main(["chat", *options])
        printed = capsys.readouterr()
        words = list(started[0]) if started else shlex.split(printed.out)
        return ended.value.code, words[2:], printed.err

    return run


def finish(checkout, *stages, recipe="tiny"):
    for stage in stages:
        folder = checkout / "outputs" / recipe / stage
        folder.mkdir(parents=True)
        (folder / "result.json").write_text("{}")


LOG = ["--log_file", "annotations/tiny/judgements.jsonl"]
ALL = ["base=outputs/tiny/pretrain", "sft=outputs/tiny/sft", "ppo=outputs/tiny/ppo"]


def test_models_that_are_trained_talk(checkout, chat):
    finish(checkout, "pretrain", "sft")
    assert chat("--text", "--seed", "3")[1] == ["--models", *ALL[:2], *LOG, "--text", "--seed", "3"]
    finish(checkout, "ppo")
    assert chat()[1] == ["--models", *ALL, *LOG]


def test_the_plan_needs_no_model_and_a_chat_does(checkout, chat):
    assert chat("--plan") == (0, ["--models", *ALL, *LOG], "")
    code, _, said = chat()
    assert (code, said) == (2, "error: tiny: no model is trained yet; run `make chain RECIPE=tiny` first\n")


def test_a_model_that_the_evaluation_names_talks_too(checkout, chat):
    finish(checkout, "ppo", recipe="smollm2-instructions")
    models = ["sft=HuggingFaceTB/SmolLM2-135M-Instruct", "ppo=outputs/smollm2-instructions/ppo"]
    assert chat("--recipe", "smollm2-instructions")[1][1:3] == models


def test_models_and_log_of_ones_own_go_first(checkout, chat):
    own = ["--models", "mine=x", "--log_file=y.jsonl"]
    assert chat(*own)[1] == own
