"""Answer held-out prompts to measure the policy, and show a few answers."""

import logging
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..core.text import aligned, one_line
from ..models.rendering import batched
from ..models.sampling import Completion
from .experience import Forward
from .formulas import kl_estimate, response_masks
from .rollout import Rollout, stream_seed


if TYPE_CHECKING:
    from datasets import Dataset

    from .trainer import PPOTrainer

logger = logging.getLogger(__name__)

# Second number of the seeds for answers to evaluation prompts; training uses others.
EVALUATION = 3
SHOWN_SAMPLES = 4
PROMPT_COLUMNS, ANSWER_COLUMNS = 60, 120


@torch.no_grad()
def evaluate_answers(trainer: "PPOTrainer", dataset: "Dataset", prefix: str) -> dict[str, float]:
    """Return means over the answers to held-out prompts: scores, KL, lengths. The seed is the same every time.

    Args:
        prefix: of the names of the metrics.
    """
    args, over_ranks, total = trainer.args, trainer.over_ranks, len(dataset)
    rank, ranks = trainer.accelerator.process_index, trainer.accelerator.num_processes
    # Every rank takes the same number of rows (some twice, with weight 0), because sharded models generate together.
    mine = range(rank, math.ceil(total / ranks) * ranks, ranks)
    sums = 0
    for number, batch in enumerate(batched(mine, args.per_device_eval_batch_size)):
        rows = [dataset[index % total] for index in batch]
        rollout = trainer.sample(rows, stream_seed(args.seed, EVALUATION, number, rank))
        components = trainer.score(rollout)
        _, scores = trainer.score_shaping(components, rollout)
        columns = torch.stack(list(_columns(trainer, rollout, scores, trainer.forward(rollout))), 1)
        weight = torch.tensor([float(index < total) for index in batch], device=scores.device, dtype=torch.float64)
        sums = sums + weight @ torch.cat([columns, components], 1).double()
    count, *means = over_ranks.sum(sums).tolist()
    names = ["objective/scores", "objective/kl", "val/response_tokens", "val/stopped_share"]
    names += [f"rewards/{reward.name}" for reward in trainer.rewards]
    return {f"{prefix}_{name}": mean / count for name, mean in zip(names, means, strict=True)}


def _columns(
    trainer: "PPOTrainer", rollout: Rollout, scores: torch.Tensor, forward: Forward
) -> Iterator[torch.Tensor]:
    """Yield the columns that are summed over the answers, each `(B,)`: 1, score, KL, length, whether it stopped."""
    lengths = rollout.lengths(scores.device)
    mask, _ = response_masks(lengths, forward.logprobs.shape[1])
    kl = kl_estimate(forward.logprobs, forward.ref_logprobs, trainer.args.kl_estimator).masked_fill(~mask, 0)
    yield from (torch.ones_like(scores), scores, kl.sum(1), lengths.float(), rollout.stopped(scores.device).float())


def generate_completions(trainer: "PPOTrainer", sampling: bool) -> list[dict[str, Any]]:
    """Answer the evaluation prompts greedily; see [`PPOTrainer.generate_completions`]."""
    if trainer.eval_dataset is None:
        return []
    dataset = trainer.get_eval_dataloader().dataset
    size = min(trainer.args.per_device_eval_batch_size, len(dataset)) if sampling else len(dataset)
    rollout = trainer.sample([dataset[index] for index in range(size)], seed=0, greedy=True)
    scores = (trainer.score(rollout) @ trainer.models.reward_weights.to(trainer.accelerator.device)).tolist()
    show_samples(trainer, rollout, scores)
    texts = [completion.text for completion in rollout.completions]
    columns = zip(rollout.prompts(trainer.processing_class), texts, scores, strict=True)
    return [{"prompt": prompt, "completion": text, "score": score} for prompt, text, score in columns]


def show_samples(trainer: "PPOTrainer", rollout: Rollout, scores: list[float]) -> None:
    """Log a few answers, on the main process."""
    if trainer.accelerator.is_main_process:
        columns = rollout.prompts(trainer.processing_class), rollout.completions, scores
        table = samples_table(*(column[:SHOWN_SAMPLES] for column in columns))
        logger.info("samples at step %d\n%s", trainer.state.global_step, table)


def samples_table(prompts: Sequence[Any], completions: Sequence[Completion], scores: Sequence[float]) -> str:
    """Return a table with score, number of tokens, whether the answer ended, prompt and answer. Long texts are cut.

    Args:
        prompts: texts or conversations (the last message is shown).
    """
    rows = [("score", "tokens", "ended", "prompt", "answer")]
    for prompt, completion, score in zip(prompts, completions, scores, strict=True):
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        ended = "yes" if completion.stopped else "no"
        texts = one_line(text, PROMPT_COLUMNS), one_line(completion.text, ANSWER_COLUMNS)
        rows.append((f"{score:.3f}", str(len(completion.token_ids)), ended, *texts))
    return aligned(rows)
