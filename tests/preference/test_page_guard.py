"""What other websites, other ports and raw HTTP can do to the ranking page: nothing that reaches the log."""

import http.client
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers.browser import COMPONENT, calls_of, cookie_of, needs_browser, post, read_lines, serve_page

from sandan.preference.page_guard import BODY_BYTES, DOORS, FAILED_LOGINS, Throttle


ROUTES = [
    COMPONENT, "/login", "/gradio_api/queue/join", "/gradio_api/run/undo_last", "/gradio_api/api/undo_last",
    "/gradio_api/call/undo_last", "/gradio_api/upload", "/gradio_api/reset", "/gradio_api/cancel",
    "/gradio_api/process_recording", "/gradio_api/run-history/connect",
]  # fmt: skip
# What a page of another website can send without being asked by the browser's preflight, and one that is asked.
ATTACK = """async ({ address, routes, body }) => {
  const send = (route, options) => fetch(address + route, { method: "POST", credentials: "include", ...options })
    .then((answer) => answer.status, () => "refused by the browser");
  const form = (route) => new Promise((done) => {
    const frame = Object.assign(document.createElement("iframe"), { name: route, onload: () => done() });
    const made = Object.assign(document.createElement("form"), { method: "post", action: address + route, target: route });
    made.enctype = "text/plain";
    made.append(Object.assign(document.createElement("input"), { name: body.slice(0, -1) + ',"x":"', value: '"}' }));
    document.body.append(frame, made);
    made.submit();
    setTimeout(done, 1000);
  });
  const answers = [];
  for (const route of routes) {
    answers.push(await send(route, { mode: "no-cors", body }));
    answers.push(await send(route, { body, headers: { "content-type": "application/json" } }));
    answers.push(await send(route, { mode: "no-cors", body: new Blob([body]) }));
    answers.push(await send(route, { mode: "no-cors", body: new URLSearchParams({ body }) }));
    navigator.sendBeacon(address + route, body);
  }
  await Promise.all(routes.slice(0, 3).map(form));
  return answers;
}"""


class Elsewhere(BaseHTTPRequestHandler):
    """Another website: an empty page."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>elsewhere</title><body></body>")

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def elsewhere():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """One page for this module: (host:port, path of the log)."""
    rows = [{"prompt": f"Q{number}", "candidates": ["a", "b"]} for number in range(30)]
    with serve_page(tmp_path_factory.mktemp("guard"), rows) as (address, log_path):
        yield address.split("/")[2], log_path


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_another_website_writes_nothing_and_the_page_goes_on(served, open_page, elsewhere, host):
    address, log_path = served
    page = open_page(f"http://{address}/?annotator=yuki&language=en")
    page.locator(".card").first.wait_for()
    before = log_path.read_bytes()
    # Another tab of the same browser, with its cookies: "cross-site" as localhost, "same-site" as 127.0.0.1.
    other = page.context.new_page()
    other.goto(f"http://{host}:{elsewhere}/")
    call = calls_of(address)
    for body in (call("undo_last", annotator="yuki"), call("open_item", annotator="invented")):
        answers = other.evaluate(ATTACK, {"address": f"http://{address}", "routes": ROUTES, "body": body})
        assert not {answer for answer in answers if str(answer).startswith("2")}
    other.close()
    assert log_path.read_bytes() == before
    page.keyboard.press("1")
    page.keyboard.press("2")
    page.keyboard.press("Enter")
    page.get_by_text("Saved.").wait_for()
    assert log_path.read_bytes().startswith(before)
    assert read_lines(log_path)[-2]["event"] == "judgement"


def test_what_the_page_sends_is_answered(served):
    host, log_path = served
    status, text = post(host, calls_of(host)("open_item", annotator="raw"))
    assert status == 200
    assert json.loads(text)["item"]["candidates"]
    assert read_lines(log_path)[-1]["annotator"] == "raw"


@pytest.mark.parametrize(
    "changed, status",
    [
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:1"}, 403),
        ({"origin": "null"}, 403),
        ({"leave_out": "origin"}, 403),
        ({"content_type": "text/plain"}, 415),
        ({"content_type": "multipart/form-data; boundary=x"}, 415),
        ({"leave_out": "content-type"}, 415),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"cookie": "sandan=guess"}, 403),
        ({"leave_out": "cookie"}, 403),
        ({"host": "evil.example"}, 400),
        ({"content_length": "-1"}, 400),
    ],
)  # fmt: skip
def test_a_request_that_the_page_did_not_send_is_refused(served, changed, status):
    host, log_path = served
    before = log_path.read_bytes() if log_path.exists() else b""
    found, said = post(host, calls_of(host)("open_item", annotator="raw-2"), **changed)
    assert (found, said.count("\n") <= 1) == (status, True), said
    assert (log_path.read_bytes() if log_path.exists() else b"") == before


@pytest.mark.parametrize("route", [route for route in ROUTES if route not in DOORS])
def test_no_other_route_of_gradio_takes_a_post(served, route):
    host, _ = served
    body = json.dumps({"fn_index": 0, "session_hash": "s", "data": [{"annotator": "raw-3"}]})
    assert post(host, body, route)[0] == 404


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH"])
def test_no_other_method_is_taken(served, method):
    host, _ = served
    connection = http.client.HTTPConnection(host, timeout=10)
    connection.request(method, COMPONENT, "{}", {"origin": f"http://{host}"})
    assert connection.getresponse().status == 404


@pytest.mark.parametrize("headers", [{"origin": "http://localhost:1"}, {"sec-fetch-site": "same-site"}])
def test_another_website_cannot_read_the_page_either(served, headers):
    host, _ = served
    connection = http.client.HTTPConnection(host, timeout=10)
    connection.request("GET", "/config", headers=headers)
    assert connection.getresponse().status == 403
    # A link that somebody follows opens the page, and nothing else: a GET of Gradio may log out or write a file.
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    for path, status in (("/", 200), ("/?annotator=ken", 200), ("/logout", 403), ("/gradio_api/deep_link", 403)):
        connection = http.client.HTTPConnection(host, timeout=10)
        connection.request("GET", path, headers=link)
        assert connection.getresponse().status == status


@pytest.mark.parametrize("data", [None, 5, [], "x", {"annotator": {}}, {"annotator": "a" * 33}])
def test_a_call_without_sense_is_one_line(served, data):
    host, _ = served
    body = json.loads(calls_of(host)("open_item")) | {"data": data}
    status, text = post(host, json.dumps(body))
    assert status == 200
    assert set(json.loads(text)) == {"error"}


@pytest.mark.parametrize("length", [["Content-Length: 60000000"], ["Transfer-Encoding: chunked"]])
def test_a_large_body_is_refused_at_once(served, length):
    host, _ = served
    name, port = host.split(":")
    head = [f"POST {COMPONENT} HTTP/1.1", f"Host: {host}", f"Origin: http://{host}", f"Cookie: {cookie_of(host)}",
            "Content-Type: application/json", *length, "", ""]  # fmt: skip
    chunk = b"x" * BODY_BYTES
    started = time.monotonic()
    with socket.create_connection((name, int(port)), timeout=10) as connection:
        connection.sendall("\r\n".join(head).encode())
        connection.sendall(b"10001\r\n" + chunk + b"x\r\n" if "chunked" in length[0] else chunk)
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    assert time.monotonic() - started < 1


def test_failed_logins_are_slowed_down(tmp_path):
    rows = [{"prompt": "Q", "candidates": ["a", "b"]}]
    with serve_page(tmp_path, rows, accounts=[("mei", "right")]) as (address, _):
        host = address.split("/")[2]
        form = {"content_type": "application/x-www-form-urlencoded"}
        codes = [post(host, f"username=mei&password=wrong{number}", "/login", **form)[0] for number in range(7)]
        assert codes == [400] * FAILED_LOGINS + [429] * (7 - FAILED_LOGINS)
        status, said = post(host, "username=mei&password=right", "/login", **form)
        assert status == 429
        assert "try again in" in said


def test_the_throttle_forgets_after_success_and_with_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("sandan.preference.page_guard.time.monotonic", lambda: now[0])
    throttle = Throttle(2, 60)
    assert [throttle.wait("a"), throttle.wait("a"), throttle.wait("a"), throttle.wait("b")] == [0, 0, 60, 0]
    throttle.forget("a")
    assert throttle.wait("a") == 0
    now[0] = 30.0
    assert [throttle.wait("a"), throttle.wait("a")] == [0, 30]
    now[0] = 61.0
    assert throttle.wait("a") == 0
    assert "b" not in throttle._attempts, "old senders take no memory"


@pytest.mark.parametrize("name", ["constructor", "fr"])
@needs_browser
def test_a_language_that_is_none_is_the_browsers(served, open_page, name):
    host, _ = served
    page = open_page(f"http://{host}/?annotator=words&language={name}", locale="ja-JP")
    page.get_by_role("button", name="送信").wait_for()


@pytest.mark.slow
@needs_browser
def test_the_second_tab_is_told_that_the_first_has_decided(served, open_page):
    host, log_path = served
    first = open_page(f"http://{host}/?annotator=tabs&language=en")
    first.locator(".card").first.wait_for()
    second = first.context.new_page()
    second.goto(f"http://{host}/?annotator=tabs&language=en")
    second.locator(".card").first.wait_for()
    for page, ranks in ((first, "12"), (second, "21")):
        for key in [*ranks, "Enter"]:
            page.keyboard.press(key)
        page.get_by_text("Saved." if page is first else "in another tab or window").wait_for()
    decided = [event["ranks"] for event in read_lines(log_path) if event["annotator"] == "tabs" and "ranks" in event]
    assert decided == [[1, 2]]
    second.keyboard.press("u")
    second.get_by_text("Taken back").wait_for()
    for key in ("2", "ArrowDown", "1", "Enter"):
        second.keyboard.press(key)
    second.get_by_text("Saved.").wait_for()
    decided = [event["ranks"] for event in read_lines(log_path) if event["annotator"] == "tabs" and "ranks" in event]
    assert decided == [[1, 2], [2, 1]]
