"""Rewards: sequence classifiers and Python functions, called the same way to score the episodes of a rollout."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForSequenceClassification, Pipeline, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from ..models.rendering import encode_answers
from ..models.scoring import score_last_tokens, score_rows
from .inputs import taken, takes
from .parts import device_of, last_scores, parts_of
from .policy_and_value import given_or_loaded
from .reduction import OverRanks
from .reward_functions import COMPLETIONS, EXPECTED, arguments_for, check_columns, pipeline_function
from .rollout import INPUT_IDS, PROMPT, Rollout
from .shared_backbone import AdapterHead, Adapters, shared_reward


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RewardFunction = Callable[..., list[float]]
EITHER = "give a sequence classifier with num_labels=1, or a function (prompts, completions) -> list[float]"


class Reward(Protocol):
    """A callable that scores a rollout. `name` is used for its metric, `rewards/<name>`."""

    name: str

    def __call__(self, rollout: Rollout, batch_size: int) -> list[float]: ...

    def check(self, columns: Sequence[str] | None) -> None:
        """Refuse a reward that cannot work, before the first rollout.

        Args:
            columns: of the training data, if there is any.

        Raises:
            ValueError: naming it, and what may be given instead.
        """


class FunctionReward:
    """A reward that calls `function(prompts, completions, **columns) -> list[float]`, or a pipeline.

    Prompts have the form that they have in the dataset, and completions are text without the stop token. See
    [`arguments_for`] for functions with other arguments, and [`pipeline_function`].
    """

    def __init__(self, function: RewardFunction | Pipeline, tokenizer: "PreTrainedTokenizerBase"):
        self.function, self.tokenizer = function, tokenizer
        self.name = getattr(function, "__name__", type(function).__name__)
        is_pipeline = isinstance(function, Pipeline)
        self.called = pipeline_function(function, tokenizer, self.name) if is_pipeline else function
        self.arguments = arguments_for(self.called, self.name)

    def check(self, columns: Sequence[str] | None) -> None:
        if columns is not None:
            check_columns(self.called, self.name, [name for name in columns if name not in (PROMPT, INPUT_IDS)])

    def __call__(self, rollout: Rollout, batch_size: int) -> list[float]:
        prompts, texts = rollout.prompts(self.tokenizer), [completion.text for completion in rollout.completions]
        positional, keywords = self.arguments(prompts, texts, rollout.columns())
        try:
            scores = self.called(*positional, **keywords)
        except Exception as error:
            raise ValueError(
                f"reward {self.name}: raised {type(error).__name__}: {error} on {len(texts)} completions, the first "
                f"for the prompt {prompts[0]!r}"
            ) from error
        if not hasattr(scores, "__len__"):
            raise ValueError(f"reward {self.name}: returned {scores!r}; {EXPECTED}, here {len(texts)} numbers")
        scores = list(scores)
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


class UserModule(nn.Module):
    """A module of the user's own as a sequence classifier: scores `(B, 1)` of right-padded rows, as `.logits`.

    In TRL's form (a backbone under `base_model_prefix` and a `score`) it is read as TRL reads it. Otherwise its forward
    gets `input_ids` and `attention_mask`, and returns scores or something with `.logits`.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        # Not registered as a submodule: it is placed and saved under the user's own object.
        self.__dict__["module"] = module
        self.config = getattr(module, "config", None)

    @property
    def device(self) -> torch.device:
        return device_of(self.module)

    def eval(self) -> "UserModule":
        self.module.eval()
        return self

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SequenceClassifierOutput:
        parts = parts_of(self.module) if hasattr(self.module, "base_model_prefix") else None
        if parts is not None:
            return SequenceClassifierOutput(logits=last_scores(self.module, parts, input_ids, attention_mask))
        found = self.module(**taken(self.module, {"input_ids": input_ids, "attention_mask": attention_mask}))
        logits = found if isinstance(found, torch.Tensor) else found.logits
        return SequenceClassifierOutput(logits=logits[:, None] if logits.dim() == 1 else logits)


class ModelReward:
    """A model that gives one score, read at the last token, where `trl.RewardTrainer` trains it.

    Args:
        tokenizer: the policy's.
        own_tokenizer: the reward model's, if it is another one; episodes are then passed to it as text.
    """

    def __init__(
        self,
        model: "PreTrainedModel | PeftModel | AdapterHead | nn.Module",
        tokenizer: "PreTrainedTokenizerBase",
        own_tokenizer: "PreTrainedTokenizerBase | None" = None,
        name: str | None = None,
    ):
        self.model, self.tokenizer, self.own_tokenizer = model, tokenizer, own_tokenizer
        known = isinstance(model, (PreTrainedModel, PeftModel, AdapterHead))
        self.called = model if known else UserModule(model)
        path = getattr(getattr(model, "config", None), "name_or_path", None) or ""
        self.name = name or Path(path).name or type(model).__name__
        self.model.eval()

    @torch.no_grad()
    def check(self, columns: Sequence[str] | None) -> None:
        ids = torch.zeros(2, 2, dtype=torch.long, device=device_of(self.model))
        mask = torch.tensor([[1, 0], [1, 1]], device=ids.device)
        score_last_tokens(self.model)
        try:
            found = tuple(self.called(input_ids=ids, attention_mask=mask).logits.shape)
        except Exception as error:
            kind = f"a {type(self.model).__name__}, so it gets input_ids and attention_mask"
            problem = f"{type(error).__name__}: {error}"
            raise ValueError(f"reward {self.name}: {kind}, and must give .logits: {problem}; {EITHER}") from error
        if found != (2, 1):
            raise ValueError(f"reward {self.name}: its .logits are {found} for 2 rows, not one score each; {EITHER}")

    def __call__(self, rollout: Rollout, batch_size: int) -> list[float]:
        rows = self._read_as_text(rollout) if self.own_tokenizer else self._read_as_ids(rollout)
        # The cache is not needed, and with it torch.compile would compile each layer separately.
        options = {"use_cache": False} if takes(self.called, "use_cache") else {}
        return score_rows(self.called, rows, batch_size, **options)

    def _read_as_ids(self, rollout: Rollout) -> list[list[int]]:
        pairs = zip(rollout.rows, rollout.completions, strict=True)
        return [row[INPUT_IDS] + list(completion.token_ids) for row, completion in pairs]

    def _read_as_text(self, rollout: Rollout) -> list[list[int]]:
        """Return prompt + answer in the reward model's own tokens. An answer that stopped ends in that model's EOS."""
        texts, ended = zip(*((answer.text, answer.stopped) for answer in rollout.completions), strict=True)
        return encode_answers(self.own_tokenizer, rollout.prompts(self.tokenizer), texts, ended)


def make_reward(
    given: Any, tokenizer: "PreTrainedTokenizerBase", own_tokenizer: "PreTrainedTokenizerBase | None"
) -> Reward:
    """Return the reward for what the user gave, told by what it is: a path, a module, a pipeline or a callable.

    Raises:
        ValueError: if it is none of these.
    """
    if isinstance(given, (str, Path)):
        given = given_or_loaded(AutoModelForSequenceClassification, given, num_labels=1)
    if isinstance(given, nn.Module) and not takes(given, COMPLETIONS):
        return ModelReward(given, tokenizer, own_tokenizer)
    if callable(given):
        return FunctionReward(given, tokenizer)
    raise ValueError(f"reward_funcs: found {type(given).__name__}, not a model, a path or a function; {EITHER}")


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
            rewards.append(ModelReward(shared, tokenizer, reader, Path(function).name))
        else:
            rewards.append(make_reward(function, tokenizer, reader))
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
