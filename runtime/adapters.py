"""Adapters that are chosen per request, and which are loaded.

An adapter's factors stand in a slot of the executor's memory; each token of a step says which slot is its
own. `AdapterRegistry` belongs to the engine: it gives names to slots, and takes a slot back when no request
uses it.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from ..codegen.artifact import Artifact
from ..ir.adapters import listed
from ..ir.errors import InputError, LlmcError, UnsupportedError
from .adapter_places import MERGE, AdapterPlaces, BaseWeights, Factors
from .executor.base import Executor

if TYPE_CHECKING:
    from ..ir.adapters import Adapter
    from ..ir.gguf_rows import GGUFRows
    from ..ir.stored_modules import StoredModules

_log = logging.getLogger("llmc.runtime")
_CHOOSE = ("tvm-cpu", "tvm-cuda")
"""Targets that can be compiled with places for adapters."""


@runtime_checkable
class TakesAdapters(Protocol):
    """An executor whose kernels have places for adapters."""

    adapter_places: AdapterPlaces | None

    def packed_adapter(self, factors: Factors) -> Any:
        """What `set_adapter` takes: all of its work that may be done while steps run. Raises InputError where
        the factors do not suit the kernels.
        """
        ...

    def set_adapter(self, slot: int, packed: Any) -> None:
        """Fill a slot. Between two steps."""
        ...

    def clear_adapter(self, slot: int) -> None:
        """Empty a slot, and give its memory back. Between two steps."""
        ...


class AdapterInUseError(LlmcError):
    """Requests that run use the adapter."""


@dataclass(eq=False, slots=True)
class LoadedAdapter:
    """An adapter in a slot.

    Attributes:
        salt: of its prefixes in the cache, by what it adds: whatever its name, and in any process.
        removed: it gave its slot back.
    """

    name: str
    slot: int
    salt: bytes
    removed: bool = False


@dataclass(frozen=True)
class ReadAdapter:
    """An adapter that was read, checked and packed, not yet in a slot. `salt` as in `LoadedAdapter`."""

    name: str
    salt: bytes
    packed: Any


def _digest(factors: Factors) -> bytes:
    """Tells adapters apart by what they add, whatever they are called."""
    found = hashlib.sha256(b"adapter")
    for place in sorted(factors):
        parts = factors[place]
        for p, part in enumerate(parts):
            for array in part or ():
                found.update(f"{place} {p} {array.dtype} {array.shape} ".encode())
                found.update(np.ascontiguousarray(array).data)
    return found.digest()


class AdapterRegistry:
    """The adapters of one engine. `put` and `remove` belong between two steps."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._loaded: dict[str, LoadedAdapter] = {}
        self.default: str | None = None
        """What requests use that name none; None is the model as it is."""
        self.gguf_rows: Callable[[], GGUFRows | None] = lambda: None
        """Where the model's modules stand in the GGUF file that it was compiled from, for adapters of it."""
        self.stored_modules: Callable[[], StoredModules | None] = lambda: None
        """What the model's checkpoint calls its modules, for adapters that do."""
        self.base: BaseWeights | None = None
        """The model's weights, for adapters with magnitudes (DoRA) or trained biases."""

    def names(self) -> list[str]:
        """Those that are loaded, in order."""
        return list(self._loaded)

    def get(self, name: str | None) -> LoadedAdapter | None:
        """The adapter of a request, None for the model as it is. Raises InputError for an unknown name."""
        name = self.default if name is None else name
        if name is None:
            return None
        found = self._loaded.get(name)
        if found is None:
            raise InputError(
                f"no adapter is called {name[:200]!r}", remedy=f"loaded: {', '.join(self._loaded) or 'none'}"
            )
        return found

    def read(self, name: str, path: str | os.PathLike[str]) -> ReadAdapter:
        """Read an adapter's folder, or GGUF file, and make of it what a slot takes; nothing changes, so steps
        may run meanwhile. Raises InputError or UnsupportedError, naming the file and what is wrong.
        """
        executor = self._executor
        if not isinstance(executor, TakesAdapters) or executor.adapter_places is None:
            raise UnsupportedError(
                "this artifact's kernels have no places for adapters",
                remedy="compile the model with --adapters, or the adapter into it with --lora",
            )
        factors = executor.adapter_places.factors(self._open(Path(path)), self.stored_modules(), self.base)
        return ReadAdapter(name, _digest(factors), executor.packed_adapter(factors))

    def _open(self, path: Path) -> Adapter:
        from ..frontend.lora import is_gguf, read_adapter

        if not is_gguf(path):
            return read_adapter(path)
        if find_spec("gguf") is None:
            raise UnsupportedError(
                f"adapter {path.name} is a GGUF file, which the package gguf reads",
                remedy="pip install gguf, or give PEFT's folder",
            )
        from ..frontend.lora_gguf import read_gguf_adapter

        rows = self.gguf_rows()
        if rows is None:
            raise UnsupportedError(
                f"adapter {path.name} is a GGUF file, which has the names of a GGUF model's tensors; the "
                "artifact was compiled of another, or by a version before",
                remedy="compile the model's GGUF file with this version, or give PEFT's folder",
            )
        adapter = read_gguf_adapter(path, "this model", rows.architecture)
        if adapter.norms:
            _log.warning("adapter %s: %s are left out", path.name, listed(adapter.norms))
        return adapter.of_modules(rows)

    def put(self, adapter: ReadAdapter) -> LoadedAdapter:
        """Give an adapter a slot. Raises InputError where the name is taken."""
        if adapter.name in self._loaded:
            raise InputError(
                f"an adapter is called {adapter.name!r} already",
                remedy="remove that one, or use another name",
            )
        assert isinstance(self._executor, TakesAdapters)
        taken = {one.slot for one in self._loaded.values()}
        slot = next(slot for slot in itertools.count() if slot not in taken)
        self._executor.set_adapter(slot, adapter.packed)
        loaded = LoadedAdapter(adapter.name, slot, adapter.salt)
        self._loaded[adapter.name] = loaded
        return loaded

    def remove(self, name: str, used: int) -> None:
        """Give a slot back; `used` is the number of requests that have it. Raises AdapterInUseError where
        there are any, InputError for an unknown name.
        """
        found = self.get(name)
        assert found is not None
        if used:
            raise AdapterInUseError(
                f"adapter {name!r} is used by {used} running request{'s' if used > 1 else ''}",
                remedy="try again when they are finished",
            )
        assert isinstance(self._executor, TakesAdapters)
        del self._loaded[name]
        found.removed = True
        if self.default == name:
            self.default = None
        self._executor.clear_adapter(found.slot)


def _scaled_by(artifact: Artifact) -> str | None:
    """The scheme or pass by which an artifact's layers read scaled channels; None where there is none that
    this version has. Graphs say it too, but not those of versions before.
    """
    scheme = str(artifact.manifest.get("quantization", {}).get("scheme"))
    if scheme.startswith("awq-"):
        return scheme
    words = artifact.manifest.get("command")
    passes = [str(word).partition(":")[0] for word in words] if isinstance(words, list) else []
    return next((name for name in ("scale-channels", "quantize-awq") if name in passes), None)


def check_places(artifact: Artifact, executor: Executor) -> None:
    """Raise UnsupportedError, with the command that compiles it again, where an artifact's kernels take no
    adapters, or its layers read other than their modules do: AWQ's scales were moved between them.
    """
    scaled = _scaled_by(artifact)
    if scaled is not None:
        raise UnsupportedError(
            f"{artifact.root.name} is of {scaled}, which scales what layers read: adapters know of no scales",
            remedy=f"compile the model in another scheme, such as gptq-int4-g32, or {MERGE}",
        )
    if isinstance(executor, TakesAdapters) and executor.adapter_places is not None:
        return
    name = getattr(executor, "target_name", None) or "this target"
    other = "tvm-cpu" in artifact.targets and name != "tvm-cpu"
    if other and name not in _CHOOSE:
        raise UnsupportedError(
            f"{name} takes no adapters per request ({artifact.root.name})",
            remedy="open it with --target tvm-cpu",
        )
    command = [str(word) for word in artifact.manifest.get("command") or ("llmc", "compile", "MODEL")]
    remedy = f"compile it with --adapters: {' '.join([*command, '--adapters', '-o', artifact.root.name])}"
    if name not in _CHOOSE:
        remedy = f"{MERGE}; only {' and '.join(_CHOOSE)} choose adapters per request"
    raise UnsupportedError(
        f"the kernels of {artifact.root.name} have no places for adapters",
        remedy=f"open it with --target tvm-cpu, or {remedy}" if other else remedy,
    )


__all__ = [
    "AdapterInUseError",
    "AdapterRegistry",
    "LoadedAdapter",
    "TakesAdapters",
    "check_places",
]
