"""The report: checks, lineage, the page (self-contained, escaped), the table and the script's exit codes."""

import html.parser
import json
import math
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from helpers.scripts import run_script

from sandan.core.errors import UserError
from sandan.core.files import sha256
from sandan.core.stage import Stage
from sandan.core.text import aligned, display_width, visible
from sandan.report.build import build_report, write_report
from sandan.report.charts import stage_charts
from sandan.report.checks import run_checks, stale_inputs
from sandan.report.figures import busy_seconds, headline, show, show_duration
from sandan.report.page import render_html
from sandan.report.terminal import render_table


ORACLE = {"base": (0.30, 0.04), "sft": (0.75, 0.61), "ppo": (0.97, 0.95)}
HOSTILE = '<script>alert("x")</script><img src=http://evil.example/x onerror=alert(1)>'
# stage -> its metrics and the stages that it reads
STAGES = {
    "tokenizer": ({"vocabulary_size": 512}, ()),
    "pretrain": ({"eval_bits_per_byte": 0.3, "untrained_bits_per_byte": 2.5, "parameters": 1234567}, ("tokenizer",)),
    "sft": ({"eval_loss": 0.6, "eval_loss_before": 3.0}, ("pretrain",)),
    "reward": (
        {"eval_accuracy": 0.74, "eval_accuracy_low": 0.71, "eval_accuracy_high": 0.77, "ceiling_accuracy": 0.8}
        | {f"best_of_n/{n}": 0.7 + n / 50 for n in (1, 2, 4, 8)},
        ("sft",),
    ),
    "ppo": ({"episodes": 1024}, ("sft", "reward")),
    "evaluate": (
        {f"minimal_pairs/clm/{skill}": 0.9 for skill in ("grammar", "vocabulary", "common_sense", "context")},
        ("pretrain", "sft", "ppo"),
    ),
}
HISTORIES = {
    "pretrain": [{"step": 0, "eval_loss": 5.0}, {"step": 10, "loss": 4.0, "learning_rate": 1e-3}],
    "ppo": [
        {"step": n, "objective/scores": n / 9, "objective/kl": n / 3, "val/response_tokens": 8.0} for n in range(9)
    ],
}


def comparison_rows(oracle: bool = True) -> list[dict]:
    rows = []
    for at, (model, (score, correct)) in enumerate(ORACLE.items()):
        row = {"model": model, "reward_score": at - 1.0, "kl_to_sft": None, "stopped_share": 0.9}
        if oracle:
            row |= {"oracle/score": score, "oracle/score_low": score - 0.02, "oracle/score_high": score + 0.02}
            row |= {
                "oracle/correct": correct,
                "oracle/correct_low": correct - 0.02,
                "oracle/correct_high": correct + 0.02,
            }
            row |= {f"oracle/{name}": score for name in ("helpful", "accurate", "safe", "natural")}
        rows.append(row)
    return rows


def write_stages(recipe_dir: Path, without: tuple[str, ...] = (), oracle: bool = True) -> Path:
    for name, (metrics, reads) in STAGES.items():
        if name in without:
            continue
        folder = recipe_dir / name
        folder.mkdir(parents=True)
        inputs = {"data/text.jsonl": "0" * 64}
        for earlier in reads:
            if earlier not in without:
                # As recorded when the stage ran, relative to the repository.
                inputs[f"outputs/{recipe_dir.name}/{earlier}/result.json"] = sha256(
                    recipe_dir / earlier / "result.json"
                )
        result = {"stage": name, "recipe": recipe_dir.name, "seed": 3, "metrics": metrics, "wall_seconds": 61.5}
        result |= {"finished": "2026-01-02T03:04:05+00:00", "device": "cpu (x86_64, 2 threads)", "config": {}}
        result |= {"versions": {"python": "3.11.7", "torch": "2.12.0"}, "inputs": inputs}
        (folder / "result.json").write_text(json.dumps(result))
        if name in HISTORIES:
            (folder / "trainer_state.json").write_text(json.dumps({"log_history": HISTORIES[name]}))
    if "evaluate" not in without:
        (recipe_dir / "evaluate" / "comparison.json").write_text(json.dumps(comparison_rows(oracle)))
        sample = {
            "prompt": "犬は何を食べますか。",
            "group": "new_combinations",
            "base": HOSTILE,
            "sft": "",
            "ppo": "骨。\x00\ud800",
        }
        sample |= {"base_correct": False, "sft_correct": False, "ppo_correct": True}
        (recipe_dir / "evaluate" / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    return recipe_dir


def points(count):
    return [{"mean": 0.5 + n / 20, "low": 0.4 + n / 20, "high": 0.6 + n / 20, "count": 9} for n in range(count)]


ANALYSIS = {
    "annotators": [
        {"annotator": HOSTILE, "kind": "human", "judgements": 1234, "seconds": 1.25, "agreement": points(1)[0],
         "self_consistency": None, "remarks": ["fast: 1.2 s an item"]},
    ]
}  # fmt: skip
DIAGNOSIS = {
    "calibration": [{"confidence": 0.5 + n / 20, **one} for n, one in enumerate(points(8))],
    "by_rank_difference": {str(n + 1): one for n, one in enumerate(points(3))},
}


def report_of(recipe_dir: Path) -> dict:
    stage = Stage("report", recipe_dir.name, recipe_dir / "report", 0, {}).open()
    return write_report(recipe_dir, stage)


def run_report(recipe_dir: Path, tmp_path: Path) -> subprocess.CompletedProcess:
    config = tmp_path / "recipes" / recipe_dir.name / "report.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(yaml.safe_dump({"output_dir": str(recipe_dir / "report"), "recipe_dir": str(recipe_dir)}))
    return run_script("report", "--config", config)


class Page(html.parser.HTMLParser):
    """Every tag and attribute of a page, as a browser would see them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]


# ----------------------------------------------------------------------------------------------------------- checks


def test_all_checks_pass_with_an_oracle(tmp_path):
    report = report_of(write_stages(tmp_path / "tiny"))
    assert report["passed"]
    names = [check["name"] for check in report["checks"]]
    assert names == [
        "SFT above base",
        "PPO above SFT",
        "best of 8 above best of 1",
        "pre-training learned",
        "lineage",
    ]
    assert all(check["passed"] and check["detail"] for check in report["checks"])


@pytest.mark.parametrize(
    ("stage", "metric", "value", "failed"),
    [
        ("reward", "best_of_n/8", 0.5, "best of 8 above best of 1"),
        ("pretrain", "eval_bits_per_byte", 2.6, "pre-training learned"),
        ("pretrain", "eval_bits_per_byte", math.nan, "pre-training learned"),
    ],
)
def test_a_check_fails(stage, metric, value, failed):
    metrics = {name: dict(found) for name, (found, _) in STAGES.items()}
    metrics[stage][metric] = value
    checks = run_checks(metrics, comparison_rows())
    assert [check["name"] for check in checks if not check["passed"]] == [failed]


def test_overlapping_intervals_are_no_improvement():
    rows = comparison_rows()
    rows[2]["oracle/score_low"] = rows[1]["oracle/score_high"]
    assert [check["name"] for check in run_checks({}, rows) if not check["passed"]] == ["PPO above SFT"]


def test_checks_without_an_oracle():
    metrics = {name: found for name, (found, _) in STAGES.items()}
    checks = {check["name"]: check["passed"] for check in run_checks(metrics, comparison_rows(oracle=False))}
    expected = ["SFT lowers the loss", "reward model above chance", "pre-training learned"]
    assert checks == dict.fromkeys(expected, True) | {"PPO above SFT": False}, "its own reward model is no judge"
    metrics["reward"] = {"eval_accuracy_low": 0.5}
    checks = {check["name"]: check["passed"] for check in run_checks(metrics, comparison_rows(oracle=False))}
    assert not checks["reward model above chance"]


def test_missing_figures_list_no_check_and_nothing_checked_is_not_passed(tmp_path):
    assert run_checks({}, [{"model": "base", "oracle/score": None, "reward_score": None}, {"model": "ppo"}]) == []
    recipe_dir = write_stages(tmp_path / "tiny", without=("pretrain", "reward"))
    (recipe_dir / "evaluate" / "comparison.json").write_text('[{"model": "sft", "oracle/score": 0.5}]')
    report = report_of(recipe_dir)
    assert [check["name"] for check in report["checks"]] == ["lineage"]
    assert not report["passed"], "an intact lineage alone shows nothing about the models"


def test_missing_stages_are_left_out(tmp_path):
    recipe_dir = write_stages(tmp_path / "people", without=("tokenizer", "pretrain"), oracle=False)
    report = report_of(recipe_dir)
    assert list(report["stages"]) == ["sft", "reward", "ppo", "evaluate"]
    page = (recipe_dir / "report" / "report.html").read_text(encoding="utf-8")
    assert "Pre-training, causal" not in page
    assert "Four scores" not in page


# ---------------------------------------------------------------------------------------------------------- lineage


@pytest.mark.parametrize("change", ["edit", "remove"])
def test_stale_lineage_fails(tmp_path, change):
    recipe_dir = write_stages(tmp_path / "tiny")
    path = recipe_dir / "pretrain" / "result.json"
    path.write_text(path.read_text() + "\n") if change == "edit" else path.unlink()
    report = report_of(recipe_dir)
    assert not report["passed"]
    (check,) = [check for check in report["checks"] if not check["passed"]]
    assert check["name"] == "lineage"
    assert "sft used another version of outputs/tiny/pretrain/result.json" in check["detail"]
    assert report["stale"]["sft"] == ["outputs/tiny/pretrain/result.json"]
    assert "stale: changed or gone since" in (recipe_dir / "report" / "report.html").read_text(encoding="utf-8")


def test_lineage_of_another_recipe_is_checked_where_it_lies(tmp_path):
    other = write_stages(tmp_path / "other") / "pretrain" / "result.json"
    lineage = {"sft": {str(other): sha256(other), "data/text.jsonl": "not checked"}}
    assert stale_inputs(lineage, tmp_path / "tiny") == {"sft": []}
    other.write_text("{}")
    assert stale_inputs(lineage, tmp_path / "tiny") == {"sft": [str(other)]}


# ------------------------------------------------------------------------------------------------------------ files


def test_report_json(tmp_path):
    recipe_dir = write_stages(tmp_path / "tiny")
    path = recipe_dir / "ppo" / "result.json"
    result = json.loads(path.read_text())
    result["metrics"]["broken"] = math.nan
    path.write_text(json.dumps(result))
    report_of(recipe_dir)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (recipe_dir / "report" / "report.json").read_text(encoding="utf-8")
    report = json.loads(text, parse_constant=refuse)
    assert set(report) == {
        *(
            "recipe",
            "passed",
            "checks",
            "remarks",
            "stages",
            "comparison",
            "watch",
            "versions",
            "lineage",
            "stale",
            "created",
        )
    }
    assert report["recipe"] == "tiny"
    assert set(report["stages"]) == set(STAGES)
    assert all(
        set(one) == {"metrics", "wall_seconds", "device", "seed", "finished"} for one in report["stages"].values()
    )
    assert report["stages"]["ppo"]["metrics"]["broken"] is None
    assert report["lineage"]["ppo"]["data/text.jsonl"] == "0" * 64
    assert report["versions"] == {"python": "3.11.7", "torch": "2.12.0"}
    assert [row["model"] for row in report["comparison"]] == ["base", "sft", "ppo"]


def ppo_history(**changes):
    """Logs of a healthy run of PPO, but for metrics given as (first, last)."""
    healthy = {
        "objective/scores": (0.0, 1.0),
        "objective/kl": (0.0, 6.0),
        "val/response_tokens": (20.0, 22.0),
        "val/repeated_share": (0.05, 0.06),
        "val/stopped_share": (0.9, 0.95),
        "val/explained_variance": (0.1, 0.6),
        "policy/entropy_avg": (2.0, 1.2),
    } | {name.replace("__", "/"): ends for name, ends in changes.items()}
    return [
        {"step": n} | {name: first + (last - first) * n / 8 for name, (first, last) in healthy.items()}
        for n in range(9)
    ]


@pytest.mark.parametrize(
    ("changes", "kinds", "words"),
    [
        ({}, [], ["Nothing stands out in KL, answer length, variety"]),
        ({"val__response_tokens": (20, 36)}, ["length"], ["the score rises", "answers get longer"]),
        ({"val__response_tokens": (20, 60)}, ["length"], ["<b>Collapsed:</b> answers are less than half or more"]),
        (
            {"objective__kl": (0, 45), "objective__scores": (0, -1)},
            ["kl"],
            ["<b>Collapsed:</b> the policy left its reference"],
        ),
    ],
)
def test_what_the_watch_found_is_in_the_report(tmp_path, changes, kinds, words):
    recipe_dir = write_stages(tmp_path / "tiny")
    (recipe_dir / "ppo" / "trainer_state.json").write_text(json.dumps({"log_history": ppo_history(**changes)}))
    report = report_of(recipe_dir)
    saved = json.loads((recipe_dir / "report" / "report.json").read_text())
    assert [finding["kind"] for finding in saved["watch"]] == kinds
    assert saved["watch"] == report["watch"]
    page = (recipe_dir / "report" / "report.html").read_text()
    assert page.count("What its reward does not show") == 1
    for text in words:
        assert text in page
    assert ("Nothing stands out" in page) is (not kinds)


def test_a_run_too_short_to_watch_is_not_called_healthy(tmp_path):
    recipe_dir = write_stages(tmp_path / "tiny")
    report = report_of(recipe_dir)  # its logs lack most of what the watch reads
    assert report["watch"] is None
    assert "What its reward does not show" not in (recipe_dir / "report" / "report.html").read_text()


def test_versions_that_differ_between_stages_are_all_named(tmp_path):
    recipe_dir = write_stages(tmp_path / "tiny")
    results = {name: json.loads((recipe_dir / name / "result.json").read_text()) for name in STAGES}
    results["ppo"]["versions"]["torch"] = "2.11.0"
    assert build_report("tiny", results, comparison_rows(), recipe_dir)["versions"]["torch"] == "2.11.0, 2.12.0"


def test_the_page_asks_for_nothing_and_escapes_what_models_wrote(tmp_path):
    recipe_dir = write_stages(tmp_path / "tiny")
    report_of(recipe_dir)
    text = (recipe_dir / "report" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on"), f"{name}={value}"
        if name in ("src", "href", "xlink:href", "srcset", "action"):
            assert value.startswith(("#", "data:")), f"{name}={value}"
    assert not re.search(r"@import|url\((?!#)", text)
    assert "default-src 'none'" in text
    assert "&lt;script&gt;alert(" in text
    assert "骨。␀\ufffd" in text
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    colours = re.findall(r"#0[1-5]0[1-5]0[1-5]", text)
    assert not colours, "every chart colour is a CSS variable, so that it follows light and dark"


def test_the_page_shows_charts_figures_and_lineage(tmp_path):
    recipe_dir = write_stages(tmp_path / "tiny")
    report_of(recipe_dir)
    text = (recipe_dir / "report" / "report.html").read_text(encoding="utf-8")
    for wanted in ("4%", "61%", "95%", "Passed: 5 of 5 checks", "Minimal pairs", "chance 50%", "1,234,567"):
        assert wanted in text
    for chart in ("Loss, nats per token", "KL to SFT", "Answer length", "Four scores", "reward model's choice"):
        assert chart.replace("'", "&#39;") in text
    digest = sha256(recipe_dir / "sft" / "result.json")
    assert f'<abbr title="{digest}"><code>{digest[:10]}</code>' in text
    assert '<tr lang="ja">' in text


def test_the_page_is_the_same_each_time(tmp_path):
    recipe_dir = write_stages(tmp_path / "tiny")
    report = report_of(recipe_dir)
    pages = {render_html(report, HISTORIES) for _ in range(2)}
    assert len(pages) == 1


def test_the_loss_curve_starts_before_training():
    history = [{"step": 10, "loss": 2.0}, {"step": 20, "loss": 1.0}, {"step": 20, "eval_loss": 1.1}]
    (chart,) = stage_charts("sft", history, {"eval_loss_before": 3.0})
    assert "training from 2 to 1, unseen from 3 to 1.1" in chart["described"]
    assert stage_charts("sft", [], {"eval_loss_before": 3.0}) == []


def test_not_a_number_in_figures_and_curves_is_drawn_as_a_gap(tmp_path):
    recipe_dir = write_stages(tmp_path / "tiny")
    report = report_of(recipe_dir)
    report["comparison"][2] |= {"oracle/correct": math.nan, "oracle/score": math.nan, "oracle/helpful": math.nan}
    broken = [{"step": 1, "loss": math.nan}, {"step": 2, "loss": math.inf}, {"step": 3, "loss": 1.0}]
    page = render_html(report, {"pretrain": broken, "sft": broken[:1]})
    assert "nan%" in page
    assert not re.search(r' (d|x|y|cx|cy|height|transform)="[^"]*(nan|inf)', page)
    assert "nan%" in render_table(report)


# ------------------------------------------------------------------------------------------------------------- text


def test_the_table_is_aligned():
    text = aligned([["", "Base", "PPO"], ["a heading that is long"], ["犬は", "骨", "x"], ["dog", "meat", "y"]])
    assert text.splitlines() == ["      Base  PPO", "a heading that is long", "犬は  骨    x", "dog   meat  y"]
    assert display_width("か\u3099é") == 3


def test_the_table_shows_rows_checks_and_answers(tmp_path):
    report = report_of(write_stages(tmp_path / "tiny"))
    long_answer = "\x1b[31m" + "犬" * 100 + "\n"
    text = render_table(report, [{"prompt": "q\n?", "group": "", "base": long_answer, "sft": None, "ppo": "a"}])
    assert "61.0% (59.0%–63.0%)" in text
    assert "ok      lineage" in text
    assert "q␊?" in text and "␛[31m" in text and "\x1b" not in text
    assert max(map(display_width, text.splitlines())) < 140


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("oracle/correct", 0.286, "28.6%"),
        ("eval_accuracy_low", 1, "100.0%"),
        ("parameters", 1234567, "1,234,567"),
        ("reward_score", -2.104, "−2.10"),
        ("learning_rate", 0.0003, "0.0003"),
        ("kl_to_sft", None, "–"),
    ],
)
def test_figures_as_text(key, value, expected):
    assert show(key, value) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.44, "0.4 s"),
        (59.4, "59 s"),
        (96, "1 min 36 s"),
        (599.9, "10 min"),
        (3725, "1 h 2 min"),
        (90061, "25 h 1 min"),
    ],
)
def test_durations_as_text(seconds, expected):
    assert show_duration(seconds) == expected


def test_control_characters_become_visible():
    assert visible("a\x00\x1b\x7f\x9b\ud800\n\tb") == "a␀␛␡[U+009B]\ufffd\n\tb"


def test_what_draws_nothing_or_turns_the_direction_is_shown_everywhere(tmp_path):
    hidden = "\u202e\u2066\u200b\u00ad\u3164\u2028\U000e0041"
    codes = "[U+202E][U+2066][U+200B][U+00AD][U+3164][U+2028][U+E0041]"
    written = "👩\u200d👩 e\u0301 می\u200cخواهم 葛\U000e0100 ❤\ufe0f"
    assert visible(hidden) == codes
    assert visible(written) == written, "joiners and variation selectors belong to the writing"
    recipe_dir = write_stages(tmp_path / "tiny")
    report = report_of(recipe_dir) | {"recipe": f"tiny{hidden}"}
    report["checks"][0]["detail"] += hidden
    report["versions"] |= {"torch": f"2{hidden}"}
    sample = {"prompt": f"Q{hidden}", "base": hidden, "sft": written, "ppo": hidden}
    for shown in (render_html(report, HISTORIES, [sample]), render_table(report, [sample])):
        assert not re.search(f"[{hidden}]", shown)
        assert shown.count(codes) >= 4
        assert written in shown


def test_headline_falls_back_to_what_there_is():
    assert headline({"comparison": comparison_rows()})["text"].startswith("4% → 61% → 95% of the answers")
    assert headline({"comparison": comparison_rows(oracle=False)})["text"].startswith("−1.00 → 0.00 → 1.00 is")
    same = [{"model": model, "bits_per_byte": 0.5} for model in ORACLE]
    assert headline({"comparison": same})["text"].startswith("0.50 → 0.50 → 0.50 bits")
    assert headline({"comparison": [{"model": "base"}]})["steps"] == []


# ----------------------------------------------------------------------------------------------------------- script


@pytest.mark.slow
def test_script_passes(tmp_path):
    recipe_dir = write_stages(tmp_path / "tiny")
    done = run_report(recipe_dir, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "4% → 61% → 95%" in done.stderr and str(recipe_dir / "report" / "report.html") in done.stderr
    result = json.loads((recipe_dir / "report" / "result.json").read_text())
    assert result["metrics"] == {"passed": True, "checks": 5, "checks_failed": 0}
    assert len(result["inputs"]) == len(STAGES)


def test_script_fails_with_one_line_and_still_writes_everything(tmp_path):
    recipe_dir = write_stages(tmp_path / "tiny")
    rows = comparison_rows()
    rows[2] |= {"oracle/score_low": 0.1}
    (recipe_dir / "evaluate" / "comparison.json").write_text(json.dumps(rows))
    done = run_report(recipe_dir, tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].endswith("report.json: failed checks: PPO above SFT")
    assert "Traceback" not in done.stderr
    written = {path.name for path in (recipe_dir / "report").iterdir()}
    assert {"report.json", "report.html", "result.json"} <= written


def test_script_names_the_command_that_is_missing(tmp_path):
    recipe_dir = write_stages(tmp_path / "tiny", without=("evaluate",))
    done = run_report(recipe_dir, tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "run `make evaluate RECIPE=tiny` first" in line


def test_broken_files_are_named(tmp_path):
    recipe_dir = write_stages(tmp_path / "tiny")
    (recipe_dir / "pretrain" / "trainer_state.json").write_text('{"log_history": [')
    with pytest.raises(UserError, match="trainer_state.json: broken"):
        report_of(recipe_dir)
    (recipe_dir / "evaluate" / "comparison.json").unlink()
    with pytest.raises(UserError, match="make evaluate RECIPE=tiny"):
        report_of(recipe_dir)


def test_rankers_calibration_and_overoptimisation_are_shown(tmp_path):
    recipe_dir = write_stages(tmp_path / "toy")
    result = json.loads((recipe_dir / "reward" / "result.json").read_text())
    preferences = recipe_dir / "preferences"
    preferences.mkdir()
    kept = {"stage": "preferences", "metrics": {"pairwise_agreement": 0.733, "pairwise_agreement_low": 0.727,
                                                "pairwise_agreement_high": 0.739}, "inputs": {}}  # fmt: skip
    (preferences / "result.json").write_text(json.dumps(result | kept))
    (preferences / "agreement.json").write_text(json.dumps(ANALYSIS))
    (recipe_dir / "reward" / "diagnostics.json").write_text(json.dumps(DIAGNOSIS))
    result["metrics"] |= {f"best_of_n_proxy/{n}": float(n) for n in (1, 2, 4, 8)}
    (recipe_dir / "reward" / "result.json").write_text(json.dumps(result))
    history = [
        {
            "step": n,
            "eval_objective/kl": n / 5,
            "eval_rewards/reward": float(n),
            "eval_rewards/true_score": 0.7 + n / 50,
        }
        for n in range(5)
    ]
    (recipe_dir / "ppo" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    report_of(recipe_dir)
    page = (recipe_dir / "report" / "report.html").read_text()
    assert "73.3%" in page
    assert "72.7% – 73.9%" in page
    assert "1,234" in page
    assert "fast: 1.2 s an item" in page
    assert HOSTILE not in page
    assert "&lt;script&gt;" in page
    for title in ("Calibration", "difference of the two ranks", "True score on unseen prompts", "best of n"):
        assert title in page, title


def test_the_seeds_of_a_run_to_which_none_was_given_are_no_different_ones(tmp_path):
    from transformers import TrainingArguments

    recipe_dir = write_stages(tmp_path / "tiny")

    def ran(stage, **changed):
        path = recipe_dir / stage / "result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    own = TrainingArguments.__dataclass_fields__["seed"].default
    for stage in (folder.name for folder in recipe_dir.iterdir() if (folder / "result.json").is_file()):
        trains = stage in ("pretrain", "pretrain_mlm", "sft", "reward", "ppo")
        ran(stage, **({"seed": own, "config": {"learning_rate": 1e-3}} if trains else {"seed": 0}))
    assert own != 0 and report_of(recipe_dir)["remarks"] == []
    ran("sft", seed=7)
    (remark,) = report_of(recipe_dir)["remarks"]
    assert "seed 7: sft" in remark


def test_different_seeds_are_said(tmp_path):
    recipe_dir = write_stages(tmp_path / "tiny")
    assert report_of(recipe_dir)["remarks"] == []
    path = recipe_dir / "evaluate" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seed": 4}))
    report = report_of(recipe_dir)
    assert len(report["remarks"]) == 1 and "different seeds" in report["remarks"][0]
    assert "seed 4: evaluate" in report["remarks"][0] and "seed 3: " in report["remarks"][0]
    assert report["remarks"][0] in (recipe_dir / "report" / "report.html").read_text()
    assert report["remarks"][0] in render_table(report)


def test_stages_that_ran_side_by_side_count_once():
    stages = [
        {"finished": "2026-01-02T03:05:00+00:00", "wall_seconds": 60},
        {"finished": "2026-01-02T03:04:50+00:00", "wall_seconds": 20},
        {"finished": "2026-01-02T03:05:10+00:00", "wall_seconds": 30.5},
        {"finished": "2026-01-03T03:00:00+00:00", "wall_seconds": 5},
    ]
    assert busy_seconds(stages) == pytest.approx(60 + 10 + 5)
