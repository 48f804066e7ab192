"""A report that a rising score cannot fool: independent judges, collapses, and the logs of a run that collapsed."""

import json
import math

import pytest

from sandan.core.stage import Stage
from sandan.ppo.collapse import answer_figures
from sandan.report.build import write_report
from sandan.report.checks import run_checks
from sandan.report.figures import comparison_table, headline


VERBS, THINGS = ("make", "mend", "paint", "sell"), ("bag", "boat", "car", "cup")
QUESTIONS = [f"How do I {verb} a {thing}?" for verb in VERBS for thing in THINGS]
SFT = [
    f"First {verb} the top of your {thing} with {tool}, then let it dry for {n} days and {verb} what is below"
    for n, (verb, thing, tool) in enumerate(
        (verb, thing, f"a {verb}ing {thing}-brush") for verb in VERBS for thing in THINGS
    )
]
LENGTH, JUDGED = "answers keep their length", "PPO above SFT"
SAMENESS, VARIETY = "different prompts, different answers", "answers keep their variety"

# english-small as measured on one H200, 2026-11-27: the policy ends by answering "No" to everything, the reward rises,
# and the reward model hardly knows what people prefer (a longer answer wins more often).
METRICS = {
    "pretrain": {"eval_bits_per_byte": 1.554, "untrained_bits_per_byte": 3.355},
    "sft": {"eval_loss": 3.616, "eval_loss_before": 6.434},
    "reward": {"eval_accuracy": 0.553, "eval_accuracy_low": 0.512, "longer_answer_accuracy": 0.574},
    "ppo": {"objective/scores_first": -0.148, "objective/scores_last": 0.849},
    "evaluate": {},
}
ENGLISH_SMALL = [
    {"model": "base", "reward_score": -0.61, "kl_to_sft": 310.0, "response_tokens": 63.1, "stopped_share": 0.02},
    {"model": "sft", "reward_score": -0.15, "kl_to_sft": 0.0, "response_tokens": 21.0, "stopped_share": 0.97},
    {"model": "ppo", "reward_score": 0.86, "kl_to_sft": 4.3, "response_tokens": 2.0, "stopped_share": 1.0},
]
SAMPLES = [
    {"prompt": question, "group": "new_combinations", "base": "the", "sft": answer, "ppo": "No"}
    for question, answer in zip(QUESTIONS, SFT, strict=True)
]
TRENDS = {
    "objective/scores": (-0.148, 0.849),
    "objective/kl": (0.0, 4.3),
    "val/response_tokens": (21.0, 2.0),
    "val/repeated_share": (0.02, 0.0),
    "val/stopped_share": (0.97, 1.0),
    "val/explained_variance": (0.0, 0.4),
    "policy/entropy_avg": (3.4, 0.6),
}
HISTORY = [
    {"step": 16 * n} | {name: first + (last - first) * n / 9 for name, (first, last) in TRENDS.items()}
    for n in range(10)
]


def english_small(folder, comparison=ENGLISH_SMALL, max_kl_nats=None):
    """The logs of english-small, as its stages wrote them."""
    for name, metrics in METRICS.items():
        (folder / name).mkdir(parents=True)
        result = {"stage": name, "recipe": folder.name, "seed": 0, "metrics": metrics, "wall_seconds": 60.0}
        result |= {"finished": "2026-11-27T00:00:00+00:00", "device": "cuda (NVIDIA H200)", "versions": {}}
        result |= {"inputs": {}, "config": {"max_kl_nats": max_kl_nats} if name == "ppo" else {}}
        (folder / name / "result.json").write_text(json.dumps(result))
    (folder / "ppo" / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY}))
    (folder / "evaluate" / "comparison.json").write_text(json.dumps(comparison))
    (folder / "evaluate" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SAMPLES))
    return write_report(folder, Stage("report", folder.name, folder / "report", 0, {}).open())


def failed(report):
    return {check["name"]: check["detail"] for check in report["checks"] if not check["passed"]}


def measured(row, answers):
    """The row as `evaluate` measures it today; here a token is a word."""
    return row | answer_figures(QUESTIONS, [answer.split() for answer in answers])


def test_english_small_that_ended_with_no_to_everything_does_not_pass(tmp_path):
    report = english_small(tmp_path / "english-small")
    assert not report["passed"]
    assert list(failed(report)) == [JUDGED, LENGTH]
    assert failed(report)[JUDGED].startswith("no independent judge: not judged.")
    assert "says -0.15 → 0.86, which proves nothing" in failed(report)[JUDGED]
    assert "21 → 2 (at least 10.5, at most 42)" in failed(report)[LENGTH]
    assert "“No” to “How do I make a bag?”, and 16 times in all" in failed(report)[LENGTH]
    assert ("length", True) in [(finding["kind"], finding["collapse"]) for finding in report["watch"]]
    page = (tmp_path / "english-small" / "report" / "report.html").read_text(encoding="utf-8")
    assert "no independent judge: not judged" in page and "<b>Collapsed:</b>" in page


def test_the_figures_that_evaluate_measures_show_it_in_words_too(tmp_path):
    base, sft, ppo = ENGLISH_SMALL
    rows = [base, measured(sft, SFT), measured(ppo, ["No </s>"] * len(SFT))]
    found = failed(english_small(tmp_path / "english-small", rows, max_kl_nats=4.0))
    assert list(found) == [JUDGED, LENGTH, VARIETY, SAMENESS, "KL within its budget"]
    assert found[SAMENESS].startswith("different prompts get the same answer: share of prompts")
    assert "1 (at most" in found[SAMENESS] and "“No”" in found[SAMENESS]
    assert "4.3 (at most 4)" in found["KL within its budget"]


def judged(low, high, name="gold", **equal):
    """PPO's row with a judge's win rate over SFT, and at equal length."""
    lows = {"win_rate": (low, high), "win_rate_length_controlled": equal.get("equal", (low, high))}
    return {
        f"judge/{name}/{key}{end}": value
        for key, (least, most) in lows.items()
        for end, value in (("", (least + most) / 2), ("_low", least), ("_high", most))
    }


@pytest.mark.parametrize(
    ("figures", "passes"),
    [
        (judged(0.55, 0.7), True),
        (judged(0.48, 0.7), False),
        (judged(math.nan, 0.7), False),
        (judged(0.55, 0.7, equal=(0.4, 0.6)), False),  # only longer
        (judged(0.55, 0.7, name="follows", equal=(0.4, 0.6)), True),  # a function that checks is not fooled by length
        (judged(0.55, 0.7, name="follows") | judged(0.45, 0.6), True),
        (judged(0.55, 0.7, name="follows") | judged(0.3, 0.4), False),
    ],
)
def test_an_independent_judge_decides_and_at_equal_length(figures, passes):
    rows = [{"model": "sft", "reward_score": 0.0}, {"model": "ppo", "reward_score": 9.0, **figures}]
    (check,) = run_checks({}, rows)
    assert (check["name"], check["passed"]) == (JUDGED, passes)
    assert "win rate over SFT, 95% interval, must be above 50%" in check["detail"]


def test_a_collapse_fails_whatever_a_judge_says():
    sft = {"model": "sft", "response_tokens": 20.0}
    for tokens in (9.0, 41.0):
        checks = run_checks({}, [sft, {"model": "ppo", "response_tokens": tokens, **judged(0.9, 1.0)}])
        assert [check["passed"] for check in checks] == [True, False]


def test_the_answer_that_repeats_itself_is_the_example():
    rows = [{"model": "sft", "repeated_share": 0.0}, {"model": "ppo", "repeated_share": 0.6}]
    samples = [{"prompt": "a", "ppo": "all is well"}, {"prompt": "b", "ppo": "so and so and so and so and"}]
    check = run_checks({}, rows, samples)[-1]
    assert check["detail"].endswith("for example “so and so and so and so and” to “b”")


def test_figures_of_judges_stand_in_groups_of_their_own():
    rows = [
        {"model": "sft", "judge/gold/score": 0.1, "reward_score": 0.0},
        {"model": "ppo", "judge/gold/score": 0.4, "reward_score": 5.0, **judged(0.55, 0.7)},
    ]
    _, (group, rest) = comparison_table(rows)
    assert group["title"] == "Independent judge: gold"
    assert [row["label"] for row in group["rows"]] == [
        "mean score",
        "preferred to the model before",
        "the same at equal length",
    ]
    assert group["rows"][1]["cells"] == [("–", ""), ("62.5%", "55.0% – 70.0%")]
    assert [row["label"] for row in rest["rows"]] == ["reward model's score"]
    assert headline({"comparison": rows})["text"].startswith("0.10 → 0.40 is the mean score")


def test_the_oracle_and_other_judges_have_a_line_each():
    scores = {f"oracle/score{end}": score for end, score in (("", 0.7), ("_low", 0.65), ("_high", 0.75))}
    better = {name: score + 0.2 for name, score in scores.items()}
    judged = {"judge/human/win_rate": 0.4, "judge/human/win_rate_low": 0.35, "judge/human/win_rate_high": 0.45}
    checks = run_checks({}, [{"model": "sft"} | scores, {"model": "ppo"} | better | judged])
    found = {check["name"]: check["passed"] for check in checks if check["name"].startswith(JUDGED)}
    assert found == {"PPO above SFT": True, "PPO above SFT by other judges": False}
