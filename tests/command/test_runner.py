"""How stages run: side by side, with one terminal, and what a failure or a signal does to them."""

import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
from helpers import ROOT
from helpers.checkout import make_checkout

from sandan.command.runner import physical_cores, threads_of_a_stage


needs_two_cores = pytest.mark.skipif(physical_cores() < 2, reason="stages run side by side on two cores")

# Stands for every stage's script: does what the file `<stage>.do` in its checkout says, then writes its result.
SCRIPT = """
import os, pathlib, signal, sys, time

config = pathlib.Path(sys.argv[2])
stage = config.stem
if os.environ.get("SANDAN_ONLY_SETTINGS"):
    sys.exit("error: a mistake" if "mistake" in config.read_text() else 0)

def wait_for(name):
    for _ in range(400):
        if pathlib.Path(name).exists():
            return
        time.sleep(0.05)
    sys.exit(f"error: {name} did not come")

def stop(number, frame):
    print(f"stopped by {signal.Signals(number).name}", flush=True)
    sys.exit(75)

for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, stop)
print(f"{stage} writes, with {os.environ['OMP_NUM_THREADS']} threads", flush=True)
pathlib.Path(f"{stage}.began").touch()
what = pathlib.Path(f"{stage}.do")
if what.exists():
    exec(what.read_text())
folder = pathlib.Path("outputs/toy") / stage
folder.mkdir(parents=True, exist_ok=True)
(folder / "result.json").write_text("{}")
"""


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose recipe `toy` has four stages that only wait; pretraining's two do not depend on each other."""
    (tmp_path / "src").symlink_to(ROOT / "src")
    for name in ("scripts", "recipes/toy", "recipes/accelerate_configs"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "recipes" / "accelerate_configs" / "cpu.yaml").touch()
    for stage in ("tokenizer", "pretrain", "pretrain_mlm", "evaluate"):
        (tmp_path / "scripts" / f"{stage}.py").write_text(SCRIPT)
        # A recipe with variables is not forked, so the test does not wait for the heavy imports.
        (tmp_path / "recipes" / "toy" / f"{stage}.yaml").write_text("env: {}\n")
    return tmp_path


def start(checkout, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "sandan.command", *(arguments or ["chain"]), "--recipe", "toy"],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout / "src")} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        start_new_session=True,
    )


def run(checkout, *arguments, **environment):
    process = start(checkout, *arguments, **environment)
    out, _ = process.communicate(timeout=60)
    return process.returncode, out


def wait_for(*paths):
    for _ in range(400):
        if all(path.exists() for path in paths):
            return
        time.sleep(0.05)
    pytest.fail(f"{paths} did not come")


def all_ended(group):
    """Whether every process of the group ends within some seconds; one that its parent has not asked for is a zombie."""
    for _ in range(200):
        alive = [
            process for process in psutil.process_iter(["status"]) if process.info["status"] != psutil.STATUS_ZOMBIE
        ]
        if not any(os.getpgid(process.pid) == group for process in alive if psutil.pid_exists(process.pid)):
            return True
        time.sleep(0.05)
    return False


def finished(checkout):
    return sorted(path.parent.name for path in checkout.glob("outputs/toy/*/result.json"))


@needs_two_cores
def test_stages_that_do_not_need_each_other_run_side_by_side(checkout):
    (checkout / "pretrain.do").write_text("wait_for('pretrain_mlm.began')")
    (checkout / "pretrain_mlm.do").write_text("wait_for('pretrain.began')")
    code, out = run(checkout)
    assert code == 0, out
    assert finished(checkout) == ["evaluate", "pretrain", "pretrain_mlm", "tokenizer"]
    assert re.search(r"^beside it: pretrain_mlm, see outputs/toy/pretrain_mlm.log$", out, re.MULTILINE)
    assert re.search(r"^pretrain_mlm: done in \d+ s, see outputs/toy/pretrain_mlm.log$", out, re.MULTILINE)
    assert "pretrain writes" in out and "pretrain_mlm writes" not in out
    assert "pretrain_mlm writes" in (checkout / "outputs" / "toy" / "pretrain_mlm.log").read_text()
    assert out.index("pretrain_mlm: done") < out.index("evaluate writes")
    assert re.search(r"^4 stages in \d+ s$", out, re.MULTILINE)


def test_a_mistake_in_a_late_stage_shows_before_the_first_one_runs(checkout):
    (checkout / "recipes" / "toy" / "evaluate.yaml").write_text("env: {}  # with a mistake")
    code, out = run(checkout)
    assert (code, out.strip()) == (1, "checking the settings of all stages\nerror: a mistake")
    assert not finished(checkout)


@pytest.mark.slow
def test_an_option_that_does_not_exist_is_refused_before_the_stages_that_it_needs(tmp_path):
    checkout = make_checkout(tmp_path / "checkout")
    done = subprocess.run(
        [sys.executable, "-m", "sandan.command", "ppo", "--learning_rat", "1e-3"],
        check=False,
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout / "src")},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 2
    assert re.search(r"^error: .*learning_rat.*learning_rate", done.stderr, re.MULTILINE), done.stderr
    assert not (checkout / "outputs").exists()


def test_the_reader_of_a_plan_may_stop_reading(checkout):
    command = f"{sys.executable} -m sandan.command chain --recipe toy --plan | true"
    environment = os.environ | {"PYTHONPATH": str(checkout / "src")}
    done = subprocess.run(
        ["bash", "-c", command], check=False, cwd=checkout, env=environment, capture_output=True, encoding="utf-8"
    )
    assert done.stderr == ""


def test_a_second_run_starts_nothing(checkout):
    run(checkout)
    assert run(checkout) == (0, "nothing to do: no stage has to run again\n")


@needs_two_cores
def test_a_stage_beside_another_that_fails_stops_the_chain_with_its_code(checkout):
    (checkout / "pretrain.do").write_text("wait_for('never')")
    (checkout / "pretrain_mlm.do").write_text(
        "wait_for('pretrain.began'); print('error: no memory', flush=True); sys.exit(7)"
    )
    code, out = run(checkout)
    assert code == 7
    assert "pretrain_mlm: exit code 7: error: no memory, see outputs/toy/pretrain_mlm.log" in out
    assert "stopped by SIGTERM" in out
    assert finished(checkout) == ["tokenizer"]


def test_a_stage_that_fails_stops_the_chain_with_its_code(checkout):
    (checkout / "tokenizer.do").write_text("sys.exit(2)")
    code, out = run(checkout)
    assert code == 2
    assert finished(checkout) == [] and "pretrain" not in out


def test_a_stage_that_is_killed_stops_the_chain(checkout):
    (checkout / "tokenizer.do").write_text("os.kill(os.getpid(), signal.SIGKILL)")
    assert run(checkout)[0] == 128 + signal.SIGKILL


@needs_two_cores
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_every_stage(checkout, number):
    for stage in ("pretrain", "pretrain_mlm"):
        (checkout / f"{stage}.do").write_text("wait_for('never')")
    process = start(checkout)
    wait_for(checkout / "pretrain.began", checkout / "pretrain_mlm.began")
    # A terminal sends Ctrl-C to the whole group; a scheduler sends SIGTERM to the one process that it knows.
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 75
    assert f"stopped by {number.name}" in out
    assert f"stopped by {number.name}" in (checkout / "outputs" / "toy" / "pretrain_mlm.log").read_text()
    assert "evaluate" not in out and "Traceback" not in out


@needs_two_cores
@pytest.mark.slow
def test_stages_are_forked_from_a_process_with_the_heavy_imports(checkout):
    for recipe in (checkout / "recipes" / "toy").glob("*.yaml"):
        recipe.write_text("seed: 0\n")
    (checkout / "pretrain.do").write_text(
        "wait_for('pretrain_mlm.began'); print(sys.argv, 'trl' in sys.modules, __name__)"
    )
    (checkout / "evaluate.do").write_text("wait_for('never')")
    process = start(checkout)
    wait_for(checkout / "evaluate.began")
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 75
    assert "['scripts/pretrain.py', '--config', 'recipes/toy/pretrain.yaml'] True __main__" in out
    assert "pretrain_mlm writes" in (checkout / "outputs" / "toy" / "pretrain_mlm.log").read_text()
    assert "stopped by SIGINT" in out and "Traceback" not in out
    assert all_ended(process.pid)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0, 1])
def test_ctrl_c_during_the_heavy_imports_stops_the_chain(checkout, seconds):
    for recipe in (checkout / "recipes" / "toy").glob("*.yaml"):
        recipe.write_text("seed: 0\n")
    process = start(checkout)
    while "checking the settings" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    # Before or after the script of the stage handles signals itself.
    assert process.returncode in (75, 128 + signal.SIGINT)
    assert "Traceback" not in out and not finished(checkout)
    assert all_ended(process.pid)


def test_a_program_that_ends_well_on_ctrl_c_is_done(checkout):
    """The ranking page ends like this."""
    (checkout / "tokenizer.do").write_text("signal.signal(signal.SIGINT, lambda *_: sys.exit()); wait_for('never')")
    process = start(checkout, "tokenizer")
    wait_for(checkout / "tokenizer.began")
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 0


def test_a_user_s_number_of_threads_is_never_exceeded(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [threads_of_a_stage(cores) for cores in (1, 2, 8)] == [1, 1, 4]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert [threads_of_a_stage(cores) for cores in (1, 2, 8)] == [1, 1, 2]


def test_a_stage_is_told_its_number_of_threads(checkout):
    assert "tokenizer writes, with 1 threads" in run(checkout, "tokenizer", OMP_NUM_THREADS="1")[1]
