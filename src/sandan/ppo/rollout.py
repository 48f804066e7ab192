"""Rollouts: the prompts of an update, the policy's answers, and their conversion to tensors."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset

from ..models.rendering import batched, encode_prompts, pad_rows, shortened
from ..models.sampling import Completion
from .config import PPOConfig


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PROMPT, INPUT_IDS = "prompt", "input_ids"
TOKENIZE_BATCH_ROWS = 1000


def stream_seed(*numbers: int) -> int:
    """Return a seed made from several numbers (run seed, purpose, update, rank ...).

    Different numbers give unrelated seeds.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def shuffled(rows: int, *numbers: int) -> torch.Tensor:
    """Return a permutation of `range(rows)` that depends only on `numbers`."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(stream_seed(*numbers)))


def prompt_indices(update: int, batch_size: int, rows: int, seed: int) -> list[int]:
    """Return the dataset rows of an update. Updates follow each other in repeated passes, each in its own order.

    This is a pure function, so a resumed run needs no data-loader state and skips no data.
    """
    first, last = update * batch_size, (update + 1) * batch_size
    passes = {number: shuffled(rows, seed, 0, number) for number in range(first // rows, (last - 1) // rows + 1)}
    return [int(passes[position // rows][position % rows]) for position in range(first, last)]


def queued(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to the device without waiting for the device to finish its work."""
    return tensor.to(device, non_blocking=True)


@dataclass
class Rollout:
    """A batch of episodes: dataset rows (with `input_ids`) and the policy's answer to each.

    Args:
        sampling_logprobs: log-probs of each answer's tokens under vLLM, if vLLM sampled them.
        gather_seconds: the time to gather the policy's weights, if they are in shards.
    """

    rows: list[dict[str, Any]]
    completions: list[Completion]
    sampling_logprobs: list[torch.Tensor] | None = None
    gather_seconds: float | None = None

    def prompts(self, tokenizer: "PreTrainedTokenizerBase") -> list[Any]:
        """Return the prompts in the form of the dataset, or as decoded text if it has only token ids."""
        return [row[PROMPT] if PROMPT in row else tokenizer.decode(row[INPUT_IDS]) for row in self.rows]

    def columns(self) -> dict[str, list[Any]]:
        """Return the other columns of the dataset, as lists."""
        return {name: [row[name] for row in self.rows] for name in self.rows[0] if name not in (PROMPT, INPUT_IDS)}

    def lengths(self, device: torch.device) -> torch.Tensor:
        """Return the number of tokens of each response, with the stop token, `(B,)`."""
        return torch.tensor([len(completion.token_ids) for completion in self.completions], device=device)

    def stopped(self, device: torch.device) -> torch.Tensor:
        """Return whether each response ended with the stop token, boolean `(B,)`."""
        return torch.tensor([completion.stopped for completion in self.completions], device=device)

    def tokens(self, index: int) -> int:
        """Return the number of tokens of a prompt and its response."""
        return len(self.rows[index][INPUT_IDS]) + len(self.completions[index].token_ids)

    def chunks(self, indices: torch.Tensor, steps: int, rows: int) -> Iterator[list[list[int]]]:
        """Split rows into `steps` equal minibatches, each a list of micro-batches of at most `rows` rows.

        Within a minibatch, rows of similar length share a micro-batch: this saves padding and does not change the sum
        of the losses over all tokens.
        """
        for minibatch in indices.chunk(steps):
            yield list(batched(sorted(minibatch.tolist(), key=self.tokens), rows))

    def width(self, indices: Sequence[int], response_length: int) -> int:
        """Return the number of response positions that these rows need: the longest response, and one for the score.

        There is no position for the score if it would exceed `response_length`.
        """
        return min(max(len(self.completions[index].token_ids) for index in indices) + 1, response_length)

    def tensors(
        self, indices: Sequence[int], response_length: int, device: torch.device, compiled: bool = False
    ) -> dict[str, torch.Tensor | None]:
        """Return the model inputs of some rows, with no more padding than these rows need.

        Args:
            compiled: the layers are ([`compile_layers`]): one column more, so that there is always padding.

        Returns:
            `input_ids` and `attention_mask` `(B, P + T - 1)`, prompts left-padded and responses right-padded (the last
            response token predicts nothing), and `responses` `(B, T)`. The mask is None if nothing is padded, so that
            attention can use its fastest kernel.
        """
        width = self.width(indices, response_length)
        prompt_ids, prompt_mask = pad_rows(
            [self.rows[index][INPUT_IDS] for index in indices], more_columns=int(compiled)
        )
        answers = pad_rows([self.completions[index].token_ids for index in indices], "right")
        responses, mask = (torch.nn.functional.pad(tensor, (0, width - tensor.shape[1])) for tensor in answers)
        attention_mask = torch.cat([prompt_mask, mask[:, :-1]], 1)
        return {
            "input_ids": queued(torch.cat([prompt_ids, responses[:, :-1]], 1), device),
            "attention_mask": None if attention_mask.all() else queued(attention_mask, device),
            "responses": queued(responses, device),
        }


def without_padding(ids: Sequence[int], pad_token_id: int | None) -> list[int]:
    """Return a prompt's ids without the pad tokens before and after it; inside, that token may mean something else."""
    real = [at for at, token in enumerate(ids) if token != pad_token_id]
    return list(ids[real[0] : real[-1] + 1]) if real else []


def as_dataset(given: Any, name: str) -> Dataset:
    """Return rows as a `datasets.Dataset` of plain values, whatever format they are set to give.

    Args:
        given: a `Dataset`, a list of dicts, or another object with a length and rows that are dicts.
        name: the argument, for errors.

    Raises:
        TypeError: if it is something else, a stream for example.
        ValueError: if a row is no dict.
    """
    if isinstance(given, Dataset) and given.format["type"] != "custom":  # a transform makes its columns row by row
        return given.with_format(None)
    wanted = "expected a datasets.Dataset (not streamed) or a list of dicts"
    if isinstance(given, (IterableDataset, torch.utils.data.IterableDataset)):
        fix = "PPO draws prompts at random; give Dataset.from_list(list(stream.take(10_000)))"
        raise TypeError(f"{name}: {wanted}, found a stream: {fix}")
    if isinstance(given, (str, Mapping)) or not (hasattr(given, "__len__") and hasattr(given, "__getitem__")):
        keys = f" with {', '.join(map(repr, given))}" if isinstance(given, Mapping) else ""
        raise TypeError(f"{name}: {wanted}, found {type(given).__name__}{keys}")
    rows = [given[index] for index in range(len(given))]
    if bad := [row for row in rows if not isinstance(row, Mapping)]:
        raise ValueError(f"{name}: {wanted}, found a row that is a {type(bad[0]).__name__}")
    return Dataset.from_list([{key: plain(value) for key, value in row.items()} for row in rows])


def plain(value: Any) -> Any:
    """Return a tensor or an array as lists and numbers, and anything else as it is."""
    return value.tolist() if isinstance(value, (torch.Tensor, np.ndarray, np.generic)) else value


def shorten_prompts(
    dataset: Dataset, name: str, tokenizer: "PreTrainedTokenizerBase", max_tokens: int, num_proc: int | None
) -> Dataset:
    """Shorten the conversations of a dataset with `prompt` that are too long, as far as they can be."""
    if PROMPT not in dataset.column_names or INPUT_IDS in dataset.column_names:
        return dataset

    def shorten(row: dict[str, Any]) -> dict[str, Any]:
        turns = row[PROMPT]
        fits = None if isinstance(turns, str) or not turns else shortened(tokenizer, turns, max_tokens)
        return {PROMPT: fits or turns}

    short = dataset.map(shorten, features=dataset.features, num_proc=num_proc)
    changed = sum(len(one) < len(whole) for one, whole in zip(short[PROMPT], dataset[PROMPT], strict=True))
    if changed:
        logger.warning("%s: %d of %d prompts shortened to %d tokens", name, changed, len(dataset), max_tokens)
    return short


def prepare_prompts(
    given: Any, name: str, tokenizer: "PreTrainedTokenizerBase", args: PPOConfig
) -> tuple[Dataset, int]:
    """Add `input_ids` to a dataset of text prompts or conversations, and drop or shorten prompts that are too long.

    Args:
        given: rows (see [`as_dataset`]) with a column `prompt` (text or messages), or with `input_ids` (pad tokens
            around a prompt are removed).
        name: the argument, for errors.

    Returns:
        The dataset and the number of dropped rows.

    Raises:
        TypeError: if it cannot be taken as a dataset.
        ValueError: if it has neither column, or a prompt without tokens.
    """
    dataset, max_tokens, num_proc = as_dataset(given, name), args.max_prompt_tokens, args.dataset_num_proc
    if max_tokens is not None and args.long_prompts == "shorten":
        dataset = shorten_prompts(dataset, name, tokenizer, max_tokens, num_proc)

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        if INPUT_IDS in batch:
            rows = [without_padding(ids, tokenizer.pad_token_id) for ids in batch[INPUT_IDS]]
        else:
            rows = encode_prompts(tokenizer, batch[PROMPT])
        if not all(rows):
            raise ValueError(f"{name}: a prompt has no tokens: row {rows.index([])} of {TOKENIZE_BATCH_ROWS}")
        return {INPUT_IDS: rows}

    if not {PROMPT, INPUT_IDS} & set(dataset.column_names):
        raise ValueError(f"{name}: expected a column 'prompt' or 'input_ids', found {dataset.column_names}")
    encoded = dataset.map(encode, batched=True, batch_size=TOKENIZE_BATCH_ROWS, num_proc=num_proc)
    if max_tokens is not None:
        encoded = encoded.filter(lambda row: len(row[INPUT_IDS]) <= max_tokens, num_proc=num_proc)
    return encoded, len(dataset) - len(encoded)


def prepare_dataset(
    dataset: Any, name: str, tokenizer: "PreTrainedTokenizerBase", args: PPOConfig
) -> "tuple[Dataset | dict[str, Dataset] | None, int]":
    """Prepare a dataset, or several by name, with [`prepare_prompts`]; return it and the number of dropped prompts."""
    if dataset is None:
        return None, 0
    if isinstance(dataset, dict) and name != "train_dataset":
        parts = {key: prepare_dataset(part, f"{name}[{key!r}]", tokenizer, args) for key, part in dataset.items()}
        return {key: part for key, (part, _) in parts.items()}, sum(dropped for _, dropped in parts.values())
    prepared, dropped = prepare_prompts(dataset, name, tokenizer, args)
    if dropped:
        limit = f"longer than max_prompt_tokens={args.max_prompt_tokens}"
        logger.warning("%s: %d of %d prompts dropped: %s", name, dropped, len(dataset), limit)
    return prepared, dropped
