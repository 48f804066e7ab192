"""Sampling on a CPU: the same tokens as `generate`, the same distribution, whatever leaves the batch on the way."""

import pytest
import torch
from helpers import TEXTS
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from sandan.models.rendering import pad_rows
from sandan.models.sampling import sampling_config
from sandan.models.shrinking_sampling import _draw, sample_shrinking, shrinks


NEW_TOKENS = 24


@pytest.fixture
def prompts(tokenizer):
    rows = [tokenizer(text)["input_ids"][:length] for text in TEXTS for length in (2, 5, 9)]
    return pad_rows(rows)


def greedy(model, prompts, tokenizer, count=1):
    tokens = ([tokenizer.eos_token_id], [tokenizer.pad_token_id])
    return sample_shrinking(model, *prompts, NEW_TOKENS, 0.0, *tokens, answers_per_prompt=count)


def end_early(model, stop):
    """Let answers end after one or a few tokens: which depends on the last token alone."""
    torch.manual_seed(1)
    ends = torch.rand(model.config.vocab_size) < 0.3
    seen = {}
    model.get_input_embeddings().register_forward_pre_hook(lambda module, inputs: seen.update(ids=inputs[0]))

    def force(module, inputs, logits):
        logits = logits.clone()
        logits[:, -1, stop] += 1000.0 * ends[seen["ids"][:, -1]]
        return logits

    model.lm_head.register_forward_hook(force)


def reference(model, prompts, tokenizer):
    config = sampling_config(tokenizer, NEW_TOKENS, 0.0, [tokenizer.eos_token_id])
    ids, mask = prompts
    found = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, ids.shape[1] :]
    rest = torch.full((len(ids), NEW_TOKENS - found.shape[1]), tokenizer.eos_token_id)
    return torch.cat([found, rest], 1)


def test_greedy_answers_are_those_of_generate_and_end_at_different_times(model, tokenizer, prompts):
    end_early(model, tokenizer.eos_token_id)
    found = greedy(model, prompts, tokenizer)
    lengths = (found != tokenizer.eos_token_id).sum(1)
    assert len(set(lengths.tolist())) > 2
    assert torch.equal(found, reference(model, prompts, tokenizer))


def test_several_answers_to_a_prompt_stand_in_succession(model, tokenizer, prompts):
    end_early(model, tokenizer.eos_token_id)
    once, thrice = (greedy(model, prompts, tokenizer, count) for count in (1, 3))
    assert torch.equal(thrice, once.repeat_interleave(3, 0))


def test_learned_positions_are_counted_without_the_padding(tokenizer, prompts):
    torch.manual_seed(0)
    size = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.5}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **size)).eval()
    assert torch.equal(greedy(model, prompts, tokenizer), reference(model, prompts, tokenizer))


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_tokens_are_drawn_from_the_models_distribution(model, tokenizer, prompts, temperature):
    ids, mask = prompts[0][-1:], prompts[1][-1:]
    count, pad = 60_000, tokenizer.pad_token_id
    torch.manual_seed(0)
    drawn = sample_shrinking(model, ids, mask, 1, temperature, [tokenizer.eos_token_id], [pad], count).squeeze(1)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[0, -1]
    logits[pad] = -torch.inf
    expected = (logits / temperature).softmax(-1)
    found = drawn.bincount(minlength=len(expected)) / count
    assert found[pad] == 0
    assert (found - expected).abs().max() < 5 * (0.25 / count) ** 0.5


def test_models_whose_layers_do_not_see_all_tokens_are_left_to_generate(model, tokenizer):
    assert shrinks(model)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    windowed = MistralForCausalLM(
        MistralConfig(vocab_size=len(tokenizer), num_key_value_heads=2, sliding_window=8, **size)
    )
    assert not shrinks(windowed)


def test_logits_that_are_not_numbers_are_no_answer():
    with pytest.raises(RuntimeError, match="not numbers"):
        _draw(torch.tensor([[0.0, 1.0], [0.0, float("nan")]]), 1.0)
