"""The first blocks of pretraining, and the size of its model, for a dry run."""

from typing import TYPE_CHECKING, Any

from ..models.checks import check_direction, check_length
from ..models.memory import ModelSize, size_of
from ..training.preview import SHOWN_ROWS, Sample, trained_tokens
from .masking import make_collator
from .model_and_blocks import PretrainArguments, new_model, to_blocks


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


# Larger models are not built for a dry run; the stage itself refuses one that sees later tokens before it trains.
PROBED_PARAMETERS = 100_000_000


def rows(dataset: "Dataset", tokenizer: "PreTrainedTokenizerBase", args: PretrainArguments, *_: Any) -> Sample:
    """Return the first blocks; each document counts as a row."""
    blocks = to_blocks(dataset, tokenizer, args.block_size_tokens)
    batch = make_collator(args, tokenizer, seed=0)([blocks[row] for row in range(min(SHOWN_ROWS, len(blocks)))])
    lengths = [len(ids) for ids in tokenizer(dataset["text"][:], add_special_tokens=False)["input_ids"]]
    return Sample(
        trained_tokens(zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)),
        lengths,
        rows_per_document=len(blocks) / len(dataset),
        longest=args.block_size_tokens,
    )


def size(
    tokenizer: "PreTrainedTokenizerBase | None",
    missing: set[str],
    args: PretrainArguments,
    config: Any,
    model_args: Any,
    data: Any,
) -> ModelSize | None:
    """Return the size of the new model, or of the model that is trained further."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    if args.model_config is None:
        auto_model = AutoModelForMaskedLM if args.objective == "mlm" else AutoModelForCausalLM
        return size_of(auto_model, model_args.model_name_or_path, missing)
    if tokenizer is None:
        return None
    with torch.device("meta"):
        model = new_model(args, tokenizer)
    check_length("block_size_tokens", args.block_size_tokens, model.config, "model_config")
    if model.num_parameters() <= PROBED_PARAMETERS:
        probed = new_model(args, tokenizer)
        if args.objective == "clm":
            check_direction(probed, "model_config")
    return ModelSize(model.num_parameters(), 0, model.config)
