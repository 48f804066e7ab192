"""Reward functions: how a callable of the user's is called, told by its arguments, and pipelines of transformers."""

import importlib
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from transformers import Pipeline, TextClassificationPipeline

from ..core.errors import UserError
from ..models.rendering import render_prompt


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PROMPTS, COMPLETIONS = "prompts", "completions"
EXPECTED = "expected a function (prompts, completions, **columns) -> list[float]"
# A tokenizer without a limit of its own has a huge number as one.
NO_LIMIT = 10**6
BATCH_ROWS = 64


def named_function(name: str, columns: Sequence[str], key: str) -> Callable:
    """Import the function named `module:function`, which scores answers.

    Args:
        columns: of the data whose answers it scores.
        key: the option that names it.

    Raises:
        UserError: if it cannot be imported or called with these columns.
    """
    module, colon, attribute = name.partition(":")
    expected = "expected module:function, in a folder of PYTHONPATH"
    if not (module and colon and attribute):
        raise UserError(f"{key}: {name}: {expected}")
    try:
        function = getattr(importlib.import_module(module), attribute)
        check_columns(function, attribute, columns)
        arguments_for(function, attribute)
    except UserError:  # it says what is missing and how to get it
        raise
    except Exception as error:  # a module of the user's own can raise anything
        raise UserError(f"{key}: {name}: {type(error).__name__}: {error}; {expected}") from error
    return function


def arguments_for(function: Callable, name: str) -> Callable[[list, list, dict[str, list]], tuple[list, dict]]:
    """Return how to call a reward function: prompts, completions and columns to its positional and keyword arguments.

    Arguments called `prompts` or `completions` get these. Otherwise the first two get prompts and completions, in this
    order, and a single one the completions. Columns of the dataset go by name to a function that takes them.

    Raises:
        ValueError: if it takes no argument.
    """
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # built in, without a signature
        return lambda prompts, texts, columns: ([prompts, texts], {})
    kinds = [parameter.kind for parameter in parameters.values()]
    takes_all, any_number = inspect.Parameter.VAR_KEYWORD in kinds, inspect.Parameter.VAR_POSITIONAL in kinds
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [parameter for parameter in parameters.values() if parameter.kind in places]

    def taken(columns: dict[str, list]) -> dict[str, list]:
        return {key: values for key, values in columns.items() if takes_all or key in parameters}

    by_name = {PROMPTS, COMPLETIONS} & set(parameters)
    if by_name or (takes_all and not positional and not any_number):
        return lambda prompts, texts, columns: ([], taken({**columns, PROMPTS: prompts, COMPLETIONS: texts}))
    if len(positional) >= 2 or any_number:
        first_two = {parameter.name for parameter in positional[:2]}
        return lambda prompts, texts, columns: (
            [prompts, texts],
            {key: values for key, values in taken(columns).items() if key not in first_two},
        )
    if not positional:
        raise ValueError(f"reward {name}: takes no prompts and completions; {EXPECTED}")
    logger.warning("reward %s: it takes one argument, so it gets the completions without their prompts", name)
    return lambda prompts, texts, columns: ([texts], {})


def check_columns(function: Callable, name: str, columns: Sequence[str]) -> None:
    """Refuse a reward function that needs an argument which is no column of the training data.

    Raises:
        ValueError: with the missing and the present names.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:
        return
    named = {PROMPTS, COMPLETIONS} & {parameter.name for parameter in parameters}
    open_kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    rest = [parameter for parameter in parameters if parameter.kind not in open_kinds]
    rest = [parameter for parameter in rest if parameter.name not in named] if named else rest[2:]
    missing = [given.name for given in rest if given.default is inspect.Parameter.empty and given.name not in columns]
    if missing:
        found = f"the training data has the columns {', '.join(columns)}"
        raise ValueError(f"reward {name}: needs {', '.join(missing)}, but {found}; {EXPECTED}")


def pipeline_function(pipeline: Pipeline, tokenizer: "PreTrainedTokenizerBase", name: str) -> Callable:
    """Return a pipeline that classifies text as a reward function: the logit of its only or its positive label.

    Args:
        tokenizer: the policy's, which renders conversations.

    Raises:
        ValueError: if it does something else, or has several labels and none is the positive one.
    """
    if not isinstance(pipeline, TextClassificationPipeline):
        raise ValueError(f"reward {name}: a pipeline for {pipeline.task}; give one for text-classification")  # noqa: TRY004
    label = _positive_label(pipeline.model.config.id2label, name)
    logger.warning("reward %s: a pipeline, so a score is the logit of %s for prompt + completion", name, label)
    pipeline.model.eval()
    reader = pipeline.tokenizer
    options: dict[str, Any] = {"truncation": True} if reader.model_max_length < NO_LIMIT else {}
    # Padding on the left would change the positions of many classifiers, and with them the scores.
    padded = reader.pad_token_id is not None and reader.padding_side == "right"
    options["batch_size"] = getattr(pipeline, "_batch_size", None) or (BATCH_ROWS if padded else 1)

    def score(prompts: list[Any], completions: list[str]) -> list[float]:
        texts = [render_prompt(tokenizer, one) + text for one, text in zip(prompts, completions, strict=True)]
        rows = pipeline(texts, top_k=None, function_to_apply="none", **options)
        return [next(entry["score"] for entry in row if entry["label"] == label) for row in rows]

    return score


def _positive_label(labels: dict[int, str], name: str) -> str:
    if len(labels) == 1:
        return next(iter(labels.values()))
    positive = [label for label in labels.values() if label.lower().startswith("pos")]
    if not positive and len(labels) == 2:
        positive = [labels[max(labels)]]
    if len(positive) != 1:
        raise ValueError(
            f"reward {name}: a pipeline with the labels {', '.join(labels.values())}: none is the positive one; give a "
            "function (prompts, completions) -> list[float] that returns the score you mean"
        )
    return positive[0]
