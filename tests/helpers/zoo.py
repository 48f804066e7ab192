"""Tiny models with the tokens, chat formats and generation settings of the families that people bring.

    PYTHONPATH=src:tests python -m helpers.zoo FOLDER        # writes one model folder each

Weights are random and the vocabulary is small; what differs between the families is what each row of `FAMILIES` says.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from helpers import TEXTS


LETTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789 .,:?!\n system user assistant model"
CHATML = """{% for turn in messages %}<|im_start|>{{ turn['role'] }}
{{ turn['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
GEMMA = """{{ bos_token }}{% for turn in messages %}{% if turn['role'] == 'system' %}{{ raise_exception('System role not
supported') }}{% endif %}<start_of_turn>{{ 'model' if turn['role'] == 'assistant' else turn['role'] }}
{{ turn['content'] | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""
LLAMA_3 = """{{ bos_token }}{% for turn in messages %}<|start_header_id|>{{ turn['role'] }}<|end_header_id|>

{{ turn['content'] | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant\
<|end_header_id|>

{% endif %}"""
# No token ends a turn.
PLAIN = """{% for turn in messages %}### {{ turn['role'] }}:
{{ turn['content'] }}
{% endfor %}{% if add_generation_prompt %}### assistant:
{% endif %}"""


@dataclass
class Family:
    """A kind of model: its special tokens, and what its tokenizer and its settings do with them.

    Args:
        tokens: names of special tokens, `bos_token` and so on.
        more: further added tokens.
        framed: what the tokenizer puts around a text.
        stops: the list in `generation_config.json`.
        stop: the token that must end an answer in a chat, and in text.
    """

    kind: type
    tokens: dict[str, str]
    more: tuple[str, ...] = ()
    chat_template: str | None = None
    framed: str | None = None
    stops: tuple[str, ...] = ()
    generation: dict = field(default_factory=dict)
    positions: int = 128
    stop: tuple[str | None, str] = (None, "")


END, IM = "<|endoftext|>", ("<|im_start|>", "<|im_end|>")
TURN = ("<start_of_turn>", "<end_of_turn>")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 20}
GPT2 = {"bos_token": END, "eos_token": END, "unk_token": END}
GEMMA_TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
BEGIN, TEXT_END = "<|begin_of_text|>", "<|end_of_text|>"

FAMILIES = {
    "gpt2": Family(GPT2LMHeadModel, GPT2, positions=64, stop=(None, END)),
    "gpt2 with a pad token": Family(GPT2LMHeadModel, GPT2 | {"pad_token": "<|pad|>"}, stop=(None, END)),
    "qwen base": Family(
        Qwen2ForCausalLM, {"eos_token": END, "pad_token": END}, IM, CHATML, generation=SAMPLING, stop=(IM[1], END)
    ),
    "qwen instruct": Family(
        Qwen2ForCausalLM,
        {"eos_token": IM[1], "pad_token": END},
        IM[:1],
        CHATML,
        stops=(IM[1], END),
        generation=SAMPLING | {"repetition_penalty": 1.1},
        stop=(IM[1], IM[1]),
    ),
    "gemma": Family(
        GemmaForCausalLM,
        GEMMA_TOKENS,
        TURN,
        GEMMA,
        framed="<bos> $A",
        stops=("<eos>", TURN[1]),
        stop=(TURN[1], "<eos>"),
    ),
    "llama base": Family(
        LlamaForCausalLM,
        {"bos_token": BEGIN, "eos_token": TEXT_END},
        HEADERS,
        framed=f"{BEGIN} $A",
        stop=(None, TEXT_END),
    ),
    "llama instruct": Family(
        LlamaForCausalLM,
        {"bos_token": BEGIN, "eos_token": HEADERS[2]},
        (TEXT_END, *HEADERS[:2]),
        LLAMA_3,
        framed=f"{BEGIN} $A",
        stops=(TEXT_END, HEADERS[2]),
        generation={"do_sample": True, "temperature": 0.6, "top_p": 0.9},
        stop=(HEADERS[2], HEADERS[2]),
    ),
    "a tokenizer that ends every text": Family(
        LlamaForCausalLM,
        {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
        framed="<s> $A </s>",
        stop=(None, "</s>"),
    ),
    "one token for all": Family(
        LlamaForCausalLM,
        {"bos_token": IM[0], "eos_token": IM[1], "pad_token": IM[1]},
        chat_template=CHATML,
        stop=(IM[1], IM[1]),
    ),
    "a chat format without an end": Family(
        LlamaForCausalLM, {"eos_token": "</s>"}, chat_template=PLAIN, stop=("</s>", "</s>")
    ),
}


def make_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    special = list(dict.fromkeys([*family.tokens.values(), *family.more]))
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([*TEXTS * 20, LETTERS], trainer)
    if family.framed:
        pairs = [(token, core.token_to_id(token)) for token in special if token in family.framed.split()]
        core.post_processor = processors.TemplateProcessing(single=family.framed, special_tokens=pairs)
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=family.chat_template, **family.tokens)


def make_model(family: Family, tokenizer: PreTrainedTokenizerFast):
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "max_position_embeddings": family.positions, "vocab_size": len(tokenizer)}
    if family.kind is GPT2LMHeadModel:
        config = GPT2Config(
            vocab_size=len(tokenizer), n_positions=family.positions, n_embd=32, n_layer=2, n_head=2, **ids
        )
    elif family.kind is GemmaForCausalLM:
        config = GemmaConfig(head_dim=16, **sizes, **ids)
    else:
        config = (Qwen2Config if family.kind is Qwen2ForCausalLM else LlamaConfig)(**sizes, **ids)
    torch.manual_seed(0)
    model = family.kind(config)
    stops = [tokenizer.convert_tokens_to_ids(token) for token in family.stops]
    for name, value in (family.generation | ({"eos_token_id": stops} if stops else {})).items():
        setattr(model.generation_config, name, value)
    return model


def write(name: str, folder: Path) -> Path:
    """Write a family's model and tokenizer to a folder, and return it."""
    tokenizer = make_tokenizer(FAMILIES[name])
    make_model(FAMILIES[name], tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    for family in FAMILIES:
        sys.stdout.write(json.dumps(str(write(family, Path(sys.argv[1], family.replace(" ", "-"))))) + "\n")
