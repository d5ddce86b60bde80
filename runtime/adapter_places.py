"""What adapters can change in a model's kernels, and an adapter's matrices where they belong.

A *place* is some linear layers that one kernel computes (`Place`); `AdapterPlaces.factors` finds for each
what an adapter has for it, in whatever names the adapter has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..ir.adapters import listed
from ..ir.errors import ArtifactError, InputError, UnsupportedError
from ..ir.expert_parts import ExpertParts, by_experts
from .adapter_matrices import with_changes

if TYPE_CHECKING:
    from ..ir.adapters import Adapter, LowRank
    from ..ir.stored_modules import StoredModules
    from ..ir.weights import LazyTensor

Factor = tuple[np.ndarray, np.ndarray] | tuple[np.ndarray, np.ndarray, np.ndarray]
"""(A [r, K], B [rows, r]) of one layer, float32, the scaling multiplied into B; and [2, rows] where it scales
what the layer gives (`BaseWeights.gains`), or adds to it alone (biases).
"""
Factors = Mapping[int, Sequence[Factor | None]]
"""By the number of a place, a factor for each of its parts; None where the part stays as it is."""

MERGE = "merge it: llmc compile MODEL --lora FOLDER"
_MOST_EXPERTS = 1 << 14


@dataclass(frozen=True, slots=True)
class Place:
    """Linear layers that one kernel computes, below one another.

    Attributes:
        k: columns of each.
        parts: (module, rows) of each.
        dtype: of factors in memory, "float32" or "int8".
        gains: whether adapters may scale what the layers give (DoRA), and add to it (biases).
        stack: what the layers are of where they are a mixture's, all parts of an expert before the next.
        embedding: the one part is an embedding of k rows, its own rows being the columns of the table.
        tied: modules that have the embedding's table too; None where that is not known.
    """

    k: int
    parts: tuple[tuple[str, int], ...]
    dtype: str = "float32"
    gains: bool = False
    stack: ExpertParts | None = None
    embedding: bool = False
    tied: tuple[str, ...] | None = None

    @staticmethod
    def parse(entry: Mapping[str, Any]) -> Place:
        """Of the manifest. Raises KeyError, TypeError or ValueError for what is none."""
        k, parts = int(entry["k"]), tuple((str(module), int(rows)) for module, rows in entry["parts"])
        # Artifacts of versions before have neither gains nor experts nor embeddings.
        gains, experts, stack = bool(entry.get("gains", False)), int(entry.get("experts", 0)), None
        tied = None if entry.get("tied") is None else tuple(map(str, entry["tied"]))
        if not (0 <= experts <= _MOST_EXPERTS and k > 0 and all(rows > 0 for _, rows in parts)):
            raise ValueError(f"{experts} experts, {k} columns, parts {str(parts)[:80]}")
        if experts:
            forms = bool(entry["interleaved"]), bool(entry["unsaid"])
            stack = ExpertParts(str(entry["of"]), experts, k, parts, *forms)
            parts = stack.expanded()
        return Place(k, parts, str(entry["dtype"]), gains, stack, bool(entry.get("embedding", False)), tied)


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
        `base` is asked for the gains of DoRA, and for what others take the place of.

        Raises InputError where it was made for another model, naming modules and shapes, and UnsupportedError
        for what can only be merged.
        """
        adapter = with_changes(adapter, self._first(), base)
        biases = self._biases(adapter)
        stacks = list({place.stack.parameter: place.stack for place in self.places if place.stack}.values())
        adapter = by_experts(adapter, stacks, self._where)
        self._refuse_what_is_merged(adapter, biases)
        if stored is not None:
            adapter = stored.of_modules(adapter, self._where, stacks)
        self._refuse_strangers(adapter)
        found: dict[int, list[Callable[[], Factor] | None]] = {}
        for module in dict.fromkeys([*adapter.changes, *biases]):
            read = partial(self._factor, adapter, module, biases.get(module), base)
            if any(self.places[place].stack for place, _ in self._where[module]):
                self._check_expert(adapter, module)
            else:  # read now, so that what is wrong with it is told now
                read = partial(_given, read())
            for place, part in self._where[module]:
                found.setdefault(place, [None] * len(self.places[place].parts))[part] = read
        return _Factors(found)

    def _first(self) -> dict[str, tuple[Place, int]]:
        """By module: its first place, and the part there."""
        return {module: (self.places[i], p) for module, ((i, p), *_) in self._where.items()}

    def _biases(self, adapter: Adapter) -> dict[str, LazyTensor]:
        """By the name of a module that has a place: the bias that an adapter has in the place of its own."""
        named = {
            name.removesuffix(".bias"): data
            for name, data in adapter.replaced.items()
            if name.endswith(".bias") and name not in adapter.copies
        }
        return {module: data for module, data in named.items() if self._is_embedding(module) is False}

    def _is_embedding(self, module: str) -> bool | None:
        """Whether a module's place is an embedding's; None where it has no place."""
        found = self._where.get(module)
        return None if found is None else self.places[found[0][0]].embedding

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
            self._check_rank(adapter, change)
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

    def _check_rank(self, adapter: Adapter, change: LowRank) -> None:
        rank = change.a.shape[0]
        if rank > self.most_rank:
            raise UnsupportedError(
                f"{change.a.source} of adapter {adapter} has the rank {rank}; requests choose among "
                f"adapters of at most {self.most_rank}",
                remedy=MERGE,
            )

    def _check_expert(self, adapter: Adapter, module: str) -> None:
        """Raise UnsupportedError for a change of an expert's matrix that is none of low rank alone."""
        change = adapter.changes.get(module)
        if change is None or change.magnitude is not None or change.bias is not None:
            what = "magnitudes (DoRA)" if change is not None and change.magnitude is not None else "biases"
            raise UnsupportedError(
                f"adapter {adapter} has {what} of experts, {module}: none can be chosen per request",
                remedy=MERGE,
            )
        self._check_rank(adapter, change)

    def _check_gains(self, adapter: Adapter, module: str, what: str) -> None:
        """Raise UnsupportedError where a module's parts cannot be scaled or added to."""
        if not all(self.places[place].gains for place, _ in self._where[module]):
            raise UnsupportedError(
                f"adapter {adapter} has {what}, which these kernels have no places for",
                remedy="open the model with --target tvm-cpu, or compile it again where it was compiled with "
                f"--adapters before, or {MERGE}",
            )

    def _refuse_what_is_merged(self, adapter: Adapter, biases: Mapping[str, Any]) -> None:
        """`biases`: by module, those of the adapter's that have places."""
        known, remedy = {*adapter.copies, *(f"{module}.bias" for module in biases)}, MERGE
        if replaced := [name for name in adapter.replaced if name not in known]:
            what = f"replaces whole tensors, {listed(replaced)} (modules_to_save, saved embeddings, biases)"
        elif adapter.parameters:
            remedy = f"compile the model again, if a version before did, or {MERGE}"
            what = (
                f"changes parameters (target_parameters), of {listed([*adapter.parameters])}, without places"
            )
        elif adapter.rows:
            what = f"replaces rows of embeddings, of {listed([*adapter.rows])} (trainable_token_indices)"
        elif not any(place.embedding for place in self.places) and any(
            change.embedding for change in adapter.changes.values()
        ):
            what = "has changes of embeddings"
        else:
            return
        raise UnsupportedError(f"adapter {adapter} {what}, which cannot be chosen per request", remedy=remedy)

    def _refuse_strangers(self, adapter: Adapter) -> None:
        unknown = [
            module
            for module, change in adapter.changes.items()
            if self._is_embedding(module) is not change.embedding
        ]
        if unknown:
            raise InputError(
                f"adapter {adapter} changes {listed(unknown)}, which this model has no place for; it has "
                f"{listed(self._kinds())}",
                remedy=f"give an adapter of this model, or {MERGE}",
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


class _Factors(Mapping[int, Sequence[Factor | None]]):
    """Those of a place are made when they are asked for: of hundreds of experts all at once would be several
    times as large as the adapter.
    """

    def __init__(self, parts: Mapping[int, Sequence[Callable[[], Factor] | None]]) -> None:
        self._parts = parts

    def __getitem__(self, place: int) -> Sequence[Factor | None]:
        return [None if read is None else read() for read in self._parts[place]]

    def __iter__(self) -> Iterator[int]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def _given(factor: Factor) -> Factor:
    return factor


def _needed(base: BaseWeights | None, adapter: Adapter) -> BaseWeights:
    if base is None:
        raise UnsupportedError(
            f"adapter {adapter} has magnitudes (DoRA) or trained biases, which needs what compiles models",
            remedy=f"pip install 'llmc[compile]', or {MERGE}",
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


class BaseWeights(Protocol):
    """What an artifact's linear layers multiply by (`codegen/tvm/base_weights.py`)."""

    def gains(self, module: str, a: np.ndarray, b: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
        """[2, rows] of a module that DoRA scales to `magnitude` [rows] (NaN: not this row): what multiplies
        W x + B A x, and what is added to it. a [r, K]; b [rows, r], the scaling in it.
        """
        ...

    def rows(self, module: str, start: int, stop: int) -> np.ndarray:
        """Rows of a module's matrix, float32 [n, columns]; of an embedding those of tokens."""
        ...

    def is_transposed(self, module: str) -> bool:
        """Whether the module's own matrix is [columns, rows]."""
        ...

    def bias(self, module: str, rows: int) -> np.ndarray | None:
        """[rows] that a module of so many adds; None where it has no bias."""
        ...


__all__ = ["MERGE", "AdapterPlaces", "BaseWeights", "Factor", "Factors", "Place"]
