"""Text and chats → token sequences to calibrate on, by the tokenizer that goes into the artifact.

A calibration file is UTF-8 text, or, named *.jsonl, one JSON object a line of these forms:

    {"messages": [{"role": "user", "content": "…"}, …]}      chats, written by the model's own chat template
    {"conversations": [{"from": "human", "value": "…"}, …]}
    {"prompt": "…", "completion": "…"}
    {"text": "…"}

The last tokens are held out, the others are taken evenly from the whole of the file. The same file, model and
numbers give the same sequences.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..ir.errors import InputError
from .chat_shapes import Message, Renderer

Array = np.ndarray[Any, Any]
Chat = tuple[Message, ...]
Row = str | Chat

MAX_BYTES: Final = 64 << 20
MIN_TOKENS: Final = 2048
"""Fewer tokens than these estimate nothing."""
MIN_DISTINCT: Final = 32
_MAX_SHARE: Final = 0.8  # of the most frequent token: a page of blanks has other tokens too
_PIECE: Final = 4096  # characters that are encoded at a time
_CHARACTERS: Final = 16  # taken for each token wanted; where a token spells more, all of the text is encoded
_ROLES: Final = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_FORMS: Final = (
    'write {"messages": […]}, {"conversations": […]}, {"prompt": …, "completion": …} or {"text": …}'
)


@dataclass(frozen=True)
class CalibrationText:
    """A calibration file that was read and checked; `sha256` is of its bytes."""

    name: str
    sha256: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Sequences:
    """int64 [L] each, all of one length: to calibrate on, and held out. `notes` are for the user."""

    sequences: tuple[Array, ...]
    held: tuple[Array, ...]
    notes: tuple[str, ...]


def read_text_file(path: Path) -> CalibrationText:
    """Read a calibration file. Raises InputError, with the line or the offset, for anything else."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise InputError(
                f"calibration file {path} has {size / 1e6:.0f} MB, more than the {MAX_BYTES >> 20} MiB read",
                remedy=f"give a part of it: head -c {MAX_BYTES} {path.name}",
            )
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot read calibration file {path}: {error.strerror}",
            remedy="check the path and its permissions",
        ) from None
    return parse_text(data, path.name)


def parse_text(data: bytes, name: str) -> CalibrationText:
    """The rows of a file's bytes; a name that ends in .jsonl makes it JSONL. Raises InputError."""
    try:
        text = data.decode("utf-8-sig")
        binary = "\0" in text
        why = "it holds a zero byte"
    except UnicodeDecodeError as error:
        text, binary = "", True
        why = f"byte 0x{data[error.start]:02x} at offset {error.start} is no UTF-8"
    if binary:
        raise InputError(f"calibration file {name} is not text: {why}", remedy="give UTF-8 text or JSONL")
    if not text.strip():
        raise InputError(f"calibration file {name} is empty", remedy="give some pages of text")
    rows = tuple(_parse_lines(text, name)) if name.endswith(".jsonl") else (text,)
    return CalibrationText(name, hashlib.sha256(data).hexdigest(), rows)


def _parse_lines(text: str, name: str) -> Iterable[Row]:
    # Not splitlines(): a JSON string may hold U+2028, which that takes for the end of a line.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", type(error).__name__)
            raise InputError(
                f"calibration file {name}, line {number}: no valid JSON ({reason})",
                remedy="one JSON object a line, or name a text *.txt",
            ) from None
        row = _row(value)
        if row is None:
            raise InputError(f"calibration file {name}, line {number}: no text and no chat", remedy=_FORMS)
        yield row


def _row(value: Any) -> Row | None:
    """The text or chat of a line; None where it is neither."""
    if not isinstance(value, Mapping):
        return None
    if isinstance(value.get("text"), str):
        return value["text"].rstrip() + "\n\n"
    turns = value.get("messages", value.get("conversations"))
    if turns is None and "prompt" in value and "completion" in value:
        turns = [*_as_turns(value["prompt"], "user"), *_as_turns(value["completion"], "assistant")]
    if not isinstance(turns, list) or not turns:
        return None
    chat = tuple(_message(turn) for turn in turns)
    return None if None in chat else tuple(m for m in chat if m is not None)


def _as_turns(value: Any, role: str) -> list[Any]:
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _message(turn: Any) -> Message | None:
    if not isinstance(turn, Mapping):
        return None
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, Mapping)]
        content = "".join(part for part in parts if isinstance(part, str))
    if not isinstance(role, str) or not isinstance(content, str):
        return None
    return {"role": _ROLES.get(role, role), "content": content}


@dataclass
class TextEncoder:
    """Rows → ids.

    Args:
        tokenizer: path of the artifact's tokenizer.json.
        template, special_tokens, render: the model's chat template and what renders it; without one, chats
            are the plain text of their turns.
    """

    tokenizer: Path
    template: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict[str, str])
    render: Renderer | None = None
    refused: int = 0
    """Chats that the template did not take, and that were encoded as plain text."""

    def __post_init__(self) -> None:
        from tokenizers import Tokenizer

        self._tokenizer: Any = Tokenizer.from_file(str(self.tokenizer))
        bare, full = self._encode("a"), self._encode("a", special=True)
        at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        self.before: list[int] = full[:at]
        """Ids that the tokenizer puts before a text (BOS, [CLS]); every sequence begins with them."""
        self.after: list[int] = full[at + len(bare) :]

    def _encode(self, text: str, *, special: bool = False) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=special).ids

    def ids(self, row: Row) -> list[int]:
        """Ids of one row, without what the tokenizer puts around a text."""
        return self._encode(row if isinstance(row, str) else self._rendered(row))

    def _rendered(self, chat: Chat) -> str:
        plain = "\n\n".join(str(message["content"]) for message in chat) + "\n\n"
        if self.template is None or self.render is None:
            return plain
        for form in (chat, _without_system(chat)):
            try:
                text = self.render(self.template, form, self.special_tokens, False, None)
            except InputError:
                continue
            return text.removeprefix(self.special_tokens.get("bos_token", ""))
        self.refused += 1
        return plain


def _without_system(chat: Chat) -> Chat:
    """A system message joined to the first of the user, for templates that know no such role."""
    if len(chat) < 2 or chat[0]["role"] != "system":
        return chat
    first = f"{chat[0]['content']}\n\n{chat[1]['content']}"
    return ({"role": chat[1]["role"], "content": first}, *chat[2:])


def make_sequences(
    text: CalibrationText, encoder: TextEncoder, *, tokens: int, held_tokens: int, length: int
) -> Sequences:
    """Sequences of `length` ids: `tokens` to calibrate on, rounded up to whole sequences, and `held_tokens`
    of the end of the text.

    A text that holds less is used as far as it goes, and a note says so. Raises InputError where that is
    fewer than `MIN_TOKENS`, or where the tokens are nearly all the same.
    """
    if tokens < MIN_TOKENS:
        raise InputError(f"{tokens:,} calibration tokens are too few", remedy=f"at least {MIN_TOKENS:,}")
    own = length - len(encoder.before) - len(encoder.after)
    if own < 1:
        raise InputError(f"a context of {length} tokens is too short to calibrate", remedy="raise --context")
    count, held = math.ceil(tokens / length), math.ceil(held_tokens / length)
    ids = _encode_evenly(text.rows, encoder.ids, (count + held) * own)
    notes: list[str] = []
    whole = len(ids) // own
    if whole < count + held:
        share = held / (count + held)
        held = min(held, max(1, int(whole * share)))
        count = max(0, whole - held)
        if count * length < MIN_TOKENS:
            raise InputError(
                f"calibration file {text.name} has {len(ids):,} tokens, {tokens:,} to calibrate on and "
                f"{held_tokens:,} to hold out were asked for",
                remedy=f"give at least {MIN_TOKENS + 2 * length:,}, better all of them",
            )
        notes.append(
            f"calibration file {text.name} is shorter than asked: {count * length:,} of {tokens:,} tokens to "
            f"calibrate on, {held * length:,} of {held_tokens:,} held out"
        )
    if encoder.refused:
        notes.append(f"{encoder.refused} chats that the model's template refuses were taken as plain text")
    free = len(ids) - held * own
    _check_variety(ids[:free], text.name)
    starts = [i * (free - own) // max(1, count - 1) for i in range(count)]

    def sequence(start: int) -> Array:
        return np.array([*encoder.before, *ids[start : start + own], *encoder.after], np.int64)

    return Sequences(
        tuple(sequence(start) for start in starts),
        tuple(sequence(free + i * own) for i in range(held)),
        tuple(notes),
    )


def _encode_evenly(rows: Sequence[Row], encode: Callable[[Row], list[int]], wanted: int) -> Array:
    """Ids of the text, at least `wanted` where it has them; of a long one, pieces from all over it."""
    pieces = [piece for row in rows for piece in _split(row)]
    size = sum(_characters(piece) for piece in pieces)
    chosen = pieces
    if size > 2 * _CHARACTERS * wanted:
        count = min(len(pieces), math.ceil(len(pieces) * _CHARACTERS * wanted / size))
        chosen = [pieces[i * len(pieces) // count] for i in range(count)]
    ids = _concatenated(encode, chosen)
    if len(ids) < wanted and len(chosen) < len(pieces):
        ids = _concatenated(encode, pieces)
    return ids


def _concatenated(encode: Callable[[Row], list[int]], pieces: Sequence[Row]) -> Array:
    return np.concatenate([np.zeros(0, np.int64), *(np.array(encode(piece), np.int64) for piece in pieces)])


def _characters(piece: Row) -> int:
    return len(piece) if isinstance(piece, str) else sum(len(str(m["content"])) for m in piece)


def _split(row: Row) -> Iterable[Row]:
    """A text in pieces of at most `_PIECE` characters, cut behind an end of line or a blank; a chat whole."""
    if not isinstance(row, str):
        yield row
        return
    start = 0
    while start < len(row):
        stop = min(len(row), start + _PIECE)
        if stop < len(row):
            cut = max(row.rfind("\n", start, stop), -1)
            cut = cut if cut >= start + _PIECE // 2 else row.rfind(" ", start, stop)
            stop = cut + 1 if cut > start else stop
        yield row[start:stop]
        start = stop


def _check_variety(ids: Array, name: str) -> None:
    kinds, counts = np.unique(ids, return_counts=True)
    share = counts.max() / len(ids)
    if len(kinds) < MIN_DISTINCT or share > _MAX_SHARE:
        raise InputError(
            f"calibration file {name} has {len(kinds)} distinct tokens, and one is {share:.0%} of all",
            remedy=f"give text of the kind that the model will read, with {MIN_DISTINCT} or more",
        )
