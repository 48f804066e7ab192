"""The ranking page: it shows prompt, answers, guidelines and the annotator's own progress, and calls the queue."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import UserError
from .item_queue import AlreadySettled, Item, Queue
from .judgement_event import DAY_SECONDS
from .page import asset, page_of


if TYPE_CHECKING:
    import gradio

FLAGS = ("harmful", "wrong", "off_topic", "broken")
REASONS = ("cannot_judge", "all_bad", "unclear", "offensive")
NOTE_CHARACTERS = 2000
LANGUAGES = ("en", "ja")


@dataclass(frozen=True)
class Guidelines:
    """Instructions for annotators as Markdown, and the hash by which each judgement names them."""

    text: str

    @property
    def hash(self) -> str:
        """Return the first 12 hexadecimal digits of the text's SHA-256."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]

    @property
    def html(self) -> str:
        """Return the text as HTML: CommonMark without raw HTML and without images, which could send requests."""
        from markdown_it import MarkdownIt

        return MarkdownIt("commonmark", {"html": False}).disable("image").render(self.text)


def load_guidelines(path: str | None) -> dict[str, Guidelines]:
    """Load the guidelines of each language: the given file for both, or those that come with the package.

    Raises:
        UserError: if the file is missing or not UTF-8.
    """
    if path is None:
        return {language: Guidelines(asset(f"guidelines.{language}.md")) for language in LANGUAGES}
    try:
        own = Guidelines(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: guidelines_file cannot be read as UTF-8 text ({error})") from None
    return dict.fromkeys(LANGUAGES, own)


def keep_guidelines(guidelines: dict[str, Guidelines], folder: Path) -> None:
    """Save the guidelines beside the log as `guidelines-<hash>.md`, so that the text of every hash is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for version in guidelines.values():
        path = folder / f"guidelines-{version.hash}.md"
        if not path.exists():
            path.write_text(version.text, encoding="utf-8")


class Desk:
    """The server side of the page, as plain functions of JSON that can be tested without a browser.

    Args:
        queue: the items and the log.
        guidelines: language -> text.
        next_command: the command to run when everything is judged.
    """

    def __init__(self, queue: Queue, guidelines: dict[str, Guidelines], next_command: str):
        self.queue, self.guidelines, self.next_command = queue, guidelines, next_command

    def open_item(self, annotator: str, data: dict[str, Any]) -> dict[str, Any]:
        """Return this annotator's current item and everything that the page shows with it."""
        shown = self.queue.current(annotator)
        language = data.get("language") if data.get("language") in LANGUAGES else "en"
        text = self.guidelines[language]
        return {
            "item": shown and self._item(annotator, shown),
            "progress": self.queue.summary(annotator),
            "guidelines": {"hash": text.hash, "html": text.html},
            "next_command": self.next_command,
        }

    def _item(self, annotator: str, shown: dict[str, Any]) -> dict[str, Any]:
        item: Item = self.queue.items[shown["item_id"]]
        turns = [{"role": "user", "content": item.prompt}] if isinstance(item.prompt, str) else item.prompt
        draft = self.queue.draft(annotator, shown["ticket"]) or {}
        return {
            "ticket": shown["ticket"],
            "turns": [{"role": turn["role"], "content": turn["content"]} for turn in turns],
            "candidates": shown["candidates"],
            "draft": {key: draft[key] for key in ("ranks", "flags", "note", "seconds") if draft.get(key)},
        }

    def judge_item(self, annotator: str, data: dict[str, Any]) -> dict[str, Any]:
        """Log a ranking and open the next item."""
        ranks = data.get("ranks")
        if not isinstance(ranks, list):
            raise UserError("ranks: expected a list")
        flags = self._flags(data.get("flags"), len(ranks))
        about = self._about(data)
        return self._settle(
            annotator, data, "saved", lambda ticket: self.queue.judge(annotator, ticket, ranks, flags=flags, **about)
        )

    def skip_item(self, annotator: str, data: dict[str, Any]) -> dict[str, Any]:
        """Log that the item cannot be judged and open the next one."""
        if data.get("reason") not in REASONS:
            raise UserError(f"reason: expected one of {', '.join(REASONS)}")
        about = self._about(data)
        return self._settle(
            annotator, data, "skipped_it", lambda ticket: self.queue.skip(annotator, ticket, data["reason"], **about)
        )

    def _settle(
        self, annotator: str, data: dict[str, Any], message: str, decide: Callable[[str], Any]
    ) -> dict[str, Any]:
        """Log a decision and return the next item, or say that another tab had already decided."""
        try:
            decide(str(data.get("ticket")))
        except AlreadySettled:
            return self.open_item(annotator, data) | {"message": "settled_elsewhere", "refused": True}
        return self.open_item(annotator, data) | {"message": message}

    def undo_last(self, annotator: str, data: dict[str, Any]) -> dict[str, Any]:
        """Reopen the annotator's last item."""
        undone = self.queue.undo(annotator)
        message = "undone" if undone else "nothing_to_undo"
        return self.open_item(annotator, data) | {"message": message, "reopened": bool(undone)}

    def _about(self, data: dict[str, Any]) -> dict[str, Any]:
        seconds, known = data.get("seconds"), [version.hash for version in self.guidelines.values()]
        if data.get("guidelines") not in known:
            raise UserError("the guidelines have changed; reload the page")
        return {
            "note": str(data.get("note") or "")[:NOTE_CHARACTERS].encode("utf-8", "replace").decode(),
            "seconds": round(float(seconds), 2)
            if isinstance(seconds, (int, float)) and 0 < seconds < DAY_SECONDS - 1
            else None,
            "guidelines": data["guidelines"],
        }

    @staticmethod
    def _flags(flags: Any, count: int) -> list[list[str]]:
        if not isinstance(flags, list) or len(flags) != count or not all(isinstance(chosen, list) for chosen in flags):
            raise UserError(f"flags: expected {count} lists")
        return [[flag for flag in FLAGS if flag in chosen] for chosen in flags]


def build_page(desk: Desk, annotator: str | None) -> "gradio.Blocks":
    """Build the Gradio app around [`Desk`].

    Args:
        desk: answers the page's calls.
        annotator: whose page opens if the address names nobody. The name of a login overrides both.
    """
    settings = {
        "strings": json.loads(asset("strings.json")),
        "annotator": annotator,
        "flags": FLAGS,
        "reasons": REASONS,
        "note_characters": NOTE_CHARACTERS,
    }
    actions = (desk.open_item, desk.judge_item, desk.skip_item, desk.undo_last)
    return page_of(settings, asset("page.js"), actions)
