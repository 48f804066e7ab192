"""`trl.RewardTrainer` for rankings: the pairs of a prompt share a batch, and each answer in it is run once.

A ranking of K answers gives K(K-1)/2 pairs, so pairwise training runs every answer K-1 times, and once more for each
further annotator. Keeping a prompt's pairs together, as InstructGPT does (arXiv 2203.02155, section 3.5), makes the
repeats fall into one batch, where they cost nothing; the loss is that of `trl.RewardTrainer`. With a column `weight` it
is InstructGPT's: see [`prompt_weights`].
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import PreTrainedModel
from trl import RewardTrainer

from .trainer import GuardedTrlTrainer


class GroupedSampler(Sampler[int]):
    """Row indices, group by group, the groups in an order that is a pure function of (seed, epoch)."""

    def __init__(self, groups: Sequence[str], seed: int):
        members: dict[str, list[int]] = defaultdict(list)
        for index, group in enumerate(groups):
            members[group].append(index)
        self.members, self.rows = list(members.values()), len(groups)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        for group in torch.randperm(len(self.members), generator=generator).tolist():
            yield from self.members[group]


def prompt_weights(groups: Sequence[str]) -> list[float]:
    """A weight for each pair, such that all pairs of a prompt count as one; their mean is 1.

    InstructGPT (arXiv 2203.02155, eq. 1) divides a prompt's loss by its number of pairs K(K-1)/2: with nine answers a
    prompt would else count 36 times as much as with two.
    """
    pairs = Counter(groups)
    return [len(groups) / (len(pairs) * pairs[group]) for group in groups]


class GroupedRewardTrainer(GuardedTrlTrainer, RewardTrainer):
    """[`trl.RewardTrainer`] that keeps rows of one `prompt_id` together and runs repeated answers once.

    Training rows may have a column `weight`, by which their losses are multiplied.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.data_collator = _with_weights(self.data_collator)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "weight" not in self._signature_columns:
            self._signature_columns.append("weight")

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        # Trainer has dropped the column from the `train_dataset` it passes here.
        if "prompt_id" not in (self.train_dataset.column_names or ()):
            return super()._get_train_sampler(train_dataset)
        return GroupedSampler(self.train_dataset["prompt_id"][:], self.args.seed)

    def compute_loss(
        self,
        model: PreTrainedModel,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """The pairwise loss; `inputs` hold the chosen rows, then the rejected ones, `(2 * pairs, seq)`."""
        weights = inputs.pop("weight", None)
        rows = torch.cat([inputs["input_ids"], inputs["attention_mask"]], dim=1)
        distinct, place = rows.unique(dim=0, return_inverse=True)
        input_ids, attention_mask = distinct.chunk(2, dim=1)

        def run_once(**_: Any) -> Any:
            outputs = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
            outputs.logits = outputs.logits[place]
            return outputs

        loss, outputs = super().compute_loss(run_once, inputs, True, num_items_in_batch)
        if weights is not None:
            chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
            losses = -torch.nn.functional.logsigmoid(chosen - rejected - inputs.get("margin", 0.0))
            loss = loss + ((weights.to(losses) - 1) * losses).mean()
        return (loss, outputs) if return_outputs else loss


def _with_weights(collate: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    def collate_all(examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(examples)
        if "weight" in examples[0]:
            batch["weight"] = torch.tensor([example["weight"] for example in examples])
        return batch

    return collate_all
