"""Let the policy answer prompts, with `generate`, a replayed CUDA graph, shrinking batches or vLLM."""

import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import nn

from ..models.cuda_graph_sampling import Decoder, obstacle
from ..models.rendering import batched, pad_rows
from ..models.sampling import sample_ids, sampling_config, to_completion
from ..models.shrinking_sampling import shrinks
from ..training.trainer import leave_if_asked
from .config import PPOConfig
from .rollout import INPUT_IDS, Rollout
from .sharding import fsdp_plugin, policy_for_generation, uses_deepspeed
from .truncation import truncate_answers
from .vllm_sampler import VLLMSampler


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class Sampler:
    """Sampler of answers at the training temperature, with its own random stream.

    Args:
        policy: without wrappers.

    Attributes:
        decoder (`Decoder`, *optional*): samples instead of `generate`, if this device and model support it.
        vllm (`VLLMSampler`, *optional*): samples instead of both.
    """

    def __init__(
        self,
        policy: nn.Module,
        args: PPOConfig,
        tokenizer: "PreTrainedTokenizerBase",
        stop_token_ids: list[int],
        accelerator: Accelerator,
    ):
        self.policy, self.args, self.tokenizer, self.accelerator = policy, args, tokenizer, accelerator
        self.stop_token_ids = stop_token_ids
        self.fsdp = fsdp_plugin(accelerator) is not None
        # If ranks share the weights in shards, all of them must request every layer the same number of times.
        self.sharded = self.fsdp or uses_deepspeed(accelerator)
        self.vllm = VLLMSampler(policy, accelerator, tokenizer, stop_token_ids, args) if args.use_vllm else None
        self.decoder = self._make_decoder()

    def _make_decoder(self) -> Decoder | None:
        """Return the CUDA-graph sampler, or None if this device or model does not support it."""
        args, device = self.args, self.accelerator.device
        if args.use_vllm or args.rollout_engine == "generate" or device.type != "cuda":
            return None
        scattered = self.sharded and not (self.fsdp and args.ds3_gather_for_generation)
        reason = "the weights stay in shards" if scattered else obstacle(self.policy)
        if reason:
            logger.info("rollouts use generate, which is slower: %s", reason)
            return None
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        dtype = half or next(self.policy.parameters()).dtype
        rows = min(args.local_rollout_forward_batch_size, args.local_batch_size)
        return Decoder(self.policy, rows, args.response_length, dtype, args.torch_compile, device)

    @torch.no_grad()
    def sample(self, model: nn.Module, rows: list[dict[str, Any]], seed: int, step: int, greedy: bool) -> Rollout:
        """Return this rank's answers to the prompts of dataset rows.

        Args:
            model: policy and critic as they are trained, with wrappers or without.
            rows: with `input_ids`.
            seed: of the sampling (vLLM has its own); the global random state is not changed.
            step: optimizer steps made so far.
        """
        args, rollout = self.args, self._sample(model, rows, seed, step, greedy)
        if not args.truncate_after:
            return rollout
        return truncate_answers(self.tokenizer, rollout, args.truncate_after, args.truncate_min_tokens)

    def _sample(self, model: nn.Module, rows: list[dict[str, Any]], seed: int, step: int, greedy: bool) -> Rollout:
        leave_if_asked(self.accelerator)
        if self.vllm is not None:
            return self.vllm.sample(rows, step, greedy)
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            if self.decoder is not None:
                return self._decode(rows, seed, greedy)
            return self._generate(model, rows, seed, greedy)

    def _generate(self, model: nn.Module, rows: list[dict[str, Any]], seed: int, greedy: bool) -> Rollout:
        args, gather = self.args, self.args.ds3_gather_for_generation
        config = sampling_config(
            self.tokenizer, args.response_length, 0.0 if greedy else args.temperature, self.stop_token_ids
        )
        config.use_cache = True
        shrinking = args.rollout_engine != "generate" and not self.sharded and shrinks(self.policy)
        # If weights are gathered for every token, each rank must continue until the last rank has finished.
        synced = self.fsdp and not gather or None
        completions, started = [], time.perf_counter()
        model.eval()
        with (
            # With a cache, torch.compile would compile every layer separately, and again for every length.
            torch.compiler.set_stance("force_eager"),
            self.accelerator.autocast(),
            policy_for_generation(model, self.accelerator, gather) as bare,
        ):
            gather_seconds = time.perf_counter() - started
            torch.manual_seed(seed)
            for ids, mask in self._batches(rows, args.local_rollout_forward_batch_size):
                if shrinking:
                    answers = sample_ids(bare.policy, ids, mask, config)
                else:
                    options = {"attention_mask": mask, "generation_config": config, "synced_gpus": synced}
                    answers = bare.generate(input_ids=ids, **options)[:, ids.shape[1] :]
                completions += self._completions(answers)
        return Rollout(rows, completions, gather_seconds=gather_seconds if gather and self.sharded else None)

    def _decode(self, rows: list[dict[str, Any]], seed: int, greedy: bool) -> Rollout:
        completions, started, gather_seconds = [], time.perf_counter(), None
        self.decoder.load(self.policy)
        if self.fsdp:
            if self.accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            gather_seconds = time.perf_counter() - started
        torch.manual_seed(seed)
        temperature = 0.0 if greedy else self.args.logits_temperature
        suppressed = {self.tokenizer.pad_token_id} - {None, *self.stop_token_ids}
        for ids, mask in self._batches(rows, self.decoder.rows):
            answers = self.decoder.sample(ids, mask, temperature, self.stop_token_ids, suppressed)
            completions += self._completions(answers)
        return Rollout(rows, completions, gather_seconds=gather_seconds)

    def _batches(self, rows: list[dict[str, Any]], size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield left-padded prompts and their masks, both `(batch, seq)`."""
        for batch in batched(rows, size):
            leave_if_asked(self.accelerator)
            ids, mask = pad_rows([row[INPUT_IDS] for row in batch])
            yield ids.to(self.accelerator.device), mask.to(self.accelerator.device)

    def _completions(self, answers: torch.Tensor) -> list:
        return [to_completion(self.tokenizer, answer, self.stop_token_ids) for answer in answers.tolist()]

    def weights_replaced(self) -> None:
        """Record that the policy has got other weights without a new step, so that vLLM receives them again."""
        if self.vllm is not None:
            self.vllm.synced_step = None
