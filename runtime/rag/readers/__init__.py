"""Readers: a file in, its documents' texts out.

To add a format, write `read(source: Source) -> Iterator[Text]` in a module of its own and give it a line in
`FORMATS`. What a reader may rely on is in `base.py`: limits, the file's bytes, and a builder for texts with
headings.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

from ....ir.errors import InputError, LlmcError
from ..types import Text
from .base import OnProblem, ReadLimits, Source
from .characters import bom, check_not_binary
from .titles import title_from_name

__all__ = ["FORMATS", "ReadLimits", "is_supported", "read_documents", "suffixes", "title_from_name"]

_CODE = """
py pyi pyw js mjs cjs jsx ts tsx mts cts vue svelte go rs c h cc cpp cxx hpp hh hxx cu cuh m mm ino java kt
kts cs scala swift dart groovy rb rake ex exs cr php sh bash zsh fish ksh lua pl pm r sql proto thrift
graphql toml ini cfg conf properties desktop yaml yml css scss less mk cmake
"""
# Suffixes → module and function, imported when a file of theirs is read.
FORMATS: tuple[tuple[str, str, str], ...] = (
    ("txt text log rst org adoc tex srt vtt", "plain", "read_plain"),
    ("md markdown mdown mkd mdx qmd", "markdown", "read_markdown"),
    ("html htm xhtml", "html", "read_html"),
    ("pdf", "pdf", "read_pdf"),
    ("docx docm", "docx", "read_docx"),
    ("csv", "table", "read_csv"),
    ("tsv tab", "table", "read_tsv"),
    ("jsonl ndjson jsonlines", "json_lines", "read_json_lines"),
    ("json", "json_file", "read_json"),
    (_CODE, "code", "read_code"),
)
_NAMES = {"makefile": ("code", "read_code"), "dockerfile": ("code", "read_code")}
_BY_SUFFIX = {suffix: (module, name) for listed, module, name in FORMATS for suffix in listed.split()}
_PLAIN = ("plain", "read_plain")


def suffixes() -> list[str]:
    """Suffixes of the formats that are read, in order, without their dot."""
    return sorted(_BY_SUFFIX)


def is_supported(path: Path) -> bool:
    """Whether a file's name says a format that is read. One without a suffix is where it begins
    as text does."""
    if _reader_named(path.name) is not None:
        return True
    return not path.suffix and _is_text(path)


def _reader_named(name: str) -> tuple[str, str] | None:
    base = PurePosixPath(name).name.lower()
    stem, dot, suffix = base.rpartition(".")
    return _NAMES.get(base) or (_BY_SUFFIX.get(suffix) if dot and stem else None)


def _is_text(path: Path) -> bool:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with open(path, "rb") as file:
            head = file.read(4096)
        if bom(head)[0]:
            return True
        check_not_binary(head, path.name)
    except (OSError, ValueError, InputError):  # ValueError: a NUL in the name
        return False
    return True


def _ignore(id: str, reason: str) -> None: ...


def read_documents(
    path: Path, name: str, limits: ReadLimits | None = None, on_problem: OnProblem = _ignore
) -> Iterator[Text]:
    """The documents of one file, in its order.

    `name`: the file's path below the folder, with `/`; the id of its document, and what the ids of many begin
    with (`name#row`). `on_problem(id, reason)` is told of rows and pages that were skipped.

    Raises InputError that begins with the name where the file cannot be read or gives no document at all. It
    may come after some documents, from a file that is damaged further on.
    """
    source = Source(path, name, limits or ReadLimits(), on_problem)
    read = _reader_of(source)
    given = 0
    try:
        for text in read(source):
            given += 1
            yield text
    except LlmcError:
        raise
    except Exception as error:  # (libraries raise anything on damaged files)
        said = " ".join(str(error).split())[:200]
        raise InputError(f"{name}: cannot be read: {type(error).__name__}: {said}") from error
    if not given:
        raise source.no_text()


def _reader_of(source: Source) -> Callable[[Source], Iterator[Text]]:
    found = _reader_named(source.name) or _reader_named(source.path.name)
    if found is None:
        suffix = PurePosixPath(source.name).suffix
        if suffix and not _is_text(source.path):
            raise InputError(
                f"{source.name}: files of this kind ({suffix}) are not read",
                remedy="convert it to one of: txt, md, html, pdf, docx, csv, jsonl",
            )
        found = _PLAIN
    module: Any = import_module(f".{found[0]}", __name__)
    return getattr(module, found[1])
