"""`trl.SFTTrainer` with the guarantees of [`ReliableTrainer`], and without padding."""

from collections.abc import Callable
from typing import Any

from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..models.tokens import PAD
from ..models.unpadded_attention import segments
from ..training.unpadded_trainer import FlatTrainer
from .rows import tokenized


class GuardedSFTTrainer(FlatTrainer, SFTTrainer):
    """[`trl.SFTTrainer`] that resumes exactly, stops on a signal, and never steps on a number that is not finite.

    Answers are trained, each with its stop token, whatever the chat template offers ([`sandan.sft.rows`]). Rows of a batch follow each other without padding and do not see each other, packed (`packing: true`) or not.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.data_collator.pad_token_id = PAD
        if self.flat:
            # Set after TRL has cut or packed the rows: it refuses the setting earlier, as it could not cut them then.
            self.data_collator.padding_free = True
            self.data_collator = _with_segments(self.data_collator)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: SFTConfig, *rest: Any) -> Any:
        return super()._prepare_dataset(tokenized(dataset, processing_class, args), processing_class, args, *rest)

    def _flat_obstacle(self) -> str | None:
        if not isinstance(self.data_collator, DataCollatorForLanguageModeling):
            return "a data collator of one's own makes them"
        if self.args.packing and self.args.packing_strategy == "wrapped":
            return "packing_strategy: wrapped makes full rows, which see each other"
        if self.args.neftune_noise_alpha is not None:
            return "neftune_noise_alpha is by the length of a padded row"
        return super()._flat_obstacle()


def _with_segments(collate: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    def collate_all(examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(examples)
        if "cu_seq_lens_q" not in batch:  # TRL < 1.16
            starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
            ends = [*starts[1:], batch["position_ids"].shape[1]]
            batch |= segments([end - start for start, end in zip(starts, ends, strict=True)])
        return batch

    return collate_all
