"""Rollouts by vLLM: what PPOTrainer asks of trl's VLLMGeneration, which a stand-in with its signature answers."""

import inspect
import math
from typing import ClassVar

import pytest
import torch
from helpers import tiny_ppo as base
from helpers.tiny_ppo import ONE, updates
from transformers import AutoModelForCausalLM
from trl import GRPOConfig

from sandan import PPOConfig
from sandan.models.rendering import pad_rows
from sandan.models.sampling import sampling_config
from sandan.ppo import trainer as ppo_trainer
from sandan.ppo import vllm_sampler as vllm
from sandan.ppo.losses import micro_batch_loss


# trl 1.13 imports `requests` there, which comes with trl[vllm].
vllm_generation = pytest.importorskip("trl.generation.vllm_generation", exc_type=ImportError)
VLLMGeneration = vllm_generation.VLLMGeneration


class StandIn:
    """Samples with `generate`, from a copy of the weights that only `sync_weights` renews, as vLLM does."""

    made: ClassVar[list] = []

    def __init__(self, *args, **kwargs):
        given = inspect.signature(VLLMGeneration.__init__).bind(self, *args, **kwargs)
        given.apply_defaults()
        vars(self).update({name: value for name, value in given.arguments.items() if name != "self"})
        self.copy, self.syncs, self.temperatures = None, 0, []
        self.made.append(self)

    def sync_weights(self):
        inspect.signature(VLLMGeneration.sync_weights).bind(self)
        self.copy = AutoModelForCausalLM.from_config(self.model.config)
        self.copy.load_state_dict(self.model.state_dict())
        self.syncs += 1

    def generate(self, *args, **kwargs):
        given = inspect.signature(VLLMGeneration.generate).bind(self, *args, **kwargs).arguments
        assert given["images"] is None
        assert given["num_generations"] == 1
        self.temperatures.append(self.temperature)
        ids, mask = pad_rows(given["prompts"])
        (stop,) = self.generation_kwargs["stop_token_ids"]
        config = sampling_config(self.processing_class, self.max_completion_length, self.temperature, [stop])
        output = self.copy.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            output_logits=True,
            return_dict_in_generate=True,
        )
        answers = output.sequences[:, ids.shape[1] :].tolist()
        logits = torch.stack(output.logits, 1) / max(self.temperature, 1e-6)
        answers = [answer[: answer.index(stop) + 1] if stop in answer else answer for answer in answers]
        logprobs = [
            [[row[step, token].item()] for step, token in enumerate(answer)]
            for row, answer in zip(logits.log_softmax(-1), answers, strict=True)
        ]
        return given["prompts"], answers, logprobs, None


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(StandIn, "made", [])
    monkeypatch.setattr(vllm, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_generation, "VLLMGeneration", StandIn)
    return StandIn.made


@pytest.fixture
def policy(tmp_path):
    base.make_policy().save_pretrained(tmp_path / "policy")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "policy")


@pytest.mark.slow
def test_a_run_samples_from_vllm_and_trains_on_policy(tiny, stand_in, policy):
    trainer = tiny(use_vllm=True, model=policy, response_length=16, eval_strategy="steps", eval_steps=2)
    trainer.train()
    (engine,) = stand_in
    # One sync for each of the two rollouts, one for the evaluation after the last; that after the first needs none.
    assert engine.syncs == 3
    assert engine.model is trainer.policy_model
    for log in updates(trainer):
        # Sampled by the weights of this update, at the temperature of the training forward: the same log-probs.
        assert log["sampling/sampling_logp_difference/max"] < 1e-4
        assert 0 < log["sampling/sampling_logp_difference/mean"] < 1e-5
    assert updates(trainer)[0]["objective/kl"] == 0
    base.assert_equal_weights(engine.copy.state_dict(), trainer.policy_model.state_dict())


def test_old_weights_in_vllm_are_seen(tiny, stand_in, policy, monkeypatch):
    trainer = tiny(use_vllm=True, model=policy, response_length=16, learning_rate=1e-2)
    sync = StandIn.sync_weights
    monkeypatch.setattr(StandIn, "sync_weights", lambda self: self.syncs or sync(self))
    trainer.train()
    first, second = (log["sampling/sampling_logp_difference/mean"] for log in updates(trainer))
    assert first < 1e-5
    assert second > 1e-3


def test_answers_of_old_weights_are_weighed(tiny, stand_in, policy, monkeypatch):
    settings = {"use_vllm": True, "response_length": 16, "learning_rate": 1e-2, "num_mini_batches": 2}
    sync = StandIn.sync_weights
    monkeypatch.setattr(StandIn, "sync_weights", lambda self: self.syncs or sync(self))
    seen, estimate = [], ppo_trainer.estimate

    def spy(*args):
        seen.append(estimate(*args))
        return seen[-1]

    monkeypatch.setattr(ppo_trainer, "estimate", spy)
    trainer = tiny(model=policy, importance_cap=1.05, **settings)
    trainer.train()
    first, second = updates(trainer)
    assert first["sampling/importance_weight/mean"] == pytest.approx(1, abs=1e-4)
    assert first["sampling/importance_weight/capped_share"] == 0
    assert 0 < second["sampling/importance_weight/capped_share"] < 1
    _, experience = seen
    weights = []
    for row, sampled in enumerate(experience.rollout.sampling_logprobs):
        for t, logprob in enumerate(sampled.tolist()):
            weights.append(min(math.exp(experience.logprobs[row, t].item() - logprob), 1.05))
            assert experience.weights[row, t].item() == pytest.approx(weights[-1], rel=1e-5)
    assert second["sampling/importance_weight/mean"] == pytest.approx(sum(weights) / len(weights), rel=1e-5)
    made = next(iter(trainer.minibatches(1, experience)))
    inputs = {name: tensor for name, tensor in made.items() if name != "old_weights"}
    old, values, entropies = made["old_logprobs"], made["old_values"], torch.zeros_like(made["old_values"])
    loss, plain = (micro_batch_loss(one, old, entropies, values, trainer.args) for one in (made, inputs))
    mask = made["old_policy_mask"]
    expected = -(made["old_advantages"] * made["old_weights"])[mask].sum()
    assert loss.sums["loss/policy_avg"].item() == pytest.approx(expected.item(), abs=1e-4)
    assert plain.sums["loss/policy_avg"].item() != pytest.approx(expected.item(), abs=1e-4)


def test_vllm_is_told_to_sample_the_bare_policy_until_the_stop_token(tiny, stand_in, policy):
    trainer = tiny(
        use_vllm=True, model=policy, stop_token_id=5, temperature=0.9, vllm_gpu_memory_utilization=0.5, **ONE
    )
    (engine,) = stand_in
    assert (engine.mode, engine.gpu_memory_utilization, engine.max_num_seqs) == ("colocate", 0.5, 8)
    assert (engine.repetition_penalty, engine.top_p, engine.top_k, engine.min_p) == (1, 1, 0, 0)
    assert (engine.max_completion_length, engine.temperature, engine.logprobs) == (8, 0.9, 0)
    assert engine.trust_remote_code is False
    assert engine.generation_kwargs == {"ignore_eos": True, "stop_token_ids": [5], "logit_bias": {0: -100.0}}
    trainer.train()
    trainer.generate_completions(sampling=True)
    assert engine.temperatures == [0.9, 0.0]


@pytest.mark.slow
def test_a_best_model_that_was_loaded_reaches_vllm(tiny, stand_in, policy):
    trainer = tiny(
        use_vllm=True,
        model=policy,
        total_episodes=24,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="objective/scores",
        greater_is_better=False,
        reward=base.share_of_w5,
        learning_rate=5e-2,
    )
    trainer.train()
    assert not trainer.state.best_model_checkpoint.endswith("checkpoint-6")
    trainer.evaluate()
    base.assert_equal_weights(stand_in[0].copy.state_dict(), trainer.policy_model.state_dict())


def test_settings_have_the_names_and_defaults_of_grpo():
    ours, theirs = PPOConfig("unused", use_cpu=True), GRPOConfig("unused", use_cpu=True, bf16=False)
    names = [name for name in vars(ours) if name == "use_vllm" or name.startswith("vllm_")]
    assert len(names) == 12
    assert {name: getattr(ours, name) for name in names} == {name: getattr(theirs, name) for name in names}
    with pytest.raises(ValueError, match="vllm_mode"):
        PPOConfig("unused", use_cpu=True, vllm_mode="remote")


def test_what_vllm_needs_is_said_at_the_start(tiny, stand_in, monkeypatch):
    with pytest.raises(ValueError, match="vLLM reads the model from its path"):
        tiny(use_vllm=True)
    monkeypatch.setattr(vllm, "is_vllm_available", lambda: False)
    with pytest.raises(ImportError, match=r"vLLM is not installed; `pip install 'trl\[vllm\]'`"):
        tiny(use_vllm=True)
