"""Rows of SFT as token ids and labels: the answers are trained, each with its stop token, and nothing else."""

from typing import TYPE_CHECKING, Any

from ..core.errors import UserError
from ..models.rendering import IGNORED, encode_conversation, encode_document, encode_rows, template_options


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig


def encode_row(
    row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase", text_field: str = "text"
) -> tuple[list[int], list[int]]:
    """Return the ids of a row and its labels, -100 where nothing is trained.

    Of a conversation the assistant's turns are trained (of `completion`, if the row has one), of `prompt` and
    `completion` as text the completion, of `text` everything.
    """
    options = template_options(row)
    prompt, turns = row.get("prompt"), row.get("messages")
    if turns is not None:
        return encode_conversation(tokenizer, turns, **options)
    if isinstance(prompt, list):
        return encode_conversation(tokenizer, [*prompt, *row["completion"]], len(prompt), **options)
    if prompt is not None:
        ((ids, start),) = encode_rows(tokenizer, [prompt], [row["completion"]])
        return ids, [IGNORED] * start + ids[start:]
    ids = encode_document(tokenizer, row[text_field])
    return ids, ids


def tokenized(
    dataset: "Dataset | IterableDataset", tokenizer: "PreTrainedTokenizerBase", config: "SFTConfig"
) -> "Dataset | IterableDataset":
    """Return a dataset as `input_ids` and `labels`, which `trl.SFTTrainer` takes as they are (so does this, from a user).

    Rows with an answer that `max_length` would cut are left out: a model that is trained on them learns not to stop.
    (Texts are cut by the trainer.) With `completion_only_loss: false` every token is trained.

    Raises:
        UserError: if no row is left.
    """
    from datasets import IterableDataset

    stream = isinstance(dataset, IterableDataset)
    columns = list(next(iter(dataset))) if dataset.column_names is None else dataset.column_names
    if "input_ids" in columns:
        return dataset
    everything, limit = config.completion_only_loss is False, config.max_length
    field = config.dataset_text_field

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        made: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
        for values in zip(*batch.values(), strict=True):
            row = dict(zip(batch, values, strict=True))
            ids, labels = encode_row(row, tokenizer, field)
            if field in row or limit is None or len(ids) <= limit:
                made["input_ids"].append(ids)
                made["labels"].append(ids if everything else labels)
        return made

    options = {} if stream else {"num_proc": config.dataset_num_proc, "desc": "encoding rows"}
    found = dataset.map(encode, batched=True, remove_columns=columns, **options)
    if not stream and not len(found):
        raise UserError(
            f"max_length: all {len(dataset):,} training rows are longer than {limit} tokens; raise max_length"
        )
    return found
