"""PPOTrainer on a two-layer Llama: what it must learn, count, save and refuse.

`T1` ... `T26` are the defects of TRL 1.12 that docs/ppo.md lists.
"""

import copy
import json
import logging
import math
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers.scripts import run_on_two_ranks
from helpers.tiny_ppo import (
    ONE,
    SIZES,
    TEMPLATE,
    FixedAnswers,
    assert_equal_weights,
    make_classifier,
    make_dataset,
    make_policy,
    make_tokenizer,
    share_of_w5,
    updates,
    weights,
)
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from sandan import PPOConfig, PPOTrainer
from sandan.models.sampling import Completion
from sandan.ppo.policy_and_value import token_logprobs
from sandan.ppo.rollout import Rollout, prompt_indices


def spy_on_steps(trainer):
    """A list that gets the total gradient norm at every step of the raw optimizer."""
    optimizer, norms = trainer.create_optimizer(), []
    step = optimizer.step

    def counted(*args, **kwargs):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())
        return step(*args, **kwargs)

    optimizer.step = counted
    return norms


# ---- Optimizer steps and their gradients ----


@pytest.mark.parametrize("minibatches", [1, 2, 4])
def test_steps_are_updates_times_epochs_times_minibatches(tiny, minibatches):  # T1, T2
    trainer = tiny(num_mini_batches=minibatches)
    norms = spy_on_steps(trainer)
    output = trainer.train()
    assert len(norms) == output.global_step == 2 * 2 * minibatches  # T26: a TrainOutput
    assert updates(trainer)[-1]["val/ratio"] == pytest.approx(1, abs=0.05)
    assert updates(trainer)[-1]["episode"] == 16


@pytest.mark.parametrize("rows", [64, 16, 8])
def test_steps_do_not_depend_on_the_size_of_the_dataset(tiny, rows):  # T3
    trainer = tiny(rows=rows)
    norms = spy_on_steps(trainer)
    trainer.train()
    assert len(norms) == 4


def test_a_minibatch_may_cut_through_the_device_batch(tiny):
    trainer = tiny(per_device_train_batch_size=8, gradient_accumulation_steps=1, num_mini_batches=2)
    norms = spy_on_steps(trainer)
    trainer.train()
    assert len(norms) == 8
    with pytest.raises(ValueError, match="8 episodes per device .* cannot be cut into 3"):
        tiny(num_mini_batches=3)


def test_the_first_minibatch_has_ratio_1_and_no_kl(tiny):
    trainer = tiny(**ONE)
    trainer.train()
    (log,) = updates(trainer)
    assert (log["val/ratio"], log["policy/approxkl_avg"], log["objective/kl"], log["val/ratio_var"]) == (1, 0, 0, 0)


def test_dropout_is_off_where_a_model_keeps_it_as_a_number_too(tiny):
    dropout = {"attention_dropout": 0.5}
    trainer = tiny(model=make_policy(**dropout), reward=make_classifier(**dropout), **ONE)
    trainer.train()
    (log,) = updates(trainer)
    assert (log["val/ratio"], log["policy/approxkl_avg"], log["val/clipfrac_avg"]) == (1, 0, 0)
    assert trainer.policy_model.config.attention_dropout == 0.5


def test_generation_settings_of_the_model_do_not_leak(tiny):  # T13
    trainer = tiny(gen={"repetition_penalty": 1.3, "min_new_tokens": 8}, **ONE)
    plain = tiny(**ONE)
    trainer.train()
    plain.train()
    assert updates(trainer)[0]["objective/entropy"] == updates(plain)[0]["objective/entropy"]
    assert updates(trainer)[0]["objective/kl"] == 0
    assert trainer.policy_model.generation_config.repetition_penalty == 1.3


@pytest.mark.slow
def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(tiny):  # T16
    gradients = []
    for rows, accumulation in ((8, 1), (2, 4), (1, 8)):
        trainer = tiny(
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulation,
            response_length=64,
            entropy_coef=0.01,
            max_grad_norm=0,
            **ONE,
        )
        optimizer = trainer.create_optimizer()
        optimizer.step = lambda *args, **kwargs: None
        optimizer.zero_grad = lambda *args, **kwargs: None
        trainer.model.zero_grad = lambda *args, **kwargs: None
        trainer.train()
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
        assert updates(trainer)[0]["loss"] == pytest.approx(
            updates(trainer)[0]["loss/policy_avg"]
            + 0.1 * updates(trainer)[0]["loss/value_avg"]
            - 0.01 * updates(trainer)[0]["policy/entropy_avg"],
            abs=1e-6,
        )
    for other in gradients[1:]:
        assert (gradients[0] - other).norm() < 1e-5 * gradients[0].norm()


@pytest.mark.slow
def test_metrics_do_not_depend_on_how_the_batch_is_cut(tiny):  # T2
    logs = []
    for rows, accumulation, minibatches in ((8, 1, 1), (8, 1, 4), (2, 4, 1), (2, 4, 2), (1, 8, 8)):
        trainer = tiny(
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulation,
            num_mini_batches=minibatches,
            response_length=32,
            learning_rate=1e-20,  # the same policy in every step
            logging_steps=2 * minibatches,
        )
        trainer.train()
        assert trainer.state.global_step == 2 * 2 * minibatches
        logs.append(
            [
                {name: value for name, value in log.items() if re.match("objective/|policy/|loss/|val/|episode", name)}
                for log in updates(trainer)
            ]
        )
    assert len(logs[0]) == 2
    assert len(logs[0][0]) > 20
    for other in logs[1:]:
        for first, second in zip(logs[0], other, strict=True):
            assert first == pytest.approx(second, rel=1e-5, abs=1e-6)


@pytest.mark.slow
def test_gradients_are_clipped(tiny):  # T10
    trainer = tiny(max_grad_norm=1e-6)
    norms = spy_on_steps(trainer)
    trainer.train()
    assert max(norms) <= 1.01e-6


@pytest.mark.slow
def test_runs_are_reproducible_and_seeds_matter(tiny):  # T6
    finals = []
    for seed in (1, 1, 2):
        trainer = tiny(seed=seed, num_mini_batches=2)
        trainer.train()
        finals.append(weights(trainer))
    assert_equal_weights(finals[0], finals[1])
    assert not torch.equal(finals[0]["policy.lm_head.weight"], finals[2]["policy.lm_head.weight"])


def test_mixed_precision_and_checkpointing_are_used(tiny):  # T4, T5
    trainer = tiny(bf16=True, gradient_checkpointing=True, **ONE)
    trainer.train()
    assert trainer.accelerator.mixed_precision == "bf16"
    assert trainer.policy_model.model.gradient_checkpointing
    assert trainer.value_model.model.gradient_checkpointing
    assert updates(trainer)[0]["objective/kl"] == 0
    assert updates(trainer)[0]["val/ratio"] == 1


@pytest.mark.slow
def test_activation_checkpointing_does_not_change_the_result(tiny):
    finals = []
    for checkpointing in (False, True):
        trainer = tiny(gradient_checkpointing=checkpointing)
        trainer.train()
        finals.append(weights(trainer))
    assert_equal_weights(*finals)


@pytest.mark.slow
def test_two_ranks_make_the_run_of_one(tmp_path):
    train_on_fixed_answers(tmp_path / "one", accumulation=4)
    done = run_on_two_ranks(__file__, tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / name / "logs.json").read_text()) for name in ("one", "two"))
    timed = {name for log in one for name in log if name == "eps" or name.startswith("time/")}
    assert len(one) == len(two) == 3
    for first, second in zip(one, two, strict=True):
        assert {name: first[name] for name in first if name not in timed} == pytest.approx(
            {name: second[name] for name in second if name not in timed}, rel=1e-3, abs=1e-5
        )


def train_on_fixed_answers(folder, accumulation):
    """A run that every number of ranks makes alike; writes its logs."""
    trainer = FixedAnswers(
        make_policy(),
        make_classifier(),
        PPOConfig(
            str(folder),
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulation,
            total_episodes=24,
            num_ppo_epochs=2,
            response_length=8,
            num_sample_generations=0,
            logging_steps=2,
            learning_rate=1e-3,
            whiten_rewards=True,
            entropy_coef=0.01,
            target_kl=1.0,
            scale_scores=True,
            length_penalty=0.01,
            critic_learning_rate=2e-3,
            policy_ema_decay=0.9,
            max_approx_kl=1.0,
            disable_tqdm=True,
        ),
        train_dataset=make_dataset(),
        processing_class=make_tokenizer(),
    )
    trainer.train()
    if trainer.accelerator.is_main_process:
        (folder / "logs.json").write_text(json.dumps(updates(trainer)))


# ---- Learning ----


@pytest.mark.slow
def test_it_learns_what_the_reward_asks_for(tiny):
    trainer = tiny(
        reward=share_of_w5,
        per_device_train_batch_size=32,
        gradient_accumulation_steps=1,
        total_episodes=32 * 20,
        learning_rate=5e-3,
        kl_coef=0.01,
    )
    trainer.train()
    scores = [entry["objective/scores"] for entry in updates(trainer)]
    assert scores[0] < 0.05
    assert scores[-1] > 0.25
    assert updates(trainer)[-1]["val/explained_variance"] > 0
    assert updates(trainer)[-1]["objective/kl"] > 1


@pytest.mark.slow
def test_a_kl_penalty_keeps_the_policy_near_the_reference(tiny):
    def final_kl(coefficient):
        trainer = tiny(
            reward=share_of_w5,
            per_device_train_batch_size=32,
            gradient_accumulation_steps=1,
            total_episodes=32 * 8,
            learning_rate=5e-3,
            kl_coef=coefficient,
        )
        trainer.train()
        return updates(trainer)[-1]["objective/kl"]

    assert final_kl(1.0) < final_kl(0.001) / 2


def test_adapters_are_trained_and_switched_off_for_the_reference(tiny):
    trainer = tiny(trainer={"peft_config": LoraConfig(task_type="CAUSAL_LM")}, num_ppo_epochs=4, learning_rate=1e-2)
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    changed = {name for name in before if name.startswith("policy.") and not torch.equal(before[name], after[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert trainer.ref_model is None
    assert updates(trainer)[0]["objective/kl"] == 0
    assert updates(trainer)[-1]["objective/kl"] != 0


# ---- Tokens, masks, padding ----


def test_a_pad_id_outside_the_vocabulary_is_safe(tiny):
    policy, reward = make_policy(vocab_size=64), share_of_w5
    trainer = tiny(model=policy, reward=reward, response_length=64, **ONE)
    trainer.processing_class.add_special_tokens({"pad_token": "[NEWPAD]"})
    assert trainer.processing_class.pad_token_id == 64
    trainer.train()
    assert updates(trainer)[0]["val/ratio"] == 1


def test_a_sampled_pad_token_cannot_end_an_answer(tiny):  # T17
    policy = make_policy()
    with torch.no_grad():
        policy.lm_head.weight[0] *= 50  # the pad token, which an unguarded policy would now write all the time
    trainer = tiny(model=policy, response_length=64, **ONE)
    rollout = trainer.sample([trainer.train_dataset[index] for index in range(8)], seed=0)
    assert not any(0 in completion.token_ids for completion in rollout.completions)
    for completion in rollout.completions:
        assert completion.stopped == (completion.token_ids[-1] == 1)
        assert completion.stopped or len(completion.token_ids) == 64


@pytest.mark.parametrize("config", [LlamaConfig(**SIZES), GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2)])
def test_padding_does_not_change_log_probs(config):
    torch.manual_seed(0)
    model = (LlamaForCausalLM if isinstance(config, LlamaConfig) else GPT2LMHeadModel)(config).eval()
    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9, 10, 11, 12, 13]}]
    completions = [Completion("", (20, 21, 22, 23, 1), True), Completion("", (30, 1), True)]
    batch = Rollout(rows, completions)
    together, _ = token_logprobs(model, **batch.tensors([0, 1], 8, "cpu"), temperature=0.7)
    for index, completion in enumerate(completions):
        ids = rows[index]["input_ids"]
        alone = model(torch.tensor([ids + list(completion.token_ids)])).logits[0, len(ids) - 1 : -1] / 0.7
        expected = alone.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert torch.allclose(together[index, : len(completion.token_ids)], expected, atol=1e-5)


def test_padding_side_and_pads_in_the_data_do_not_matter(tiny):  # T24
    padded = Dataset.from_dict({"input_ids": [ids + [0, 0] for ids in make_dataset()["input_ids"]]})
    finals = []
    for side, dataset in (("left", make_dataset()), ("right", padded)):
        trainer = tiny(side=side, dataset=dataset)
        trainer.train()
        finals.append(weights(trainer))
    assert_equal_weights(*finals)


@pytest.mark.slow
def test_any_pad_id_gives_the_same_losses(tiny):
    logs = []
    for pad in (0, 1, 2, 64):  # T14: 1 is EOS too; the last lies outside the vocabulary
        trainer = tiny(reward=share_of_w5, trainer_class=FixedAnswers)
        if pad == 64:
            trainer.processing_class.add_special_tokens({"pad_token": "[NEWPAD]"})
        else:
            trainer.processing_class.pad_token = trainer.processing_class.convert_ids_to_tokens(pad)
        assert trainer.processing_class.pad_token_id == pad
        trainer.train()
        logs.append([(log["loss"], log["grad_norm"], log["objective/kl"]) for log in updates(trainer)])
    assert logs[0] == logs[1] == logs[2] == logs[3]


def test_an_answer_that_stops_at_once_is_trained_on(tiny):
    policy = make_policy(tie_word_embeddings=False)
    with torch.no_grad():
        policy.lm_head.weight[:] = 0  # any token is as likely as another, but for a bias on the stop token
    policy.lm_head.bias = torch.nn.Parameter(100 * torch.eye(64)[1])
    seen = []

    def reward(prompts, completions):
        seen.extend(completions)
        return [float(index) for index in range(len(completions))]

    trainer = tiny(model=policy, reward=reward, missing_eos_penalty=1.0)
    trainer.train()
    assert set(seen) == {""}
    for log in updates(trainer):
        assert (log["val/response_tokens"], log["val/stopped_share"]) == (1, 1)
        assert log["objective/scores"] == log["objective/scores_before_penalty"] == 3.5
        assert all(math.isfinite(value) for value in log.values())
        assert log["grad_norm"] > 0


def test_eos_stops_by_default_and_another_stop_token_can(tiny):  # T21, T22
    for kwargs, stop in (({}, 1), ({"stop_token": "eos"}, 1), ({"stop_token_id": 5}, 5)):
        trainer = tiny(response_length=64, **kwargs)
        rollout = trainer.sample([trainer.train_dataset[index] for index in range(8)], seed=0)
        assert any(completion.stopped for completion in rollout.completions)
        assert all(stop not in completion.token_ids[:-1] for completion in rollout.completions)
    with pytest.raises(ValueError, match="exclude each other"):
        tiny(stop_token="eos", stop_token_id=0)


@pytest.mark.slow
def test_the_penalty_is_for_answers_without_the_stop_token(tiny):  # T15, T27
    for mode in ("subtract", "replace"):
        trainer = tiny(
            stop_token_id=5, missing_eos_penalty=1.0, missing_eos_penalty_mode=mode, response_length=32, **ONE
        )
        stopped, scores = torch.tensor([True, False]), torch.tensor([0.25, 0.25])
        before, after = trainer.score_shaping.shape(scores, stopped)
        assert before.tolist() == [0.25, 0.25]
        assert after.tolist() == [0.25, -0.75 if mode == "subtract" else -1.0]
        trainer.train()
        (log,) = updates(trainer)
        if mode == "subtract":
            lost = log["objective/scores_before_penalty"] - log["objective/scores"]
            assert lost == pytest.approx(1 - log["val/stopped_share"], abs=1e-6)
            assert log["val/num_eos_tokens"] == 8 * log["val/stopped_share"]


@pytest.mark.slow
def test_whitened_rewards_need_no_eight_rows(tiny):  # T23
    trainer = tiny(whiten_rewards=True, gradient_accumulation_steps=2)
    trainer.train()
    assert math.isfinite(updates(trainer)[-1]["loss"])
    with pytest.raises(ValueError, match="at least 2 tokens"):
        tiny(per_device_train_batch_size=1, gradient_accumulation_steps=1, response_length=1, total_episodes=1).train()


# ---- Data ----


def test_too_few_rows_are_one_error_with_both_numbers(tiny):  # T9
    with pytest.raises(ValueError, match="4 prompts, but one update takes 8"):
        tiny(rows=4)


def test_text_prompts_and_conversations_are_the_same_prompts(tiny, tmp_path):  # T20
    text = ["w1 w2", "w3 w4 w5"] * 8
    tokenizer_free = Dataset.from_dict({"input_ids": [[4, 5], [6, 7, 8]] * 8})
    finals = []
    for dataset in (Dataset.from_dict({"prompt": text}), tokenizer_free):
        trainer = tiny(dataset=dataset)
        trainer.train()
        finals.append(weights(trainer))
    assert_equal_weights(*finals)

    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    conversations = Dataset.from_dict({"prompt": [[{"role": "w9", "content": "w1 w2"}]] * 16})
    trainer = PPOTrainer(
        make_policy(),
        share_of_w5,
        PPOConfig(str(tmp_path), use_cpu=True, report_to="none", save_strategy="no"),
        train_dataset=conversations,
        processing_class=tokenizer,
    )
    assert trainer.train_dataset[0]["input_ids"] == [12, 4, 5]


def test_long_prompts_are_dropped_counted_and_reported(tiny, caplog):
    with caplog.at_level(logging.WARNING, logger="sandan"):
        trainer = tiny(max_prompt_tokens=5)
    assert len(trainer.train_dataset) == 43
    assert "train_dataset: 21 of 64 prompts dropped: longer than max_prompt_tokens=5" in caplog.text
    with pytest.raises(ValueError, match="train_dataset: 0 prompts, but one update takes 8"):
        tiny(max_prompt_tokens=3)


def test_data_that_cannot_be_used_is_refused(tiny):
    with pytest.raises(ValueError, match="'prompt' or 'input_ids', found"):
        tiny(dataset=Dataset.from_dict({"text": ["w1"] * 16}))
    with pytest.raises(ValueError, match="no tokens"):
        tiny(dataset=Dataset.from_dict({"prompt": ["w1"] * 15 + [""]}))
    with pytest.raises(TypeError, match="not streamed"):
        tiny(dataset=make_dataset().to_iterable_dataset())


def test_every_pass_over_the_data_takes_every_prompt_once():
    taken = [index for update in range(5) for index in prompt_indices(update, batch_size=6, rows=10, seed=3)]
    assert [sorted(taken[start : start + 10]) for start in (0, 10, 20)] == [list(range(10))] * 3
    assert taken[:10] != taken[10:20]


# ---- Rewards ----


def test_rewards_of_every_kind_are_weighted_and_logged(tiny, tmp_path):  # T19
    make_classifier(seed=3).save_pretrained(tmp_path / "judge")

    def by_column(prompts, completions, topic):
        assert len(topic) == len(prompts) == 8
        return [float(one) for one in topic]

    dataset = make_dataset().add_column("topic", [index % 2 for index in range(64)])
    dataset = dataset.add_column("unused", ["x"] * 64)
    trainer = tiny(
        dataset=dataset,
        reward=[str(tmp_path / "judge"), make_classifier(seed=4), by_column, lambda prompts, completions: [1.0] * 8],
        reward_weights=[1.0, 2.0, 3.0, 4.0],
        **ONE,
    )
    trainer.train()
    (log,) = updates(trainer)
    names = ["judge", "LlamaForSequenceClassification", "by_column", "<lambda>"]
    expected = sum(weight * log[f"rewards/{name}"] for weight, name in zip((1, 2, 3, 4), names, strict=True))
    assert log["objective/scores"] == pytest.approx(expected, abs=1e-5)
    assert trainer.reward_model is trainer.rewards[0].model


def test_a_model_reward_scores_each_row_as_if_alone(tiny):
    trainer, reward = tiny(), make_classifier()
    rollout = trainer.sample([trainer.train_dataset[index] for index in range(6)], seed=0)
    scores = trainer.score(rollout)[:, 0]
    for row, completion, score in zip(rollout.rows, rollout.completions, scores, strict=True):
        alone = reward(torch.tensor([row["input_ids"] + list(completion.token_ids)])).logits.item()
        assert score.item() == pytest.approx(alone, abs=1e-5)


def test_a_reward_model_with_another_tokenizer_reads_text(tiny):
    other = make_tokenizer()
    reward = make_classifier()
    # The prompts end in the separator: their text and that of the answers meet there.
    dataset = Dataset.from_dict({"prompt": ["w1 w2 ", "w3 w4 w5 "] * 8})
    same, text = (
        tiny(reward=reward, dataset=dataset, trainer={"reward_processing_classes": reader}) for reader in (None, other)
    )
    rollout = same.sample([same.train_dataset[index] for index in range(6)], seed=0)
    assert torch.allclose(same.score(rollout), text.score(rollout), atol=1e-5)
    assert text.value_model.score.weight.abs().sum() == 0  # not from a model that reads other tokens


def test_a_failing_reward_function_is_one_error_with_its_cause(tiny):
    def broken(prompts, completions):
        raise KeyError("topic")

    with pytest.raises(
        ValueError, match=r"step 1 \(update 1\): reward broken: raised KeyError: 'topic' on 8"
    ) as caught:
        tiny(reward=broken, **ONE).train()
    assert isinstance(caught.value.__cause__.__cause__, KeyError)
    with pytest.raises(ValueError, match=r"reward <lambda>: row 7: expected a number, found None for the prompt 'w"):
        tiny(reward=lambda prompts, completions: [0.0] * 7 + [None], **ONE).train()


def test_bad_rewards_are_named(tiny):
    with pytest.raises(ValueError, match="returned 1 scores for 8 completions"):
        tiny(reward=lambda prompts, completions: [0.0], **ONE).train()
    with pytest.raises(ValueError, match=r"reward .*: nan for the prompt 'w"):
        tiny(reward=lambda prompts, completions: [0.0] * 7 + [math.nan], **ONE).train()
    with pytest.raises(ValueError, match="reward_weights: 2 for 1"):
        tiny(reward_weights=[1.0, 2.0])


def test_centred_and_clipped_rewards(tiny):
    trainer = tiny(reward=lambda prompts, completions: list(range(100, 108)), center_rewards=True, score_clip=2.0)
    trainer.train()
    assert trainer.score_shaping.center == pytest.approx(103.5)
    assert updates(trainer)[0]["objective/scores"] == pytest.approx(0)
    shaped, _ = trainer.score_shaping.shape(torch.tensor([0.0, 103.0, 999.0]), torch.tensor([True] * 3))
    assert shaped.tolist() == [-2.0, -0.5, 2.0]


@pytest.mark.parametrize("centred", [True, False])
def test_the_critic_is_centred_with_the_rewards(tiny, centred):
    def first_losses(bias):
        critic = make_classifier(2)
        critic.score = torch.nn.Linear(32, 1)
        torch.nn.init.normal_(critic.score.weight, generator=torch.Generator().manual_seed(0))
        torch.nn.init.constant_(critic.score.bias, bias)
        trainer = tiny(trainer={"value_model": critic}, center_rewards=centred, **ONE)
        trainer.train()
        return [updates(trainer)[0][name] for name in ("loss/policy_avg", "loss/value_avg", "val/explained_variance")]

    assert (first_losses(0.0) == pytest.approx(first_losses(7.0), rel=1e-4, abs=1e-6)) == centred


def test_the_critic_starts_from_the_reward_model_or_from_the_policy(tiny):
    trainer = tiny()
    for name, tensor in make_classifier().state_dict().items():
        assert torch.equal(trainer.value_model.state_dict()[name], tensor)
    trainer = tiny(reward=share_of_w5)
    for name, tensor in make_policy().model.state_dict().items():
        assert torch.equal(trainer.value_model.model.state_dict()[name], tensor)
    assert trainer.value_model.score.weight.abs().sum() == 0


def test_models_that_would_train_the_frozen_ones_are_refused(tiny):
    policy, reward = make_policy(), make_classifier()
    with pytest.raises(ValueError, match="ref_model is the policy itself"):
        tiny(model=policy, trainer={"ref_model": policy})
    with pytest.raises(ValueError, match="value_model is the reward model itself"):
        tiny(reward=reward, trainer={"value_model": reward})
    trainer = tiny(model=policy, reward=reward)
    before = copy.deepcopy(trainer.ref_model.state_dict()), copy.deepcopy(reward.state_dict())
    trainer.train()
    assert_equal_weights(before[0], trainer.ref_model.state_dict())
    assert_equal_weights(before[1], reward.state_dict())


def test_trl_keyword_names_work(tmp_path):
    classifier = make_classifier()
    trainer = PPOTrainer(
        args=PPOConfig(str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", batch_size=3, world_size=7),
        processing_class=make_tokenizer(),
        model=make_policy(),
        ref_model=None,
        reward_model=classifier,
        value_model=make_classifier(),
        train_dataset=make_dataset(),
    )
    assert trainer.reward_model is classifier
    assert (trainer.args.batch_size, trainer.args.world_size) == (8, 1)
    with pytest.raises(ValueError, match="reward_funcs"):
        PPOTrainer(make_policy(), args=PPOConfig(str(tmp_path), use_cpu=True), processing_class=make_tokenizer())


# ---- KL controller, metrics, evaluation ----


def test_adaptive_kl_follows_its_target(tiny):
    trainer = tiny(target_kl=50.0, kl_horizon=8, kl_coef=0.1)
    trainer.train()
    coefficients = [entry["objective/kl_coef"] for entry in updates(trainer)[1::2]]
    assert trainer.kl_coef == pytest.approx(0.1 * 0.8 * 0.8)
    assert coefficients == sorted(coefficients, reverse=True)


def test_metrics_of_an_update_are_logged_once(tiny):  # T2, T11
    trainer = tiny(num_mini_batches=2, logging_steps=3)
    trainer.train()
    first = updates(trainer)[0]
    assert [entry["step"] for entry in updates(trainer)] == [4, 8]  # 3 and 6 fall inside an update
    assert isinstance(first["eps"], float)
    assert first["eps"] > 0
    assert first["epoch"] == 8 / 64
    wanted = [
        "time/rollout_seconds",
        "time/reward_seconds",
        "time/forward_seconds",
        "time/update_seconds",
        "time/tokens_per_second",
        "val/response_tokens",
        "val/repeated_share",
        "val/stopped_share",
        "grad_norm",
        "lr",
    ]
    assert set(wanted) < set(first)


def test_evaluation_answers_every_prompt(tiny):  # T8, T25
    trainer = tiny(rows=12, eval_strategy="steps", eval_steps=1)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_objective/scores" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    few = trainer.evaluate(Dataset.from_dict({"prompt": ["w1 w2 w3"] * 3}), metric_key_prefix="few")
    assert few["few_val/response_tokens"] <= 8
    assert {"few_objective/kl", "few_val/stopped_share", "few_rewards/LlamaForSequenceClassification"} < set(few)
    assert trainer.evaluate()["eval_objective/scores"] == trainer.evaluate()["eval_objective/scores"]


def test_samples_are_logged_and_returned(tiny, caplog):
    trainer = tiny(num_sample_generations=2, reward=share_of_w5)
    with caplog.at_level(logging.INFO, logger="sandan"):
        trainer.train()
    assert caplog.text.count("samples at step") == 2
    header, *rows = caplog.records[-1].getMessage().splitlines()[1:]
    assert header.split() == ["score", "tokens", "ended", "prompt", "answer"]
    assert len(rows) == 4
    assert {re.search("yes|no", row).start() for row in rows} == {header.index("ended")}
    samples = trainer.generate_completions(sampling=True)
    assert [set(sample) for sample in samples] == [{"prompt", "completion", "score"}] * 8


# ---- Checkpoints ----


def test_saved_folders_load_with_from_pretrained(tiny, tmp_path):
    trainer = tiny(stop_token_id=5, gen={"repetition_penalty": 1.3})
    trainer.train()
    trainer.save_model(tmp_path / "out")
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    critic = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "value_model")
    assert_equal_weights(policy.state_dict(), trainer.policy_model.state_dict())
    assert_equal_weights(critic.state_dict(), trainer.value_model.state_dict())
    assert policy.generation_config.eos_token_id == [5, 1]
    assert policy.generation_config.pad_token_id == 0
    assert policy.generation_config.repetition_penalty == 1.3
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "out").pad_token == "[PAD]"
    assert not list((tmp_path / "out").rglob("*.bin"))  # a pickle with `hub_token` in clear


class StopAfter(TrainerCallback):
    """Asks to stop and save at a step, as a signal handler does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one(tiny, tmp_path, adapters):  # T7
    def make(**kwargs):
        extra = {"peft_config": LoraConfig(task_type="CAUSAL_LM", init_lora_weights=True)} if adapters else {}
        torch.manual_seed(5)
        return tiny(
            rows=12,
            total_episodes=40,
            num_mini_batches=2,
            save_strategy="steps",
            target_kl=1.0,
            center_rewards=True,
            trainer=extra | kwargs,
        )

    whole = make()
    whole.train()
    folder = tmp_path / "run"
    first = weights(whole)
    stopped = make(callbacks=[StopAfter(6)])
    stopped.train()
    # Step 6 is inside the second update (4 steps each): the checkpoint waits for the update's end.
    assert stopped.state.global_step == 8
    checkpoint = folder / "checkpoint-8"
    assert load_file(checkpoint / "value_model" / "model.safetensors")
    state = json.loads((checkpoint / "ppo_state.json").read_text())
    assert set(state) == {"kl_coef", "reward_center", "value_center", "logged_loss"}
    resumed = make()
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_equal_weights(first, weights(resumed))
    assert resumed.state.global_step == 20
    for name in ("objective/kl", "objective/kl_coef", "objective/scores", "loss", "epoch", "episode"):
        assert [entry[name] for entry in updates(whole)] == [entry[name] for entry in updates(resumed)]


def test_the_epoch_strategy_means_passes_over_the_data(tiny, tmp_path):
    trainer = tiny(rows=12, total_episodes=40, save_strategy="epoch")  # 5 updates of 8 episodes: 3.3 passes
    trainer.train()
    saved = sorted(int(folder.name.split("-")[1]) for folder in (tmp_path / "run").glob("checkpoint-*"))
    assert saved == [4, 6, 10]  # the updates in which passes 1, 2 and 3 end (two steps each); the last is the end


@pytest.mark.slow
def test_the_best_model_is_loaded_and_kept(tiny, tmp_path):
    # What improves here is the other way round: the first of the three checkpoints is the best.
    trainer = tiny(
        total_episodes=24,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="objective/scores",
        greater_is_better=False,
        reward=share_of_w5,
        learning_rate=5e-2,
    )
    last = []
    trainer.add_callback(OnStep(lambda: last.append(weights(trainer))))
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-6"}
    best = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert_equal_weights(best.state_dict(), trainer.policy_model.state_dict())
    critic = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "checkpoint-2" / "value_model")
    assert_equal_weights(critic.state_dict(), trainer.value_model.state_dict())
    assert not torch.equal(last[-1]["policy.lm_head.weight"], trainer.policy_model.lm_head.weight)


class OnStep(TrainerCallback):
    def __init__(self, act):
        self.act = act

    def on_step_end(self, args, state, control, **kwargs):
        self.act()


class Events(TrainerCallback):
    """Counts the events of a run, and keeps what loggers get."""

    def __init__(self):
        self.counts, self.logged = Counter(), []

    def __getattribute__(self, name):
        if name.startswith("on_") and name != "on_log":
            self.counts[name] += 1
        return super().__getattribute__(name)

    def on_log(self, args, state, control, logs, **kwargs):
        self.logged.append((state.global_step, dict(logs)))


@pytest.mark.slow
def test_callbacks_and_loggers_see_a_run_as_that_of_any_trainer(tiny):
    events = Events()
    trainer = tiny(
        trainer={"callbacks": [events]},
        num_mini_batches=2,
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="steps",
        save_steps=8,
    )
    trainer.train()
    expected = {
        "on_init_end": 1,
        "on_train_begin": 1,
        "on_epoch_begin": 2,  # updates
        "on_step_begin": 8,
        "on_substep_end": 8,  # micro-batches that are not their step's last
        "on_pre_optimizer_step": 8,
        "on_optimizer_step": 8,
        "on_step_end": 8,
        "on_epoch_end": 2,
        "on_evaluate": 2,
        "on_save": 1,
        "on_train_end": 1,
    }
    assert {name: events.counts[name] for name in expected} == expected
    assert [step for step, logs in events.logged if "objective/kl" in logs] == [4, 8]
    assert [step for step, logs in events.logged if "eval_objective/scores" in logs] == [4, 8]
    assert next(logs for _, logs in events.logged if "objective/kl" in logs)["learning_rate"] > 0


def test_defaults():  # T12
    config = PPOConfig("unused", use_cpu=True)
    assert (config.adam_epsilon, config.bf16, config.logging_nan_inf_filter) == (1e-5, False, False)
    assert (config.learning_rate, config.temperature, config.kl_coef, config.num_ppo_epochs) == (3e-6, 0.7, 0.05, 4)
    for bad in ({"kl_estimator": "k9"}, {"temperature": 0.0}, {"missing_eos_penalty": -1.0}, {"response_length": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            PPOConfig("unused", use_cpu=True, **bad)


# ---- The reward model's scale ----


def scaled_classifier(mean=3.0, deviation=2.0):
    model = make_classifier()
    model.config.score_mean, model.config.score_deviation = mean, deviation
    return model


def test_scores_are_on_the_scale_that_the_reward_model_carries(tiny):
    plain, scaled = (tiny(reward=model, **ONE) for model in (make_classifier(), scaled_classifier()))
    rows = [plain.train_dataset[index] for index in range(8)]
    rollout = plain.sample(rows, seed=0)
    assert torch.allclose(scaled.score(rollout), (plain.score(rollout) - 3.0) / 2.0, atol=1e-5)


def test_a_critic_copied_from_a_scaled_reward_model_predicts_scaled_scores(tiny):
    trainer = tiny(reward=scaled_classifier(), **ONE)
    raw = make_classifier().score.weight
    assert torch.allclose(trainer.value_model.score.weight, raw / 2)
    assert trainer.value_center == pytest.approx(1.5)
    assert torch.equal(trainer.reward_model.score.weight, raw)
    assert getattr(trainer.value_model.config, "score_deviation", 1.0) == 1.0


@pytest.mark.slow
def test_a_scaled_run_resumes_exactly(tiny, tmp_path):
    settings = {"total_episodes": 32, "save_strategy": "steps", "save_steps": 4, "reward": scaled_classifier()}
    whole = tiny(output_dir=str(tmp_path / "whole"), **settings)
    whole.train()
    resumed = tiny(output_dir=str(tmp_path / "resumed"), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


if __name__ == "__main__":  # started on two ranks by test_two_ranks_make_the_run_of_one
    train_on_fixed_answers(Path(sys.argv[1]), accumulation=2)
