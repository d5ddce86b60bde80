"""Opening artifacts for commands."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..runtime.llm import LLM


def load(path: str | os.PathLike[str], **options: Any) -> LLM:
    """`llmc.runtime.loader.load`; where adapters are asked for, with what makes kernels that take them."""
    from ..runtime.loader import load as open_artifact

    if options.get("adapters") is not None or options.get("adapter") is not None:
        from ..codegen.tvm.placed import placed_kernels

        options["places"] = placed_kernels
    return open_artifact(path, **options)
