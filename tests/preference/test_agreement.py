"""Agreement, export and the machine judge: known answers, theory, and TRL's own trainer on what is exported."""

import itertools
import json
import os
import random
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers import ROOT

from sandan.core.errors import UserError
from sandan.core.stage import Stage
from sandan.data.chat import to_text, to_turns
from sandan.preference.agreement import analyse, krippendorff_alpha, pairwise_agreement
from sandan.preference.item_queue import Queue, QueueSettings, load_items
from sandan.preference.judgement_log import JudgementLog, standing_judgements
from sandan.preference.llm_judge import EVERY_ITEM, both_orders, connect, judge_all, parse_ranking
from sandan.preference.pairs import in_form, make_preferences, read_logs, write_dataset
from sandan.preference.simulated_rankers import agreement_probability, simulate_ranks


# Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), section D: four observers, twelve units.
OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
]


def judgement(annotator, prompt, candidates, ranks, **more):
    return {"prompt_id": prompt, "prompt": prompt, "candidates": list(candidates), "ranks": ranks, "annotator": annotator,
            **more}  # fmt: skip


def simulated(gap, temperature, prompts=1500, annotators=2, repeats=False, seed=0):
    """Judgements of two answers whose utilities differ by `gap`, shown in random order."""
    rng = random.Random(seed)
    made = []
    for prompt, annotator, showing in itertools.product(range(prompts), range(annotators), range(1 + repeats)):
        order = rng.sample(range(2), 2)
        ranks = simulate_ranks([(0.0, gap)[index] for index in order], temperature, rng)
        shown = [("worse", "better")[index] for index in order]
        made.append(judgement(f"a{annotator}", f"p{prompt}", shown, ranks, showing=showing))
    return made


def test_alpha_of_krippendorffs_own_example():
    units = [
        judgement(f"o{observer}", f"u{unit}", ["x"], [value])
        for observer, values in enumerate(OBSERVERS)
        for unit, value in enumerate(values)
        if value is not None
    ]
    alpha = krippendorff_alpha(units)
    assert alpha["mean"] == pytest.approx(0.815, abs=0.0005)
    assert alpha["low"] < 0.815 < alpha["high"]
    assert alpha["count"] == 11, "a unit that one observer saw says nothing"


def test_alpha_is_one_for_the_same_ranks_and_about_zero_for_random_ones():
    rng = random.Random(0)
    same = [judgement(a, f"p{n}", "abc", [1, 2, 3]) for n in range(20) for a in "xy"]
    assert krippendorff_alpha(same)["mean"] == 1.0
    noise = [judgement(a, f"p{n}", "abcd", rng.sample([1, 2, 3, 4], 4)) for n in range(400) for a in "xyz"]
    found = krippendorff_alpha(noise)
    assert abs(found["mean"]) < 0.05
    assert krippendorff_alpha(same[:1]) is None


@pytest.mark.parametrize("gap, temperature", [(1.0, 1.0), (1.0, 0.5), (0.3, 1.0)])
def test_agreement_of_rankers_of_known_noise_is_what_theory_says(gap, temperature):
    judgements = simulated(gap, temperature, repeats=True)
    found = analyse(judgements)
    theory = agreement_probability(gap, temperature)
    assert found["pairwise_agreement"]["low"] <= theory <= found["pairwise_agreement"]["high"]
    # Two draws of one ranker differ as two rankers do, if nobody has a taste of their own.
    assert found["self_consistency"]["low"] <= theory <= found["self_consistency"]["high"]
    assert found["position_bias"]["low"] <= 0.5 <= found["position_bias"]["high"]
    # Of two rankers and two values that are equally frequent, alpha is twice the agreement beyond one half.
    better = sum(ranks[0] for one in judgements for ranks in [one["ranks"]]) / len(judgements)
    assert better == pytest.approx(1.5, abs=0.05)
    assert found["krippendorff_alpha"]["low"] <= 2 * theory - 1 <= found["krippendorff_alpha"]["high"]


@pytest.mark.parametrize(
    "rankings, expected",
    [
        ([[1, 2, 3], [1, 2, 3]], 1.0),
        ([[1, 2, 3], [3, 2, 1]], 0.0),
        ([[1, 2, 3], [1, 3, 2]], 2 / 3),
        ([[1, 1, 3], [1, 2, 3]], 1.0),
        ([[1, 1], [1, 2]], None),
        ([[1, 2, 3]], None),
    ],
)
def test_agreement_of_two_annotators(rankings, expected):
    found = analyse([judgement(f"a{n}", "p", "abc"[: len(ranks)], ranks) for n, ranks in enumerate(rankings)])
    assert (found["pairwise_agreement"] or {"mean": None})["mean"] == expected


def test_agreement_compares_answers_and_not_places_and_never_one_with_oneself():
    one, other = judgement("x", "p", "ab", [1, 2]), judgement("y", "p", "ba", [1, 2])
    assert analyse([one, other])["pairwise_agreement"]["mean"] == 0.0
    assert analyse([one, one | {"showing": 1}])["pairwise_agreement"] is None
    assert analyse([one, one | {"prompt_id": "q", "annotator": "y"}])["pairwise_agreement"] is None
    assert pairwise_agreement([]) is None


def test_careless_annotators_are_pointed_out():
    rng = random.Random(3)
    made = []
    for number in range(60):
        for name, seconds in (("good", 20.0), ("fine", 25.0), ("slow", 200.0), ("fast", 1.1), ("lazy", 18.0)):
            order = rng.sample("abc", 3)
            ranks = ["abc".index(text) + 1 for text in order]
            if name == "fast":
                ranks = rng.sample([1, 2, 3], 3)
            if name == "lazy":
                ranks = [1, 2, 3]
            made.append(judgement(name, f"p{number}", order, ranks, seconds=seconds, annotator_kind="human"))
    remarks = {row["annotator"]: " | ".join(row["remarks"]) for row in analyse(made)["annotators"]}
    assert remarks["good"] == remarks["fine"] == ""
    assert remarks["slow"].startswith("slow: 200 s an item")
    assert "fast: 1.1 s an item" in remarks["fast"]
    assert "no better than chance" in remarks["fast"]
    assert "the upper answer wins 100%" in remarks["lazy"]
    assert "the same ranks 100%" in remarks["lazy"]


@pytest.fixture
def http_server(monkeypatch):
    """`http_server(answer)` serves JSON on loopback: `answer(path, body)` gives status and content."""
    # huggingface_hub in offline mode refuses loopback too.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    started = []

    def start(answer):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                server.requests.append((self.path, self.headers.get("Authorization")))
                raw = self.rfile.read(int(self.headers["Content-Length"])) if "Content-Length" in self.headers else b""
                if self.headers.get("Transfer-Encoding") == "chunked":
                    while size := int(self.rfile.readline(), 16):
                        raw += self.rfile.read(size + 2)[:-2]
                status, content = answer(self.path, raw)
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        server.url, server.requests = f"http://127.0.0.1:{server.server_port}", []
        started.append(server)
        return server

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


# ------------------------------------------------------------------------------------------------------------ export


@pytest.fixture
def log(tmp_path):
    """Two annotators' judgements of 40 prompts, a skip, an undo and a repeat among them."""
    rows = [{"prompt": f"Which is larger, {n}?", "candidates": [f"{n}", f"{n + 1}", f"{n + 2}"]} for n in range(40)]
    path = tmp_path / "candidates.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = JudgementLog(tmp_path / "judgements.jsonl")
    queue = Queue(load_items(path), log, QueueSettings(overlap_share=1, repeat_share=0.2))
    for name in ("a", "b"):
        while shown := queue.current(name):
            ranks = [1 + sum(int(other) > int(text) for other in shown["candidates"]) for text in shown["candidates"]]
            queue.judge(
                name, shown["ticket"], ranks if len(ranks) != 3 or ranks[0] != 3 else [2, 1, 1], guidelines="g1"
            )
    queue.undo("a")
    queue.skip("a", queue.current("a")["ticket"], "unclear")
    return log


def stage_of(tmp_path):
    return Stage("preferences", "toy", tmp_path / "toy" / "preferences", 0, {}).open()


def test_export_keeps_every_strict_pair_on_one_side_of_the_split(log, tmp_path):
    judgements, skips, _ = read_logs([str(log.path)], stage_of(tmp_path))
    splits, counts = make_preferences(judgements, "given", 0.3, 0)
    assert len(skips) == 1
    assert counts["repeated_judgements"] == sum(one["showing"] == 1 for one in judgements) > 0
    first = [one for one in judgements if one["showing"] == 0]
    strict = sum(a != b for one in first for a, b in itertools.combinations(one["ranks"], 2))
    assert len(splits["train"]) + len(splits["eval"]) == strict
    assert counts["tied_pairs"] == 3 * len(first) - strict > 0
    assert {row["prompt_id"] for row in splits["train"]}.isdisjoint(row["prompt_id"] for row in splits["eval"])
    assert set(splits["train"][0]) == {"prompt", "chosen", "rejected", "margin", "prompt_id", "annotator"}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["standard", "conversational"])
def test_trls_own_reward_trainer_takes_the_export_as_it_is(log, tmp_path, form, tokenizer, tiny_config):
    from datasets import load_dataset
    from transformers import LlamaForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    judgements, skips, _ = read_logs([str(log.path)], stage_of(tmp_path))
    splits, counts = make_preferences(judgements, form, 0.3, 0)
    analysis = analyse(judgements) | counts | {"skipped": len(skips), "guidelines": {"g1": len(judgements)}}
    folder = tmp_path / "dataset"
    folder.mkdir()
    write_dataset(splits, analysis, "cc0-1.0", ["en"], folder)
    dataset = load_dataset(str(folder))
    assert {name: len(rows) for name, rows in dataset.items()} == {
        "train": len(splits["train"]), "test": len(splits["eval"]),
    }  # fmt: skip
    trainer = RewardTrainer(
        LlamaForSequenceClassification(tiny_config),
        RewardConfig(str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=4, use_cpu=True, bf16=False,
                     gradient_checkpointing=False, report_to="none"),
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
        processing_class=tokenizer,
    )  # fmt: skip
    assert len(trainer.train_dataset) == len(splits["train"])
    assert trainer.train().global_step == 2
    card = (folder / "README.md").read_text()
    assert "license: cc0-1.0" in card
    assert "`g1`" in card


def test_forms_turn_into_one_another():
    dialogue = [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Go"},
    ]  # fmt: skip
    pair = {"prompt": dialogue, "chosen": [{"role": "assistant", "content": "a"}],
            "rejected": [{"role": "assistant", "content": "b"}]}  # fmt: skip
    text = in_form(pair, "standard")
    assert text == {
        "prompt": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Go\n\nAssistant:",
        "chosen": "a",
        "rejected": "b",
    }
    assert in_form(text, "conversational") == pair
    assert in_form(pair, "given") is pair
    assert to_turns(to_text(dialogue)) == dialogue
    assert to_text(dialogue[:1]) == "Hi"
    with pytest.raises(UserError, match="use conversational"):
        to_text([{"role": "system", "content": "x"}, *dialogue])


def test_a_log_without_judgements_is_told(tmp_path):
    JudgementLog(tmp_path / "log.jsonl").append({"event": "undo", "ticket": "t", "annotator": "a"})
    with pytest.raises(UserError, match="no judgement that stands"):
        read_logs([str(tmp_path / "log.jsonl")], stage_of(tmp_path))
    with pytest.raises(UserError, match="no such file"):
        read_logs([str(tmp_path / "none.jsonl")], stage_of(tmp_path))
    with pytest.raises(UserError, match="make rank RECIPE=toy ANNOTATOR="):
        read_logs(["annotations/toy/judgements.jsonl"], stage_of(tmp_path))


# ------------------------------------------------------------------------------------------------------------- judge


@pytest.mark.parametrize(
    "text, ranks",
    [
        ("B > A = C", [2, 1, 2]),
        ("Because it is true.\n\n**C > B > A**", [3, 2, 1]),
        ("A=B=C.", [1, 1, 1]),
        ("B > A", None),
        ("B > A > A", None),
        ("A > B > C > D", None),
        ("I choose B", None),
        ("B > A = C\nbut I am not sure", None),
        ("", None),
        (None, None),
    ],
)
def test_only_a_ranking_of_all_answers_is_one(text, ranks):
    assert parse_ranking(text, 3) == ranks


def test_orders_that_disagree_are_a_tie():
    first_wins = both_orders(lambda candidates: "A > B", ["x", "y"])
    assert first_wins == {"ranks": [1, 1], "forwards": [1, 2], "backwards": [2, 1]}
    by_name = both_orders(lambda candidates: "A > B" if candidates[0] == "x" else "B > A", ["x", "y"])
    assert by_name["ranks"] == [1, 2]
    assert both_orders(lambda candidates: "A > B" if candidates[0] == "x" else "neither", ["x", "y"]) is None


@pytest.fixture
def endpoint(http_server):
    """A loopback server that speaks chat completions; `reply(question)` says what it answers, `seen` what it was asked."""

    def answer(path, body):
        request = json.loads(body)
        server.seen.append(request)
        status, text = server.reply(request["messages"][0]["content"])
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        about = {"id": "1", "object": "chat.completion", "created": 1, "model": request["model"]}
        return status, about | {"choices": [choice], "usage": usage}

    server = http_server(answer)
    server.seen = []
    return server


def by_length(message):
    """An honest judge of these tests: the longer answer first; it cannot read answers with a question mark."""
    answers = [part.split("</answer>")[0] for part in message.split('<answer letter="')[1:]]
    texts = {answer[0]: answer.partition("\n")[2].strip() for answer in answers}
    if any("?" in text for text in texts.values()):
        return 200, "Hm."
    return 200, "So:\n" + " > ".join(sorted(texts, key=lambda letter: -len(texts[letter])))


@pytest.fixture
def judged(tmp_path):
    rows = [
        {"prompt": f"Q{n}", "candidates": ["short", "much longer", "the longest of all"][: 2 + n % 2]}
        for n in range(5)
    ]
    rows.append({"prompt": "Q5", "candidates": ["what?", "which one?"]})
    path = tmp_path / "candidates.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Queue(load_items(path), JudgementLog(tmp_path / "log.jsonl"), EVERY_ITEM)


def test_a_model_judges_in_both_orders_and_the_unreadable_is_left_out(endpoint, judged, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_must_not_leave")
    monkeypatch.setenv("SANDAN_JUDGE_API_KEY", "key")
    endpoint.reply = by_length
    send = connect(f"{endpoint.url}/v1", "judge-1", 64, 10.0)
    counts = judge_all(judged, "judge-1", send, "Longer is better.", "g1", None)
    assert counts == {"judged": 5, "unparsable": 1, "orders_agree": 1.0}
    judgements = standing_judgements(judged.log.read())
    assert all(one["annotator_kind"] == "machine" and one["annotator"] == "judge-1" for one in judgements)
    for one in judgements:
        assert sorted(one["candidates"], key=len, reverse=True) == [
            text for _, text in sorted(zip(one["ranks"], one["candidates"], strict=True))
        ]
    assert set(endpoint.requests) == {("/v1/chat/completions", "Bearer key")}
    questions = [request["messages"][0]["content"].split("<answer ")[1:] for request in endpoint.seen]
    orders = [[part.partition("\n")[2].split("\n")[0] for part in parts] for parts in questions]
    read = [order for order in orders if "what?" not in order]
    assert read[::2] == [order[::-1] for order in read[1::2]]
    assert len(read) == 10
    assert judge_all(judged, "judge-1", send, "", "g1", None)["judged"] == 0, "a second run asks nothing again"


def test_a_model_that_favours_the_first_answer_gives_ties(endpoint, judged):
    endpoint.reply = lambda message: (200, " > ".join("ABC"[: message.count("<answer letter")]))
    counts = judge_all(judged, "j", connect(f"{endpoint.url}/v1", "m", 64, 10.0), "", "g", None)
    assert counts["orders_agree"] == 0.0
    assert all(set(one["ranks"]) == {1} for one in standing_judgements(judged.log.read()))


def test_an_endpoint_that_fails_is_one_line_and_loses_nothing(endpoint, judged):
    replies = iter([by_length] * 4)
    endpoint.reply = lambda message: next(replies, lambda _: (401, "no"))(message)
    with pytest.raises(UserError, match="401.*what was judged is in the log"):
        judge_all(judged, "j", connect(f"{endpoint.url}/v1", "m", 64, 10.0), "", "g", None)
    assert len(judged.log.read()) >= 4
    with pytest.raises(UserError, match="what was judged is in the log"):
        judge_all(judged, "j", connect("http://127.0.0.1:9/v1", "m", 64, 2.0), "", "g", None)


def run(script, *arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *map(str, arguments)],
        check=False,
        cwd=cwd,
        env=os.environ | {"HF_HUB_OFFLINE": "0", **environment},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )


@pytest.mark.slow
def test_the_scripts_from_candidates_to_preferences(endpoint, judged, tmp_path):
    endpoint.reply = by_length
    log_path = tmp_path / "annotations" / "judgements.jsonl"
    common = ["--candidates_file", tmp_path / "candidates.jsonl", "--log_file", log_path]
    for model in ("org/judge-a", "judge-b"):
        done = run("judge", *common, "--base_url", f"{endpoint.url}/v1", "--model", model, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "5 judged, 1 unparsable and left out; both orders agree on 100% of the pairs" in done.stdout
    arguments = ["--judgement_files", log_path, "--output_dir", "toy/preferences", "--held_out_share", "0.4"]
    done = run("preferences", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "two annotators order a pair alike    100.0%" in done.stdout
    assert "org-judge-a" in done.stdout
    assert "machine" in done.stdout
    metrics = json.loads((tmp_path / "toy" / "preferences" / "result.json").read_text())["metrics"]
    assert metrics["judgements"] == 10
    assert metrics["skipped"] == 2
    assert metrics["train_pairs"] + metrics["eval_pairs"] == 2 * (3 * 1 + 2 * 3)
    assert metrics["pairwise_agreement"] == 1.0
    endpoint.reply = lambda message: (503, "busy")
    done = run("judge", *common, "--base_url", f"{endpoint.url}/v1", "--model", "c", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {endpoint.url}/v1: c: ")
    assert "Traceback" not in done.stderr
