"""A page of ours: one Gradio component whose script calls Python functions, by default served to this machine only.

Text written by a model leaves the server as JSON and enters the document as text nodes. Every request passes
[`sandan.preference.page_guard.PageGuard`], whose content security policy allows requests to the page's own server only,
whatever a model wrote.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from ..core.errors import UserError
from ..core.text import HIDDEN
from .judgement_log import check_annotator
from .page_guard import PageGuard


if TYPE_CHECKING:
    import gradio

logger = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "localhost", "::1")
Action = Callable[[str, dict[str, Any]], dict[str, Any]]


def asset(name: str, package: str = __package__) -> str:
    """Return the text of a file in the folder `assets` of a package."""
    return (resources.files(package) / "assets" / name).read_text(encoding="utf-8")


def page_of(settings: Mapping[str, Any], script: str, actions: Iterable[Action]) -> "gradio.Blocks":
    """Build the Gradio app of a page.

    Args:
        settings: what the script finds in `settings`: the strings of each language, whose page opens if the address
            names nobody (`annotator`; the name of a login overrides both), and more.
        script: runs after `common.js`, in the same scope.
        actions: functions of an annotator's name and JSON, which the script calls by their names.
    """
    import gradio

    def handler(action: Action) -> Callable[..., dict[str, Any]]:
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
            value=json.dumps({**settings, "hidden": HIDDEN}),
            html_template="<div class='sandan'></div><div data-settings hidden>${value}</div>",
            js_on_load=f"{asset('common.js')}\n{script}",
            apply_default_css=False,
            server_functions=list(map(handler, actions)),
        )
    return blocks


def login(blocks: "gradio.Blocks", request: Any) -> str | None:
    """Return the name with which the sender of a request logged in, or None without a login."""
    cookie = blocks.app.cookie_id
    tokens = (request.cookies.get(f"{kind}-{cookie}") for kind in ("access-token", "access-token-unsecure"))
    return next((blocks.app.tokens[token] for token in tokens if token in blocks.app.tokens), None)


def serve(
    blocks: "gradio.Blocks",
    host: str,
    port: int | None,
    accounts: Sequence[tuple[str, str]],
    block: bool = True,
    style: str = "",
) -> str:
    """Serve the page until interrupted.

    Args:
        host: the address to listen at.
        port: None takes the first free one from 7860.
        accounts: names and passwords; required for every host except loopback.
        block: if false, return the page's address at once.
        style: CSS that follows that of all pages.

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
            head=f"<style>{asset('page.css')}{style}</style>",
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
