"""Pretraining, fine-tuning and RLHF of a language model, built on Hugging Face libraries."""

from typing import TYPE_CHECKING, Any

from ._version import __version__


if TYPE_CHECKING:
    from .ppo import PPOConfig, PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer", "__version__"]


def __getattr__(name: str) -> Any:
    # Imported on first use: torch and transformers take seconds to import, and `import sandan` must stay fast.
    if name in __all__:
        from . import ppo

        return getattr(ppo, name)
    if name in ("AutoModelForCausalLMWithValueHead", "AutoModelForSeq2SeqLMWithValueHead", "create_reference_model"):
        # `from sandan import name` would replace the words of an AttributeError.
        raise ImportError(f"{name} is of TRL <= 0.11; use from sandan.legacy import {name} (docs/migration.md)")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
