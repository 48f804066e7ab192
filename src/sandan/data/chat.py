"""Conversion between text and chat turns, and the prompt of a row."""

import hashlib
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..core.errors import UserError


if TYPE_CHECKING:
    # Rendering imports torch and TRL, which take seconds; the ranking page needs neither.
    from ..models.rendering import Prompt


def prompt_text(prompt: "Prompt") -> str:
    """Return a prompt as text for a reader: the text itself, or one line for each turn."""
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


def first_user_text(row: dict[str, Any]) -> str:
    """Return the split key of a row: its text or first user turn. Rows with the same key stay in the same split."""
    prompt = row.get("text") or row.get("prompt") or row.get("messages") or row.get("chosen")
    turns = to_turns(prompt) if isinstance(prompt, str) else prompt
    return next((turn for turn in turns if turn["role"] == "user"), turns[0])["content"]


SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant): ?")


def is_dialogue(text: Any) -> bool:
    """Return whether text is a dialogue in Anthropic's form: it begins with `Human:`, and `Assistant:` follows."""
    return isinstance(text, str) and re.match(r"\s*Human:", text) is not None and "\n\nAssistant:" in text


def to_turns(prompt: str) -> list[dict[str, str]]:
    """Convert a text prompt to chat turns: a dialogue in Anthropic's `Human:`/`Assistant:` form, or one user turn."""
    parts = SPEAKER.split(prompt)
    marked = prompt.startswith("\n\n") or is_dialogue(prompt)
    if len(parts) < 3 or parts[0].strip() or not marked:
        return [{"role": "user", "content": prompt.strip()}]
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [{"role": roles[who], "content": text.strip()} for who, text in zip(parts[1::2], parts[2::2], strict=True)]
    return turns[:-1] if turns[-1]["role"] == "assistant" and not turns[-1]["content"] else turns


def split_by_prompt(keys: Sequence[str], held_out_share: float, seed: int) -> list[bool]:
    """Return for each key whether it is held out.

    This is a pure function of (key, seed), so the rows of one prompt are never in both splits.
    """

    def position(key: str) -> float:
        digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    return [position(key) < held_out_share for key in keys]


def prompt_id(row: dict[str, Any]) -> str:
    """Return the row's own `prompt_id`, or a digest of its prompt; "" if it has neither."""
    if row.get("prompt_id"):
        return str(row["prompt_id"])
    if not row.get("prompt"):
        return ""
    return hashlib.sha256(json.dumps(row["prompt"], ensure_ascii=False).encode()).hexdigest()[:16]


def as_turn(prompt: str | list[dict[str, str]], text: str) -> str | list[dict[str, str]]:
    """Return an answer in the form of its prompt: text, or a list with an assistant turn."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def text_of(answer: str | list[dict[str, str]]) -> str:
    """Return the text of an answer that is given as text or as an assistant turn."""
    return answer if isinstance(answer, str) else answer[-1]["content"]


def to_text(turns: Sequence[dict[str, str]]) -> str:
    """Convert turns to text that [`to_turns`] can read: a single user turn unchanged, else a dialogue."""
    if len(turns) == 1 and turns[0]["role"] == "user":
        return turns[0]["content"]
    names = {"user": "Human", "assistant": "Assistant"}
    if not {turn["role"] for turn in turns} <= set(names):
        raise UserError(
            "form: standard: a prompt has turns of other roles than user and assistant; use conversational"
        )
    return "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in turns) + "\n\nAssistant:"
