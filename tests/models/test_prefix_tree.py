"""Rows in a tree give what each row gives alone, whatever they have in common."""

import copy

import pytest
import torch
from helpers import zoo
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification

from sandan.models.prefix_tree import prefix_tree
from sandan.models.rendering import pad_rows
from sandan.models.scoring import score_last_tokens
from sandan.models.unpadded_attention import obstacle, use_varlen


ROWS = [(7, 8, 9, 10), (7, 8, 9), (7, 8, 11, 12, 13), (20, 8), (7, 8, 9, 10, 14), (20,)]


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=12))
def test_the_tokens_that_a_rows_last_token_sees_are_the_row(rows):
    tree = prefix_tree(rows)
    ids, positions, sees = tree["input_ids"][0], tree["position_ids"][0], tree["attention_mask"][0, 0]
    for row, last in zip(rows, tree["last_tokens"].tolist(), strict=True):
        assert ids[sees[last]].tolist() == row
        assert positions[sees[last]].tolist() == list(range(len(row)))
    # Each beginning is there once.
    assert len(ids) == len({tuple(row[:end]) for row in rows for end in range(1, len(row) + 1)})


@pytest.mark.parametrize("family", list(zoo.FAMILIES))
def test_scores_and_gradients_are_those_of_padded_rows(family, tmp_path):
    folder = zoo.write(family, tmp_path / "model")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    if reason := obstacle(model):
        pytest.skip(f"its rows are padded: {reason}")
    score_last_tokens(model)
    use_varlen(model)
    ids, mask = pad_rows(ROWS, "right")
    gradients = []
    for inputs in ({"input_ids": ids, "attention_mask": mask}, prefix_tree(ROWS)):
        one = copy.deepcopy(model)
        scores = one(**inputs, use_cache=False).logits.squeeze(-1)
        scores.square().sum().backward()
        gradients.append((scores.detach(), {name: p.grad for name, p in one.named_parameters() if p.grad is not None}))
    (expected, wanted), (found, given) = gradients
    assert expected.std() > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert wanted.keys() == given.keys()
    for name in wanted:
        torch.testing.assert_close(given[name], wanted[name], rtol=1e-3, atol=1e-5, msg=name)
