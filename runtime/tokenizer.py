"""The tokenizer that an artifact carries, as the runtime uses it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer as _Tokenizer

from ..ir.errors import ArtifactError, InputError


class Tokenizer:
    """A `tokenizer.json` of the tokenizers library. Safe to use from several threads."""

    def __init__(self, inner: _Tokenizer):
        inner.no_truncation()  # neither is the runtime's wish, whatever the file was saved with
        inner.no_padding()
        self._inner = inner

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

    def token(self, token_id: int) -> str | None:
        """The vocabulary's entry of an id; None where there is none."""
        return self._inner.id_to_token(token_id)

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self._inner.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that `skip_special_tokens` leaves out."""
        return self._special_ids

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
