"""A vote is a judgement like that of the ranking page: pairs are made of it, and a reward model is trained from them."""

import json

import pytest
from helpers.browser import read_lines
from helpers.scripts import run_script

from sandan.chat.conversation import EQUAL, Conversation, answer_round
from sandan.chat.votes import take_back, vote
from sandan.core.errors import UserError
from sandan.preference.item_queue import Queue, QueueSettings, load_items
from sandan.preference.judgement_log import JudgementLog, standing_judgements
from sandan.preference.pairs import preference_pairs


@pytest.fixture
def log(tmp_path):
    return JudgementLog(tmp_path / "annotations" / "judgements.jsonl")


@pytest.fixture
def asked(speakers, sampling):
    """A question to which the three models have given different answers."""
    found = Conversation(speakers).ask("What does the cow eat?", sampling, blind=True)
    answer_round(found)
    assert found.obstacle() is None
    return found


def test_a_vote_makes_a_pair_with_each_worse_answer(log, asked):
    event = vote(log, "mei", asked, 1)
    assert read_lines(log.path) == [event] and JudgementLog(log.path).read() == [event]
    assert event["prompt"] == [{"role": "user", "content": "What does the cow eat?"}]
    pairs, ties = preference_pairs([event])
    texts = [reply.text for reply in asked.replies]
    assert [(pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in pairs] == [
        (texts[1], texts[0]), (texts[1], texts[2])]  # fmt: skip
    assert ties == 1
    assert event["models"] == [[reply.speaker.name] for reply in asked.replies]


def test_equal_answers_make_no_pair(log, asked):
    assert preference_pairs([vote(log, "mei", asked, EQUAL)]) == ([], 3)


def test_the_last_vote_stands_until_it_is_taken_back(log, asked):
    vote(log, "mei", asked, 0)
    vote(log, "mei", asked, 2)
    (standing,) = standing_judgements(log.read())
    assert standing["ranks"] == [2, 2, 1]
    take_back(log, "mei", asked)
    assert standing_judgements(log.read()) == [] and asked.names_are_shown
    with pytest.raises(UserError, match="no vote to take back"):
        take_back(log, "mei", asked)


def test_a_vote_that_replaces_one_is_not_blind_because_the_names_are_shown(log, asked):
    assert vote(log, "mei", asked, 0)["blind"] is True and asked.names_are_shown
    assert vote(log, "mei", asked, 1)["blind"] is False


def test_two_models_that_say_the_same_are_one_answer(log, asked):
    asked.replies[2].text = asked.replies[0].text
    event = vote(log, "mei", asked, 2)
    assert event["ranks"] == [1, 2] and sorted(map(len, event["models"])) == [1, 2]


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda asked: setattr(asked, "replies", asked.replies[:1]), "only one answer"),
        (lambda asked: setattr(asked.replies[0], "completed_at", None), "not complete"),
        (lambda asked: setattr(asked, "is_stopped", True), "not complete"),
        (lambda asked: setattr(asked.replies[0], "text", " \n"), "an answer is empty"),
        (lambda asked: setattr(asked.replies[0], "turns", []), "different conversations"),
        (lambda asked: [setattr(reply, "text", "moo") for reply in asked.replies], "are the same"),
    ],
)
def test_no_vote_where_it_would_say_nothing(log, asked, change, said):
    change(asked)
    with pytest.raises(UserError, match=said):
        vote(log, "mei", asked, 0)
    assert not log.path.exists()


def test_the_ranking_page_goes_on_with_the_same_log(log, asked, tmp_path):
    candidates = tmp_path / "candidates.jsonl"
    candidates.write_text(json.dumps({"prompt": "Q", "candidates": ["a", "b"]}) + "\n")
    queue = Queue(load_items(candidates), log, QueueSettings(repeat_share=0))
    ticket = queue.current("mei")["ticket"]
    vote(log, "mei", asked, 0)
    take_back(log, "mei", asked)
    vote(log, "mei", asked, 0)
    assert queue.current("mei")["ticket"] == ticket and queue.summary("mei")["left"] == 1
    assert queue.undo("mei") is None


@pytest.mark.slow
def test_a_reward_model_is_trained_from_votes(log, speakers, sampling, folders, tmp_path):
    for number in range(12):
        asked = Conversation(speakers[1:]).ask(f"What does cow {number} eat?", sampling, blind=True)
        answer_round(asked)
        vote(log, "mei", asked, number % 2)
    pairs, reward = tmp_path / "out" / "preferences", tmp_path / "out" / "reward"
    made = run_script("preferences", "--output_dir", pairs, "--judgement_files", log.path, "--held_out_share", "0.3")
    assert made.returncode == 0, made.stderr
    trained = run_script(
        "reward", "--output_dir", reward, "--model_name_or_path", folders[1].partition("=")[2],
        "--data_files", pairs / "preferences_train.jsonl", "--eval_data_files", pairs / "preferences_eval.jsonl",
        "--use_cpu", "--bf16", "false", "--max_steps", "2", "--per_device_train_batch_size", "4",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert (reward / "model.safetensors").is_file()
