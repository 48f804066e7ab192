"""Where each option acts: an option that is given and cannot have an effect is refused.

Every option of every stage is in one of these tables (a test goes over them): [`CONDITIONS`], what an option needs;
[`NEVER`], options that a library brings and a stage does not use; [`ALWAYS`], the rest. An option of the command line
is judged by the settings as they are in the end. A line of the recipe is not refused if the command line has made it
idle: the recipe was right, and this run wants something else.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.errors import UserError


# Options of the command line, and the lines of the recipe that each of them replaces. Own rows replace all rows of the
# recipe, those for evaluation too.
REPLACES = {
    "data_files": ("datasets", "eval_datasets", "eval_data_files"),
    "eval_data_files": ("eval_datasets", "held_out_share"),
}
EVAL_DATA = ("data_files", "eval_data_files", "eval_datasets", "held_out_share")
WITH_DATA = ("tokenizer", "pretrain", "sft", "reward", "candidates", "ppo", "evaluate")
TRAINING = ("pretrain", "sft", "reward", "ppo")


class Settings:
    """The settings of a run, by name; None for a name that no dataclass of the stage has."""

    def __init__(self, values: Sequence[Any]):
        self._values = values

    def __getattr__(self, name: str) -> Any:
        value = next((getattr(value, name) for value in self._values if hasattr(value, name)), None)
        return getattr(value, "value", value)

    def is_evaluated(self) -> bool:
        """Return whether there are held-out rows."""
        return bool(self.eval_datasets or self.held_out_share)

    def optimizer(self) -> str:
        """Return the name of the optimizer."""
        return str(self.optim)

    def scheduler(self) -> str:
        """Return the name of the learning rate's schedule."""
        return str(self.lr_scheduler_type)

    def reports_to(self, name: str | None = None) -> bool:
        """Return whether the run is reported to `name`, or to anything."""
        targets = [self.report_to] if isinstance(self.report_to, str) else self.report_to or []
        return name in targets if name else any(target != "none" for target in targets)


@dataclass(frozen=True)
class Condition:
    """Say what options need to have an effect.

    Args:
        options: names of options, separated by spaces.
        needs: what is missing, as the message says it.
        holds: whether the options have an effect with these settings.
        reads: other options on which this depends. If one of them is on the command line, a line of the recipe that
            it makes idle is no mistake.
        programs: the scripts in which this holds; by default all.
    """

    options: str
    needs: str
    holds: Callable[[Settings], bool]
    reads: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()

    def covers(self, program: str, option: str) -> bool:
        """Return whether this is a condition of the option in that script."""
        return option in self.options.split() and (not self.programs or program in self.programs)


CONDITIONS = [
    # Data
    Condition("datasets", "data_files are read instead; keep one of the two", lambda s: not s.data_files, EVAL_DATA),
    Condition(
        "eval_datasets",
        "data_files and eval_data_files replace it; keep eval_data_files",
        lambda s: not s.data_files and not s.eval_data_files,
        EVAL_DATA,
    ),
    Condition(
        "held_out_share",
        "the eval data are used (eval_data_files or eval_datasets); keep one of the two, or give data_files of your own",
        lambda s: not s.eval_datasets,
        EVAL_DATA,
        WITH_DATA,
    ),
    # Evaluation while training
    Condition(
        "eval_strategy eval_on_start eval_packing per_device_eval_batch_size eval_accumulation_steps bf16_full_eval "
        "fp16_full_eval load_best_model_at_end",
        "it needs eval data (eval_data_files, eval_datasets or held_out_share)",
        lambda s: s.is_evaluated(),
        EVAL_DATA,
        TRAINING,
    ),
    Condition("activation_offloading", "it needs a GPU (use_cpu: false)", lambda s: not s.use_cpu, ("use_cpu",)),
    Condition(
        "load_best_model_at_end",
        "it needs checkpoints (save_strategy: steps, epoch or best)",
        lambda s: s.save_strategy != "no",
        ("save_strategy",),
    ),
    Condition(
        "eval_steps",
        "it needs eval data and eval_strategy: steps",
        lambda s: s.is_evaluated() and s.eval_strategy == "steps",
        (*EVAL_DATA, "eval_strategy"),
    ),
    Condition(
        "eval_delay",
        "it needs eval data and eval_strategy: steps or epoch",
        lambda s: s.is_evaluated() and s.eval_strategy != "no",
        (*EVAL_DATA, "eval_strategy"),
    ),
    Condition(
        "metric_for_best_model greater_is_better",
        "it needs load_best_model_at_end, save_strategy: best or lr_scheduler_type: reduce_lr_on_plateau",
        lambda s: (
            s.load_best_model_at_end or s.save_strategy == "best" or s.scheduler() == "reduce_lr_on_plateau"
        ),
        ("load_best_model_at_end", "save_strategy", "lr_scheduler_type"),
    ),
    Condition(
        "prediction_loss_only",
        "only objective: mlm measures more than the loss by predictions",
        lambda s: s.objective == "mlm",
        ("objective",),
    ),
    # Length of the run, optimizer, schedule
    Condition(
        "num_train_epochs",
        "max_steps or total_episodes ends the run",
        lambda s: s.max_steps <= 0 and not s.total_episodes,
        ("max_steps", "total_episodes"),
    ),
    Condition(
        "max_steps", "total_episodes ends the run", lambda s: not s.total_episodes, ("total_episodes",), ("ppo",)
    ),
    Condition(
        "adam_beta1 adam_beta2",
        "this optim has no such setting",
        lambda s: any(name in s.optimizer() for name in ("adam", "lion")),
        ("optim",),
    ),
    Condition("adam_epsilon", "this optim has no such setting", lambda s: "adam" in s.optimizer(), ("optim",)),
    Condition(
        "optim_args",
        "this optim takes no such settings (adam_beta1, adam_beta2, adam_epsilon and weight_decay are options)",
        lambda s: (
            not s.optimizer().startswith(("adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu", "adamw_bnb"))
            and s.optimizer() not in ("adamw_torch", "adafactor", "adamw_8bit")
            and "paged_adamw" not in s.optimizer()
            and "lion" not in s.optimizer()
        ),
        ("optim",),
    ),
    Condition(
        "optim_target_modules",
        "only the galore and apollo optimizers have targets",
        lambda s: any(name in s.optimizer() for name in ("galore", "apollo")),
        ("optim",),
    ),
    Condition(
        "lr_scheduler_kwargs",
        "this lr_scheduler_type has no settings",
        lambda s: s.scheduler() not in ("constant", "constant_with_warmup", "linear"),
        ("lr_scheduler_type",),
    ),
    Condition(
        "warmup_steps",
        "this lr_scheduler_type has no warmup",
        lambda s: s.scheduler() not in ("constant", "reduce_lr_on_plateau", "greedy"),
        ("lr_scheduler_type",),
    ),
    # Logs, checkpoints, Hub
    Condition(
        "logging_steps",
        "it needs logging_strategy: steps",
        lambda s: s.logging_strategy == "steps",
        ("logging_strategy",),
    ),
    Condition("save_steps", "it needs save_strategy: steps", lambda s: s.save_strategy == "steps", ("save_strategy",)),
    Condition(
        "save_total_limit save_on_each_node",
        "no checkpoint is saved; it needs save_strategy: steps, epoch or best",
        lambda s: s.save_strategy != "no",
        ("save_strategy",),
    ),
    Condition("run_name", "it needs report_to", lambda s: s.reports_to(), ("report_to",)),
    Condition(
        "project trackio_bucket_id trackio_space_id trackio_static_space_id",
        "it needs report_to: trackio",
        lambda s: s.reports_to("trackio"),
        ("report_to",),
    ),
    Condition(
        "hub_model_id hub_private_repo hub_strategy",
        "it needs push_to_hub: true",
        lambda s: s.push_to_hub,
        ("push_to_hub",),
    ),
    Condition(
        "resume_with_changes", "resume: never starts anew", lambda s: s.resume != "never", ("resume",), TRAINING
    ),
    # Speed and memory
    Condition(
        "gradient_checkpointing_kwargs activation_checkpointing_kwargs",
        "it needs gradient_checkpointing: true",
        lambda s: s.gradient_checkpointing or s.activation_checkpointing,
        ("gradient_checkpointing", "activation_checkpointing"),
    ),
    Condition(
        "dataloader_prefetch_factor dataloader_persistent_workers dataloader_multiprocessing_context "
        "dataloader_in_order",
        "it needs dataloader_num_workers above 0",
        lambda s: s.dataloader_num_workers > 0,
        ("dataloader_num_workers",),
    ),
    Condition(
        "liger_kernel_config", "it needs use_liger_kernel: true", lambda s: s.use_liger_kernel, ("use_liger_kernel",)
    ),
    Condition(
        "length_column_name",
        "it needs train_sampling_strategy: group_by_length",
        lambda s: s.train_sampling_strategy == "group_by_length",
        ("train_sampling_strategy",),
    ),
    Condition("dataset_num_proc", "a stream is read by one process", lambda s: not s.streaming, ("streaming",)),
    Condition("packing_strategy", "it needs packing: true", lambda s: s.packing or s.eval_packing, ("packing",)),
    # Models
    Condition(
        "model_name_or_path model_revision attn_implementation dtype",
        "model_config makes a new model; take model_config out to train a saved model further",
        lambda s: s.model_config is None,
        (),
        ("pretrain",),
    ),
    Condition("mlm_probability", "it needs objective: mlm", lambda s: s.objective == "mlm", ("objective",)),
    Condition(
        "lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save "
        "lora_task_type use_rslora use_dora",
        "it needs use_peft: true",
        lambda s: s.use_peft,
        ("use_peft",),
    ),
    Condition(
        "load_in_4bit load_in_8bit",
        "it needs use_peft: true (quantized weights cannot be trained, adapters on them can)",
        lambda s: s.use_peft,
    ),
    Condition(
        "bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage",
        "it needs load_in_4bit: true",
        lambda s: s.load_in_4bit,
        ("load_in_4bit",),
    ),
    # Reward stage
    Condition(
        "lora_task_type",
        "a reward model is always SEQ_CLS",
        lambda s: s.lora_task_type == "SEQ_CLS",
        (),
        ("reward",),
    ),
    Condition(
        "best_of_n_prompt_file best_of_n_prompts best_of_n_gain max_new_tokens",
        "best-of-n needs an oracle; without one it is not run",
        lambda s: s.oracle != "none",
        ("oracle",),
        ("reward",),
    ),
    # PPO
    Condition(
        "sft_model_path", "model_name_or_path is given too; keep one of the two", lambda s: not s.model_name_or_path
    ),
    Condition(
        "model_adapter_name ref_adapter_name", "it needs use_peft: true", lambda s: s.use_peft, ("use_peft",)
    ),
    Condition(
        "reward_weights",
        "with a true_score the weights are 1 for the reward model and 0 for the true score",
        lambda s: s.true_score == "none",
        ("true_score",),
    ),
    Condition(
        "true_score_prompts true_reward_model_path",
        "it needs a true_score",
        lambda s: s.true_score != "none",
        ("true_score",),
    ),
    Condition(
        "missing_eos_penalty_mode",
        "it needs missing_eos_penalty",
        lambda s: s.missing_eos_penalty is not None,
        ("missing_eos_penalty",),
    ),
    Condition(
        "long_prompts",
        "it needs max_prompt_tokens",
        lambda s: s.max_prompt_tokens is not None,
        ("max_prompt_tokens",),
    ),
    Condition("kl_horizon", "it needs target_kl", lambda s: s.target_kl is not None, ("target_kl",)),
    Condition("truncate_min_tokens", "it needs truncate_after", lambda s: bool(s.truncate_after), ("truncate_after",)),
    Condition(
        "importance_cap",
        "it needs use_vllm: true (otherwise the sampler's log-probs are those of the training forward)",
        lambda s: s.use_vllm,
        ("use_vllm",),
    ),
    Condition("rollout_engine", "vLLM samples (use_vllm)", lambda s: not s.use_vllm, ("use_vllm",)),
    Condition(
        "vllm_mode vllm_model_impl",
        "it needs use_vllm: true",
        lambda s: s.use_vllm,
        ("use_vllm",),
    ),
    Condition(
        "vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port",
        "it needs use_vllm: true and vllm_mode: server",
        lambda s: s.use_vllm and s.vllm_mode == "server",
        ("use_vllm", "vllm_mode"),
    ),
    Condition(
        "vllm_enable_sleep_mode vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size",
        "it needs use_vllm: true and vllm_mode: colocate",
        lambda s: s.use_vllm and s.vllm_mode == "colocate",
        ("use_vllm", "vllm_mode"),
    ),
    # Evaluate, ranking page
    Condition(
        "masked_model", "it is compared on minimal_pairs_file", lambda s: s.minimal_pairs_file is not None, (),
        ("evaluate",),
    ),
    Condition(
        "minimal_pairs_file", "it needs base_model or masked_model",
        lambda s: s.base_model is not None or s.masked_model is not None, (), ("evaluate",),
    ),
    Condition(
        "overlap_annotators",
        "it needs overlap_share above 0",
        lambda s: s.overlap_share > 0,
        ("overlap_share",),
        ("annotate",),
    ),
    Condition("host port auth", "the terminal (text) has no server", lambda s: not s.text, ("text",), ("chat",)),
]  # fmt: skip

# Options that a library brings and that no stage uses, or not this one.
OWN_METRICS = "the stages have their metrics"
OWN_ORDER = "an update draws its prompts from the seed and its number"
WHOLE_MODEL = "pretraining trains all weights, in float32 or with bf16: true"
DERIVED = "it follows from other settings"
LAYERS = "the layers are compiled with inductor"
NEVER: dict[str, dict[str, str]] = {
    "": {
        "do_train": "every stage trains",
        "do_eval": "eval data are always used; take them out to leave out the evaluation",
        "do_predict": "no stage predicts",
        "batch_eval_metrics": OWN_METRICS,
        "include_for_metrics": OWN_METRICS,
        "eval_do_concat_batches": OWN_METRICS,
        "eval_use_gather_object": OWN_METRICS,
        "hub_revision": "a stage is pushed to the main branch",
        "dataset_text_field": "the column is `text`; rename yours with `columns` of datasets",
        "test_split_size": "use held_out_share (it keeps all rows of one prompt on one side)",
    },
    "pretrain": dict.fromkeys(
        [
            "use_peft",
            "lora_r",
            "lora_alpha",
            "lora_dropout",
            "lora_target_modules",
            "lora_target_parameters",
            "lora_modules_to_save",
            "lora_task_type",
            "use_rslora",
            "use_dora",
            "load_in_4bit",
            "load_in_8bit",
            "bnb_4bit_quant_type",
            "use_bnb_nested_quant",
            "bnb_4bit_quant_storage",
        ],
        WHOLE_MODEL,
    ),
    "sft": dict.fromkeys(("torch_compile_backend", "torch_compile_mode"), LAYERS),
    "reward": dict.fromkeys(("torch_compile_backend", "torch_compile_mode"), LAYERS),
    "ppo": {
        **dict.fromkeys(("torch_compile_backend", "torch_compile_mode"), LAYERS),
        **dict.fromkeys(
            [
                "data_seed",
                "dataloader_num_workers",
                "dataloader_prefetch_factor",
                "dataloader_persistent_workers",
                "dataloader_multiprocessing_context",
                "dataloader_in_order",
                "dataloader_drop_last",
                "dataloader_pin_memory",
                "ignore_data_skip",
                "train_sampling_strategy",
                "length_column_name",
                "remove_unused_columns",
            ],
            OWN_ORDER,
        ),
        **dict.fromkeys(("label_names", "label_smoothing_factor"), "there are no labels"),
        "prediction_loss_only": OWN_METRICS,
        "eval_accumulation_steps": OWN_METRICS,
        **dict.fromkeys(
            [
                "world_size",
                "num_total_batches",
                "local_batch_size",
                "micro_batch_size",
                "batch_size",
                "local_mini_batch_size",
                "mini_batch_size",
            ],
            DERIVED,
        ),
    },
    **{
        program: {"streaming": "it reads all rows before it begins; pretrain and sft can stream"}
        for program in ("tokenizer", "candidates", "constraints", "evaluate")
    },
}
NEVER["constraints"] |= {
    "held_out_share": "instruction_share says how many instructions are held out",
    "as_chat": "every prompt becomes a user turn",
}
for _program in ("reward", "ppo"):
    NEVER[_program]["streaming"] = NEVER["tokenizer"]["streaming"]

# Options that act in every run that can be given them, or whose effect depends on the data, the model or the launcher.
ALWAYS = frozenset(
    [
        "accelerator_config",
        "activation_checkpointing",
        "allow_repeats",
        "annotator",
        "annotators",
        "as_chat",
        "assistant_only_loss",
        "attn_implementation",
        "auth",
        "auto_find_batch_size",
        "average_tokens_across_devices",
        "base_model",
        "base_url",
        "batch_size",
        "bf16",
        "blind",
        "block_size_tokens",
        "broken_answer_share",
        "candidates_file",
        "candidates_per_prompt",
        "center_rewards",
        "center_rewards_coefficient",
        "chat_template_path",
        "cliprange",
        "cliprange_high",
        "cliprange_value",
        "completion_only_loss",
        "critic_backbone",
        "critic_learning_rate",
        "critic_warmup_updates",
        "data_files",
        "data_seed",
        "dataloader_drop_last",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataset_kwargs",
        "ddp_backend",
        "ddp_broadcast_buffers",
        "ddp_bucket_cap_mb",
        "ddp_find_unused_parameters",
        "ddp_static_graph",
        "ddp_timeout",
        "debug",
        "deepspeed",
        "disable_dropout",
        "disable_tqdm",
        "dry_run",
        "ds3_gather_for_generation",
        "dtype",
        "dual_clip",
        "entropy_coef",
        "eos_token",
        "eval_data_files",
        "eval_prompts",
        "form",
        "fp16",
        "fsdp",
        "fsdp_config",
        "full_determinism",
        "gamma",
        "gold_functions",
        "gold_reward_model",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "guidelines_file",
        "held_out_share",
        "host",
        "hub_id",
        "ignore_data_skip",
        "include_num_input_tokens_seen",
        "instruction_share",
        "judgement_files",
        "judgements_per_prompt",
        "kl_coef",
        "kl_estimator",
        "label_names",
        "label_smoothing_factor",
        "lam",
        "language",
        "learning_rate",
        "length_penalty",
        "licence",
        "license",
        "local_rank",
        "local_rollout_forward_batch_size",
        "log_file",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "logging_first_step",
        "logging_strategy",
        "loss_type",
        "lr_scheduler_type",
        "max_approx_kl",
        "max_grad_norm",
        "max_instruction_words",
        "max_instructions",
        "max_items",
        "max_kl_nats",
        "max_length",
        "max_new_tokens",
        "max_prompt_tokens",
        "max_prompts",
        "max_steps",
        "max_tokens",
        "minimal_pairs_file",
        "missing_eos_penalty",
        "model",
        "model_config",
        "model_init_kwargs",
        "model_name_or_path",
        "model_revision",
        "models",
        "neftune_noise_alpha",
        "num_mini_batches",
        "num_ppo_epochs",
        "num_sample_generations",
        "objective",
        "optim",
        "oracle",
        "output_dir",
        "overlap_share",
        "packing",
        "pad_to_multiple_of",
        "pad_token",
        "padding_free",
        "pair_weighting",
        "parallelism_config",
        "per_device_train_batch_size",
        "policy_ema_decay",
        "port",
        "ppo_model",
        "prompts_per_instruction",
        "public",
        "push_to_hub",
        "ranker_agreement",
        "recipe_dir",
        "remove_unused_columns",
        "repeat_share",
        "report_to",
        "response_length",
        "restore_callback_states_from_checkpoint",
        "resume",
        "reward_funcs",
        "reward_model",
        "reward_model_path",
        "router_aux_loss_coef",
        "save_strategy",
        "scale_scores",
        "score_at_stop_token",
        "score_clip",
        "seed",
        "sft_model",
        "shuffle_dataset",
        "skip_bad_rows",
        "skip_memory_metrics",
        "stop_on_collapse",
        "stop_token",
        "stop_token_id",
        "streaming",
        "target_kl",
        "temperature",
        "text",
        "text_file",
        "tf32",
        "timeout_seconds",
        "tokenizer_name_or_path",
        "torch_compile",
        "torch_compile_backend",
        "torch_compile_mode",
        "torch_empty_cache_steps",
        "total_episodes",
        "train_sampling_strategy",
        "true_score",
        "truncate_after",
        "truncation_mode",
        "use_cache",
        "use_cpu",
        "use_liger_kernel",
        "use_margin",
        "use_peft",
        "use_vllm",
        "value_lam",
        "vf_coef",
        "vocab_size",
        "weight_decay",
        "whiten_advantages",
        "whiten_rewards",
    ]
)


def replaced_by_command_line(given: Iterable[str]) -> set[str]:
    """Return the keys of the recipe that the options of the command line replace."""
    return {key for option in given for key in REPLACES.get(option, ())} - set(given)


def refuse_idle(program: str, values: Sequence[Any], origins: Mapping[str, str]) -> None:
    """Refuse the first given option that cannot have an effect. `false` for what is off anyway is no mistake.

    Args:
        program: the script, by its name.
        values: the parsed dataclasses.
        origins: of each given option: `command line`, or `file:line`.

    Raises:
        UserError: naming the option, its place, and what it needs.
    """
    settings = Settings(values)
    defaults = {field.name: field.default for value in values for field in dataclasses.fields(value)}
    defaults = {name: None if value is dataclasses.MISSING else value for name, value in defaults.items()}
    on_command_line = {key for key, origin in origins.items() if origin == "command line"}
    for key, origin in origins.items():
        where = f"{origin}: --{key}" if key in on_command_line else f"{origin}: {key}"
        value, default = getattr(settings, key), defaults.get(key)
        if not value and not default:
            continue
        reason = NEVER.get(program, {}).get(key) or NEVER[""].get(key)
        if reason is not None and value != default:
            raise UserError(f"{where}: not in this stage: {reason}")
        for condition in CONDITIONS:
            if reason is not None or not condition.covers(program, key) or condition.holds(settings):
                continue
            if key in on_command_line or not on_command_line & set(condition.reads):
                raise UserError(f"{where}: has no effect: {condition.needs}")
