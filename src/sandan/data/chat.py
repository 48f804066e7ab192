"""Text and chat turns: the one place that turns one into the other, and that says which prompt a row is about."""

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from ..core.errors import UserError
from ..models.rendering import Prompt


def prompt_text(prompt: Prompt) -> str:
    """A prompt as a reader sees it: the text, or the turns one under the other."""
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


def first_user_text(row: dict[str, Any]) -> str:
    """What a row is about: its text, or the first turn of its prompt. Rows that share it belong on one side of a split."""
    prompt = row.get("text") or row.get("prompt") or row.get("messages") or row.get("chosen")
    if isinstance(prompt, str):
        return to_turns(prompt)[0]["content"]
    return prompt[0]["content"]


def to_turns(prompt: str) -> list[dict[str, str]]:
    """A text prompt as chat turns: a dialogue in Anthropic's `Human:`/`Assistant:` form, or one user turn."""
    parts = re.split(r"\n\n(Human|Assistant): ?", prompt)
    if len(parts) < 3 or parts[0].strip():
        return [{"role": "user", "content": prompt.strip()}]
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [{"role": roles[who], "content": text.strip()} for who, text in zip(parts[1::2], parts[2::2], strict=True)]
    return turns[:-1] if turns[-1]["role"] == "assistant" and not turns[-1]["content"] else turns


def as_chat(row: dict[str, Any]) -> dict[str, Any]:
    """Text columns `prompt`, `completion`, `chosen`, `rejected` as chat turns; others as they are."""
    turned = {"prompt": to_turns(row["prompt"])} if isinstance(row.get("prompt"), str) else {}
    for name in ("completion", "chosen", "rejected"):
        if isinstance(row.get(name), str):
            turned[name] = [{"role": "assistant", "content": row[name].strip()}]
    return turned


def split_by_prompt(keys: Sequence[str], held_out_share: float, seed: int) -> list[bool]:
    """Whether each key is held out: a pure function of (key, seed), so one prompt never sits on both sides."""

    def position(key: str) -> float:
        digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    return [position(key) < held_out_share for key in keys]


def prompt_id(row: dict[str, Any]) -> str:
    """The row's own `prompt_id`, or a digest of its prompt; "" if it has neither."""
    if row.get("prompt_id"):
        return str(row["prompt_id"])
    if not row.get("prompt"):
        return ""
    return hashlib.sha256(json.dumps(row["prompt"], ensure_ascii=False).encode()).hexdigest()[:16]


def as_turn(prompt: str | list[dict[str, str]], text: str) -> str | list[dict[str, str]]:
    """An answer in the form of its prompt: text, or an assistant turn."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def text_of(answer: str | list[dict[str, str]]) -> str:
    """The text of an answer given as text or as an assistant turn."""
    return answer if isinstance(answer, str) else answer[-1]["content"]


def to_text(turns: Sequence[dict[str, str]]) -> str:
    """Turns as one text, which [`sandan.data.chat.to_turns`] reads back: a single user turn as it is, else a dialogue."""
    if len(turns) == 1 and turns[0]["role"] == "user":
        return turns[0]["content"]
    names = {"user": "Human", "assistant": "Assistant"}
    if not {turn["role"] for turn in turns} <= set(names):
        raise UserError(
            "form: standard: a prompt has turns of other roles than user and assistant; use conversational"
        )
    return "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in turns) + "\n\nAssistant:"
