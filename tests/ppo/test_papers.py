"""PPOTrainer's options from papers after N+: each is off by default, and then no number changes."""

import math

import pytest
import torch
from helpers import tiny_ppo as base
from helpers.tiny_ppo import ONE, assert_equal_weights, updates, weights
from peft import LoraConfig
from transformers import TrainerCallback

from sandan import PPOConfig
from sandan.ppo import formulas


OFF = {"cliprange_high": None, "value_lam": None, "critic_warmup_updates": 0}


def parts(trainer):
    """The weights of policy and critic, as copies."""
    now = weights(trainer)
    return [{name: one for name, one in now.items() if name.startswith(part)} for part in ("policy", "value_model")]


def assert_different(one, other):
    assert any(not torch.equal(one[name], other[name]) for name in one)


def trained(trainer):
    trainer.train()
    return weights(trainer)


def test_the_options_are_off_by_default_and_checked():
    args = PPOConfig("unused", use_cpu=True)
    assert {name: getattr(args, name) for name in OFF} == OFF
    for bad in ({"cliprange_high": 0.0}, {"value_lam": 1.1}, {"value_lam": -0.1}, {"critic_warmup_updates": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            PPOConfig("unused", use_cpu=True, **bad)


# ---- Clip-higher ----


def test_clip_higher_moves_the_upper_bound_only():
    # Ratio, advantage -> loss: (1 - 0.2, 1 + 0.28) clips at 1.28 instead of 1.2, and below at 0.8 as before.
    for ratio, advantage, expected in ((1.25, 1.0, -1.25), (1.5, 1.0, -1.28), (0.5, -1.0, 0.8), (1.5, -1.0, 1.5)):
        given = (torch.tensor([[math.log(ratio)]]), torch.zeros(1, 1), torch.tensor([[advantage]]))
        losses, _, _ = formulas.clipped_policy_loss(*given, cliprange=0.2, cliprange_high=0.28)
        assert losses.item() == pytest.approx(expected)


def test_clip_higher_reaches_the_loss(tiny):
    settings = ONE | {"num_ppo_epochs": 4, "learning_rate": 3e-2}
    plain, same, higher = (
        trained(tiny(**settings | own))
        for own in ({}, {"cliprange_high": 0.2}, {"cliprange_high": 1.0})
    )
    assert_equal_weights(plain, same)
    assert_different(plain, higher)


# ---- Decoupled GAE ----


def slow_returns(rewards, values, mask, gamma, lam):
    """G_t = V_t + sum_k (gamma lam)^k delta_{t+k}, one row and position at a time."""
    returns = torch.zeros_like(values)
    for row, width in enumerate(mask.sum(1).tolist()):
        after = [*values[row, 1:width].tolist(), 0.0]
        deltas = [rewards[row, t].item() + gamma * after[t] - values[row, t].item() for t in range(width)]
        for t in range(width):
            ahead = sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, width))
            returns[row, t] = values[row, t] + ahead
    return returns


def test_policy_and_critic_may_have_lambdas_of_their_own(tiny, monkeypatch):
    from sandan.ppo import experience

    seen, inner = [], experience.generalized_advantages

    def spy(rewards, values, gamma, lam):
        seen.append((rewards, values, lam))
        return inner(rewards, values, gamma, lam)

    monkeypatch.setattr(experience, "generalized_advantages", spy)
    made = []
    for own in ({}, {"value_lam": 0.9}, {"value_lam": 0.5}):
        trainer = tiny(gamma=0.95, lam=0.9, **ONE, **own)
        trainer.add_callback(Each(lambda trainer=trainer: made.append(trainer.experience)))
        trainer.train()
    plain, same, own = made
    assert torch.equal(plain.advantages, own.advantages)
    assert torch.equal(plain.returns, same.returns)
    rewards, values, lam = seen[-1]
    assert lam == 0.5
    assert torch.allclose(own.returns, slow_returns(rewards, values, own.value_mask, 0.95, 0.5), atol=1e-5)
    assert not torch.allclose(own.returns, plain.returns, atol=1e-3)


class Each(TrainerCallback):
    """Calls something after each optimizer step."""

    def __init__(self, called):
        self.called = called

    def on_step_end(self, args, state, control, **kwargs):
        self.called()


# ---- Critic warm-up ----


def states_of(trainer):
    states = [parts(trainer)]
    trainer.add_callback(Each(lambda: states.append(parts(trainer))))
    trainer.train()
    return states


def test_a_warm_up_trains_the_critic_only(tiny):
    settings = {"weight_decay": 0.1, "num_mini_batches": 2, "total_episodes": 24, "target_kl": 1.0}
    trainer = tiny(critic_warmup_updates=1, entropy_coef=0.01, **settings)
    states = states_of(trainer)
    assert len(states) == 1 + 3 * 4
    (policy, critic), *later = states
    for step, (now, of_critic) in enumerate(later, start=1):
        assert_different(critic, of_critic)
        if step <= 4:
            assert_equal_weights(policy, now)
        else:
            assert_different(policy, now)
        policy, critic = now, of_critic
    kl = [log["objective/kl"] for log in updates(trainer)]
    assert kl[0] == kl[1] == 0 < abs(kl[2])
    coefficients = [log["objective/kl_coef"] for log in updates(trainer)]
    assert coefficients[0] == coefficients[1] > coefficients[2]
    steps = {name: trainer.optimizer.state[one]["step"].item() for name, one in trainer.model.named_parameters()}
    assert {int(steps[name]) for name in steps if name.startswith("policy")} == {8}
    assert {int(steps[name]) for name in steps if name.startswith("value_model")} == {12}


@pytest.mark.parametrize("backbone", ["policy", "adapter"])
def test_a_warm_up_leaves_what_policy_and_critic_share(tiny, backbone):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if backbone == "adapter" else None
    settings = {"critic_backbone": backbone, "learning_rate": 1e-2, "total_episodes": 8}
    trainer = tiny(reward=base.share_of_w5, critic_warmup_updates=1, trainer={"peft_config": lora}, **settings)
    before = weights(trainer)
    after = trained(trainer)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("value_model" in name or ".critic." in name for name in moved)
