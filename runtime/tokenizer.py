"""The tokenizer that an artifact carries, as the runtime uses it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer as _Tokenizer

from ..ir.errors import ArtifactError, InputError


def _byte_level() -> dict[str, int]:
    """Letter → byte of GPT-2's vocabulary: printable bytes stand for themselves, the others, in order, for
    the code points from 256 on.
    """
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(kept)]
    return {chr(byte): byte for byte in kept} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level()


class Tokenizer:
    """A `tokenizer.json` of the tokenizers library. Safe to use from several threads."""

    def __init__(self, inner: _Tokenizer):
        inner.no_truncation()  # neither is the runtime's wish, whatever the file was saved with
        inner.no_padding()
        self._inner = inner
        self._alone: dict[bool, dict[int, str | None]] = {True: {}, False: {}}

    @staticmethod
    def from_file(path: Path) -> Tokenizer:
        """Raises ArtifactError where the file is no tokenizer."""
        try:
            return Tokenizer(_Tokenizer.from_file(str(path)))
        except Exception as error:  # noqa: BLE001  (the library raises Exception itself)
            raise ArtifactError(
                f"{path} is not a tokenizer ({str(error)[:100]})", remedy="compile the model again"
            ) from None

    @property
    def vocab_size(self) -> int:
        """Ids, added tokens included; the model's own vocabulary may be padded beyond it."""
        return self._inner.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text. `add_special_tokens=False` for a rendered chat template, which wrote its own.

        Raises InputError for lone surrogates, which Python makes of bytes on the command line or on standard
        input that are not UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the text is not valid Unicode (character {error.start + 1})", remedy="give it as UTF-8"
            ) from None
        return self._inner.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids. Bytes that are no UTF-8 become U+FFFD."""
        return self._inner.decode(ids, skip_special_tokens=skip_special_tokens)

    def text_alone(self, token_id: int, *, skip_special_tokens: bool = True) -> str | None:
        """The text of a token behind any whole characters and before any others; None where it depends on
        its neighbours: part of a character, or a vocabulary that does not spell bytes.
        """
        if not self._is_byte_level:
            return None
        known = self._alone[skip_special_tokens]
        if token_id not in known:
            text = self.decode([token_id], skip_special_tokens=skip_special_tokens)
            known[token_id] = None if "\ufffd" in text else text
        return known[token_id]

    def to_json(self) -> str:
        """All of it as the text of a `tokenizer.json`."""
        return self._inner.to_str()

    def token(self, token_id: int) -> str | None:
        """The vocabulary's entry of an id; None where there is none."""
        return self._inner.id_to_token(token_id)

    def token_id(self, token: str) -> int | None:
        """The id of a vocabulary's entry; None where there is none."""
        return self._inner.token_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for by itself, which may be part of a character."""
        token = self._inner.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self.byte_ids:
            return bytes([int(token[3:5], 16)])
        if self._is_byte_level and token_id not in self._added_ids:
            with contextlib.suppress(KeyError):
                return bytes(_BYTE_LEVEL[letter] for letter in token)
        if token_id in self._added_ids:
            return token.encode()
        return token.replace("\u2581", " ").encode()  # the space of SentencePiece

    @cached_property
    def _is_byte_level(self) -> bool:
        """Whether a vocabulary's entry spells bytes as GPT-2 does; asked of the decoder, as `byte_ids` is."""
        space = self._inner.token_to_id("\u0120")
        return space is not None and self.decode([space], skip_special_tokens=False) == " "

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        return frozenset(self._inner.get_added_tokens_decoder())

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self._inner.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that `skip_special_tokens` leaves out."""
        return self._special_ids

    @property
    def special_tokens(self) -> list[str]:
        """The texts of `special_ids`."""
        return [
            token for token_id in sorted(self._special_ids) if (token := self.token(token_id)) is not None
        ]

    @property
    def added_tokens(self) -> Mapping[str, int]:
        """Texts that are read as one token wherever they stand, special (`special_ids`) or not."""
        return {token.content: one for one, token in self._inner.get_added_tokens_decoder().items()}

    @property
    def byte_ids(self) -> frozenset[int]:
        """Ids of single bytes (`<0xE2>`) where the decoder joins runs of them; empty for other tokenizers."""
        return self._byte_ids

    @cached_property
    def _byte_ids(self) -> frozenset[int]:
        # Asked of the decoder itself: reading the tokenizer's JSON again would take longer than loading it.
        letter = self._inner.token_to_id("<0x41>")
        if letter is None or self.decode([letter], skip_special_tokens=False).strip() != "A":
            return frozenset()
        found = (self._inner.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        return frozenset(token_id for token_id in found if token_id is not None)
