"""One backbone for policy, reference, critic and reward."""

import pytest
import torch
from helpers.tiny_ppo import make_classifier, make_policy, share_of_w5, updates, weights
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from sandan.models.score_scale import ScoreScale
from sandan.models.scoring import score_rows
from sandan.ppo.inputs import forward_inputs
from sandan.ppo.shared_backbone import AdapterHead


LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": True}
ROWS = [[3, 4, 5, 6, 7], [8, 9, 10], [11, 12, 13, 14]]


@pytest.fixture
def base(tmp_path):
    """The folder of a language model."""
    make_policy().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def reward_folder(base, tmp_path):
    """The folder of a reward adapter on the base, whose every weight was moved."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **LORA))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "reward")
    return tmp_path / "reward"


@pytest.fixture
def shared(tiny, base):
    """Make a trainer whose critic is an adapter on the policy's backbone; keywords go to the `tiny` fixture."""

    def make(reward, **kwargs):
        torch.manual_seed(0)
        return tiny(
            model=AutoModelForCausalLM.from_pretrained(base),
            reward=reward,
            trainer={"peft_config": LoraConfig(task_type="CAUSAL_LM", **LORA)},
            critic_backbone="adapter",
            **{"learning_rate": 1e-2, "num_ppo_epochs": 2} | kwargs,
        )

    return make


def left_padded(rows):
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return ids, (ids > 0).long()


def test_reward_on_the_shared_backbone_scores_as_the_model_it_was_saved_from(shared, reward_folder):
    trainer = shared(str(reward_folder))
    whole = AutoPeftModelForSequenceClassification.from_pretrained(reward_folder, num_labels=1)
    whole.config.pad_token_id = 0
    assert score_rows(trainer.reward_model, ROWS) == pytest.approx(score_rows(whole, ROWS), abs=1e-6)
    assert isinstance(trainer.reward_model, AdapterHead)


def test_critic_starts_as_the_shared_reward(shared, reward_folder):
    trainer = shared(str(reward_folder))
    ids, mask = left_padded(ROWS)
    critic, reward = trainer.value_model, trainer.reward_model
    with torch.no_grad():
        values = critic.values(critic.hidden_states(ids, mask))
    assert values[:, -1].tolist() == pytest.approx(score_rows(reward, ROWS), abs=1e-6)


def test_reward_and_critic_on_the_shared_backbone_take_the_scale_beside_the_adapter(shared, reward_folder):
    raw = score_rows(shared(str(reward_folder)).reward_model, ROWS)
    config = make_policy().config
    ScoreScale(mean=3.0, deviation=2.0).store(config)
    config.save_pretrained(reward_folder)
    trainer = shared(str(reward_folder))
    scaled = [(score - 3.0) / 2.0 for score in raw]
    assert score_rows(trainer.reward_model, ROWS) == pytest.approx(scaled, abs=1e-5)
    ids, mask = left_padded(ROWS)
    critic = trainer.value_model
    with torch.no_grad():
        values = critic.values(critic.hidden_states(ids, mask))[:, -1] - trainer.value_center
    assert values.tolist() == pytest.approx(scaled, abs=1e-5)


def test_critic_without_a_shared_reward_starts_at_zero(shared):
    trainer = shared(make_classifier())
    trainer.train()
    assert trainer.state.log_history[0]["val/explained_variance"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("reward", ["adapter", "function"])
def test_policy_and_critic_adapters_learn_and_nothing_else(shared, reward_folder, reward):
    trainer = shared(str(reward_folder) if reward == "adapter" else share_of_w5)
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(".default." in name for name in changed)
    assert any(".critic." in name for name in changed)
    assert "value_model.score.weight" in changed
    assert all(".default." in name or ".critic." in name or name == "value_model.score.weight" for name in changed)


def test_first_ratio_is_one_and_reference_is_the_bare_backbone(shared, reward_folder, base):
    trainer = shared(str(reward_folder), num_ppo_epochs=1, total_episodes=8)
    trainer.train()
    log = updates(trainer)[0]
    assert (log["val/ratio"], log["policy/approxkl_avg"], log["objective/kl"]) == (1, 0, 0)
    ids, mask = left_padded(ROWS)
    bare = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad(), trainer.null_ref_context() as reference:
        logits = reference(**forward_inputs(bare, ids, mask)).logits
        assert torch.equal(logits, bare(**forward_inputs(bare, ids, mask)).logits)
    with torch.no_grad():
        assert not torch.equal(logits, trainer.policy_model(**forward_inputs(bare, ids, mask)).logits)


def test_saved_policy_and_critic_load_with_peft(shared, reward_folder, tmp_path):
    trainer = shared(str(reward_folder))
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    ids, mask = left_padded(ROWS)
    policy = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved")
    critic = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "saved" / "value_model", num_labels=1)
    critic.config.pad_token_id = 0
    inputs = forward_inputs(make_policy(), ids, mask)
    with torch.no_grad():
        assert torch.allclose(policy(**inputs).logits, trainer.policy_model(**inputs).logits, atol=1e-6)
    assert score_rows(critic, ROWS) == pytest.approx(score_rows(trainer.value_model, ROWS), abs=1e-6)
    assert not list((tmp_path / "saved").glob("critic*"))


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["adapter", "policy"])
def test_resumed_run_equals_the_uninterrupted_one(shared, tiny, reward_folder, tmp_path, backbone):
    def make(name):
        kwargs = {"output_dir": str(tmp_path / name), "save_strategy": "steps", "save_steps": 2, "total_episodes": 24}
        if backbone == "adapter":
            return shared(str(reward_folder), **kwargs)
        return tiny(reward=share_of_w5, critic_backbone="policy", **kwargs)

    whole = make("whole")
    whole.train()
    resumed = make("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected, found = weights(whole), weights(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    pace = ("time/", "eps")
    assert [{k: v for k, v in log.items() if not k.startswith(pace)} for log in updates(whole)[1:]] == [
        {k: v for k, v in log.items() if not k.startswith(pace)} for log in updates(resumed)[1:]
    ]


@pytest.mark.slow
def test_activation_checkpointing_computes_layers_again_with_their_own_adapter(shared, reward_folder, tmp_path):
    plain = shared(str(reward_folder))
    plain.train()
    saving = shared(str(reward_folder), output_dir=str(tmp_path / "other"), gradient_checkpointing=True)
    saving.train()
    assert saving.policy_model.is_gradient_checkpointing
    expected, found = weights(plain), weights(saving)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_critic_has_its_own_learning_rate(shared, reward_folder):
    trainer = shared(str(reward_folder), critic_learning_rate=1e-12)
    before = weights(trainer)
    trainer.train()
    for name, value in weights(trainer).items():
        if ".critic." in name or name.startswith("value_model"):
            assert torch.allclose(value, before[name], atol=1e-9), name


def test_policy_average_leaves_the_critic_alone(shared, reward_folder, tmp_path):
    trainer = shared(str(reward_folder), policy_ema_decay=0.5)
    trainer.train()
    critic = {name: value.clone() for name, value in weights(trainer).items() if ".critic." in name}
    trainer.save_model(tmp_path / "saved")
    assert all(torch.equal(value, weights(trainer)[name]) for name, value in critic.items())
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved" / "ema_policy")


def test_adapter_of_another_base_is_a_model_of_its_own(shared, reward_folder, tmp_path):
    make_policy(rms_norm_eps=1e-3).save_pretrained(tmp_path / "other")
    config = reward_folder / "adapter_config.json"
    config.write_text(config.read_text().replace(str(tmp_path / "base"), str(tmp_path / "other")))
    trainer = shared(str(reward_folder))
    assert not isinstance(trainer.reward_model, AdapterHead)
    trainer.train()


def test_head_on_the_policys_own_backbone_learns(tiny, tmp_path):
    def one(prompts, completions):
        return [1.0] * len(completions)

    trainer = tiny(reward=one, critic_backbone="policy", total_episodes=64, vf_coef=1.0, learning_rate=1e-2)
    trainer.train()
    log = updates(trainer)
    assert log[-1]["loss/value_avg"] < log[0]["loss/value_avg"] / 4
    names = [name for name, _ in trainer.model.named_parameters() if not name.startswith("policy.")]
    assert names == ["value_model.score.weight"]
    trainer.save_model(tmp_path / "saved")
    AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(
    "kwargs, trainer, message",
    [
        ({"critic_backbone": "adapter"}, {}, "needs peft_config"),
        ({"critic_backbone": "policy"}, {"value_model": make_classifier()}, "none to give"),
    ],
)
def test_what_cannot_be_shared_is_refused(tiny, kwargs, trainer, message):
    with pytest.raises(ValueError, match=message):
        tiny(trainer=trainer, **kwargs)


def test_adapter_that_trains_whole_modules_is_refused(tiny):
    config = LoraConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"], **LORA)
    with pytest.raises(ValueError, match="modules_to_save"):
        tiny(trainer={"peft_config": config}, critic_backbone="adapter")


def test_unknown_backbone_is_refused(tiny):
    with pytest.raises(ValueError, match="critic_backbone: expected one of"):
        tiny(critic_backbone="shared")


def test_reward_adapter_for_other_layers_is_refused(shared, reward_folder):
    config = reward_folder / "adapter_config.json"
    config.write_text(config.read_text().replace("v_proj", "k_proj"))
    with pytest.raises(ValueError, match="other layers"):
        shared(str(reward_folder))
