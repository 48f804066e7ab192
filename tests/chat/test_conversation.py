"""What each model reads and says: its own answers, streamed, decided by the seed alone."""

from dataclasses import replace

import pytest
import torch

from sandan.chat.conversation import Conversation, answer_round
from sandan.chat.speakers import Sampling, load_speakers
from sandan.core.errors import UserError
from sandan.models.rendering import encode_prompts
from sandan.models.sampling import sample_completions, stream_completion


QUESTION = "What does the cow eat?"


def test_an_answer_streams_and_ends_as_the_other_stages_sample_it(model, tokenizer):
    shown = []
    turns = [{"role": "user", "content": QUESTION}]
    streamed = stream_completion(model, tokenizer, turns, 12, 0, 0, shown.append)
    (sampled,), = sample_completions(model, tokenizer, [turns], 12, temperature=0)  # fmt: skip
    assert streamed == sampled and shown[-1] == streamed.text
    assert len(shown) == len(streamed.token_ids) + 1
    assert all("\ufffd" not in text[-1:] for text in shown[:-1])


def test_the_noise_of_a_stream_samples_the_softmax(model, tokenizer):
    turns = [{"role": "user", "content": QUESTION}]
    with torch.no_grad():
        ids = torch.tensor(encode_prompts(tokenizer, [turns]))
        expected = (model(ids).logits[0, -1] / 0.8).softmax(-1)
    expected[tokenizer.pad_token_id] = 0
    drawn = [stream_completion(model, tokenizer, turns, 1, 0.8, seed, len).token_ids[0] for seed in range(200)]
    found = torch.bincount(torch.tensor(drawn), minlength=len(expected)) / len(drawn)
    likely = expected.topk(5).indices
    assert (found[likely] - (expected / expected.sum())[likely]).abs().max() < 0.1


def test_the_seed_alone_decides_an_answer(speakers, sampling):
    def ask(names, chosen):
        talk = Conversation([speaker for speaker in speakers if speaker.name in names])
        asked = talk.ask(QUESTION, chosen, blind=False)
        answer_round(asked)
        return {reply.speaker.name: reply.text for reply in asked.replies}

    everyone = ask(["base", "sft", "ppo"], sampling)
    assert ask(["ppo"], sampling)["ppo"] == everyone["ppo"]
    assert ask(["ppo"], replace(sampling, seed=1))["ppo"] != everyone["ppo"]


def test_each_model_keeps_its_own_answers(speakers, sampling):
    talk = Conversation(speakers)
    first = talk.ask(QUESTION, sampling, blind=False)
    answer_round(first)
    second = talk.ask("And the frog?", sampling, blind=True)
    for reply in second.replies:
        own = next(earlier for earlier in first.replies if earlier.speaker is reply.speaker)
        assert [turn["content"] for turn in reply.turns] == [QUESTION, own.text, "And the frog?"]
    base = next(reply for reply in second.replies if not reply.speaker.chats)
    assert base.speaker.prompt(base.turns).startswith(f"\n\nHuman: {QUESTION}\n\nAssistant: ")


def test_a_base_model_without_a_chat_template_continues_the_text(speakers, sampling):
    asked = Conversation(speakers[:1]).ask(QUESTION, sampling, blind=False)
    assert asked.prompt() == QUESTION


def test_old_turns_go_when_a_model_has_no_positions_for_them(speakers, sampling):
    talk = Conversation(speakers)
    for _ in range(12):
        answer_round(talk.ask(QUESTION, sampling, blind=False))
    with pytest.raises(UserError, match=r"^base: the question is too long; it reads 120 tokens$"):
        answer_round(talk.ask(QUESTION * 40, sampling, blind=False))


def test_an_answer_can_be_stopped(speakers, sampling):
    asked = Conversation(speakers).ask(QUESTION, replace(sampling, max_new_tokens=60), blind=False)
    places = []

    def stop_after_two(place, text):
        places.append(place)
        asked.is_stopped = len(places) >= 2

    answer_round(asked, stop_after_two)
    assert set(places) == {0} and asked.is_complete and asked.obstacle() == "incomplete"


def test_names_are_hidden_until_the_vote(speakers, sampling):
    asked = Conversation(speakers).ask(QUESTION, sampling, blind=True)
    assert [asked.label(place) for place in range(3)] == ["A", "B", "C"]
    answer_round(asked)
    assert asked.label(0) == "A"
    asked.best = 0
    assert {asked.label(place) for place in range(3)} == {"base", "sft", "ppo"}


@pytest.mark.parametrize(
    "models, said",
    [
        ([], "models: 0; give 1 to 4"),
        (["a"] * 5, "models: 5; give 1 to 4"),
        (["x/sft", "y/sft"], "models: sft: two models have this name"),
        (["=x"], "models: '=x': expected NAME=FOLDER or FOLDER"),
        (["a=./nothing"], "./nothing: models: no such folder"),
        (["outputs/tiny/sfd"], "outputs/tiny/sfd: models: no such folder; run `make sfd RECIPE=tiny` first"),
    ],
)
def test_models_that_are_none_are_named(models, said):
    with pytest.raises(UserError, match=said.replace("?", r"\?")):
        load_speakers(models)


@pytest.mark.parametrize("values", [(0, 1, 0), (1, -1, 0), (1, float("nan"), 0), (1, 1, -1)])
def test_sampling_that_is_none_is_refused(values):
    with pytest.raises(UserError):
        Sampling(*values)
