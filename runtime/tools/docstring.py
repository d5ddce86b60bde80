"""What a docstring says of a function and its arguments, in the three forms that are in use.

Google                          NumPy                       Sphinx

Args:                           Parameters                  :param city: Its name.
    city: Its name.             ----------                  :param str city: Its name.
    unit (str): Of the answer.  city : str
                                    Its name.
"""

from __future__ import annotations

import inspect
import itertools
import re
from dataclasses import dataclass, field

_ARGUMENTS = r"args|arguments|parameters|params|attributes|keyword arg(?:ument)?s|other parameters"
_OTHERS = r"returns?|yields?|raises|examples?|notes?|see also|references|warns|warnings?|todo"
_GOOGLE = re.compile(rf"({_ARGUMENTS}|{_OTHERS}):\s*", re.IGNORECASE)
_OF_ARGUMENTS = re.compile(_ARGUMENTS, re.IGNORECASE)
_GOOGLE_ENTRY = re.compile(r"\*{0,2}(\w+)\s*(?:\([^)]*\)+)?\s*:\s*(.*)")
_NUMPY_ENTRY = re.compile(r"(\*{0,2}\w+(?:\s*,\s*\*{0,2}\w+)*)\s*(?::.*)?")
_SPHINX = re.compile(r":(\w+)(?:\s+([^:]*))?:\s*(.*)")
_SPHINX_ARGUMENTS = frozenset({"param", "parameter", "arg", "argument", "key", "keyword"})


@dataclass
class Docstring:
    """A docstring, read."""

    description: str = ""
    """What stands before the first section: a paragraph a line."""
    arguments: dict[str, str] = field(default_factory=dict)
    """Argument → what is said about it."""


def read_docstring(text: str | None) -> Docstring:
    """Read a docstring of any of the three forms; what is of none of them is all description."""
    lines = inspect.cleandoc(text or "").splitlines()
    start = next((i for i in range(len(lines)) if _begins_section(lines, i)), len(lines))
    found = Docstring(_paragraphs(lines[:start]))
    while start < len(lines):
        end = next((i for i in range(start + 1, len(lines)) if _begins_section(lines, i)), len(lines))
        _read_section(lines[start:end], found.arguments)
        start = end
    return found


def _begins_section(lines: list[str], index: int) -> bool:
    line = lines[index]
    return bool(_GOOGLE.fullmatch(line) or _underlined(lines, index) or _SPHINX.fullmatch(line))


def _underlined(lines: list[str], index: int) -> bool:
    rule = lines[index + 1] if index + 1 < len(lines) else ""
    return bool(re.match(r"\w", lines[index]) and re.fullmatch(r"-{3,}\s*", rule))


def _read_section(lines: list[str], arguments: dict[str, str]) -> None:
    sphinx = _SPHINX.fullmatch(lines[0])
    if sphinx is not None:
        kind, subject, text = sphinx.group(1), (sphinx.group(2) or "").split(), sphinx.group(3)
        if kind in _SPHINX_ARGUMENTS and subject:
            arguments.setdefault(subject[-1].lstrip("*"), _joined([text, *lines[1:]]))
    elif _underlined(lines, 0):
        if _OF_ARGUMENTS.fullmatch(lines[0].strip()):
            _entries(lines[2:], _NUMPY_ENTRY, arguments)
    elif _OF_ARGUMENTS.match(lines[0]):
        body = itertools.takewhile(lambda line: not line.strip() or line[0].isspace(), lines[1:])
        _entries(list(body), _GOOGLE_ENTRY, arguments)


def _entries(lines: list[str], entry: re.Pattern[str], arguments: dict[str, str]) -> None:
    """Entries of a section: a name at the section's own indentation, its text behind it or further in."""
    filled = [line for line in lines if line.strip()]
    indent = min((len(line) - len(line.lstrip()) for line in filled), default=0)
    names: list[str] = []
    texts: list[str] = []
    for line in [*filled, ""]:
        deeper = len(line) - len(line.lstrip()) > indent
        head = None if deeper else entry.fullmatch(line.strip())
        if line and head is None:
            texts.append(line)
            continue
        for name in names:
            arguments.setdefault(name.strip().lstrip("*"), _joined(texts))
        if head is not None:
            names = head.group(1).split(",")
            texts = [head.group(2)] if entry is _GOOGLE_ENTRY else []


def _joined(lines: list[str]) -> str:
    return " ".join(" ".join(lines).split())


def _paragraphs(lines: list[str]) -> str:
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines))
    return "\n".join(filter(None, (_joined(part.splitlines()) for part in paragraphs)))
