"""PPO for language models, driven by `transformers.Trainer`'s own loop.

How it differs from the textbook algorithm, and from TRL's last PPOTrainer:

1. An update uses a rollout batch for `num_ppo_epochs` x `num_mini_batches` optimizer steps. For Trainer an update is
   an epoch over a loader that yields micro-batches, so logs, evaluation, checkpoints, schedule, clipping, callbacks
   and resume are Trainer's. A log, evaluation or checkpoint that is due inside an update waits for its end.
2. Old log-probs come from the training forward over the same micro-batches as in the first epoch, not from `generate`,
   so the first ratio is exactly 1.
3. Losses are sums over tokens divided by the tokens of the whole optimizer step, over all micro-batches and ranks, so
   the gradient does not depend on how the batch is divided.
4. Masks come from response lengths, whitening and metrics use all ranks, and randomness depends only on (seed, update,
   epoch, rank).

Read `update`: it is PPO from top to bottom. The formulas are in formulas.py, beside their papers.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate import PartialState
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from ..models.loading import load_tokenizer
from ..models.tokens import find_stop_tokens, save_stop_tokens
from ..training.checkpoints import loading
from ..training.trainer import GuardedTrainer
from .build_models import build_models
from .config import PPOConfig
from .evaluation import evaluate_answers, generate_completions, show_samples
from .experience import Experience, Forward, estimate, last_values
from .formulas import adapted_kl_coef
from .losses import micro_batch_loss
from .metrics import UpdateMetrics
from .model_card import PAPER, push_checkpoint, write_model_card
from .policy_and_value import given_or_loaded, token_logprobs
from .reduction import OverRanks
from .rewards import RewardFunction, score_rollout
from .rollout import Rollout, prepare_dataset, prompt_indices, queued, shuffled, stream_seed
from .sampler import Sampler
from .score_shaping import ScoreShaping
from .shared_backbone import drop_policy_gradients, give_critic_its_rate
from .trl_names import no_attribute, takes_trl_calls
from .update_loop import UpdateFlow, UpdateLoader
from .watch import Watch


if TYPE_CHECKING:
    from datasets import Dataset

POSTPONED = ("should_log", "should_evaluate", "should_save", "should_training_stop")
# Second numbers of the seeds, after the run's own, of independent random streams (0 is the order of the prompts, 3 evaluation).
SAMPLING, MINIBATCHES = 1, 2


class PPOTrainer(GuardedTrainer):
    """A trainer of policy and critic with PPO, against reward models, reward functions or a mixture of them.

    Args:
        model: the policy, a causal LM or a path (loaded in float32).
        reward_funcs: a sequence classifier with one label, a path to one, a function `(prompts, completions, **columns)
            -> list[float]`, a pipeline, or a list of these (see `reward_weights`). In TRL its name is `reward_model`.
        args: the settings.
        train_dataset, eval_dataset: rows with `prompt` (text, or a conversation that the chat template renders) or
            tokenized `input_ids`; other columns are passed to reward functions.
        processing_class: the tokenizer. Its pad token is not used (see [`sandan.models.tokens`]).
        ref_model: the reference of the KL. Default: a frozen copy of the policy, or with PEFT the policy with its
            adapters switched off (or `ref_adapter_name`).
        value_model: the critic, a sequence classifier with one label and a `score` head. Default: a copy of the
            (first) reward model if it reads the policy's tokens, else a copy of the policy's backbone with a new head.
            Leave it out unless `critic_backbone` is "own".
        reward_processing_classes: tokenizers of the reward models; None for a model with the policy's tokenizer.
        peft_config: train adapters of this kind instead of the policy's weights. With `critic_backbone="adapter"` the
            critic is a further adapter on the same frozen backbone, and so is a reward that is given as the folder of
            a PEFT sequence classifier trained on it: memory holds one backbone instead of four.

    Calls in the order and with the names of TRL's PPOTrainer are taken too (see [`sandan.ppo.trl_names`]).

    Raises:
        ValueError: if arguments exclude each other, batch and minibatches do not fit, or there are too few rows.
    """

    _name = "PPO"
    _tag_names: ClassVar[list[str]] = ["sandan", "ppo"]
    _paper: ClassVar[dict[str, str]] = PAPER
    state_file = "ppo_state.json"

    @takes_trl_calls
    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: "str | PreTrainedModel | RewardFunction | list | None" = None,
        args: PPOConfig | None = None,
        train_dataset: "Dataset | list[dict] | None" = None,
        eval_dataset: "Dataset | dict[str, Dataset] | None" = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        ref_model: str | PreTrainedModel | None = None,
        value_model: str | PreTrainedModel | None = None,
        reward_processing_classes: "PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None" = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        data_collator: Callable | None = None,
    ):
        # The trainer changes its settings (accumulation, steps), so it takes a copy of the caller's object.
        caller, args = args, copy.copy(args) if args is not None else PPOConfig("tmp_trainer")
        policy = given_or_loaded(AutoModelForCausalLM, model)
        tokenizer = processing_class or load_tokenizer(policy.config.name_or_path)
        stops = find_stop_tokens(tokenizer, policy.generation_config, args.stop_token_id)
        if args.n_gpu > 1:
            raise ValueError("PPOTrainer runs one process per GPU: start it with `accelerate launch`")
        rewards = (reward_funcs, reward_processing_classes, tokenizer)
        self.models = models = build_models(policy, rewards, value_model, ref_model, peft_config, args)
        with PartialState().main_process_first():
            train_dataset, dropped = prepare_dataset(train_dataset, "train_dataset", tokenizer, args)
            eval_dataset, dropped_too = prepare_dataset(eval_dataset, "eval_dataset", tokenizer, args)
        self.dropped_prompts = dropped + dropped_too
        data = (data_collator or list, train_dataset, eval_dataset, tokenizer)
        super().__init__(models.trained(args), args, *data, callbacks=callbacks, optimizers=optimizers)
        args.derive_sizes(None if train_dataset is None else len(train_dataset))
        args.tell_sizes(caller)
        args.check(self.accelerator, optimizers[0])
        models.make_ready(self.accelerator, args, getattr(train_dataset, "column_names", None))
        self.over_ranks = OverRanks(self.accelerator)
        self.sampler = Sampler(models.policy, args, tokenizer, stops, self.accelerator)
        self.score_shaping = ScoreShaping(args, models.reward_weights, self.over_ranks)
        self.metrics = UpdateMetrics(args, self.over_ranks)
        self.watch = Watch(args)
        self._begin_state()

    def _begin_state(self) -> None:
        """Initialise the state that training changes. `kl_coef` and `value_center` are checkpointed.

        With `center_rewards` the critic is centred by its mean value after the last token of the first batch, because
        a critic that starts as the reward model predicts the scores before they are centred.
        """
        UpdateFlow(lambda: len(self.train_dataset), self.after_optimizer_step).replace_default(self.callback_handler)
        self.kl_coef = self.args.kl_coef
        self.value_center = None if self.args.center_rewards else self.models.critic_mean
        self.state.episode = 0
        self.experience: Experience | None = None
        self._postponed: set[str] = set()
        self._update_stopped = False

    # ---- One update, from top to bottom ----

    def update(self, number: int) -> Iterator[dict[str, torch.Tensor]]:
        """Sample, score, estimate advantages, then yield the micro-batches of every optimizer step."""
        args, metrics = self.args, self.metrics
        metrics.begin(number * args.batch_size)
        # 1. The policy answers.
        with metrics.timed("time/rollout_seconds"):
            seed = stream_seed(args.seed, SAMPLING, number, self.accelerator.process_index)
            rollout = self.sample(self.prompts(number), seed)
        # 2. The rewards judge.
        with metrics.timed("time/reward_seconds"):
            components = self.score(rollout)
            scores_before, scores = self.score_shaping(components, rollout, training=True)
        # 3. Log-probs, reference log-probs and values before the update.
        with metrics.timed("time/forward_seconds"):
            old = self.forward(rollout)
            if self.value_center is None:
                self.value_center = self.over_ranks.mean(last_values(rollout, old.values, args))
            # 4. KL-penalised rewards, advantages (GAE) and returns.
            experience = estimate(rollout, old, scores, self.kl_coef, self.value_center, args, self.over_ranks)
            if problem := experience.not_finite(self.over_ranks):
                unharmed = "the weights are still those of the step before"
                raise FloatingPointError(f"{self.place()}: {problem} of {args.batch_size} answers; {unharmed}")
        metrics.add_rollout(experience, scores_before, components, self.rewards, self.kl_coef)
        self.experience, self._update_stopped = experience, False
        self.state.episode = (number + 1) * args.batch_size
        metrics.begin_steps()
        if args.shows_samples(number):
            show_samples(self, rollout, scores.tolist())
        # 5. Trainer calls `compute_loss` on each micro-batch, and steps after the last one of a minibatch.
        yield from self.minibatches(number, experience)
        # 6. After the last step Trainer calls `_maybe_log_save_evaluate`, and that `_finish_update`.

    # ---- 1, 2, 3, 5: its parts ----

    def prompts(self, number: int) -> list[dict[str, Any]]:
        """Return this rank's dataset rows for an update."""
        args, rank, size = self.args, self.accelerator.process_index, self.args.local_batch_size
        indices = prompt_indices(number, args.batch_size, len(self.train_dataset), args.seed)
        return [self.train_dataset[index] for index in indices[rank * size : (rank + 1) * size]]

    def sample(self, rows: list[dict[str, Any]], seed: int, greedy: bool = False) -> Rollout:
        """Let the policy answer prompts, at the training temperature or greedily.

        Args:
            rows: dataset rows with `input_ids`.
            seed: of the sampling (vLLM has its own); the global random state is not changed.
        """
        return self.sampler.sample(self.model_wrapped, rows, seed, self.state.global_step, greedy)

    def score(self, rollout: Rollout) -> torch.Tensor:
        """Return the scores of each reward, `(B, rewards)`, float32; see [`score_rollout`]."""
        size = self.args.local_rollout_forward_batch_size
        return score_rollout(self.rewards, rollout, self.processing_class, size, self.over_ranks, self.place())

    @torch.no_grad()
    def forward(self, rollout: Rollout) -> Forward:
        """Return log-probs, reference log-probs and values of a rollout, over the first epoch's micro-batches."""
        args, device, total = self.args, self.accelerator.device, len(rollout.rows)
        width = rollout.width(range(total), args.response_length)
        old = Forward(*(torch.zeros(total, width, device=device) for _ in range(3)))
        self.model.eval()  # `training_step` switches back
        for minibatch in rollout.chunks(torch.arange(total), args.num_mini_batches, args.per_device_train_batch_size):
            for part in minibatch:
                inputs = rollout.tensors(part, args.response_length, device, args.torch_compile)
                rows, width = queued(torch.tensor(part), device), inputs["responses"].shape[1]
                old.logprobs[rows, :width], _, old.values[rows, :width] = self.model_wrapped(**inputs)
                with self.null_ref_context() as reference, self.accelerator.autocast():
                    logprobs, _ = token_logprobs(reference, **inputs, temperature=args.logits_temperature)
                    old.ref_logprobs[rows, :width] = logprobs
        return old

    def minibatches(self, number: int, experience: Experience) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the micro-batches of all optimizer steps of an update, with the number of tokens of their step."""
        args, device, rollout = self.args, self.accelerator.device, experience.rollout
        for epoch in range(args.num_ppo_epochs):
            # The first epoch is not shuffled, so that it has the same micro-batches as the old log-probs.
            numbers = (args.seed, MINIBATCHES, number, epoch, self.accelerator.process_index)
            order = shuffled(len(rollout.rows), *numbers) if epoch else torch.arange(len(rollout.rows))
            for minibatch in rollout.chunks(order, args.num_mini_batches, args.per_device_train_batch_size):
                chosen = queued(torch.tensor([index for part in minibatch for index in part]), device)
                masks = (experience.policy_mask[chosen], experience.value_mask[chosen])
                tokens, value_tokens = self.over_ranks.sum(torch.stack([mask.sum() for mask in masks]))
                for part in minibatch:
                    inputs = experience.micro_batch(part, args.response_length, device, args.torch_compile)
                    yield inputs | {"tokens": tokens, "value_tokens": value_tokens}

    # ---- 5. An optimizer step ----

    def training_step(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Train on a micro-batch, or compute nothing if `max_approx_kl` has stopped the update.

        The remaining steps of a stopped update still count. Without gradients torch's optimizers change neither
        weights nor moments, but Trainer's step number, and with it the learning rate, the checkpoints and the point to
        resume from, advances as if they had been made. So it depends only on the number of updates. (In the logs they
        are steps of loss 0 and gradient norm 0; the means of `policy/...` and `loss/...` are over computed tokens.)
        """
        if self._update_stopped:
            return torch.zeros((), device=self.accelerator.device)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.args.trains_critic_only(self.state.global_step):
            drop_policy_gradients(model)
        return loss

    def _prepare_inputs(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # The inputs are on the device already. Trainer's own method would cast advantages to bf16 under DeepSpeed.
        return inputs

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return L = L_policy + vf_coef L_value - entropy_coef H of one micro-batch, normalised over its step."""
        logprobs, entropies, values = model(inputs["input_ids"], inputs["attention_mask"], inputs["responses"])
        values = values - self.value_center  # as the old values
        made = micro_batch_loss(inputs, logprobs, entropies, values, self.args)
        self.metrics.add_micro_batch(inputs, made.sums, logprobs, made.ratio, made.policy_clipped, made.value_clipped)
        # Trainer divides by the micro-batches of the step and DDP by the ranks. The division by tokens has done both
        # already, so they are undone here.
        return made.loss * self.current_gradient_accumulation_steps * self.accelerator.num_processes

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | float | None = None) -> Any:
        """Check that loss and gradient are finite, and stop the update if its approximate KL is above `max_approx_kl`.

        (DeepSpeed has stepped already, so there the error comes one step late.)
        """
        grad_norm = super()._get_grad_norm(model, grad_norm)
        limit = self.args.max_approx_kl
        if limit and not self._update_stopped and self.metrics.step_approx_kl() > limit:
            self._update_stopped = True
            model.zero_grad()
        return grad_norm

    def after_optimizer_step(self) -> None:
        """Count the step and update the policy's average, unless the step was skipped (see `training_step`)."""
        if not (self._update_stopped or self.accelerator.optimizer_step_was_skipped):
            self.metrics.steps_taken += 1
            if self.models.average is not None:
                self.models.average.update()
        self.metrics.show(self.state, self._get_learning_rate())

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create Trainer's optimizer; `critic_learning_rate` puts the critic's weights into separate groups."""
        made, rate = self.optimizer, self.args.critic_learning_rate
        optimizer = super().create_optimizer(model)
        if made is None and rate is not None:
            give_critic_its_rate(optimizer, self.model if model is None else model, rate)
        return optimizer

    # ---- 6. The end of an update ----

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        if self.state.global_step % self.args.steps_per_update:
            # The rest of the update's steps need the experience, which exists only in memory: wait for its end.
            for flag in POSTPONED:
                if getattr(self.control, flag):
                    self._postponed.add(flag)
                    setattr(self.control, flag, False)
            return
        for flag in self._postponed:
            setattr(self.control, flag, True)
        self._postponed.clear()
        if self.experience is not None:
            self._finish_update()
        if self.watch.stopped:
            # A collapsed policy can look best to a judge that it has found a way around.
            self.control.should_evaluate = self.control.should_save = False
        self.state.epoch = self.state.episode / len(self.train_dataset)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _finish_update(self) -> None:
        """Finish the metrics of an update, set the next KL coefficient, and check for a collapse."""
        self.metrics.hide(self.state)
        args, metrics = self.args, self.metrics.finish(self.state.episode)
        if args.target_kl is not None and not args.trains_critic_only(self.state.global_step - 1):
            self.kl_coef = adapted_kl_coef(
                self.kl_coef, metrics["objective/kl"], args.target_kl, args.batch_size, args.kl_horizon
            )
        self.experience = None
        self.watch.look(metrics, self.state, self.control)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log Trainer's values and, for a training step, also the means of the updates since the last log."""
        self.metrics.add_to_log(logs)
        super().log(logs, start_time)

    # ---- Trainer's other hooks ----

    def get_train_dataloader(self) -> UpdateLoader:
        if self.train_dataset is None:
            raise ValueError("training needs a train_dataset")
        self.metrics.restart_clock()
        return UpdateLoader(self.update, self.args.steps_per_update * self.args.gradient_accumulation_steps)

    def get_eval_dataloader(self, eval_dataset: "str | Dataset | None" = None) -> torch.utils.data.DataLoader:
        if not (eval_dataset is None or isinstance(eval_dataset, str) or eval_dataset is self.eval_dataset):
            eval_dataset, _ = prepare_dataset(eval_dataset, "eval_dataset", self.processing_class, self.args)
        return super().get_eval_dataloader(eval_dataset)

    def evaluation_loop(
        self, dataloader: torch.utils.data.DataLoader, *args, metric_key_prefix: str = "eval", **kwargs
    ) -> EvalLoopOutput:
        dataset = dataloader.dataset
        metrics = evaluate_answers(self, dataset, metric_key_prefix)
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(dataset))

    def generate_completions(self, sampling: bool = False) -> list[dict[str, Any]]:
        """Answer the evaluation prompts greedily and log a few of the answers.

        Args:
            sampling: answer only the first batch of prompts.

        Returns:
            Rows with `prompt`, `completion` and `score` (this rank's answers).
        """
        return generate_completions(self, sampling)

    def place(self) -> str:
        """Return the numbers of the next optimizer step and update as text, for error messages."""
        step, steps = self.state.global_step, self.args.steps_per_update
        return f"step {step + 1} (update {step // steps + 1})"

    # ---- Saving and resuming ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        # `training_args.bin` is not written: it is a pickle, holds `hub_token` as plain text, and is never read.
        if self.args.should_save:
            bare = self.accelerator.unwrap_model(self.model)
            save_stop_tokens(bare.policy, self.processing_class, self.sampler.stop_token_ids)
            folder = Path(output_dir or self.args.output_dir)
            self.models.save(bare.policy, bare.value_model, self.processing_class, folder, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif not self.is_deepspeed_enabled:
            with loading(resume_from_checkpoint):
                self.models.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint, self.model)
        self.sampler.weights_replaced()

    def _run_state(self) -> dict[str, Any]:
        own = {"kl_coef": self.kl_coef, "value_center": self.value_center}
        return super()._run_state() | own | self.score_shaping.state_dict()

    def _set_run_state(self, state: dict[str, Any]) -> None:
        super()._set_run_state(state)
        self.kl_coef, self.value_center = state["kl_coef"], state["value_center"]
        self.score_shaping.load_state_dict(state)
        self.state.episode = self.state.global_step // self.args.steps_per_update * self.args.batch_size

    def _unlogged_metrics(self) -> dict[str, Any]:
        return self.metrics.state_dict()

    def _restore_metrics(self, unlogged: dict[str, Any]) -> None:
        self.metrics.load_state_dict(unlogged)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write `README.md` into the output folder (`push_to_hub` passes its keywords to this method).

        Args:
            model_name: the title. Default: the name of the Hub repository, else of the output folder.
            dataset_name: the name of the prompts' dataset on the Hub.
            tags: further tags besides the trainer's own.
        """
        write_model_card(self, model_name, dataset_name, tags)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        push_checkpoint(self, checkpoint_folder)

    # ---- TRL's names ----

    def __getattr__(self, name: str) -> Any:
        raise no_attribute(self, name)

    def null_ref_context(self) -> contextlib.AbstractContextManager[nn.Module]:
        """Give the reference model in the block; if it is the policy with other adapters (or none), switch them."""
        policy = self.accelerator.unwrap_model(self.model_wrapped).policy
        return self.models.reference(policy, self.args.ref_adapter_name)

    policy_model = property(lambda self: self.models.policy, doc="The policy.")
    value_model = property(lambda self: self.models.value_model, doc="The critic.")
    ref_model = property(lambda self: self.models.ref_model, doc="The reference, if it is a model of its own.")
    reward_model = property(lambda self: self.models.first_reward(), doc="The first reward.")
    rewards = property(lambda self: self.models.rewards, doc="All rewards.")
    stop_token_id = property(lambda self: self.sampler.stop_token_ids[0], doc="The token that ends an answer.")
    is_peft_model = property(lambda self: isinstance(self.models.policy, PeftModel), doc="True with adapters.")
