"""`--lora PATH[:scale]`: adapters named on the command line, as passes; and what an artifact says to adapters
that requests choose.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..frontend import stored_modules
from ..frontend.lora import is_gguf, read_adapter
from ..frontend.lora_gguf import rows_of_modules
from ..frontend.source import ModelSource
from ..ir import gguf_rows
from ..ir import stored_modules as names
from ..ir.adapters import MOST
from ..ir.errors import InputError
from ..passes.adapt.lora import MergeLora
from .artifact import ArtifactWriter


@dataclass(frozen=True)
class LoraOption:
    """An adapter's folder or GGUF file, and what its change is multiplied by."""

    path: Path
    scale: float = 1.0

    @staticmethod
    def parse(text: str) -> LoraOption:
        """`PATH` or `PATH:scale`. Raises InputError for a scale that is no finite number."""
        path, colon, number = text.rpartition(":")
        if not colon or Path(text).exists():
            return LoraOption(Path(text))
        try:
            scale = float(number)
        except ValueError:
            return LoraOption(Path(text))  # a path with a colon in it, which is not there either
        if not abs(scale) <= MOST:
            raise InputError(f"--lora {text}: {number} is no scale", remedy="give a number, such as 0.5")
        return LoraOption(Path(path), scale)

    @property
    def is_gguf(self) -> bool:
        """Whether it changes the tensors of a GGUF model, and no graph."""
        return is_gguf(self.path)

    def command(self) -> list[str]:
        """The option without folders, so that the same inputs give the same bytes."""
        return ["--lora", self.path.name + ("" if self.scale == 1.0 else f":{self.scale:g}")]

    def key(self) -> list[object]:
        """What tells whether interrupted work was on the same adapter."""
        names = ("adapter_config.json", "adapter_model.safetensors")
        digest = sha256()
        for path in (self.path,) if self.is_gguf else (self.path / name for name in names):
            with open(path, "rb") as file:
                while piece := file.read(1 << 20):
                    digest.update(piece)
        return [self.path.name, self.scale, digest.hexdigest()]


def adapter_passes(options: Sequence[LoraOption]) -> tuple[MergeLora, ...]:
    """A pass for each adapter that is a folder, its files opened and checked."""
    return tuple(MergeLora(read_adapter(o.path), o.scale) for o in options if not o.is_gguf)


def merge_gguf_adapters(source: ModelSource, options: Sequence[LoraOption]) -> list[str]:
    """Merge those that are GGUF files into the source's tensors; sentences on what that changes."""
    return [
        f"adapter {one.path.name}: {note}"
        for one in options
        if one.is_gguf
        for note in source.merge_gguf_adapter(one.path, one.scale)
    ]


def write_module_names(source: ModelSource, writer: ArtifactWriter) -> None:
    """For adapters that requests choose, in other names than the model's: where its modules stand in a GGUF
    file, and what its checkpoint calls them.
    """
    if source.does != "causal_lm":
        return
    if source.gguf is not None:
        rows = rows_of_modules(source.gguf.architecture, source.weights, source.stored)
        _write(writer, gguf_rows.FILE, rows.to_json())
    named = stored_modules.stored_modules(source)
    if named:
        _write(writer, names.FILE, named.to_json())


def _write(writer: ArtifactWriter, path: str, content: dict[str, Any]) -> None:
    text = json.dumps(content, separators=(",", ":"))
    writer.path(path).write_text(text + "\n", encoding="utf-8", newline="\n")
