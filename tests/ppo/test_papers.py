"""PPOTrainer's options from papers after N+: each is off by default, and then no number changes."""

import logging
import math

import pytest
import torch
from datasets import Dataset
from helpers import tiny_ppo as base
from helpers.doomed_ppo import resumable
from helpers.tiny_ppo import ONE, assert_equal_weights, updates, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import TrainerCallback

from sandan import PPOConfig
from sandan.models.rendering import encode_prompts, shortened
from sandan.models.sampling import Completion
from sandan.ppo import formulas
from sandan.ppo.rollout import Rollout
from sandan.ppo.truncation import end_after, truncate, truncate_answers


OFF = {
    "cliprange_high": None,
    "value_lam": None,
    "critic_warmup_updates": 0,
    "truncate_after": None,
    "importance_cap": None,
    "long_prompts": "drop",
}


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
    assert PPOConfig("unused", use_cpu=True, truncate_after=".").truncate_after == ["."]
    for bad in (
        {"cliprange_high": 0.0},
        {"value_lam": 1.1},
        {"value_lam": -0.1},
        {"critic_warmup_updates": -1},
        {"truncate_after": [".", ""]},
        {"truncate_min_tokens": -1},
        {"importance_cap": 0.0},
        {"long_prompts": "cut"},
    ):
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
        trained(tiny(**settings | own)) for own in ({}, {"cliprange_high": 0.2}, {"cliprange_high": 1.0})
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


@pytest.mark.slow
def test_a_run_that_stopped_in_the_warm_up_resumes_exactly(tmp_path):
    whole = resumable(tmp_path / "whole", critic_warmup_updates=2)
    expected = trained(whole)
    again = resumable(tmp_path / "again", critic_warmup_updates=2)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))  # after the first of four updates
    assert_equal_weights(expected, weights(again))


# ---- Answers cut after a text ----

LETTERS = [".", "a", ". ", "b.", "\n\n", "\n", "é", "..", "c"]


class Letters:
    """A tokenizer of nine tokens of one or two characters; decoding joins them."""

    def decode(self, ids, skip_special_tokens):
        return "".join(LETTERS[one] for one in ids)


def slow_end(ids, texts, min_tokens):
    """Read the answer character by character; return the token in which the first text ends that may end there."""
    read = ""
    for count, one in enumerate(ids, start=1):
        for letter in LETTERS[one]:
            read += letter
            if count >= min_tokens and any(read.endswith(text) for text in texts):
                return count
    return None


@settings(deadline=None, max_examples=300)
@given(
    ids=st.lists(st.integers(0, len(LETTERS) - 1), max_size=12),
    texts=st.lists(st.sampled_from([".", "\n", "\n\n", "..", "a.b", ".a", "é"]), min_size=1, max_size=2),
    min_tokens=st.integers(0, 8),
)
def test_the_cut_is_that_of_a_slow_search(ids, texts, min_tokens):
    assert end_after(Letters(), ids, texts, min_tokens) == slow_end(ids, texts, min_tokens)


def test_a_cut_answer_counts_as_stopped_and_loses_what_follows():
    def cut(ids, stopped, *rest):
        return truncate(Letters(), Completion("…", ids, stopped), *rest)

    assert cut((1, 0, 8), False, ["."]) == Completion("a.", (1, 0), True)
    assert cut((1, 0, 99), True, ["."]) == Completion("a.", (1, 0), True)  # 99 is a stop token: it goes too
    assert cut((1, 0, 8), False, ["b"]) == Completion("…", (1, 0, 8), False)
    assert cut((99,), True, ["."]) == Completion("…", (99,), True)
    assert cut((0, 1, 0, 8), False, ["."], 2) == Completion(".a.", (0, 1, 0), True)
    rollout = Rollout([{}] * 2, [Completion("", (1, 0, 8), False), Completion("", (1, 99), True)])
    rollout.sampling_logprobs = [torch.arange(3.0), torch.arange(2.0)]
    made = truncate_answers(Letters(), rollout, ["."])
    assert [len(row) for row in made.sampling_logprobs] == [len(one.token_ids) for one in made.completions] == [2, 2]


def test_answers_are_cut_after_a_text_and_count_as_stopped(tiny):
    texts = ["w1", "w2", "w3"]
    seen = []

    def reward(prompts, completions):
        seen.extend(completions)
        return [0.0] * len(completions)

    settings = {"response_length": 16, "missing_eos_penalty": 1.0, "reward": reward, **ONE}
    cut = tiny(truncate_after=texts, truncate_min_tokens=3, **settings)
    cut.train()
    for answer in seen[:8]:
        words = answer.split()
        ends = [at for at, word in enumerate(words, start=1) if any(text in word for text in texts) and at >= 3]
        assert ends in ([], [len(words)])
    with_text = [answer for answer in seen[:8] if any(text in answer.split()[-1] for text in texts)]
    (log,) = updates(cut)
    assert 2 < len(with_text) == round(log["val/stopped_share"] * 8)
    assert log["objective/scores"] == pytest.approx(len(with_text) / 8 - 1)

    whole, never = tiny(**settings), tiny(truncate_after=["nowhere"], **settings)
    assert_equal_weights(trained(whole), trained(never))


# ---- Importance weights ----


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**31), cap=st.sampled_from([1.0, 2.0, 5.0]))
def test_importance_weights_equal_the_definition(seed, cap):
    generator = torch.Generator().manual_seed(seed)
    trained, sampled = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    sampled[0, 0] = torch.nan
    weights = formulas.importance_weights(trained, sampled, cap)
    assert weights[0, 0] == 1
    for row, t in ((row, t) for row in range(3) for t in range(5) if row or t):
        ratio = math.exp(trained[row, t].item() - sampled[row, t].item())
        assert weights[row, t].item() == pytest.approx(min(ratio, cap))


# ---- Long prompts ----


def chat_tokenizer():
    tokenizer = base.make_tokenizer()
    tokenizer.chat_template = base.TEMPLATE
    return tokenizer


def conversation(*roles, words=2):
    return [{"role": role, "content": " ".join([f"w{at}"] * words)} for at, role in enumerate(roles, start=1)]


def slow_shortened(tokenizer, turns, limit):
    """Take away one turn after the other behind the system's, and look at every state that begins with the user."""
    kept, first = list(turns), True
    while len(kept) > sum(turn["role"] == "system" for turn in kept):
        rest = [turn for turn in kept if turn["role"] != "system"]
        allowed = first or rest[0]["role"] == "user"
        if allowed and len(encode_prompts(tokenizer, [kept])[0]) <= limit:
            return kept
        kept.remove(rest[0])
        first = False
    return None


@settings(deadline=None, max_examples=50)
@given(
    system=st.booleans(),
    roles=st.lists(st.sampled_from(["user", "assistant", "tool"]), min_size=1, max_size=6),
    limit=st.integers(1, 24),
)
def test_a_conversation_loses_its_oldest_turns_until_it_fits(system, roles, limit):
    turns = conversation(*["system"] * system, *roles)
    assert shortened(chat_tokenizer(), turns, limit) == slow_shortened(chat_tokenizer(), turns, limit)


def test_long_conversations_are_shortened_instead_of_dropped(tmp_path, caplog):
    chat = ("system", "user", "assistant", "user")  # 3 tokens a turn
    rows = [conversation(*chat)] * 6 + [conversation("user")] * 2 + [conversation("user", words=9)]
    seen = []

    def reward(prompts, completions):
        seen.extend(prompts)
        return [0.0] * len(prompts)

    def make(prompts, **own):
        args = PPOConfig(
            str(tmp_path),
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            max_prompt_tokens=7,
            total_episodes=8,
            **own,
        )
        return base.PPOTrainer(
            base.make_policy(), reward, args, train_dataset=prompts, processing_class=chat_tokenizer()
        )

    with caplog.at_level(logging.WARNING, logger="sandan"):
        trainer = make(Dataset.from_dict({"prompt": rows}), long_prompts="shorten")
    assert "train_dataset: 6 of 9 prompts shortened to 7 tokens" in caplog.text
    assert "train_dataset: 1 of 9 prompts dropped" in caplog.text
    short = [rows[0][0], rows[0][3]]
    assert trainer.train_dataset["prompt"][:] == [short] * 6 + [conversation("user")] * 2
    assert {len(ids) for ids in trainer.train_dataset["input_ids"]} == {3, 6}
    trainer.train()
    assert short in seen
    with pytest.raises(ValueError, match="train_dataset: 2 prompts, but one update takes 8"):
        make(Dataset.from_dict({"prompt": rows}))
    text = Dataset.from_dict({"prompt": ["w1 w2"] * 8 + ["w1 " * 8]})
    assert len(make(text, long_prompts="shorten").train_dataset) == 8
