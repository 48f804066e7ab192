"""The reward model's fixed scale, and damaged answers that it sees below real ones."""

import copy
import json
import random

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from sandan.core.errors import GateError
from sandan.models.rendering import encode_answers
from sandan.models.score_scale import ScoreScale
from sandan.models.scoring import score_rows
from sandan.preference.broken_answers import DAMAGES, break_answer, broken_pairs
from sandan.reward.metrics import store_scale


ANSWERS = ["The cow eats grass.", "The frog lives in the pond.", "牛は草を食べます。", "蛙は池に住んでいます。"]
PAIRS = [
    {"prompt": f"{number}?", "chosen": ANSWERS[number % 4], "rejected": ANSWERS[(number + 1 + number // 4) % 4]}
    for number in range(12)
]
TURNS = [
    {
        "prompt": [{"role": "user", "content": pair["prompt"]}],
        **{side: [{"role": "assistant", "content": pair[side]}] for side in ("chosen", "rejected")},
    }
    for pair in PAIRS
]


@pytest.fixture
def reward_model(tiny_config):
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(0)
    return LlamaForSequenceClassification(copy.deepcopy(tiny_config)).eval()


@pytest.mark.parametrize("rows", [PAIRS, TURNS])
def test_stored_scale_gives_the_answers_of_the_pairs_mean_zero_and_deviation_one(
    rows, reward_model, tokenizer, tmp_path
):
    prompts = [row["prompt"] for row in rows]
    texts = [row["chosen"] if isinstance(row["chosen"], str) else row["chosen"][-1]["content"] for row in rows]
    ids = encode_answers(tokenizer, prompts, texts)
    raw = score_rows(reward_model, ids)
    reward_model.save_pretrained(tmp_path)
    metrics = store_scale(reward_model, tokenizer, rows, tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    scaled = score_rows(loaded, ids)
    assert scaled == pytest.approx([(s - metrics["score_mean"]) / metrics["score_deviation"] for s in raw], abs=1e-4)
    other = [row["rejected"] if isinstance(row["rejected"], str) else row["rejected"][-1]["content"] for row in rows]
    everything = {tuple(row) for row in encode_answers(tokenizer, prompts * 2, texts + other)}
    scores = torch.tensor(score_rows(loaded, sorted(everything)))
    assert scores.mean().item() == pytest.approx(0, abs=1e-4)
    assert scores.std(unbiased=False).item() == pytest.approx(1, abs=1e-4)
    # What the weights say by themselves is still a log odds.
    assert torch.equal(loaded.score.weight, reward_model.score.weight)


def test_a_reward_model_that_says_the_same_of_every_answer_is_refused(reward_model, tokenizer, tmp_path):
    torch.nn.init.zeros_(reward_model.score.weight)
    with pytest.raises(GateError, match="gives all 2 answers the same score"):
        ScoreScale.measured([0.5, 0.5])
    with pytest.raises(GateError, match="the same score"):
        store_scale(reward_model, tokenizer, PAIRS, tmp_path)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_changes_an_answer_and_uses_its_tokens(damage):
    tokens, other, rng = list(range(8)), list(range(20, 28)), random.Random(0)
    damaged = [damage(tokens, other, rng) for _ in range(50)]
    assert any(one != tokens for one in damaged)
    assert all(set(one) <= {*tokens, *other} for one in damaged)


def test_broken_pairs_have_a_real_answer_above_a_damaged_one(tokenizer):
    made = list(broken_pairs(TURNS, 1.0, tokenizer, seed=0))
    assert len(made) == len(TURNS)
    for pair in made:
        real, broken = pair["chosen"][-1]["content"], pair["rejected"][-1]["content"]
        assert real in ANSWERS
        assert broken not in ANSWERS
        assert (pair["chosen"][-1]["role"], pair["rejected"][-1]["role"]) == ("assistant", "assistant")
    assert made == list(broken_pairs(TURNS, 1.0, tokenizer, seed=0))
    assert len(list(broken_pairs(PAIRS, 0.5, tokenizer, seed=0))) == 6


def test_an_answer_that_cannot_be_damaged_makes_no_pair(tokenizer):
    assert break_answer("", "Bye", tokenizer, random.Random(0)) is None


def test_rows_keep_their_columns(tokenizer):
    rows = Dataset.from_list([{**pair, "prompt_id": "p", "annotator": "a"} for pair in PAIRS])
    (made, *_) = broken_pairs(rows.to_list(), 0.5, tokenizer, seed=1)
    assert set(made) == {"prompt", "chosen", "rejected", "prompt_id", "annotator"}


def test_config_of_a_saved_reward_model_is_plain_json(reward_model, tokenizer, tmp_path):
    reward_model.save_pretrained(tmp_path)
    store_scale(reward_model, tokenizer, PAIRS, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["score_deviation"] > 0
    assert config["architectures"] == ["LlamaForSequenceClassification"]
