"""The documents' part of the web page, in a real Chromium and on the real server: files, searching, graph."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
from llmc.runtime.server import ServerSettings

from .chromium import Open, chromium, expect, watched_pages
from .conftest import ROOT
from .fake_knowledge import FakeKnowledge
from .server_harness import RunningServer, fake_llm, serving
from .test_web_page_use import focused
from .web_documents import documents, file, search, serving_documents, three_documents

pytestmark = pytest.mark.slow

VENDOR = ROOT / "runtime" / "server" / "static" / "vendor"


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


# Files and searching --------------------------------------------------------------------------------------


def test_a_file_is_added_found_opened_and_deleted(open_page: Open, base: FakeKnowledge) -> None:
    page = open_page()
    documents(page, "files")
    expect(page.locator(".file")).to_have_count(3)
    text = "# The sea\n\n" + "Waves come and go. " * 200 + "\n\nThe deepest place is called Challenger Deep."
    page.set_input_files("#file-input", [file("sea.md", text)])
    expect(page.locator(".upload")).to_contain_text("added")
    expect(page.locator(".file-name")).to_have_text(["Ada Lovelace", "Charles Babbage", "The sea", "Turin"])
    expect(page.locator("#files-state")).to_have_text("4 documents")
    page.click("#tab-search")
    search(page, "What are the deepest places called?")
    first = page.locator(".passage").first
    expect(first.locator("h3")).to_have_text("The sea")
    expect(first.locator("mark")).to_have_text(["deepest", "place", "called"])
    first.locator("button", has_text="Open").click()
    cited = page.locator("#reader .cited")
    expect(cited).to_have_text("The deepest place is called Challenger Deep.")
    expect(cited).to_be_in_viewport()
    assert page.locator("#reader .reader-text").evaluate("node => node.scrollTop") > 0
    expect(page.locator("#reader")).to_contain_text("Waves come and go.")
    page.keyboard.press("Escape")
    expect(page.locator("#reader")).to_be_hidden()
    page.click("#tab-files")
    row = page.locator(".file", has_text="The sea")
    row.locator("button", has_text="Delete").click()
    expect(page.locator("#confirm")).to_contain_text("Delete sea.md?")
    page.click("#confirm [value=no]")
    assert "sea.md" in base.store.kept
    row.locator("button", has_text="Delete").click()
    page.click("#confirm [value=yes]")
    expect(page.locator(".file")).to_have_count(3)
    assert "sea.md" not in base.store.kept
    page.click("#tab-search")
    expect(page.locator(".passage")).to_have_count(0)  # what was found is of documents that were
    search(page, "deepest")
    expect(page.locator("#search-state")).to_have_text("Nothing was found.")


def test_each_file_says_what_became_of_it(open_page: Open, base: FakeKnowledge) -> None:
    page = open_page()
    documents(page, "files")
    files = [
        file("x.exe", "MZ"),
        file("big.txt", "x" * 20_001),
        file("bad.txt", b"\xff\xfe\x81"),
        file("ada.txt", "# New"),
    ]
    page.set_input_files("#file-input", [*files, file("good.txt", "# Good")])
    expect(page.locator(".upload", has_text="good.txt")).to_contain_text("added")
    expect(page.locator(".upload", has_text="x.exe")).to_contain_text("cannot be read as documents")
    expect(page.locator(".upload", has_text="big.txt")).to_contain_text("20 kB at most")
    expect(page.locator(".upload", has_text="bad.txt")).to_contain_text("is not text")
    taken = page.locator(".upload", has_text="ada.txt")
    expect(taken).to_contain_text("already")
    assert base.store.kept["ada.txt"][0].title == "Ada Lovelace"
    taken.locator("button", has_text="Replace it").click()
    expect(taken).to_contain_text("added")
    assert base.store.kept["ada.txt"][0].title == "New"
    page.locator(".upload", has_text="x.exe").locator("button", has_text="Dismiss").click()
    expect(page.locator(".upload")).to_have_count(4)
    expect(page.locator(".file")).to_have_count(4)


def test_files_are_dropped_and_stopped(open_page: Open, base: FakeKnowledge) -> None:
    page = open_page()
    documents(page, "files")
    base.gate.clear()
    drop = """names => {
        const transfer = new DataTransfer();
        for (const name of names) transfer.items.add(new File(["# " + name], name));
        for (const type of ["dragenter", "dragover", "drop"])
            document.querySelector("#drop").dispatchEvent(
                new DragEvent(type, {dataTransfer: transfer, bubbles: true, cancelable: true}));
    }"""
    page.evaluate(drop, ["one.txt", "two.txt"])
    expect(page.locator(".upload", has_text="one.txt")).to_contain_text("the server reads it")
    page.locator(".upload", has_text="two.txt").locator("button", has_text="Stop").click()
    base.gate.set()
    expect(page.locator(".upload")).to_have_text(re.compile("one.txt.*added"))
    expect(page.locator(".file")).to_have_count(4)
    assert set(base.store.kept) == {"ada.txt", "babbage.txt", "turin.txt", "one.txt"}


def test_of_many_files_those_that_went_wrong_stay(open_page: Open, base: FakeKnowledge) -> None:
    page = open_page()
    documents(page, "files")
    many = [file(f"{at:02}.txt", f"# {at:02}") for at in range(40)]
    page.set_input_files("#file-input", [file("bad.txt", b"\xff\xfe\x81"), *many])
    expect(page.locator(".file")).to_have_count(43)
    expect(page.locator(".upload")).to_have_count(20)
    expect(page.locator(".upload.failed")).to_have_count(1)


def test_long_lists_come_in_parts_and_can_be_filtered(open_page: Open, base: FakeKnowledge) -> None:
    for at in range(150):
        base.store.put(f"many/{at:03}.txt", f"# Number {at:03}".encode())
    page = open_page()
    documents(page, "files")
    expect(page.locator(".file")).to_have_count(100)
    expect(page.locator("#files-state")).to_have_text("100 of 153 documents")
    page.click("#files-more")
    expect(page.locator(".file")).to_have_count(153)
    expect(page.locator("#files-more")).to_be_hidden()
    page.fill("#files-filter", "number 14")
    expect(page.locator(".file:visible")).to_have_count(10)


def test_a_long_document_opens_in_the_middle_and_grows_both_ways(
    open_page: Open, base: FakeKnowledge
) -> None:
    base.store.put(
        "long.txt", "\n\n".join(f"😀 Part {at} of it{' unique' * (at == 100)}" for at in range(200)).encode()
    )
    page = open_page()
    documents(page)
    search(page, "unique")
    page.locator(".passage button", has_text="Open").click()
    expect(page.locator(".cited")).to_have_text("😀 Part 100 of it unique")
    expect(page.locator(".cited")).to_be_in_viewport()
    expect(page.locator(".reader-piece")).to_have_count(40)
    page.locator("#reader button", has_text="Further text").click()
    expect(page.locator(".reader-piece")).to_have_count(80)
    before = page.locator(".cited").bounding_box()
    page.locator("#reader button", has_text="Earlier text").click()
    expect(page.locator(".reader-piece")).to_have_count(120)
    assert page.locator(".reader-chunk").first.inner_text() == "😀 Part 47 of it"
    assert before is not None
    for _ in range(5):
        more = page.locator("#reader button", has_text=re.compile("Earlier|Further")).first
        if not more.count():
            break
        count = page.locator(".reader-piece").count()
        more.click()
        expect(page.locator(".reader-piece")).not_to_have_count(count)
    parts = page.locator(".reader-chunk").all_inner_texts()
    assert [int(re.findall(r"Part (\d+)", part)[0]) for part in parts] == list(range(200))


def test_what_cannot_be_written_offers_nothing_to_write(browser: Any, base: FakeKnowledge) -> None:
    with (
        serving(fake_llm(), ServerSettings(), {"notes": base}) as server,
        watched_pages(browser, server.url) as op,
    ):
        page = op()
        documents(page, "files")
        expect(page.locator(".file")).to_have_count(3)
        expect(page.locator("#drop")).to_be_hidden()
        expect(page.locator("#view-files button", has_text="Delete")).to_have_count(0)


def test_without_documents_the_page_is_a_chat(browser: Any) -> None:
    with serving(fake_llm()) as server, watched_pages(browser, server.url) as op:
        page = op()
        expect(page.locator("#documents")).to_be_hidden()
        expect(page.locator("#from-documents-label")).to_be_hidden()


def test_several_knowledge_bases_are_chosen_from(browser: Any, base: FakeKnowledge) -> None:
    both = {"notes": base, "sea": FakeKnowledge(sea="# Sea\n\nThe sea is deep.")}
    with serving(fake_llm(), ServerSettings(), both) as server, watched_pages(browser, server.url) as op:
        page = op()
        documents(page, "files")
        expect(page.locator(".file")).to_have_count(3)
        expect(page.locator("#from-documents-words")).to_have_text("Answer from notes")
        page.select_option("#knowledge", "sea")
        expect(page.locator("#from-documents-words")).to_have_text("Answer from sea")
        expect(page.locator(".file-name")).to_have_text(["Sea"])
        page.locator(".file-name").click()
        expect(page.locator("#reader")).to_contain_text("The sea is deep.")


# The graph ------------------------------------------------------------------------------------------------


def test_the_graph_is_drawn_and_explored_by_keyboard(open_page: Open) -> None:
    page = open_page(reduced_motion="reduce")
    documents(page, "graph")
    expect(page.locator("#picture .node")).not_to_have_count(0)
    places = "all => all.map(node => node.getAttribute('transform'))"
    placed = page.locator("#picture .node").evaluate_all(places)
    assert len(set(placed)) == len(placed) and "NaN" not in "".join(placed)
    inside = """() => {
        const frame = document.querySelector("#picture").getBoundingClientRect();
        const shapes = [...document.querySelectorAll("#picture .node > :is(rect, circle:not(.halo))")];
        return shapes.map((node) => node.getBoundingClientRect()).every((box) => box.left > frame.left
            && box.right < frame.right && box.top > frame.top && box.bottom < frame.bottom);
    }"""
    assert page.evaluate(inside)
    # By keyboard alone: to the field, a name, its neighbours, and from node to node.
    page.focus("#graph-form input")
    page.keyboard.type("ada.txt")
    page.keyboard.press("Enter")
    expect(page.locator("#graph-list h3")).to_have_text("ada.txt")
    near = ["Ada", "Engine", "London", "Lovelace", "She"]
    expect(page.locator("#picture .node")).to_have_count(1 + len(near))
    expect(page.locator(".neighbour")).to_have_text([f"{name} entity" for name in near])
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert focused(page) == "picture"
    names = {"ada.txt"}
    for key in ("Right", "Left", "Down", "Up", "Up", "Down", "Left", "Right"):
        page.keyboard.press(f"Arrow{key}")
        names.add(page.locator("#graph-list h3").inner_text())
    assert len(names) >= 4
    # In the list, which says the same in words: London is beside two documents.
    page.focus("#graph-form input")
    page.keyboard.press("Enter")
    expect(page.locator("#graph-list h3")).to_have_text("ada.txt")
    expect(page.locator(".neighbour")).to_have_count(len(near))
    before = page.locator("#picture .node").count()
    page.locator(".neighbour", has_text="London").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#graph-list h3")).to_have_text("London")
    expect(page.locator("#graph-list h3")).to_be_focused()
    expect(page.locator(".neighbour")).to_have_text(["ada.txt document", "babbage.txt document"])
    assert page.locator("#picture .node").count() == before + 1
    expect(page.locator("#graph-state")).to_contain_text("1 more")
    page.locator(".neighbour", has_text="babbage.txt").click()
    page.focus("#picture")
    page.keyboard.press("o")
    expect(page.locator("#reader")).to_contain_text("Charles Babbage designed the Engine")
    page.keyboard.press("Escape")
    expect(page.locator("#picture")).to_be_focused()


def test_the_graph_moves_zooms_and_opens_by_mouse(open_page: Open) -> None:
    page = open_page(reduced_motion="reduce")
    documents(page)
    search(page, "Menabrea")
    page.locator(".passage button", has_text="In the graph").click()
    node = page.locator('#picture .node[data-id="d:turin.txt"]')
    expect(node).to_have_class(re.compile("selected"))
    layer = page.locator("#picture > g")
    fitted = layer.get_attribute("transform")
    page.click("#closer")
    closer = layer.get_attribute("transform")
    assert closer != fitted
    page.click("#fit")
    assert layer.get_attribute("transform") == fitted
    box = page.locator("#picture").bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 20)
    page.mouse.wheel(0, -300)
    page.wait_for_function(
        "before => document.querySelector('#picture > g').getAttribute('transform') !== before", arg=fitted
    )
    page.mouse.down()
    page.mouse.move(box["x"] + 120, box["y"] + 70, steps=4)
    page.mouse.up()
    assert layer.get_attribute("transform") != fitted
    page.click("#fit")
    where = node.bounding_box()
    start = (where["x"] + where["width"] / 2, where["y"] + 10)
    place = node.get_attribute("transform")
    page.mouse.move(*start)
    page.mouse.down()
    page.mouse.move(start[0] + 60, start[1] + 40, steps=4)
    page.mouse.up()
    assert node.get_attribute("transform") != place
    page.click("#fit")
    page.locator('#picture .node[data-id="e:babbage"] circle').last.click()
    expect(page.locator("#graph-list h3")).to_have_text("Babbage")
    expect(page.locator('#picture .node[data-id="d:babbage.txt"]')).to_have_count(1)
    page.fill("#graph-form input", "nobody")
    page.click("#graph-form [type=submit]")
    expect(page.locator("#graph-state")).to_contain_text("nothing called 'nobody'")


def test_the_picture_stays_small_enough(open_page: Open, base: FakeKnowledge) -> None:
    import string

    letters = [a + b for a in string.ascii_uppercase for b in string.ascii_lowercase]
    for at, name in enumerate(letters):
        near = " ".join(f"{name}{letters[(at * 7 + k) % len(letters)].lower()}" for k in range(20))
        base.store.put(f"d{at:03}.txt", f"# x\n\nHub {near} Zz{letters[at].lower()}".encode())
    page = open_page(reduced_motion="reduce")
    documents(page, "graph")
    for _ in range(12):
        page.focus("#picture")
        page.keyboard.press("Enter")
        page.keyboard.press("ArrowRight")
        expect(page.locator("#graph-state")).not_to_have_text("Loads …")
    assert 0 < page.locator("#picture .node").count() <= 250


def test_the_vendored_library_is_what_its_note_says() -> None:
    note = (VENDOR / "NOTE.md").read_text()
    listed = dict(re.findall(r"`([\w.-]+)` \|.*\| `([0-9a-f]{64})`", note))
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in VENDOR.iterdir()
        if path.name != "NOTE.md"
    }
    assert listed == found
    assert "Permission to use" in (VENDOR / "LICENSE").read_text()


# By keyboard -----------------------------------------------------------------------------------------


def test_the_view_is_used_by_keyboard_alone(open_page: Open) -> None:
    page = open_page()
    page.focus("#documents")
    page.keyboard.press("Enter")
    assert focused(page) == "query"
    page.keyboard.type("Engine")
    page.keyboard.press("Enter")
    expect(page.locator(".passage")).not_to_have_count(0)
    page.focus("#tab-search")
    page.keyboard.press("ArrowRight")
    assert focused(page) == "tab-files"
    expect(page.locator("#view-files")).to_be_visible()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert focused(page) == "tab-graph"
    page.keyboard.press("ArrowRight")
    assert focused(page) == "tab-search"
    seen: list[str] = []
    for _ in range(9):
        page.keyboard.press("Tab")
        seen.append(focused(page))
        outline = "getComputedStyle(document.activeElement).outlineStyle !== 'none'"
        assert page.evaluate(outline), seen[-1]
    assert any(name.startswith("Open") for name in seen) and any("graph" in name for name in seen)
    page.click("#leave")
    expect(page.locator("#main")).to_be_visible()
    assert focused(page) == "documents"
