"""A prompt in any form that the engine takes → its token ids, checked."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from ..ir.errors import InputError
from .tokenizer import Tokenizer


def prompt_ids(prompt: str | Sequence[int], tokenizer: Tokenizer | None, vocab_size: int) -> array[int]:
    """Ids of a text, or those that were given. Raises InputError where they are none of the vocabulary's."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InputError("the prompt is text, but there is no tokenizer", remedy="give token ids")
        ids = tokenizer.encode(prompt)
    else:
        ids = list(prompt)
    if not ids:
        raise InputError("the prompt is empty", remedy="give at least one token")
    try:
        result = array("i", ids)
    except (TypeError, OverflowError):
        raise InputError(
            "the prompt holds something that is no token id", remedy="give whole numbers"
        ) from None
    if min(result) < 0 or max(result) >= vocab_size:
        wrong = next(i for i in result if not 0 <= i < vocab_size)
        raise InputError(f"prompt token {wrong} is no id", remedy=f"allowed: 0 to {vocab_size - 1}")
    return result
