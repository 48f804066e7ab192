"""Sampling over a static cache. The same code runs here step by step; on a GPU it is recorded and replayed."""

import pytest
import torch
from helpers.tiny_ppo import make_policy
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from sandan.models.cuda_graph_sampling import Decoder, draw, obstacle
from sandan.ppo.inputs import forward_inputs


STOP = 1
IDS = torch.tensor([[0, 0, 5, 6], [0, 7, 8, 9], [3, 4, 5, 6]])
MASK = (IDS > 0).long()


def make_decoder(policy, rows=3, new_tokens=12):
    decoder = Decoder(policy, rows, new_tokens, torch.float32)
    decoder.load(policy)
    return decoder


def slowly(policy, ids, mask, new_tokens, temperature, suppressed=()):
    """One whole forward pass per token without a cache; the noise is drawn as the decoder draws it."""
    finished = torch.zeros(len(ids), dtype=torch.bool)
    answers = []
    for _ in range(new_tokens):
        with torch.no_grad():
            logits = policy(**forward_inputs(policy, ids, mask)).logits[:, -1]
        logits[:, list(suppressed)] = -torch.inf
        noise = torch.empty_like(logits).exponential_()
        token = (logits / temperature - noise.log()).argmax(-1).masked_fill(finished, STOP)
        finished |= token == STOP
        answers.append(token)
        ids, mask = torch.cat([ids, token[:, None]], 1), torch.cat([mask, torch.ones(len(ids), 1).long()], 1)
    return torch.stack(answers, 1)


@pytest.mark.parametrize("key_heads", [1, 2], ids=["grouped", "plain"])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_same_noise_gives_the_tokens_of_the_slow_path(key_heads, temperature):
    policy = make_policy(num_key_value_heads=key_heads).eval()
    decoder = make_decoder(policy, new_tokens=40)
    torch.manual_seed(3)
    fast = decoder.sample(IDS, MASK, temperature, [STOP], [0, 7])
    torch.manual_seed(3)
    slow = slowly(policy, IDS, MASK, 40, temperature, [0, 7])
    # The decoder looks only now and then whether all have ended, and writes stop tokens from there on.
    assert torch.equal(fast, slow)
    assert not set(fast.unique().tolist()) & {0, 7}


def test_greedy_answers_are_those_of_generate():
    policy = make_policy(num_key_value_heads=1).eval()
    fast = make_decoder(policy).sample(IDS, MASK, 0.0, [STOP])
    slow = policy.generate(
        input_ids=IDS, attention_mask=MASK, do_sample=False, max_new_tokens=12, eos_token_id=STOP, pad_token_id=STOP
    )[:, IDS.shape[1] :]
    assert torch.equal(fast[:, : slow.shape[1]], slow)
    assert (fast[:, slow.shape[1] :] == STOP).all()


def test_fewer_rows_and_longer_prompts_than_before():
    policy = make_policy().eval()
    decoder = make_decoder(policy, rows=4)
    short = decoder.sample(IDS[:1], MASK[:1], 0.0, [STOP])
    torch.manual_seed(0)
    long = torch.randint(3, 60, (2, 100))
    answers = decoder.sample(long, torch.ones_like(long), 0.0, [STOP])
    assert torch.equal(decoder.sample(IDS[:1], MASK[:1], 0.0, [STOP]), short)
    alone = make_decoder(policy, rows=2).sample(long, torch.ones_like(long), 0.0, [STOP])
    assert torch.equal(answers, alone)


def test_loading_again_follows_the_policy():
    policy = make_policy().eval()
    decoder = make_decoder(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    decoder.load(policy)
    assert torch.equal(decoder.sample(IDS, MASK, 0.0, [STOP]), make_decoder(policy).sample(IDS, MASK, 0.0, [STOP]))


def test_adapters_are_merged_into_the_copy_and_left_alone_in_the_policy():
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    policy = get_peft_model(make_policy().eval(), config)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    torch.manual_seed(3)
    fast = make_decoder(policy, new_tokens=8).sample(IDS, MASK, 1.0, [STOP])
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    merged = policy.merge_and_unload()
    torch.manual_seed(3)
    assert torch.equal(fast, make_decoder(merged, new_tokens=8).sample(IDS, MASK, 1.0, [STOP]))


def test_draws_follow_the_softmax():
    torch.manual_seed(0)
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0])
    draws = 40_000
    noise = torch.empty(draws, 4).exponential_()
    bias = torch.tensor([0.0, 0.0, 0.0, -torch.inf])
    share = draw(logits.expand(draws, 4), bias, 0.7, noise).bincount(minlength=4) / draws
    expected = ((logits + bias) / 0.7).softmax(0)
    assert torch.allclose(share, expected, atol=4 * 0.5 / draws**0.5)


def test_models_that_cannot_be_sampled_from_say_why():
    sliding = MistralForCausalLM(
        MistralConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, sliding_window=8,
        )
    )  # fmt: skip
    assert obstacle(make_policy()) is None
    assert obstacle(torch.nn.Linear(2, 2)) == "Linear does not work with a static cache"
    assert "full attention" in obstacle(sliding)
    with pytest.raises(ValueError, match="full attention"):
        Decoder(sliding, 2, 4, torch.float32)


def test_other_architectures_give_the_tokens_of_the_slow_path():
    torch.manual_seed(0)
    policy = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=2)).eval()
    decoder = make_decoder(policy)
    torch.manual_seed(3)
    fast = decoder.sample(IDS, MASK, 1.0, [STOP])
    torch.manual_seed(3)
    assert torch.equal(fast, slowly(policy, IDS, MASK, 12, 1.0))


def test_trainer_samples_with_a_decoder_as_with_generate(tiny):
    trainer = tiny(local_rollout_forward_batch_size=3)
    assert trainer.sampler.decoder is None
    rows = [trainer.train_dataset[index] for index in range(7)]
    slow = trainer.sample(rows, seed=0, greedy=True)
    trainer.sampler.decoder = Decoder(trainer.policy_model, 3, 8, torch.float32)
    state = torch.get_rng_state()
    fast = trainer.sample(rows, seed=0, greedy=True)
    assert fast.completions == slow.completions
    trainer.train()
    assert trainer.state.log_history[0]["val/ratio"] != 0
    trainer.sample(rows, seed=0)
    torch.set_rng_state(state)
    first = trainer.sample(rows, seed=5).completions
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.sample(rows, seed=5).completions == first
