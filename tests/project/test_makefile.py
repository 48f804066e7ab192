"""The Makefile: which stages run, in which order, with which options. Nothing is trained: make only says what it would do."""

import json
import os
import re
import shutil
import sys
import time

import pytest
from helpers import ROOT
from helpers.checkout import TINY, make, make_checkout, planned, stages_of, targets, touch


@pytest.fixture
def checkout(tmp_path):
    return make_checkout(tmp_path / "checkout")


@pytest.fixture
def finished(checkout):
    """A checkout in which every stage has run."""
    start = time.time() - 1800
    for number, stage in enumerate(TINY):
        result = checkout / "outputs" / "tiny" / stage / "result.json"
        result.parent.mkdir(parents=True)
        result.write_text("{}")
        os.utime(result, (start + number, start + number))
    return checkout


def test_report_runs_every_stage_in_order(checkout):
    assert stages_of(planned(checkout, "report")) == list(TINY)


@pytest.mark.parametrize("target", ["chain", "demo"])
def test_chain_and_demo_run_every_stage_in_order(checkout, target):
    assert stages_of(planned(checkout, target)) == list(TINY)


def test_a_stage_runs_only_what_it_needs(checkout):
    assert stages_of(planned(checkout, "sft")) == ["tokenizer", "pretrain", "sft"]


@pytest.mark.parametrize("target", ["demo", *TINY])
def test_nothing_runs_when_every_result_is_fresh(finished, target):
    assert planned(finished, target) == []


@pytest.mark.parametrize(
    "changed, first",
    [
        ("recipes/tiny/tokenizer.yaml", "tokenizer"),
        ("recipes/tiny/reward.yaml", "reward"),
        ("recipes/tiny/report.yaml", "report"),
        ("data/pretrain.jsonl", "tokenizer"),
        ("scripts/candidates.py", "candidates"),
        ("data/sft.jsonl", "sft"),
        ("data/rlhf_prompts.jsonl", "candidates"),
    ],
)
def test_a_change_reruns_its_stage_and_what_follows(finished, changed, first):
    touch(finished / changed)
    assert stages_of(planned(finished, "report")) == list(TINY[TINY.index(first) :])


def test_the_masked_model_reruns_only_what_compares_it(finished):
    touch(finished / "recipes" / "tiny" / "pretrain_mlm.yaml")
    assert stages_of(planned(finished, "report")) == ["pretrain_mlm", "evaluate", "report"]


def test_unseen_prompts_rerun_the_gate_but_no_model_before_it(finished):
    touch(finished / "data" / "eval_prompts.jsonl")
    assert stages_of(planned(finished, "report")) == ["reward", "ppo", "evaluate", "report"]


def test_a_missing_result_reruns_its_stage_and_what_follows(finished):
    (finished / "outputs" / "tiny" / "rank" / "result.json").unlink()
    assert stages_of(planned(finished, "report")) == ["rank", "preferences", "reward", "ppo", "evaluate", "report"]


def test_args_force_only_the_stage_that_was_named(finished):
    (command,) = planned(finished, "sft", "ARGS=--learning_rate 1e-3")
    assert stages_of([command]) == ["sft"]
    assert command.split()[-2:] == ["--learning_rate", "1e-3"]


def test_args_do_not_reach_the_stages_before(checkout):
    *before, last = planned(checkout, "sft", "ARGS=--learning_rate 1e-3")
    assert stages_of(before) == ["tokenizer", "pretrain"]
    assert not any("--learning_rate" in command for command in before)
    assert "--learning_rate 1e-3" in last


def test_args_with_quotes_stay_one_argument(checkout):
    (command,) = planned(checkout, "tokenizer", "ARGS=--data_files 'my texts.jsonl'")
    assert command.endswith("--data_files 'my texts.jsonl'")


def test_a_seed_reruns_the_whole_chain(finished):
    commands = planned(finished, "chain", "SEED=3")
    assert stages_of(commands) == list(TINY)
    assert all("--seed 3" in command for command in commands)


@pytest.mark.parametrize(
    "launch", sorted(path.stem for path in (ROOT / "recipes" / "accelerate_configs").glob("*.yaml"))
)
def test_launch_picks_the_configuration_of_stages_that_train(checkout, launch):
    for command in planned(checkout, "report", f"LAUNCH={launch}"):
        (stage,) = stages_of([command])
        if launch == "cpu" or stage in ("tokenizer", "rank", "preferences", "report"):
            assert command.startswith("ACCELERATE_USE_CPU=true .venv/bin/python scripts/")
        else:
            assert f"accelerate launch --config_file recipes/accelerate_configs/{launch}.yaml" in command


def test_both_kinds_of_pretraining_use_one_script(checkout):
    commands = dict(zip(TINY, planned(checkout, "report"), strict=True))
    assert "scripts/pretrain.py --config recipes/tiny/pretrain_mlm.yaml" in commands["pretrain_mlm"]


def test_a_recipe_without_ranking_skips_it(checkout):
    stages = stages_of(planned(checkout, "chain", "RECIPE=english-small"))
    assert stages == ["tokenizer", "pretrain", "sft", "reward", "ppo", "evaluate", "report"]


def test_results_of_one_recipe_do_not_stand_for_another(finished):
    assert "sft" in stages_of(planned(finished, "chain", "RECIPE=english-small"))


def test_an_annotator_opens_the_page_and_nothing_that_is_ranked_already_is_touched(finished):
    done = make(finished, "-n", "rank", "ANNOTATOR=yuki", "ARGS=--port 7999")
    assert done.returncode == 0, done.stderr
    assert not any("scripts/rank.py" in line for line in done.stdout.splitlines())
    (command,) = (line for line in done.stdout.replace("\\\n", "").splitlines() if "scripts/annotate.py" in line)
    assert "--candidates_file outputs/tiny/candidates/candidates.jsonl" in command
    assert "--log_file annotations/tiny/judgements.jsonl --annotator yuki --port 7999" in " ".join(command.split())


def test_what_people_did_outlives_clean(finished):
    log = finished / "annotations" / "tiny" / "judgements.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text("{}\n")
    assert make(finished, "clean").returncode == 0
    assert log.is_file()


def test_new_judgements_of_people_rerun_the_preferences(finished):
    recipe = finished / "recipes" / "tiny" / "preferences.yaml"
    recipe.write_text(recipe.read_text().replace("outputs/tiny/rank", "annotations/tiny"))
    touch(recipe)
    (finished / "outputs" / "tiny" / "preferences" / "result.json").touch()
    log = finished / "annotations" / "tiny" / "judgements.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text("{}\n")
    now = time.time() + 5
    os.utime(log, (now, now))
    assert stages_of(planned(finished, "preferences")) == ["preferences"]


@pytest.mark.parametrize("arguments", [["help"], []])
def test_help_lists_every_target_and_is_the_default(checkout, arguments):
    done = make(checkout, *arguments)
    assert done.returncode == 0
    assert sorted(re.findall(r"^  make ([a-z_-]+)", done.stdout, re.MULTILINE)) == targets()


NEW_ROW = """    StageRow("greet", title="Greeting", help="Say hello", needs=("tokenizer",), cpu_only=True),
)
# The report"""
NEW_SCRIPT = '''"""Greet.

    python scripts/greet.py --config recipes/tiny/greet.yaml
"""

from dataclasses import dataclass, field

from sandan.run.cli import run


@dataclass
class GreetArguments:
    """Whom to greet."""

    output_dir: str = field(metadata={"help": "Folder of result.json."})
    name: str = field(default="world", metadata={"help": "Who is greeted."})


def main(args, stage):
    stage.finish({"letters": len(args.name)})


if __name__ == "__main__":
    run(main, GreetArguments)
'''


@pytest.mark.slow
def test_a_new_stage_is_a_row_a_script_and_a_recipe_file(checkout):
    (checkout / "src").unlink()
    shutil.copytree(ROOT / "src", checkout / "src", ignore=shutil.ignore_patterns("__pycache__"))
    chain = checkout / "src" / "sandan" / "core" / "chain.py"
    chain.write_text(chain.read_text(encoding="utf-8").replace(")\n# The report", NEW_ROW, 1), encoding="utf-8")
    (checkout / "scripts" / "greet.py").write_text(NEW_SCRIPT, encoding="utf-8")
    (checkout / "recipes" / "tiny" / "greet.yaml").write_text("output_dir: outputs/tiny/greet\nname: Mia\n")
    folder = checkout / "outputs" / "tiny" / "tokenizer"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("{}")
    assert stages_of(planned(checkout, "greet")) == ["greet"]
    assert stages_of(planned(checkout, "report"))[-2:] == ["greet", "report"]
    assert re.search(r"^  make greet +Say hello$", make(checkout, "help").stdout, re.MULTILINE)
    done = make(checkout, "greet", f"PYTHON={sys.executable}", "--no-print-directory")
    assert done.returncode == 0, done.stderr
    result = json.loads((checkout / "outputs" / "tiny" / "greet" / "result.json").read_text(encoding="utf-8"))
    assert (result["stage"], result["metrics"]) == ("greet", {"letters": 3})


@pytest.mark.parametrize("target", ["chain", "sft", "report"])
def test_an_unknown_recipe_is_named(checkout, target):
    done = make(checkout, "-n", target, "RECIPE=nosuch")
    assert done.returncode == 2
    assert "nosuch" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_stage_that_the_recipe_lacks_is_named(checkout):
    done = make(checkout, "-n", "rank", "RECIPE=english-small")
    assert done.returncode == 2
    assert "recipes/english-small/rank.yaml" in done.stderr


def test_clean_removes_only_the_recipe_that_was_named(finished):
    other = finished / "outputs" / "mine" / "sft"
    other.mkdir(parents=True)
    assert make(finished, "clean").returncode == 0
    assert not (finished / "outputs" / "tiny").exists()
    assert other.is_dir()


def test_the_first_run_uses_the_environment_that_it_makes(checkout):
    shutil.rmtree(checkout / ".venv")
    fake = checkout / "python"
    fake.write_text("""#!/bin/sh
if [ "$2" = venv ]; then mkdir -p .venv/bin; cp "$0" .venv/bin/python; fi
echo "$0 $@" >> calls
""")
    fake.chmod(0o755)
    done = make(checkout, "demo", "PYTHON=./python")
    assert done.returncode == 0, done.stderr
    last = (checkout / "calls").read_text().splitlines()[-1]
    assert last == ".venv/bin/python -m sandan.command demo --launch cpu"


def test_setup_installs_once(checkout):
    done = make(checkout, "-n", "setup")
    assert done.returncode == 0
    assert "pip install" not in done.stdout
