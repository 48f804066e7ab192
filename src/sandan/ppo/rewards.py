"""Rewards: sequence classifiers and Python functions, called the same way to score the episodes of a rollout."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from ..models.rendering import encode_answers
from ..models.scoring import score_rows
from .inputs import takes
from .policy_and_value import given_or_loaded
from .reduction import OverRanks
from .rollout import INPUT_IDS, Rollout
from .shared_backbone import AdapterHead, Adapters, shared_reward


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RewardFunction = Callable[..., list[float]]


class Reward(Protocol):
    """A callable that scores a rollout. `name` is used for its metric, `rewards/<name>`."""

    name: str

    def __call__(self, rollout: Rollout, batch_size: int) -> list[float]: ...


@dataclass
class FunctionReward:
    """A reward that calls `function(prompts, completions, **columns) -> list[float]`.

    Prompts have the form that they have in the dataset, completions are text without the stop token, and the dataset's
    other columns are passed by name if the function takes them.
    """

    function: RewardFunction
    tokenizer: "PreTrainedTokenizerBase"

    def __post_init__(self):
        self.name = getattr(self.function, "__name__", type(self.function).__name__)
        parameters = inspect.signature(self.function).parameters
        self.takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
        self.takes = set(parameters)

    def __call__(self, rollout: Rollout, batch_size: int) -> list[float]:
        columns = {name: values for name, values in rollout.columns().items() if self.takes_all or name in self.takes}
        prompts, texts = rollout.prompts(self.tokenizer), [completion.text for completion in rollout.completions]
        try:
            scores = list(self.function(prompts, texts, **columns))
        except Exception as error:
            raise ValueError(
                f"reward {self.name}: raised {type(error).__name__}: {error} on {len(texts)} completions, the first "
                f"for the prompt {prompts[0]!r}"
            ) from error
        if len(scores) != len(texts):
            raise ValueError(f"reward {self.name}: returned {len(scores)} scores for {len(texts)} completions")
        for row, score in enumerate(scores):
            try:
                scores[row] = float(score)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"reward {self.name}: row {row}: expected a number, found {score!r} for the prompt "
                    f"{prompts[row]!r}, completion {texts[row]!r}"
                ) from error
        return scores


@dataclass
class ModelReward:
    """A sequence classifier with one label, read at the last token, where `trl.RewardTrainer` trains it.

    Args:
        tokenizer: the policy's.
        own_tokenizer: the reward model's, if it is another one; episodes are then passed to it as text.
    """

    name: str
    model: PreTrainedModel | AdapterHead
    tokenizer: "PreTrainedTokenizerBase"
    own_tokenizer: "PreTrainedTokenizerBase | None" = None

    def __post_init__(self):
        self.model.eval().requires_grad_(False)

    def __call__(self, rollout: Rollout, batch_size: int) -> list[float]:
        rows = self._read_as_text(rollout) if self.own_tokenizer else self._read_as_ids(rollout)
        # The cache is not needed, and with it torch.compile would compile each layer separately.
        options = {"use_cache": False} if takes(self.model, "use_cache") else {}
        return score_rows(self.model, rows, batch_size, **options)

    def _read_as_ids(self, rollout: Rollout) -> list[list[int]]:
        pairs = zip(rollout.rows, rollout.completions, strict=True)
        return [row[INPUT_IDS] + list(completion.token_ids) for row, completion in pairs]

    def _read_as_text(self, rollout: Rollout) -> list[list[int]]:
        """Return prompt + answer in the reward model's own tokens. An answer that stopped ends in that model's EOS."""
        texts, ended = zip(*((answer.text, answer.stopped) for answer in rollout.completions), strict=True)
        return encode_answers(self.own_tokenizer, rollout.prompts(self.tokenizer), texts, ended)


def make_rewards(
    reward_funcs: "str | PreTrainedModel | RewardFunction | list",
    processing_classes: "PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None",
    tokenizer: "PreTrainedTokenizerBase",
    adapters: Adapters | None = None,
) -> list[Reward]:
    """Make a [`Reward`] of each given model, path or function. Equal names get a number.

    Args:
        adapters: of the policy, if the first reward may be a further adapter (see [`shared_reward`]).

    Raises:
        ValueError: if tokenizers and rewards do not pair up.
    """
    functions = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    readers = processing_classes if isinstance(processing_classes, (list, tuple)) else [processing_classes]
    readers = list(readers) if processing_classes is not None else [None] * len(functions)
    if len(readers) != len(functions):
        raise ValueError(f"reward_processing_classes: {len(readers)} for {len(functions)} reward functions")
    rewards: list[Reward] = []
    for function, reader in zip(functions, readers, strict=True):
        shared = shared_reward(adapters, function) if adapters is not None and not rewards else None
        if shared is not None:
            rewards.append(ModelReward(Path(function).name, shared, tokenizer, reader))
        elif isinstance(function, (str, Path, PreTrainedModel)):
            model = given_or_loaded(AutoModelForSequenceClassification, function, num_labels=1)
            name = Path(model.config.name_or_path).name or type(model).__name__
            rewards.append(ModelReward(name, model, tokenizer, reader))
        else:
            rewards.append(FunctionReward(function, tokenizer))
    for index, reward in enumerate(rewards):
        if any(reward.name == earlier.name for earlier in rewards[:index]):
            reward.name = f"{reward.name}_{index}"
    return rewards


def score_rollout(
    rewards: Sequence[Reward],
    rollout: Rollout,
    tokenizer: "PreTrainedTokenizerBase",
    batch_size: int,
    over_ranks: OverRanks,
    place: str,
) -> torch.Tensor:
    """Return the scores of each reward, `(B, rewards)`, float32.

    Args:
        place: the text before an error message.

    Raises:
        ValueError: on all ranks, naming the reward and the row, if a reward fails or a score is not finite.
    """
    device = over_ranks.accelerator.device
    scores, error = torch.empty(0), None
    try:
        scores = torch.tensor([reward(rollout, batch_size) for reward in rewards], dtype=torch.float32).T
        bad = (~scores.isfinite()).nonzero().tolist()
        if bad:
            row, column = bad[0]
            raise ValueError(
                f"reward {rewards[column].name}: {scores[row, column].item()} for the prompt "
                f"{rollout.prompts(tokenizer)[row]!r}, completion {rollout.completions[row].text!r} (row {row}); "
                "scores must be finite"
            )
    except ValueError as caught:
        error = caught
    # If a process stopped alone, the others would wait for it in the next reduction.
    failed = int(over_ranks.sum(torch.tensor(float(error is not None), device=device)))
    if failed:
        raise ValueError(f"{place}: {error or f'rewards failed in {failed} other processes'}") from error
    return scores.to(device)
