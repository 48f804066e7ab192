"""PPO as TRL 0.11 offered it: the caller samples with `generate`, scores, and calls `step` for one update.

Read `step`: it is an update from top to bottom. The formulas are those of [`sandan.ppo.formulas`], beside their papers.
"""

import contextlib
import inspect
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration, release_memory
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, set_seed

from ..models.attention_kernels import avoid_cudnn_attention
from ..models.rendering import batched, pad_rows
from ..models.tokens import listed
from ..ppo.formulas import (
    adapted_kl_coef,
    clipped_policy_loss,
    clipped_value_loss,
    masked_sum,
    standard_deviation,
    updated_moments,
)
from ..ppo.policy_and_value import disable_dropout
from ..ppo.reduction import OverRanks
from ..ppo.rollout import shuffled
from .batch import Batch, Experience, check_rows, kl_penalty, make_batch, read
from .config import PPOConfig
from .statistics import SUMMED, describe, lengths_of, timed
from .value_head import ModelWithValueHead, create_reference_model, push_folder


logger = logging.getLogger(__name__)

# Columns that stay in the dataset beside the arguments of the model's forward.
SHOWN_COLUMNS = ("label", "query", "response")


class KLController:
    """The KL coefficient `value`; adaptive after Ziegler et al. 2019, or fixed."""

    def __init__(self, config: PPOConfig):
        self.config, self.value = config, config.init_kl_coef

    def update(self, current: float, n_steps: int) -> None:
        """Move towards the target, after `n_steps` answers with a mean KL of `current` nats each."""
        if self.config.adap_kl_ctrl:
            self.value = adapted_kl_coef(self.value, current, self.config.target, n_steps, self.config.horizon)


class PPOTrainer:
    """A trainer of a language model with a value head, one `step` for each batch of answers.

    Args:
        config: the settings.
        model: the policy and its critic.
        ref_model: the reference of the KL. Default: a frozen copy; with PEFT, the model with its adapter switched off.
        tokenizer: used for its EOS token, and saved with the model. Its pad token is not used.
        dataset: rows for `dataloader`, which gives batches of `config.batch_size` in a random order.
        optimizer: default: Adam.
        data_collator: makes a batch of rows, for `dataloader`.
        num_shared_layers: share the first layers with the default reference, and freeze them.
        lr_scheduler: moves once a `step`.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if arguments exclude each other, or the dataset is smaller than a batch.
    """

    def __init__(
        self,
        config: PPOConfig,
        model: ModelWithValueHead,
        ref_model: ModelWithValueHead | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dataset: Dataset | torch.utils.data.Dataset | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        data_collator: Callable | None = None,
        num_shared_layers: int | None = None,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        training_data_collator: Callable | None = None,
    ):
        check_arguments(config, model, ref_model, tokenizer, num_shared_layers, training_data_collator)
        set_seed(config.seed)
        self.config, self.tokenizer, self.dataset, self.lr_scheduler = config, tokenizer, dataset, lr_scheduler
        avoid_cudnn_attention()
        self.accelerator = Accelerator(
            log_with=config.log_with,
            project_config=ProjectConfiguration(**config.project_kwargs),
            **config.accelerator_kwargs,
        )
        if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(
                "sandan.legacy.PPOTrainer does not shard models (FSDP, DeepSpeed); sandan.PPOTrainer does"
            )
        if config.log_with is not None and not self.accelerator.log_with:
            raise ValueError(f"log_with: {config.log_with!r} is not installed; install it, or leave log_with out")
        config.world_size = self.accelerator.num_processes
        config.global_batch_size = config.batch_size * config.world_size
        config.global_backward_batch_size = config.backward_batch_size * config.world_size
        config.is_peft_model, config.is_encoder_decoder = model.is_peft_model, model.is_encoder_decoder
        self.accelerator.init_trackers(
            config.tracker_project_name, config=config.to_dict(), init_kwargs=config.tracker_kwargs
        )
        if ref_model is None and not model.is_peft_model:
            ref_model = create_reference_model(model, num_shared_layers)
        if ref_model is not None:
            ref_model = self.accelerator.prepare_model(ref_model, evaluation_mode=True).eval()
        self.ref_model = ref_model
        # Without dropout, training mode computes what `generate` sampled from.
        disable_dropout(model)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        self.is_peft_model, self.is_encoder_decoder = model.is_peft_model, model.is_encoder_decoder
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = optimizer or torch.optim.Adam(self.trained, lr=config.learning_rate)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.dataloader = None if dataset is None else self.prepare_dataloader(dataset, data_collator)
        self.current_device, self.over_ranks = self.accelerator.device, OverRanks(self.accelerator)
        self.kl_ctl, self.score_moments, self.current_step = KLController(config), (0.0, 0.0, 0.0), 0

    def prepare_dataloader(self, dataset: Any, data_collator: Callable | None = None) -> DataLoader:
        """Return the loader of a dataset, without the columns that neither the model nor a log reads.

        Raises:
            ValueError: if the dataset gives no whole batch on each process.
        """
        if isinstance(dataset, Dataset) and self.config.remove_unused_columns:
            model = self.accelerator.unwrap_model(self.model)
            known = {*inspect.signature(model.forward).parameters, *SHOWN_COLUMNS}
            dataset = dataset.select_columns([name for name in dataset.column_names if name in known])
        if len(dataset) < self.config.global_batch_size:
            raise ValueError(
                f"dataset: has {len(dataset)} rows, less than one batch of {self.config.global_batch_size}; lower batch_size"
            )
        size = self.config.batch_size
        loader = DataLoader(dataset, size, shuffle=True, collate_fn=data_collator, drop_last=True)
        return self.accelerator.prepare(loader)

    # ---- Sampling ----

    def generate(
        self,
        query_tensor: torch.Tensor | list[torch.Tensor],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int = 4,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        remove_padding: bool = True,
        **generation_kwargs: Any,
    ) -> Any:
        """Return the policy's answers: a list for a list of queries, `(1, length)` for a single query.

        Args:
            query_tensor: token ids of one dimension each.
            length_sampler: gives `max_new_tokens`, anew for each `batch_size` queries.
            return_prompt: whether each answer begins with its query.
            generate_ref_response: return the reference's answers too, as a second value.
            remove_padding: end the answers of a list after their first EOS.
            generation_kwargs: those of the model's `generate`.
        """
        queries = query_tensor if isinstance(query_tensor, list) else [query_tensor]
        if any(query.dim() != 1 for query in queries):
            raise ValueError("query_tensor: expected a tensor of one dimension, or a list of such tensors")
        cut = remove_padding and isinstance(query_tensor, list)
        model = self.accelerator.unwrap_model(self.model)
        chosen = [contextlib.nullcontext(model), *([self._reference()] if generate_ref_response else [])]
        results = []
        for choice in chosen:
            with choice as one:
                answers = []
                for rows in batched(queries, batch_size):
                    drawn = {} if length_sampler is None else {"max_new_tokens": int(length_sampler())}
                    answers += self._answers(one, rows, return_prompt, cut, generation_kwargs | drawn)
            results.append(answers if isinstance(query_tensor, list) else answers[0][None])
        return tuple(results) if generate_ref_response else results[0]

    @torch.no_grad()
    def _answers(
        self,
        model: ModelWithValueHead,
        queries: Sequence[torch.Tensor],
        return_prompt: bool,
        cut: bool,
        options: dict[str, Any],
    ) -> list[torch.Tensor]:
        """Return an answer to each query, sampled as one batch. EOS tokens of a query do not end its answer."""
        ends = {
            self.tokenizer.eos_token_id,
            *listed(options.get("eos_token_id", model.generation_config.eos_token_id)),
        }
        side = "right" if self.is_encoder_decoder else "left"
        ids, mask = (tensor.to(self.current_device) for tensor in pad_rows([row.tolist() for row in queries], side))
        training = model.training
        model.eval()
        # Tutorials write -1 for answers of full length; transformers' word for it is None.
        if options.get("eos_token_id") == -1:
            options = options | {"eos_token_id": None}
        whole = model.generate(input_ids=ids, attention_mask=mask, **options)
        model.train(training)
        # An encoder-decoder's answer keeps the token that begins it: `step` wants it too.
        start, answers = 1 if self.is_encoder_decoder else ids.shape[1], []
        for query, sampled in zip(queries, whole, strict=True):
            answer = sampled[start:]
            stops = [at for at, token in enumerate(answer.tolist()) if token in ends]
            answer = answer[: stops[0] + 1] if cut and stops else answer
            if self.is_encoder_decoder:
                answer = torch.cat([sampled[:1], answer])
            answers.append(
                torch.cat([query.to(answer), answer]) if return_prompt and not self.is_encoder_decoder else answer
            )
        return answers

    @contextlib.contextmanager
    def _reference(self):
        """Give the reference model in the block: the given one, a copy, or the policy without its adapter."""
        if self.ref_model is not None:
            yield self.ref_model
        else:
            model = self.accelerator.unwrap_model(self.model)
            with model.pretrained_model.disable_adapter():
                yield model

    # ---- One update, from top to bottom ----

    def step(
        self,
        queries: Sequence[torch.Tensor],
        responses: Sequence[torch.Tensor],
        scores: Sequence[torch.Tensor | float],
        response_masks: Sequence[torch.Tensor] | None = None,
    ) -> dict[str, Any]:
        """Make one PPO update, and return what is known of it under TRL's names (numbers; a `_dist` is an array).

        Args:
            queries, responses: token ids; a response does not repeat its query.
            scores: one number for each response.
            response_masks: 0 at the tokens of a response that the policy did not write.

        Raises:
            ValueError: if the rows are not as many as `batch_size`, empty, or a score is not finite.
            FloatingPointError: if a loss is not finite; the weights are then still good.
        """
        config, times, begin = self.config, {}, time.perf_counter()
        with timed(times, "time/ppo/compute_rewards"):
            vocabulary = self.accelerator.unwrap_model(self.model).get_input_embeddings().num_embeddings
            scores = check_rows(config.batch_size, vocabulary, queries, responses, scores, response_masks)
            scores = self._shape(scores)
        batch = make_batch(queries, responses, response_masks, self.is_encoder_decoder, self.current_device)
        with torch.no_grad():
            with timed(times, "time/ppo/forward_pass"):
                experience = self._forward(batch, scores)
            with timed(times, "time/ppo/compute_advantages"):
                experience.estimate(config, self.kl_ctl.value, self.over_ranks.sum)
        with timed(times, "time/ppo/optimize_step"):
            trained, ratios = self._optimize(experience)
        with timed(times, "time/ppo/calc_stats"):
            stats = describe(experience, trained, ratios, self.kl_ctl.value, config.vf_coef, self.over_ranks)
            stats |= lengths_of("queries", queries) | lengths_of("responses", responses)
        stats["ppo/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        self.kl_ctl.update(stats["objective/kl"], config.global_batch_size)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        if config.optimize_device_cache:
            release_memory()
        self.current_step += 1
        return stats | times | {"time/ppo/total": time.perf_counter() - begin}

    def _shape(self, scores: torch.Tensor) -> torch.Tensor:
        """Scale scores by the deviation of all so far, centre them on their mean, and clip them, as configured."""
        config, scores = self.config, scores.to(self.current_device)
        if config.use_score_scaling:
            self.score_moments = updated_moments(self.score_moments, scores, self.over_ranks.sum)
            mean = self.score_moments[1] if config.use_score_norm else 0
            scores = (scores - mean) / standard_deviation(self.score_moments)
        return scores if config.score_clip is None else scores.clamp(-config.score_clip, config.score_clip)

    def _forward(self, batch: Batch, scores: torch.Tensor) -> Experience:
        """Return what policy, critic and reference say of the batch, one mini-batch after the other."""
        parts = []
        for rows in torch.arange(len(batch.tokens)).split(self.config.mini_batch_size):
            part = batch.rows(rows)
            policy = read(self.model, part)
            with self._reference() as model:
                reference = read(model, part)
            kl = kl_penalty(self.config.kl_penalty, policy, reference)
            parts.append((kl, policy.logprobs, reference.logprobs, policy.values))
        whole = (torch.cat(tensors).masked_fill(~batch.mask, 0) for tensors in zip(*parts, strict=True))
        return Experience(batch, scores, *whole)

    def _optimize(self, experience: Experience) -> tuple[torch.Tensor, torch.Tensor]:
        """Make all optimizer steps. Return the means of `SUMMED` over the trained tokens of all passes, and ratios."""
        config, totals, ratios = self.config, torch.zeros(len(SUMMED) + 1), []
        self.model.train()
        for epoch in range(config.ppo_epochs):
            before = totals.clone()
            order = shuffled(config.batch_size, config.seed, self.current_step, epoch)
            for rows in order.split(config.backward_batch_size):
                totals += self._optimizer_step(experience, rows.split(config.mini_batch_size), ratios)
            *sums, tokens = (totals - before).tolist()
            if config.early_stopping and sums[SUMMED.index("policy/policykl")] > 1.5 * config.target_kl * tokens:
                break
        return totals[:-1] / totals[-1], torch.cat(ratios)

    def _optimizer_step(
        self, experience: Experience, parts: Sequence[torch.Tensor], ratios: list[torch.Tensor]
    ) -> torch.Tensor:
        """Make one step of a loss that is a mean over all tokens of `parts`. Return the sums of `SUMMED`, and tokens."""
        mask, totals, skipped = experience.batch.mask, torch.zeros(len(SUMMED) + 1), 0
        tokens = self.over_ranks.sum(mask[torch.cat(list(parts))].sum()).item()
        for number, rows in enumerate(parts):
            last = number == len(parts) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                sums, ratio = self._losses(experience, rows)
                seen = torch.stack([*sums.detach(), mask[rows].sum(), masked_sum(ratio, mask[rows])])
                seen = self.over_ranks.sum(seen).cpu()
                if not seen.isfinite().all():
                    raise FloatingPointError(f"step {self.current_step}: a loss is not finite; lower learning_rate")
                loss = (sums[0] + self.config.vf_coef * sums[1]) * self.accelerator.num_processes / tokens
                mean_ratio = (seen[-1] / seen[-2]).item()
                if mean_ratio > self.config.ratio_threshold:
                    logger.warning("the mean ratio %.2f is above ratio_threshold: mini-batch skipped", mean_ratio)
                    loss, skipped = loss * 0, skipped + 1
                self.accelerator.backward(loss)
            totals += seen[:-1]
            ratios.append(ratio[mask[rows]])
        if skipped < len(parts):
            if self.config.max_grad_norm is not None:
                self.accelerator.clip_grad_norm_(self.trained, self.config.max_grad_norm)
            self.optimizer.step()
        self.optimizer.zero_grad()
        return totals

    def _losses(self, experience: Experience, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sums of `SUMMED` over trained tokens (gradients flow through both losses), and the ratios."""
        config, part = self.config, experience.batch.rows(rows)
        old_logprobs, returns = experience.logprobs[rows], experience.returns[rows]
        new, advantages = read(self.model, part), experience.advantages[rows]
        policy_losses, ratio, clipped = clipped_policy_loss(new.logprobs, old_logprobs, advantages, config.cliprange)
        value_losses, value_clipped = clipped_value_loss(
            new.values, experience.values[rows], returns, config.cliprange_value
        )
        log_ratio, values = (new.logprobs - old_logprobs).detach(), new.values.detach()
        summed = (
            policy_losses,
            value_losses,
            new.entropies.detach(),
            log_ratio.square() / 2,
            -log_ratio,
            clipped.float(),
            advantages,
            values,
            (values - returns).square(),
            value_clipped.float(),
        )
        return torch.stack([masked_sum(numbers, part.mask) for numbers in summed]), ratio.detach()

    # ---- Logs, saving, the Hub ----

    def log_stats(
        self,
        stats: dict[str, Any],
        batch: dict[str, Any],
        rewards: Sequence[torch.Tensor | float],
        columns_to_log: Iterable[str] = ("query", "response"),
    ) -> None:
        """Send what `step` returned, and the rewards, to the trackers of `log_with`; with wandb also texts as a table.

        Raises:
            ValueError: with wandb, if the batch lacks a column.
        """
        scores = torch.tensor([float(reward) for reward in rewards], device=self.current_device)
        scores = self.accelerator.gather(scores).cpu()
        logs = stats | {"env/reward_mean": scores.mean().item(), "env/reward_dist": scores.numpy()}
        logs["env/reward_std"] = scores.std(correction=min(1, len(scores) - 1)).item()
        if self.config.log_with == "wandb" and self.accelerator.is_main_process:
            import wandb

            columns = list(columns_to_log)
            if missing := [name for name in columns if name not in batch]:
                raise ValueError(
                    f"columns_to_log: {', '.join(missing)}: not in the batch, which has {', '.join(batch)}"
                )
            texts = zip(*(batch[name] for name in columns), map(float, rewards), strict=True)
            logs["game_log"] = wandb.Table(columns=[*columns, "reward"], rows=[list(row) for row in texts])
        # wandb counts by itself: it would drop ours once the caller has logged something of their own.
        self.accelerator.log(logs, step=None if self.config.log_with == "wandb" else self.current_step)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write model, value head, tokenizer and a short card, on the main process."""
        if self.accelerator.is_main_process:
            self.accelerator.unwrap_model(self.model).save_pretrained(save_directory)
            self.tokenizer.save_pretrained(save_directory)
            self.create_model_card(save_directory)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Push what `save_pretrained` writes, from the main process; keywords as in [`push_folder`]."""
        return push_folder(repo_id, self.save_pretrained, **kwargs) if self.accelerator.is_main_process else None

    def create_model_card(self, path: str | Path, model_name: str | None = None) -> None:
        """Write a short `README.md` into a folder."""
        Path(path).mkdir(parents=True, exist_ok=True)
        name = model_name or Path(path).name
        head = "---\nlibrary_name: transformers\ntags:\n- sandan\n- ppo\n- reinforcement-learning\n---\n"
        text = (
            f"{head}\n# {name}\n\nTrained from `{self.config.model_name}` with PPO, by `sandan.legacy.PPOTrainer`.\n"
        )
        Path(path, "README.md").write_text(text, encoding="utf-8")


def check_arguments(
    config: PPOConfig,
    model: ModelWithValueHead,
    ref_model: ModelWithValueHead | None,
    tokenizer: PreTrainedTokenizerBase,
    num_shared_layers: int | None,
    training_data_collator: Callable | None,
) -> None:
    """Refuse arguments of the trainer that are of the wrong kind, or that exclude each other."""
    if not isinstance(config, PPOConfig):
        raise TypeError(f"config: expected a sandan.legacy.PPOConfig, found {type(config).__name__}")
    for name, one in (("model", model), ("ref_model", ref_model)):
        if not isinstance(one, ModelWithValueHead) and (name == "model" or one is not None):
            raise TypeError(
                f"{name}: expected a model with a value head, found {type(one).__name__}; wrap it: "
                "AutoModelForCausalLMWithValueHead.from_pretrained(model)"
            )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"tokenizer: expected a tokenizer of transformers, found {type(tokenizer).__name__}")
    if ref_model is model:
        raise ValueError("ref_model: is the model itself; leave it out, or give create_reference_model(model)")
    if num_shared_layers is not None and (ref_model is not None or model.is_peft_model):
        raise ValueError("num_shared_layers: has no effect with ref_model or with PEFT; leave it out")
    if training_data_collator is not None:
        raise ValueError("training_data_collator: has no effect, rows are padded by step itself; leave it out")
