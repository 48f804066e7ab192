"""PPO for language models, driven by `transformers.Trainer`'s own loop.

How it differs from the textbook algorithm, and from TRL's last PPOTrainer:

1. One update = one rollout batch, used for `num_ppo_epochs` x `num_mini_batches` optimizer steps. To Trainer an update
   is one epoch over a loader that yields micro-batches, so logs, evaluation, checkpoints, schedule, clipping,
   callbacks and resume are Trainer's; what falls inside an update waits for its end.
2. Old log-probs come from the training forward over the very micro-batches of the first epoch, not from `generate`:
   the first ratio is exactly 1.
3. Losses are sums over tokens divided by the tokens of the whole optimizer step, over all micro-batches and ranks: the
   gradient does not depend on how the batch is cut.
4. Masks come from response lengths, whitening and metrics from all ranks, randomness from (seed, update, epoch, rank).
"""

import contextlib
import copy
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate import PartialState
from accelerate.utils import DynamoBackend
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DefaultFlowCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from trl.models.utils import prepare_deepspeed
from trl.trainer.utils import use_adapter

from ..compilation import compile_layers
from ..decoding import Decoder, obstacle
from ..generation import batched, pad_left, sample_ids, sampling_config, to_completion
from ..sampling import shrinks
from ..score_scale import fold_scale
from ..trainer import leave_if_asked
from .backbone import AdapterHead, Adapters, TrunkHead, critic_adapter, is_of_critic
from .checkpoints import ResumableTrainer
from .config import MAX_APPROX_KL, PPOConfig
from .ema import PolicyAverage
from .evaluation import AnswerEvaluation
from .flow import UpdateFlow, UpdateLoader
from .hub import PAPER, PushableTrainer
from .math import (
    Moments,
    adapted_kl_coef,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    generalized_advantages,
    kl_estimate,
    masked_sum,
    repeated_share,
    response_masks,
    standard_deviation,
    token_rewards,
    updated_moments,
    whiten,
)
from .modules import (
    PolicyAndValue,
    disable_dropout,
    has_score_head,
    load_model,
    token_logprobs,
    value_model_from_policy,
)
from .rewards import ModelReward, RewardFunction, make_rewards
from .rollout import (
    INPUT_IDS,
    Rollout,
    find_stop_token,
    prepare_prompts,
    prompt_indices,
    queued,
    shuffled,
    stream_seed,
)
from .sharding import complete, exact_outputs, policy_for_generation, shard_frozen
from .vllm import VLLMSampler, sampling_difference
from .watch import Watch


if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

POSTPONED = ("should_log", "should_evaluate", "should_save", "should_training_stop")
# First numbers of the seeds of independent random streams (0 is the order of the prompts, 3 evaluation).
SAMPLING, MINIBATCHES = 1, 2
# What is added up over the micro-batches of an optimizer step, to be looked at before the step is made.
STEP_SUMS = ("loss/policy_avg", "loss/value_avg", "policy/approxkl_avg", "tokens")


@dataclass
class Experience:
    """What an update learns from, for this rank's `B` episodes and their `T` response positions."""

    rollout: Rollout
    scores: torch.Tensor
    logprobs: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    policy_mask: torch.Tensor
    value_mask: torch.Tensor


class PPOTrainer(ResumableTrainer, AnswerEvaluation, PushableTrainer):
    """Trains a policy and a critic with PPO against reward models, reward functions or a mixture of them.

    Args:
        model: the policy, a causal LM or a path (loaded in float32).
        reward_funcs: a sequence classifier with one label, a path to one, a function
            `(prompts, completions, **columns) -> list[float]`, or a list of these (see `reward_weights`).
        args: the settings.
        train_dataset, eval_dataset: rows with `prompt` (text, or a conversation that the chat template renders) or
            tokenized `input_ids`; other columns are passed to reward functions.
        processing_class: the tokenizer; its pad token must differ from the stop token.
        ref_model: the reference of the KL. Default: a frozen copy of the policy, or with PEFT the policy with its
            adapters switched off (or `ref_adapter_name`).
        value_model: the critic, a sequence classifier with one label and a `score` head. Default: a copy of the
            (first) reward model if it reads the policy's tokens, else the policy's backbone with a new head. With
            another `critic_backbone` than "own" there is none to give.
        reward_processing_classes: tokenizers of the reward models, None where it is the policy's.
        peft_config: train adapters of this kind instead of the policy's weights. With `critic_backbone="adapter"` the
            critic is a further adapter on the same frozen backbone, and so is a reward that is given as the folder of
            a PEFT sequence classifier trained on it: one backbone in memory instead of four.
        reward_model: the name of `reward_funcs` in TRL.

    Raises:
        ValueError: if arguments exclude each other, the batch cannot be cut as asked, rows are too few or the pad
            token ends answers.
    """

    _name = "PPO"
    _tag_names: ClassVar[list[str]] = ["sandan", "ppo"]
    _paper: ClassVar[dict[str, str]] = PAPER

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: "str | PreTrainedModel | RewardFunction | list | None" = None,
        args: PPOConfig | None = None,
        train_dataset: "Dataset | None" = None,
        eval_dataset: "Dataset | dict[str, Dataset] | None" = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        ref_model: str | PreTrainedModel | None = None,
        value_model: str | PreTrainedModel | None = None,
        reward_processing_classes: "PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None" = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        data_collator: Callable | None = None,
        reward_model: "str | PreTrainedModel | RewardFunction | list | None" = None,
    ):
        if (reward_funcs is None) == (reward_model is None):
            raise ValueError("give reward_funcs (or reward_model, its name in TRL), one of the two")
        # The trainer writes derived sizes into its settings; the caller's object stays as it was given.
        args = copy.copy(args) if args is not None else PPOConfig("tmp_trainer")
        policy = load_model(AutoModelForCausalLM, model)
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(policy.config.name_or_path)
        self.stop_token_id = find_stop_token(args.stop_token_id, processing_class)
        if args.n_gpu > 1:
            raise ValueError("PPOTrainer runs one process per GPU: start it with `accelerate launch`")

        rewards = reward_funcs if reward_model is None else reward_model, reward_processing_classes, processing_class
        self._make_models(policy, rewards, value_model, peft_config, args)
        self.ref_model = self._make_reference(ref_model, model)
        for one in self._models():
            disable_dropout(one)

        self.dropped_prompts = 0
        with PartialState().main_process_first():
            train_dataset = self._prepare_dataset(train_dataset, "train_dataset", processing_class, args)
            eval_dataset = self._prepare_dataset(eval_dataset, "eval_dataset", processing_class, args)
        self.temperature = args.temperature + 1e-7
        super().__init__(
            model=PolicyAndValue(
                self.policy_model, self.value_model, self.temperature, args.entropy_coef > 0, self.adapters
            ),
            args=args,
            data_collator=data_collator or list,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._set_sizes()
        self._check_options(optimizers[0])
        self._make_ready()
        self._set_state()

    def _make_ready(self) -> None:
        """What needs the accelerator, or the sizes of the run."""
        args, policy = self.args, self.policy_model
        self.callback_handler.remove_callback(DefaultFlowCallback)
        self.callback_handler.callbacks.insert(0, UpdateFlow(self))
        self.watch = Watch(args)
        if self.is_fsdp_enabled:
            exact_outputs(self.accelerator.state.fsdp_plugin)
        self._place_frozen_models()
        self._compile()
        self.vllm = None
        if args.use_vllm:
            self.vllm = VLLMSampler(policy, self.accelerator, self.processing_class, self.stop_token_id, args)
        self.decoder = self._make_decoder()
        decay = args.policy_ema_decay
        self.policy_average = None if decay is None else PolicyAverage(policy, decay)

    def _set_state(self) -> None:
        """What changes during a run; the first three lines and `policy_average` are in every checkpoint.

        With `center_rewards` scores are centred by the first batch's mean, and so is the critic, by its mean value after
        the last token: one that starts as the reward model is right about the scores before they are centred.
        """
        self.kl_coef = self.args.kl_coef
        self.reward_center, self.value_center = (None, None) if self.args.center_rewards else (0.0, self.critic_mean)
        self.score_moments: Moments = (0.0, 0.0, 0.0)
        self.state.episode = 0
        self._postponed: set[str] = set()
        self._experience: Experience | None = None
        self._sums: dict[str, torch.Tensor] = {}
        self._step_sums = torch.zeros(len(STEP_SUMS), device=self.accelerator.device)
        self._steps_taken = 0
        self._update_stopped = False
        self._update_metrics: dict[str, float] = {}
        self._history: list[dict[str, float]] = []
        self._clock: tuple[float, int] | None = None

    def _check_options(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Refuse options that this way of running cannot honour."""
        args = self.args
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version == 1:
            raise ValueError("FSDP 1: PPO cannot sample from its shards; set fsdp_version: 2")
        if args.max_approx_kl and self.is_deepspeed_enabled:
            raise ValueError("max_approx_kl: not with DeepSpeed, which steps inside backward; use DDP or FSDP")
        if args.max_approx_kl is None:
            args.max_approx_kl = 0.0 if self.is_deepspeed_enabled or args.fp16 else MAX_APPROX_KL
        if args.policy_ema_decay is not None and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise ValueError("policy_ema_decay: not with DeepSpeed or FSDP, which hold weights in shards; use DDP")
        if args.critic_backbone != "own" and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise ValueError('critic_backbone: only "own" with DeepSpeed or FSDP; with one backbone use DDP')
        if args.critic_learning_rate is not None and optimizer is not None:
            raise ValueError("critic_learning_rate: not with an optimizer of your own; give its groups their rates")

    # ---- Models and sizes ----

    def _make_models(
        self, policy: nn.Module, rewards: tuple, value_model: Any, peft_config: PeftConfig | None, args: PPOConfig
    ) -> None:
        """Policy, critic and rewards; a critic of its own is made before adapters enter the policy."""
        self.adapters: Adapters | None = None
        if args.critic_backbone == "own":
            self.rewards = make_rewards(*rewards)
            self.value_model = self._make_value_model(value_model, policy)
            self.policy_model = self._make_policy(policy, peft_config, args)
        else:
            self.policy_model = self._make_policy(policy, peft_config, args)
            self._share_backbone(self.policy_model, rewards, value_model, args)
        # Scores are on the reward model's scale, and so is a critic that starts as a copy of it.
        scaled = not isinstance(self.value_model, TrunkHead)
        self.critic_mean = fold_scale(self.value_model.score, self.value_model.config) if scaled else 0.0
        weights = args.reward_weights or [1.0] * len(self.rewards)
        if len(weights) != len(self.rewards):
            raise ValueError(f"reward_weights: {len(weights)} for {len(self.rewards)} reward functions")
        self.reward_weights = torch.tensor(weights)

    def _models(self) -> list[nn.Module]:
        """Every model that there is; with one backbone some are adapters on it."""
        models = (self.policy_model, self.value_model, self.ref_model, *self._reward_models())
        return [model for model in models if model is not None]

    def _reward_models(self) -> list[PreTrainedModel]:
        return [reward.model for reward in self.rewards if isinstance(reward, ModelReward)]

    @property
    def reward_model(self) -> "PreTrainedModel | RewardFunction":
        """The first reward, under TRL's name."""
        first = self.rewards[0]
        return first.model if isinstance(first, ModelReward) else first.function

    def _make_value_model(self, value_model: str | PreTrainedModel | None, policy: nn.Module) -> PreTrainedModel:
        first = self.rewards[0]
        if any(value_model is one for one in self._reward_models()):
            raise ValueError("value_model is the reward model itself, which stays frozen; give a copy or leave it out")
        if value_model is not None:
            value_model = load_model(AutoModelForSequenceClassification, value_model, num_labels=1)
        elif isinstance(first, ModelReward) and first.own_tokenizer is None and has_score_head(first.model):
            value_model = copy.deepcopy(first.model)
        elif isinstance(policy, PeftModel):
            raise ValueError("value_model: needed with a PeftModel; or give a plain model and peft_config")
        else:
            value_model = value_model_from_policy(policy)
        if not has_score_head(value_model):
            raise ValueError(f"value_model: {type(value_model).__name__} has no linear `score` head with one output")
        return value_model.requires_grad_(True)

    def _share_backbone(self, policy: nn.Module, rewards: tuple, value_model: Any, args: PPOConfig) -> None:
        """Make rewards and critic where the critic has no backbone of its own."""
        if value_model is not None:
            raise ValueError(f'value_model: with critic_backbone="{args.critic_backbone}" there is none to give')
        if args.critic_backbone == "policy":
            self.rewards = make_rewards(*rewards)
            self.value_model = TrunkHead(policy)
            return
        if not self.is_peft_model:
            raise ValueError('critic_backbone: "adapter" needs peft_config, or a policy with adapters')
        self.adapters = Adapters(policy)
        self.rewards = make_rewards(*rewards, self.adapters)
        self.value_model = critic_adapter(self.adapters, self.reward_model)
        what = "policy, critic and reward" if isinstance(self.reward_model, AdapterHead) else "policy and critic"
        logger.info("one backbone: %s are adapters on it", what)

    def _make_policy(self, policy: nn.Module, peft_config: PeftConfig | None, args: PPOConfig) -> nn.Module:
        if peft_config is not None:
            if isinstance(policy, PeftModel):
                raise ValueError("peft_config: the model has adapters already; merge them first or leave it out")
            policy = get_peft_model(policy, peft_config)
        self.is_peft_model = isinstance(policy, PeftModel)
        if self.is_peft_model and args.model_adapter_name is not None:
            policy.set_adapter(args.model_adapter_name)
        if self.is_peft_model and args.gradient_checkpointing:
            policy.enable_input_require_grads()
        return policy

    def _make_reference(self, ref_model: str | PreTrainedModel | None, model: Any) -> PreTrainedModel | None:
        """The frozen reference, or None where it is the policy with other adapters."""
        if ref_model is not None and ref_model is model and not isinstance(model, str):
            raise ValueError("ref_model is the policy itself, which is trained; give a copy, or leave it out for one")
        if ref_model is not None:
            return load_model(AutoModelForCausalLM, ref_model).eval().requires_grad_(False)
        if self.is_peft_model:
            return None
        return copy.deepcopy(self.policy_model).eval().requires_grad_(False)

    def _place_frozen_models(self) -> None:
        for one in self._reward_models():
            if getattr(one, "is_quantized", False):
                continue
            if self.is_fsdp_enabled:
                complete(one, self.accelerator)
            else:
                one.to(self.accelerator.device)
        if self.ref_model is None:
            return
        if self.is_deepspeed_enabled:
            self.ref_model = prepare_deepspeed(self.ref_model, self.accelerator)
        elif self.is_fsdp_enabled:
            self.ref_model = shard_frozen(complete(self.ref_model, self.accelerator), self.accelerator)
        else:
            self.ref_model.to(self.accelerator.device)

    def _compile(self) -> None:
        """Compile the layers of every model, for `torch_compile`, which would otherwise compile the wrapper alone."""
        if self.args.torch_compile:
            self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
            for model in self._models():
                compile_layers(model)
            if self.adapters is not None:
                self.adapters.backbone.get_input_embeddings().register_forward_hook(
                    # The first layer's input has a gradient like every other's, and shares what was compiled for them.
                    lambda module, args, output: output.requires_grad_(torch.is_grad_enabled())
                )

    def _make_decoder(self) -> Decoder | None:
        """What samples instead of `generate`, where this machine and model can."""
        args, device = self.args, self.accelerator.device
        if args.use_vllm or args.rollout_engine == "generate" or device.type != "cuda":
            return None
        scattered = self.is_deepspeed_enabled or (self.is_fsdp_enabled and not args.ds3_gather_for_generation)
        reason = "the weights stay in shards" if scattered else obstacle(self.policy_model)
        if reason:
            logger.info("rollouts use generate, which is slower: %s", reason)
            return None
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        dtype = half or next(self.policy_model.parameters()).dtype
        rows = min(args.local_rollout_forward_batch_size, args.local_batch_size)
        return Decoder(self.policy_model, rows, args.response_length, dtype, args.torch_compile, device)

    def _prepare_dataset(
        self,
        dataset: "Dataset | dict[str, Dataset] | None",
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        args: PPOConfig,
    ) -> "Dataset | dict[str, Dataset] | None":
        if dataset is None:
            return None
        if isinstance(dataset, dict):
            return {key: self._prepare_dataset(one, key, tokenizer, args) for key, one in dataset.items()}
        prepared, dropped = prepare_prompts(dataset, tokenizer, args.max_prompt_tokens, args.dataset_num_proc)
        if dropped:
            logger.warning(
                "%s: %d of %d prompts dropped: longer than max_prompt_tokens=%d",
                name,
                dropped,
                len(dataset),
                args.max_prompt_tokens,
            )
        self.dropped_prompts += dropped
        return prepared

    def _set_sizes(self) -> None:
        """Turn episodes into optimizer steps, and cut the batch so that Trainer accumulates over one minibatch."""
        args, world = self.args, self.args.world_size
        local = args.per_device_train_batch_size * args.gradient_accumulation_steps
        if local % args.num_mini_batches:
            raise ValueError(
                f"num_mini_batches: {local} episodes per device (per_device_train_batch_size x "
                f"gradient_accumulation_steps) cannot be cut into {args.num_mini_batches} equal minibatches"
            )
        rows = 0 if self.train_dataset is None else len(self.train_dataset)
        if self.train_dataset is not None and rows < local * world:
            raise ValueError(
                f"train_dataset: {rows} prompts, but one update takes {local * world}; add prompts or lower "
                "per_device_train_batch_size or gradient_accumulation_steps"
            )
        self.steps_per_update = args.num_ppo_epochs * args.num_mini_batches
        if args.total_episodes is None and args.max_steps > 0:
            updates = math.ceil(args.max_steps / self.steps_per_update)
        else:
            updates = math.ceil((args.total_episodes or args.num_train_epochs * rows) / (local * world))
        args.local_batch_size, args.batch_size = local, local * world
        args.local_mini_batch_size = local // args.num_mini_batches
        args.mini_batch_size = args.local_mini_batch_size * world
        args.micro_batch_size = args.per_device_train_batch_size * world
        args.num_total_batches = updates
        args.gradient_accumulation_steps = math.ceil(args.local_mini_batch_size / args.per_device_train_batch_size)
        args.max_steps = updates * self.steps_per_update
        # An update's prompts and random numbers follow from its number: there is no data to skip on resume.
        args.ignore_data_skip = True

    # ---- The update ----

    def get_train_dataloader(self) -> UpdateLoader:
        if self.train_dataset is None:
            raise ValueError("training needs a train_dataset")
        self._clock = None
        return UpdateLoader(self)

    def get_eval_dataloader(self, eval_dataset: "str | Dataset | None" = None) -> torch.utils.data.DataLoader:
        if not (eval_dataset is None or isinstance(eval_dataset, str) or eval_dataset is self.eval_dataset):
            eval_dataset = self._prepare_dataset(eval_dataset, "eval_dataset", self.processing_class, self.args)
        return super().get_eval_dataloader(eval_dataset)

    def micro_batches(self, update: int) -> Iterator[dict[str, torch.Tensor]]:
        """Sample the answers of one update and yield what its optimizer steps need, in the order they are made."""
        args, device = self.args, self.accelerator.device
        self._rollout_started = time.perf_counter()
        self._clock = self._clock or (self._rollout_started, update * args.batch_size)
        self._update_metrics = {}
        indices = prompt_indices(update, args.batch_size, len(self.train_dataset), args.seed)
        first = self.accelerator.process_index * args.local_batch_size
        rows = [self.train_dataset[index] for index in indices[first : first + args.local_batch_size]]
        with self._timed("time/rollout_seconds"):
            rollout = self.sample(rows, stream_seed(args.seed, SAMPLING, update, self.accelerator.process_index))
        self._experience = experience = self._learn_from(rollout)
        self.state.episode = (update + 1) * args.batch_size
        self._update_started = time.perf_counter()
        self._sums = defaultdict(lambda: torch.zeros((), device=device))
        self._step_sums.zero_()
        self._steps_taken, self._update_stopped = 0, False
        if (
            args.num_sample_generations
            and update % math.ceil(args.num_total_batches / args.num_sample_generations) == 0
        ):
            self._show_samples(rollout, experience.scores.tolist())

        for epoch in range(args.num_ppo_epochs):
            # The first epoch keeps the rollout's minibatches, and with them the micro-batches of the old log-probs.
            numbers = (args.seed, MINIBATCHES, update, epoch, self.accelerator.process_index)
            order = shuffled(len(rows), *numbers) if epoch else torch.arange(len(rows))
            for minibatch in rollout.chunks(order, args.num_mini_batches, args.per_device_train_batch_size):
                chosen = queued(torch.tensor([index for part in minibatch for index in part]), device)
                masks = (experience.policy_mask[chosen], experience.value_mask[chosen])
                tokens, value_tokens = self._reduce(torch.stack([mask.sum() for mask in masks]))
                for part in minibatch:
                    yield self._micro_batch(part) | {"tokens": tokens, "value_tokens": value_tokens}

    @contextlib.contextmanager
    def _timed(self, metric: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._update_metrics[metric] = time.perf_counter() - started

    def _micro_batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        experience, args = self._experience, self.args
        inputs = experience.rollout.tensors(
            indices, args.response_length, self.processing_class.pad_token_id, self.accelerator.device
        )
        rows, width = queued(torch.tensor(indices), self.accelerator.device), inputs["responses"].shape[1]
        names = ("logprobs", "values", "advantages", "returns", "policy_mask", "value_mask")
        return inputs | {f"old_{name}": getattr(experience, name)[rows, :width] for name in names}

    def _prepare_inputs(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # On the device already; Trainer's own would cast advantages to bf16 under DeepSpeed.
        return inputs

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """L = L_policy + vf_coef L_value - entropy_coef H for one micro-batch, normalised over its optimizer step."""
        args, mask, value_mask = self.args, inputs["old_policy_mask"], inputs["old_value_mask"]
        logprobs, entropies, values = model(inputs["input_ids"], inputs["attention_mask"], inputs["responses"])
        values = values - self.value_center
        policy_losses, ratio, policy_clipped = clipped_policy_loss(
            logprobs, inputs["old_logprobs"], inputs["old_advantages"], args.cliprange, args.dual_clip
        )
        value_losses, value_clipped = clipped_value_loss(
            values, inputs["old_values"], inputs["old_returns"], args.cliprange_value
        )
        policy_loss, value_loss, entropy = (
            masked_sum(policy_losses, mask),
            masked_sum(value_losses, value_mask),
            masked_sum(entropies, mask),
        )
        with torch.no_grad():
            change = logprobs - inputs["old_logprobs"]
            sums = {
                "tokens": mask.sum(),
                "value_tokens": value_mask.sum(),
                "policy/approxkl_avg": masked_sum(change.square() / 2, mask),
                "policy/clipfrac_avg": masked_sum(policy_clipped.float(), mask),
                "policy/entropy_avg": entropy,
                "loss/policy_avg": policy_loss,
                "loss/value_avg": value_loss,
                "val/clipfrac_avg": masked_sum(value_clipped.float(), value_mask),
                "val/ratio": masked_sum(ratio, mask),
                "val/ratio_var": masked_sum(ratio.square(), mask),
            }
            for name, total in sums.items():
                self._sums[name] += total.detach()
            self._step_sums += torch.stack([sums[name].detach().float() for name in STEP_SUMS])
        tokens, value_tokens = inputs["tokens"], inputs["value_tokens"]
        loss = policy_loss / tokens + args.vf_coef * value_loss / value_tokens - args.entropy_coef * entropy / tokens
        # Trainer divides by the micro-batches of the step and DDP by the ranks; the division by tokens did both.
        return loss * self.current_gradient_accumulation_steps * self.accelerator.num_processes

    # ---- Optimizer steps ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's, with the critic's weights in groups of their own if they have another learning rate."""
        if self.optimizer is not None or self.args.critic_learning_rate is None:
            return super().create_optimizer(model)
        optimizer = super().create_optimizer(model)
        named = (self.model if model is None else model).named_parameters()
        critic = {id(parameter) for name, parameter in named if is_of_critic(name)}
        for group in list(optimizer.param_groups):
            own = [parameter for parameter in group["params"] if id(parameter) in critic]
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in critic]
            optimizer.add_param_group({**group, "params": own, "lr": self.args.critic_learning_rate})
        return optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Trainer's; nothing is computed in what remains of an update that `max_approx_kl` stopped.

        Those steps still count. Without gradients torch's optimizers change neither weights nor moments, while
        Trainer's step number, and with it the learning rate, the checkpoints and the place to resume from, goes on as
        if they had been made: it stays a function of the number of updates. (In the logs they count as steps of loss 0
        and gradient norm 0; the means of `policy/...` and `loss/...` are over the tokens that were computed.)
        """
        if self._update_stopped:
            return torch.zeros((), device=self.accelerator.device)
        return super().training_step(model, inputs, num_items_in_batch)

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | float | None = None) -> Any:
        """Trainer's, and the last look before the optimizer moves, with the same numbers on every rank.

        (DeepSpeed has stepped by now: there the error comes one step late.)

        Raises:
            FloatingPointError: if the losses or the gradient are not finite.
        """
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if self._update_stopped:
            return grad_norm
        *losses, approx_kl, tokens = self._reduce(self._step_sums).tolist()
        self._step_sums.zero_()
        # A gradient that overflows fp16 is not an error there: the loss scaler skips the step and goes on lower.
        norm = 0.0 if grad_norm is None or self.args.fp16 else float(grad_norm)
        if not all(map(math.isfinite, (*losses, norm))):
            found = (f"{name} {one / tokens:.3g}" for name, one in zip(STEP_SUMS, losses, strict=False))
            raise FloatingPointError(
                f"{self._place()}: not finite: {', '.join(found)}, gradient norm {norm:.3g}; the weights are still "
                "those of the step before. Lower learning_rate or max_grad_norm, or use bf16 or float32"
            )
        if self.args.max_approx_kl and approx_kl / tokens > self.args.max_approx_kl:
            self._update_stopped = True
            model.zero_grad()
        return grad_norm

    def after_optimizer_step(self) -> None:
        """Count the step and average the policy, unless there was none (see `training_step`)."""
        if self._update_stopped or self.accelerator.optimizer_step_was_skipped:
            return
        self._steps_taken += 1
        if self.policy_average is not None:
            self.policy_average.update()

    def _place(self) -> str:
        """The optimizer step that comes next, for error messages."""
        return f"step {self.state.global_step + 1} (update {self.state.global_step // self.steps_per_update + 1})"

    # ---- Rollout ----

    @torch.no_grad()
    def sample(self, rows: list[dict[str, Any]], seed: int, greedy: bool = False) -> Rollout:
        """Let the policy answer prompts, at the training temperature or greedily.

        Args:
            rows: dataset rows with `input_ids`.
            seed: of the sampling (vLLM has its own); the global random state is left alone.
        """
        leave_if_asked(self.accelerator)
        if self.vllm is not None:
            return self.vllm.sample(rows, self.state.global_step, greedy)
        args, tokenizer, device = self.args, self.processing_class, self.accelerator.device
        if self.decoder is not None:
            return self._decode(rows, seed, greedy)
        config = sampling_config(
            tokenizer, args.response_length, 0.0 if greedy else args.temperature, self.stop_token_id
        )
        config.use_cache = True
        # What finished rows are filled with, and embed, while others go on: a pad id may lie outside the vocabulary.
        config.pad_token_id = self.stop_token_id
        devices = [device] if device.type == "cuda" else []
        # Ranks that share the weights' shards must all ask for every layer as often.
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        shrinking = args.rollout_engine != "generate" and not sharded and shrinks(self.policy_model)
        completions, gather = [], args.ds3_gather_for_generation
        self.model.eval()
        started = time.perf_counter()
        with (
            torch.random.fork_rng(devices=devices),
            # A cache makes every layer a case of its own to compile, and every length another one.
            torch.compiler.set_stance("force_eager"),
            self.accelerator.autocast(),
            policy_for_generation(self.model_wrapped, self.accelerator, gather) as policy,
        ):
            gather_seconds = time.perf_counter() - started
            torch.manual_seed(seed)
            for batch in batched(rows, args.local_rollout_forward_batch_size):
                leave_if_asked(self.accelerator)
                ids, mask = pad_left([row[INPUT_IDS] for row in batch], tokenizer.pad_token_id)
                ids, mask = ids.masked_fill(mask == 0, 0).to(device), mask.to(device)
                if shrinking:
                    answers = sample_ids(policy.policy, ids, mask, config)
                else:
                    # A rank that gathers for every token must go on until the last one is done.
                    synced = self.is_fsdp_enabled and not gather or None
                    options = {"attention_mask": mask, "generation_config": config, "synced_gpus": synced}
                    answers = policy.generate(input_ids=ids, **options)[:, ids.shape[1] :]
                completions += [to_completion(tokenizer, answer, self.stop_token_id) for answer in answers.tolist()]
        return Rollout(rows, completions, gather_seconds=gather_seconds if gather and sharded else None)

    def _decode(self, rows: list[dict[str, Any]], seed: int, greedy: bool) -> Rollout:
        """[`sample`] on the decoder."""
        tokenizer, device, decoder = self.processing_class, self.accelerator.device, self.decoder
        completions, started = [], time.perf_counter()
        decoder.load(self.policy_model)
        gather_seconds = None
        if self.is_fsdp_enabled:
            if device.type == "cuda":
                torch.cuda.synchronize()
            gather_seconds = time.perf_counter() - started
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            for batch in batched(rows, decoder.rows):
                leave_if_asked(self.accelerator)
                ids, mask = pad_left([row[INPUT_IDS] for row in batch], tokenizer.pad_token_id)
                answers = decoder.sample(
                    ids.masked_fill(mask == 0, 0).to(device),
                    mask.to(device),
                    0.0 if greedy else self.temperature,
                    self.stop_token_id,
                    [tokenizer.pad_token_id],
                )
                completions += [to_completion(tokenizer, answer, self.stop_token_id) for answer in answers.tolist()]
        return Rollout(rows, completions, gather_seconds=gather_seconds)

    @contextlib.contextmanager
    def null_ref_context(self) -> Iterator[nn.Module]:
        """The reference model; where it is the policy with other adapters (or none), they are switched for the time."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        policy, name = self.accelerator.unwrap_model(self.model_wrapped).policy, self.args.ref_adapter_name
        with use_adapter(policy, name) if self.adapters is None else self.adapters.using(name):
            yield policy

    @torch.no_grad()
    def _forward(self, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probs, reference log-probs and values of a rollout `(B, T)`, over the first epoch's micro-batches."""
        args, device, total = self.args, self.accelerator.device, len(rollout.rows)
        width = rollout.width(range(total), args.response_length)
        logprobs, ref_logprobs, values = (torch.zeros(total, width, device=device) for _ in range(3))
        self.model.eval()
        for minibatch in rollout.chunks(torch.arange(total), args.num_mini_batches, args.per_device_train_batch_size):
            for part in minibatch:
                inputs = rollout.tensors(part, args.response_length, self.processing_class.pad_token_id, device)
                rows, width = queued(torch.tensor(part), device), inputs["responses"].shape[1]
                logprobs[rows, :width], _, values[rows, :width] = self.model_wrapped(**inputs)
                with self.null_ref_context() as ref_model, self.accelerator.autocast():
                    ref_logprobs[rows, :width], _ = token_logprobs(ref_model, **inputs, temperature=self.temperature)
        return logprobs, ref_logprobs, values

    def score(self, rollout: Rollout) -> torch.Tensor:
        """Scores of each reward, `(B, rewards)`, float32.

        Raises:
            ValueError: naming the reward and the row, if one fails or a score is not finite.
        """
        scores, error = torch.empty(0), None
        try:
            columns = [reward(rollout, self.args.local_rollout_forward_batch_size) for reward in self.rewards]
            scores = torch.tensor(columns, dtype=torch.float32).T
            bad = (~scores.isfinite()).nonzero().tolist()
            if bad:
                row, column = bad[0]
                prompt, name = rollout.prompts(self.processing_class)[row], self.rewards[column].name
                raise ValueError(
                    f"reward {name}: {scores[row, column].item()} for the prompt {prompt!r}, "
                    f"completion {rollout.completions[row].text!r} (row {row}); scores must be finite"
                )
        except ValueError as caught:
            error = caught
        # A process that stopped alone would leave the others waiting for it in the next reduction.
        failed = int(self._reduce(torch.tensor(float(error is not None), device=self.accelerator.device)))
        if failed:
            raise ValueError(f"{self._place()}: {error or f'rewards failed in {failed} other processes'}") from error
        return scores.to(self.accelerator.device)

    def _final_scores(
        self, components: torch.Tensor, rollout: Rollout, training: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One score per answer, `(B,)`, from those of each reward, before and after penalties.

        Args:
            training: let the batch set the centre and count towards the running deviation.
        """
        args, device = self.args, self.accelerator.device
        raw = components @ self.reward_weights.to(device)
        if training and self.reward_center is None:
            self.reward_center = self._mean(raw)
            logger.info("rewards are centred by the first batch's mean, %.4f", self.reward_center)
        if training and args.scale_scores:
            self.score_moments = updated_moments(self.score_moments, raw, self._reduce)
        before, scores = self._shape_scores(raw, rollout.stopped(device))
        if args.length_penalty is not None:
            scores = scores - args.length_penalty * rollout.lengths(device)
        return before, scores

    def _shape_scores(self, scores: torch.Tensor, stopped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Centre, scale and clip scores `(B,)`, then penalise answers that did not stop: before and after this."""
        args = self.args
        scores = scores - (self.reward_center or 0.0)
        if args.scale_scores:
            scores = scores / standard_deviation(self.score_moments)
        if args.score_clip is not None:
            scores = scores.clamp(-args.score_clip, args.score_clip)
        if args.missing_eos_penalty is None:
            return scores, scores
        if args.missing_eos_penalty_mode == "replace":
            penalised = torch.full_like(scores, -args.missing_eos_penalty)
        else:
            penalised = scores - args.missing_eos_penalty
        return scores, torch.where(stopped, scores, penalised)

    def _learn_from(self, rollout: Rollout) -> Experience:
        """Score a rollout and turn it into advantages and returns."""
        args, device = self.args, self.accelerator.device
        lengths = rollout.lengths(device)
        with self._timed("time/reward_seconds"):
            components = self.score(rollout)
            before, scores = self._final_scores(components, rollout, training=True)
        with self._timed("time/forward_seconds"):
            logprobs, ref_logprobs, values = self._forward(rollout)
            mask, value_mask = response_masks(lengths, logprobs.shape[1], args.score_at_stop_token)
            if self.value_center is None:
                self.value_center = self._mean(values.gather(1, value_mask.sum(1, keepdim=True) - 1).squeeze(1))
            values = values - self.value_center
            kl = kl_estimate(logprobs, ref_logprobs, args.kl_estimator).masked_fill(~mask, 0)
            values = values.masked_fill(~value_mask, 0)
            rewards = token_rewards(kl, scores, lengths, self.kl_coef, args.score_at_stop_token)
            if args.whiten_rewards:
                rewards = whiten(rewards, value_mask, shift_mean=False, reduce=self._reduce)
            advantages, returns = generalized_advantages(rewards, values, args.gamma, args.lam)
            if args.whiten_advantages:
                advantages = whiten(advantages, mask, reduce=self._reduce)
            self._check_finite(
                log_probs=logprobs.masked_fill(~mask, 0), kl=kl, values=values, advantages=advantages, returns=returns
            )
        experience = Experience(rollout, scores, logprobs, values, advantages, returns, mask, value_mask)
        self._update_metrics |= self._rollout_metrics(experience, kl, before, components)
        return experience

    def _check_finite(self, **tensors: torch.Tensor) -> None:
        """Refuse numbers that would ruin the weights; the first in the order of computation is the cause.

        Raises:
            FloatingPointError: on all ranks, if one of them has an answer with such a number.
        """
        bad = torch.stack([(~one.isfinite()).any(1).sum() for one in tensors.values()])
        for name, answers in zip(tensors, self._reduce(bad).tolist(), strict=True):
            if answers:
                raise FloatingPointError(
                    f"{self._place()}: {name.replace('_', '-')} not finite in {answers} of {self.args.batch_size} "
                    "answers; the weights are still those of the step before"
                )

    def _rollout_metrics(
        self, experience: Experience, kl: torch.Tensor, scores_before: torch.Tensor, components: torch.Tensor
    ) -> dict[str, float]:
        """What is known of an update before its first optimizer step.

        Args:
            kl (`(B, T)`): per token, 0 outside the answers.
            scores_before (`(B,)`): before penalties.
            components (`(B, rewards)`): of each reward.
        """
        device, rollout, mask = self.accelerator.device, experience.rollout, experience.policy_mask
        mean_kl, non_score = self._mean(kl.sum(1)), self._mean(-self.kl_coef * kl.sum(1))
        mean_score, stopped = self._mean(experience.scores), rollout.stopped(device)
        repeated = torch.tensor([repeated_share(one.token_ids) for one in rollout.completions], device=device)
        return {
            "objective/kl": mean_kl,
            "objective/entropy": self._mean((-experience.logprobs).masked_fill(~mask, 0).sum(1)),
            "objective/non_score_reward": non_score,
            "objective/rlhf_reward": mean_score + non_score,
            "objective/scores": mean_score,
            "objective/scores_before_penalty": self._mean(scores_before),
            "objective/kl_coef": self.kl_coef,
            "val/num_eos_tokens": self._reduce(stopped.sum()).item(),
            "val/stopped_share": self._mean(stopped.float()),
            "val/response_tokens": self._mean(rollout.lengths(device).float()),
            "val/repeated_share": self._mean(repeated),
            "val/explained_variance": explained_variance(
                experience.values, experience.returns, experience.value_mask, self._reduce
            ).item(),
            **self._component_means(components),
            **sampling_difference(rollout, experience.logprobs, mask, self.accelerator),
            **({} if rollout.gather_seconds is None else {"time/gather_seconds": rollout.gather_seconds}),
        }

    def _component_means(self, components: torch.Tensor) -> dict[str, float]:
        names = [f"rewards/{reward.name}" for reward in self.rewards]
        return {name: self._mean(column) for name, column in zip(names, components.T, strict=True)}

    def _reduce(self, total: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks."""
        return self.accelerator.reduce(total, reduction="sum")

    def _mean(self, values: torch.Tensor) -> float:
        """The mean over the episodes of all ranks (each has as many)."""
        return self._reduce(values.mean()).item() / self.accelerator.num_processes

    # ---- The end of an update ----

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        if self.state.global_step % self.steps_per_update:
            # Half of the batch's steps are still to come, and they exist in memory only: wait for the update's end.
            for flag in POSTPONED:
                if getattr(self.control, flag):
                    self._postponed.add(flag)
                    setattr(self.control, flag, False)
            return
        for flag in self._postponed:
            setattr(self.control, flag, True)
        self._postponed.clear()
        if self._experience is not None:
            self._finish_update()
        self.state.epoch = self.state.episode / len(self.train_dataset)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _finish_update(self) -> None:
        """Close the books of an update: global token means of its optimizer steps, pace, and the next KL coefficient."""
        args, metrics, now = self.args, self._update_metrics, time.perf_counter()
        names = sorted(self._sums)
        sums = dict(zip(names, self._reduce(torch.stack([self._sums[name].float() for name in names])), strict=True))
        tokens, value_tokens = sums.pop("tokens").item(), sums.pop("value_tokens").item()
        for name, total in sums.items():
            over_value_mask = name in ("loss/value_avg", "val/clipfrac_avg")
            metrics[name] = total.item() / (value_tokens if over_value_mask else tokens)
        metrics["val/ratio_var"] -= metrics["val/ratio"] ** 2
        metrics["time/update_seconds"] = now - self._update_started
        tokens_sampled = metrics["val/response_tokens"] * args.batch_size
        metrics["time/tokens_per_second"] = tokens_sampled / (now - self._rollout_started)
        if args.max_approx_kl:
            metrics["policy/epochs_used"] = self._steps_taken / args.num_mini_batches
        started, episodes = self._clock
        metrics["eps"] = (self.state.episode - episodes) / (now - started)
        metrics["episode"] = self.state.episode
        if args.target_kl is not None:
            self.kl_coef = adapted_kl_coef(
                self.kl_coef, metrics["objective/kl"], args.target_kl, args.batch_size, args.kl_horizon
            )
        self._history.append(metrics)
        self._experience = None
        self.watch.look(metrics, self.state)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log of a training step also carries the means of the updates since the last one."""
        if "loss" in logs and self._history:
            last, count = self._history[-1], len(self._history)
            means = {name: sum(one[name] for one in self._history) / count for name in last}
            logs |= means | {"eps": last["eps"], "episode": last["episode"], "lr": logs["learning_rate"]}
            self._history.clear()
        super().log(logs, start_time)
