"""The models that answer side by side: loading them, and what of a conversation each of them reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import UserError
from ..core.stage import require_whole
from ..data.chat import to_text
from ..models.checks import positions_of
from ..models.loading import check_vocabulary, load_causal_lm, load_tokenizer, refuse_missing_folder
from ..models.rendering import Prompt, Turns, shortened
from ..models.sampling import Completion, stream_completion


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MOST_MODELS = 4


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled; `temperature` 0 is greedy."""

    max_new_tokens: int
    temperature: float
    seed: int

    def __post_init__(self) -> None:
        if not 1 <= self.max_new_tokens <= 100_000:
            raise UserError(f"max_new_tokens: {self.max_new_tokens}; an answer has 1 to 100,000 tokens")
        if not 0 <= self.temperature <= 10:
            raise UserError(f"temperature: {self.temperature}; it lies between 0 (greedy) and 10")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise UserError(f"seed: {self.seed}; it is a whole number from 0 to 4,294,967,295")


@dataclass(frozen=True)
class Speaker:
    """A model that answers, under the name that people see."""

    name: str
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"

    @property
    def chats(self) -> bool:
        """Return whether its tokenizer has a chat template; if not, the model continues plain text."""
        return self.tokenizer.chat_template is not None

    def prompt(self, turns: Turns) -> Prompt:
        """Return a conversation in the form that the model reads."""
        return turns if self.chats else to_text(turns)

    def answer(
        self,
        turns: Turns,
        sampling: Sampling,
        show: Callable[[str], None],
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> Completion:
        """Answer a conversation; its oldest turns are left out if the model has no positions for all of them.

        Args:
            show: gets the text so far whenever it has grown.
            is_stopped: ends the answer where it is, once it returns true.

        Raises:
            UserError: if the last turn alone is too long.
        """
        positions, new_tokens = positions_of(self.model.config), sampling.max_new_tokens
        if positions is not None:
            new_tokens = min(new_tokens, positions // 2)
            kept = shortened(self.tokenizer, turns, positions - new_tokens, self.prompt)
            if kept is None:
                raise UserError(f"{self.name}: the question is too long; it reads {positions - new_tokens:,} tokens")
            turns = kept
        return stream_completion(
            self.model,
            self.tokenizer,
            self.prompt(turns),
            new_tokens,
            sampling.temperature,
            sampling.seed,
            show,
            is_stopped,
        )


def load_speakers(models: Sequence[str]) -> list[Speaker]:
    """Load the models, each given as `NAME=FOLDER` or `FOLDER`; a Hub name stands for a folder.

    Raises:
        UserError: if there are none or too many, two have one name, or one of them cannot be loaded.
    """
    if not 1 <= len(models) <= MOST_MODELS:
        raise UserError(f"models: {len(models)}; give 1 to {MOST_MODELS}, as in: base=outputs/tiny/pretrain")
    named = [_named(model) for model in models]
    names = [name for name, _ in named]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"models: {twice[0]}: two models have this name; give NAME=FOLDER for each")
    return [_load(name, path) for name, path in named]


def _named(model: str) -> tuple[str, str]:
    """Return name and path of a model; without a name that of its folder."""
    name, sign, path = model.partition("=")
    if not sign:
        name, path = Path(model).name, model
    if not name or not path:
        raise UserError(f"models: {model!r}: expected NAME=FOLDER or FOLDER")
    return name, path


def _load(name: str, path: str) -> Speaker:
    if Path(path).is_dir():
        require_whole(Path(path))
    else:
        refuse_missing_folder(path, "models")
    tokenizer, model = load_tokenizer(path), load_causal_lm(path)
    check_vocabulary(model.config, tokenizer, path)
    return Speaker(name, model, tokenizer)
