"""The trained tokenizer: lossless, loadable anywhere, and a chat template that marks what is trained."""

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoTokenizer

from sandan.core.errors import UserError
from sandan.models.loading import check_reading, load_tokenizer
from sandan.pretrain.tokenizer import (
    LONG_RUNS,
    LONGEST_PIECE,
    ROLES,
    SCRIPT_RUNS,
    _pieces,
    texts_of,
    train_tokenizer,
)


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What does the cow eat?"},
    {"role": "assistant", "content": "Grass."},
    {"role": "user", "content": "牛は何を食べますか。"},
    {"role": "assistant", "content": "草です。\n"},
]


@given(text=st.text())
@example(text="牛は草を食べます。カエルー、🐸 e\u0301 \u0000\t\r\n\x7f\u200b\ufeff")
@example(text="  two  spaces , and . punctuation 's n't ")
@example(text="<|eos|> <|user|>")
@settings(deadline=None, max_examples=200)
def test_round_trip_is_lossless(text, tokenizer):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_special_tokens_are_distinct_single_ids(tokenizer):
    tokens = [tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.mask_token]
    ids = tokenizer.convert_tokens_to_ids([*tokens, *(f"<|{role}|>" for role in ROLES)])
    assert len(set(ids)) == 7 and None not in ids and max(ids) < len(tokenizer)
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer("<|eos|>", add_special_tokens=False)["input_ids"] == [tokenizer.eos_token_id]


def test_vocabulary_size_is_kept_and_tokens_do_not_cross_scripts(tokenizer):
    assert len(tokenizer) <= 320
    decoded = [tokenizer.decode([index]) for index in range(len(tokenizer))]
    assert not any("牛は" in token or "草を" in token for token in decoded)
    assert any(len(token) > 2 and token.isalpha() for token in decoded)


def test_training_is_reproducible(tokenizer):
    from helpers import TEXTS

    assert train_tokenizer(TEXTS * 20, 320).get_vocab() == tokenizer.get_vocab()


def test_auto_tokenizer_loads_it_unchanged(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        text = "The cow 牛 <|eos|>  🐄"
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.chat_template == tokenizer.chat_template
        for name in ("pad_token", "bos_token", "eos_token", "mask_token"):
            assert getattr(loaded, name) == getattr(tokenizer, name)
    assert load_tokenizer(str(tmp_path), padding_side="left").padding_side == "left"


def test_generation_mask_marks_exactly_the_answers_and_their_stop_tokens(tokenizer):
    encoded = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    trained = [token for token, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(trained) == "Grass.<|eos|>草です。\n<|eos|>"


@pytest.mark.parametrize("turns", [3, 5])
def test_prompt_is_a_token_prefix_of_the_whole_conversation(turns, tokenizer):
    def encode(chat, **options):
        return tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, **options)["input_ids"]

    prompt, whole = encode(CHAT[: turns - 1], add_generation_prompt=True), encode(CHAT[:turns])
    assert whole[: len(prompt)] == prompt and whole[-1] == tokenizer.eos_token_id
    assert whole.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("vocab_size", [0, 262])
def test_vocabulary_without_room_for_bytes_is_refused(vocab_size):
    with pytest.raises(UserError, match="vocab_size.*need 263"):
        train_tokenizer(["a"], vocab_size)


def test_texts_of_every_form_of_data():
    rows = [{"text": "a"}, {"prompt": "b", "completion": "c"}, {"messages": CHAT[1:3]}]
    rows.append({"prompt": CHAT[1:2], "completion": CHAT[2:3]})
    question, answer = CHAT[1]["content"], CHAT[2]["content"]
    assert list(texts_of(rows)) == ["a", "b", "c", question, answer, question, answer]


def test_a_model_whose_kind_would_read_the_tokenizer_otherwise_is_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    for kind in ("llama", "qwen3", "gpt2", "modernbert"):
        check_reading(loaded, str(tmp_path), AutoConfig.for_model(kind))
    with pytest.raises(UserError, match="'qwen2' transformers reads every tokenizer as Qwen2Tokenizer.*model_type"):
        check_reading(loaded, str(tmp_path), AutoConfig.for_model("qwen2"))


@pytest.mark.parametrize("character", ["中", "か", "a", "5", "-", " ", "\n", "ก", "한", "🐄"])
def test_text_without_spaces_is_learned_in_short_pieces_and_stays_lossless(character):
    text = "The cow eats grass. " + character * 3000
    pieces = _pieces([SCRIPT_RUNS, LONG_RUNS]).pre_tokenize_str(text)
    assert max(end - start for _, (start, end) in pieces) <= LONGEST_PIECE + 1  # and a space before a word
    tokenizer = train_tokenizer([text], 300)
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_ordinary_text_is_learned_in_the_pieces_in_which_it_is_read():
    text = f"It's {'a' * (LONGEST_PIECE - 1)}  牛は草を食べます。\n\n    x = 1"
    learned = _pieces([SCRIPT_RUNS, LONG_RUNS]).pre_tokenize_str(text)
    assert learned == _pieces([SCRIPT_RUNS]).pre_tokenize_str(text)


def test_time_to_learn_grows_with_the_text_not_with_its_square():
    def seconds(characters):
        text = "".join(chr(0x4E00 + (number * number) % 2999) for number in range(characters))
        start = time.process_time()
        train_tokenizer([text], 2000)
        return time.process_time() - start

    assert seconds(32_000) < 8 * max(seconds(8_000), 0.02)
