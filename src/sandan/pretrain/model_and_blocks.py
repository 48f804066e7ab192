"""Pretraining: documents cut into fixed-length blocks, a new model, loss in nats per token and in bits per byte."""

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..core.errors import UserError
from ..models.tokens import document_end, document_start


if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset, IterableDataset
    from transformers import EvalPrediction, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


# Size of the slices of text or tokens that are processed at once.
SLICE_BYTES = 1 << 20


@dataclass
class PretrainArguments:
    """The settings of pretraining: objective, new model and blocks."""

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
    """Make a randomly initialised model from `args.model_config`.

    The vocabulary is padded to a multiple of 64 rows (full tiles of a GPU matrix product). Dropout is off, because
    each block is seen a few times at most.

    Raises:
        UserError: if `model_type` is missing or unknown, or a field is misspelt.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    from ..training.trial import check_memory, check_sizes, try_forward

    fields = dict(args.model_config or {})
    causal = args.objective == "clm"
    model_type = fields.pop("model_type", None)
    try:
        known = AutoConfig.for_model(model_type)
    except ValueError:
        raise UserError(f"model_config: model_type: {model_type!r} is not an architecture of transformers") from None
    unknown = [name for name in fields if not hasattr(known, name)]
    if unknown:
        raise UserError(f"model_config: {', '.join(unknown)}: not a field of {type(known).__name__}")
    for name, value in fields.items():
        numbers = all(type(number) in (int, float) for number in (value, getattr(known, name)))
        if numbers and value < 0 <= getattr(known, name):
            raise UserError(f"model_config: {name}: {value}: below 0")
    try:
        config = _config_without_warnings(
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
                # An encoder sees later tokens unless it is told to be a decoder.
                **({"is_decoder": True} if causal and vars(known).get("is_decoder") is False else {}),
                **fields,
            },
        )
    except (ValueError, KeyError, StrictDataclassError) as error:
        raise UserError(f"model_config: {model_type}: {' '.join(str(error).split())[:300]}") from None
    check_sizes(config, "model_config")
    auto_model = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    try:
        check_memory(lambda: auto_model.from_config(config, dtype=dtype), "model_config")
        model = auto_model.from_config(config, dtype=dtype)
    except ValueError as error:
        raise UserError(
            f"model_config: {model_type} cannot be used with objective {args.objective}: {error}"
        ) from None
    try_forward(model)
    return model


def _config_without_warnings(model_type: str, **fields: Any) -> "PretrainedConfig":
    """Make a configuration; a warning about its `rope_parameters` (an unknown key, a factor below 1) is an error.

    Raises:
        ValueError: with the text of the warning.
    """
    from transformers import AutoConfig

    def refuse(record: logging.LogRecord) -> bool:
        if "`rope_parameters`" in record.getMessage():
            raise ValueError(record.getMessage())
        return True

    log = logging.getLogger("transformers.modeling_rope_utils")
    level = log.level
    log.setLevel(logging.WARNING)
    log.addFilter(refuse)
    try:
        return AutoConfig.for_model(model_type, **fields)
    finally:
        log.removeFilter(refuse)
        log.setLevel(level)


def to_blocks(
    dataset: "Dataset | IterableDataset",
    tokenizer: "PreTrainedTokenizerBase",
    block_size: int,
    num_proc: int | None = None,
) -> "Dataset | IterableDataset":
    """Convert documents (`text`) to rows of exactly `block_size` tokens (`input_ids`), read as NumPy arrays.

    Each document is start + text + EOS ([`sandan.models.tokens`]); documents follow each other and are cut where a block is full. The rest at the
    very end (less than one block) is dropped, unless there is no full block. The blocks are the same for any
    `num_proc`: several processes tokenize, and one process joins the results, which takes a hundredth of that time.

    Memory does not grow with the dataset. A token takes 2 bytes (vocabularies up to 65,536) or 4.
    """
    from datasets import Dataset, Features, IterableDataset, List, Value

    stream = isinstance(dataset, IterableDataset)
    columns = list(next(iter(dataset))) if dataset.column_names is None else dataset.column_names
    token = Value("uint16" if max(tokenizer.get_vocab().values()) < 2**16 else "int32")
    tokens = dataset.with_format("arrow").map(
        _tokenize(tokenizer, token.dtype),
        batched=True,
        batch_size=_rows_of(SLICE_BYTES, dataset),
        remove_columns=columns,
        features=Features({"input_ids": List(token)}),
        **({} if stream else {"num_proc": num_proc, "desc": "tokenizing documents"}),
    )
    blocks = tokens.map(
        _pack(block_size),
        batched=True,
        batch_size=_rows_of(SLICE_BYTES, tokens),
        with_indices=True,
        features=Features({"input_ids": List(token, length=block_size)}),
        **({} if stream else {"desc": "packing"}),
    )
    if not stream and not len(blocks):
        rest = [token_id for document in tokens.with_format(None)["input_ids"] for token_id in document]
        blocks = Dataset.from_dict({"input_ids": [rest]}, Features({"input_ids": List(token)}))
    return blocks.with_format("numpy")


def _rows_of(size_bytes: int, dataset: "Dataset | IterableDataset") -> int:
    """Return the number of rows that hold about `size_bytes`; 1,000 for a stream, whose size is not known."""
    from datasets import IterableDataset

    if isinstance(dataset, IterableDataset):
        return 1000
    return min(max(size_bytes * dataset.data.num_rows // max(dataset.data.nbytes, 1), 1), 10_000)


def _tokenize(tokenizer: "PreTrainedTokenizerBase", dtype: str) -> "Callable[[pa.Table], pa.Table]":
    """Return a function that converts documents (`text`) to tokens (`input_ids`)."""
    import numpy as np
    import pyarrow as pa

    start, end = document_start(tokenizer), document_end(tokenizer)
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()

    def encode(texts: list[str]) -> list[list[int]]:
        if tokenizer.is_fast:
            # The fast variant leaves out the positions of the tokens in the text, which are not needed here.
            found = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            return [encoding.ids for encoding in found]
        return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]

    def tokenize(table: pa.Table) -> pa.Table:
        documents: list[np.ndarray] = []
        waiting: list[str] = []
        size = 0
        for text in table["text"].to_pylist():
            waiting.append(text)
            size += len(text)
            # The tokenizer's objects take about 100 bytes per token, so long documents may need many times the slice.
            if size >= SLICE_BYTES:
                documents += [np.array([*start, *ids, end], dtype) for ids in encode(waiting)]
                waiting, size = [], 0
        documents += [np.array([*start, *ids, end], dtype) for ids in encode(waiting)]
        ends = np.cumsum([0, *map(len, documents)], dtype=np.int32)
        return pa.table({"input_ids": pa.ListArray.from_arrays(ends, np.concatenate(documents))})

    return tokenize


def _pack(block_size: int) -> "Callable[[pa.Table, list[int]], pa.Table]":
    """Return a function that converts slices of tokenized documents to blocks. Call it in the order of the slices.

    The rest at the end of a slice begins the first block of the next slice. It is dropped if the next slice does not
    directly follow (a new pass over a stream).
    """
    import numpy as np
    import pyarrow as pa

    rest, following = None, 0

    def pack(table: pa.Table, indices: list[int]) -> pa.Table:
        nonlocal rest, following
        parts = [chunk.flatten().to_numpy() for chunk in table["input_ids"].chunks]
        if rest is not None and indices[0] == following:
            parts.insert(0, rest)
        tokens = np.concatenate(parts)
        whole = len(tokens) - len(tokens) % block_size
        rest, following = tokens[whole:].copy(), indices[-1] + 1
        return pa.table({"input_ids": pa.FixedSizeListArray.from_arrays(pa.array(tokens[:whole]), block_size)})

    return pack


def bytes_per_token(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> float:
    """Return the UTF-8 bytes of text per predicted token (the end of a document counts as a token)."""
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    tokens = sum(len(ids) + 1 for ids in encoded)
    return sum(len(text.encode()) for text in texts) / tokens


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Convert a loss from nats per token to bits per byte, which does not depend on the tokenizer."""
    return nats_per_token / math.log(2) / bytes_per_token


def masked_accuracy(prediction: "EvalPrediction") -> dict[str, float]:
    """Return the share of hidden tokens that are predicted correctly.

    `predictions` are token ids `(rows, seq)`; labels are -100 where nothing is hidden.
    """
    hidden: np.ndarray = prediction.label_ids != -100
    return {"masked_accuracy": float((prediction.predictions == prediction.label_ids)[hidden].mean())}
