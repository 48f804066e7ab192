"""Blocks of tokens and their batches."""

import json

import numpy as np
import pytest
import torch
from datasets import load_dataset
from helpers import TEXTS

import sandan.pretrain.model_and_blocks
from sandan.pretrain.masking import BlockCollator, ReproducibleMasking
from sandan.pretrain.model_and_blocks import to_blocks


BLOCK = 16
DOCUMENTS = [f"{number}: {text}" for number, text in enumerate(TEXTS * 10)]


@pytest.fixture
def load(tmp_path):
    """A dataset of texts, from a file as a user's."""

    def load(texts, **kwargs):
        path = tmp_path / "texts.jsonl"
        path.write_text("".join(json.dumps({"text": text, "source": "x"}) + "\n" for text in texts))
        return load_dataset("json", data_files=str(path), split="train", **kwargs)

    return load


def ids(blocks):
    return [row["input_ids"].tolist() for row in blocks]


def joined(texts, tokenizer):
    """All tokens, one after the other."""
    encoded = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    return [token for one in encoded for token in (tokenizer.bos_token_id, *one, tokenizer.eos_token_id)]


@pytest.fixture
def expected(tokenizer):
    tokens = joined(DOCUMENTS, tokenizer)
    return [tokens[start : start + BLOCK] for start in range(0, len(tokens) - BLOCK + 1, BLOCK)]


@pytest.mark.parametrize("slice_bytes", [1, 2000, 1 << 20])
def test_blocks_are_the_whole_text_cut_where_they_are_full(load, tokenizer, expected, monkeypatch, slice_bytes):
    monkeypatch.setattr(sandan.pretrain.model_and_blocks, "SLICE_BYTES", slice_bytes)
    blocks = to_blocks(load(DOCUMENTS), tokenizer, BLOCK)
    assert blocks.column_names == ["input_ids"]
    assert ids(blocks) == expected


def test_blocks_do_not_depend_on_the_processes_that_make_them(load, tokenizer, expected):
    assert ids(to_blocks(load(DOCUMENTS), tokenizer, BLOCK, num_proc=2)) == expected


def test_a_stream_has_the_same_blocks_in_every_pass(load, tokenizer, expected):
    blocks = to_blocks(load(DOCUMENTS, streaming=True), tokenizer, BLOCK)
    assert ids(blocks) == ids(blocks) == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stream_has_the_same_order_for_any_workers(load, tokenizer, expected, workers):
    blocks = to_blocks(load(DOCUMENTS, streaming=True), tokenizer, BLOCK)
    batches = torch.utils.data.DataLoader(blocks, 4, num_workers=workers, collate_fn=BlockCollator())
    assert torch.cat([batch["input_ids"] for batch in batches]).tolist() == expected


def test_less_than_a_block_is_kept_if_it_is_all_there_is(load, tokenizer):
    assert ids(to_blocks(load(TEXTS[:2]), tokenizer, 1000)) == [joined(TEXTS[:2], tokenizer)]


def test_a_token_takes_two_bytes(load, tokenizer):
    blocks = to_blocks(load(DOCUMENTS), tokenizer, BLOCK)
    assert blocks.data.nbytes <= 2 * BLOCK * len(blocks) * 1.1


def test_a_tokenizer_that_would_truncate_loses_nothing(load, tokenizer, expected):
    tokenizer.backend_tokenizer.enable_truncation(4)
    assert ids(to_blocks(load(DOCUMENTS), tokenizer, BLOCK)) == expected


# ---- Batches ----


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_a_batch_trains_every_token_and_has_no_padding_mask(kind):
    rows = [[5, 6, 7, 2], [2, 8, 9, 5]]
    batch = BlockCollator()([{"input_ids": kind(row)} for row in rows])
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].dtype == torch.int64
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == rows


def test_masks_are_a_function_of_seed_and_batch_and_hide_no_special_token(load, tokenizer):
    blocks = to_blocks(load(DOCUMENTS * 4), tokenizer, BLOCK)
    first, second = ([blocks[row] for row in range(start, start + 32)] for start in (0, 32))
    batch = ReproducibleMasking(tokenizer, mlm_probability=0.5, seed=1)(first)
    assert set(batch) == {"input_ids", "labels"}
    original = torch.tensor([row["input_ids"].tolist() for row in first])
    hidden = batch["labels"] != -100
    assert torch.equal(batch["labels"][hidden], original[hidden])
    assert torch.equal(batch["input_ids"][~hidden], original[~hidden])
    assert not torch.isin(batch["labels"], torch.tensor([tokenizer.bos_token_id, tokenizer.eos_token_id])).any()
    share = hidden.sum() / (~torch.isin(original, torch.tensor(tokenizer.all_special_ids))).sum()
    assert 0.3 < share < 0.7

    def masked(rows, seed):
        return ReproducibleMasking(tokenizer, mlm_probability=0.5, seed=seed)(rows)["labels"] != -100

    assert torch.equal(hidden, masked(first, seed=1))
    assert not torch.equal(hidden, masked(first, seed=2))
    assert not torch.equal(hidden, masked(second, seed=1))
