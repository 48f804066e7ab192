"""What `mkdocs` does to the pages so that they read on the site as they do in the repository."""

import os
import re
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])+)\]\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")
EQUATION = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# A block of code, in which nothing is a link.
CODE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
# Where the files are that are not on the site, for example https://github.com/owner/sandan/blob/main
REPOSITORY = os.environ.get("SANDAN_REPOSITORY_URL", "")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the page's text: the README as the first page, and links to files of the repository that hold.

    A link to a file that is not on the site leads to the repository if its address is known, else only its text stays.
    """
    source = Path(page.file.src_uri)
    folder = ROOT / "docs"
    if source.name == "index.md":
        markdown = (ROOT / "README.md").read_text(encoding="utf-8")
        markdown = markdown.replace('src="docs/', 'src="')
        folder = ROOT

    def link(match: re.Match) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = (folder / target).resolve()
        if not path.is_relative_to(ROOT):
            return text
        if path.is_relative_to(ROOT / "docs") and path.is_file():
            return f"[{text}]({path.relative_to(ROOT / 'docs')}{anchor})"
        if path.name == "README.md" and path.parent == ROOT:
            return f"[{text}](index.md{anchor})"
        return f"[{text}]({REPOSITORY}/{path.relative_to(ROOT)}{anchor})" if REPOSITORY else text

    # GitHub's fence of an equation is not the site's.
    markdown = EQUATION.sub(r"$$\n\1$$", markdown)
    parts = CODE.split(markdown)
    return "".join(part if number % 2 else LINK.sub(link, part) for number, part in enumerate(parts))
