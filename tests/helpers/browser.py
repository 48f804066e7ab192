"""A real browser and real servers for the tests of the pages, and what a program sends to them."""

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from urllib.parse import urlsplit

import pytest

from helpers import ROOT


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# --no-sandbox: tests often run as root in a container. The rest keeps Chromium from asking for anything by itself.
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")


# The address of a page's Python functions.
COMPONENT = "/gradio_api/component_server"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def read_lines(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def write_candidates(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@contextlib.contextmanager
def serve_page(folder, rows, accounts=(), annotator="yuki", host="127.0.0.1"):
    """Serve a page from this process: (address, path of the log). It shows `rows`, none of them twice."""
    from sandan.preference.item_queue import Queue, QueueSettings, load_items
    from sandan.preference.judgement_log import JudgementLog
    from sandan.preference.page import serve
    from sandan.preference.ranking_page import Desk, build_page, load_guidelines

    path = write_candidates(folder / "candidates.jsonl", rows)
    log = JudgementLog(folder / "judgements.jsonl")
    queue = Queue(load_items(path), log, QueueSettings(repeat_share=0))
    blocks = build_page(Desk(queue, load_guidelines(None), "make preferences"), annotator)
    try:
        yield serve(blocks, host, free_port(), accounts, block=False), log.path
    finally:
        blocks.close()


@contextlib.contextmanager
def serve_chat(speakers, log_path, sampling, accounts=(), blind=False):
    """Serve a chat page from this process: its address."""
    from sandan.chat.chat_page import STYLE, ChatDesk, build_chat
    from sandan.preference.judgement_log import JudgementLog
    from sandan.preference.page import asset, serve

    blocks = build_chat(ChatDesk(speakers, JudgementLog(log_path), sampling, blind), "mei")
    try:
        yield serve(blocks, "127.0.0.1", free_port(), accounts, block=False, style=asset(*STYLE))
    finally:
        blocks.close()


def run_light_script(stage, *arguments):
    """Run a script that needs no torch: it starts in less than a second, so that `run_script` would take longer."""
    command = [sys.executable, str(ROOT / "scripts" / f"{stage}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ, check=False)


class Server:
    """`scripts/annotate.py` as a user starts it, to be killed and started again at the same port."""

    def __init__(self, candidates, log, *arguments):
        self.port = free_port()
        self.arguments = ["--candidates_file", candidates, "--log_file", log, "--port", self.port, *arguments]
        self.start()

    def start(self):
        command = [sys.executable, str(ROOT / "scripts" / "annotate.py"), *map(str, self.arguments)]
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            # Tests that a shell has put into the background ignore Ctrl+C, and what they start would, too.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.process = subprocess.Popen(command, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for _ in range(600):
            try:
                return urllib.request.urlopen(self.address("x"), timeout=5).close()
            except OSError:
                assert self.process.poll() is None, self.process.stdout.read().decode()
                time.sleep(0.1)
        raise TimeoutError("the server did not start")

    def address(self, annotator):
        return f"http://127.0.0.1:{self.port}/?annotator={annotator}&language=en"

    def is_running(self):
        return self.process.poll() is None

    def kill(self):
        self.process.kill()
        self.process.wait()

    def interrupt(self):
        """Ctrl+C: (exit code, all that it printed)."""
        self.process.send_signal(signal.SIGINT)
        output, _ = self.process.communicate(timeout=30)
        return self.process.returncode, output.decode()


class Watch:
    """What a page must not do: log errors, ask other hosts. `allowed` holds errors that a test provokes itself."""

    def __init__(self, page):
        self.errors, self.elsewhere, self.answers, self.allowed = [], [], [], ()
        page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self._note(request.url))
        page.on("websocket", lambda socket: self._note(socket.url))
        page.on("response", lambda response: self.answers.append(response))
        page.on("dialog", lambda dialog: (self.errors.append(f"dialog: {dialog.message}"), dialog.dismiss()))

    def _note(self, url):
        parts = urlsplit(url)
        if parts.scheme not in ("data", "blob", "about") and parts.hostname not in ("127.0.0.1", "localhost"):
            self.elsewhere.append(url)

    def check(self):
        assert not self.elsewhere, self.elsewhere
        unexpected = [error for error in self.errors if not any(text in error for text in self.allowed)]
        assert not unexpected, unexpected


def calls_of(host):
    """Return a function that makes the body of a call as the page sends it."""
    connection = http.client.HTTPConnection(host, timeout=10)
    connection.request("GET", "/config")
    component = next(
        part["id"] for part in json.load(connection.getresponse())["components"] if part["type"] == "html"
    )
    return lambda name, **data: json.dumps(
        {"component_id": component, "session_hash": "s", "fn_name": name, "data": data}
    )


def cookie_of(host):
    connection = http.client.HTTPConnection(host, timeout=10)
    connection.request("GET", "/")
    answer = connection.getresponse()
    answer.read()
    return answer.getheader("set-cookie").partition(";")[0]


def post(address, body, path=COMPONENT, leave_out=(), **changed):
    """Send what the page would send, with changed or missing headers: (status, text)."""
    headers = {
        "origin": f"http://{address}",
        "content-type": "application/json",
        "cookie": cookie_of(address),
    } | changed
    headers = {name.replace("_", "-"): value for name, value in headers.items() if name not in leave_out}
    connection = http.client.HTTPConnection(address, timeout=10)
    connection.request("POST", path, body, headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium):
    """`open_page(address, **context)` opens a page in a context of its own; all are checked at the end."""
    opened = []

    def open_one(address, **options):
        context = chromium.new_context(**({"viewport": {"width": 1280, "height": 860}} | options))
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.watch = Watch(page)
        opened.append((context, page))
        page.goto(address)
        return page

    yield open_one
    for context, page in opened:
        page.watch.check()
        context.close()
