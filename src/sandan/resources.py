"""What a run takes of memory and disk, estimated from the number of parameters."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

# AdamW keeps two float32 moments for each trained weight.
OPTIMIZER_BYTES = 8


def model_bytes(model: "nn.Module") -> int:
    """Bytes of a model's weights in a file."""
    return sum(one.numel() * one.element_size() for one in model.parameters())


def checkpoint_bytes(model: "nn.Module") -> int:
    """Bytes of a checkpoint: weights, and the optimizer's state of those that are trained."""
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    return model_bytes(model) + OPTIMIZER_BYTES * trained


def readable_bytes(count: float) -> str:
    """`1_500_000` -> `1.5 MB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"


def count_parameters(
    values: Sequence[Any], tokenizer: "PreTrainedTokenizerBase | None", missing: set[str]
) -> tuple[int | None, int]:
    """Trained and frozen parameters of a stage's models, without loading them; (None, 0) if they are not there yet.

    Args:
        values: the stage's parsed dataclasses.
        missing: paths that earlier stages have yet to make.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

    from .pretraining import new_model

    config = {name: value for one in values for name, value in vars(one).items()}
    with torch.device("meta"):
        if config.get("model_config") is not None:
            own = next(one for one in values if hasattr(one, "model_config"))
            return (None, 0) if tokenizer is None else (new_model(own, tokenizer).num_parameters(), 0)
        path = config.get("model_name_or_path")
        if path is None or path in missing:
            return None, 0
        kind = AutoModelForMaskedLM if config.get("objective") == "mlm" else AutoModelForCausalLM
        if "best_of_n_gain" in config:
            kind = AutoModelForSequenceClassification
        trained = _parameters(kind, path)
        if "reward_model_path" not in config:
            return trained, 0
        if config["reward_model_path"] in missing:
            return None, 0
        # Policy and critic are trained; reference and reward model are not.
        reward = _parameters(AutoModelForSequenceClassification, config["reward_model_path"])
        return trained + reward, trained + reward


def _parameters(auto_model: Any, path: str) -> int:
    from transformers import AutoConfig

    return auto_model.from_config(AutoConfig.from_pretrained(path)).num_parameters()
