"""The files that people who join read, and those that GitHub reads: they say what is true, and they are well formed."""

import re
import shlex
import subprocess
import sys
from datetime import date

import pytest
import yaml
from helpers import ROOT
from helpers.checkout import make, make_checkout, targets
from helpers.oldest_versions import oldest_versions

from sandan._version import __version__


FORMS = sorted(ROOT.glob(".github/ISSUE_TEMPLATE/*.yml"))
WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))
FIELDS = {"markdown", "textarea", "input", "dropdown", "checkboxes"}
# What CFF 1.2.0 requires, and what it allows of what the file has.
CFF_REQUIRED = {"cff-version", "message", "title", "authors"}
CFF_ALLOWED = CFF_REQUIRED | {"type", "license", "version", "keywords", "date-released", "repository-code", "abstract"}


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def load(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", [*FORMS, *WORKFLOWS], ids=lambda path: path.name)
def test_yaml_is_a_table_without_repeated_keys(path):
    assert isinstance(load(path), dict)
    nodes = [yaml.compose(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value]
            assert len(keys) == len(set(keys)), f"{path.name}: {keys}"
            nodes += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value


# ---------------------------------------------------------------------------------------------------------- citation


def test_the_citation_is_of_this_version():
    citation = load(ROOT / "CITATION.cff")
    assert set(citation) >= CFF_REQUIRED
    assert set(citation) <= CFF_ALLOWED
    assert citation["cff-version"] == "1.2.0"
    assert citation["authors"] == [{"name": "The sandan authors"}]
    assert (citation["type"], citation["license"]) == ("software", "Apache-2.0")
    assert citation["version"] == __version__


def test_the_changelog_is_of_this_version():
    text = read("CHANGELOG.md")
    sections = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", text, re.MULTILINE)
    assert sections[0] == ("Unreleased", "")
    for _, day in sections[1:]:
        date.fromisoformat(day)
    kinds = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert __version__ in text


# ------------------------------------------------------------------------------------------------------ CONTRIBUTING


def test_places_that_contributing_names_exist():
    named = re.findall(
        r"`((?:src|tests|scripts|recipes|docs)/[\w./-]+|[\w]+\.(?:cfg|txt|md))`", read("CONTRIBUTING.md")
    )
    assert len(named) > 10
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_tests_that_contributing_names_exist():
    defined = {
        name
        for path in ROOT.glob("tests/*/test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    named = set(re.findall(r"`(test_\w+)`", read("CONTRIBUTING.md")))
    assert named
    assert named <= defined


def test_sections_that_contributing_lists_exist():
    text = read("CONTRIBUTING.md")
    headings = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^## (.+)$", text, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= headings


# ------------------------------------------------------------------------------------------------------------ GitHub


def test_there_is_a_form_for_faults_and_one_for_wishes():
    assert {path.stem for path in FORMS} == {"bug", "feature", "config"}


@pytest.mark.parametrize("path", [path for path in FORMS if path.stem != "config"], ids=lambda path: path.stem)
def test_a_form_has_what_github_asks_for(path):
    form = load(path)
    assert form["name"]
    assert form["description"]
    asked = [field for field in form["body"] if field["type"] != "markdown"]
    assert asked
    assert {field["type"] for field in form["body"]} <= FIELDS
    assert all(field["attributes"]["label"] for field in asked)
    names = [field["id"] for field in asked]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_only_read_and_ends(path):
    workflow = load(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["cancel-in-progress"]
    for name, job in workflow["jobs"].items():
        assert "permissions" not in job, name
        assert job["timeout-minutes"] <= 180, name
        actions = [step["uses"] for step in job["steps"] if "uses" in step]
        assert all(re.fullmatch(r"actions/[\w-]+@v\d+(\.\d+\.\d+)?", action) for action in actions), actions


def test_the_workflow_runs_targets_that_exist():
    lines = [
        line
        for path in WORKFLOWS
        for job in load(path)["jobs"].values()
        for step in job["steps"]
        for line in step.get("run", "").splitlines()
    ]
    assert all(line.startswith("make ") for line in lines), lines
    goals = {goal for line in lines for goal in shlex.split(line)[1:] if "=" not in goal}
    assert goals <= set(targets())
    assert goals == {"setup", "setup-oldest", "quality", "docs", "test-fast", "test"}


def test_the_workflow_runs_the_lowest_python_that_setup_allows():
    lowest = re.search(r"python_requires = >=(\S+)", read("setup.cfg"))[1]
    jobs = load(ROOT / ".github" / "workflows" / "test.yml")["jobs"]
    assert lowest in jobs["fast"]["strategy"]["matrix"]["python"]
    assert jobs["oldest"]["steps"][1]["with"]["python-version"] == lowest


# --------------------------------------------------------------------------------------------------- oldest versions

SETUP = """[options]
install_requires =
    torch>=2.11,<2.14
[options.extras_require]
ui =
    gradio>=6.31,<7
dev =
    gradio>=6.31,<7
    py_test>=9
"""


def test_oldest_versions_are_the_lower_bounds_once_each():
    assert oldest_versions(SETUP) == ["gradio==6.31", "py_test==9", "torch==2.11"]


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("torch>=2.11,<2.14", "torch", "torch: expected name>=lowest"),
        ("torch>=2.11,<2.14", "torch==2.11", "torch==2.11: expected name>=lowest"),
        ("dev =\n    gradio>=6.31,<7", "dev =\n    gradio>=6.30,<7", "gradio: two lower bounds, 6.31 and 6.30"),
    ],
)
def test_a_requirement_without_one_lower_bound_is_refused(old, new, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        oldest_versions(SETUP.replace(old, new))


def test_setup_has_a_lower_bound_for_each_package():
    program = ROOT / "tests" / "helpers" / "oldest_versions.py"
    printed = subprocess.run([sys.executable, "-S", program], check=True, capture_output=True, encoding="utf-8").stdout
    lines = printed.splitlines()
    assert lines == oldest_versions(read("setup.cfg"))
    assert {"torch", "transformers", "trl", "gradio", "pytest"} <= {line.partition("==")[0] for line in lines}


def test_setup_oldest_installs_the_lower_bounds(tmp_path):
    checkout = make_checkout(tmp_path / "checkout")
    (checkout / "tests").symlink_to(ROOT / "tests")
    (checkout / ".venv" / "bin").unlink()
    fake = checkout / ".venv" / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho "$@" > installed\n')
    fake.chmod(0o755)
    done = make(checkout, "setup-oldest", f"PYTHON={sys.executable}")
    assert done.returncode == 0, done.stderr
    installed = (checkout / "installed").read_text()
    assert "--constraint .venv/oldest.txt --editable .[dev]" in installed
    assert (checkout / ".venv" / "oldest.txt").read_text().splitlines() == oldest_versions(read("setup.cfg"))
    assert (checkout / ".venv" / ".ready").exists()


def test_pinned_versions_are_within_the_bounds():
    from packaging.requirements import Requirement

    pinned = {}
    for line in read("constraints.txt").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            pinned[requirement.name.lower()] = next(iter(requirement.specifier)).version
    checked = 0
    for line in read("setup.cfg").split():
        if re.fullmatch(r"[\w-]+>=[\w.]+,<[\w.]+", line):
            requirement = Requirement(line)
            if requirement.name in pinned:
                checked += 1
                assert requirement.specifier.contains(pinned[requirement.name]), line
    assert checked > 20
