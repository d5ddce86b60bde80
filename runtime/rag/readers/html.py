"""HTML: what a reader of the page sees, by a parser that reports elements and builds no tree.

Nothing is fetched, no entity but HTML's own is known, and nesting costs no stack.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from ....ir.errors import InputError
from ..types import Text
from .base import Builder, Source
from .characters import bom, check_not_binary, decode
from .plain import encoding_note
from .titles import sensible

MEDIA_TYPE = "text/html"
_PIECE = 1 << 16
_BREAK = "\0"  # a line that the page breaks, where its source's lines mean nothing; NULs never come in
_MAX_CELLS, _LONG_CELL = 1_000_000, 500

_CHARSET = re.compile(rb"<meta[^>]{0,300}?charset\s*=\s*[\"']?([A-Za-z0-9_:.-]{2,40})", re.IGNORECASE)
_CHARSETS = re.compile(
    r"(?:utf-?8|us-ascii|ascii|iso-?8859-\d{1,2}|latin-?[1-9]|windows-\d{3,4}|cp\d{3,4}|koi8-[ru]|gb2312|gbk|gb18030|"
    r"big5|big5-hkscs|shift[_-]jis|euc-jp|euc-kr|iso-2022-jp|macintosh|tis-620)",
    re.IGNORECASE,
)
# Not seen, or not the text: programs, forms, and what leads elsewhere.
_DROPPED_WORDS = """
script style nav noscript template svg math iframe object embed applet audio video canvas map select
option button textarea datalist dialog
"""
_DROPPED = frozenset(_DROPPED_WORDS.split())
_BLOCKS_WORDS = """
address article aside blockquote body center dd details div dl dt fieldset figcaption figure footer form
header hr html legend li main menu ol p section summary ul
"""
_BLOCKS = frozenset(_BLOCKS_WORDS.split())
_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_HIDING = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)
# Void elements have no end to wait for; nothing is left of a page whose body is hidden until a script runs.
_NEVER_HIDDEN_WORDS = """
html head body area base br col embed hr img input link meta param source track wbr
"""
_NEVER_HIDDEN = frozenset(_NEVER_HIDDEN_WORDS.split())


def read_html(source: Source) -> Iterator[Text]:
    data = source.read()
    text, encoding = _decode(data, source.name)
    page = _Page(Builder(source))
    _parse(text, page, source)
    title = _title(page)
    yield page.builder.finish(title, MEDIA_TYPE, encoding_note(encoding))


def _decode(data: bytes, name: str) -> tuple[str, str]:
    declared = _CHARSET.search(data[:4096])
    if declared and not bom(data)[0]:
        charset = declared[1].decode("ascii").lower()
        if _CHARSETS.fullmatch(charset) and not charset.startswith(("utf", "iso-8859-1", "latin-1")):
            check_not_binary(data, name)
            try:
                return data.decode(codecs.lookup(charset).name, errors="replace"), charset
            except LookupError:
                pass
    return decode(data, name)


def _parse(text: str, page: _Page, source: Source) -> None:
    try:
        etree: Any = import_module("lxml.etree")  # it has no types
    except ImportError as error:
        raise InputError(
            f"{source.name}: HTML is read with lxml, which is not installed", remedy="pip install 'llmc[rag]'"
        ) from error
    parser: Any = etree.HTMLParser(
        target=page, encoding="utf-8", no_network=True, recover=True, remove_comments=True, remove_pis=True
    )
    try:
        for start in range(0, len(text), _PIECE):
            parser.feed(text[start : start + _PIECE].replace("\0", "\ufffd").encode("utf-8", "replace"))
        parser.close()
    except (etree.LxmlError, AssertionError) as error:  # lxml asserts that a document has any element
        if not page.builder.blocks:
            raise source.no_text() from error
    page.finish()


def _title(page: _Page) -> str:
    """What the page calls itself: its only top heading where <title> only adds the site's name to it."""
    top = page.builder.only_top_heading()
    said = sensible("".join(page.title_parts)) or sensible(page.property_title)
    if top and (not said or top.casefold() in said.casefold()):
        return top
    return said


class _Page:
    """Target of lxml's parser: called for each start, end and text in the order of the page."""

    def __init__(self, builder: Builder) -> None:
        self.builder = builder
        self.title_parts: list[str] = []
        self.property_title = ""
        self._text: list[str] = []  # of the block that is open
        self._dropped = ""  # the element that is dropped with all that it holds, and how many of it are open
        self._depth = 0
        self._heading: list[str] | None = None
        self._level = 6
        self._in_title = False
        self._pre = 0
        self._lists = 0
        self._table: _Table | None = None  # the outermost that is open
        self._tables = 0

    # What lxml calls.

    def start(self, tag: object, attributes: Mapping[str, str]) -> None:
        name = tag.lower() if isinstance(tag, str) else ""
        if self._dropped:
            self._depth += name == self._dropped
        elif name in _DROPPED or (name not in _NEVER_HIDDEN and _is_hidden(attributes)):
            self._dropped, self._depth = name, 1
        elif name == "title":
            self._in_title = not self.title_parts
        elif name == "meta":
            self._meta(attributes)
        elif self._table is not None:
            self._in_table(name, self._table)
        elif name in _HEADINGS:
            self.end_block()
            self._heading, self._level = [], _HEADINGS[name]
        else:
            self._start_block(name)

    def end(self, tag: object) -> None:
        name = tag.lower() if isinstance(tag, str) else ""
        if self._dropped:
            self._depth -= name == self._dropped
            self._dropped = self._dropped if self._depth else ""
        elif name == "title":
            self._in_title = False
        elif name == "table" and self._tables:
            self._end_table()
        elif self._table is not None:
            return
        elif name in _HEADINGS:
            self.end_block()
        elif name == "pre" and self._pre:
            self.end_block()
            self._pre -= 1
        elif name in ("ul", "ol") and self._lists:
            self._lists -= 1
            self._break() if self._lists else self.end_block()
        elif name in _BLOCKS and self._heading is None:
            self._break() if self._lists else self.end_block()

    def data(self, data: str) -> None:
        if self._dropped:
            return
        if self._in_title:
            self.title_parts.append(data)
        elif self._heading is not None:
            self._heading.append(data)
        elif self._table is not None:
            self._table.data(data)
        else:
            self._text.append(data)

    def comment(self, text: str) -> None: ...

    def pi(self, target: str, data: str | None = None) -> None: ...

    def close(self) -> None: ...

    # Blocks.

    def end_block(self) -> None:
        """What came since the last block is a block, or a heading, of its own."""
        if self._heading is not None:
            heading, self._heading = "".join(self._heading), None
            self.builder.heading(self._level, heading)
        text, self._text = "".join(self._text), []
        if self._pre:
            self.builder.block(text.replace(_BREAK, "\n"), unbroken=True)
            return
        lines = (" ".join(line.split()) for line in text.split(_BREAK))
        self.builder.block("\n".join(line for line in lines if line not in ("", "-")))

    def _break(self) -> None:
        self._text.append(_BREAK)

    def _start_block(self, name: str) -> None:
        if name == "br":
            (self._text if self._heading is None else self._heading).append(_BREAK)
        elif name == "table":
            self.end_block()
            self._table, self._tables = _Table(self.builder), 1
        elif name == "pre":
            self.end_block()
            self._pre += 1
        elif name in ("ul", "ol"):
            self._break() if self._lists else self.end_block()
            self._lists += 1
        elif name == "li":
            self._text.append(f"{_BREAK}- ")
        elif name in _BLOCKS and self._heading is not None and name in ("div", "center", "figure"):
            self._heading.append(" ")
        elif name in _BLOCKS and not self._lists:
            self.end_block()
        elif name in _BLOCKS and not (self._text and self._text[-1].endswith("- ")):  # not for <li><p>
            self._break()

    def _in_table(self, name: str, table: _Table) -> None:
        if name == "table":
            self._tables += 1
        elif name == "tr":
            table.row()
        elif name in ("td", "th"):
            table.cell()
        elif name in _BLOCKS or name == "br" or name in _HEADINGS:
            table.data(" ")

    def _end_table(self) -> None:
        self._tables -= 1
        if not self._tables and self._table is not None:
            table, self._table = self._table, None
            table.finish()

    def finish(self) -> None:
        if self._table is not None:
            self._table.finish()
        self.end_block()

    def _meta(self, attributes: Mapping[str, str]) -> None:
        if attributes.get("property", "").lower() in ("og:title", "twitter:title"):
            self.property_title = self.property_title or attributes.get("content", "")[:1000]


def _is_hidden(attributes: Mapping[str, str]) -> bool:
    return "hidden" in attributes or bool(_HIDING.search(attributes.get("style", "")[:1000]))


class _Table:
    """Rows of cells. One that only lays out a page (long cells, or one column) becomes blocks."""

    def __init__(self, builder: Builder) -> None:
        self._builder = builder
        self._rows: list[list[list[str]]] = []
        self._cells = 0

    def row(self) -> None:
        if not self._rows or self._rows[-1]:
            self._rows.append([])

    def cell(self) -> None:
        self._cells += 1
        if self._cells > _MAX_CELLS:
            raise InputError(f"{self._builder.source.name}: a table has more than {_MAX_CELLS:,} cells")
        if not self._rows:
            self._rows.append([])
        self._rows[-1].append([])

    def data(self, text: str) -> None:
        if not self._rows or not self._rows[-1]:
            if not text.strip():
                return
            self.cell()
        self._rows[-1][-1].append(text)

    def finish(self) -> None:
        rows = [[" ".join("".join(cell).split()) for cell in row] for row in self._rows]
        rows = [row for row in rows if any(row)]
        if any(len(cell) > _LONG_CELL for row in rows for cell in row) or all(len(row) == 1 for row in rows):
            for row in rows:
                for cell in row:
                    self._builder.block(cell)
        else:
            self._builder.block("\n".join(" | ".join(row) for row in rows), unbroken=True)
