"""Schedules by measurement: which sizes of a kernel are fastest on this processor (`llmc compile --tune`).

For each kernel of `lower.SCHEDULED` in a graph, one field of its schedule after the other is changed; a value
is taken where the kernel gets faster by more than measuring errs, beside the kernel that it would replace, in
turns. One thread, weights from memory, batches of the sizes that the field is for. What was found is kept in
`schedules.json` of the cache folder, by processor, level and kernel, so that the next compilation takes it
from there: with the same file, the same artifact.

Runs in a worker (`worker.py`): a kernel that the processor refuses ends that process, not the compiler.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ...ir.core import Graph
from ...ir.dtypes import to_numpy
from ...ir.errors import InputError
from ...runtime.cache_folder import cache_folder, write_whole
from ...runtime.cpu import supported_isas
from .build import compile_kernel
from .kernels.isa import Isa, get_isa
from .kernels.layout import QuantLayout
from .kernels.schedule import Schedule, alternatives, default_schedule
from .kernels.tile_layout import in_tiles
from .lower import Lowered, lower
from .untyped import relax, tirx, tvm

VERSION = 3
"""Of the file, and of the kernels that it is about: raise it where their fastest sizes may have changed."""
GAIN = 0.03
"""Share of its time that a kernel must save for other sizes than it has."""
_WORSE = 0.05  # and what it may lose at any number of rows
_TURNS = 7
_SET_BYTES = 48 << 20  # of weights together: more than caches hold
_SETS = 256  # of a weight that is so small that more would take longer to make than to multiply by
_MILLISECOND = 1e-3

Report = Callable[[str, float], None]
"""(what is being searched, share of it that is done)."""
_ROWS = {
    "ahead": (1, 4),
    "few": (1, 2, 4, 6),
    "many": (32, 256),
    "width": (1, 8, 64, 256),
    "unpack": (8, 16, 24, 32, 48, 96),
}


# The file ------------------------------------------------------------------------------------------------


def cache_file() -> Path:
    """`schedules.json` in the cache folder."""
    return cache_folder() / "schedules.json"


def processor() -> str:
    """What this processor calls itself, with its family and model; virtual machines often hide the name."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    block = text.split("\n\n")[0]
    found = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())
    }
    return " ".join(found.get(key, "?") for key in ("model name", "cpu family", "model", "stepping"))


def read_cache(path: Path, isa: str) -> dict[str, Schedule]:
    """Kernel → schedule, for this processor; what is no schedule of this version is passed over."""
    stored = _stored(path)
    entries = stored.get(f"{processor()} {isa}")
    parsed = {k: Schedule.parse(v) for k, v in entries.items()} if isinstance(entries, Mapping) else {}
    return {str(key): schedule for key, schedule in parsed.items() if schedule is not None}


def write_cache(path: Path, isa: str, found: Mapping[str, Schedule]) -> None:
    """Add to the file: written beside it, then renamed. Another compilation's entries are kept. Raises
    InputError where it cannot be written.
    """
    stored = _stored(path)
    key = f"{processor()} {isa}"
    before = stored.get(key)
    new = {name: schedule.as_json() for name, schedule in found.items()}
    stored[key] = {**(before if isinstance(before, Mapping) else {}), **new}
    text = json.dumps({"version": VERSION, "schedules": stored}, indent=1, sort_keys=True)
    try:
        write_whole(path, (text + "\n").encode())
    except OSError as error:
        raise InputError(
            f"--tune keeps what it finds in {path}, which cannot be written: {error.strerror}",
            remedy="set LLMC_CACHE to a folder that can be written",
        ) from None


def _stored(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, Mapping) or content.get("version") != VERSION:
        return {}
    schedules = content.get("schedules")
    return dict(schedules) if isinstance(schedules, Mapping) else {}


@dataclass(frozen=True)
class Tuned:
    """What a search found: schedules of a level ("": none of the levels runs here), by the kernel's key, for
    some of `kernels`.
    """

    isa: str
    schedules: Mapping[str, Schedule]
    kernels: int


# The search ----------------------------------------------------------------------------------------------


def tune(graph: Graph, levels: Sequence[str], seconds: float, report: Report) -> Tuned:
    """Schedules for the best of these levels that runs here, from the cache or searched for, the largest
    weights first. A kernel whose search time did not suffice for keeps what is shipped.
    """
    here = [level for level in supported_isas() if level in levels]
    if not here:
        return Tuned("", {}, 0)
    isa = get_isa(here[-1])
    path = cache_file()
    makers = _called(lower(graph, isa))
    known = read_cache(path, isa.name)
    found = {key: known[key] for key in makers if key in known}
    missing = [key for key in makers if key not in known]
    missing.sort(key=lambda key: -layout_of(key).n * layout_of(key).k)
    if missing:
        write_cache(path, isa.name, {})  # a file that cannot be written is told before the search
    stop = time.monotonic() + seconds
    for i, key in enumerate(missing):
        report(key.partition(" ")[0], i / len(missing))
        schedule = Search(makers[key], isa, layout_of(key)).run(stop)
        if schedule is None:
            break
        found[key] = schedule
        write_cache(path, isa.name, {key: schedule})
    return Tuned(isa.name, found, len(makers))


def _called(lowered: Lowered) -> dict[str, Callable[..., Any]]:
    """Key → maker of the kernels that a step calls: of some, another kernel does the work."""
    module = relax.transform.DeadCodeElimination(["main"])(lowered.module)
    names = {variable.name_hint for variable in module.functions}
    return {key: make for key, (name, make) in lowered.scheduled.items() if name in names}


def layout_of(key: str) -> QuantLayout:
    """The layout of the weight of a kernel, by its key."""
    static = json.loads(key.partition(" ")[2])
    n = static["n"] if "n" in static else 2 * static["width"]
    form = ("bits", "group_size", "codebook", "scale_dtype", "zero_point", "super_group")
    return QuantLayout(n, static["k"], **{name: static[name] for name in form})


@dataclass(frozen=True)
class _Compiled:
    """A kernel as a function of arrays, and its parameters: (name, shape with None for the rows, dtype)."""

    function: Any
    parameters: tuple[tuple[str, tuple[int | None, ...], str], ...]


class Search:
    """The search for one kernel. `make(schedule=…)` gives its function."""

    def __init__(self, make: Callable[..., Any], isa: Isa, layout: QuantLayout) -> None:
        self.make, self.isa, self.layout = make, isa, layout
        self.tiles = in_tiles(isa, layout)
        self.start = default_schedule(isa, layout, tiles=self.tiles)
        self._compiled: dict[Schedule, _Compiled] = {}
        self._arrays: dict[int, list[list[Any]]] = {}

    def run(self, stop: float) -> Schedule | None:
        """The best schedule; None where `time.monotonic()` passes `stop` before all was tried."""
        best = self.start
        for name, values in alternatives(self.start, self.layout, tiles=self.tiles):
            ratios: dict[Schedule, float] = {}
            for value in values:
                if time.monotonic() > stop:
                    return None
                candidate = replace(best, **{name: value})
                ratio = self._compare(candidate, best, self._rows_for(name, best))
                if ratio is not None and ratio < 1 - GAIN:
                    ratios[candidate] = ratio
            best = min(ratios, key=lambda one: ratios[one], default=best)
        return best

    def _rows_for(self, name: str, schedule: Schedule) -> Sequence[int]:
        """The batches that a field matters for."""
        if name == "few":
            return (*_ROWS["few"], schedule.unpack - 1) if schedule.unpack > 7 else (*_ROWS["few"], 32)
        if name == "many":
            return tuple(max(rows, schedule.unpack) for rows in _ROWS["many"])
        return _ROWS[name]

    def _compare(self, candidate: Schedule, current: Schedule, batches: Sequence[int]) -> float | None:
        """The candidate's time as a share of the current one's: a geometric mean over the batches. None where
        it is much slower for one of them.
        """
        new, old = self._function(candidate), self._function(current)
        ratios: list[float] = []
        for rows in batches:
            sets = self._sets(old, rows)
            for one in (new, old):
                _time(one, sets)
            ratio = median(_time(new, sets) / _time(old, sets) for _ in range(_TURNS))
            if ratio > 1 + _WORSE:
                return None
            ratios.append(ratio)
        return math.exp(sum(map(math.log, ratios)) / len(ratios))

    def _function(self, schedule: Schedule) -> _Compiled:
        if schedule not in self._compiled:
            function = self.make(schedule=schedule)
            buffers = [p for p in function.params if tirx.is_buffer_var(p)]
            parameters = tuple(
                (p.name, tuple(int(d) if _is_whole(d) else None for d in p.ty.shape), str(p.ty.dtype))
                for p in buffers
            )
            self._compiled[schedule] = _Compiled(compile_kernel(function, self.isa)["f"], parameters)
        return self._compiled[schedule]

    def _sets(self, kernel: _Compiled, rows: int) -> list[list[Any]]:
        """Arguments for that many rows; as many sets of weights as fill the caches."""
        if rows not in self._arrays:
            fixed = [math.prod(shape) for _, shape, _ in kernel.parameters if None not in shape]  # type: ignore[arg-type]
            count = min(max(1, _SET_BYTES // max(1, sum(fixed))), _SETS) if rows <= 8 else 2
            first = [_array(parameter, rows) for parameter in kernel.parameters]
            self._arrays[rows] = [
                [
                    a if number == 0 or None in shape else _array((name, shape, dtype), rows)
                    for a, (name, shape, dtype) in zip(first, kernel.parameters, strict=True)
                ]
                for number in range(count)
            ]
        return self._arrays[rows]


def _is_whole(dimension: Any) -> bool:
    return isinstance(dimension, int | tirx.IntImm)


def _array(parameter: tuple[str, tuple[int | None, ...], str], rows: int) -> Any:
    """Codes and activations are random, floats small, and other bytes zero, which makes no NaN anywhere."""
    name, shape, dtype = parameter
    full = [rows if d is None else d for d in shape]
    if name in ("weight", "a"):
        made = np.random.default_rng(0).integers(0, 256, full, dtype=np.uint8).view(dtype)
    else:
        made = np.full(full, 0.01 if "float" in dtype else 0, to_numpy(dtype))
    return tvm.runtime.tensor(made)


def _time(kernel: _Compiled, sets: Sequence[Sequence[Any]]) -> float:
    """Seconds a call, over a millisecond at least."""
    calls, began, passed = 0, time.perf_counter(), 0.0
    while passed < _MILLISECOND:
        for arrays in sets:
            kernel.function(*arrays)
        calls += len(sets)
        passed = time.perf_counter() - began
    return passed / calls
