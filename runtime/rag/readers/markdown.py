"""Markdown: front matter, both kinds of headings, fenced code and tables whole, inline marks taken away."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..types import Text
from .base import Builder, Source
from .characters import clean, decode
from .plain import encoding_note
from .titles import sensible, split_title

MEDIA_TYPE = "text/markdown"
_FRONT_LINES, _MAX_FIELDS, _MAX_VALUE = 200, 30, 500

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)")
_SETEXT = re.compile(r" {0,3}(=+|-{2,})[ \t]*")
_RULE = re.compile(r" {0,3}(?:(?:\*[ \t]*){3,}|(?:_[ \t]*){3,}|(?:-[ \t]*){3,})")
_DEFINITION = re.compile(r" {0,3}\[[^\[\]]{1,200}\]:[ \t]+\S+.*")
_FIELD = re.compile(r"([A-Za-z][\w-]{0,40})\s*[:=]\s*(\S.*)")

_TARGET = r"\((?:[^()\s]|\([^()\s]{0,300}\)){0,2000}(?:[ \t]+[\"'][^\"'\n]{0,300}[\"'])?\)"
_CODE_SPAN = re.compile(r"(`+)([^`\n]{1,500})\1(?!`)")
_IMAGE = re.compile(r"!\[([^\[\]\n]{0,500})\]" + _TARGET)
_LINK = re.compile(r"\[([^\[\]]{1,1000})\](?:" + _TARGET + r"|\[[^\[\]\n]{0,200}\])")
_WIKI_LINK = re.compile(r"\[\[(?:[^\[\]|\n]{1,300}\|)?([^\[\]|\n]{1,300})\]\]")
_TAG = re.compile(
    r"</?(?:a|abbr|b|blockquote|br|center|code|dd|del|details|div|dl|dt|em|font|h[1-6]|hr|i|img|ins|kbd|li|mark|ol|p|"
    r"pre|q|s|small|span|strong|sub|summary|sup|table|tbody|td|th|thead|tr|u|ul)(?:\s[^<>]{0,1000})?/?>",
    re.IGNORECASE,
)
_STRONG = re.compile(r"(\*\*|__|~~)(?=\S)([^*_~\n]{1,500}?)(?<=\S)\1")
_EMPHASIS = re.compile(r"(?<![\w*_])([*_])(?=[^\s*_])([^*_\n]{1,500})(?<=\S)\1(?![\w*_])")
_ESCAPE = re.compile(r"\\([!-/:-@\[-`{-~])")
_AUTOLINK = re.compile(r"<(https?://[^<>\s]{1,2000}|[\w.+-]{1,100}@[\w.-]{1,100})>")


def read_markdown(source: Source) -> Iterator[Text]:
    text, encoding = decode(source.read(), source.name)
    builder = Builder(source)
    fields = add_markdown(builder, clean(text))
    title = sensible(fields.pop("title", ""))
    title = title or builder.only_top_heading() or _first_line(builder)
    yield builder.finish(title, MEDIA_TYPE, {**fields, **encoding_note(encoding)})


def _first_line(builder: Builder) -> str:
    """The title of a text that has no headings at all: by the rules of plain text, taken out of its block."""
    if not builder.blocks or any(block.level for block in builder.blocks):
        return ""
    first = builder.blocks[0]
    following = builder.blocks[1].text[:1000] if len(builder.blocks) > 1 else ""
    title, start = split_title(f"{first.text}\n\n{following}")
    if not title or first.unbroken:
        return ""
    title = " ".join(title.split())
    first.text = first.text[start:]
    if not first.text:
        builder.blocks.pop(0)
    builder.blocks.insert(0, type(first)(title, 1, first.page))
    return title


def add_markdown(builder: Builder, text: str) -> dict[str, str]:
    """Put a Markdown text into the builder; returns the fields of its front matter."""
    text = _without_comments(text)
    lines = text.split("\n")
    fields, start = _front_matter(lines)
    _Blocks(builder, lines, start).run()
    return fields


def _front_matter(lines: list[str]) -> tuple[dict[str, str], int]:
    """Fields of the form `name: value` (or TOML's `name = value`), and the first line behind the block. Not
    parsed as YAML: a title needs none, and YAML has aliases that multiply."""
    start = next((number for number, line in enumerate(lines[:20]) if line.strip()), 0)
    mark = lines[start].strip() if lines else ""
    if mark not in ("---", "+++"):
        return {}, 0
    fields: dict[str, str] = {}
    for number, line in enumerate(lines[start + 1 : start + _FRONT_LINES], start + 1):
        if line.strip() == mark or (mark == "---" and line.strip() == "..."):
            return fields, number + 1
        found = _FIELD.fullmatch(line.strip()[: _MAX_VALUE + 50])
        if found and not line.startswith((" ", "\t")) and len(fields) < _MAX_FIELDS:
            fields[found[1].lower()] = found[2].strip().strip("\"'")[:_MAX_VALUE]
    return {}, 0  # never closed: then it is a rule and text


def _without_comments(text: str) -> str:
    parts: list[str] = []
    position = 0
    while True:
        start = text.find("<!--", position)
        end = text.find("-->", start + 4) if start >= 0 else -1
        if end < 0:
            return "".join([*parts, text[position:]])
        parts.append(text[position:start])
        position = end + 3


class _Blocks:
    """Walks through the lines once, giving block after block to the builder."""

    def __init__(self, builder: Builder, lines: list[str], start: int) -> None:
        self._builder = builder
        self._lines = lines
        self._at = start
        self._paragraph: list[str] = []

    def run(self) -> None:
        while self._at < len(self._lines):
            line = self._lines[self._at]
            self._at += 1
            if not line.strip():
                self._end_paragraph()
            elif not (
                self._fence(line) or self._heading(line) or self._setext(line) or self._table(line)
            ) and not (_RULE.fullmatch(line) or _DEFINITION.fullmatch(line[:3000])):
                self._paragraph.append(line)
        self._end_paragraph()

    def _end_paragraph(self) -> None:
        if self._paragraph:
            self._builder.block(inline("\n".join(self._paragraph)))
            self._paragraph = []

    def _fence(self, line: str) -> bool:
        opened = _FENCE.fullmatch(line)
        if opened is None or (opened[1][0] == "`" and "`" in opened[2]):
            return False
        self._end_paragraph()
        start = self._at
        while self._at < len(self._lines):
            closing = self._lines[self._at].strip()
            self._at += 1
            if len(closing) >= len(opened[1]) and not closing.strip(opened[1][0]):
                self._builder.block("\n".join(self._lines[start : self._at - 1]), unbroken=True)
                return True
        self._builder.block("\n".join(self._lines[start:]), unbroken=True)
        return True

    def _heading(self, line: str) -> bool:
        stripped = line.strip()
        level = len(stripped) - len(stripped.lstrip("#"))
        if not 1 <= level <= 6 or stripped[level : level + 1] not in ("", " ", "\t"):
            return False
        self._end_paragraph()
        text = stripped[level:].strip()
        without = text.rstrip("#")
        if without != text and (not without or without[-1] in " \t"):
            text = without.strip()
        self._builder.heading(level, inline(text))
        return True

    def _setext(self, line: str) -> bool:
        mark = _SETEXT.fullmatch(line)
        if mark is None or len(self._paragraph) != 1 or "|" in self._paragraph[0]:
            return False
        text = self._paragraph.pop()
        self._builder.heading(1 if mark[1][0] == "=" else 2, inline(text.strip()))
        return True

    def _table(self, line: str) -> bool:
        following = self._lines[self._at] if self._at < len(self._lines) else ""
        if "|" not in line or "|" not in following or "-" not in following or following.strip("|:- \t"):
            return False
        self._end_paragraph()
        rows = [_row(line)]
        self._at += 1
        while self._at < len(self._lines) and "|" in self._lines[self._at]:
            rows.append(_row(self._lines[self._at]))
            self._at += 1
        self._builder.block("\n".join(rows), unbroken=True)
        return True


def _row(line: str) -> str:
    return " | ".join(inline(cell.strip()) for cell in line.strip().strip("|").split("|"))


def inline(text: str) -> str:
    """Text without the marks of links, images, emphasis and tags; code spans keep what stands in them."""
    if not any(mark in text for mark in "[*_~`<\\"):
        return text
    parts: list[str] = []
    position = 0
    for span in _CODE_SPAN.finditer(text):
        parts += [_unmarked(text[position : span.start()]), span[2]]
        position = span.end()
    return "".join([*parts, _unmarked(text[position:])])


def _unmarked(text: str) -> str:
    text = _IMAGE.sub(r"\1", text)
    text = _WIKI_LINK.sub(r"\1", text)
    text = _LINK.sub(r"\1", text)
    text = _AUTOLINK.sub(r"\1", text)
    text = _TAG.sub(lambda tag: "\n" if tag[0].lower().startswith("<br") else "", text)
    text = _STRONG.sub(r"\2", text)
    text = _EMPHASIS.sub(r"\2", text)
    return _ESCAPE.sub(r"\1", text)
