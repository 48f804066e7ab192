"""One browser for all tests of the ranking page, and pages that are served from the tests' own process."""

import contextlib

import pytest
from helpers.browser import CHROMIUM, FLAGS, Watch, serve_page


@pytest.fixture(scope="package")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium):
    """`open_page(address, **context)` opens a page in a context of its own; all are checked at the end."""
    opened = []

    def open_one(address, **options):
        context = chromium.new_context(**({"viewport": {"width": 1280, "height": 860}} | options))
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.watch = Watch(page)
        opened.append((context, page))
        page.goto(address)
        return page

    yield open_one
    for context, page in opened:
        page.watch.check()
        context.close()


@pytest.fixture
def serve_here(tmp_path):
    """`serve_here(rows, **options)` serves a page from this process until the test ends: (address, path of the log)."""
    with contextlib.ExitStack() as stack:
        yield lambda rows, **options: stack.enter_context(serve_page(tmp_path, rows, **options))
