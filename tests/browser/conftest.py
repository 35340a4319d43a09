"""Pages in a real browser. Without one these tests are skipped, loudly; with GLASSHOUSE_REQUIRE_BROWSER=1, as in
continuous integration, that is an error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.browser import chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

OpenPage = Callable[..., "Page"]


@pytest.fixture(scope="module")
def browser(request: pytest.FixtureRequest) -> Iterator[Browser]:
    reason = chromium.missing()
    if reason is not None:
        if os.environ.get("GLASSHOUSE_REQUIRE_BROWSER"):
            pytest.fail(reason)
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n!!! {reason}\n", file=sys.stderr, flush=True)
        pytest.skip(reason)
    with chromium.launched() as running:
        yield running


@pytest.fixture
def open_page(browser: Browser, tmp_path: Path) -> Iterator[OpenPage]:
    """Opens HTML as a file, offline; fails where the page complained or asked for anything else."""
    opened = []

    def open_(html: str, *, scheme: str = "light", width: int = 1280, height: int = 800) -> Page:
        path = tmp_path / f"page{len(opened)}.html"
        path.write_text(html, encoding="utf-8")
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme=scheme,
            offline=True,
            accept_downloads=True,
        )
        page = context.new_page()
        page.set_default_timeout(60_000)
        opened.append((context, chromium.Console(page), path.as_uri()))
        page.goto(path.as_uri())
        return page

    yield open_
    for context, console, uri in opened:
        context.close()
        assert console.errors == [], "the page complained"
        assert [url for url in console.requests if url != uri and not url.startswith("blob:")] == []
