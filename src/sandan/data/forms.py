"""The one form of a row: how texts, dialogues, turns and null fields become what is checked and trained.

    nulls       members of a turn that are null or empty (as Parquet and Arrow write absent ones) are absent
    dialogues   answers that are whole dialogues bring their prompt: their common start, up to the last user turn
    mixed       turns beside text: the text becomes turns
    as_chat     all text becomes turns

A row that fits none of this is left as it is, for the checks of [`sandan.data.row_checks`] to name.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from .chat import is_dialogue, to_text, to_turns


ANSWERS = ("completion", "chosen", "rejected")
TURNS = ("messages", "prompt", *ANSWERS)
# Members that say something even when they are empty: a call without arguments, an answer that is left blank.
KEPT_EMPTY = ("arguments", "content", "role")

Row = Mapping[str, Any]
Turns = list[dict[str, Any]]


def one_form(row: Row, as_chat: bool = False) -> dict[str, Any]:
    """Return a row in the one form that is checked and trained.

    Args:
        as_chat: text prompts, answers and dialogues become turns.
    """
    if not as_chat and all(isinstance(value, str) for value in row.values()) and row.keys().isdisjoint(TURNS):
        return dict(row)  # Most rows of pretraining, and quickly.
    row = {name: without_nulls(value) if isinstance(value, (list, dict)) else value for name, value in row.items()}
    row |= {name: list(map(_clean_turn, row[name])) for name in TURNS if isinstance(row.get(name), list)}
    given = [row[name] for name in ("prompt", *ANSWERS) if row.get(name) is not None]
    if as_chat or {str, list} <= set(map(type, given)):
        row = _in_turns(row)
        if as_chat and not given and is_dialogue(row.get("text")):
            turns = to_turns(row["text"])
            return {name: value for name, value in row.items() if name != "text"} | {"messages": turns}
        return _split_conversations(row)
    if any(isinstance(value, list) for value in given):
        return _split_conversations(row)
    return _split_dialogues(row)


def without_nulls(value: Any) -> Any:
    """Return a value without the members that are null, at any depth."""
    if isinstance(value, dict):
        return {name: without_nulls(member) for name, member in value.items() if member is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _clean_turn(turn: Any) -> Any:
    """Return a turn without empty members; beside tool calls, null content is empty text."""
    if not isinstance(turn, dict):
        return turn
    turn = {name: turn[name] if name in KEPT_EMPTY else _without_empty(turn[name]) for name in turn}
    turn = {name: value for name, value in turn.items() if name in KEPT_EMPTY or not _is_empty(value)}
    return turn if "content" in turn or "tool_calls" not in turn else turn | {"content": ""}


def _without_empty(value: Any) -> Any:
    if isinstance(value, dict):
        members = {
            name: without_nulls(member) if name == "arguments" else _without_empty(member)
            for name, member in value.items()
        }
        kept = {name: member for name, member in members.items() if not _is_empty(member) or name == "arguments"}
        return {} if set(kept) <= {"arguments"} and _is_empty(kept.get("arguments", {})) else kept
    if isinstance(value, list):
        return [item for item in map(_without_empty, value) if not _is_empty(item)]
    return value


def _is_empty(value: Any) -> bool:
    return isinstance(value, (dict, list)) and not value


def _in_turns(row: Row) -> dict[str, Any]:
    """Return a row whose text prompt and answers are turns: a dialogue, or one turn of the user or assistant."""
    turned = (
        {"prompt": to_turns(row["prompt"])} if isinstance(row.get("prompt"), str) and row["prompt"].strip() else {}
    )
    for name in ANSWERS:
        text = row.get(name)
        if isinstance(text, str):
            turned[name] = to_turns(text) if is_dialogue(text) else [{"role": "assistant", "content": text.strip()}]
    return {**row, **turned}


def _split_conversations(row: Row) -> dict[str, Any]:
    """Return a row whose answers are answers only; those that were whole conversations give their start as prompt."""
    given = [name for name in ANSWERS if isinstance(row.get(name), list)]
    if not all(_are_turns(row[name]) for name in ("prompt", *given) if isinstance(row.get(name), list)):
        return dict(row)
    names = [name for name in given if _is_conversation(row[name])]
    if not names or any(turn["role"] == "user" for name in given if name not in names for turn in row[name]):
        return dict(row)
    conversations = [row[name] for name in names]
    start = common_start(conversations)
    prompt = row.get("prompt") or []
    if not start or not isinstance(prompt, list) or not _begins_alike(prompt, start):
        return dict(row)
    cut = len(start)
    if prompt and prompt[0]["role"] == "system" and start[0]["role"] != "system":
        start = [prompt[0], *start]
    return {**row, "prompt": start, **{name: row[name][cut:] for name in names}}


def _is_conversation(turns: Turns) -> bool:
    """Return whether turns are a prompt and its answer: the user speaks, and then, last, the assistant."""
    roles = [turn["role"] for turn in turns]
    return "user" in roles and roles[-1] == "assistant"


def _are_turns(turns: Turns) -> bool:
    return all(isinstance(turn, dict) and "content" in turn and "role" in turn for turn in turns)


def common_start(conversations: Sequence[Turns]) -> Turns:
    """Return the turns with which all conversations begin, up to the last user turn before the last turn."""
    shortest = min(map(len, conversations)) - 1
    first = conversations[0]
    same = next(
        (at for at in range(shortest) if any(turns[at] != first[at] for turns in conversations)),
        shortest,
    )
    while same and first[same - 1]["role"] not in ("user", "tool"):
        same -= 1
    return first[:same]


def _begins_alike(prompt: Turns, start: Turns) -> bool:
    """Return whether a prompt is the start of answers that repeat it: no prompt, the first or the last user turn."""
    said, users = (
        [turn["content"].strip() for turn in turns if turn["role"] == "user" and isinstance(turn["content"], str)]
        for turns in (prompt, start)
    )
    return not prompt or said == users or (len(said) == 1 and said[0] in users)


def _split_dialogues(row: Row) -> dict[str, Any]:
    """Return a row of text whose answers are answers only; whole dialogues give their start as prompt."""
    names = [name for name in ANSWERS if is_dialogue(row.get(name))]
    if not names or any(row.get(name) is not None and name not in names for name in ANSWERS):
        return dict(row)
    conversations = [to_turns(row[name]) for name in names]
    if not all(map(_is_conversation, conversations)):
        return dict(row)
    prompt = row.get("prompt") or ""
    start = common_start(conversations)
    if not start or (prompt.strip() and not _begins_alike(to_turns(prompt), start)):
        return dict(row)
    rests = [turns[len(start) :] for turns in conversations]
    if any(len(rest) != 1 for rest in rests):
        return dict(row)
    # As text, the prompt ends with "Assistant:" and the answer begins after it, so that both together are the dialogue.
    answers = {name: f" {rest[0]['content']}" for name, rest in zip(names, rests, strict=True)}
    return {**row, "prompt": to_text([*start]) if len(start) > 1 else _dialogue(start[0]), **answers}


def _dialogue(turn: Mapping[str, str]) -> str:
    return f"\n\nHuman: {turn['content']}\n\nAssistant:"
