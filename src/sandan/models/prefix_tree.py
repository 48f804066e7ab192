"""Rows that begin alike, such as the answers to one prompt, in one row: each common beginning is computed once.

The tokens of all rows are a tree: a token follows its parent, and attends to its ancestors and itself. That is what it
sees in a row of its own, so hidden states and gradients are the same (tree attention: SpecInfer, arXiv 2305.09781,
section 4.2). It saves arithmetic, which is what takes the time on a CPU. The mask is dense, so the kernels without masks
that a GPU has for flat rows cannot read it.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import torch


def prefix_tree(rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return the model inputs of rows whose common beginnings are computed once.

    Args:
        rows: token ids; none is empty.

    Returns:
        `dict`: `input_ids` and `position_ids` `(1, tokens)`, `attention_mask` `(1, 1, tokens, tokens)`, where a token
            sees itself and its ancestors, and `last_tokens` `(rows,)`, the place of each row's last token.
    """
    ids: list[int] = []
    positions: list[int] = []
    parents: list[int | None] = []
    path: list[int] = []  # the places of the tokens of the row before
    last = [0] * len(rows)
    before: Sequence[int] = ()
    for index in sorted(range(len(rows)), key=rows.__getitem__):
        row = rows[index]
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, row, strict=False)))
        del path[common:]
        for position, token in enumerate(row[common:], start=common):
            parents.append(path[-1] if path else None)
            path.append(len(ids))
            ids.append(token)
            positions.append(position)
        last[index], before = path[-1], row
    sees = np.eye(len(ids), dtype=bool)
    for place, parent in enumerate(parents):
        if parent is not None:
            sees[place] |= sees[parent]
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "attention_mask": torch.from_numpy(sees)[None, None],
        "last_tokens": torch.tensor(last),
    }
