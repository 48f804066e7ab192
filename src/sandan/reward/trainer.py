"""`trl.RewardTrainer` for rankings: the pairs of a prompt share a batch, which runs each answer only once.

A ranking of K answers gives K(K-1)/2 pairs, so pairwise training runs every answer K-1 times, and more if several
annotators ranked it. If a prompt's pairs stay together, as in InstructGPT (arXiv 2203.02155, section 3.5), the repeats
are in one batch, where they cost nothing; on a CPU the prompt itself is computed once for all its answers. The loss is that of `trl.RewardTrainer`; with a column `weight` it is
InstructGPT's: see [`prompt_weights`].
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from itertools import chain
from typing import Any, Literal

import torch
from torch.utils.data import Sampler, SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GenericForSequenceClassification
from trl import RewardConfig, RewardTrainer
from trl.trainer.utils import pad

from ..models.prefix_tree import prefix_tree
from ..models.score_scale import ScoreScale
from ..models.scoring import score_last_tokens
from ..models.tokens import PAD
from ..models.unpadded_attention import segments
from ..training.unpadded_trainer import FlatTrainer
from .rows import tokenized


class GroupedSampler(Sampler[int]):
    """A sampler of row indices, group by group; the order of the groups is a pure function of (seed, epoch).

    Args:
        groups: the group of each row.
        lengths: the length of each row. If given, groups of similar length follow each other, so that batches have
            less padding: each slice of about `sorted_rows` rows is sorted by the longest row, longest first.
    """

    sorted_rows = 4096

    def __init__(self, groups: Sequence[Hashable], seed: int, lengths: Sequence[int] | None = None):
        members: dict[Hashable, list[int]] = defaultdict(list)
        for index, group in enumerate(groups):
            members[group].append(index)
        self.members, self.rows = list(members.values()), len(groups)
        self.longest = lengths and [max(lengths[index] for index in group) for group in self.members]
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; accelerate calls this at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        order = torch.randperm(len(self.members), generator=generator).tolist()
        if self.longest:
            size = max(self.sorted_rows * len(self.members) // self.rows, 1)
            slices = [order[start : start + size] for start in range(0, len(order), size)]
            order = [group for part in slices for group in sorted(part, key=self.longest.__getitem__, reverse=True)]
        for group in order:
            yield from self.members[group]


def prompt_weights(groups: Sequence[str]) -> list[float]:
    """Return a weight for each pair, such that all prompts have the same total weight; the mean weight is 1.

    InstructGPT (arXiv 2203.02155, eq. 1) divides a prompt's loss by its number of pairs K(K-1)/2. Otherwise a prompt
    with nine answers would count 36 times as much as one with two.
    """
    pairs = Counter(groups)
    return [len(groups) / (len(pairs) * pairs[group]) for group in groups]


class GroupedRewardTrainer(FlatTrainer, RewardTrainer):
    """A [`trl.RewardTrainer`] that keeps rows of one `prompt_id` together and runs repeated answers once.

    Training rows may have a column `weight`, by which their loss is multiplied.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Reset the score scale: a model that was a reward model before still has its old one.
        ScoreScale().store(self.model.config)
        score_last_tokens(self.model)
        layout = "padded" if not self.flat else "tree" if self.args.device.type == "cpu" else "flat"
        self.data_collator = DistinctRows(layout, self.args.pad_to_multiple_of)

    def _flat_obstacle(self) -> str | None:
        if not isinstance(self._base_model(), GenericForSequenceClassification):
            return f"{type(self._base_model()).__name__} is not a decoder with transformers' common score head"
        return super()._flat_obstacle()

    def _prepare_dataset(
        self, dataset: Any, processing_class: PreTrainedTokenizerBase, args: RewardConfig, name: str
    ) -> Any:
        return super()._prepare_dataset(tokenized(dataset, processing_class, args), processing_class, args, name)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "weight" not in self._signature_columns:
            self._signature_columns.append("weight")

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        # The `train_dataset` passed by `Trainer` lacks the column `prompt_id`, and `Trainer` would sort by a column
        # `input_ids`, which pairs do not have.
        by_length = self.args.train_sampling_strategy == "group_by_length"
        grouped = "prompt_id" in (self.train_dataset.column_names or ())
        if not (grouped or by_length):
            return super()._get_train_sampler(train_dataset)
        lengths = None
        if by_length:
            sides = (self.train_dataset[side] for side in ("chosen_ids", "rejected_ids"))
            lengths = [max(map(len, pair)) for pair in zip(*sides, strict=True)]
        groups = self.train_dataset["prompt_id"][:] if grouped else range(len(self.train_dataset))
        return GroupedSampler(groups, self.args.seed, lengths)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        # The sampler of `Trainer` would sort by a column `input_ids`, which pairs do not have.
        by_length = self.args.train_sampling_strategy == "group_by_length"
        return SequentialSampler(eval_dataset) if by_length else super()._get_eval_sampler(eval_dataset)

    def compute_loss(
        self,
        model: PreTrainedModel,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """Return the pairwise loss of a batch of [`DistinctRows`]."""
        rows, place = dict(inputs), inputs["place"]
        pairs = {name: rows.pop(name) for name in ("weight", "margin") if name in rows}
        del rows["place"]
        tokens = rows.pop("row_tokens")

        def run_once(**_: Any) -> Any:
            outputs = model(**rows, use_cache=False)
            outputs.logits = outputs.logits[place]
            return outputs

        weights = pairs.pop("weight", None)
        # TRL uses the mask only to count tokens.
        counted = pairs | {"attention_mask": tokens[place]}
        loss, outputs = super().compute_loss(run_once, counted, True, num_items_in_batch)
        if weights is not None:
            chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
            losses = -torch.nn.functional.logsigmoid(chosen - rejected - pairs.get("margin", 0.0))
            loss = loss + ((weights.to(losses) - 1) * losses).mean()
        if not self.model.training:
            self._count_pairs(len(place) // 2)
        return (loss, outputs) if return_outputs else loss

    def _count_pairs(self, pairs: int) -> None:
        """Let the batch count once for each of its pairs: TRL averages batches, and the last one may be smaller.

        The logged accuracy is then the share of right pairs, as in [`sandan.reward.metrics`].
        """
        for name in ("accuracy", "margin"):
            self._metrics["eval"][name] += self._metrics["eval"][name][-1:] * (pairs - 1)


class DistinctRows:
    """A collator of pairs that puts each distinct row into the batch once.

    A batch has `place` `(2 * pairs,)`, the row of each chosen answer, then of each rejected one; `row_tokens` `(rows,)`,
    their lengths; the rows `input_ids` in a layout, with what the model needs to read it; and `margin` and `weight`
    `(pairs,)`, if the examples have them.

    Args:
        layout: `padded` rows `(rows, seq)`, `flat` ones `(1, tokens)` that follow each other, or a `tree` `(1, tokens)`,
            in which beginnings that rows have in common are there once.
        pad_to_multiple_of: the length of padded rows.
    """

    def __init__(self, layout: Literal["padded", "flat", "tree"], pad_to_multiple_of: int | None = None):
        self.layout, self.pad_to_multiple_of = layout, pad_to_multiple_of

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        distinct: dict[tuple[int, ...], int] = {}
        asked = (tuple(example[side]) for side in ("chosen_ids", "rejected_ids") for example in examples)
        # `place` comes first because `Trainer` takes the length of the first tensor as the batch size.
        batch: dict[str, Any] = {"place": torch.tensor([distinct.setdefault(ids, len(distinct)) for ids in asked])}
        rows = list(distinct)
        batch["row_tokens"] = torch.tensor(list(map(len, rows)))
        batch |= {"padded": self._padded, "flat": self._flat, "tree": prefix_tree}[self.layout](rows)
        for name in ("margin", "weight"):
            if name in examples[0]:
                batch[name] = torch.tensor([example[name] for example in examples], dtype=torch.float)
        return batch

    def _flat(self, rows: list[tuple[int, ...]]) -> dict[str, Any]:
        return {"input_ids": torch.tensor([list(chain.from_iterable(rows))]), **segments(list(map(len, rows)))}

    def _padded(self, rows: list[tuple[int, ...]]) -> dict[str, torch.Tensor]:
        ids = [torch.tensor(row) for row in rows]
        side = {"padding_side": "right", "pad_to_multiple_of": self.pad_to_multiple_of}
        return {
            "input_ids": pad(ids, padding_value=PAD, **side),
            "attention_mask": pad([torch.ones_like(row) for row in ids], padding_value=0, **side),
        }
