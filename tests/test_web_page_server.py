"""The web page from the real server, in a real Chromium."""

from __future__ import annotations

import pytest

from .chromium import ask, chromium, expect, watched_pages, whole
from .server_harness import fake_llm, serving, wait_until

pytestmark = pytest.mark.slow


def test_the_page_that_is_served_asks_shows_and_stops():
    llm = fake_llm(context=400)
    with serving(llm) as server, chromium() as browser, watched_pages(browser, server.url) as open_page:
        gate = llm.executor.gate  # pyright: ignore[reportAttributeAccessIssue]
        gate.clear()
        page = open_page()
        ask(page, "Hello")
        wait_until(lambda: server.service.active == 1)
        page.locator("#stop").click()
        wait_until(lambda: server.service.active == 0)
        gate.set()
        wait_until(server.idle)
        page = open_page()
        ask(page, "Hello again")
        whole(page)  # as long as the context holds: nothing says otherwise
        expect(page.locator(".numbers")).to_contain_text("to first token")
        assert server.service.metrics.registry.get_sample_value(
            "vllm:request_success_total", {"model_name": "tiny", "finished_reason": "length"}
        )
