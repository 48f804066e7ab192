"""The pages and the notebook of the three steps: the code that they quote is the code, what they show is what one sees."""

import json
import os
import re
import sys

import pytest
from helpers import OFFLINE
from helpers.walk import EXCERPT, NOTEBOOK, PAGES, looks, read, source_of, toy_commands, without_digits


def code_cells():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("page", PAGES)
def test_excerpts_are_the_source(page):
    found = [match.groupdict() for match in EXCERPT.finditer(read(page))]
    assert len(found) == read(page).count("<!-- excerpt -->") >= 6
    for excerpt in found:
        source = source_of(excerpt["file"], excerpt["name"])
        assert f"\n{excerpt['code']}\n" in f"\n{source}\n", f"{page}: {excerpt['name']} is now:\n{source}"


def test_both_pages_have_the_same_code_pictures_and_formulas():
    shapes = []
    for page in PAGES:
        text = read(page)
        blocks = re.findall(r"^```(?:bash|python|text|math)\n.*?^```$", text, re.MULTILINE | re.DOTALL)
        images, headings = re.findall(r'src="([^"]+)"', text), re.findall(r"^#+ ", text, re.MULTILINE)
        links = {link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("how_it_works")}
        shapes.append((blocks, images, headings, links))
    assert shapes[0] == shapes[1]


def test_page_and_notebook_have_the_same_toys():
    cells = ["".join(cell["source"]) + "\n" for cell in code_cells()]
    commands = [line.removeprefix("!") for cell in cells for line in cell.splitlines() if line.startswith("!")]
    assert commands == ["sandan chain --recipe toys", toy_commands(PAGES[0])[-1]]
    assert [cell for cell in cells[1:] if not cell.startswith("!")] == [look.code for look in looks(PAGES[0])]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code_cells())


@pytest.fixture
def sandan(tmp_path, monkeypatch):
    """A folder in which the shell finds this Python's command `sandan`, however it was installed."""
    program = tmp_path / "bin" / "sandan"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m sandan.command "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    return tmp_path


@pytest.mark.slow
def test_the_notebook_shows_what_the_page_shows(sandan):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=180, resources={"metadata": {"path": str(sandan)}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"][1:]
    commands, seen = [], []
    for cell in cells:
        printed = "".join(part.text for part in cell.outputs if part.get("name") == "stdout")
        (commands if cell.source.startswith("!") else seen).append(printed)
    assert [without_digits(text) for text in seen] == [without_digits(look.seen) for look in looks(PAGES[0])]
    assert "stopped by stop_on_collapse" in commands[-1]
