"""The ranking page: one Gradio component whose script calls the queue, by default served to this machine only.

The page shows prompt, answers, guidelines and the annotator's own progress. Text written by a model leaves the server
as JSON and enters the document as text nodes. Every request passes [`sandan.preference.page_guard.PageGuard`], whose
content security policy allows requests to the page's own server only, whatever a candidate contains.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import UserError
from ..core.text import HIDDEN
from .item_queue import AlreadySettled, Item, Queue
from .judgement_event import DAY_SECONDS
from .judgement_log import check_annotator
from .page_guard import PageGuard


if TYPE_CHECKING:
    import gradio

logger = logging.getLogger(__name__)

FLAGS = ("harmful", "wrong", "off_topic", "broken")
REASONS = ("cannot_judge", "all_bad", "unclear", "offensive")
NOTE_CHARACTERS = 2000
LANGUAGES = ("en", "ja")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


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


def asset(name: str) -> str:
    """Return the text of a file that comes with the package."""
    return (resources.files(__package__) / "assets" / name).read_text(encoding="utf-8")


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
    import gradio

    settings = {
        "strings": json.loads(asset("strings.json")),
        "annotator": annotator,
        "flags": FLAGS,
        "reasons": REASONS,
        "note_characters": NOTE_CHARACTERS,
        "hidden": HIDDEN,
    }

    def handler(action: Callable[[str, dict[str, Any]], dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        def answer(data: dict[str, Any], request: gradio.Request) -> dict[str, Any]:
            try:
                if not isinstance(data, dict):
                    raise UserError("expected a JSON object")
                return action(check_annotator(login(blocks, request) or data.get("annotator")), data)
            except UserError as error:
                return {"error": str(error)}

        answer.__name__ = action.__name__
        return answer

    with gradio.Blocks(title="sandan", fill_width=True, analytics_enabled=False) as blocks:
        gradio.HTML(
            value=json.dumps(settings),
            html_template="<div class='sandan'></div><div data-settings hidden>${value}</div>",
            js_on_load=asset("page.js"),
            apply_default_css=False,
            server_functions=[
                handler(action) for action in (desk.open_item, desk.judge_item, desk.skip_item, desk.undo_last)
            ],
        )
    return blocks


def login(blocks: "gradio.Blocks", request: Any) -> str | None:
    """Return the name with which the sender of a request logged in, or None without a login."""
    cookie = blocks.app.cookie_id
    tokens = (request.cookies.get(f"{kind}-{cookie}") for kind in ("access-token", "access-token-unsecure"))
    return next((blocks.app.tokens[token] for token in tokens if token in blocks.app.tokens), None)


def serve(
    blocks: "gradio.Blocks", host: str, port: int | None, accounts: Sequence[tuple[str, str]], block: bool = True
) -> str:
    """Serve the page until interrupted.

    Args:
        host: the address to listen at.
        port: None takes the first free one from 7860.
        accounts: names and passwords; required for every host except loopback.
        block: if false, return the page's address at once.

    Raises:
        UserError: if the host is not loopback and there are no accounts, or the port is taken.
    """
    import gradio
    from starlette.middleware import Middleware

    if host not in LOOPBACK and not accounts:
        raise UserError(
            f"host: {host} can be reached from outside; give --auth and set SANDAN_AUTH=name:password,name:password"
        )
    if host not in LOOPBACK:
        logger.warning("warning: %s listens beyond this machine, without TLS; whoever has a password can judge", host)
    try:
        _, address, _ = blocks.launch(
            server_name=host,
            server_port=port,
            auth=list(accounts) or None,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            pwa=False,
            footer_links=[],
            max_file_size=1,
            app_kwargs={"middleware": [Middleware(PageGuard, hosts=LOOPBACK if host in LOOPBACK else None)]},
            theme=gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            head=f"<style>{asset('page.css')}</style>",
        )
    except OSError:
        raise UserError(f"port: {port or '7860 to 7959'}: taken by another program; give another --port") from None
    if block:
        blocks.block_thread()
    return address


def accounts_from_environment() -> list[tuple[str, str]]:
    """Read names and passwords from `SANDAN_AUTH` (`name:password,name:password`), so that no command line shows them.

    Raises:
        UserError: if the variable is missing or not of that form.
    """
    accounts = [tuple(entry.partition(":")[::2]) for entry in os.environ.get("SANDAN_AUTH", "").split(",")]
    if not all(name and password for name, password in accounts):
        raise UserError("auth: set the environment variable SANDAN_AUTH=name:password,name:password")
    return [(check_annotator(name), password) for name, password in accounts]
