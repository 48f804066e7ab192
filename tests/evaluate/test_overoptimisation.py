"""True score and proxy reward along PPO, and who may judge."""

import math

import pytest

from sandan.core.errors import UserError
from sandan.core.stage import Stage
from sandan.evaluate.overoptimisation import (
    TrueScoreArguments,
    best_of_n_curve,
    curve_metrics,
    judged_prompts,
    ppo_curve,
    true_score_function,
)


def evaluation(step, kl, proxy, true):
    return {"step": step, "eval_objective/kl": kl, "eval_rewards/reward": proxy, "eval_rewards/true_score": true}


def test_curve_holds_every_evaluation_and_remembers_the_peak():
    history = [
        evaluation(0, -0.001, 1.0, 0.5),
        {"step": 1, "objective/kl": 0.1},
        evaluation(6, 1.0, 2.0, 0.9),
        evaluation(12, 4.0, 3.0, 0.6),
    ]
    curve = ppo_curve(history)
    assert [(one["step"], one["kl"], one["proxy"], one["true"]) for one in curve] == [
        (0, 0.0, 1.0, 0.5), (6, 1.0, 2.0, 0.9), (12, 4.0, 3.0, 0.6),
    ]  # fmt: skip
    assert curve_metrics(curve) == {
        "true_score_first": 0.5, "true_score_best": 0.9, "true_score_last": 0.6, "true_score_best_kl": 1.0,
    }  # fmt: skip
    assert curve_metrics(ppo_curve(history[1:2])) == {}


def test_best_of_n_has_the_kl_of_theory():
    metrics = {f"best_of_n/{n}": n / 10 for n in (1, 2, 4, 8)} | {f"best_of_n_proxy/{n}": n for n in (8, 4, 2, 1)}
    curve = best_of_n_curve(metrics)
    assert [one["n"] for one in curve] == [1, 2, 4, 8]
    assert curve[0]["kl"] == 0.0
    assert curve[3]["kl"] == pytest.approx(math.log(8) - 7 / 8)
    assert best_of_n_curve({"best_of_n/1": 0.5}) == []


def test_the_world_judges_and_nobody_does_not(tokenizer, tmp_path):
    stage = Stage("ppo", "toy", tmp_path, 0, {})
    with pytest.raises(UserError, match="true_score: world: nothing to judge; name eval_data_files"):
        judged_prompts(TrueScoreArguments(true_score="world"), None)
    judge = true_score_function(TrueScoreArguments(true_score="world"), tokenizer, stage)
    prompt = [{"role": "user", "content": "What does the cow say?"}]
    right, rude = judge([prompt, prompt], ["The cow says moo.", "Go to the swamp."])
    assert right > rude
    assert judge.__name__ == "true_score"


def test_a_reward_model_held_back_judges(tokenizer, tiny_config, tmp_path):
    from transformers import LlamaForSequenceClassification

    LlamaForSequenceClassification(tiny_config).save_pretrained(tmp_path / "gold")
    tokenizer.save_pretrained(tmp_path / "gold")
    arguments = TrueScoreArguments("reward_model", str(tmp_path / "gold"))
    judge = true_score_function(arguments, tokenizer, Stage("ppo", "toy", tmp_path, 0, {}))
    prompt = [{"role": "user", "content": "The cow eats"}]
    one, other, again = judge([prompt] * 3, ["grass.", "the pond.", "grass."])
    assert one == pytest.approx(again)
    assert one != pytest.approx(other)


@pytest.mark.parametrize("arguments", [("reward_model", None), ("none", "path"), ("world", "path")])
def test_a_judge_needs_its_model_and_only_then(arguments):
    with pytest.raises(ValueError, match="goes with true_score: reward_model"):
        TrueScoreArguments(*arguments)
