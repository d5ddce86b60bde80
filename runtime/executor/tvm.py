"""The executor of target `tvm-cpu`: a kernel library, called through ctypes.

The library stands alone (its threads and scratch memory are linked in), so neither TVM nor its runtime is
loaded: what is called is `int llmc_step(int64_t *dims, uint64_t *pointers)`. `dims` holds the symbolic
dimensions and then a status; `pointers` holds the addresses of inputs, weights, outputs and workspace, in the
order of the manifest's "arguments". Nothing is checked inside; everything that comes from outside is checked
here, where a mistake is an error.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...codegen.artifact import Artifact
from ...ir.dtypes import to_numpy
from ...ir.errors import ArtifactError, InputError, LlmcError
from .. import cpu
from ..adapter_places import AdapterPlaces
from .adapter_memory import AdapterMemory, WithSlots
from .base import (
    STEP_INPUTS,
    CallTimes,
    Kernels,
    Prepared,
    StepInputs,
    adapter_slots,
    check_step,
    scaled_from,
)
from .pages import pages_as_bytes, pages_from_bytes
from .rotation import Rotary, read_rotary, turn_pages
from .shapes import MOST, check_names, check_pages, check_states, evaluate, match_shape, size_of
from .windows import tables_of, window_of

_ALIGNMENT = 64


def aligned(shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
    """Zeros whose first byte lies on a 64-byte boundary, as the kernels' vector loads assume; touched when
    used.
    """
    size = math.prod(shape) * dtype.itemsize
    raw = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


class _Array:
    """One argument: its pattern of dimensions, and memory that grows when a larger array comes."""

    def __init__(self, entry: Mapping[str, Any]) -> None:
        self.name: str = entry["name"]
        self.kind: str = entry["dtype"]
        self.dtype = to_numpy(self.kind)
        self.shape: tuple[int | str, ...] = tuple(entry["shape"])
        self.memory = aligned((0,), self.dtype)
        self._last = self.memory  # the array that was asked for last: mostly the next one's shape is the same

    def sized(self, shape: tuple[int, ...]) -> tuple[np.ndarray, bool]:
        """The array for a shape, and whether its address changed."""
        if shape == self._last.shape:
            return self._last, False
        size = math.prod(shape)
        grown = size > self.memory.size
        if grown:
            self.memory = aligned((max(size, 2 * self.memory.size),), self.dtype)
        self._last = self.memory[:size].reshape(shape)
        return self._last, grown


class TvmExecutor(WithSlots):
    """Runs the kernels of one ISA level. Used by one thread at a time."""

    batch_invariant = True

    def __init__(
        self, artifact: Artifact, isa: str | None, threads: int | None, kernels: Kernels | None = None
    ) -> None:
        entry = artifact.target("tvm-cpu") if kernels is None else kernels[0]
        self._artifact, self._kernel = artifact, _kernel_entry(artifact, entry, isa)
        self.target_name = "tvm-cpu"
        self.isa = str(self._kernel["isa"])
        self._library = _load(artifact.path(self._kernel["path"]) if kernels is None else kernels[1])
        self._foreign = "" if kernels is None else hashlib.sha256(kernels[1].read_bytes()).hexdigest()
        self._times: CallTimes | None = None
        self.threads = int(self._library.llmc_set_threads(ctypes.c_int(threads or cpu.default_threads())))
        self._arguments = {name: i for i, name in enumerate(entry["arguments"])}
        self._symbols = {name: i for i, name in enumerate(entry["symbols"])}
        self._inputs = {item["name"]: _Array(item) for item in entry["inputs"]}
        self._outputs = {item["name"]: _Array(item) for item in entry["outputs"]}
        self._dims = np.zeros(len(self._symbols) + 1, np.int64)
        self._pointers = np.zeros(len(self._arguments), np.uint64)
        self._call = (ctypes.c_void_p(self._dims.ctypes.data), ctypes.c_void_p(self._pointers.ctypes.data))
        self._workspace = aligned((0,), np.dtype(np.uint8))
        self._sizes: Mapping[str, int] | None = None  # of the last call
        self._given = [name for name in STEP_INPUTS if name in self._arguments and name != "adapter"]
        self._sampling_block = entry.get("sampling_block")  # artifacts made before have none
        self._weights = artifact.weights("tvm-cpu")
        self._bind_weights(artifact)
        self._pages: list[np.ndarray] = []
        self._kv = [array for name, array in self._inputs.items() if name.startswith("kv_pages.")]
        self._recurrent = [array for name, array in self._inputs.items() if name.startswith("state.")]
        self._states: list[np.ndarray] = []
        self.state_bytes = sum(size_of(array.shape) * array.dtype.itemsize for array in self._recurrent)
        self._num_states = 0
        self.page_size = int(artifact.manifest.get("page_size", 16))
        last = next(iter(self._outputs.values())).shape
        self.vocab_size = int(last[-1]) if last and isinstance(last[-1], int) else 0
        self.kv_bytes_per_page = sum(size_of(array.shape) * array.dtype.itemsize for array in self._kv)
        self.max_pages: int | None = min((MOST // size_of(array.shape) for array in self._kv), default=None)
        self.num_pages = 0
        self._window_of = [window_of(array.shape[1]) for array in self._kv]
        self.windows = tuple(sorted({w for w in self._window_of if w is not None}))
        self.window_bytes_per_page = tuple(
            sum(
                size_of(array.shape) * array.dtype.itemsize
                for array, of in zip(self._kv, self._window_of, strict=True)
                if of == window
            )
            for window in self.windows
        )
        self._window_pages: tuple[int, ...] = ()
        self._rotary: list[Rotary | None] | None = None  # read when keys first turn
        self._vocabulary = artifact.model.get("vocab_size")
        self._types = int(artifact.model.get("token_types") or 0)
        self._scaled_from = scaled_from(artifact.model)
        self.adapter_places = AdapterPlaces.parse(entry)
        places = self.adapter_places
        self._factors = AdapterMemory(places, self._bind) if places is not None else None
        self._adapters = self._factors

    def _bind_weights(self, artifact: Artifact) -> None:
        for name, place in self._arguments.items():
            if not name.startswith("weight:"):
                continue
            wanted = name.removeprefix("weight:")
            weight = self._weights.get(wanted)
            if weight is None:
                raise ArtifactError(
                    f"{artifact.root}: the kernels want weight {wanted!r}, which is not there",
                    remedy="compile the model again or copy the artifact again",
                )
            self._pointers[place] = weight.ctypes.data

    def _bind(self, name: str, array: np.ndarray) -> None:
        self._pointers[self._arguments[name]] = array.ctypes.data

    # -- the cache -----------------------------------------------------------------------------------------
    def allocate_kv(self, num_pages: int) -> None:
        """Make the cache: pages 0 .. num_pages - 1, memory taken when a page is first written."""
        check_pages(num_pages, self.max_pages)
        self._pages = [self._allocated(array, num_pages) for array in self._kv]
        self.num_pages, self._window_pages = num_pages, ()

    def _allocated(self, array: _Array, num_pages: int) -> np.ndarray:
        pages = aligned([num_pages if isinstance(d, str) else d for d in array.shape], array.dtype)
        self._bind(array.name, pages)
        return pages

    def allocate_windows(self, pages: Sequence[int]) -> None:
        """See `windows.KeepsWindows`."""
        counts = dict(zip(self.windows, pages, strict=True))
        for i, (array, window) in enumerate(zip(self._kv, self._window_of, strict=True)):
            if window is not None:
                self._pages[i] = self._allocated(array, counts[window])
        self._window_pages = tuple(pages)

    def copy_pages(self, src: Sequence[int], dst: Sequence[int]) -> None:
        """Copy page src[i] to page dst[i] in all layers, but those of windows with pages of their own."""
        for pages, window in zip(self._pages, self._window_of, strict=True):
            if window is None or not self._window_pages:
                pages[:, dst] = pages[:, src]

    def copy_window_pages(self, which: int, src: Sequence[int], dst: Sequence[int]) -> None:
        """See `windows.KeepsWindows`."""
        for pages, window in zip(self._pages, self._window_of, strict=True):
            if window == self.windows[which]:
                pages[:, dst] = pages[:, src]

    def rotate_keys(self, pages: Sequence[int], shift: int, window: int | None = None) -> None:
        """See `base.RotatesKeys`."""
        if self._rotary is None:
            self._rotary = read_rotary(self._artifact)
        wanted = None if window is None else self.windows[window]
        for item, array, of in zip(self._kv, self._pages, self._window_of, strict=True):
            layer = int(item.name.rpartition(".")[2])
            rotary, own = self._rotary[layer], of if self._window_pages else None
            if own == wanted and rotary is not None:
                size = int(self._artifact.model["kv"][layer]["head_dim"])
                turn_pages(rotary, array[0], pages, shift, head_dim=size)

    def allocate_states(self, count: int) -> None:
        """Make the state cache: rows 0 .. count - 1, memory taken when a row is first written."""
        check_states(count, (array.shape for array in self._recurrent))
        self._states = [
            aligned([count if isinstance(d, str) else d for d in array.shape], array.dtype)
            for array in self._recurrent
        ]
        for array, states in zip(self._recurrent, self._states, strict=True):
            self._pointers[self._arguments[array.name]] = states.ctypes.data
        self._num_states = count

    def copy_state(self, src: int, dst: int) -> None:
        """Copy row src to row dst in all layers."""
        for states in self._states:
            states[dst] = states[src]

    def identity(self) -> dict[str, str]:
        """See `base.MovesPages`: the level, and kernels that are not the artifact's own."""
        return {"target": self.target_name, "isa": self.isa, "kernels": self._foreign}

    def read_pages(self, pages: Sequence[int]) -> np.ndarray:
        """See `base.MovesPages`."""
        return pages_as_bytes(self._pages, 1, pages)

    def write_pages(self, pages: Sequence[int], contents: np.ndarray) -> None:
        """See `base.MovesPages`."""
        pages_from_bytes(self._pages, 1, pages, contents)

    # -- language models -----------------------------------------------------------------------------------
    def step(self, inputs: StepInputs) -> np.ndarray:
        """Logits [R, vocab_size] float32, valid until the next call.

        Raises InputError for indices out of range.
        """
        check_step(
            inputs,
            num_pages=self.num_pages,
            page_size=self.page_size,
            vocabulary=self._vocabulary,
            types=self._types,
            scaled_from=self._scaled_from,
            states=self._num_states if self._recurrent else None,
        )
        sizes = {
            "T": len(inputs.token_ids),
            "B": len(inputs.context_len),
            "P": inputs.block_table.shape[1],
            "R": len(inputs.output_index),
            "N": self.num_pages,
            "S": self._num_states,
        }
        tables = tables_of(inputs, self.windows, self._window_pages, self.page_size)
        for which, (window, (slots, table)) in enumerate(zip(self.windows, tables, strict=True)):
            sizes[f"N{window}"] = self._window_pages[which] if self._window_pages else self.num_pages
            self._put(f"slot_mapping.{window}", slots)
            self._put(f"block_table.{window}", table)
        if self._factors is not None:
            sizes |= self._factors.sizes()
            slots = adapter_slots(inputs, self._factors.slots)
            self._put("adapter", slots)
            if (experts := self._factors.expert_slots(slots)) is not None:
                self._put("expert_adapter", experts)
        elif inputs.adapter is not None:
            raise InputError("these kernels take no adapters", remedy="compile with --adapters")
        for name in self._given:
            self._put(name, getattr(inputs, name))
        (output,) = self._outputs.values()
        rows = sizes["R"]
        if rows * self.vocab_size > MOST:
            raise InputError(
                f"logits of {rows} rows are more than a kernel can count",
                remedy=f"ask for at most {MOST // self.vocab_size} rows in a step",
            )
        logits, grown = output.sized((rows, self.vocab_size))
        if grown:
            self._pointers[self._arguments[f"output:{output.name}"]] = output.memory.ctypes.data
        self._run(sizes)
        return logits

    def prepare_sampling(self, logits: np.ndarray, scale: np.ndarray) -> Prepared | None:
        """See `base.PreparesSampling`. Raises InputError for other shapes."""
        if self._sampling_block is None:
            return None
        rows, block = len(scale), int(self._sampling_block)
        right = logits.shape == (rows, self.vocab_size) and logits.dtype == np.float32
        if not right or rows * self.vocab_size > MOST:
            raise InputError(
                f"logits {logits.dtype}{list(logits.shape)} and {rows} scales",
                remedy=f"give float32 [R, {self.vocab_size}] and [R]",
            )
        blocks = self.vocab_size // block
        given = self._aligned_copy(scale, np.dtype(np.float32))
        best = aligned((rows,), np.dtype(np.int32))
        sums, tops = (aligned((rows, blocks), np.dtype(np.float32)) for _ in range(2))
        own = logits
        if logits.ctypes.data % _ALIGNMENT or not logits.flags.c_contiguous:
            own = self._aligned_copy(logits, logits.dtype)
        addresses = [array.ctypes.data for array in (given, best, sums, tops, own)]
        values = np.array([0, *addresses, rows, blocks, self.vocab_size], np.int64)
        if self._library.llmc_sampling(ctypes.c_void_p(values.ctypes.data)) != 0 or values[0] != 0:
            raise LlmcError("a kernel got no scratch memory", remedy="free memory or send shorter prompts")
        if own is not logits:
            logits[...] = own
        return Prepared(best, sums, tops, block)

    @staticmethod
    def _aligned_copy(array: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
        copy = aligned(array.shape, dtype)
        copy[...] = array
        return copy

    def _put(self, name: str, value: np.ndarray) -> None:
        array, grown = self._inputs[name].sized(value.shape)
        array[...] = value
        if grown:
            self._pointers[self._arguments[name]] = self._inputs[name].memory.ctypes.data

    # -- functions -----------------------------------------------------------------------------------------
    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Named inputs → named outputs. Raises InputError for a missing input, a wrong dtype or shape."""
        if self._kv or "slot_mapping" in self._inputs:
            raise InputError("this artifact is a language model, not a function", remedy="call step")
        check_names(inputs, self._inputs)
        sizes: dict[str, int] = {}
        for name, value in inputs.items():
            array = self._inputs[name]
            match_shape(name, array.shape, array.kind, value, sizes)
        for name, value in inputs.items():
            self._put(name, value)
        results: dict[str, np.ndarray] = {}
        for name, array in self._outputs.items():
            results[name] = aligned([evaluate(d, sizes) for d in array.shape], array.dtype)
            self._pointers[self._arguments[f"output:{name}"]] = results[name].ctypes.data
        self._run(sizes)
        return results

    # -- the call ------------------------------------------------------------------------------------------
    def _run(self, sizes: Mapping[str, int]) -> None:
        """Call the library with dimensions of these sizes: mostly those of the call before."""
        if sizes != self._sizes:
            self._size_up(sizes)
        self._dims[-1] = 0
        if self._times is not None:
            self._times.seconds -= time.perf_counter()
        if self._library.llmc_step(*self._call) != 0 or self._dims[-1] != 0:
            raise LlmcError("a kernel got no scratch memory", remedy="free memory or send shorter prompts")
        if self._times is not None:
            self._times.seconds += time.perf_counter()

    def _size_up(self, sizes: Mapping[str, int]) -> None:
        """Tell the library other dimensions, and have as much scratch memory as it needs for them."""
        self._sizes = None
        for name, place in self._symbols.items():
            self._dims[place] = sizes[name]
        if self._library.llmc_workspace(*self._call) != 0:
            raise LlmcError("the kernel library refused the call", remedy="report the artifact")
        needed = int(self._dims[-1])
        if needed > self._workspace.size:
            self._workspace = aligned((max(needed, 2 * self._workspace.size),), np.dtype(np.uint8))
            self._pointers[-1] = self._workspace.ctypes.data
        self._sizes = sizes

    @contextlib.contextmanager
    def profile(self) -> Generator[CallTimes]:
        """The time of each kernel call, over the steps inside of the `with` block.

        Raises ArtifactError where the artifact is of a version that did not record its calls.
        """
        if "calls" not in self._kernel:
            raise ArtifactError(
                f"{self._artifact.root} does not say what its kernels are",
                remedy="compile the model with this version",
            )
        calls = self._kernel["calls"]  # a file's name, or of kernels beside the artifact's own the calls
        calls = json.loads(self._artifact.read_text(calls)) if isinstance(calls, str) else calls
        times = CallTimes([(kernel, weight) for kernel, weight in calls], np.zeros(len(calls), np.int64))
        self._library.llmc_profile(ctypes.c_void_p(times.cycles.ctypes.data))
        self._times = times
        try:
            yield times
        finally:
            self._times = None
            self._library.llmc_profile(None)


def _kernel_entry(artifact: Artifact, entry: Mapping[str, Any], isa: str | None) -> Mapping[str, Any]:
    found = next((kernel for kernel in entry["kernels"] if kernel["isa"] == isa), None)
    if found is None:
        raise ArtifactError(
            f"{artifact.root} has no kernels for {isa}", remedy=f"compile with tvm-cpu:isa={isa}"
        )
    return found


def _load(path: Path) -> ctypes.CDLL:
    if platform.system() != "Linux":  # which machine it is, its level says
        raise InputError(
            f"tvm-cpu kernels run on Linux, this is {platform.system()} {platform.machine()}",
            remedy="compile for onnx-cpu",
        )
    try:
        library = ctypes.CDLL(_own_name(path))
        for name in ("llmc_step", "llmc_workspace", "llmc_set_threads"):
            getattr(library, name).restype = ctypes.c_int
    except (OSError, AttributeError) as error:
        raise ArtifactError(f"{path} cannot be loaded: {error}", remedy="compile the model again") from None
    return library


_loaded: dict[str, list[tuple[int, int]]] = {}
"""Path → device and inode of each library that was loaded from there, which stay loaded."""


def _own_name(path: Path) -> str:
    """A path that leads to a library and to no earlier one: of a path that it knows, dlopen gives what it
    loaded from there, though another artifact may have taken its place.
    """
    path = path.absolute()
    state = path.stat()
    known = _loaded.setdefault(str(path), [])
    if (state.st_dev, state.st_ino) not in known:
        known.append((state.st_dev, state.st_ino))
    return os.path.join(path.parent, *["."] * known.index((state.st_dev, state.st_ino)), path.name)


def open_target(
    artifact: Artifact, *, isa: str | None, threads: int | None, kernels: Kernels | None = None
) -> TvmExecutor:
    """An executor of the artifact's kernels for `isa`, or of others over its weights; `threads` None: one a
    physical core.
    """
    return TvmExecutor(artifact, isa, threads, kernels)


__all__ = ["TvmExecutor", "aligned", "open_target"]
