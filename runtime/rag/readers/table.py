"""CSV and TSV, row by row. Where a column holds text, each row is a document; where none does, rows are read
together, each as a line of `column: value`.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from ....ir.errors import InputError
from ..types import Section, Text
from .base import MEGABYTE, Source
from .characters import bom, check_not_binary, clean, fallback
from .rows import TEXT_FIELDS, Rows

CSV, TSV = "text/csv", "text/tab-separated-values"
_GROUP_ROWS, _GROUP_CHARACTERS = 500, 100_000
_MAX_COLUMNS = 10_000
_NUMBER = re.compile(r"[-+]?[\d.,\s]*\d[\d.,\s]*%?")


def read_csv(source: Source) -> Iterator[Text]:
    yield from _read(source, CSV, "")


def read_tsv(source: Source) -> Iterator[Text]:
    yield from _read(source, TSV, "\t")


def _read(source: Source, media_type: str, delimiter: str) -> Iterator[Text]:
    with source.open() as file:
        head = file.read(65536)
        file.seek(0)
        encoding, _ = bom(head)
        if not encoding.startswith(("utf-16", "utf-32")):
            check_not_binary(head, source.name)
        encoding = {"utf-8": "utf-8-sig", "": "utf-8"}.get(encoding, encoding[:6])
        # newline="": a field in quotes keeps its line breaks.
        text = io.TextIOWrapper(file, encoding=encoding, errors=fallback(), newline="")
        sample = text.read(20_000)
        text.seek(0)
        delimiter = delimiter or _delimiter(sample)
        limit = min(source.limits.max_bytes, (1 << 31) - 1)
        csv.field_size_limit(max(csv.field_size_limit(), limit))  # of the whole process: only ever raised
        records = _records(csv.reader(_bounded(text, source), delimiter=delimiter), source)
        yield from _documents(records, source, media_type)


def _delimiter(sample: str) -> str:
    """What stands between the names in the first line: the candidate that is there most often."""
    line = re.sub(r'"[^"]*"', "", next((line for line in sample.splitlines() if line.strip()), ""))
    return max(",;\t|", key=lambda mark: (line.count(mark), -",;\t|".index(mark)))


def _bounded(text: io.TextIOWrapper, source: Source) -> Iterator[str]:
    """Lines of the file, so that one without end is not read into memory; NULs, on which csv stops, out."""
    limit = source.limits.max_bytes
    while line := text.readline(limit + 1):
        if len(line) > limit:
            raise source.too_large(f"has a line of more than {limit / MEGABYTE:,.0f} MB", limit)
        yield line.replace("\0", "")


def _records(reader: Iterator[list[str]], source: Source) -> Iterator[list[str]]:
    try:
        for record in reader:
            if any(cell.strip() for cell in record):
                yield record[:_MAX_COLUMNS]
    except csv.Error as error:
        raise InputError(f"{source.name}: no readable table: {error}") from error


@dataclass(frozen=True)
class _Header:
    names: tuple[str, ...]
    first: list[str] | None  # the first record where it is no header

    @classmethod
    def of(cls, record: list[str]) -> _Header:
        names = [" ".join(clean(cell).split())[:200] for cell in record]
        if any(_NUMBER.fullmatch(name[:50]) for name in names) or not any(names):
            return cls(tuple(f"column {n + 1}" for n in range(len(names))), record)
        return cls(tuple(name or f"column {n + 1}" for n, name in enumerate(names)), None)

    def fields(self, record: list[str]) -> dict[str, str]:
        """By column; cells behind the last column get numbers, and what is empty is left out."""
        found: dict[str, str] = {}
        for number, cell in enumerate(record):
            name = self.names[number] if number < len(self.names) else f"column {number + 1}"
            if cell.strip():
                found[name if name not in found else f"{name} ({number + 1})"] = cell.strip()
        return found


def _documents(records: Iterator[list[str]], source: Source, media_type: str) -> Iterator[Text]:
    first = next(records, None)
    if first is None:
        raise source.no_text()
    header = _Header.of(first)
    if header.first is not None:
        records = itertools.chain([header.first], records)
    columns = {name.casefold() for name in header.names}
    rows = Rows(source, media_type)
    if columns & {*TEXT_FIELDS, "title"}:
        for number, record in enumerate(records):
            if rows.over_limit():
                return
            rows.number += 1
            document = rows.document(header.fields(record), number=number, note={})
            if document is not None:
                yield document
    else:
        yield from _groups(records, header, rows)


def _groups(records: Iterator[list[str]], header: _Header, rows: Rows) -> Iterator[Text]:
    """Rows together, some hundreds a document: `path`, or `path#first row` where there is more than one."""
    source = rows.source
    waiting: tuple[int, list[str]] | None = None
    number, lines, size = 0, list[str](), 0
    for record in records:
        if rows.over_limit():
            break
        rows.number += 1
        line = "; ".join(f"{key}: {' '.join(value.split())}" for key, value in header.fields(record).items())
        if lines and (len(lines) >= _GROUP_ROWS or size + len(line) > _GROUP_CHARACTERS):
            if waiting is not None:
                yield _group(source, f"#{waiting[0]}", waiting[1])
            waiting, number, lines, size = (number, lines), number + len(lines), [], 0
        lines.append(clean(line).replace("\n", " "))
        size += len(line)
    if waiting is not None:
        yield _group(source, f"#{waiting[0]}", waiting[1])
    if lines:
        yield _group(source, f"#{number}" if waiting is not None else "", lines)


def _group(source: Source, row: str, lines: list[str]) -> Text:
    text = "\n".join(lines)
    return Text(source.name + row, "", text, (Section(0, len(text), unbroken=True),), CSV)
