"""The ranking page in a real browser: what is done there is what the log on the disk says."""

import json
import random
import re
import urllib.error
import urllib.request

import pytest
from helpers.browser import Server, needs_browser, read_lines, run_light_script, write_candidates

from sandan.core.errors import UserError
from sandan.core.text import HIDDEN
from sandan.preference.item_queue import Queue, QueueSettings, load_items
from sandan.preference.judgement_log import JudgementLog, competition_ranks, standing_judgements
from sandan.preference.page import accounts_from_environment, asset, serve
from sandan.preference.ranking_page import REASONS, Desk, Guidelines, keep_guidelines, load_guidelines


SECRET = "secret-model-7b"
HOSTILE = [
    '<script>fetch("http://evil.example/x")</script><img src="http://evil.example/i.png" onerror="alert(1)">',
    "[click](javascript:alert(1)) ![x](http://evil.example/y.png) <a href='javascript:alert(2)'>a</a>",
    "</div></textarea><style>body{display:none}</style><iframe src='http://evil.example'></iframe>${alert(3)} {{value}}",
    "\u202eright to left\u202c مرحبا بالعالم \u200fabc",
    "👩‍👩‍👧‍👦🏳️‍🌈🇯🇵 e\u0301 \U0001f9d1\u200d\U0001f680",
    "x" * 100_000,
    "zero \x00 bell \x07 delete \x7f c1 \x9b",
    "half \ud83d surrogate \udc00",
    "line\r\nbreaks\n\n\n and\ttabs \u2028 \u2029",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("annotation")


@pytest.fixture(scope="module")
def candidates(folder):
    """30 items of 2 to 9 answers, with what annotators must not see."""
    turns = [
        {"role": "user", "content": "What do I feed it?"},
        {"role": "assistant", "content": "Feed what?"},
        {"role": "user", "content": "The cow."},
    ]
    rows = [
        {
            "prompt_id": f"p{number}",
            "prompt": turns[: 1 if number % 2 else 3],
            "candidates": [f"Answer {number}.{index} of some length" for index in range(2 + number % 8)],
            "model": SECRET,
            "scores": [0.123456789] * 3,
        }
        for number in range(30)
    ]  # fmt: skip
    return write_candidates(folder / "candidates.jsonl", rows)


@pytest.fixture(scope="module")
def log_path(folder):
    return folder / "judgements.jsonl"


@pytest.fixture(scope="module")
def one_server(candidates, log_path):
    started = Server(candidates, log_path, "--overlap_share", "1", "--overlap_annotators", "9", "--repeat_share", "0")
    yield started
    started.kill()


@pytest.fixture
def server(one_server):
    """One server for all tests; its annotators are apart, since everybody judges every item."""
    if not one_server.is_running():
        one_server.start()
    return one_server


def answers_of(page):
    return page.locator(".card .text").all_text_contents()


def wait_for_judged(page, count):
    page.locator(".figures", has_text=re.compile(rf"^{count} judged")).wait_for()


def press_ranking(page, ranks):
    """Rank the cards top to bottom by keys, ties of neighbours with `=`."""
    for at, rank in enumerate(ranks):
        page.keyboard.press("=" if at and ranks[at - 1] == rank else str(rank))


def judged_by(log_path, annotator):
    return [one for one in standing_judgements(read_lines(log_path)) if one["annotator"] == annotator]


def essence(event):
    return {key: event[key] for key in ("candidates", "ranks", "flags", "note")}


# ----------------------------------------------------------------------------------------------------------- browser


@pytest.mark.slow
@needs_browser
def test_twenty_items_by_keyboard_alone(server, open_page, log_path):
    page = open_page(server.address("keyboard"))
    rng, expected = random.Random(0), []
    for number in range(20):
        page.locator(".card").first.wait_for()
        answers = answers_of(page)
        ranks = [rng.randint(1, len(answers)) for _ in answers]
        press_ranking(page, ranks)
        flags, note = [[] for _ in answers], ""
        if number % 4 == 0:
            page.keyboard.press("ArrowUp")  # from the last card
            for key in ("f", "2", "4", "Escape"):
                page.keyboard.press(key)
            flags[-2] = ["wrong", "broken"]
        if number % 5 == 0:
            note = f"note {number} 猫"
            page.keyboard.press("n")
            page.keyboard.insert_text(note)
            page.keyboard.press("Escape")
        page.keyboard.press("Enter")
        expected.append({"candidates": answers, "ranks": competition_ranks(ranks), "flags": flags, "note": note})
        wait_for_judged(page, number + 1)
    judged = judged_by(log_path, "keyboard")
    assert [essence(event) for event in judged] == expected
    assert len({event["item_id"] for event in judged}) == 20
    assert {event["guidelines"] for event in judged} == {load_guidelines(None)["en"].hash}
    assert all(event["annotator_kind"] == "human" and 0 < event["seconds"] < 20 for event in judged)
    assert re.match(r"20 judged\s*10 to go\s*[\d,]+ an hour\s*[\d.]+ s each", page.locator(".figures").inner_text())
    seen = page.content() + "".join(
        answer.text() for answer in page.watch.answers if re.search("component_server|config|annotator=", answer.url)
    )
    assert "Answer" in seen
    assert SECRET not in seen
    assert "0.123456" not in seen


@pytest.mark.slow
@needs_browser
def test_five_items_by_touch_at_360_pixels(server, open_page, log_path):
    page = open_page(server.address("touch"), viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    rng, expected = random.Random(1), []
    for number in range(5):
        page.locator(".card").first.wait_for()
        answers = answers_of(page)
        ranks = [rng.randint(1, len(answers)) for _ in answers]
        for at, rank in enumerate(ranks):
            page.get_by_role("button", name=f"Rank {rank}, Answer {chr(65 + at)}", exact=True).tap()
        page.get_by_role("button", name="Flag, Answer A").tap()
        page.get_by_role("group", name="What is wrong with it, Answer A").get_by_role("button", name="harmful").tap()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        submit = page.get_by_role("button", name="Submit")
        box = submit.bounding_box()
        assert box["height"] >= 40
        assert box["y"] + box["height"] <= 740, "the buttons are in sight without scrolling"
        submit.tap()
        flags = [["harmful"], *([] for _ in answers[1:])]
        expected.append({"candidates": answers, "ranks": competition_ranks(ranks), "flags": flags, "note": ""})
        wait_for_judged(page, number + 1)
    assert [essence(event) for event in judged_by(log_path, "touch")] == expected


@needs_browser
def test_undo_skip_and_reload(server, open_page, log_path):
    page = open_page(server.address("careful"))
    page.locator(".card").first.wait_for()
    first = answers_of(page)
    page.keyboard.press("Enter")
    page.get_by_text("Not ranked yet: A, B").wait_for()
    press_ranking(page, [1] * len(first))
    page.reload()
    page.locator(".card.ranked").first.wait_for()
    assert answers_of(page) == first, "a reload keeps the item, its order and the ranks given"
    assert page.locator(".card.ranked").count() == len(first)
    page.keyboard.press("Enter")
    wait_for_judged(page, 1)
    page.keyboard.press("u")
    wait_for_judged(page, 0)
    assert answers_of(page) == first
    page.keyboard.press("0")
    page.keyboard.press("2")
    page.keyboard.press("Enter")
    wait_for_judged(page, 1)
    page.keyboard.press("s")
    page.get_by_role("dialog").get_by_role("button", name="All answers are equally bad").wait_for()
    page.keyboard.press("2")
    page.locator(".figures", has_text="1 skipped").wait_for()
    mine = [event for event in read_lines(log_path) if event["annotator"] == "careful"]
    assert [event["event"] for event in mine if event["event"] != "shown"] == [
        "judgement", "undo", "judgement", "skip",
    ]  # fmt: skip
    assert [event["reason"] for event in mine if event["event"] == "skip"] == ["all_bad"]
    (stands,) = judged_by(log_path, "careful")
    assert stands["ranks"] == competition_ranks([2, *[1] * (len(first) - 1)])


@pytest.mark.slow
@needs_browser
def test_two_annotators_at_once(server, open_page, log_path):
    pages = {name: open_page(server.address(name)) for name in ("aki", "ken")}
    expected = {name: [] for name in pages}
    for number in range(3):
        for page in pages.values():
            page.locator(".card").first.wait_for()
        for name, page in pages.items():
            answers = answers_of(page)
            ranks = list(range(1, len(answers) + 1))[:: 1 if name == "aki" else -1]
            press_ranking(page, ranks)
            expected[name].append((answers, ranks))
        for page in pages.values():
            page.keyboard.press("Enter")
        for page in pages.values():
            wait_for_judged(page, number + 1)
    for name in pages:
        assert [(one["candidates"], one["ranks"]) for one in judged_by(log_path, name)] == expected[name]


@needs_browser
def test_japanese_dark_and_help(server, open_page):
    page = open_page(server.address("yuki").replace("language=en", "language=ja"), color_scheme="dark")
    page.locator(".card").first.wait_for()
    assert page.locator("html").get_attribute("lang") == "ja"
    background = page.locator(".sandan").evaluate("node => getComputedStyle(node).backgroundColor")
    assert max(map(int, re.findall(r"\d+", background)[:3])) < 60
    page.keyboard.press("?")
    page.get_by_role("dialog", name="キー").wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("combobox", name="言語").select_option("en")
    page.get_by_role("button", name="Submit").wait_for()
    names = page.locator("button, select, textarea, input").evaluate_all(
        "nodes => nodes.filter(node => !(node.ariaLabel || node.innerText || node.labels?.length)).map(node => node.outerHTML)"
    )
    assert names == [], "every control has a name for screen readers"


@pytest.mark.slow
@needs_browser
def test_kill_in_mid_ranking_loses_nothing(server, open_page, log_path):
    page = open_page(server.address("killed"))
    # 403: the new server wants its own cookie, which the page fetches.
    page.watch.allowed = (
        "ERR_CONNECTION_REFUSED",
        "ERR_INCOMPLETE_CHUNKED_ENCODING",
        "ERR_CONNECTION_RESET",
        "403",
    )
    page.locator(".card").first.wait_for()
    press_ranking(page, [1] * len(answers_of(page)))
    page.keyboard.press("Enter")
    wait_for_judged(page, 1)
    answers = answers_of(page)
    press_ranking(page, [1] * (len(answers) - 1))
    server.kill()
    page.keyboard.press("2")
    page.keyboard.press("Enter")
    page.get_by_text("The server does not answer").wait_for()
    assert len(judged_by(log_path, "killed")) == 1
    server.start()
    wait_for_judged(page, 2)
    page.reload()
    wait_for_judged(page, 2)
    last = judged_by(log_path, "killed")[-1]
    assert (last["candidates"], last["ranks"]) == (answers, competition_ranks([1] * (len(answers) - 1) + [2]))
    assert len(judged_by(log_path, "killed")) == 2
    code, output = server.interrupt()
    assert code == 0
    assert "Traceback" not in output
    assert f'next: make preferences RECIPE={log_path.parent.name} ARGS="--judgement_files {log_path}"' in output


@needs_browser
def test_hostile_candidates_are_text(serve_here, open_page):
    address, log_path = serve_here([{"prompt": HOSTILE[0] + HOSTILE[6], "candidates": HOSTILE}])
    page = open_page(f"{address}?language=en")
    page.locator(".card").first.wait_for()
    for tag in ("script", "img", "iframe", "style", "a"):
        assert page.locator(f".sandan {tag}").count() == 0, tag
    shown = answers_of(page)
    for text in HOSTILE[:3] + [HOSTILE[5]]:
        assert text in shown, "markup stands there as it was written"
    whole = "".join(shown)
    for name in ("U+0000", "U+0007", "U+007F", "U+009B", "U+202E", "U+202C", "U+200F"):
        assert name in whole, name
    assert "\ufffd surrogate \ufffd" in whole
    assert not re.search("[\x00\x07\x7f\x9b\u202e]", whole)
    assert HOSTILE[4] in whole
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    press_ranking(page, list(range(1, 10)))
    page.keyboard.press("Enter")
    page.get_by_text("All done").wait_for()
    (event,) = judged_by(log_path, "yuki")
    assert sorted(event["candidates"]) == sorted(
        text.replace("\ud83d", "\ufffd").replace("\udc00", "\ufffd") for text in HOSTILE
    )


def as_shown(text):
    """What the page makes of a text: characters that draw nothing or turn the direction are shown by their code."""
    return re.sub(HIDDEN, lambda match: f"U+{ord(match[0]):04X}", text)


@needs_browser
def test_random_text_is_shown_and_stored_as_it_is(serve_here, open_page):
    rng = random.Random(7)
    kinds = [(0, 0x20), (0x20, 0x7F), (0x7F, 0xA0), (0x590, 0x700), (0x2000, 0x2070), (0x3040, 0x30FF), (0xE000, 0x10000),
             (0x1F300, 0x1FAFF), (0x10000, 0x110000)]  # fmt: skip
    snippets = ["<b>", "&amp;", "`${x}`", "{{x}}", "</script>", "\\u0041", "%s", "'\"", "]]>", "<!--", "javascript:"]

    def text():
        drawn = [chr(rng.randrange(*rng.choice(kinds))) for _ in range(rng.randrange(1, 60))]
        return "".join(one for part in drawn for one in (part, rng.choice(snippets) if rng.random() < 0.2 else ""))

    rows = [{"prompt": text(), "candidates": [text() for _ in range(9)]} for _ in range(4)]
    address, log_path = serve_here(rows)
    page = open_page(f"{address}?language=en")
    for number in range(len(rows)):
        page.locator(".card").first.wait_for()
        shown = next(event for event in reversed(read_lines(log_path)) if event["event"] == "shown")
        assert answers_of(page) == [as_shown(one) for one in shown["candidates"]]
        press_ranking(page, list(range(1, 10)))
        page.keyboard.press("Enter")
        wait_for_judged(page, number + 1)
    stored = {event["prompt"]: sorted(event["candidates"]) for event in judged_by(log_path, "yuki")}
    assert stored == {row["prompt"]: sorted(row["candidates"]) for row in rows}


@pytest.mark.slow
@needs_browser
def test_without_a_name_the_page_asks(serve_here, open_page):
    address, log_path = serve_here([{"prompt": "Q", "candidates": ["a", "b"]}], annotator=None)
    page = open_page(f"{address}?language=en")
    page.get_by_label("Name").fill("new-one")
    page.get_by_role("button", name="Start").click()
    page.locator(".card").first.wait_for()
    assert read_lines(log_path)[0]["annotator"] == "new-one"
    other = open_page(f"{address}?language=en&annotator=../etc")
    other.get_by_text("annotator: expected 1 to 32 letters").wait_for()


@needs_browser
def test_the_login_is_the_annotator(serve_here, open_page, caplog):
    address, log_path = serve_here(
        [{"prompt": "Q", "candidates": ["a", "b"]}], accounts=[("mei", "right")], host="0.0.0.0"
    )
    assert "listens beyond this machine" in caplog.text
    address = address.replace("0.0.0.0", "127.0.0.1")
    page = open_page(f"{address}?annotator=somebody&language=en")
    page.watch.allowed = ("401",)
    page.get_by_label("username").fill("mei")
    page.get_by_label("password").fill("right")
    page.get_by_role("button", name="Login").click()
    page.locator(".card").first.wait_for()
    assert read_lines(log_path)[0]["annotator"] == "mei"


# -------------------------------------------------------------------------------------------------- without a browser


def get(address, **headers):
    return urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=10)


def test_answers_carry_the_policy_and_foreign_hosts_are_turned_away(serve_here):
    address, _ = serve_here([{"prompt": "Q", "candidates": ["a", "b"]}])
    with get(address) as answer:
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert "googleapis" not in answer.read().decode()
    with pytest.raises(urllib.error.HTTPError, match="400"):
        get(address, Host="evil.example")


def test_only_loopback_without_accounts():
    with pytest.raises(UserError, match="give --auth and set SANDAN_AUTH"):
        serve(None, "0.0.0.0", None, ())


@pytest.mark.parametrize("value", ["", "yuki", "yuki:", ":x", "a:b,c"])
def test_accounts_that_are_none_are_refused(monkeypatch, value):
    monkeypatch.setenv("SANDAN_AUTH", value)
    with pytest.raises(UserError, match="SANDAN_AUTH=name:password"):
        accounts_from_environment()


def test_accounts_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("SANDAN_AUTH", "yuki:a:b,ken:c")
    assert accounts_from_environment() == [("yuki", "a:b"), ("ken", "c")]


@pytest.fixture
def desk(tmp_path):
    path = write_candidates(tmp_path / "c.jsonl", [{"prompt": f"Q{n}", "candidates": ["a", "b"]} for n in range(3)])
    queue = Queue(load_items(path), JudgementLog(tmp_path / "log.jsonl"), QueueSettings())
    return Desk(queue, load_guidelines(None), "")


@pytest.mark.parametrize(
    "change",
    [{"ticket": "x"}, {"ranks": "12"}, {"ranks": [1]}, {"ranks": [1, None]}, {"flags": [[]]}, {"flags": None},
     {"guidelines": "0" * 12}],
)  # fmt: skip
def test_nonsense_from_the_page_is_refused_and_not_written(desk, change):
    state = desk.open_item("a", {"language": "en"})
    data = {
        "ticket": state["item"]["ticket"],
        "ranks": [1, 2],
        "flags": [[], []],
        "guidelines": state["guidelines"]["hash"],
    }
    before = desk.queue.log.path.read_bytes()
    with pytest.raises(UserError):
        desk.judge_item("a", data | change)
    assert desk.queue.log.path.read_bytes() == before
    assert desk.judge_item("a", data)["progress"]["judged"] == 1


def test_notes_are_cut_and_hold_no_half_characters(desk):
    state = desk.open_item("a", {})
    data = {
        "ticket": state["item"]["ticket"],
        "ranks": [1, 2],
        "flags": [["nonsense", "wrong"], []],
        "seconds": float("inf"),
    }
    desk.judge_item("a", data | {"guidelines": state["guidelines"]["hash"], "note": "\ud800" + "n" * 9000})
    (event,) = standing_judgements(desk.queue.log.read())
    assert event["note"] == "?" + "n" * 1999
    assert event["flags"] == [["wrong"], []]
    assert event["seconds"] is None


def test_both_languages_say_the_same_things():
    strings = json.loads(asset("strings.json"))
    assert set(strings["en"]) == set(strings["ja"])
    used = set(re.findall(r'\bt\("(\w+)"\)', asset("common.js") + asset("page.js"))) | set(REASONS)
    assert used <= set(strings["en"])


def test_guidelines_are_kept_by_their_hash_and_hold_no_html(tmp_path):
    (tmp_path / "own.md").write_text("**Be fair.** <script>x</script> ![i](http://evil.example/i.png)")
    own = load_guidelines(str(tmp_path / "own.md"))
    keep_guidelines(own, tmp_path / "log")
    assert (tmp_path / "log" / f"guidelines-{own['ja'].hash}.md").read_text() == own["en"].text
    assert "<script" not in own["en"].html
    assert "<img" not in own["en"].html
    assert "<strong>Be fair.</strong>" in own["en"].html
    assert Guidelines("a").hash != Guidelines("b").hash
    with pytest.raises(UserError, match="guidelines_file cannot be read"):
        load_guidelines(str(tmp_path / "none.md"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--annotator", "a b"], "annotator: expected 1 to 32 letters"),
        (["--overlap_share", "2"], "a share lies between 0 and 1"),
    ],
)
def test_mistakes_are_one_line(candidates, tmp_path, arguments, message):
    defaults = ["--candidates_file", candidates, "--log_file", tmp_path / "log.jsonl"]
    done = run_light_script("annotate", *defaults, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "log.jsonl").exists()
