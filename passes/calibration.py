"""What a pass gets to calibrate on: sequences of token ids (frontend/calibration.py makes them of text).

text, chats → token ids → sequences to calibrate on, and others that are held out for verdicts
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np

from ..ir.errors import CompileError
from . import data as data_files

Array = np.ndarray[Any, Any]

TOKENS = 32 * 512
"""Tokens to calibrate on where nothing else is asked."""
HELD_TOKENS = 8 * 512
LENGTH = 512
"""Tokens a sequence; fewer where the model's context is shorter."""


@dataclass(frozen=True)
class Calibration:
    """Token ids, in the order in which they are to be used.

    Attributes:
        sequences: int64 [L] each, all of one length, to calibrate on.
        held: int64 [L] each, of the end of the text and disjoint from `sequences`: verdicts and choices,
            never calibrated on.
        name: of the file, or "built-in".
        sha256: of the text that they came from, as it was read.
    """

    sequences: tuple[Array, ...]
    held: tuple[Array, ...]
    name: str
    sha256: str

    @property
    def tokens(self) -> int:
        """Tokens to calibrate on."""
        return sum(len(one) for one in self.sequences)


DEFAULT_FILE = "calibration.jsonl"
DEFAULT_SHA256 = "ee74aaa93d8ba0b2c3192a1985a7273c94cfc29d2d0819ae0ed3c9ce09d26fc1"


def default_text() -> bytes:
    """The calibration text that ships with llmc (passes/data/NOTE.md), a JSONL of texts and chats.

    Raises CompileError where the file is not the one that this version was made with.
    """
    try:
        data = (files(data_files) / DEFAULT_FILE).read_bytes()
    except OSError as error:
        raise CompileError(
            f"llmc's calibration text cannot be read: {error.strerror}", remedy="install llmc again"
        ) from None
    found = hashlib.sha256(data).hexdigest()
    if found != DEFAULT_SHA256:
        raise CompileError(
            f"llmc's calibration text is damaged: its sha256 is {found[:16]}…, not {DEFAULT_SHA256[:16]}…",
            remedy="install llmc again, or give a text of your own: --calib FILE",
        )
    return data


def too_few_tokens(weight: str, tokens: int, columns: int) -> str | None:
    """Why a weight that saw `tokens` rows of input is rounded to nearest, as a note; None where they suffice.

    Error-minimising quantizers estimate how the K = `columns` inputs go together. Experts of a mixture see
    what the router sends them: below `columns` / 8 tokens (32 at least) the estimate is of the sample, not of
    the model, and makes the error on other text larger than rounding does.
    """
    needed = max(32, columns // 8)
    if tokens >= needed:
        return None
    return f"{weight} saw {tokens} calibration tokens, fewer than {needed}: rounded to nearest instead"
