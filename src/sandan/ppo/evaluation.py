"""Evaluation on held-out prompts, and samples for the eye."""

import logging
import math
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from ..generation import batched
from .math import kl_estimate, response_masks
from .rollout import Rollout, stream_seed
from .samples import samples_table


logger = logging.getLogger(__name__)

# First number of the seeds of the answers to evaluation prompts; those of training have others.
EVALUATION = 3
SHOWN_SAMPLES = 4


class AnswerEvaluation(Trainer):
    """The part of `PPOTrainer` that answers prompts without learning from them."""

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: torch.utils.data.DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Answer the held-out prompts at the training temperature: scores, KL, lengths; the same seed every time."""
        args, device, dataset = self.args, self.accelerator.device, dataloader.dataset
        rank, ranks, total = self.accelerator.process_index, self.accelerator.num_processes, len(dataset)
        # Every rank takes as many rows (some twice, with weight 0): sharded models generate together.
        mine = range(rank, math.ceil(total / ranks) * ranks, ranks)
        sums = torch.zeros(5 + len(self.rewards), device=device, dtype=torch.float64)
        for number, batch in enumerate(batched(mine, args.per_device_eval_batch_size)):
            rows = [dataset[index % total] for index in batch]
            rollout = self.sample(rows, stream_seed(args.seed, EVALUATION, number, rank))
            lengths, stopped = rollout.lengths(device), rollout.stopped(device)
            components = self.score(rollout)
            _, scores = self._final_scores(components, rollout)
            logprobs, ref_logprobs, _ = self._forward(rollout)
            mask, _ = response_masks(lengths, logprobs.shape[1])
            kl = kl_estimate(logprobs, ref_logprobs, args.kl_estimator).masked_fill(~mask, 0).sum(1)
            weight = torch.tensor([float(index < total) for index in batch], device=device, dtype=torch.float64)
            columns = torch.stack([torch.ones_like(scores), scores, kl, lengths.float(), stopped.float()], 1)
            sums += weight @ torch.cat([columns, components], 1).double()
        count, *sums = self._reduce(sums).tolist()
        names = ["objective/scores", "objective/kl", "val/response_tokens", "val/stopped_share"]
        names += [f"rewards/{reward.name}" for reward in self.rewards]
        metrics = {f"{metric_key_prefix}_{name}": one / count for name, one in zip(names, sums, strict=True)}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=total)

    def generate_completions(self, sampling: bool = False) -> list[dict[str, Any]]:
        """Answer the evaluation prompts greedily and log a few of the answers.

        Args:
            sampling: only the first batch of prompts.

        Returns:
            Rows with `prompt`, `completion` and `score` (this rank's answers).
        """
        dataset = self.get_eval_dataloader().dataset
        size = self.args.per_device_eval_batch_size
        rows = [dataset[index] for index in range(min(size, len(dataset)) if sampling else len(dataset))]
        rollout = self.sample(rows, seed=0, greedy=True)
        scores = (self.score(rollout) @ self.reward_weights.to(self.accelerator.device)).tolist()
        self._show_samples(rollout, scores)
        texts = [completion.text for completion in rollout.completions]
        columns = zip(rollout.prompts(self.processing_class), texts, scores, strict=True)
        return [{"prompt": prompt, "completion": text, "score": score} for prompt, text, score in columns]

    def _show_samples(self, rollout: Rollout, scores: list[float]) -> None:
        if not self.accelerator.is_main_process:
            return
        columns = rollout.prompts(self.processing_class), rollout.completions, scores
        table = samples_table(*(column[:SHOWN_SAMPLES] for column in columns))
        logger.info("samples at step %d\n%s", self.state.global_step, table)
