"""Sampling of answers, the same way for every stage that samples: candidates, PPO and evaluate."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig

from .rendering import Prompt, batched, encode_prompts, pad_rows
from .shrinking_sampling import sample_shrinking, shrinks


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Completion:
    """A sampled answer: its text, its tokens (with the stop token) and whether it ended with the stop token."""

    text: str
    token_ids: tuple[int, ...]
    stopped: bool


def sampling_config(
    tokenizer: "PreTrainedTokenizerBase", max_new_tokens: int, temperature: float, stop_token_id: int | None = None
) -> GenerationConfig:
    """Return a complete configuration that uses nothing of the model's `generation_config` (penalties, filters).

    `temperature` 0 means greedy. The pad token is never sampled unless it is also the stop token: a sampled pad token
    could not be told from padding.
    """
    stop = tokenizer.eos_token_id if stop_token_id is None else stop_token_id
    greedy = temperature == 0
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=not greedy,
        temperature=None if greedy else temperature + 1e-7,
        top_k=None if greedy else 0,
        top_p=None if greedy else 1.0,
        eos_token_id=stop,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=None if tokenizer.pad_token_id == stop else [tokenizer.pad_token_id],
    )


@contextlib.contextmanager
def neutral_generation(model: "PreTrainedModel") -> Iterator[None]:
    """Replace the model's `generation_config` in the block: `generate` reads from it all that a call leaves unset."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@torch.no_grad()
def sample_completions(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    temperature: float = 1.0,
    samples_per_prompt: int = 1,
    batch_size: int = 128,
    seed: int = 0,
    description: str = "sampling",
) -> list[list[Completion]]:
    """Sample `samples_per_prompt` answers to each prompt.

    One random stream serves all prompts, so the answers to a prompt depend on the other prompts of the call.

    Args:
        model: a causal LM; it is in eval mode during the call.
        batch_size: rows (answers) generated at once. All answers to a prompt are in one batch; prompts of similar
            length share a batch.

    Returns:
        One list of [`Completion`] per prompt, in the order of `prompts`.
    """
    config = sampling_config(tokenizer, max_new_tokens, temperature)
    encoded = encode_prompts(tokenizer, prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(encoded[index]))
    completions: list[list[Completion]] = [[] for _ in prompts]
    training = model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    with (
        neutral_generation(model),
        torch.random.fork_rng(devices=devices),
        tqdm(total=len(prompts) * samples_per_prompt, desc=description, unit="answers") as progress,
    ):
        torch.manual_seed(seed)
        for batch in batched(order, max(batch_size // samples_per_prompt, 1)):
            ids, mask = pad_rows([encoded[index] for index in batch], tokenizer.pad_token_id)
            answers = sample_ids(
                model, ids.to(model.device), mask.to(model.device), config, samples_per_prompt
            ).tolist()
            rows = (index for index in batch for _ in range(samples_per_prompt))
            for index, answer in zip(rows, answers, strict=True):
                completions[index].append(to_completion(tokenizer, answer, config.eos_token_id))
            progress.update(len(answers))
    model.train(training)
    return completions


def sample_ids(
    model: "PreTrainedModel", ids: torch.Tensor, mask: torch.Tensor, config: GenerationConfig, count: int = 1
) -> torch.Tensor:
    """Sample `count` answers to each left-padded prompt `(B, P)`.

    Args:
        config: of [`sampling_config`].

    Returns:
        Token ids `(B * count, tokens)`; the answers to one prompt follow each other.
    """
    if shrinks(model):
        temperature = config.temperature if config.do_sample else 0.0
        tokens = (config.eos_token_id, config.suppress_tokens or ())
        return sample_shrinking(
            model, ids, mask, config.max_new_tokens, temperature, *tokens, answers_per_prompt=count
        )
    ids, mask = ids.repeat_interleave(count, 0), mask.repeat_interleave(count, 0)
    return model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, ids.shape[1] :]


def to_completion(tokenizer: "PreTrainedTokenizerBase", answer: list[int], stop_token_id: int) -> Completion:
    """Cut sampled ids after the first stop token and decode the ids before it."""
    stopped = stop_token_id in answer
    kept = answer[: answer.index(stop_token_id) + 1] if stopped else answer
    text = tokenizer.decode(kept[:-1] if stopped else kept, skip_special_tokens=False)
    return Completion(text, tuple(kept), stopped)
