"""The settings of [`PPOTrainer`]: `transformers.TrainingArguments` and the settings of PPO, under TRL's names."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from accelerate import Accelerator
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_utils import HubStrategy

from .sharding import fsdp_plugin, uses_deepspeed
from .trl_names import takes_trl_settings


# The default of `max_approx_kl`. The updates of recipe tiny stay below 0.03. Two runs of the toy of
# tests/project/test_seed_examples.py ran away at a learning rate of 1e-3 without this limit, and did not with it.
MAX_APPROX_KL = 0.1

# The sizes that the trainer derives. TRL's scripts read them from their own settings once there is a trainer.
DERIVED = (
    "total_episodes",
    "num_total_batches",
    "local_batch_size",
    "micro_batch_size",
    "batch_size",
    "local_mini_batch_size",
    "mini_batch_size",
)


@takes_trl_settings
@dataclass
class PPOConfig(TrainingArguments):
    """Settings of [`PPOTrainer`].

    Names, meanings and defaults are those of TRL's last `PPOConfig` (1.12), with these differences:

    - `logging_steps`, `save_steps`, `eval_steps` and `max_steps` count optimizer steps, as in every `Trainer`; an
      action that is due inside an update is done at its end.
    - `num_mini_batches` is respected: an update makes `num_ppo_epochs * num_mini_batches` optimizer steps.
    - Answers stop at the token that ends an assistant turn in the chat format, at EOS, and at the ids of the model's own
      list; with `stop_token_id` only at that one.
    - `bf16` is on by default only where CUDA is; `gradient_checkpointing` is off by default; Adam's epsilon is 1e-5.

    One update samples `per_device_train_batch_size * gradient_accumulation_steps * world_size` episodes (answers).

    Raises:
        ValueError: if a value is out of range, or two exclude each other.
    """

    # Inherited, with another default
    adam_epsilon: float = field(default=1e-5, metadata={"help": "Epsilon of AdamW (N+ and OpenAI's code: 1e-5)."})
    bf16: bool | None = field(
        default=None,
        metadata={"help": "bf16 mixed precision. If unset: on where CUDA supports it, unless fp16 is set."},
    )
    learning_rate: float = field(default=3e-6, metadata={"help": "Initial learning rate of policy and critic."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide NaN and infinite losses in the logs."})
    logging_steps: float | None = field(
        default=None, metadata={"help": "Log every X optimizer steps (< 1: share of the run); unset: every update."}
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Not used: every column of the dataset reaches the reward functions."}
    )

    # Data
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenize the prompts."})
    max_prompt_tokens: int | None = field(
        default=None,
        metadata={"help": "Longer prompts are dropped and counted (or see long_prompts); unset: no limit."},
    )
    long_prompts: Literal["drop", "shorten"] = field(
        default="drop",
        metadata={
            "help": "'shorten': a conversation over max_prompt_tokens loses its oldest turns, after those of the system, "
            "until it fits; text is dropped as before."
        },
    )

    # Models (read by scripts only)
    sft_model_path: str = field(
        default="EleutherAI/pythia-160m", metadata={"help": "Policy to start from, if no model_name_or_path is given."}
    )
    reward_model_path: str | None = field(
        default=None, metadata={"help": "Reward model: the folder of the reward stage, or a sequence classifier."}
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions (prompts, completions, **columns), as module:function; beside or instead of the model."
        },
    )
    # Models (read by the trainer)
    model_adapter_name: str | None = field(default=None, metadata={"help": "PEFT adapter that is trained."})
    ref_adapter_name: str | None = field(default=None, metadata={"help": "PEFT adapter that is the reference."})
    critic_backbone: Literal["own", "adapter", "policy"] = field(
        default="own",
        metadata={
            "help": "What the critic's value head reads: a model of its own; an adapter of its own on the policy's frozen "
            "backbone (with PEFT); or the hidden states of the policy, whose backbone then learns from both losses."
        },
    )
    ds3_gather_for_generation: bool = field(
        default=True,
        metadata={"help": "ZeRO-3, FSDP2: gather the policy's weights while sampling (fast, more memory)."},
    )

    # Rollout
    total_episodes: int | None = field(
        default=None, metadata={"help": "Episodes of the run, rounded up to whole updates; unset: num_train_epochs."}
    )
    response_length: int = field(default=53, metadata={"help": "Most tokens an answer may have."})
    temperature: float = field(default=0.7, metadata={"help": "Sampling temperature, also that of all log-probs."})
    stop_token: Literal["eos"] | None = field(
        default=None, metadata={"help": "'eos' (the same as unset); excludes stop_token_id."}
    )
    stop_token_id: int | None = field(default=None, metadata={"help": "Id of the token that ends an answer."})
    truncate_after: list[str] | None = field(
        default=None,
        metadata={
            "help": "Texts: an answer is cut after the token that completes one of them, and counts as stopped."
        },
    )
    truncate_min_tokens: int = field(
        default=0, metadata={"help": "truncate_after: the first X - 1 tokens of an answer are left alone."}
    )
    local_rollout_forward_batch_size: int = field(
        default=64, metadata={"help": "Answers sampled and scored at once on each device."}
    )
    rollout_engine: Literal["auto", "generate"] = field(
        default="auto",
        metadata={
            "help": "What samples: 'auto' replays a CUDA graph per token on a GPU (compiled first, with torch_compile), "
            "on a bf16 or fp16 copy of the policy, and lets ended answers leave the batch on a CPU, where the model "
            "allows it; 'generate' is transformers' generate."
        },
    )
    num_sample_generations: int = field(
        default=10, metadata={"help": "How often a few samples are logged during the run; 0 = never."}
    )

    # Rollout with vLLM: names and defaults of trl.GRPOConfig
    use_vllm: bool = field(default=False, metadata={"help": "Sample with vLLM (needs a GPU and trl[vllm])."})
    vllm_mode: Literal["colocate", "server"] = field(
        default="colocate", metadata={"help": "vLLM in the training processes, or as a server of its own."}
    )
    vllm_model_impl: str = field(
        default="vllm", metadata={"help": "Whose code of the model vLLM runs: 'vllm' or 'transformers'."}
    )
    vllm_enable_sleep_mode: bool = field(
        default=False, metadata={"help": "colocate: free vLLM's GPU memory while the update runs."}
    )
    vllm_server_base_url: str | None = field(
        default=None, metadata={"help": "server: its URL, e.g. http://localhost:8000; replaces host and port."}
    )
    vllm_server_host: str = field(default="0.0.0.0", metadata={"help": "server: its host."})
    vllm_server_port: int = field(default=8000, metadata={"help": "server: its port."})
    vllm_server_timeout: float = field(
        default=240.0, metadata={"help": "server: seconds to wait for it at the start."}
    )
    vllm_group_port: int = field(default=51216, metadata={"help": "server: port over which weights are sent."})
    vllm_gpu_memory_utilization: float = field(
        default=0.3, metadata={"help": "colocate: share of the GPU's memory that vLLM takes."}
    )
    vllm_max_model_length: int | None = field(
        default=None, metadata={"help": "colocate: most tokens of prompt and answer; unset: the model's own limit."}
    )
    vllm_tensor_parallel_size: int = field(default=1, metadata={"help": "colocate: GPUs that share one vLLM."})

    # Rollout with another engine than the training forward
    importance_cap: float | None = field(
        default=None,
        metadata={"help": "use_vllm: weigh a token's policy loss by min(p_train / p_vllm, X), e.g. 2; unset: by 1."},
    )

    # Reward
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward function, in their order; unset: all 1."}
    )
    center_rewards: bool = field(
        default=False,
        metadata={"help": "Subtract the mean score of the first batch (and of the critic's values for it)."},
    )
    scale_scores: bool = field(
        default=False, metadata={"help": "Divide scores by the running standard deviation of all scores so far."}
    )
    score_clip: float | None = field(
        default=None, metadata={"help": "Clip scores to +-X (after centring and scaling)."}
    )
    length_penalty: float | None = field(
        default=None, metadata={"help": "Subtract X from the score for each token of the answer (after all else)."}
    )
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Positive penalty for answers without the stop token."}
    )
    missing_eos_penalty_mode: Literal["subtract", "replace"] = field(
        default="subtract", metadata={"help": "Subtract the penalty from the score (TRL) or score -penalty (N+)."}
    )
    score_at_stop_token: bool = field(
        default=False, metadata={"help": "Pay the score at the stop token instead of one position later (N+, TRL)."}
    )
    whiten_rewards: bool = field(default=False, metadata={"help": "Scale token rewards to unit variance."})
    whiten_advantages: bool = field(default=True, metadata={"help": "Scale advantages to mean 0, unit variance."})
    kl_coef: float = field(default=0.05, metadata={"help": "KL coefficient (beta); with target_kl: its start."})
    kl_estimator: Literal["k1", "k2", "k3"] = field(default="k1", metadata={"help": "Estimator of the KL reward."})
    target_kl: float | None = field(
        default=None, metadata={"help": "KL (nats per answer) that an adaptive coefficient steers to; unset: fixed."}
    )
    kl_horizon: int = field(
        default=10_000, metadata={"help": "Episodes in which the adaptive coefficient moves 20%%."}
    )

    # Update
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over each rollout batch."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimizer steps per pass."})
    gamma: float = field(default=1.0, metadata={"help": "Discount."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalized advantage estimation."})
    value_lam: float | None = field(
        default=None,
        metadata={
            "help": "Lambda of the critic's returns (VAPO: 1.0, with a smaller lam for the policy); unset: lam."
        },
    )
    cliprange: float = field(default=0.2, metadata={"help": "Clip range of the probability ratio."})
    cliprange_high: float | None = field(
        default=None,
        metadata={"help": "Upper clip range of the ratio (DAPO: 0.28), cliprange being the lower; unset: cliprange."},
    )
    cliprange_value: float = field(default=0.2, metadata={"help": "Clip range of the value."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight of the entropy bonus."})
    dual_clip: float | None = field(
        default=None, metadata={"help": "Bound the loss of a token with A < 0 by -X A (X > 1, e.g. 3); unset: none."}
    )
    max_approx_kl: float | None = field(
        default=None,
        metadata={
            "help": "Skip the rest of an update once a step's approximate KL (nats per token) is above X; 0: never. Unset: "
            f"{MAX_APPROX_KL}, which healthy runs do not reach (never with fp16 or DeepSpeed, which cannot skip a step)."
        },
    )
    critic_learning_rate: float | None = field(
        default=None, metadata={"help": "Initial learning rate of the critic; unset: learning_rate."}
    )
    critic_warmup_updates: int = field(
        default=0, metadata={"help": "Updates at the start that train the critic only (VAPO, VC-PPO)."}
    )
    policy_ema_decay: float | None = field(
        default=None,
        metadata={"help": "Average the policy's weights, avg = X avg + (1 - X) w a step; saved in ema_policy/."},
    )

    # Guards
    stop_on_collapse: bool = field(
        default=False,
        metadata={
            "help": "End the run when the policy collapses, before it is saved: with load_best_model_at_end keep the best "
            "checkpoint so far, else with an error."
        },
    )
    max_kl_nats: float | None = field(
        default=None,
        metadata={
            "help": "Budget: with a KL to the reference above X nats per answer the policy counts as collapsed."
        },
    )

    # Derived: the trainer overwrites given values (TRL scripts read these fields)
    world_size: int | None = field(default=None, metadata={"help": "Derived: processes."})
    num_total_batches: int | None = field(default=None, metadata={"help": "Derived: updates of the run."})
    local_batch_size: int | None = field(default=None, metadata={"help": "Derived: episodes per update and process."})
    micro_batch_size: int | None = field(
        default=None, metadata={"help": "Derived: rows of one forward, all processes."}
    )
    batch_size: int | None = field(default=None, metadata={"help": "Derived: episodes per update."})
    local_mini_batch_size: int | None = field(default=None, metadata={"help": "Derived: per step and process."})
    mini_batch_size: int | None = field(default=None, metadata={"help": "Derived: episodes per optimizer step."})

    def __post_init__(self):
        if self.bf16 is None:
            cuda = torch.cuda.is_available() and not self.use_cpu and torch.cuda.is_bf16_supported()
            self.bf16 = cuda and not self.fp16
        if self.logging_steps is None:
            self.logging_steps = max(self.steps_per_update, 1)
        super().__post_init__()
        # Otherwise models would now be loaded in shards under ZeRO-3, and reference and critic could not copy them.
        unset_hf_deepspeed_config()
        if self.push_to_hub and self.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError(
                f"hub_strategy: '{self.hub_strategy.value}' would upload pickled optimizer states; use 'every_save' or 'end'"
            )
        if self.stop_token is not None and self.stop_token_id is not None:
            raise ValueError("stop_token and stop_token_id exclude each other; give one")
        if isinstance(self.truncate_after, str):
            self.truncate_after = [self.truncate_after]
        self._check_values()

    def _check_values(self) -> None:
        """Refuse values out of range."""
        for name in (
            "response_length",
            "temperature",
            "num_ppo_epochs",
            "num_mini_batches",
            "local_rollout_forward_batch_size",
            "kl_horizon",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: must be greater than 0, found {getattr(self, name)}")
        for name in (
            "total_episodes",
            "missing_eos_penalty",
            "target_kl",
            "score_clip",
            "length_penalty",
            "max_prompt_tokens",
            "critic_learning_rate",
            "cliprange_high",
            "importance_cap",
            "max_kl_nats",
        ):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name}: must be greater than 0 or unset, found {getattr(self, name)}")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip: must be greater than 1 or unset, found {self.dual_clip}")
        if self.value_lam is not None and not 0 <= self.value_lam <= 1:
            raise ValueError(f"value_lam: must be between 0 and 1 or unset, found {self.value_lam}")
        for name in ("critic_warmup_updates", "truncate_min_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must be at least 0, found {getattr(self, name)}")
        if self.truncate_after is not None and not all(self.truncate_after):
            raise ValueError("truncate_after: an empty text would cut every answer after its first token")
        if self.policy_ema_decay is not None and not 0 < self.policy_ema_decay < 1:
            raise ValueError(f"policy_ema_decay: must be between 0 and 1 or unset, found {self.policy_ema_decay}")
        if self.max_approx_kl is not None and self.max_approx_kl < 0:
            raise ValueError(f"max_approx_kl: must be at least 0 or unset, found {self.max_approx_kl}")
        if self.max_approx_kl and self.fp16:
            raise ValueError("max_approx_kl: not with fp16, whose loss scaler cannot skip a step; use bf16")
        for name, choices in (
            ("long_prompts", ("drop", "shorten")),
            ("stop_token", (None, "eos")),
            ("critic_backbone", ("own", "adapter", "policy")),
            ("kl_estimator", ("k1", "k2", "k3")),
            ("rollout_engine", ("auto", "generate")),
            ("missing_eos_penalty_mode", ("subtract", "replace")),
            ("vllm_mode", ("colocate", "server")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {choices}, found {getattr(self, name)!r}")

    @property
    def steps_per_update(self) -> int:
        """Return the number of optimizer steps of an update."""
        return self.num_ppo_epochs * self.num_mini_batches

    @property
    def logits_temperature(self) -> float:
        """Return the divisor of logits, in sampling and in all log-probs (N+ adds 1e-7)."""
        return self.temperature + 1e-7

    def trains_critic_only(self, step: int) -> bool:
        """Return whether an optimizer step (the first is 0) is in the critic's warm-up."""
        return step < self.critic_warmup_updates * self.steps_per_update

    def shows_samples(self, update: int) -> bool:
        """Return whether this update logs a few of its answers."""
        count = self.num_sample_generations
        return bool(count) and update % math.ceil(self.num_total_batches / count) == 0

    def derive_sizes(self, rows: int | None) -> None:
        """Convert episodes to optimizer steps, and set gradient accumulation so that a step covers one minibatch.

        Args:
            rows: number of training prompts; None without training data.

        Raises:
            ValueError: if the batch cannot be divided into the minibatches, or there are fewer prompts than an update
                takes.
        """
        local = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if local % self.num_mini_batches:
            raise ValueError(
                f"num_mini_batches: {local} episodes per device (per_device_train_batch_size x "
                f"gradient_accumulation_steps) cannot be cut into {self.num_mini_batches} equal minibatches"
            )
        batch = local * self.world_size
        if rows is not None and rows < batch:
            raise ValueError(
                f"train_dataset: {rows} prompts, but one update takes {batch}; add prompts or lower "
                "per_device_train_batch_size or gradient_accumulation_steps"
            )
        if self.total_episodes is None and self.max_steps > 0:
            updates = math.ceil(self.max_steps / self.steps_per_update)
        else:
            updates = math.ceil((self.total_episodes or self.num_train_epochs * (rows or 0)) / batch)
        self.local_batch_size, self.batch_size = local, batch
        self.local_mini_batch_size = local // self.num_mini_batches
        self.mini_batch_size = self.local_mini_batch_size * self.world_size
        self.micro_batch_size = self.per_device_train_batch_size * self.world_size
        self.num_total_batches = updates
        self.total_episodes = self.total_episodes or updates * batch or None
        self.gradient_accumulation_steps = math.ceil(self.local_mini_batch_size / self.per_device_train_batch_size)
        self.max_steps = updates * self.steps_per_update
        # An update's prompts and random numbers depend only on its number, so there is no data to skip on resume.
        self.ignore_data_skip = True

    def tell_sizes(self, caller: "PPOConfig | None") -> None:
        """Write the derived sizes into the caller's own settings, of which these are a copy."""
        if caller is None:
            return
        for name in DERIVED:
            setattr(caller, name, getattr(self, name))

    def check(self, accelerator: Accelerator, optimizer: torch.optim.Optimizer | None) -> None:
        """Refuse options that do not work with FSDP, DeepSpeed or a given optimizer, and set `max_approx_kl`.

        Args:
            optimizer: the caller's own optimizer, if any.
        """
        fsdp, deepspeed = fsdp_plugin(accelerator), uses_deepspeed(accelerator)
        if fsdp is not None and fsdp.fsdp_version == 1:
            raise ValueError("FSDP 1: PPO cannot sample from its shards; set fsdp_version: 2")
        if self.max_approx_kl and deepspeed:
            raise ValueError("max_approx_kl: not with DeepSpeed, which steps inside backward; use DDP or FSDP")
        if self.critic_warmup_updates and deepspeed:
            raise ValueError("critic_warmup_updates: not with DeepSpeed, which steps inside backward; use DDP or FSDP")
        if self.policy_ema_decay is not None and (deepspeed or fsdp is not None):
            raise ValueError("policy_ema_decay: not with DeepSpeed or FSDP, which hold weights in shards; use DDP")
        if self.critic_backbone != "own" and (deepspeed or fsdp is not None):
            raise ValueError('critic_backbone: only "own" with DeepSpeed or FSDP; with one backbone use DDP')
        if self.critic_learning_rate is not None and optimizer is not None:
            raise ValueError("critic_learning_rate: not with an optimizer of your own; give its groups their rates")
        if self.max_approx_kl is None:
            self.max_approx_kl = 0.0 if deepspeed or self.fp16 else MAX_APPROX_KL


# TRL has `world_size` as a field; Trainer needs the property of that name, which the field's default would hide.
PPOConfig.world_size = property(TrainingArguments.world_size.fget, lambda self, value: None)
