"""A real browser and a real server for the tests of the ranking page."""

import contextlib
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
    from sandan.preference.ranking_page import Desk, build_page, load_guidelines, serve

    path = write_candidates(folder / "candidates.jsonl", rows)
    log = JudgementLog(folder / "judgements.jsonl")
    queue = Queue(load_items(path), log, QueueSettings(repeat_share=0))
    blocks = build_page(Desk(queue, load_guidelines(None), "make preferences"), annotator)
    try:
        yield serve(blocks, host, free_port(), accounts, block=False), log.path
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
