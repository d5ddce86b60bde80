"""Readers of Markdown and of source code: headings, what stays whole, hostile marks."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmc.ir.errors import InputError
from llmc.runtime.rag.readers import (
    read_documents,
)

from .reading import Read, body, check, parts


@pytest.fixture
def read(tmp_path: Path) -> Read:
    return Read(tmp_path)


# Markdown.


def test_markdown(read: Read) -> None:
    document = read.one(
        "a.md",
        "---\ntitle: 'The Thing'\nauthor: Me\nlist:\n  - x\n---\n\nIntro **bold** and [Ed Wood](http://x/Ed_(film)).\n\n"
        "Setup\n=====\nFirst `a_b [x](y)` run:\n\n```sh\n# no heading\n| no | table |\n|--|--|\n```\n\n"
        "### Deep ###\n| a | b |\n|---|:-:|\n| 1 | **2** |\n\n<!-- hidden\n# gone -->\n"
        "Last ![pic](p.png).\n\n## Empty\n",
    )
    assert document.title == "The Thing"
    assert document.metadata == {"author": "Me"}
    assert parts(document) == [
        ((), "Intro bold and Ed Wood."),
        (("Setup",), "Setup\n\nFirst a_b [x](y) run:"),
        (("Setup",), "# no heading\n| no | table |\n|--|--|"),
        (("Setup", "Deep"), "Deep"),
        (("Setup", "Deep"), "a | b\n1 | 2"),
        (("Setup", "Deep"), "Last pic."),
        (("Setup", "Empty"), "Empty"),
    ]
    assert [section.unbroken for section in document.sections] == [
        False,
        False,
        True,
        False,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("text", "title", "first"),
    [
        ("# One\n\nText.\n\n## Two\n\nMore.", "One", ((), "Text.")),
        ("One\n===\n\nText.", "One", ((), "Text.")),
        ("## One\n\nText.", "One", ((), "Text.")),
        ("# One\n\nText.\n\n# Two\n\nMore.", "", (("One",), "One\n\nText.")),
        ("Text before.\n\n# One\n\nMore.", "One", ((), "Text before.")),
        ("+++\ntitle = \"T\"\n+++\n# One\n\nText.", "T", (("One",), "One\n\nText.")),
        ("---\n\n# One\n\nText.", "One", ((), "Text.")),
        ("---\ntitle: untitled\n---\n# One\n\nText.", "One", ((), "Text.")),
        ("Ed Wood\n\nHe made films.", "Ed Wood", ((), "He made films.")),
        ("#hashtag is no heading, nor a title.", "", ((), "#hashtag is no heading, nor a title.")),
    ],
)  # fmt: skip
def test_markdown_titles(read: Read, text: str, title: str, first: tuple[tuple[str, ...], str]) -> None:
    document = read.one("a.md", text)
    assert document.title == title
    assert parts(document)[0] == first


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet="ab#*_`~[]()!|-=<>\\\n \t:.1", max_size=300) | st.text(max_size=200))
def test_markdown_of_any_text(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.md"
    path.write_text(text, errors="replace", newline="")
    try:
        (document,) = read_documents(path, "any.md")
    except InputError as error:
        reason = error.message
    else:
        reason = ""
        check(document)
    assert not reason or "no text" in reason or "binary" in reason


@pytest.mark.parametrize(
    "unit", ["[", "[a](", '![a](b "', "*a ", "`", "`a", "<a ", "__a", "|-", "#", "<!--", "    "]
)
def test_markdown_of_marks_alone_takes_no_square_time(read: Read, unit: str) -> None:
    # 300 KB that a pattern with two ways to match would never finish.
    read.all("a.md", unit * (300_000 // len(unit)) + "\nend")


# Source code.


def test_python(read: Read) -> None:
    source = (
        '"""Doc."""\n\nimport os\n\n\n# What f does.\n@wraps(x)\nasync def f(a):\n    """x\n'
        'def no(): ...\n"""\n'
        "    def inner(): ...\n\n\nclass A(B):\n    x = 1\n\n    def m(self):\n        pass\n\n    class C:\n"
        "        def n(self):\n            pass\n\nif x:\n    f()\n"
    )
    document = read.one("a/b.py", source)
    assert document.title == ""
    assert document.media_type == "text/x-python"
    assert document.text == source.rstrip()
    found = parts(document)
    assert [heading for heading, _ in found] == [
        (),
        ("f",),
        ("A",),
        ("A", "m"),
        ("A", "C"),
        ("A", "C", "n"),
        (),
    ]
    assert found[1][1].startswith("# What f does.")
    assert found[1][1].endswith("def inner(): ...")


def test_every_definition_of_our_own_code_is_a_heading(read: Read) -> None:
    import llmc.runtime.rag.readers as package

    for path in sorted(Path(package.__file__).parent.glob("*.py")):
        source = path.read_text()
        document = read.one(path.name, source)
        wanted = [
            node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)
        ]
        found = list(dict.fromkeys(section.heading[0] for section in document.sections if section.heading))
        assert found == wanted
        assert "".join(body(document).split()) == "".join(source.split())


@pytest.mark.parametrize(
    ("name", "source", "headings"),
    [
        ("a.go", "package x\n\n// F.\nfunc (s *S) F(a int) int {\n}\n\ntype T struct {\n}\n", ["F", "T"]),
        (
            "a.rs",
            "pub fn f<T>(a: T) {\n}\nimpl Foo for Bar {\n    fn m(&self) {}\n}\n",
            ["f", "Foo for Bar", "m"],
        ),
        (
            "a.cpp",
            "#include <x>\nint main(int c,\n  char** v) {\n}\nvoid Foo::bar(int a) {\n}\nclass Q {\n};",
            ["main", "Foo::bar", "Q"],
        ),
        (
            "a.java",
            "package a;\npublic class Foo {\n  int get(int a) {\n    if (x) {\n    }\n  }\n}",
            ["Foo", "get"],
        ),
        (
            "a.ts",
            "export default function foo() {}\nexport const bar = async (x) => {\n}\ninterface Z { }",
            ["foo", "bar", "Z"],
        ),
        ("a.rb", "class A\n  def b?\n  end\nend\ndef c\nend", ["A", "b?", "c"]),
        ("a.sh", "#!/bin/sh\nset -e\nrun() {\n  x\n}\n", ["run"]),
        ("a.sql", "CREATE TABLE IF NOT EXISTS films (id int);\ncreate view v as select 1;", ["films", "v"]),
        ("a.toml", "a = 1\n[tool.x]\nb = 2\n[[y]]\nc = 3", ["tool.x", "y"]),
        ("a.yaml", "a: 1\nb:\n  - c: d\n", ["a", "b"]),
        ("Makefile", "CC = gcc\nall: x\n\tgcc x\n", ["all"]),
    ],
)  # fmt: skip
def test_definitions_of_other_languages(read: Read, name: str, source: str, headings: list[str]) -> None:
    document = read.one(name, source)
    found = [section.heading[-1] for section in document.sections if section.heading]
    assert found == headings
    assert "".join(body(document).split()) == "".join(source.split())
