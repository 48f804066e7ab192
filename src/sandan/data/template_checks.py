"""Whether the chat format of a tokenizer can write a row: asked of every row, before anything is trained."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..models.rendering import template_options
from .forms import ANSWERS
from .row_checks import Problem


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KIND = "that the chat template refuses"
# What a template raises on its own (`raise_exception`) is a TemplateError; the others are its operations on values
# that it does not expect, such as the sum of text and nothing.
REFUSALS = (TypeError, ValueError, KeyError, AttributeError, IndexError)


class TemplateCheck:
    """A check of rows by the chat template of a tokenizer; it remembers the last conversations that it has seen.

    A prompt and its answers are in all pairs that a ranking gives, one after the other.
    """

    REMEMBERED = 4096

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.tokenizer = tokenizer
        self.seen: dict[str, Problem | None] = {}

    def __call__(self, row: Mapping[str, Any], names: Sequence[str]) -> Problem | None:
        """Return a problem if the chat template refuses the turns of a row, or leaves their tool calls out.

        Args:
            names: the columns that the stage uses.
        """
        options = template_options(row)
        for name, turns, is_prompt in _conversations(row, names):
            if self.tokenizer.chat_template is None:
                text = (
                    "has turns, but the tokenizer has no chat template; use text, or in SFT give --chat_template_path"
                )
                return Problem(name, text, "without a chat template")
            key = repr((name, turns, is_prompt, options))
            if key not in self.seen:
                if len(self.seen) == self.REMEMBERED:
                    self.seen.clear()
                self.seen[key] = _refusal(options, name, turns, is_prompt, self.tokenizer)
            if found := self.seen[key]:
                return found
        return None


def _conversations(row: Mapping[str, Any], names: Sequence[str]) -> Iterator[tuple[str, list[dict[str, Any]], bool]]:
    """Yield each conversation of a row: its column, its turns, and whether an answer is still to come."""
    if "messages" in names and isinstance(row["messages"], list):
        yield "messages", row["messages"], False
    prompt = row["prompt"] if "prompt" in names and isinstance(row["prompt"], list) else []
    if prompt:
        yield "prompt", prompt, True
    for name in names:
        if name in ANSWERS and isinstance(row[name], list):
            yield name, [*prompt, *row[name]], False


def _refusal(
    options: dict[str, Any],
    name: str,
    turns: list[dict[str, Any]],
    is_prompt: bool,
    tokenizer: "PreTrainedTokenizerBase",
) -> Problem | None:
    from jinja2 import TemplateError

    def written(conversation: list[dict[str, Any]]) -> str:
        return tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=is_prompt, **options)

    try:
        text = written(turns)
    except (TemplateError, *REFUSALS) as error:
        return Problem(name, f"the chat template refuses it: {' '.join(str(error).split())[:200]}", KIND)
    if not any(turn.get("tool_calls") for turn in turns):
        return None
    try:
        unchanged = written([{key: turn[key] for key in turn if key != "tool_calls"} for turn in turns]) == text
    except (TemplateError, *REFUSALS):
        return None
    if unchanged:
        fix = "use a model whose chat format has them, or write them as text"
        return Problem(name, f"the chat template leaves its tool calls out; {fix}", KIND)
    return None
