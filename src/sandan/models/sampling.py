"""Sampling of answers, the same way for every stage that samples: candidates, PPO and evaluate."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from .rendering import Prompt, batched, encode_prompts, pad_rows
from .shrinking_sampling import sample_shrinking, shrinks
from .tokens import find_stop_tokens


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Completion:
    """A sampled answer: its text, its tokens (with the stop token) and whether it ended with the stop token."""

    text: str
    token_ids: tuple[int, ...]
    stopped: bool


def sampling_config(
    tokenizer: "PreTrainedTokenizerBase", max_new_tokens: int, temperature: float, stop_token_ids: Sequence[int]
) -> GenerationConfig:
    """Return a complete configuration that uses nothing of the model's `generation_config` (penalties, filters).

    `temperature` 0 means greedy. `generate` fills finished rows with the first stop token, which every model has. The
    pad token is never sampled unless it is also a stop token.
    """
    pad, stops = tokenizer.pad_token_id, list(stop_token_ids)
    greedy = temperature == 0
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=not greedy,
        temperature=None if greedy else temperature + 1e-7,
        top_k=None if greedy else 0,
        top_p=None if greedy else 1.0,
        eos_token_id=stops,
        pad_token_id=stops[0],
        suppress_tokens=None if pad is None or pad in stops else [pad],
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
    stops = find_stop_tokens(tokenizer, model.generation_config)
    config = sampling_config(tokenizer, max_new_tokens, temperature, stops)
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
            ids, mask = pad_rows([encoded[index] for index in batch])
            answers = sample_ids(
                model, ids.to(model.device), mask.to(model.device), config, samples_per_prompt
            ).tolist()
            rows = (index for index in batch for _ in range(samples_per_prompt))
            for index, answer in zip(rows, answers, strict=True):
                completions[index].append(to_completion(tokenizer, answer, stops))
            progress.update(len(answers))
    model.train(training)
    return completions


class _Noise(LogitsProcessor):
    """Add Gumbel noise, with which the largest logit is a sample of the softmax.

    Its random stream is its own: threads that sample with torch's would change one another's answers.
    """

    def __init__(self, temperature: float, seed: int, device: torch.device):
        self.temperature = temperature
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.empty_like(scores).exponential_(generator=self.generator).log()
        return scores - self.temperature * noise


class _Stream(BaseStreamer):
    """Hand the text so far to `show`; `generate` first puts the prompt here, then each token."""

    def __init__(self, show: Callable[[str], None], decode: Callable[[list[int]], Completion]):
        self.show, self.decode = show, decode
        self.ids: list[int] | None = None

    def put(self, value: torch.Tensor) -> None:
        if self.ids is None:
            self.ids = []
            return
        self.ids += value.flatten().tolist()
        # A token may end within a character; its remaining bytes follow.
        self.show(self.decode(self.ids).text.rstrip("\ufffd"))

    def end(self) -> None:
        """Do nothing: whoever called `generate` has the whole answer."""


@torch.no_grad()
def stream_completion(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: Prompt,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    show: Callable[[str], None],
    is_stopped: Callable[[], bool] = lambda: False,
) -> Completion:
    """Sample one answer and show it while it grows; it depends on nothing but these arguments.

    Several threads can do so at once, each with a model of its own.

    Args:
        model: a causal LM in eval mode.
        show: gets the text so far after each token.
        is_stopped: ends the answer where it is, once it returns true.
    """
    stops = find_stop_tokens(tokenizer, model.generation_config)
    ids, mask = pad_rows(encode_prompts(tokenizer, [prompt]))
    stream = _Stream(show, lambda ids: to_completion(tokenizer, ids, stops))
    with neutral_generation(model):
        model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            # Greedy: the noise samples.
            generation_config=sampling_config(tokenizer, max_new_tokens, 0, stops),
            logits_processor=[_Noise(temperature, seed, model.device)] if temperature else None,
            streamer=stream,
            stopping_criteria=[lambda ids, scores: torch.full((len(ids),), is_stopped(), device=ids.device)],
        )
    completion = stream.decode(stream.ids or [])
    show(completion.text)
    return completion


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


def to_completion(
    tokenizer: "PreTrainedTokenizerBase", answer: list[int], stop_token_ids: Sequence[int]
) -> Completion:
    """Cut sampled ids after the first stop token and decode the ids before it."""
    end = next((at for at, token in enumerate(answer, start=1) if token in stop_token_ids), None)
    kept, stopped = answer[:end], end is not None
    text = tokenizer.decode(kept[:-1] if stopped else kept, skip_special_tokens=False)
    return Completion(text, tuple(kept), stopped)
