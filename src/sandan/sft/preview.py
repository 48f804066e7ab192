"""The first rows as fine-tuning prepares them, and the size of its model, for a dry run."""

from typing import TYPE_CHECKING, Any

from ..core.errors import UserError
from ..models.memory import ModelSize, size_of
from ..training.preview import SHOWN_ROWS, Sample, discarded, smallest_model, trained_tokens


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def rows(dataset: "Dataset", tokenizer: "PreTrainedTokenizerBase", config: Any, *_: Any) -> Sample:
    """Return the first rows as `trl.SFTTrainer` prepares them, unpacked."""
    from trl import SFTTrainer

    def made(max_length: int | None) -> Any:
        settings = discarded(config)
        settings.max_length, settings.packing = max_length, False
        return SFTTrainer(smallest_model(tokenizer), settings, train_dataset=dataset, processing_class=tokenizer)

    trainer, lengths = made(config.max_length), [len(ids) for ids in made(None).train_dataset["input_ids"]]
    prepared = trainer.train_dataset
    if not len(prepared):
        raise UserError(
            f"max_length: all of the first {len(dataset):,} rows are longer than {config.max_length} tokens"
        )
    batch = trainer.data_collator([prepared[index] for index in range(min(SHOWN_ROWS, len(prepared)))])
    return Sample(trained_tokens(batch, tokenizer), lengths, config.max_length, 1 - len(prepared) / len(dataset))


def size(tokenizer: Any, missing: set[str], config: Any, model_args: Any, data: Any) -> ModelSize | None:
    """Return the size of the model to be fine-tuned."""
    from transformers import AutoModelForCausalLM

    return size_of(AutoModelForCausalLM, model_args.model_name_or_path, missing)
