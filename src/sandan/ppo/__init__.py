"""Proximal policy optimisation for language models: `from sandan import PPOConfig, PPOTrainer`."""

from .config import PPOConfig
from .trainer import PPOTrainer


__all__ = ["PPOConfig", "PPOTrainer"]
