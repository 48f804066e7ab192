"""Which ids are pad and stop for a model and its tokenizer, and how the model's own settings come to say so."""

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def ensure_pad_token(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Let a tokenizer without a pad token pad with its EOS."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def find_stop_token(stop_token_id: int | None, tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the id of the token that ends an answer: `stop_token_id`, or the tokenizer's EOS.

    Raises:
        ValueError: if there is none, or if padding uses it.
    """
    stop = tokenizer.eos_token_id if stop_token_id is None else stop_token_id
    if stop is None:
        raise ValueError("the tokenizer has no EOS token; give stop_token_id")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in (stop, tokenizer.eos_token_id):
        raise ValueError(
            "the tokenizer needs a pad token of its own, different from EOS and the stop token, or answers could not "
            "be told from padding; e.g. tokenizer.add_special_tokens({'pad_token': '[PAD]'}) (its id may lie outside "
            "the model's vocabulary: pads are never embedded)"
        )
    return stop


def set_stop_token(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Copy the tokenizer's special tokens into the model's configs, so that generation always stops at its EOS."""
    for config in (model.config, model.generation_config):
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
        config.bos_token_id = tokenizer.bos_token_id


def mark_special_tokens(policy: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", stop_token_id: int) -> None:
    """Add the stop token and the pad token to the policy's generation settings, and leave the others unchanged."""
    config = policy.generation_config
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if stop_token_id not in known:
        config.eos_token_id = [*(token for token in known if token is not None), stop_token_id]
    config.pad_token_id = tokenizer.pad_token_id
