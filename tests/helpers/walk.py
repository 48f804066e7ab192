"""The pages that walk through the three steps, and their notebook: excerpts of code, commands, and what one sees."""

import ast
import re
import textwrap
from typing import NamedTuple

from helpers import ROOT


PAGES = ("docs/how_it_works.md", "docs/how_it_works.ja.md")
NOTEBOOK = ROOT / "notebooks" / "three_steps.ipynb"
EXCERPT = re.compile(
    r"\[`(?P<name>[\w.]+)`\]\(\.\./(?P<file>[\w/.]+\.py)\)[^\n]*\n\n<!-- excerpt -->\n```python\n(?P<code>.*?)\n```$",
    re.MULTILINE | re.DOTALL,
)
LOOK = re.compile(
    r"^```python\n(?P<code>(?:(?!```).*\n)*)```\n\n```text\n(?P<seen>(?:(?!```).*\n)*)```$", re.MULTILINE
)


class Look(NamedTuple):
    """A few lines of Python with which the reader looks at a model, and what they print."""

    code: str
    seen: str


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def looks(page):
    """The looks of a page, in order."""
    return [Look(found["code"], found["seen"]) for found in LOOK.finditer(read(page))]


def toy_commands(page):
    """The commands of a page for recipe `toys`, in order."""
    return re.findall(r"^sandan .*--recipe toys.*$", read(page), re.MULTILINE)


def source_of(file, name):
    """The code of a function without its docstring, not indented; `name` may be `Class.method`."""
    text = (ROOT / file).read_text(encoding="utf-8")
    node = ast.parse(text)
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    first, numbers = node.body[0], range(node.lineno, node.end_lineno + 1)
    docstring = range(first.lineno, first.end_lineno + 1) if ast.get_docstring(node) else ()
    lines = text.splitlines()
    return textwrap.dedent("\n".join(lines[number - 1] for number in numbers if number not in docstring))


def without_digits(text):
    """The text with every number as `#`: models of different processors agree on words, not on the last digit."""
    return re.sub(r"-?\d+(\.\d+)?", "#", text)
