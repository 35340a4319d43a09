"""The system's Chromium, driven headless; and what a page said on its console."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

INSTALL = "apt-get install -y chromium, and the dev extra's playwright"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def missing() -> str | None:
    """Why no browser can be driven here, or None."""
    try:
        import playwright  # noqa: F401
    except ModuleNotFoundError:
        return f"playwright is not installed: the pages were NOT tried in a browser. {INSTALL}"
    if find() is None:
        return f"Chromium is not installed: the pages were NOT tried in a browser. {INSTALL}"
    return None


def find() -> str | None:
    """The path of a Chromium: GLASSHOUSE_CHROMIUM, or one of the usual names."""
    return os.environ.get("GLASSHOUSE_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def launched() -> Iterator[Browser]:
    """A browser, closed at the end."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=find(), args=arguments, timeout=120_000)
        try:
            yield browser
        finally:
            browser.close()


class Console:
    """Errors, warnings and requests of a page, as they come."""

    def __init__(self, page: Page) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        page.on(
            "console",
            lambda message: (
                self.errors.append(message.text) if message.type in ("error", "warning") else None
            ),
        )
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
