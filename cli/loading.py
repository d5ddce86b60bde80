"""Opening artifacts for commands."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..runtime.llm import LLM


def load(path: str | os.PathLike[str], **options: Any) -> LLM:
    """`llmc.load`, with the type that it has here too."""
    import llmc

    return llmc.load(path, **options)
