"""Which ids begin, end and fill rows, for a tokenizer and its model; and how a saved model comes to say so.

- A **document** is start + text + EOS; start is the BOS token, if it is another one than EOS.
- A **prompt** as text begins as the tokenizer begins a text, and has no end. A chat format writes its own tokens.
- An **answer** ends with its *stop token*: in a chat the token with which the chat format ends an assistant turn
  (often not EOS: `<|im_end|>`, `<end_of_turn>`), in text EOS. Sampling stops there, at EOS, and at each id of the
  model's own list.
- **Padding** is token 0 under a mask, which no model lacks. So no model reads the tokenizer's pad token, which may be
  EOS, the stop token, or an id that the model does not have.
"""

import functools
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PAD = 0
PROBE = "A0A0A"


def ensure_pad_token(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Let a tokenizer without a pad token pad with its EOS (libraries ask for one; see the module)."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def added_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Return the ids of tokens that a tokenizer cuts out of a text whole: special tokens and other added ones."""
    return {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}


def turn_end(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """Return the token with which the chat format ends an assistant turn.

    It is the first added token after an answer. None, if there is no chat format or it ends turns without such a
    token.
    """
    if tokenizer.chat_template is None:
        return None
    return _turn_end(tokenizer, str(tokenizer.chat_template), len(tokenizer))


@functools.lru_cache(maxsize=32)
def _turn_end(tokenizer: "PreTrainedTokenizerBase", chat_template: str, size: int) -> int | None:
    """Find [`turn_end`], once for each chat template and number of tokens: every row asks for it."""
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": PROBE}]
    after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(PROBE)[2]
    added = added_ids(tokenizer)
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    return next((token for token in ids if token in added), None)


def answer_end(tokenizer: "PreTrainedTokenizerBase", chat: bool) -> int | None:
    """Return the stop token of answers: that of the chat format, or EOS."""
    end = turn_end(tokenizer) if chat else None
    return tokenizer.eos_token_id if end is None else end


def listed(ids: int | list[int] | None) -> list[int]:
    """Return a config's `eos_token_id`, an id, a list or nothing, as a list."""
    return [] if ids is None else list(ids) if isinstance(ids, (list, tuple)) else [ids]


def find_stop_tokens(
    tokenizer: "PreTrainedTokenizerBase",
    generation_config: "GenerationConfig | None" = None,
    stop_token_id: int | None = None,
) -> list[int]:
    """Return the ids that end an answer while it is sampled; the first is the one that training teaches.

    Args:
        generation_config: the model's, with its own list.
        stop_token_id: the only one, if it is given.

    Raises:
        ValueError: if there is none.
    """
    if stop_token_id is not None:
        return [stop_token_id]
    own = listed(generation_config.eos_token_id) if generation_config is not None else []
    ids = [turn_end(tokenizer), tokenizer.eos_token_id, *own]
    stops = list(dict.fromkeys(token for token in ids if token is not None))
    if not stops:
        raise ValueError("the tokenizer has no EOS token; give stop_token_id")
    return stops


def frame(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the ids that a tokenizer puts before a text. (Those that it puts after one are never used.)"""
    text = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    starts = (at for at in range(len(framed)) if framed[at : at + len(text)] == text)
    return framed[: next(starts, 0)]


def document_start(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the ids before a document: BOS, unless there is none or it is EOS, which parts documents already."""
    bos = tokenizer.bos_token_id
    return [] if bos in (None, tokenizer.eos_token_id) else [bos]


def document_end(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the id after a document: EOS, or SEP of a tokenizer for encoders."""
    return tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id


def save_stop_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", stops: list[int]) -> None:
    """Let the model's configs name its special tokens, so that every user's `generate` stops where training stopped.

    Args:
        stops: of [`find_stop_tokens`].
    """
    ends = list(dict.fromkeys([*stops, *listed(model.generation_config.eos_token_id)]))
    model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    for config in (model.config, model.generation_config):
        config.pad_token_id = embedded_pad(tokenizer, model.config, stops)
        if tokenizer.bos_token_id is not None:
            config.bos_token_id = tokenizer.bos_token_id
    model.config.eos_token_id = model.generation_config.eos_token_id


def embedded_pad(tokenizer: "PreTrainedTokenizerBase", config: "PretrainedConfig", stops: list[int]) -> int:
    """Return the pad token for users of the saved model: the tokenizer's, or the stop token if the model lacks it."""
    pad = tokenizer.pad_token_id
    return stops[0] if pad is None or pad >= config.get_text_config().vocab_size else pad
