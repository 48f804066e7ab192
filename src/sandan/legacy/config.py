"""The settings of the old [`PPOTrainer`], under TRL 0.11's names and with its defaults."""

import logging
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal


logger = logging.getLogger(__name__)


@dataclass
class PPOConfig:
    """Settings of [`sandan.legacy.PPOTrainer`].

    A call of `step` takes `batch_size` answers on each process and passes over them `ppo_epochs` times, with an optimizer
    step every `mini_batch_size * gradient_accumulation_steps` answers.

    Raises:
        ValueError: if a value is out of range, sizes do not divide, or an option cannot have an effect.
    """

    # Names for the trackers; nothing is loaded from them.
    exp_name: str = field(default_factory=lambda: Path(sys.argv[0]).stem)
    task_name: str | None = None
    model_name: str = "gpt2"
    query_dataset: str = "stanfordnlp/imdb"
    reward_model: str = "sentiment-analysis:lvwerra/distilbert-imdb"
    steps: int = 20_000
    # Trackers, of accelerate
    log_with: str | None = None
    tracker_project_name: str = "trl"
    tracker_kwargs: dict = field(default_factory=dict)
    project_kwargs: dict = field(default_factory=dict)
    accelerator_kwargs: dict = field(default_factory=dict)
    # Data
    seed: int = 0
    remove_unused_columns: bool = True
    dataset_num_proc: int | None = None
    # Sizes, of each process
    batch_size: int = 128
    mini_batch_size: int = 128
    forward_batch_size: int | None = None
    gradient_accumulation_steps: int = 1
    ppo_epochs: int = 4
    # KL to the reference
    adap_kl_ctrl: bool = True
    init_kl_coef: float = 0.2
    kl_penalty: Literal["kl", "abs", "mse", "full"] = "kl"
    target: float = 6.0
    horizon: float = 10_000.0
    # Scores and advantages
    use_score_scaling: bool = False
    use_score_norm: bool = False
    score_clip: float | None = None
    whiten_rewards: bool = False
    gamma: float = 1.0
    lam: float = 0.95
    # Optimization
    learning_rate: float = 1.41e-5
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    max_grad_norm: float | None = None
    early_stopping: bool = False
    target_kl: float = 1.0
    ratio_threshold: float = 10.0
    gradient_checkpointing: bool = False
    optimize_cuda_cache: bool | None = None
    optimize_device_cache: bool = False
    # Not supported: an error, if given
    push_to_hub_if_best_kwargs: dict = field(default_factory=dict)
    compare_steps: int = 1
    # Derived; the trainer fills in what it alone knows
    backward_batch_size: int = field(default=0, init=False)
    total_ppo_epochs: int = field(default=0, init=False)
    world_size: int | None = field(default=None, init=False)
    global_backward_batch_size: int | None = field(default=None, init=False)
    global_batch_size: int | None = field(default=None, init=False)
    is_encoder_decoder: bool | None = field(default=None, init=False)
    is_peft_model: bool | None = field(default=None, init=False)

    def __post_init__(self):
        self.mini_batch_size = self.forward_batch_size or self.mini_batch_size
        self.optimize_device_cache = self.optimize_device_cache or bool(self.optimize_cuda_cache)
        for name in ("steps", "batch_size", "mini_batch_size", "gradient_accumulation_steps", "ppo_epochs", "horizon"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: must be greater than 0, found {getattr(self, name)}")
        self.backward_batch_size = self.mini_batch_size * self.gradient_accumulation_steps
        if self.batch_size % self.backward_batch_size:
            raise ValueError(
                f"batch_size: {self.batch_size} is no multiple of mini_batch_size * gradient_accumulation_steps = "
                f"{self.mini_batch_size} * {self.gradient_accumulation_steps}"
            )
        if self.kl_penalty not in ("kl", "abs", "mse", "full"):
            raise ValueError(f"kl_penalty: expected 'kl', 'abs', 'mse' or 'full', found {self.kl_penalty!r}")
        self._refuse_without_effect()
        self.total_ppo_epochs = -(-self.steps // self.batch_size)

    def _refuse_without_effect(self) -> None:
        if self.use_score_norm and not self.use_score_scaling:
            raise ValueError("use_score_norm: has no effect without use_score_scaling=True")
        if not self.adap_kl_ctrl and (self.target, self.horizon) != (6.0, 10_000.0):
            raise ValueError("target, horizon: have no effect with adap_kl_ctrl=False")
        if self.dataset_num_proc is not None:
            raise ValueError("dataset_num_proc: has no effect, the trainer does not process the dataset; leave it out")
        if self.push_to_hub_if_best_kwargs or self.compare_steps != 1:
            raise ValueError(
                "push_to_hub_if_best_kwargs, compare_steps: not in sandan.legacy; call trainer.push_to_hub(repo_id) after step"
            )
        # TRL's own examples pass it without early_stopping, so it is no error.
        if not self.early_stopping and self.target_kl != 1.0:
            logger.warning("target_kl: has no effect without early_stopping=True")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a flat dictionary, those of a `..._kwargs` under `..._kwargs/<name>`."""
        flat: dict[str, Any] = {}
        for name, value in asdict(self).items():
            flat |= {f"{name}/{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
        return flat
