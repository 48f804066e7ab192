"""Pretraining: documents into fixed-length blocks, a model from scratch or from a name, loss in nats and in bits."""

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from .errors import UserError


if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset, IterableDataset
    from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class PretrainArguments:
    """What is pretrained, and on which blocks."""

    tokenizer_name_or_path: str = field(metadata={"help": "A tokenizer folder or Hub name."})
    objective: Literal["clm", "mlm"] = field(
        default="clm", metadata={"help": "Causal (next token) or masked (hidden token) language modelling."}
    )
    model_config: dict | str | None = field(
        default=None,
        metadata={
            "help": "From scratch: fields of any AutoConfig, `model_type` among them. Sizes not given keep its defaults."
        },
    )
    block_size_tokens: int = field(default=128, metadata={"help": "Length of every training block, in tokens."})
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of tokens that `mlm` hides."})

    def __post_init__(self):
        if isinstance(self.model_config, str):
            try:
                self.model_config = json.loads(self.model_config)
            except ValueError as error:
                raise ValueError(f"model_config: expected a JSON mapping on the command line ({error})") from None
        if self.block_size_tokens < 2:
            raise ValueError(f"block_size_tokens: {self.block_size_tokens} leaves nothing to predict; use 2 or more")


def new_model(args: PretrainArguments, tokenizer: "PreTrainedTokenizerBase", dtype: Any = None) -> "PreTrainedModel":
    """A randomly initialised model of `args.model_config`.

    The vocabulary is padded to a multiple of 64 rows (full tiles of a GPU matrix product). Dropout is off: each
    block is seen a few times at most.

    Raises:
        UserError: if `model_type` is missing or unknown, or a field is misspelt.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    fields = dict(args.model_config or {})
    model_type = fields.pop("model_type", None)
    try:
        known = AutoConfig.for_model(model_type)
    except ValueError:
        raise UserError(f"model_config: model_type: {model_type!r} is not an architecture of transformers") from None
    unknown = [name for name in fields if not hasattr(known, name)]
    if unknown:
        raise UserError(f"model_config: {', '.join(unknown)}: not a field of {type(known).__name__}")
    config = AutoConfig.for_model(
        model_type,
        **{
            "vocab_size": math.ceil(len(tokenizer) / 64) * 64,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "tie_word_embeddings": True,
            **{
                name: 0.0
                for name in vars(known)
                if "dropout" in name or name in ("embd_pdrop", "resid_pdrop", "attn_pdrop")
            },
            **fields,
        },
    )
    auto_model = AutoModelForMaskedLM if args.objective == "mlm" else AutoModelForCausalLM
    try:
        return auto_model.from_config(config, dtype=dtype)
    except ValueError as error:
        raise UserError(
            f"model_config: {model_type} cannot be used with objective {args.objective}: {error}"
        ) from None


def to_blocks(
    dataset: "Dataset | IterableDataset",
    tokenizer: "PreTrainedTokenizerBase",
    block_size: int,
    num_proc: int | None = None,
) -> "Dataset | IterableDataset":
    """Documents (`text`) -> rows of exactly `block_size` tokens (`input_ids`).

    Each document is bos + text + eos; documents follow each other and are cut where a block is full. What is left
    over at the end of a slice of documents (less than one block) is dropped, unless it is all there is.
    """
    from datasets import IterableDataset

    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    eos = [tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id]

    def pack(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encoded = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False)["input_ids"]
        stream = [token for ids in encoded for token in (*bos, *ids, *eos)]
        whole = len(stream) - len(stream) % block_size or len(stream)
        return {"input_ids": [stream[start : start + block_size] for start in range(0, whole, block_size)]}

    columns = list(next(iter(dataset))) if dataset.column_names is None else dataset.column_names
    options = {} if isinstance(dataset, IterableDataset) else {"num_proc": num_proc, "desc": "packing documents"}
    return dataset.map(pack, batched=True, batch_size=10_000, remove_columns=columns, **options)


def bytes_per_token(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> float:
    """UTF-8 bytes of text for each token to predict (the end of a document counts as a token)."""
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    tokens = sum(len(ids) + 1 for ids in encoded)
    return sum(len(text.encode()) for text in texts) / tokens


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """A loss that does not depend on the tokenizer: nats/token -> bits/byte."""
    return nats_per_token / math.log(2) / bytes_per_token


def masked_accuracy(prediction: "EvalPrediction") -> dict[str, float]:
    """Share of hidden tokens restored; `predictions` are token ids `(rows, seq)`, labels -100 where nothing is hidden."""
    hidden: np.ndarray = prediction.label_ids != -100
    return {"masked_accuracy": float((prediction.predictions == prediction.label_ids)[hidden].mean())}
