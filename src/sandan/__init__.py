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
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
