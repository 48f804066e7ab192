"""Rows of reward training as token ids: both answers after their prompt, as PPO and the gate score them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from ..models.rendering import Prompt, encode_rows


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase
    from trl import RewardConfig


def split_answer(prompt: Prompt | None, answer: str | list[dict[str, Any]]) -> tuple[Prompt, Any]:
    """Return the prompt of an answer and the answer itself: its last turn, or its text."""
    if isinstance(answer, str):
        return prompt or "", answer
    return [*(prompt or []), *answer[:-1]], answer[-1]


def encode_side(
    tokenizer: "PreTrainedTokenizerBase", rows: Sequence[dict[str, Any]], side: Literal["chosen", "rejected"]
) -> list[list[int]]:
    """Return the ids of each row's chosen or rejected answer, after its prompt."""
    pairs = [split_answer(row.get("prompt"), row[side]) for row in rows]
    return [ids for ids, _ in encode_rows(tokenizer, *map(list, zip(*pairs, strict=True)))]


def tokenized(
    dataset: "Dataset | IterableDataset", tokenizer: "PreTrainedTokenizerBase", config: "RewardConfig"
) -> "Dataset | IterableDataset":
    """Return pairs with `chosen_ids` and `rejected_ids`, which `trl.RewardTrainer` takes as they are (so does this, from a user).

    An answer of a ranking is in several pairs, and is encoded once for each slice of pairs.
    """
    from datasets import IterableDataset

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        prompts = batch.get("prompt") or [None] * len(batch["chosen"])
        pairs = {
            side: [split_answer(*pair) for pair in zip(prompts, batch[side], strict=True)]
            for side in ("chosen", "rejected")
        }
        distinct = {repr(pair): pair for side in pairs.values() for pair in side}
        rows = encode_rows(tokenizer, *map(list, zip(*distinct.values(), strict=True)))
        ids = dict(zip(distinct, (row for row, _ in rows), strict=True))
        return {f"{side}_ids": [ids[repr(pair)] for pair in found] for side, found in pairs.items()}

    if "chosen_ids" in (dataset.column_names or ()):
        return dataset
    stream = isinstance(dataset, IterableDataset)
    options = {} if stream else {"num_proc": config.dataset_num_proc, "desc": "encoding pairs"}
    return dataset.map(encode, batched=True, **options)
