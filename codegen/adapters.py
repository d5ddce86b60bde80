"""`--lora PATH[:scale]`: adapters named on the command line, as passes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from ..frontend.lora import read_adapter
from ..ir.errors import InputError
from ..passes.adapt.lora import MergeLora


@dataclass(frozen=True)
class LoraOption:
    """An adapter's folder, and what its change is multiplied by."""

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
        if not math.isfinite(scale):
            raise InputError(f"--lora {text}: {number} is no scale", remedy="give a number, such as 0.5")
        return LoraOption(Path(path), scale)

    def command(self) -> list[str]:
        """The option without folders, so that the same inputs give the same bytes."""
        return ["--lora", self.path.name + ("" if self.scale == 1.0 else f":{self.scale:g}")]

    def key(self) -> list[object]:
        """What tells whether interrupted work was on the same adapter."""
        with open(self.path / "adapter_model.safetensors", "rb") as file:
            digest = sha256()
            while piece := file.read(1 << 20):
                digest.update(piece)
        return [self.path.name, self.scale, digest.hexdigest()]


def adapter_passes(options: Sequence[LoraOption]) -> tuple[MergeLora, ...]:
    """A pass for each adapter, its files opened and checked."""
    return tuple(MergeLora(read_adapter(o.path), o.scale) for o in options)
