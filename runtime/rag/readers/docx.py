"""Word documents (.docx): a zip archive of XML, streamed through an event parser that refuses any DTD.

Only three parts are looked at, by name and up to a limit of unpacked bytes; nothing is unpacked to disk.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any
from xml.parsers import expat

from ....ir.errors import InputError
from ..types import Text
from .base import MEGABYTE, Builder, Source
from .titles import sensible

MEDIA_TYPE = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
_PIECE = 1 << 16
_MAX_ENTRIES = 20_000
_MAX_CELLS = 1_000_000
_W = "http://schemas.openxmlformats.org/wordprocessingml/2006/main "
_STRICT = "http://purl.oclc.org/ooxml/wordprocessingml/main "
_DC = "http://purl.org/dc/elements/1.1/ "
_HEADING = re.compile(
    r"(?:heading|überschrift|titre|título|titolo|rubrik|kop|заголовок|标题|見出し) ?([1-9])", re.IGNORECASE
)


def read_docx(source: Source) -> Iterator[Text]:
    with source.open() as file:
        source.check_size(file)
        try:
            with zipfile.ZipFile(file) as archive:
                yield _document(archive, source)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError, OSError) as error:
            raise InputError(
                f"{source.name}: is no readable .docx: {error}", remedy="open it in Word and save it again"
            ) from error
        except RuntimeError as error:  # zipfile's word for an entry under a password
            raise InputError(f"{source.name}: is encrypted", remedy="save it without a password") from error


def _document(archive: zipfile.ZipFile, source: Source) -> Text:
    names = archive.namelist()
    if len(names) > _MAX_ENTRIES:
        raise InputError(f"{source.name}: the archive has {len(names):,} entries")
    if "word/document.xml" not in names:
        raise InputError(
            f"{source.name}: is no .docx: the archive holds no word/document.xml",
            remedy="save it as .docx (Word before 2007 and OpenDocument have formats of their own)",
        )
    unpacked = _Unpacked(archive, source)
    styles, properties = _Styles(), _Properties()
    for name, handler in (("word/styles.xml", styles), ("docProps/core.xml", properties)):
        if name in names:
            unpacked.parse(name, handler)
    body = _Body(Builder(source), styles.levels)
    unpacked.parse("word/document.xml", body)
    title = body.title or body.builder.only_top_heading() or sensible("".join(properties.title))
    return body.builder.finish(title, MEDIA_TYPE)


class _Handler:
    """What a part's elements are told to. Names are namespace, a space, and the local name."""

    def start(self, name: str, attributes: dict[str, str]) -> None: ...

    def end(self, name: str) -> None: ...

    def data(self, text: str) -> None: ...


class _Unpacked:
    """Parts of the archive, all together bounded in bytes."""

    def __init__(self, archive: zipfile.ZipFile, source: Source) -> None:
        self._archive = archive
        self._source = source
        self._left = source.limits.max_bytes

    def parse(self, name: str, handler: _Handler) -> None:
        parser: Any = expat.ParserCreate(namespace_separator=" ")
        depth = 0

        def start(element: str, attributes: dict[str, str]) -> None:
            nonlocal depth
            depth += 1
            if depth > self._source.limits.max_nesting:
                raise InputError(f"{self._source.name}: {name}: elements are nested deeper than {depth - 1}")
            handler.start(element, attributes)

        def end(element: str) -> None:
            nonlocal depth
            depth -= 1
            handler.end(element)

        parser.buffer_text = True
        parser.StartElementHandler, parser.EndElementHandler = start, end
        parser.CharacterDataHandler = handler.data
        parser.StartDoctypeDeclHandler = self._refuse(name)
        try:
            with self._archive.open(name) as part:
                while data := part.read(_PIECE):
                    self._left -= len(data)
                    if self._left < 0:
                        size = self._source.limits.max_bytes / MEGABYTE
                        raise self._source.too_large(
                            f"unpacks to more than {size:,.0f} MB", self._source.limits.max_bytes
                        )
                    parser.Parse(data, False)
            parser.Parse(b"", True)
        except expat.ExpatError as error:
            raise InputError(f"{self._source.name}: {name}: {error}") from error

    def _refuse(self, name: str) -> Callable[..., None]:
        def refuse(*_: object) -> None:
            raise InputError(f"{self._source.name}: {name} declares a DTD, which no Word document does")

        return refuse


def _local(name: str) -> str:
    for namespace in (_W, _STRICT):
        if name.startswith(namespace):
            return name[len(namespace) :]
    return ""


def _value(attributes: dict[str, str], key: str = "val") -> str:
    return attributes.get(_W + key) or attributes.get(_STRICT + key) or ""


class _Properties(_Handler):
    def __init__(self) -> None:
        self.title: list[str] = []
        self._inside = False

    def start(self, name: str, attributes: dict[str, str]) -> None:
        self._inside = name == _DC + "title"

    def end(self, name: str) -> None:
        self._inside = False

    def data(self, text: str) -> None:
        if self._inside and len(self.title) < 100:
            self.title.append(text[:1000])


class _Styles(_Handler):
    """levels: style id → heading level, 0 for the style of titles."""

    def __init__(self) -> None:
        self.levels: dict[str, int] = {}
        self._id = ""

    def start(self, name: str, attributes: dict[str, str]) -> None:
        local = _local(name)
        if local == "style":
            self._id = _value(attributes, "styleId")
        elif local == "name" and self._id:
            level = _level_of_name(_value(attributes))
            if level is not None:
                self.levels[self._id] = level
        elif local == "outlineLvl" and self._id and _value(attributes).isdecimal():
            level = int(_value(attributes)[:3])
            if level < 9:
                self.levels.setdefault(self._id, level + 1)

    def end(self, name: str) -> None:
        if _local(name) == "style":
            self._id = ""


def _level_of_name(name: str) -> int | None:
    if name.casefold() == "title":
        return 0
    found = _HEADING.fullmatch(name)
    return int(found[1]) if found else None


class _Body(_Handler):
    """Paragraphs, headings and tables, in order. Deleted text (w:del) holds w:delText, which is not read."""

    def __init__(self, builder: Builder, levels: dict[str, int]) -> None:
        self.builder = builder
        self.title = ""
        self._levels = levels
        self._text: list[str] = []
        self._inside = False  # a w:t
        self._style = ""
        self._outline: int | None = None
        self._list = False
        self._items: list[str] = []  # of the list that is open
        self._rows: list[list[list[str]]] = []
        self._tables = 0
        self._cells = 0
        self._skipped = 0  # depth inside mc:Fallback, which repeats what stands beside it

    def start(self, name: str, attributes: dict[str, str]) -> None:
        if name.endswith(" Fallback") or self._skipped:
            self._skipped += 1
            return
        local = _local(name)
        if local == "t":
            self._inside = True
        elif local in ("tab", "br", "cr"):
            self._text.append("\t" if local == "tab" else "\n")
        elif local == "noBreakHyphen":
            self._text.append("-")
        elif local == "pStyle":
            self._style = _value(attributes)
        elif local == "outlineLvl" and _value(attributes).isdecimal():
            self._outline = int(_value(attributes)[:3]) + 1
        elif local == "numPr":
            self._list = True
        elif local == "tbl":
            self._start_table()
        elif local == "tr" and self._tables == 1:
            self._rows.append([])
        elif local == "tc" and self._tables == 1:
            self._start_cell()

    def end(self, name: str) -> None:
        if self._skipped:
            self._skipped -= 1
            return
        local = _local(name)
        if local == "t":
            self._inside = False
        elif local == "p":
            self._end_paragraph()
        elif local == "tbl":
            self._tables -= 1
            if not self._tables:
                self._end_table()
        elif local == "body":
            self._end_list()

    def data(self, text: str) -> None:
        if self._inside and not self._skipped:
            self._text.append(text)

    def _end_paragraph(self) -> None:
        text, self._text = "".join(self._text).strip(), []
        style, self._style = self._style, ""
        outline, self._outline = self._outline, None
        item, self._list = self._list, False
        if self._tables:
            if text and self._rows and self._rows[-1]:
                self._rows[-1][-1].append(text)
            return
        level = self._levels.get(style, _level_of_name(style))
        level = outline if level is None and outline is not None and outline <= 9 else level
        if item and level is None:
            if text:
                self._items.append(f"- {text}")
            return
        self._end_list()
        if level is None:
            self.builder.block(text)
        elif text:
            if level == 0 and not self.title and len(text) <= 300:
                self.title = " ".join(text.split())
            self.builder.heading(max(1, level), text)

    def _end_list(self) -> None:
        items, self._items = self._items, []
        self.builder.block("\n".join(items))

    def _start_table(self) -> None:
        if not self._tables:
            self._end_list()
            self._rows = []
        self._tables += 1

    def _start_cell(self) -> None:
        self._cells += 1
        if self._cells > _MAX_CELLS:
            raise InputError(f"{self.builder.source.name}: has more than {_MAX_CELLS:,} table cells")
        if self._rows:
            self._rows[-1].append([])

    def _end_table(self) -> None:
        rows = [[" ".join(" ".join(cell).split()) for cell in row] for row in self._rows]
        self._rows = []
        self.builder.block("\n".join(" | ".join(row) for row in rows if any(row)), unbroken=True)
