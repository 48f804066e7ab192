"""Tiny models that talk."""

import copy

import pytest
import torch
from transformers import LlamaForCausalLM

from sandan.chat.speakers import Sampling, Speaker


@pytest.fixture
def sampling():
    return Sampling(max_new_tokens=8, temperature=1.0, seed=0)


@pytest.fixture
def speakers(tiny_config, tokenizer):
    """Three models with random weights, of which `base` has no chat template."""

    def make(name, seed, own):
        torch.manual_seed(seed)
        return Speaker(name, LlamaForCausalLM(tiny_config).eval(), own)

    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    return [make("base", 1, plain), make("sft", 2, tokenizer), make("ppo", 3, tokenizer)]


@pytest.fixture
def folders(speakers, tmp_path):
    """The same models as folders, in the form of the option `models`."""
    for speaker in speakers:
        speaker.model.save_pretrained(tmp_path / speaker.name)
        speaker.tokenizer.save_pretrained(tmp_path / speaker.name)
    return [f"{speaker.name}={tmp_path / speaker.name}" for speaker in speakers]
