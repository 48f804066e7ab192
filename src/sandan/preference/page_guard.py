"""The guard of our pages: one ASGI middleware that every request passes before Gradio sees it.

A browser lets any website send requests to a server on this machine, and Gradio answers them. Therefore the guard knows
the two addresses that the page itself writes to (`DOORS`) and refuses every other request that could change something,
every request from another website, and every body that is larger than the page ever sends.
"""

import logging
import secrets
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING
from urllib.parse import urlsplit


if TYPE_CHECKING:
    from starlette.requests import Request

logger = logging.getLogger(__name__)

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; object-src 'none'; frame-src 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
LOGIN = "/login"
# The only addresses that accept a POST, each with the content types that the page sends there.
DOORS = {"/gradio_api/component_server": ("application/json",), LOGIN: FORMS}
# A note of 2,000 characters takes at most 24,000 bytes as JSON, a question of 8,000 at most 48,000 (a pair of escapes for
# each); nothing else that a page sends is long.
BODY_BYTES = 64 * 1024
FAILED_LOGINS = 5
LOGIN_SECONDS = 60.0


class Throttle:
    """Count attempts by sender and say how long a sender must wait after too many of them.

    Args:
        most: the number of attempts within `seconds`.
    """

    def __init__(self, most: int, seconds: float):
        self.most, self.seconds = most, seconds
        self._attempts: dict[str, list[float]] = {}

    def wait(self, sender: str) -> float:
        """Return the seconds that this sender must wait; if there are none, count an attempt."""
        now = time.monotonic()
        recent = {name: [at for at in times if now - at < self.seconds] for name, times in self._attempts.items()}
        self._attempts = {name: times for name, times in recent.items() if times}
        mine = self._attempts.setdefault(sender, [])
        if len(mine) >= self.most:
            return self.seconds - (now - mine[0])
        mine.append(now)
        return 0.0

    def forget(self, sender: str) -> None:
        """Forget this sender's attempts, because the last one succeeded."""
        self._attempts.pop(sender, None)


class PageGuard:
    """Refuse requests that the page did not send, and add the content security policy to every response.

    Args:
        app: the application behind the guard.
        hosts: names under which the server may be addressed; None allows all (a login is required then).
    """

    def __init__(self, app: Callable, hosts: Collection[str] | None = None):
        self.app, self.hosts = app, hosts
        self._session = secrets.token_urlsafe(32)
        self._logins = Throttle(FAILED_LOGINS, LOGIN_SECONDS)
        self._reported: set[str] = set()

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        from starlette.exceptions import HTTPException
        from starlette.requests import ClientDisconnect, Request
        from starlette.responses import PlainTextResponse

        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        request = Request(scope, receive)
        send = self._extended(request, send)
        try:
            self._check(request)
            if request.method == "POST":
                receive = _replayed(await _bounded_body(request), receive)
        except ClientDisconnect:
            return None
        except HTTPException as refusal:
            self._report(request, refusal.detail)
            # The rest of the request is not read.
            headers = {**(refusal.headers or {}), "Connection": "close"}
            response = PlainTextResponse(f"{refusal.detail}\n", refusal.status_code, headers)
            return await response(scope, receive, send)
        await self.app(scope, receive, send)

    def _check(self, request: "Request") -> None:
        """Raise `HTTPException` if the request is none that the page or a browser's address line sends."""
        from starlette.exceptions import HTTPException

        headers = request.headers
        if self.hosts is not None and _hostname(headers.get("host", "")) not in self.hosts:
            # A website can point its own host name at this machine (DNS rebinding).
            raise HTTPException(400, "this page has another host name")
        origin = headers.get("origin")
        if origin is not None and not _is_own(origin, headers.get("host", "")):
            raise HTTPException(403, "sent by another website")
        is_link = headers.get("sec-fetch-mode") == "navigate" and request.url.path == "/"
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and not is_link:
            # Another port of this machine is "same-site". A link from elsewhere may open the page, but not log out.
            raise HTTPException(403, "sent by another website")
        if not headers.get("content-length", "0").isdecimal() or int(headers.get("content-length", "0")) > BODY_BYTES:
            raise HTTPException(413, f"larger than {BODY_BYTES:,} bytes")
        if request.method not in ("GET", "HEAD"):
            self._check_writing(request)

    def _check_writing(self, request: "Request") -> None:
        from starlette.exceptions import HTTPException

        door = request.url.path.rstrip("/")
        if request.method != "POST" or door not in DOORS:
            raise HTTPException(404, "the page does not send this request")
        if "origin" not in request.headers:
            raise HTTPException(403, "no Origin header, which every browser sends")
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type not in DOORS[door]:
            raise HTTPException(415, f"expected the content type {' or '.join(DOORS[door])}")
        if not self._in_session(request):
            raise HTTPException(403, "no cookie of this server; open the page first")
        if door == LOGIN and (seconds := self._logins.wait(_sender(request))):
            detail = f"too many failed logins; try again in {seconds:.0f} s"
            raise HTTPException(429, detail, {"Retry-After": f"{seconds:.0f}"})

    def _in_session(self, request: "Request") -> bool:
        given = request.cookies.get(_cookie(request), "")
        return secrets.compare_digest(given.encode(), self._session.encode())

    def _extended(self, request: "Request", send: Callable) -> Callable:
        """Return a `send` that adds the policy and, to the page itself, the cookie with the session's key."""

        async def extended(message: dict) -> None:
            if message["type"] == "http.response.start":
                headers = {b"content-security-policy": POLICY.encode(), b"referrer-policy": b"no-referrer"}
                if request.url.path == "/" and message["status"] == 200 and not self._in_session(request):
                    cookie = f"{_cookie(request)}={self._session}; HttpOnly; SameSite=Strict; Path=/"
                    headers[b"set-cookie"] = cookie.encode()
                if request.method == "POST" and request.url.path.rstrip("/") == LOGIN and message["status"] == 200:
                    self._logins.forget(_sender(request))
                message = message | {"headers": [*message.get("headers", ()), *headers.items()]}
            await send(message)

        return extended

    def _report(self, request: "Request", reason: str) -> None:
        """Warn about the first refusal of each kind; an attacker must not fill the terminal."""
        kind = reason.partition(";")[0]
        if kind not in self._reported:
            self._reported.add(kind)
            logger.warning("refused %s %.80r: %s (said once)", request.method, request.url.path, reason)


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _is_own(origin: str, host: str) -> bool:
    scheme, _, name = origin.partition("://")
    return scheme in ("http", "https") and name.lower() == host.lower()


def _sender(request: "Request") -> str:
    return request.client.host if request.client else ""


def _cookie(request: "Request") -> str:
    # Browsers share cookies among the ports of a host, so that a second server needs a name of its own.
    return f"sandan-{(request.scope.get('server') or ('', ''))[1]}"


async def _bounded_body(request: "Request") -> bytes:
    from starlette.exceptions import HTTPException

    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_BYTES:
            raise HTTPException(413, f"larger than {BODY_BYTES:,} bytes")
    return bytes(body)


def _replayed(body: bytes, receive: Callable) -> Callable:
    """Return a `receive` that hands out the body, which was read already, and then what follows it."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> dict:
        return messages.pop() if messages else await receive()

    return replay
