"""The web page in a real Chromium: starting it, opening pages that are watched, what tests ask of them.

Needs playwright and a Chromium of the system (`apt-get install chromium`, or LLMC_CHROMIUM names one); tests
that import this are skipped where either is absent.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect

CHROMIUM = os.environ.get("LLMC_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
DESKTOP = {"viewport": {"width": 1280, "height": 860}}
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
SMALL = {"viewport": {"width": 320, "height": 640}, "has_touch": True, "is_mobile": True}

Open = Callable[..., Any]
"""Opens the page and waits for `ready`. `context=` another page's shares its storage, else it gets a new one
with the options given."""


@contextmanager
def chromium() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium: install the system's package, or set LLMC_CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        # Chromium's own sandbox does not work for root, whom containers run as.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def watched_pages(browser: Any, url: str) -> Iterator[Open]:
    """At the end: no dialog came, no other origin was asked for anything, no policy was violated, no script
    failed."""
    wrong: list[str] = []
    contexts: list[Any] = []

    def opened(*, ready: str = "#empty h2", context: Any = None, **options: Any) -> Any:
        if context is None:
            context = browser.new_context(**{**DESKTOP, **options})
            context.set_default_timeout(15_000)
            contexts.append(context)
        page = context.new_page()
        _watch(page, url, wrong)
        page.goto(url)
        page.wait_for_selector(ready)
        return page

    try:
        yield opened
    finally:
        for context in contexts:
            context.close()
    assert not wrong, wrong


def _watch(page: Any, url: str, wrong: list[str]) -> None:
    def console(message: Any) -> None:
        # The browser's own line for each answer that is an error; the tests look at what the page says.
        if message.type in {"error", "warning"} and "Failed to load resource" not in message.text:
            wrong.append(f"console: {message.text}")

    def dialog(shown: Any) -> None:
        wrong.append(f"dialog: {shown.message}")
        shown.dismiss()

    def request(asked: Any) -> None:
        if not asked.url.startswith((url, f"blob:{url}", "data:image/svg+xml")):
            wrong.append(f"request: {asked.url}")

    page.on("console", console)
    page.on("dialog", dialog)
    page.on("request", request)
    page.on("pageerror", lambda failed: wrong.append(f"script: {failed}"))


def ask(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.click("#send")


def whole(page: Any) -> None:
    """Waits until no answer comes any more."""
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator(".live")).to_have_count(0)
