"""The figures of the comparison that need no chain: bits per byte of long documents, with any tokenizer."""

import math

import pytest
import torch
from helpers import TEXTS, zoo

from sandan.evaluate.comparison import document_bits_per_byte, windows
from sandan.models.tokens import document_end, document_start


@pytest.mark.parametrize("size", [2, 5, 8, 100])
@pytest.mark.parametrize("length", [2, 7, 8, 9, 31])
def test_windows_read_each_token_once_with_what_is_before_it(length, size):
    ids, seen = list(range(length)), []
    for window, first in windows(ids, size):
        assert len(window) <= size and first >= 1
        assert list(window) == ids[window[0] : window[-1] + 1]
        seen += window[first:]
    assert seen == ids[1:]


@pytest.mark.parametrize("name", ["gpt2", "qwen base", "llama base", "a tokenizer that ends every text"])
def test_bits_per_byte_are_those_of_the_document_as_pretraining_sees_it(name):
    tokenizer = zoo.make_tokenizer(zoo.FAMILIES[name])
    model = zoo.make_model(zoo.FAMILIES[name], tokenizer).eval()
    end = document_end(tokenizer)
    nats = 0.0
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        row = torch.tensor([[*(document_start(tokenizer) or [end]), *ids, end]])
        with torch.no_grad():
            nats -= model(row).logits[0, :-1].log_softmax(-1).gather(1, row[0, 1:, None]).sum().item()
    found = document_bits_per_byte(model, tokenizer, TEXTS)
    assert found == pytest.approx(nats / math.log(2) / sum(len(text.encode()) for text in TEXTS), rel=1e-5)
