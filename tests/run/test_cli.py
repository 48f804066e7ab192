"""The command line of every script: help at once, exit codes, one line for a mistake."""

import errno
import re
import signal
import subprocess
import sys

import pytest
from helpers import ROOT
from helpers.arguments import Arguments
from helpers.scripts import run_script

from sandan.core.chain import ROWS
from sandan.core.errors import GateError, UserError
from sandan.run import cli


WITHOUT_TRAINER = ("annotate", "chat", "judge", "preferences", "push", "rank", "report")
SCRIPTS = sorted(path.stem for path in ROOT.glob("scripts/*.py"))


def test_every_stage_of_the_chain_has_a_script():
    assert set(SCRIPTS) == {row.script or row.name for row in ROWS} | {"annotate", "chat", "judge", "push"}


@pytest.mark.parametrize("stage", SCRIPTS)
def test_help_shows_commands_that_exist_and_imports_nothing_slow(stage):
    command = [sys.executable, "-X", "importtime", ROOT / "scripts" / f"{stage}.py", "--help"]
    done = subprocess.run(command, check=False, capture_output=True, encoding="utf-8")
    assert done.returncode == 0
    command = rf"(accelerate launch --config_file (\S+) |python )scripts/{stage}\.py"
    assert re.search(command, done.stdout) and "--help_all" in done.stdout or stage in WITHOUT_TRAINER
    for path in re.findall(r"recipes/\S+\.yaml", done.stdout):
        assert (ROOT / path).is_file(), path
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "datasets", "accelerate", "huggingface_hub", "pandas"}


@pytest.mark.slow
def test_help_all_lists_the_fields_of_the_trainers():
    done = run_script("sft", "--help_all")
    assert done.returncode == 0
    assert all(f"--{name}" in done.stdout for name in ("learning_rate", "lora_r", "data_files", "held_out_share"))


@pytest.mark.parametrize(
    "args, wanted",
    [
        (["--sede", "1"], "did you mean --seed?"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: no such recipe file"),
        ([], "output_dir"),
        (["--output_dir", "", "--recipe_dir", "x"], "output_dir: missing"),
    ],
)
def test_mistake_is_one_line_and_exit_code_2(args, wanted, tmp_path):
    done = run_script("report", *args, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: .+\n", done.stderr) and wanted in done.stderr
    assert not list(tmp_path.iterdir())


def run_here(main, monkeypatch, capsys, tmp_path, *dataclasses):
    monkeypatch.setattr(sys, "argv", ["stage.py", "--output_dir", str(tmp_path / "toy" / "rank")])
    cli.run(main, *dataclasses)
    return capsys.readouterr()


@pytest.fixture
def arguments():
    return Arguments


@pytest.mark.parametrize(
    "error, code",
    [
        (UserError("no"), 2),
        (GateError("score 0.1, needed 0.2"), 1),
        (FloatingPointError("step 3: not finite"), 1),
    ],
)
def test_errors_on_purpose_set_the_exit_code(error, code, arguments, monkeypatch, capsys, tmp_path):
    def main(args, stage):
        raise error

    with pytest.raises(SystemExit) as caught:
        run_here(main, monkeypatch, capsys, tmp_path, arguments)
    assert caught.value.code == code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_other_ranks_keep_quiet(arguments, monkeypatch, capsys, tmp_path):
    def main(args, stage):
        raise UserError("no")

    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        run_here(main, monkeypatch, capsys, tmp_path, arguments)
    assert capsys.readouterr().err == "" and not (tmp_path / "toy").exists()


def test_success_names_the_next_command(arguments, monkeypatch, capsys, tmp_path):
    output = run_here(lambda args, stage: stage.finish({}), monkeypatch, capsys, tmp_path, arguments).out
    assert output.splitlines()[-1] == "next: make preferences RECIPE=toy"


def test_a_signal_ends_a_stage_with_the_code_for_trying_again(arguments, monkeypatch, capsys, tmp_path):
    def main(args, stage):
        (stage.output_dir / "result.json").write_text("{}")
        signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        run_here(main, monkeypatch, capsys, tmp_path, arguments)
    assert caught.value.code == 75
    assert capsys.readouterr().err == "stopped by SIGTERM; the same command goes on\n"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    "error, wanted",
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "a.bin"),
            "error: a.bin: cannot be read or written: No space",
        ),
        (
            RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos"),
            "could not be written to its end",
        ),
    ],
)
def test_a_full_disk_is_one_line(error, wanted, arguments, monkeypatch, capsys, tmp_path):
    def main(args, stage):
        raise error

    with pytest.raises(SystemExit) as caught:
        run_here(main, monkeypatch, capsys, tmp_path, arguments)
    assert caught.value.code == 2 and wanted in capsys.readouterr().err


def test_a_fault_of_the_program_keeps_its_traceback_and_says_how_to_report_it(
    arguments, monkeypatch, capsys, tmp_path, caplog
):
    with pytest.raises(ZeroDivisionError):
        run_here(lambda args, stage: 1 / 0, monkeypatch, capsys, tmp_path, arguments)
    assert "Please report it" in caplog.text
