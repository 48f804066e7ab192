"""The pages and the notebook of the three steps: the code that they quote is the code, what they show is what one sees."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

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
    assert commands == toy_commands(PAGES[0])
    assert [cell for cell in cells[1:] if not cell.startswith("!")] == [look.code for look in looks(PAGES[0])]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code_cells())


@pytest.mark.slow
def test_the_notebook_shows_what_the_page_shows(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    import nbformat

    if not shutil.which("sandan", path=(programs := str(Path(sys.executable).parent))):
        pytest.skip("the command sandan is not installed beside this Python")
    monkeypatch.setenv("PATH", programs, prepend=os.pathsep)
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=180, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = ["".join(part["text"] for part in cell.outputs if part.get("name") == "stdout") for cell in notebook.cells if cell.cell_type == "code"]  # fmt: skip
    commands = [text for text, cell in zip(printed, code_cells(), strict=True) if cell["source"][0].startswith("!")]
    seen = [
        text for text, cell in zip(printed[1:], code_cells()[1:], strict=True) if not cell["source"][0].startswith("!")
    ]
    assert [without_digits(text) for text in seen] == [without_digits(look.seen) for look in looks(PAGES[0])]
    assert "stopped by stop_on_collapse" in commands[-1]
