"""Queries and responses as padded tensors, and the log-probabilities and values at the trained tokens.

Only trained tokens are kept, side by side: position t of a row of `(B, T)` is the t-th token of the response that its
response mask keeps. So advantages pass over masked tokens, and padding is at the end of every row.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.utils import selective_log_softmax_and_entropy

from ..models.rendering import pad_rows
from ..ppo.formulas import Reduce, generalized_advantages, token_rewards, whiten
from .config import PPOConfig


logger = logging.getLogger(__name__)


@dataclass
class Batch:
    """Rows of `step`: the model's inputs, and the trained tokens.

    Args:
        inputs: arguments of the model's forward, padded on the right.
        tokens (`(B, T)`): trained tokens, 0 after the last one.
        positions (`(B, T)`): at which the model predicts them.
        mask (boolean `(B, T)`): which of them are real.
    """

    inputs: dict[str, torch.Tensor]
    tokens: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor

    def rows(self, rows: torch.Tensor) -> "Batch":
        """Return some rows."""
        inputs = {name: value[rows] for name, value in self.inputs.items()}
        return Batch(inputs, self.tokens[rows], self.positions[rows], self.mask[rows])


@dataclass
class Experience:
    """A batch with what is known of it before its update: scores `(B,)`, all else `(B, T)` and 0 outside the mask."""

    batch: Batch
    scores: torch.Tensor
    kl: torch.Tensor
    logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor | None = None
    returns: torch.Tensor | None = None

    def estimate(self, config: PPOConfig, kl_coef: float, reduce: Reduce) -> None:
        """Fill in advantages and returns. The score is paid at the last trained token."""
        mask = self.batch.mask
        rewards = token_rewards(self.kl, self.scores, mask.sum(1), kl_coef, score_at_stop_token=True)
        if config.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False, reduce=reduce)
        advantages, returns = generalized_advantages(rewards, self.values, config.gamma, config.lam)
        self.advantages, self.returns = whiten(advantages, mask, reduce=reduce), returns.masked_fill(~mask, 0)


@dataclass
class Outputs:
    """Hold what a model says of the trained tokens, each `(B, T)`; `logits` is `(B, T, V)`."""

    logprobs: torch.Tensor
    entropies: torch.Tensor
    values: torch.Tensor
    logits: torch.Tensor


def check_rows(
    batch_size: int, vocabulary: int, queries: Sequence, responses: Sequence, scores: Sequence, masks: Sequence | None
) -> torch.Tensor:
    """Return the scores as a float32 tensor `(B,)`, after checks of all arguments of `step`.

    Raises:
        ValueError: in one line, with the argument and the row.
    """
    named = {"queries": queries, "responses": responses, "scores": scores}
    for name, rows in (named if masks is None else named | {"response_masks": masks}).items():
        if len(rows) != batch_size:
            raise ValueError(f"{name}: step takes config.batch_size = {batch_size} rows, found {len(rows)}")
    for name, rows in (("queries", queries), ("responses", responses)):
        for at, row in enumerate(rows):
            if not isinstance(row, torch.Tensor) or row.dim() != 1 or row.is_floating_point():
                found = f"shape {tuple(row.shape)}" if isinstance(row, torch.Tensor) else type(row).__name__
                raise ValueError(f"{name}: row {at} must be a tensor of token ids of one dimension, found {found}")
            if not len(row):
                raise ValueError(f"{name}: row {at} has no tokens; at least one is needed")
            if row.min() < 0 or row.max() >= vocabulary:
                wrong = row.min() if row.min() < 0 else row.max()
                raise ValueError(f"{name}: row {at} has the id {wrong}, but the model's ids are 0 to {vocabulary - 1}")
    if all(response[: len(query)].equal(query) for query, response in zip(queries, responses, strict=True)):
        logger.warning(
            "responses: each begins with its query, which is then trained as part of the answer; generate with "
            "return_prompt=False, or cut it off"
        )
    for at, (mask, response) in enumerate(zip(masks or (), responses, strict=False)):
        if len(mask) != len(response) or not mask.any():
            raise ValueError(f"response_masks: row {at} must have a number for each token of its response, one not 0")
    numbers = [torch.as_tensor(score, dtype=torch.float).flatten().cpu() for score in scores]
    for at, number in enumerate(numbers):
        if len(number) != 1 or not number.isfinite():
            raise ValueError(f"scores: row {at} must be one finite number, found {number.tolist()}")
    return torch.cat(numbers)


def make_batch(
    queries: Sequence[torch.Tensor],
    responses: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor] | None,
    is_encoder_decoder: bool,
    device: torch.device,
) -> Batch:
    """Return the padded batch. The first token of an encoder-decoder's response begins it, and is not trained."""
    queries, responses = [row.tolist() for row in queries], [row.tolist() for row in responses]
    if is_encoder_decoder:
        ids, mask = pad_rows(queries, "right")
        decoder_ids, decoder_mask = pad_rows(responses, "right")
        inputs = {"input_ids": ids, "attention_mask": mask}
        inputs |= {"decoder_input_ids": decoder_ids, "decoder_attention_mask": decoder_mask}
        starts = [1] * len(responses)
    else:
        ids, mask = pad_rows([query + response for query, response in zip(queries, responses, strict=True)], "right")
        inputs = {"input_ids": ids, "attention_mask": mask}
        starts = [len(query) for query in queries]
    tokens, positions = [], []
    for row, (response, start) in enumerate(zip(responses, starts, strict=True)):
        kept = torch.ones(len(response)) if masks is None else masks[row].cpu()
        trained = torch.nonzero(kept[is_encoder_decoder:]).flatten()
        tokens.append(torch.tensor(response[is_encoder_decoder:])[trained])
        positions.append(trained + start - 1)
    real = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in tokens], batch_first=True)
    batch = Batch(inputs, pad_sequence(tokens, batch_first=True), pad_sequence(positions, batch_first=True), real)
    batch.inputs = {name: value.to(device) for name, value in batch.inputs.items()}
    batch.tokens, batch.positions, batch.mask = (
        tensor.to(device) for tensor in (batch.tokens, batch.positions, batch.mask)
    )
    return batch


def read(model: nn.Module, batch: Batch) -> Outputs:
    """Return a model's outputs at the trained tokens, at temperature 1."""
    logits, _, values = model(**batch.inputs, use_cache=False)
    rows = torch.arange(len(batch.tokens), device=logits.device)[:, None]
    logits, values = logits[rows, batch.positions], values[rows, batch.positions]
    logprobs, entropies = selective_log_softmax_and_entropy(logits, batch.tokens, False, 1.0)
    return Outputs(logprobs, entropies, values.float(), logits)


def kl_penalty(kind: str, policy: Outputs, reference: Outputs) -> torch.Tensor:
    """Return the KL per token, `(B, T)`: "kl" (k1), "abs", "mse" (k2) or "full" (exact)."""
    if kind == "full":
        ours, theirs = policy.logits.log_softmax(-1), reference.logits.log_softmax(-1)
        return (ours.exp() * (ours - theirs)).sum(-1)
    log_ratio = policy.logprobs - reference.logprobs
    return {"kl": log_ratio, "abs": log_ratio.abs(), "mse": log_ratio.square() / 2}[kind]
