"""JSON lines: a document a line, read one by one."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from typing import BinaryIO

from ..types import Text
from .base import MEGABYTE, Source
from .characters import bom, check_not_binary, fallback, stray_encoding
from .json_file import read_json
from .rows import Rows

MEDIA_TYPE = "application/jsonl"


def read_json_lines(source: Source) -> Iterator[Text]:
    with source.open() as file:
        head = file.read(65536)
        file.seek(0)
        if bom(head)[0].startswith(("utf-16", "utf-32")):
            source.check_size(file)
            file = io.BytesIO(file.read().decode(bom(head)[0][:6], "replace").encode("utf-8", "replace"))
        else:
            check_not_binary(head, source.name)
            if head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[" and not _is_json(head.split(b"\n")[0]):
                yield from read_json(source)  # one list over many lines, under another name
                return
        yield from _rows(file, source)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _rows(file: BinaryIO, source: Source) -> Iterator[Text]:
    rows = Rows(source, MEDIA_TYPE)
    number = -1
    for line in _lines(file, source, rows):
        number += 1
        if line is None or not line.strip():
            number -= line is not None  # empty lines are no rows
            continue
        if rows.over_limit():
            return
        rows.number += 1
        note: dict[str, str] = {}
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            text, note = line.decode("utf-8", errors=fallback()), {"encoding": stray_encoding(line)}
        try:
            value = json.loads(text)
            document = rows.document(value, number=number, note=note)
        except json.JSONDecodeError as error:
            rows.skip(number, f"no valid JSON: {error.msg} at character {error.pos}")
        except RecursionError:
            rows.skip(number, "its values are nested too deep")
        except ValueError as error:  # a number of thousands of digits
            rows.skip(number, str(error))
        else:
            if document is not None:
                yield document


def _lines(file: BinaryIO, source: Source, rows: Rows) -> Iterator[bytes | None]:
    """The file's lines; None for one that is longer than a file may be, which is reported."""
    limit = source.limits.max_bytes
    first = True
    number = -1
    while line := file.readline(limit + 1):
        number += bool(line.strip())
        if first:
            line, first = line.removeprefix(codecs.BOM_UTF8), False
        if len(line) > limit:
            while line and not line.endswith(b"\n"):
                line = file.readline(1 << 20)
            rows.skip(number, f"has more than {limit / MEGABYTE:,.0f} MB; --max-file-mb raises the limit")
            yield None
        else:
            yield line
