"""Judges of the comparison that no stage trained with: a gold reward model, and functions that check answers."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import UserError
from ..core.files import sha256
from ..core.stage import RESULT
from ..core.stage_folder import read_settings
from ..models.loading import check_same_tokens, load_reward_model
from ..models.rendering import Prompt
from ..models.sampling import Completion
from ..models.scoring import score_completions
from ..ppo.reward_functions import arguments_for, check_columns


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GOLD = "gold"


@dataclass(frozen=True)
class Judge:
    """A judge that scores answers: `(prompts, completions, columns of the rows) -> scores`.

    Args:
        name: of its figures, `judge/<name>/...`.
    """

    name: str
    score: Callable[[Sequence[Prompt], Sequence[Completion], dict[str, list]], list[float]]


def gold_judge(path: str, tokenizer: "PreTrainedTokenizerBase") -> Judge:
    """Return a reward model as a judge."""
    check_same_tokens(tokenizer, path, "gold_reward_model")
    model = load_reward_model(path, key="gold_reward_model")
    return Judge(GOLD, lambda prompts, answers, columns: score_completions(model, tokenizer, prompts, answers))


def function_judges(names: Sequence[str], columns: Sequence[str]) -> list[Judge]:
    """Return the functions named `module:function` as judges; they are called as PPO calls its reward functions.

    Args:
        columns: of the evaluation data.

    Raises:
        UserError: if one cannot be imported or called.
    """
    judges = []
    for name in names:
        module, _, attribute = name.partition(":")
        try:
            function = getattr(importlib.import_module(module), attribute)
            check_columns(function, attribute, columns)
            call = arguments_for(function, attribute)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise UserError(f"gold_functions: {name}: {error}; expected module:function, importable") from error
        judges.append(Judge(attribute, _called(function, call, attribute)))
    return judges


def _called(function: Callable, call: Callable, name: str) -> Callable[..., list[float]]:
    def score(prompts: Sequence[Prompt], answers: Sequence[Completion], columns: dict[str, list]) -> list[float]:
        positional, named = call(list(prompts), [answer.text for answer in answers], columns)
        scores = [float(score) for score in function(*positional, **named)]
        if len(scores) != len(answers):
            raise UserError(f"gold_functions: {name}: returned {len(scores)} scores for {len(answers)} answers")
        return scores

    return score


# ---- Has training seen it? ----


def refuse_known_judge(gold: str, ppo_model: str, reward_model: str | None) -> None:
    """Refuse a gold reward model that is the one PPO trained with, or learned from the same pairs.

    Args:
        gold, ppo_model: their folders or Hub names; the result of PPO names the reward model that it trained with.
        reward_model: the recipe's reward model, if the evaluation names one.

    Raises:
        UserError: saying how the two are the same.
    """
    trained = read_settings(Path(ppo_model, RESULT)).get("config") or {}
    for path in dict.fromkeys(filter(None, (reward_model, trained.get("reward_model_path")))):
        if same := _same(gold, path):
            raise UserError(
                f"gold_reward_model: {gold}: {same} of {path}, with which PPO trained, so it is no independent judge; "
                "train one on other pairs"
            )


def _same(gold: str, path: str) -> str | None:
    if gold == path or Path(gold).resolve() == Path(path).resolve():
        return "is the folder"
    if (weights := _weights(gold)) and weights == _weights(path):
        return "has the weights"
    if shared := set(_training_data(gold)) & set(_training_data(path)):
        return f"learned from training data ({', '.join(sorted(name for _, name in shared))})"
    return None


def _weights(path: str) -> list[str]:
    return [sha256(file) for file in sorted(Path(path).glob("*.safetensors"))]


def _training_data(path: str) -> Iterator[tuple[str, str]]:
    """Yield what a reward model was trained on: (sha256, name of the file), or (name, split) of a Hub data set."""
    result = read_settings(Path(path, RESULT))
    config, inputs = result.get("config") or {}, result.get("inputs") or {}
    sources = list(config.get("datasets") or []) + [{"data_files": config.get("data_files") or []}]
    for source in sources:
        files: Any = source.get("data_files") or []
        for file in [files] if isinstance(files, str) else files:
            if digest := inputs.get(str(Path(file))):
                yield digest, Path(file).name
        if source.get("path") and not files:
            yield str(source.get("split")), str(source["path"])
