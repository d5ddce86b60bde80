"""Bytes to characters, and characters made safe to store: encodings, binary data, control characters, NFC."""

from __future__ import annotations

import codecs
import re
import unicodedata

from ....ir.errors import InputError

_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before utf-16: its mark begins with that of utf-16
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_FALLBACK = "llmc-cp1252"
"""Name of the error handler below, where Python's codecs look it up."""

_BREAKS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f\x80-\x84\x86-\x9f]")
_BINARY = re.compile(b"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")
_DROPPED = re.compile("[\u00ad\ufeff]")  # soft hyphens and byte order marks: they only split words
_SURROGATES = re.compile("[\ud800-\udfff]")
_MARKS = re.compile(r"[^\w\s\x00-\x7f]{32,}")
_MAX_MARKS = 30
"""Of combining marks on one letter, as in Unicode's stream-safe format: ordering more takes square time."""


def _as_cp1252(error: UnicodeError) -> tuple[str, int]:
    """Bytes that are not UTF-8 are taken for Windows' Latin, and the five that it lacks for Latin-1's."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    wrong = error.object[error.start : error.end]
    return "".join(_cp1252(byte) for byte in wrong), error.end


def _cp1252(byte: int) -> str:
    try:
        return bytes((byte,)).decode("cp1252")
    except UnicodeDecodeError:
        return chr(byte)


def fallback() -> str:
    """The error handler that reads stray bytes as cp1252, registered with Python's codecs on first use."""
    try:
        codecs.lookup_error(_FALLBACK)
    except LookupError:
        codecs.register_error(_FALLBACK, _as_cp1252)
    return _FALLBACK


def bom(data: bytes) -> tuple[str, int]:
    """The encoding that a byte order mark names, and the mark's length; ("", 0) where there is none."""
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            return encoding, len(mark)
    return "", 0


def check_not_binary(data: bytes, name: str) -> None:
    """Raise InputError where the bytes (of a file, or its first ones) are no text of an 8-bit encoding."""
    head = data[:65536]
    nul = head.find(b"\0")
    if nul >= 0:
        raise InputError(
            f"{name}: is binary, not text: byte {nul} is 0",
            remedy="give the file the suffix of its format, or leave it out (text in UTF-16 needs its mark)",
        )
    controls = len(_BINARY.findall(head))
    if controls * 50 > len(head):
        raise InputError(
            f"{name}: is binary, not text: {controls} of its first {len(head)} bytes are control characters",
            remedy="give the file the suffix of its format, or leave it out",
        )


def decode(data: bytes, name: str) -> tuple[str, str]:
    """The text of bytes and the name of their encoding: by its mark, else UTF-8, in which stray bytes are
    read as cp1252 ("utf-8+cp1252"; "cp1252" where nothing in it is UTF-8)."""
    encoding, skip = bom(data)
    if encoding.startswith(("utf-16", "utf-32")):
        return data[skip:].decode(encoding, errors="replace"), encoding[:6]
    check_not_binary(data, name)
    try:
        return data[skip:].decode("utf-8"), "utf-8"
    except UnicodeDecodeError:
        return data[skip:].decode("utf-8", errors=fallback()), stray_encoding(data)


def stray_encoding(data: bytes) -> str:
    """What to call bytes that are not all UTF-8."""
    ignoring = data.decode("utf-8", errors="ignore")
    return "cp1252" if ignoring.isascii() else "utf-8+cp1252"


def clean(text: str) -> str:
    """The characters as they are stored: NFC, lines ended by \\n alone, no control characters, no halves of
    surrogate pairs. Spans count these characters."""
    if not text.isascii():
        text = _SURROGATES.sub("\ufffd", text)
        text = _DROPPED.sub("", text)
        text = _MARKS.sub(_thinned, text)
        text = unicodedata.normalize("NFC", text)
    text = _BREAKS.sub("\n", text)
    return _CONTROLS.sub(" ", text)


def _thinned(match: re.Match[str]) -> str:
    kept: list[str] = []
    run = 0
    for character in match[0]:
        run = run + 1 if unicodedata.combining(character) else 0
        if run <= _MAX_MARKS:
            kept.append(character)
    return "".join(kept)
