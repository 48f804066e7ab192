"""The command `sandan`: its help, its mistakes, and the commands that start no stage."""

import os
import re
import subprocess
import sys
import time

import pytest
import yaml
from helpers import ROOT
from helpers.checkout import TINY, planned

from sandan.command.main import main
from sandan.command.recipes import Recipe
from sandan.core.chain import CHAIN


@pytest.fixture
def sandan(capsys):
    """`sandan("recipes")` is the exit code, what was printed, and the message of a mistake."""

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return run


def test_help_names_every_stage(sandan):
    code, out, _ = sandan("--help")
    assert code == 0
    assert all(re.search(rf"^    {stage}\b", out, re.MULTILINE) for stage in CHAIN)


def test_without_arguments_it_shows_help(sandan):
    assert sandan() == sandan("--help")


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_answer_at_once(option):
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", "sandan.command", option], check=True, capture_output=True)
        seconds.append(time.monotonic() - began)
    assert min(seconds) < 0.5


def test_a_plan_needs_only_the_standard_library(checkout):
    done = subprocess.run(
        [sys.executable, "-S", "-m", "sandan.command", "chain", "--plan"],
        check=True,
        env=os.environ | {"PYTHONPATH": "src"},
        capture_output=True,
        encoding="utf-8",
    )
    assert len(done.stdout.splitlines()) == len(TINY)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["chian"], "chian: no such command of sandan; did you mean chain?"),
        (["sft", "--recipe", "tinny"], "--recipe tinny: no such recipe; did you mean tiny?"),
        (
            ["sft", "--recipe", "zzz"],
            "--recipe zzz: no such recipe; there are: english-small, smollm2-instructions, tiny, toys",
        ),
        (["sft", "--recipe", "./nowhere"], "--recipe ./nowhere: no folder with a recipe's YAML files"),
        (["chain", "--launch", "singlegpu"], "--launch singlegpu: no such launch file; did you mean single_gpu?"),
        (["rank", "--recipe", "english-small"], "recipes/english-small/rank.yaml: no such file"),
        (
            ["chain", "--learning_rate", "1"],
            "--learning_rate: no option of sandan chain; there are: --recipe, --launch,",
        ),
        (["chain", "--lauch", "cpu"], "--lauch: no option of sandan chain; did you mean --launch?"),
        (["demo", "--until", "sft"], "--until: no option of sandan demo; "),
        (["recipes", "--nonsense"], "--nonsense: no such option"),
        (["init", "../mine"], "../mine: not a name for a recipe"),
        (["init", "accelerate_configs"], "accelerate_configs: not a name for a recipe"),
        (["init", "tiny"], "recipes/tiny: is there already; nothing was changed"),
    ],
)
def test_a_mistake_is_one_line(checkout, sandan, arguments, message):
    code, out, err = sandan(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_options_of_a_stage_reach_its_script_as_they_are(checkout, sandan):
    options = ["--data_files", "my texts.jsonl", "--learning_rate=-1e-3", "--seed", "-1", "--no_use_cpu"]
    _, out, _ = sandan("pretrain", *options, "--recipe", "tiny", "--plan")
    tokenizer, pretrain = out.splitlines()
    assert "my texts" not in tokenizer and "--seed" not in tokenizer
    assert pretrain.endswith("--data_files 'my texts.jsonl' --learning_rate=-1e-3 --seed -1 --no_use_cpu")


def test_a_chain_can_end_before_the_end(checkout, sandan):
    _, out, _ = sandan("chain", "--until", "sft", "--seed", "3", "--learning_rate", "1", "--plan")
    lines = out.splitlines()
    assert len(lines) == 3 and all("--seed 3" in line for line in lines)
    assert [line.endswith("--learning_rate 1") for line in lines] == [False, False, True]


def test_demo_is_the_chain_of_tiny(checkout, sandan):
    assert sandan("demo", "--plan") == sandan("chain", "--recipe", "tiny", "--plan")


def test_make_and_the_command_plan_the_same(checkout, sandan):
    commands = [line.partition("scripts/")[2] for line in sandan("chain", "--plan")[1].splitlines()]
    assert [line.partition("scripts/")[2] for line in planned(checkout, "chain")] == commands


def test_a_recipe_can_be_a_folder(checkout, sandan):
    (checkout / "recipes" / "tiny").rename(checkout / "elsewhere")
    _, out, _ = sandan("sft", "--recipe", "./elsewhere", "--plan")
    assert "--config elsewhere/sft.yaml" in out


def test_recipes_are_listed_with_what_they_are_for(checkout, sandan):
    _, out, _ = sandan("recipes")
    assert re.search(r"^english-small +English on one GPU +\(recipes/english-small\)$", out, re.MULTILINE)
    assert re.search(r"^tiny +the whole chain on a CPU +\(recipes/tiny\)$", out, re.MULTILINE)


def test_a_copied_recipe_writes_to_its_own_folder(checkout, sandan):
    code, _, _ = sandan("init", "mine", "--recipe", "tiny")
    assert code == 0
    files = sorted((checkout / "recipes" / "mine").glob("*.yaml"))
    assert {path.stem for path in files} == set(TINY)
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert "outputs/tiny" not in text and "annotations/tiny" not in text
        assert yaml.safe_load(text)["output_dir"] == f"outputs/mine/{path.stem}"
    assert "a copy of tiny" in sandan("recipes")[1]
    assert len(sandan("chain", "--recipe", "mine", "--plan")[1].splitlines()) == len(TINY)


def test_a_file_named_in_the_recipe_reruns_its_stage(checkout, sandan):
    sandan("init", "mine")
    (checkout / "my_texts.jsonl").write_text('{"text": "a"}\n')
    recipe = checkout / "recipes" / "mine" / "tokenizer.yaml"
    recipe.write_text(recipe.read_text().replace("data/pretrain.jsonl", "my_texts.jsonl"))
    result = checkout / "outputs" / "mine" / "tokenizer" / "result.json"
    result.parent.mkdir(parents=True)
    result.write_text("{}")
    assert sandan("tokenizer", "--recipe", "mine")[1] == "nothing to do: no stage has to run again\n"
    later = time.time() + 5
    os.utime("my_texts.jsonl", (later, later))
    assert len(sandan("tokenizer", "--recipe", "mine", "--plan")[1].splitlines()) == 1


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_completes_stages_and_options(sandan, shell):
    pytest.importorskip("shtab")
    code, out, _ = sandan("completion", shell)
    assert code == 0
    assert all(word in out for word in ("pretrain_mlm", "--launch", "--annotator"))


def test_completion_without_its_package_says_what_to_install(sandan, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    code, _, err = sandan("completion", "bash")
    assert (code, err.count("\n")) == (2, 1)
    assert "pip install shtab" in err


def test_push_hands_its_options_to_the_script(checkout, sandan):
    _, out, _ = sandan("push", "--hub_id", "alice/tiny", "--public", "true", "--plan")
    assert out.endswith("scripts/push.py --recipe_dir outputs/tiny --hub_id alice/tiny --public true\n")


def test_help_of_a_stage_shows_both_the_command_s_and_the_script_s_options():
    done = subprocess.run(
        [sys.executable, "-m", "sandan.command", "report", "--help"],
        check=True,
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.stdout.index("--launch FILE") < done.stdout.index("--recipe_dir RECIPE_DIR")


@pytest.mark.slow
def test_check_looks_at_every_stage_and_names_those_that_are_not_ready(checkout):
    (checkout / "recipes" / "tiny" / "sft.yaml").open("a").write("learning_rat: 1\n")
    done = subprocess.run(
        [sys.executable, "-m", "sandan.command", "check"],
        check=False,
        env=os.environ | {"PYTHONPATH": "src"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 2
    assert re.findall(r"── tiny: (\w+) ──", done.stdout) == list(TINY)
    assert "learning_rat: unknown key; did you mean learning_rate?" in done.stderr
    assert done.stderr.endswith("error: not ready: sft\n")
    assert not (checkout / "outputs").exists()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("output_dir:\nseed: 0\n", None),
        ("output_dir: null\n", None),
        ("output_dir: 'outputs/my results/sft'\n", "outputs/my results/sft"),
        ('output_dir: "outputs/it\'s/sft" # there\n', "outputs/it's/sft"),
        ("output_dir: outputs/mine/sft # there\n", "outputs/mine/sft"),
    ],
)
def test_a_setting_is_read_as_yaml_reads_it(tmp_path, text, value):
    (tmp_path / "sft.yaml").write_text(text)
    assert yaml.safe_load(text)["output_dir"] == value
    assert Recipe(tmp_path).setting("sft", "output_dir") == value


def test_results_without_a_report_can_be_pushed(checkout, sandan):
    (checkout / "recipes" / "mine").mkdir()
    (checkout / "recipes" / "mine" / "sft.yaml").write_text("output_dir: outputs/mine/sft\n")
    code, out, _ = sandan("push", "--recipe", "mine", "--hub_id", "alice/mine", "--plan")
    assert code == 0 and "--recipe_dir outputs/mine " in out
