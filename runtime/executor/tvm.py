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
import json
import math
import platform
import time
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np

from ...codegen.artifact import Artifact
from ...ir.dtypes import to_numpy
from ...ir.errors import ArtifactError, InputError, LlmcError
from .. import cpu
from .base import STEP_INPUTS, CallTimes, StepInputs, check_step

_ALIGNMENT = 64
_MOST = (1 << 31) - 1
"""Elements of an array: the kernels index with 32 bits."""


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
        self.dtype = to_numpy(entry["dtype"])
        self.shape: tuple[int | str, ...] = tuple(entry["shape"])
        self.memory = aligned((0,), self.dtype)

    def sized(self, shape: Sequence[int]) -> tuple[np.ndarray, bool]:
        """The array for a shape, and whether its address changed."""
        size = math.prod(shape)
        grown = size > self.memory.size
        if grown:
            self.memory = aligned((max(size, 2 * self.memory.size),), self.dtype)
        return self.memory[:size].reshape(shape), grown


class TvmExecutor:
    """Runs the kernels of one ISA level. Used by one thread at a time."""

    batch_invariant = True

    def __init__(self, artifact: Artifact, isa: str | None, threads: int | None) -> None:
        entry = artifact.target("tvm-cpu")
        self._artifact, self._kernel = artifact, _kernel_entry(artifact, entry, isa)
        self.target_name = "tvm-cpu"
        self.isa = str(self._kernel["isa"])
        self._library = _load(artifact, self._kernel["path"])
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
        self._weights = artifact.weights("tvm-cpu")
        self._bind_weights(artifact)
        self._pages: list[np.ndarray] = []
        self._kv = [array for name, array in self._inputs.items() if name.startswith("kv_pages.")]
        self.page_size = int(artifact.manifest.get("page_size", 16))
        last = next(iter(self._outputs.values())).shape
        self.vocab_size = int(last[-1]) if last and isinstance(last[-1], int) else 0
        self.kv_bytes_per_page = sum(
            math.prod(d for d in array.shape if isinstance(d, int)) * array.dtype.itemsize
            for array in self._kv
        )
        most = [_MOST // math.prod(d for d in array.shape if isinstance(d, int)) for array in self._kv]
        self.max_pages: int | None = min(most, default=None)
        self.num_pages = 0
        self._vocabulary = artifact.model.get("vocab_size")
        self._types = int(artifact.model.get("token_types") or 0)

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

    # -- the cache -----------------------------------------------------------------------------------------
    def allocate_kv(self, num_pages: int) -> None:
        """Make the cache: pages 0 .. num_pages - 1, memory taken when a page is first written."""
        if num_pages < 1:
            raise InputError(f"a cache of {num_pages} pages holds nothing", remedy="give at least one page")
        if self.max_pages is not None and num_pages > self.max_pages:
            raise InputError(
                f"a layer's cache of {num_pages} pages has more elements than a kernel can count",
                remedy=f"give at most {self.max_pages} pages",
            )
        self._pages = []
        for array in self._kv:
            shape = [num_pages if isinstance(d, str) else d for d in array.shape]
            pages = aligned(shape, array.dtype)
            self._pages.append(pages)
            self._pointers[self._arguments[array.name]] = pages.ctypes.data
        self.num_pages = num_pages

    def copy_pages(self, src: Sequence[int], dst: Sequence[int]) -> None:
        """Copy page src[i] to page dst[i] in all layers."""
        for pages in self._pages:
            pages[:, dst] = pages[:, src]

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
        )
        sizes = {
            "T": len(inputs.token_ids),
            "B": len(inputs.context_len),
            "P": inputs.block_table.shape[1],
            "R": len(inputs.output_index),
            "N": self.num_pages,
        }
        for name, place in self._symbols.items():
            self._dims[place] = sizes[name]
        for name in STEP_INPUTS:
            if name in self._arguments:
                self._put(name, getattr(inputs, name))
        (output,) = self._outputs.values()
        rows = sizes["R"]
        if rows * self.vocab_size > _MOST:
            raise InputError(
                f"logits of {rows} rows are more than a kernel can count",
                remedy=f"ask for at most {_MOST // self.vocab_size} rows in a step",
            )
        logits, grown = output.sized((rows, self.vocab_size))
        if grown:
            self._pointers[self._arguments[f"output:{output.name}"]] = output.memory.ctypes.data
        self._run()
        return logits

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
        unknown = sorted(set(inputs) - set(self._inputs))
        missing = sorted(set(self._inputs) - set(inputs))
        if unknown or missing:
            raise InputError(
                f"inputs missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}",
                remedy=f"give {', '.join(self._inputs)}",
            )
        sizes: dict[str, int] = {}
        for name, value in inputs.items():
            self._match(self._inputs[name], value, sizes)
        for name, place in self._symbols.items():
            self._dims[place] = sizes[name]
        for name, value in inputs.items():
            self._put(name, value)
        results: dict[str, np.ndarray] = {}
        for name, array in self._outputs.items():
            results[name] = aligned([_evaluate(d, sizes) for d in array.shape], array.dtype)
            self._pointers[self._arguments[f"output:{name}"]] = results[name].ctypes.data
        self._run()
        return results

    def _match(self, wanted: _Array, value: np.ndarray, sizes: dict[str, int]) -> None:
        text = f"{wanted.name} is {value.dtype}{list(value.shape)}, wanted {wanted.dtype}{list(wanted.shape)}"
        if value.dtype != wanted.dtype or value.ndim != len(wanted.shape):
            raise InputError(text, remedy="convert it")
        for d, n in zip(wanted.shape, value.shape, strict=True):
            if isinstance(d, str) and d.isidentifier():
                d = sizes.setdefault(d, n)
            if _evaluate(d, sizes) != n:
                raise InputError(text, remedy="give that shape")

    # -- the call ------------------------------------------------------------------------------------------
    def _run(self) -> None:
        if self._library.llmc_workspace(*self._call) != 0:
            raise LlmcError("the kernel library refused the call", remedy="report the artifact")
        needed = int(self._dims[-1])
        if needed > self._workspace.size:
            self._workspace = aligned((max(needed, 2 * self._workspace.size),), np.dtype(np.uint8))
            self._pointers[-1] = self._workspace.ctypes.data
        self._dims[-1] = 0
        if self._times is not None:
            self._times.seconds -= time.perf_counter()
        if self._library.llmc_step(*self._call) != 0 or self._dims[-1] != 0:
            raise LlmcError("a kernel got no scratch memory", remedy="free memory or send shorter prompts")
        if self._times is not None:
            self._times.seconds += time.perf_counter()

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
        calls = json.loads(self._artifact.read_text(self._kernel["calls"]))
        times = CallTimes([(kernel, weight) for kernel, weight in calls], np.zeros(len(calls), np.int64))
        self._library.llmc_profile(ctypes.c_void_p(times.cycles.ctypes.data))
        self._times = times
        try:
            yield times
        finally:
            self._times = None
            self._library.llmc_profile(None)


def _evaluate(dim: int | str, sizes: Mapping[str, int]) -> int:
    """A dimension of the manifest: a number, or a polynomial such as "2*T+1" or "B*T"."""
    if isinstance(dim, int):
        return dim
    total = 0
    for term in dim.replace("-", "+-").split("+"):
        if not term:
            continue
        value = -1 if term.startswith("-") else 1
        for factor in term.lstrip("-").split("*"):
            value *= int(factor) if factor.isdigit() else sizes[factor]
        total += value
    return total


def _kernel_entry(artifact: Artifact, entry: Mapping[str, Any], isa: str | None) -> Mapping[str, Any]:
    found = next((kernel for kernel in entry["kernels"] if kernel["isa"] == isa), None)
    if found is None:
        raise ArtifactError(
            f"{artifact.root} has no kernels for {isa}", remedy=f"compile with tvm-cpu:isa={isa}"
        )
    return found


def _load(artifact: Artifact, path: str) -> ctypes.CDLL:
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise InputError(
            f"tvm-cpu kernels run on Linux x86-64, this is {platform.system()} {platform.machine()}",
            remedy="compile for onnx-cpu",
        )
    try:
        library = ctypes.CDLL(str(artifact.path(path)))
        for name in ("llmc_step", "llmc_workspace", "llmc_set_threads"):
            getattr(library, name).restype = ctypes.c_int
    except (OSError, AttributeError) as error:
        raise ArtifactError(
            f"{artifact.root / path} cannot be loaded: {error}", remedy="compile the model again"
        ) from None
    return library


def open_target(artifact: Artifact, *, isa: str | None, threads: int | None) -> TvmExecutor:
    """An executor of the artifact's kernels for `isa`; `threads` None: one a physical core."""
    return TvmExecutor(artifact, isa, threads)


__all__ = ["TvmExecutor", "aligned", "open_target"]
