"""The API of TRL 0.11 and older: models with a value head, and a `PPOTrainer` that is driven by `generate` and `step`.

For tutorials, notebooks and scripts of that time; only the import changes. The mathematics is that of
[`sandan.ppo.formulas`]. New code is better served by [`sandan.PPOTrainer`], which samples, scores, checkpoints and
resumes by itself. docs/migration.md has what differs from TRL.
"""

from .config import PPOConfig
from .core import LengthSampler, respond_to_batch, set_seed
from .trainer import PPOTrainer
from .value_head import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    ValueHead,
    create_reference_model,
)


__all__ = [
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "LengthSampler",
    "PPOConfig",
    "PPOTrainer",
    "ValueHead",
    "create_reference_model",
    "respond_to_batch",
    "set_seed",
]
