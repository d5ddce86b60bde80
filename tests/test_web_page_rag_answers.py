"""Answers from documents on the web page, in a real Chromium; documents that mean harm; phones.

With LLMC_SCREENSHOTS=1 the pictures in docs/ are taken anew.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from llmc.runtime.rag.knowledge import KnowledgeBase
from llmc.runtime.server import ServerSettings

from .chromium import PHONE, SMALL, Open, ask, chromium, expect, watched_pages, whole
from .conftest import ROOT
from .fake_knowledge import FakeKnowledge
from .server_harness import RunningServer, fake_llm
from .test_web_page_use import sideways, small_targets
from .web_documents import documents, file, scripted, search, serving_documents, three_documents

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def base() -> FakeKnowledge:
    return three_documents()


@pytest.fixture
def server(base: FakeKnowledge) -> Iterator[RunningServer]:
    with serving_documents(base) as running:
        yield running


@pytest.fixture
def open_page(browser: Any, server: RunningServer) -> Iterator[Open]:
    with watched_pages(browser, server.url) as open_page:
        yield open_page


# Answers --------------------------------------------------------------------------------------------------


def test_citations_open_their_place(
    open_page: Open, base: FakeKnowledge, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    said = ("Charles ", "Babbage ", "designed it [7].")
    asked = scripted(
        monkeypatch, *said, text="**Charles Babbage** designed it [1], `code [2]` and [8].", gate=gate
    )
    page = open_page()
    page.check("#from-documents")
    expect(page.locator("#hint")).to_contain_text("from the documents alone")
    ask(page, "Who designed the Engine in London?")
    expect(page.locator("#stop")).to_be_visible()
    gate.set()
    whole(page)
    assert asked[0]["question"] == "Who designed the Engine in London?"
    expect(page.locator(".prose")).to_have_text("Charles Babbage designed it 1, code [2] and [8].")
    expect(page.locator(".prose .citation")).to_have_count(1)  # no source: it stays text, and so does code
    passage = base.search("Who designed the Engine in London?", top=1)[0]
    half = passage.text[len(passage.text) // 2 :]
    expect(page.locator(".sources blockquote").first).to_have_text(half.strip())
    expect(page.locator(".numbers")).to_contain_text("to first token")
    page.locator(".citation").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#reader-title")).to_have_text("Charles Babbage")
    expect(page.locator("#reader .cited")).to_have_text(half.strip())
    page.keyboard.press("Escape")
    expect(page.locator(".citation")).to_be_focused()
    page.locator(".sources summary").click()
    page.locator(".sources details .source-title").first.click()
    expect(page.locator("#reader")).to_be_visible()
    page.keyboard.press("Escape")
    # Without the box, the chat is what it was.
    page.uncheck("#from-documents")
    expect(page.locator("#hint")).to_contain_text("Enter sends")


def test_a_source_opens_where_it_says_what_is_cited(
    open_page: Open, base: FakeKnowledge, monkeypatch: pytest.MonkeyPatch
) -> None:
    base.store.put("moon.txt", b"# Moon\n\nThe Moon has dark seas. Its mountains are named after the Alps.")
    text = "Mountains there are named after the Alps. There are dark seas. The Alps gave mountains names."
    scripted(monkeypatch, "Mountains", text=text, checked=True)
    page = open_page()
    page.check("#from-documents")
    ask(page, "What is on the Moon?")
    whole(page)
    alps, seas = "Its mountains are named after the Alps.", "The Moon has dark seas."
    expect(page.locator(".sources blockquote")).to_have_text([alps, seas])
    expect(page.locator(".prose .citation")).to_have_count(3)
    for mark, place in zip(page.locator(".prose .citation").all(), (alps, seas, alps), strict=True):
        mark.click()
        expect(page.locator("#reader .cited")).to_have_text(place)
        page.keyboard.press("Escape")


def test_what_the_documents_do_not_hold_is_said(open_page: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, text="The documents do not hold the answer.", found=False)
    page = open_page()
    page.check("#from-documents")
    ask(page, "What does the Engine weigh?")
    whole(page)
    expect(page.locator(".prose")).to_have_text("The documents do not hold the answer.")
    expect(page.locator(".sources .wrong")).to_have_count(0)
    scripted(monkeypatch, text="Ten tons.")
    ask(page, "And what does the Engine cost?")
    whole(page)
    expect(page.locator(".sources .wrong")).to_contain_text("No passage was found that says this")


def test_sources_are_kept_with_the_conversation(open_page: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, "It was", text="Babbage [1].")
    page = open_page()
    page.check("#from-documents")
    page.check("#remember")
    ask(page, "Who designed the Engine?")
    whole(page)
    again = open_page(ready=".answer", context=page.context)
    expect(again.locator("#from-documents")).to_be_checked()
    again.locator(".citation").click()
    expect(again.locator("#reader .cited")).to_be_visible()
    kept = again.evaluate("localStorage.getItem('llmc.page')")
    assert "She wrote the first program" not in kept  # documents' texts stay with the server


def test_an_answer_that_fails_says_so_and_can_be_stopped(
    open_page: Open, base: FakeKnowledge, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    scripted(monkeypatch, "Half", " of it", text="x", gate=gate)
    page = open_page()
    page.check("#from-documents")
    ask(page, "Who designed the Engine?")
    page.click("#stop")
    whole(page)
    expect(page.locator(".answer")).to_contain_text("You stopped this answer.")
    gate.set()

    def broken(*_: Any, **__: Any):
        raise RuntimeError("broken")

    monkeypatch.setattr(base, "search", broken)
    ask(page, "Who?")
    expect(page.locator(".error")).to_contain_text("internal error")


# Text that means harm, keyboards, phones ------------------------------------------------------------------

EVIL = "<img src=x onerror=alert(1)><script>alert(2)</script> \u202eevil\u2066 [1](javascript:alert(3)) Tower"


def test_hostile_documents_are_text(
    open_page: Open, base: FakeKnowledge, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "<img src=x onerror=alert(1)>\u202etxt.txt"
    base.store.put(name, f"# {EVIL}\n\n{EVIL} {EVIL}".encode())
    base.store.put("a.jsonl#x/../../ada.txt", b"# Row\n\nA row")
    scripted(monkeypatch, EVIL, text=f"{EVIL} [1] </button><img src=y>")
    page = open_page()
    documents(page)
    search(page, "Tower <img src=z onerror=alert(4)>")
    passage = page.locator(".passage").first
    expect(passage.locator(".excerpt")).to_contain_text(
        "<img src=x onerror=alert(1)><script>alert(2)</script>"
    )
    passage.locator("summary").click()
    passage.locator("button", has_text="Open").click()
    expect(page.locator("#reader")).to_contain_text("<script>alert(2)</script>")
    page.keyboard.press("Escape")
    page.click("#tab-files")
    expect(page.locator(".file")).to_have_count(5)
    page.locator(".file-name", has_text="Row").click()  # an id with ".." opens itself and nothing else
    expect(page.locator("#reader .reader-text")).to_have_text("# RowA row")
    page.keyboard.press("Escape")
    page.locator(".file", has_text="<img").locator("button", has_text="Delete").click()
    expect(page.locator("#confirm-title")).to_contain_text("<img src=x onerror=alert(1)>")
    page.keyboard.press("Escape")
    expect(page.locator("#confirm")).to_be_hidden()
    assert name in base.store.kept
    page.click("#tab-graph")
    page.wait_for_selector(".node")
    page.click("#leave")
    page.check("#from-documents")
    ask(page, "Tower")
    whole(page)
    page.locator(".prose .citation").last.click()
    expect(page.locator("#reader")).to_be_visible()
    strange = "main, #library, dialog"
    for place in strange.split(", "):
        assert page.locator(f"{place} :is(img, script, iframe, object, style, link)").count() == 0, place
    attributes = "all => all.flatMap(n => [...n.attributes]).filter(a => a.name.startsWith('on')).length"
    assert page.locator("*").evaluate_all(attributes) == 0
    shown = "".join(page.locator(place).first.inner_text() for place in ("main", "#reader"))
    assert not re.search("[\u202a-\u202e\u2066-\u2069]", shown)
    assert "U+202E" in shown
    named = "all => all.flatMap(n => [n.title, n.ariaLabel]).join()"
    assert not re.search("[\u202a-\u202e\u2066-\u2069]", page.locator("*").evaluate_all(named))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_small_phones_scroll_in_one_direction(
    open_page: Open, base: FakeKnowledge, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    long = "w" * 200
    base.store.put(f"{long[:120]}.txt", f"# {long}\n\nTower {long} {long}".encode())
    scripted(monkeypatch, "It is", text=f"Tower {long} [1].")
    page = open_page(**SMALL, reduced_motion="reduce", color_scheme=scheme)

    def fits() -> None:
        assert not sideways(page)
        wide = """() => [...document.querySelectorAll("#library, #library *, dialog[open], dialog[open] *")]
            .filter((node) => node.checkVisibility() && !node.closest("svg, .visually-hidden"))
            .filter((node) => node.getBoundingClientRect().right > innerWidth + 1)
            .map((node) => `${node.localName}.${node.className}`)"""
        assert not page.evaluate(wide)

    documents(page)
    search(page, "Tower")
    expect(page.locator(".passage")).to_have_count(1)
    fits()
    assert not [one for one in small_targets(page) if "citation" not in one]
    page.locator(".passage button", has_text="Open").click()
    expect(page.locator(".cited")).to_be_visible()
    fits()
    page.locator("#reader button", has_text="Close").click()
    page.click("#tab-files")
    expect(page.locator(".file")).to_have_count(4)
    page.set_input_files("#file-input", [file("ada.txt", "# A"), file(f"{long[:100]}.exe", "MZ")])
    expect(page.locator(".upload.failed")).to_have_count(2)
    fits()
    assert not small_targets(page)
    page.click("#tab-graph")
    page.wait_for_selector(".node")
    page.locator(".node.document rect").first.tap()
    fits()
    assert not small_targets(page)
    page.click("#leave")
    page.check("#from-documents")
    ask(page, "Tower")
    whole(page)
    fits()
    page.locator(".citation").tap()
    expect(page.locator("#reader .cited")).to_be_visible()


# Pictures -------------------------------------------------------------------------------------------------

LIVES = {
    "ada": """# Ada Lovelace

Ada Lovelace was born in London in 1815, the daughter of Lord Byron and Annabella Milbanke. Mary Somerville
introduced her to Charles Babbage in 1833.

Her notes on Menabrea's article hold what is often called the first program: a method by which the Analytical
Engine computes Bernoulli numbers.""",
    "babbage": """# Charles Babbage

Charles Babbage designed the Difference Engine and the Analytical Engine. He spoke about the latter in Turin
in 1840, at the invitation of Giovanni Plana.

Joseph Clement built its parts in London.""",
    "menabrea": """# Luigi Menabrea

Luigi Menabrea heard Charles Babbage in Turin and published an article on the Analytical Engine in Geneva in
1842. Ada Lovelace translated it.""",
    "somerville": """# Mary Somerville

Mary Somerville taught mathematics to Ada Lovelace. A college in Oxford bears her name.""",
    "jacquard": """# Joseph Jacquard

Joseph Jacquard made a loom in Lyon that follows punched cards. Charles Babbage took up the cards for the
Analytical Engine.""",
}


@pytest.mark.skipif(
    os.environ.get("LLMC_SCREENSHOTS") != "1", reason="LLMC_SCREENSHOTS=1 takes the pictures anew"
)
def test_pictures(browser: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = (
        "Luigi Menabrea published an article on the Analytical Engine in Geneva. Ada Lovelace translated it. "
    )
    text = f"{said}Menabrea heard Charles Babbage in Turin."
    scripted(monkeypatch, *re.findall(r"\S+\s*", said), text=text, checked=True)
    desktop = {"viewport": {"width": 1280, "height": 800}, "color_scheme": "light"}
    phone = {**PHONE, "color_scheme": "light", "device_scale_factor": 1.5}
    with KnowledgeBase.open(tmp_path / "engines.kb", create=True, embedder="none") as base:
        for name, words in LIVES.items():
            paragraphs = [" ".join(part.split()) for part in words.split("\n\n")]
            base.add_bytes(f"{name}.md", "\n\n".join(paragraphs).encode())
        models, settings = {"qwen2.5-0.5b": fake_llm(context=4096)}, ServerSettings(documents_writable=True)
        with (
            RunningServer(models, settings, {"engines": base}) as server,
            watched_pages(browser, server.url) as op,
        ):
            page = op(**desktop, reduced_motion="reduce")
            page.check("#from-documents")
            ask(page, "Who translated Menabrea's article, and whom had he heard in Turin?")
            whole(page)
            picture(page, "answer")
            page = op(**{**desktop, "color_scheme": "dark"}, reduced_motion="reduce")
            documents(page, "graph")
            expect(page.locator("#picture .node")).not_to_have_count(0)
            page.fill("#graph-form input", "Charles Babbage")
            page.click("#graph-form [type=submit]")
            expect(page.locator("#graph-list h3")).to_have_text("Charles Babbage")
            for name in ("Turin", "Ada Lovelace"):
                page.locator(".neighbour", has_text=name).first.click()
                expect(page.locator("#graph-list h3")).to_have_text(name)
                page.locator(".neighbour", has_text="Charles Babbage").first.click()
                expect(page.locator("#graph-list h3")).to_have_text("Charles Babbage")
            picture(page, "graph")
            page = op(**phone, reduced_motion="reduce")
            documents(page)
            search(page, "Who wrote about the Analytical Engine?")
            expect(page.locator(".passage")).not_to_have_count(0)
            page.evaluate("document.activeElement.blur()")
            picture(page, "search")


def picture(page: Any, name: str) -> None:
    page.mouse.move(0, 0)
    path = ROOT / "docs" / f"web-{name}.png"
    page.screenshot(path=path)
    assert path.stat().st_size <= 200_000
