"""Who installs the package has everything: in an empty folder the command finds recipes, scripts and data."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv

import pytest
from helpers import OFFLINE, ROOT


pytest.importorskip("setuptools", minversion="77", reason="pyproject.toml asks for it")
pytestmark = pytest.mark.slow
SOURCES = ("setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A virtual environment with the wheel; the packages that it needs are those of the tests' own environment."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    for name in ("src", "scripts", "recipes", "data"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run(
        [*pip, "wheel", str(source), "--no-deps", "--no-build-isolation", "--no-index", "-w", folder], check=True
    )
    (wheel,) = folder.glob("sandan-*.whl")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    packages = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        encoding="utf-8",
    ).stdout.strip()
    # The paths of a .pth file come after the environment's own; .pth files there, as that of this checkout, are not read.
    with open(os.path.join(packages, "tests.pth"), "w", encoding="utf-8") as stream:
        stream.write(sysconfig.get_path("purelib") + "\n")
    install = [*pip, "--python", str(python), "install", "--no-deps", "--no-index", "--ignore-installed"]
    subprocess.run([*install, str(wheel)], check=True)
    return folder / "venv"


@pytest.fixture
def sandan(environment, tmp_path):
    """Runs the installed command in an empty folder."""

    def run(*arguments):
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | OFFLINE
        return subprocess.run(
            [environment / "bin" / "sandan", *arguments],
            check=False,
            cwd=tmp_path,
            env=variables,
            capture_output=True,
            encoding="utf-8",
            timeout=300,
        )

    return run


def result(folder):
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def test_recipes_come_with_the_package(environment, sandan):
    done = sandan("recipes")
    assert done.returncode == 0, done.stderr
    assert "the whole chain on a CPU" in done.stdout
    assert str(environment) in done.stdout


def test_every_stage_of_the_demo_is_planned(environment, sandan):
    lines = sandan("demo", "--plan").stdout.splitlines()
    assert len(lines) == 11
    assert all(line.count(str(environment)) == 3 for line in lines)


def test_a_stage_runs_on_embedded_data_and_says_the_next_command(sandan, tmp_path):
    done = sandan("tokenizer", "--recipe", "tiny")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("next: sandan pretrain --recipe tiny\n")
    # As in a checkout: no path of this machine is in a result.
    inputs = result(tmp_path / "outputs" / "tiny" / "tokenizer")["inputs"]
    assert set(inputs) == {"data/pretrain.jsonl", "data/pretrain_eval.jsonl"}
    assert sandan("tokenizer").stdout == "nothing to do: no stage has to run again\n"


def test_a_stage_runs_on_data_and_a_recipe_of_one_s_own(sandan, tmp_path):
    rows = [{"text": f"After {number} comes {number + 1}."} for number in range(200)]
    (tmp_path / "my_texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert sandan("init", "mine", "--recipe", "tiny").returncode == 0
    options = ["--recipe", "mine", "--data_files", "my_texts.jsonl", "--vocab_size", "300"]
    done = sandan("tokenizer", *options)
    assert done.returncode == 0, done.stderr
    inputs = result(tmp_path / "outputs" / "mine" / "tokenizer")["inputs"]
    assert set(inputs) == {"my_texts.jsonl"}


def test_a_file_of_one_s_own_goes_before_the_embedded_one(sandan, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pretrain.jsonl").write_text('{"txt": "a"}\n')
    done = sandan("tokenizer")
    assert done.returncode == 2
    assert "error: data/pretrain.jsonl:1: " in done.stderr
