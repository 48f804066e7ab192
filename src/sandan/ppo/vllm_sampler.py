"""Rollouts with vLLM, through trl's `VLLMGeneration`."""

from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import nn
from trl.import_utils import is_vllm_available

from ..models.sampling import to_completion
from .config import PPOConfig
from .rollout import INPUT_IDS, Rollout


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The lowest bias that vLLM's API accepts. No logit of a trained model is large enough to compensate for it.
NEVER = -100.0


class VLLMSampler:
    """Sampler that uses vLLM instead of `generate`, for the same policy and temperature.

    Old log-probs come from the training forward, so the first ratio is 1. But the answers are drawn from vLLM's slightly
    different probabilities: [`sampling_difference`] measures the difference, and `importance_cap` corrects for it.

    Args:
        policy: the policy (with its adapters, if any), loaded from a path, because vLLM reads the model from there.
        args: the settings `vllm_...`, named as in `trl.GRPOConfig`.

    Raises:
        ImportError: if vLLM is not installed.
        ValueError: if vLLM is to run in this process and the policy has no path.
    """

    def __init__(
        self,
        policy: nn.Module,
        accelerator: Accelerator,
        tokenizer: "PreTrainedTokenizerBase",
        stop_token_ids: list[int],
        args: PPOConfig,
    ):
        if not is_vllm_available():
            raise ImportError("use_vllm: vLLM is not installed; `pip install 'trl[vllm]'`, or set use_vllm to false")
        if args.vllm_mode == "colocate" and not policy.name_or_path:
            raise ValueError(
                "use_vllm: vLLM reads the model from its path; give `model` as a path, or load it from one"
            )
        # Not imported at the top, because this import loads vLLM if it is installed.
        from trl.generation.vllm_generation import VLLMGeneration

        self.tokenizer, self.stop_token_ids, self.temperature = tokenizer, stop_token_ids, args.temperature
        self.synced_step: int | None = None
        pad, vocabulary = tokenizer.pad_token_id, policy.config.get_text_config().vocab_size
        self.generation = VLLMGeneration(
            model=policy,
            accelerator=accelerator,
            processing_class=tokenizer,
            mode=args.vllm_mode,
            server_base_url=args.vllm_server_base_url,
            server_host=args.vllm_server_host,
            server_port=args.vllm_server_port,
            server_timeout=args.vllm_server_timeout,
            group_port=args.vllm_group_port,
            tensor_parallel_size=args.vllm_tensor_parallel_size,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            max_model_length=args.vllm_max_model_length,
            max_num_seqs=args.local_batch_size * args.vllm_tensor_parallel_size,
            enable_sleep_mode=args.vllm_enable_sleep_mode,
            model_impl=args.vllm_model_impl,
            repetition_penalty=1.0,
            temperature=args.temperature,
            top_p=1.0,
            top_k=0,
            max_completion_length=args.response_length,
            logprobs=0,
            generation_kwargs={
                # Only these tokens end an answer, not what vLLM finds in the model's files.
                "ignore_eos": True,
                "stop_token_ids": stop_token_ids,
                # A pad id outside the vocabulary cannot be sampled, and vLLM refuses a bias for it.
                "logit_bias": {pad: NEVER} if pad < vocabulary and pad not in stop_token_ids else None,
            },
        )

    def sample(self, rows: list[dict[str, Any]], step: int, greedy: bool = False) -> Rollout:
        """Answer this rank's prompts. All ranks must call this, with the same number of rows.

        Args:
            rows: dataset rows with `input_ids`.
            step: optimizer steps made so far; the weights are sent to vLLM again when it changes.
        """
        if self.synced_step != step:
            self.generation.sync_weights()
            self.synced_step = step
        self.generation.temperature = 0.0 if greedy else self.temperature
        prompts = [row[INPUT_IDS] for row in rows]
        _, answers, logprobs, _ = self.generation.generate(prompts=prompts, images=None, num_generations=1)
        completions = [to_completion(self.tokenizer, list(answer), self.stop_token_ids) for answer in answers]
        # A log-prob that vLLM could not give is None, which becomes NaN in a tensor.
        sampled = [
            torch.tensor([token[0] for token in row[: len(completion.token_ids)]], dtype=torch.float32)
            for row, completion in zip(logprobs, completions, strict=True)
        ]
        return Rollout(rows, completions, sampled)


def sampling_difference(
    rollout: Rollout, logprobs: torch.Tensor, mask: torch.Tensor, accelerator: Accelerator
) -> dict[str, float]:
    """Return the difference between the log-probs of vLLM and of the training forward; empty without vLLM.

    Args:
        logprobs (`(B, T)`): of the training forward.
        mask (`(B, T)`): the answers' tokens.

    Returns:
        Mean and maximum of the absolute difference in nats over the tokens of all ranks, under trl's names.
    """
    if rollout.sampling_logprobs is None:
        return {}
    difference = (logprobs[mask] - torch.cat(rollout.sampling_logprobs).to(logprobs.device)).abs()
    difference = difference[difference.isfinite()]
    total = torch.stack([difference.sum(), torch.tensor(float(len(difference)), device=logprobs.device)])
    largest = difference.max() if len(difference) else torch.zeros((), device=logprobs.device)
    summed, count = accelerator.reduce(total, reduction="sum").tolist()
    return {
        "sampling/sampling_logp_difference/mean": summed / max(count, 1),
        "sampling/sampling_logp_difference/max": accelerator.gather(largest).max().item(),
    }
