"""Checks of models before training: by what the models do, for many kinds of model."""

import json

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
)

from sandan.core.errors import UserError
from sandan.models.checks import (
    check_direction,
    check_length,
    check_prompts,
    check_reward_folder,
    make_savable,
    positions_of,
    sees_later_tokens,
)


SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 12,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
LEARNED = ("gpt2", "opt", "bert", "electra", "roberta", "xlm-roberta", "camembert", "biogpt")


def config_for(kind, **fields):
    known = AutoConfig.for_model(kind)
    return AutoConfig.for_model(
        kind, **{name: value for name, value in SIZES.items() if hasattr(known, name)} | fields
    )


def causal(kind, **fields):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_for(kind, **fields)).eval()


@pytest.mark.parametrize("kind", LEARNED)
def test_positions_are_the_most_tokens_that_a_model_reads(kind):
    fields = {"word_embed_proj_dim": 16, "ffn_dim": 16} if kind == "opt" else {}
    model, positions = causal(kind, **fields), positions_of(config_for(kind, **fields))
    model(input_ids=torch.full((1, positions), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, positions + 1), 5))


@pytest.mark.parametrize(
    "config, positions",
    [
        (GPT2Config(n_positions=64), 64),
        (LlamaConfig(max_position_embeddings=128), 128),
        (LlamaConfig(max_position_embeddings=128, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}), 512),
        (AutoConfig.for_model("bloom"), None),
        (AutoConfig.for_model("xlnet"), None),
        (AutoConfig.for_model("modernbert-decoder", max_position_embeddings=99), 99),
    ],
    ids=["gpt2", "llama", "stretched", "bloom", "xlnet", "nested"],
)  # fmt: skip
def test_positions_of_other_kinds(config, positions):
    assert positions_of(config) == positions


def test_too_long_names_both_numbers():
    with pytest.raises(UserError, match="max_length: 1,024 tokens, but m has 64 positions; give at most 64"):
        check_length("max_length", 1024, GPT2Config(n_positions=64), "m")
    check_length("max_length", 64, GPT2Config(n_positions=64), "m")


def test_prompts_leave_room_for_an_answer():
    config = GPT2Config(n_positions=64)
    check_prompts([40, 3], 24, "response_length", config, "m")
    with pytest.raises(
        UserError, match="41 tokens .* 65 tokens, but m has 64 positions; give max_prompt_tokens 40 or"
    ):
        check_prompts([41, 3], 24, "response_length", config, "m", "max_prompt_tokens")
    with pytest.raises(UserError, match="lower max_new_tokens"):
        check_prompts([1], 64, "max_new_tokens", config, "m")


# In transformers 5.17 rembert and megatron-bert see later tokens as decoders too, and are refused.
ENCODERS = ("bert", "roberta", "electra", "xlm-roberta", "camembert", "ernie")


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_sees_later_tokens_unless_it_is_a_decoder(kind):
    assert sees_later_tokens(causal(kind))
    with pytest.raises(UserError, match=f"m: {kind} sees later tokens.*is_decoder: true"):
        check_direction(causal(kind), "m")
    assert not sees_later_tokens(causal(kind, is_decoder=True))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "gemma", "mistral", "gpt_neox", "bloom", "mamba"])
def test_causal_models_do_not(kind):
    model = causal(kind)
    assert not sees_later_tokens(model)
    assert not model.training and not sees_later_tokens(model.train()) and model.training


@pytest.mark.parametrize("sampling", [{"temperature": 0.9}, {"top_p": 0.6, "top_k": 5}, {"min_p": 0.1}])
def test_sampling_settings_without_sampling_are_repaired(sampling, model, tmp_path):
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=3)
    for name, value in sampling.items():
        setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match="do_sample"):
        model.save_pretrained(tmp_path)
    make_savable(model, "m")
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved["do_sample"] is True and saved["eos_token_id"] == 3
    assert all(saved[name] == value for name, value in sampling.items())


def test_settings_that_cannot_be_repaired_are_refused(model):
    model.generation_config.num_return_sequences = 4
    model.generation_config.num_beams = 1
    model.generation_config.early_stopping = "soon"
    with pytest.raises(UserError, match="m: generation_config.json: cannot be saved again"):
        make_savable(model, "m")


def test_a_savable_model_is_unchanged(model):
    before = model.generation_config
    make_savable(model, "m")
    assert model.generation_config is before


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "qwen2"])
def test_a_reward_model_without_its_head_is_refused(kind, tmp_path):
    causal(kind).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="base: reward_model_path: not a reward model: .* missing"):
        check_reward_folder(str(tmp_path / "base"))
    AutoModelForSequenceClassification.from_config(config_for(kind, num_labels=1)).save_pretrained(tmp_path / "whole")
    check_reward_folder(str(tmp_path / "whole"))


def test_a_classifier_of_another_name_counts(tmp_path):
    BertForSequenceClassification(config_for("bert", num_labels=1)).save_pretrained(tmp_path)
    check_reward_folder(str(tmp_path))
