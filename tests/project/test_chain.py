"""The promise of the README: `make demo` trains every stage on the embedded data, and every step is of use."""

import json

import pytest
from helpers.checkout import TINY, make, make_checkout

from sandan.world.facts import RELATIONS


pytestmark = pytest.mark.e2e

CONTRACT = {"stage", "recipe", "seed", "metrics", "wall_seconds", "device", "versions", "inputs", "config"}
# Who guesses among the values of a relation is right at most this often.
CHANCE = 1 / min(len(values) for _, values, *_ in RELATIONS.values())
LIMIT_SECONDS = 3600


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The checkout after `make demo`, and what it printed."""
    checkout = make_checkout(tmp_path_factory.mktemp("demo") / "checkout")
    return checkout, make(checkout, "demo", timeout=LIMIT_SECONDS)


@pytest.fixture(scope="module")
def tiny(demo):
    checkout, done = demo
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return checkout / "outputs" / "tiny"


@pytest.fixture(scope="module")
def report(tiny):
    return read(tiny / "report" / "report.json")


@pytest.fixture(scope="module")
def rows(report):
    return {row["model"]: row for row in report["comparison"]}


def test_report_passes_and_keeps_its_schema(tiny, report):
    assert {"recipe", "passed", "checks", "stages", "comparison", "versions", "lineage", "stale"} <= set(report)
    assert report["recipe"] == "tiny"
    assert report["passed"] is True, report["checks"]
    assert list(report["stages"]) == list(TINY[:-1])
    assert not any(report["stale"].values())
    assert report["remarks"] == []
    assert (tiny / "report" / "report.html").stat().st_size > 10_000


def test_every_step_raises_the_score_with_intervals_apart(report, rows):
    assert [row["model"] for row in report["comparison"]] == ["base", "sft", "ppo"]
    for worse, better in (("base", "sft"), ("sft", "ppo")):
        assert rows[worse]["oracle/score"] < rows[better]["oracle/score"]
        assert rows[worse]["oracle/score_high"] < rows[better]["oracle/score_low"]


def test_ppo_answers_are_right(rows):
    assert rows["ppo"]["oracle/correct"] >= 0.90


def test_ppo_answers_are_polite_and_end_and_more_are_right(rows):
    assert rows["ppo"]["oracle/correct"] >= rows["sft"]["oracle/correct"] + 0.15
    assert rows["ppo"]["oracle/safe"] >= 0.99
    assert rows["ppo"]["stopped_share"] >= 0.98


def test_ppo_answers_from_facts_that_only_pretraining_states(rows):
    assert rows["ppo"]["oracle_pretraining_only/correct"] > CHANCE


def test_rankers_agree_as_the_recipe_asks(tiny):
    metrics = read(tiny / "preferences" / "result.json")["metrics"]
    assert abs(metrics["pairwise_agreement"] - 0.75) <= 0.03
    assert metrics["position_bias_low"] <= 0.5 <= metrics["position_bias_high"]
    assert metrics["annotators_with_remarks"] == 0


def test_reward_model_orders_pairs_as_well_as_another_ranker(tiny):
    metrics = read(tiny / "reward" / "result.json")["metrics"]
    assert metrics["eval_accuracy"] > metrics["human_agreement_low"]


def test_the_true_score_rises_with_the_reward_that_ppo_sees(tiny):
    metrics = read(tiny / "ppo" / "result.json")["metrics"]
    assert metrics["true_score_last"] >= metrics["true_score_first"] + 0.1


def test_reward_model_is_near_the_ceiling_of_its_labels(tiny):
    metrics = read(tiny / "reward" / "result.json")["metrics"]
    assert abs(metrics["eval_accuracy"] - metrics["ceiling_accuracy"]) <= 0.03


def test_reward_model_picks_better_answers(tiny):
    metrics = read(tiny / "reward" / "result.json")["metrics"]
    assert metrics["best_of_n/1"] < metrics["best_of_n/8"]


@pytest.mark.parametrize("stage", TINY)
def test_every_stage_keeps_the_contract(tiny, stage):
    result = read(tiny / stage / "result.json")
    assert set(result) >= CONTRACT
    assert (result["stage"], result["recipe"]) == (stage, "tiny")
    assert result["metrics"]
    assert result["wall_seconds"] > 0
    assert (tiny / stage / "recipe.yaml").is_file()


def test_every_model_folder_loads_with_plain_transformers(tiny):
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    loaders = {
        "pretrain": AutoModelForCausalLM,
        "pretrain_mlm": AutoModelForMaskedLM,
        "sft": AutoModelForCausalLM,
        "reward": AutoModelForSequenceClassification,
        "ppo": AutoModelForCausalLM,
    }
    for stage, loader in loaders.items():
        model, loading = loader.from_pretrained(tiny / stage, output_loading_info=True)
        assert not loading["missing_keys"], stage
        assert len(AutoTokenizer.from_pretrained(tiny / stage)) <= model.config.vocab_size


def test_the_table_is_printed(demo, rows):
    output = demo[1].stdout + demo[1].stderr
    (header,) = (line for line in output.splitlines() if line.split() == ["Base", "SFT", "PPO"])
    table = output[output.index(header) :]
    assert "right in every respect" in table
    assert all(f"{row['oracle/correct']:.1%}" in table for row in rows.values())
    assert "FAILED" not in table


def test_a_second_demo_runs_no_stage_again(demo, tiny):
    before = {stage: (tiny / stage / "result.json").stat().st_mtime_ns for stage in TINY}
    done = make(demo[0], "demo")
    assert done.returncode == 0
    assert "tiny:" not in done.stdout
    assert {stage: (tiny / stage / "result.json").stat().st_mtime_ns for stage in TINY} == before
