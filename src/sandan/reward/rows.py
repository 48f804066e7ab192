"""Rows of reward training as token ids: both answers after their prompt, as PPO and the gate score them."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..models.rendering import Prompt, encode_rows, template_options


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase
    from trl import RewardConfig


def split_answer(prompt: Prompt | None, answer: str | list[dict[str, Any]]) -> tuple[Prompt, Any]:
    """Return the prompt of an answer and the answer itself: its last turn, or its text."""
    if isinstance(answer, str):
        return prompt or "", answer
    return [*(prompt or []), *answer[:-1]], answer[-1]


def encode_side(tokenizer: "PreTrainedTokenizerBase", rows: Sequence[dict[str, Any]], side: str) -> list[list[int]]:
    """Return the ids of the answer of each row in the column `side`, after its prompt, with the tools that it brings."""
    given: dict[str, list[tuple[Prompt, Any]]] = {}
    for row in rows:
        given.setdefault(json.dumps(template_options(row)), []).append(split_answer(row.get("prompt"), row[side]))
    encoded = {
        options: iter(encode_rows(tokenizer, *map(list, zip(*pairs, strict=True)), **json.loads(options)))
        for options, pairs in given.items()
    }
    return [next(encoded[json.dumps(template_options(row))])[0] for row in rows]


def encode_pairs(tokenizer: "PreTrainedTokenizerBase", rows: Sequence[dict[str, Any]]) -> dict[str, list[list[int]]]:
    """Return the ids of both answers of each pair, by side. An answer of a ranking is in several pairs: it is encoded once."""
    keys = {
        side: [repr((row.get("prompt"), row[side], template_options(row))) for row in rows]
        for side in ("chosen", "rejected")
    }
    distinct = {key: (row, side) for side in keys for key, row in zip(keys[side], rows, strict=True)}
    answers = [{**row, "answer": row[side]} for row, side in distinct.values()]
    ids = dict(zip(distinct, encode_side(tokenizer, answers, "answer"), strict=True))
    return {side: [ids[key] for key in found] for side, found in keys.items()}


def tokenized(
    dataset: "Dataset | IterableDataset", tokenizer: "PreTrainedTokenizerBase", config: "RewardConfig"
) -> "Dataset | IterableDataset":
    """Return pairs with `chosen_ids` and `rejected_ids`, which `trl.RewardTrainer` takes as they are (so does this, from a user)."""
    from datasets import IterableDataset

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        return {f"{side}_ids": ids for side, ids in encode_pairs(tokenizer, rows).items()}

    if "chosen_ids" in (dataset.column_names or ()):
        return dataset
    stream = isinstance(dataset, IterableDataset)
    options = {} if stream else {"num_proc": config.dataset_num_proc, "desc": "encoding pairs"}
    return dataset.map(encode, batched=True, **options)
