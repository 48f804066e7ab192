"""The chat page: its guards, its functions, and in a real browser a question, answers that stream, and a blind vote."""

import json
import re
import threading
import time

import pytest
from helpers.browser import calls_of, needs_browser, post, read_lines, serve_chat

from sandan.chat.chat_page import ChatDesk
from sandan.chat.speakers import Sampling, Speaker
from sandan.core.errors import UserError
from sandan.preference.judgement_log import JudgementLog
from sandan.preference.page import asset


QUESTION = "What does the cow eat?"


@pytest.fixture
def log(tmp_path):
    return JudgementLog(tmp_path / "judgements.jsonl")


@pytest.fixture
def desk(speakers, log, sampling):
    return ChatDesk(speakers, log, sampling, blind=False)


@pytest.fixture
def talk(desk):
    """`talk(question, **options)` waits for the answers: what the page then shows, and what it sends with a vote."""
    about = {"conversation": desk.open_chat("mei", {})["conversation"], "temperature": 1, "seed": 0}
    numbers = iter(range(100))

    def ask(question=QUESTION, **options):
        desk.ask_models("mei", about | {"question": question, "number": next(numbers)} | options)
        return wait(desk, about)

    return ask, about


def wait(desk, about):
    end = time.monotonic() + 20
    while not (found := desk.follow("mei", about)["round"])["complete"]:
        assert time.monotonic() < end
        time.sleep(0.01)
    return found, about | {"ticket": found["ticket"]}


# ---- The server side ----


def test_models_answer_side_by_side_as_they_do_alone(talk, desk, speakers, sampling):
    asked, _ = talk[0]()
    turns = [{"role": "user", "content": QUESTION}]
    assert [answer["text"] for answer in asked["answers"]] == [
        speaker.answer(turns, sampling, lambda text: None).text for speaker in speakers
    ]


def test_nothing_names_a_model_before_a_blind_vote(talk, desk, log):
    asked, about = talk[0](blind=True)
    assert not {"base", "sft", "ppo"} & set(re.findall(r"\w+", json.dumps(asked)))
    voted = desk.vote_for("mei", about | {"best": 1})["round"]
    assert {answer["label"] for answer in voted["answers"]} == {"base", "sft", "ppo"}
    (event,) = read_lines(log.path)
    assert event["models"][1] == [voted["answers"][1]["label"]] and 0 <= event["seconds"] < 20


def test_what_is_sent_twice_happens_once(talk, desk, log):
    asked, about = talk[0]()
    again = about | {"question": QUESTION, "number": 0}
    assert desk.ask_models("mei", again)["round"]["ticket"] == asked["ticket"]
    for _ in range(2):
        desk.vote_for("mei", about | {"best": 0})
    assert len(read_lines(log.path)) == 1
    for _ in range(2):
        desk.take_back_vote("mei", about)
    assert [event["event"] for event in read_lines(log.path)] == ["judgement", "undo"]


def test_a_question_that_cannot_be_answered_is_one_line_and_the_next_one_is(talk):
    ask, _ = talk
    asked, _ = ask("x " * 400)
    assert (
        asked["error"].endswith("the question is too long; it reads 120 tokens") and asked["obstacle"] == "incomplete"
    )
    assert ask()[0]["error"] is None


@pytest.mark.parametrize(
    "name, data",
    [
        ("ask_models", {"question": " "}), ("ask_models", {"question": 5}), ("ask_models", {"question": "x" * 9000}),
        ("ask_models", {"number": 7}), ("ask_models", {"number": -1}), ("ask_models", {"number": "1"}), ("ask_models", {"seed": "1"}), ("ask_models", {"temperature": -1}),
        ("ask_models", {"seed": 0.5}), ("ask_models", {"temperature": 10**400}), ("ask_models", {"seed": True}),
        ("vote_for", {"best": "0"}), ("vote_for", {"best": True}), ("vote_for", {"best": 9}),
        ("vote_for", {"ticket": "x"}), ("follow", {"conversation": "x"}), ("take_back_vote", {"ticket": None}),
    ],
)  # fmt: skip
def test_what_the_page_does_not_send_is_refused(talk, desk, log, name, data):
    _, about = talk[0]()
    with pytest.raises(UserError):
        getattr(desk, name)("mei", about | {"question": QUESTION, "number": 1, "best": 0} | data)
    assert not log.path.exists()


def test_nobody_sees_or_judges_the_conversation_of_another_one(talk, desk, log):
    _, about = talk[0]()
    for action in (desk.follow, desk.vote_for, desk.ask_models):
        with pytest.raises(UserError, match="no longer there"):
            action("ken", about | {"best": 0, "question": QUESTION, "number": 1})


def test_both_languages_say_the_same_things():
    strings, common = json.loads(asset("chat.json", "sandan.chat")), json.loads(asset("strings.json"))
    assert set(strings["en"]) == set(strings["ja"])
    used = set(re.findall(r'\bt\("(\w+)"\)', asset("chat.js", "sandan.chat") + asset("common.js")))
    assert used <= set(strings["en"]) | set(common["en"])


# ---- Its guards ----


@pytest.mark.parametrize(
    "changed, status",
    [
        ({}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:1"}, 403),
        ({"leave_out": "origin"}, 403),
        ({"host": "evil.example"}, 400),
        ({"cookie": "sandan=guess"}, 403),
        ({"leave_out": "cookie"}, 403),
        ({"content_type": "text/plain"}, 415),
    ],
)
def test_only_the_page_itself_is_answered(speakers, sampling, log, changed, status):
    with serve_chat(speakers[:2], log.path, sampling) as address:
        host = address.split("/")[2]
        assert post(host, calls_of(host)("open_chat", annotator="mei"), **changed)[0] == status
        assert post(host, "{}", "/gradio_api/queue/join")[0] == 404


def test_without_a_login_nobody_talks(speakers, sampling, log):
    with serve_chat(speakers[:2], log.path, sampling, accounts=[("mei", "right")]) as address:
        host = address.split("/")[2]
        call = json.dumps(
            {"component_id": 1, "session_hash": "s", "fn_name": "open_chat", "data": {"annotator": "mei"}}
        )
        assert post(host, call)[0] == 401


# ---- A real browser ----


class Slow(Speaker):
    """A model that waits after each token, so that one can see its answer grow, and stops when it is told so."""

    def answer(self, turns, sampling, show, is_stopped=lambda: False):
        def show_slowly(text):
            show(text)
            time.sleep(0.05)

        return super().answer(turns, sampling, show_slowly, is_stopped)


@pytest.fixture
def slow_speakers(speakers):
    return [Slow(speaker.name, speaker.model, speaker.tokenizer) for speaker in speakers]


def open_chat(open_page, address, **options):
    page = open_page(f"{address}?language=en", **options)
    page.locator("textarea").wait_for()
    return page


def ask(page, question=QUESTION):
    page.locator("textarea").fill(question)
    page.keyboard.press("Enter")


@pytest.mark.slow
@needs_browser
def test_a_blind_vote_by_keyboard_is_in_the_log(open_page, slow_speakers, log):
    with serve_chat(slow_speakers, log.path, Sampling(24, 1.0, 3)) as address:
        page = open_chat(open_page, address)
        page.get_by_label("Blind").check()
        ask(page)
        page.locator(".card[aria-busy=true] .text", has_text=re.compile(r"\S")).first.wait_for()
        part = page.locator(".card .text").all_text_contents()
        page.get_by_text("Which answer is better?").wait_for()
        texts = page.locator(".card .text").all_text_contents()
        assert all(len(whole) >= len(early) for whole, early in zip(texts, part, strict=True)) and texts != part
        assert page.locator(".card .letter").all_text_contents() == ["A", "B", "C"]
        assert not {"base", "sft", "ppo"} & set(re.findall(r"\w+", page.locator(".talk").inner_text()))
        page.keyboard.press("2")
        page.get_by_text("Saved.").wait_for()
        names = page.locator(".card .letter").all_text_contents()
        assert sorted(names) == ["base", "ppo", "sft"]
        (event,) = read_lines(log.path)
        assert (event["annotator"], event["ranks"], event["seed"]) == ("mei", [2, 1, 2], 3)
        assert event["models"][1] == [names[1]] and event["prompt"] == [{"role": "user", "content": QUESTION}]
        page.keyboard.press("u")
        page.get_by_text("The vote is taken back.").wait_for()
        assert read_lines(log.path)[-1]["event"] == "undo"
        page.reload()
        page.locator(".card").nth(2).wait_for()
        assert page.locator(".card .letter").all_text_contents() == names
        page.keyboard.press("Escape")
        page.keyboard.press("n")
        page.locator(".card").first.wait_for(state="detached")


@pytest.mark.slow
@needs_browser
def test_a_telephone_in_japanese_and_dark(open_page, slow_speakers, log):
    with serve_chat(slow_speakers, log.path, Sampling(100, 1.0, 3)) as address:
        page = open_page(
            f"{address}?language=ja", viewport={"width": 360, "height": 740}, color_scheme="dark", has_touch=True
        )
        page.locator("textarea").fill("牛は何を食べますか。<img src=x onerror=alert(1)>")
        page.get_by_role("button", name="聞く").tap()
        page.get_by_role("button", name="止める").tap()
        page.get_by_text("止めた回答には投票できません。").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        read = "input => [getComputedStyle(input).color, getComputedStyle(input).backgroundColor]"
        colours = page.get_by_label("シード").evaluate(read)
        ink, paper = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
        assert ink > 600 and paper < 150
        assert page.locator(".talk img").count() == 0


@pytest.mark.slow
@needs_browser
def test_the_page_goes_on_when_the_server_has_forgotten_the_conversation(open_page, speakers, log, sampling):
    with serve_chat(speakers, log.path, sampling) as address:
        page = open_chat(open_page, address)
        page.evaluate("sessionStorage.setItem('sandan:conversation', 'x')")
        page.reload()
        ask(page)
        page.get_by_text("Which answer is better?").wait_for()


def test_two_people_can_ask_at_once(desk):
    found = {}

    def one(name):
        about = {"conversation": desk.open_chat(name, {})["conversation"], "temperature": 1, "seed": 0}
        desk.ask_models(name, about | {"question": QUESTION, "number": 0})
        while not (asked := desk.follow(name, about)["round"])["complete"]:
            time.sleep(0.01)
        found[name] = [answer["text"] for answer in asked["answers"]]

    people = [threading.Thread(target=one, args=(name,)) for name in ("mei", "ken")]
    for person in people:
        person.start()
    for person in people:
        person.join(20)
    assert found["mei"] == found["ken"]
