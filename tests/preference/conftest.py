"""Ranking pages that are served from the tests' own process."""

import contextlib

import pytest
from helpers.browser import serve_page


@pytest.fixture
def serve_here(tmp_path):
    """`serve_here(rows, **options)` serves a page from this process until the test ends: (address, path of the log)."""
    with contextlib.ExitStack() as stack:
        yield lambda rows, **options: stack.enter_context(serve_page(tmp_path, rows, **options))
