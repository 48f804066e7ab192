"""Preview of reward training for a dry run: the first pairs as tokens, and the size of the model."""

from typing import TYPE_CHECKING, Any

from ..core.errors import UserError
from ..models.memory import ModelSize, size_of
from ..training.preview import Sample, discarded, smallest_model


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def rows(dataset: "Dataset", tokenizer: "PreTrainedTokenizerBase", args: Any, config: Any, *_: Any) -> Sample:
    """Return the answers of the first pairs as `trl.RewardTrainer` prepares them."""
    from trl import RewardTrainer

    def made(max_length: int | None) -> Any:
        settings = discarded(config)
        settings.max_length = max_length
        model = smallest_model(tokenizer, classifier=True)
        return RewardTrainer(model, settings, train_dataset=dataset, processing_class=tokenizer).train_dataset

    kept, whole = made(config.max_length), made(None)
    names = [name for name in whole.column_names if name.endswith("_ids")]
    lengths = [max(len(row[name]) for name in names) for row in whole]
    tokens = [
        [(token, True) for token in row[name]] for row in whole.select(range(min(2, len(whole)))) for name in names
    ]
    if not len(kept):
        raise UserError(
            f"max_length: all of the first {len(dataset):,} pairs are longer than {config.max_length} tokens"
        )
    return Sample(tokens, lengths, config.max_length, 1 - len(kept) / len(whole))


def size(tokenizer: Any, missing: set[str], args: Any, config: Any, model_args: Any, data: Any) -> ModelSize | None:
    """Return the size of the reward model."""
    from transformers import AutoModelForSequenceClassification

    return size_of(AutoModelForSequenceClassification, model_args.model_name_or_path, missing)
