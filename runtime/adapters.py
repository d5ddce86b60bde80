"""Adapters that are chosen per request: what a model's kernels have places for, and which are loaded.

An adapter's factors stand in a slot of the executor's memory; each token of a step says which slot is its
own. `AdapterRegistry` belongs to the engine: it gives names to slots, and takes a slot back when no request
uses it.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from ..codegen.artifact import Artifact
from ..ir.adapters import listed
from ..ir.errors import ArtifactError, InputError, LlmcError, UnsupportedError
from ..ir.expert_parts import ExpertParts, by_experts
from .executor.base import Executor

if TYPE_CHECKING:
    from ..ir.adapters import Adapter
    from ..ir.gguf_rows import GGUFRows
    from ..ir.stored_modules import StoredModules
    from ..ir.weights import LazyTensor

_log = logging.getLogger("llmc.runtime")
Factor = tuple[np.ndarray, np.ndarray] | tuple[np.ndarray, np.ndarray, np.ndarray]
"""(A [r, K], B [rows, r]) of one layer, float32, the scaling multiplied into B; and [2, rows] where it scales
what the layer gives (`BaseWeights.gains`), or adds to it alone (biases).
"""
Factors = Mapping[int, Sequence[Factor | None]]
"""By the number of a place, a factor for each of its parts; None where the part stays as it is."""

_MERGE = "merge it: llmc compile MODEL --lora FOLDER"
_MOST_EXPERTS = 1 << 14
_CHOOSE = ("tvm-cpu", "tvm-cuda")
"""Targets that can be compiled with places for adapters."""


@dataclass(frozen=True, slots=True)
class Place:
    """Linear layers that one kernel computes, below one another.

    Attributes:
        k: columns of each.
        parts: (module, rows) of each.
        dtype: of factors in memory, "float32" or "int8".
        gains: whether adapters may scale what the layers give (DoRA), and add to it (biases).
        stack: what the layers are of where they are a mixture's, all parts of an expert before the next.
    """

    k: int
    parts: tuple[tuple[str, int], ...]
    dtype: str = "float32"
    gains: bool = False
    stack: ExpertParts | None = None

    @staticmethod
    def parse(entry: Mapping[str, Any]) -> Place:
        """Of the manifest. Raises KeyError, TypeError or ValueError for what is none."""
        k, parts = int(entry["k"]), tuple((str(module), int(rows)) for module, rows in entry["parts"])
        # Artifacts of versions before have neither gains nor experts.
        gains, experts, stack = bool(entry.get("gains", False)), int(entry.get("experts", 0)), None
        if not (0 <= experts <= _MOST_EXPERTS and k > 0 and all(rows > 0 for _, rows in parts)):
            raise ValueError(f"{experts} experts, {k} columns, parts {str(parts)[:80]}")
        if experts:
            forms = bool(entry["interleaved"]), bool(entry["unsaid"])
            stack = ExpertParts(str(entry["of"]), experts, k, parts, *forms)
            parts = stack.expanded()
        return Place(k, parts, str(entry["dtype"]), gains, stack)


@dataclass(frozen=True)
class AdapterPlaces:
    """What a target's kernels can change, by the manifest.

    Attributes:
        most_rank: the largest rank.
        places: in the order of the kernels' arguments.
    """

    most_rank: int
    places: tuple[Place, ...]
    _where: dict[str, list[tuple[int, int]]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        where: dict[str, list[tuple[int, int]]] = {}  # several of what is gone through several times
        for i, place in enumerate(self.places):
            for p, (module, _) in enumerate(place.parts):
                where.setdefault(module, []).append((i, p))
        object.__setattr__(self, "_where", where)

    @staticmethod
    def parse(entry: Mapping[str, Any]) -> AdapterPlaces | None:
        """Of a target's entry in the manifest; None where its kernels take none. Raises ArtifactError."""
        found = entry.get("adapters")
        if found is None:
            return None
        try:
            return AdapterPlaces(int(found["most_rank"]), tuple(map(Place.parse, found["places"])))
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"the manifest's adapters are incomplete ({error})", remedy="compile the model again"
            ) from None

    def factors(
        self, adapter: Adapter, stored: StoredModules | None = None, base: BaseWeights | None = None
    ) -> Factors:
        """An adapter's matrices where they belong; what it names as the checkpoint does, `stored` finds;
        `base` is asked for the gains of DoRA, and for biases that others take the place of.

        Raises InputError where it was made for another model, naming modules and shapes, and UnsupportedError
        for what can only be merged.
        """
        biases = self._biases(adapter)
        stacks = list({place.stack.parameter: place.stack for place in self.places if place.stack}.values())
        adapter = by_experts(adapter, stacks, self._where)
        _refuse_what_is_merged(adapter, biases)
        if stored is not None:
            adapter = stored.of_modules(adapter, self._where, stacks)
        self._refuse_strangers(adapter)
        found: dict[int, list[Factor | None]] = {}
        for module in dict.fromkeys([*adapter.changes, *biases]):
            factor = self._factor(adapter, module, biases.get(module), base)
            for place, part in self._where[module]:
                found.setdefault(place, [None] * len(self.places[place].parts))[part] = factor
        return found

    def _biases(self, adapter: Adapter) -> dict[str, LazyTensor]:
        """By the name of a module that has a place: the bias that an adapter has in the place of its own."""
        named = {
            name.removesuffix(".bias"): data
            for name, data in adapter.replaced.items()
            if name.endswith(".bias") and name not in adapter.copies
        }
        return {module: data for module, data in named.items() if module in self._where}

    def _factor(
        self, adapter: Adapter, module: str, bias: LazyTensor | None, base: BaseWeights | None
    ) -> Factor:
        """What a module's parts take; `bias` as `_biases` has it."""
        change = adapter.changes.get(module)
        if change is None:  # factors that add nothing, beside a bias
            place, part = self._where[module][0]
            a = np.zeros((1, self.places[place].k), np.float32)
            b = np.zeros((self.places[place].parts[part][1], 1), np.float32)
        else:
            rank = change.a.shape[0]
            if rank > self.most_rank:
                raise UnsupportedError(
                    f"{change.a.source} of adapter {adapter} has the rank {rank}; requests choose among "
                    f"adapters of at most {self.most_rank}",
                    remedy=_MERGE,
                )
            a, b = (one.read().astype(np.float32, copy=False) for one in (change.a, change.b))
            with np.errstate(over="ignore", invalid="ignore"):
                b = b * np.float32(change.scaling)
        magnitude = None if change is None else change.magnitude
        added = None if change is None else change.bias
        if magnitude is None and added is None and bias is None:
            return a, b
        self._check_gains(adapter, module, "biases" if magnitude is None else "magnitudes (DoRA)")
        gains = np.stack([np.ones(len(b), np.float32), np.zeros(len(b), np.float32)])
        if magnitude is not None:
            gains = _needed(base, adapter).gains(module, a, b, _rows_of(magnitude, len(b)))
        with np.errstate(over="ignore", invalid="ignore"):  # what is too large is refused as it is packed
            if change is not None and added is not None:
                gains[1] += _rows_of(added, len(b)) * np.float32(change.scaling)
            if bias is not None:
                own = _needed(base, adapter).bias(module, len(b))
                if own is None:
                    raise InputError(
                        f"{bias.source} of adapter {adapter} is a bias of {module}, which has none here",
                        remedy="give an adapter of this model",
                    )
                gains[1] += _rows_of(bias, len(b)) - own
        return a, b, gains

    def _check_gains(self, adapter: Adapter, module: str, what: str) -> None:
        """Raise UnsupportedError where a module's parts cannot be scaled or added to."""
        if any(self.places[place].stack for place, _ in self._where[module]):
            raise UnsupportedError(
                f"adapter {adapter} has {what} of experts, {module}: none can be chosen per request",
                remedy=_MERGE,
            )
        if not all(self.places[place].gains for place, _ in self._where[module]):
            raise UnsupportedError(
                f"adapter {adapter} has {what}, which these kernels have no places for",
                remedy="open the model with --target tvm-cpu, or compile it again where it was compiled with "
                f"--adapters before, or {_MERGE}",
            )

    def _refuse_strangers(self, adapter: Adapter) -> None:
        unknown = [module for module in adapter.changes if module not in self._where]
        if unknown:
            raise InputError(
                f"adapter {adapter} changes {listed(unknown)}, which this model has no place for; it has "
                f"{listed(self._kinds())}",
                remedy=f"give an adapter of this model, or {_MERGE}",
            )
        wrong: list[str] = []
        for module, change in adapter.changes.items():
            given = (change.b.shape[0], change.a.shape[1])
            for place, part in self._where[module]:
                wanted = (self.places[place].parts[part][1], self.places[place].k)
                if given != wanted:
                    wrong.append(f"{module} {list(given)} where the model has {list(wanted)}")
                    break
        if wrong:
            raise InputError(
                f"adapter {adapter} is of a model of other sizes: {listed(wrong)}",
                remedy="give an adapter of this model",
            )

    def _kinds(self) -> list[str]:
        """The last parts of the modules' names: q_proj, k_proj, …"""
        return list(dict.fromkeys(module.partition("[")[0].rpartition(".")[2] for module in self._where))


def _needed(base: BaseWeights | None, adapter: Adapter) -> BaseWeights:
    if base is None:
        raise UnsupportedError(
            f"adapter {adapter} has magnitudes (DoRA) or trained biases, which needs what compiles models",
            remedy=f"pip install 'llmc[compile]', or {_MERGE}",
        )
    return base


def _rows_of(tensor: LazyTensor, rows: int) -> np.ndarray:
    """[rows] float32. Raises InputError where it has another number."""
    if math.prod(tensor.shape) != rows:
        raise InputError(
            f"{tensor.source} has the shape {list(tensor.shape)}, not [{rows}]",
            remedy="give an adapter of this model",
        )
    return tensor.read().astype(np.float32).reshape(-1)


def _refuse_what_is_merged(adapter: Adapter, biases: Mapping[str, Any]) -> None:
    """`biases`: by module, those of the adapter's that have places."""
    known, remedy = {*adapter.copies, *(f"{module}.bias" for module in biases)}, _MERGE
    if replaced := [name for name in adapter.replaced if name not in known]:
        what = f"replaces whole tensors, {listed(replaced)} (modules_to_save, saved embeddings, biases)"
    elif adapter.parameters:
        remedy = f"compile the model again, if a version before did, or {_MERGE}"
        what = f"changes parameters (target_parameters), of {listed([*adapter.parameters])}, without places"
    elif any(change.embedding for change in adapter.changes.values()):
        what = "has changes of embeddings"
    else:
        return
    raise UnsupportedError(f"adapter {adapter} {what}, which cannot be chosen per request", remedy=remedy)


class BaseWeights(Protocol):
    """What an artifact's linear layers multiply by (`codegen/tvm/base_weights.py`)."""

    def gains(self, module: str, a: np.ndarray, b: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
        """[2, rows] of a module that DoRA scales to `magnitude` [rows] (NaN: not this row): what multiplies
        W x + B A x, and what is added to it. a [r, K]; b [rows, r], the scaling in it.
        """
        ...

    def bias(self, module: str, rows: int) -> np.ndarray | None:
        """[rows] that a module of so many adds; None where it has no bias."""
        ...


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
    for place, parts in sorted(factors.items()):
        for p, part in enumerate(parts):
            for array in part or ():
                found.update(b"%d %d %d %d " % (place, p, *array.shape))
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
            remedy=f"compile the model in another scheme, such as gptq-int4-g32, or {_MERGE}",
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
        remedy = f"{_MERGE}; only {' and '.join(_CHOOSE)} choose adapters per request"
    raise UnsupportedError(
        f"the kernels of {artifact.root.name} have no places for adapters",
        remedy=f"open it with --target tvm-cpu, or {remedy}" if other else remedy,
    )


__all__ = [
    "AdapterInUseError",
    "AdapterPlaces",
    "AdapterRegistry",
    "BaseWeights",
    "Factor",
    "Factors",
    "LoadedAdapter",
    "Place",
    "TakesAdapters",
    "check_places",
]
