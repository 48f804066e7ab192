"""Judges of the comparison that no stage trained with: a gold reward model, and functions that check answers."""

from collections.abc import Callable, Iterable, Iterator, Sequence
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
from ..ppo.reward_functions import arguments_for, named_function


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
        attribute = name.partition(":")[2]
        function = named_function(name, columns, "gold_functions")
        if attribute in (GOLD, *(judge.name for judge in judges)):
            raise UserError(f"gold_functions: {name}: there is another judge called {attribute}; rename the function")
        judges.append(Judge(attribute, _called(function, arguments_for(function, attribute), attribute)))
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


def reward_of(ppo_model: str) -> str | None:
    """Return the reward model that a policy of the stage `ppo` was trained with, if its folder says so."""
    return (read_settings(Path(ppo_model, RESULT)).get("config") or {}).get("reward_model_path")


def refuse_known_judge(judge: str, rewards: Iterable[str | None], key: str = "gold_reward_model") -> None:
    """Refuse a judge that is a reward model that PPO trains with, or learned from the same pairs.

    Args:
        judge: its folder or Hub name.
        rewards: those of the reward models of PPO.
        key: the option that names the judge.

    Raises:
        UserError: saying how the two are the same.
    """
    for reward in dict.fromkeys(filter(None, rewards)):
        if same := _same(judge, reward):
            raise UserError(
                f"{key}: {judge}: {same} of {reward}, with which PPO trains, so it is no independent judge; train one "
                "on other pairs"
            )


def _same(judge: str, path: str) -> str | None:
    if judge == path or Path(judge).resolve() == Path(path).resolve():
        return "is the folder"
    if (weights := _weights(judge)) and weights == _weights(path):
        return "has the weights"
    own, others = list(_training_data(judge)), list(_training_data(path))
    if shared := sorted({name for source, name in own for other, _ in others if _overlap(source, other)}):
        return f"learned from training data ({', '.join(shared)})"
    return None


def _weights(path: str) -> list[str]:
    return [sha256(file) for file in sorted(Path(path).glob("*.safetensors"))]


def _overlap(one: str, other: str) -> bool:
    """Return whether two sources share rows; two different parts of a split (`train[:50%]`) are taken as apart."""
    (whole, _, part), (other_whole, _, other_part) = one.partition("["), other.partition("[")
    return whole == other_whole and (part == other_part or not (part and other_part))


def _training_data(path: str) -> Iterator[tuple[str, str]]:
    """Yield what a reward model was trained on, and its name: the sha256 of a file, or a data set of the Hub."""
    result = read_settings(Path(path, RESULT))
    config, inputs = result.get("config") or {}, result.get("inputs") or {}
    for source in [*(config.get("datasets") or []), {"data_files": config.get("data_files")}]:
        files: Any = source.get("data_files") or []
        for file in [files] if isinstance(files, str) else files:
            if digest := inputs.get(str(Path(file))):
                yield digest, Path(file).name
        if source.get("path") and not files:
            yield f"{source['path']} {source.get('name')} {source.get('split')}", str(source["path"])
