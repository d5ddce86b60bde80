"""Runs the programs of targets for GPUs: weights, cache and intermediate results lie in the GPU's memory; a
step sends token numbers and tables, and gets logits back. `cuda.py` and `webgpu.py` say by which driver.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ...codegen.artifact import Artifact
from ...ir.dtypes import to_numpy
from ...ir.errors import ArtifactError, InputError
from ..adapter_places import AdapterPlaces
from .adapter_memory import WithSlots
from .base import STEP_INPUTS, StepInputs, adapter_slots, check_step, scaled_from
from .gpu_program import Driver, Pieces, Program, Room, round_up
from .rotation import Rotary, read_rotary, turn_codes, turn_keys
from .shapes import MOST, check_names, check_pages, check_states, evaluate, match_shape, size_of
from .windows import tables_of, window_of

if TYPE_CHECKING:
    from .cuda_adapters import CudaAdapters

_ALIGNMENT = 256
_COLUMNS = 16
"""Columns of a block table come by so many, so that a growing context seldom makes a step of other sizes."""


class GpuExecutor(WithSlots):
    """Used by one thread at a time."""

    target: ClassVar[str]

    batch_invariant = True

    def __init__(self, artifact: Artifact, driver: Driver) -> None:
        entry = artifact.target(self.target)
        self._artifact, self._driver = artifact, driver
        self.target_name = self.target
        self.isa, module = self._load(artifact, entry)
        self._arguments = {name: i for i, name in enumerate(entry["arguments"])}
        program = json.loads(artifact.read_text(entry["program"]))
        self._program = Program(program, driver, module, len(self._arguments))
        self._addresses = [0] * len(self._arguments)
        self._inputs = {item["name"]: item for item in entry["inputs"]}
        self._outputs = {item["name"]: item for item in entry["outputs"]}
        self._kv = [item for name, item in self._inputs.items() if name.startswith("kv_pages.")]
        self._window_of = [window_of(item["shape"][1]) for item in self._kv]
        self._windows = tuple(sorted({w for w in self._window_of if w is not None}))
        self.page_size = int(artifact.manifest.get("page_size", 16))
        last = next(iter(self._outputs.values()))["shape"]
        self.vocab_size = int(last[-1]) if last and isinstance(last[-1], int) else 0
        self._page_bytes = [size_of(item["shape"]) * to_numpy(item["dtype"]).itemsize for item in self._kv]
        self.kv_bytes_per_page = sum(self._page_bytes)
        self.max_pages: int | None = min((MOST // size_of(item["shape"]) for item in self._kv), default=None)
        self.num_pages = 0
        self._states = [item for name, item in self._inputs.items() if name.startswith("state.")]
        self._row_bytes = [size_of(item["shape"]) * to_numpy(item["dtype"]).itemsize for item in self._states]
        self.state_bytes = sum(self._row_bytes)
        self._num_states = 0
        self._rotary: list[Rotary | None] | None = None  # read when keys first turn
        self._vocabulary = artifact.model.get("vocab_size")
        self._types = int(artifact.model.get("token_types") or 0)
        self._scaled_from = scaled_from(artifact.model)
        self._sent, self._got = driver.pinned(1), driver.pinned(1)
        self._inbox, self._outbox = Room(driver), Pieces(driver)
        self.adapter_places = AdapterPlaces.parse(entry)
        self._adapters = self._adapter_slots()
        self._send_weights()

    def _load(self, artifact: Artifact, entry: Mapping[str, Any]) -> tuple[str, Any]:
        """What the kernels were compiled for, and the driver's module of them."""
        raise NotImplementedError

    def _send_weights(self) -> None:
        weights = self._artifact.weights(self.target)
        for name, place in self._arguments.items():
            if not name.startswith("weight:"):
                continue
            weight = weights.get(name.removeprefix("weight:"))
            if weight is None:
                raise ArtifactError(
                    f"{self._artifact.root}: the kernels want weight {name[7:]!r}, which is not there",
                    remedy="compile the model again or copy the artifact again",
                )
            self._addresses[place] = self._driver.allocate(weight.nbytes)
            self._driver.upload(self._addresses[place], weight)
        self._driver.wait()

    def free_bytes(self) -> int:
        """Of the GPU's memory, which the cache is taken from."""
        self._driver.enter()
        return self._driver.free_bytes()

    # -- adapters ------------------------------------------------------------------------------------------
    def _adapter_slots(self) -> CudaAdapters | None:
        """Of an artifact with places for adapters."""
        return None

    # -- the cache -----------------------------------------------------------------------------------------
    def allocate_kv(self, num_pages: int) -> None:
        """Make the cache: pages 0 .. num_pages - 1."""
        check_pages(num_pages, self.max_pages)
        self.num_pages = 0
        for item, page in zip(self._kv, self._page_bytes, strict=True):
            self._replace(item["name"], num_pages * page)
        self.num_pages = num_pages

    def copy_pages(self, src: Sequence[int], dst: Sequence[int]) -> None:
        """Copy page src[i] to page dst[i] in all layers, keys and values."""
        self._driver.enter()
        for item, page in zip(self._kv, self._page_bytes, strict=True):
            base, half = self._addresses[self._arguments[item["name"]]], page // 2
            for plane in (base, base + self.num_pages * half):
                for source, to in zip(src, dst, strict=True):
                    self._driver.copy(plane + to * half, plane + source * half, half)

    def identity(self) -> dict[str, str]:
        """See `base.MovesPages`."""
        return {"target": self.target, "isa": self.isa, "gpu": self._driver.name}

    def read_pages(self, pages: Sequence[int]) -> np.ndarray:
        """See `base.MovesPages`."""
        found = np.empty((len(pages), self.kv_bytes_per_page), np.uint8)
        for i, at, address, size in self._parts(pages):
            self._driver.download(found[i, at : at + size], address)
        self._driver.wait()
        return found

    def write_pages(self, pages: Sequence[int], contents: np.ndarray) -> None:
        """See `base.MovesPages`."""
        contents = np.ascontiguousarray(contents)
        for i, at, address, size in self._parts(pages):
            self._driver.upload(address, contents[i, at : at + size])
        self._driver.wait()

    def _parts(self, pages: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
        """Of each page in each layer, keys and values: number of the page, first byte among all of its own,
        address, bytes.
        """
        self._driver.enter()
        at = 0
        for item, size in zip(self._kv, self._page_bytes, strict=True):
            base, half = self._addresses[self._arguments[item["name"]]], size // 2
            for plane in (base, base + self.num_pages * half):
                for i, page in enumerate(pages):
                    yield i, at, plane + page * half, half
                at += half

    def rotate_keys(self, pages: Sequence[int], shift: int, window: int | None = None) -> None:
        """See `base.RotatesKeys`; windows have no pages of their own here. Keys come to this machine and go
        back: once in half a context.
        """
        assert window is None
        if self._rotary is None:
            self._rotary = read_rotary(self._artifact)
        contents, at = self.read_pages(pages), 0
        for item, size in zip(self._kv, self._page_bytes, strict=True):
            layer = int(item["name"].rpartition(".")[2])
            if (rotary := self._rotary[layer]) is not None:
                keys = contents[:, at : at + size // 2]
                head_dim = int(self._artifact.model["kv"][layer]["head_dim"])
                keys[...] = _turned(keys, item, rotary, shift, head_dim)
            at += size
        self.write_pages(pages, contents)

    def allocate_states(self, count: int) -> None:
        """Make the state cache: rows 0 .. count - 1."""
        check_states(count, (item["shape"] for item in self._states))
        for item, row in zip(self._states, self._row_bytes, strict=True):
            self._replace(item["name"], count * row)
        self._num_states = count

    def copy_state(self, src: int, dst: int) -> None:
        """Copy row src to row dst in all layers."""
        self._driver.enter()
        for item, row in zip(self._states, self._row_bytes, strict=True):
            base = self._addresses[self._arguments[item["name"]]]
            self._driver.copy(base + dst * row, base + src * row, row)

    def _replace(self, name: str, size: int) -> None:
        """Zeros on the GPU for an argument, in place of what it had."""
        driver, place = self._driver, self._arguments[name]
        driver.enter()
        self._program.forget()
        old, self._addresses[place] = self._addresses[place], 0  # should there be no room for the new ones
        if old:
            driver.free(old)
        self._addresses[place] = driver.allocate(size)
        driver.zero(self._addresses[place], size)

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
            states=self._num_states if self._states else None,
        )
        columns = round_up(inputs.block_table.shape[1], _COLUMNS)
        sizes = {
            "T": len(inputs.token_ids),
            "B": len(inputs.context_len),
            "P": columns,
            "R": len(inputs.output_index),
            "N": self.num_pages,
            "S": self._num_states,
        }
        arrays = {name: getattr(inputs, name) for name in STEP_INPUTS if name in self._inputs}
        if self._adapters is not None:
            slots = arrays["adapter"] = adapter_slots(inputs, self._adapters.slots)
            # Without ranks there is nothing to launch for adapters, where no token has one.
            blocks = self._adapters.blocks if (slots >= 0).any() else 0
            sizes |= {"A": self._adapters.slots, "L": blocks}
        elif inputs.adapter is not None:
            raise InputError("these kernels take no adapters", remedy="compile with --adapters")
        tables = tables_of(inputs, self._windows, (), self.page_size)
        for window, (slots, table) in zip(self._windows, tables, strict=True):
            sizes[f"N{window}"] = self.num_pages
            arrays |= {f"slot_mapping.{window}": slots, f"block_table.{window}": table}
        for name in [name for name in arrays if name.startswith("block_table")]:
            arrays[name] = _widened(arrays[name], columns)
        (output,) = self._outputs.values()
        results = self._run(arrays, sizes, {output["name"]: (sizes["R"], self.vocab_size)})
        return results[output["name"]]

    # -- functions -----------------------------------------------------------------------------------------
    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Named inputs → named outputs. Raises InputError for a missing input, a wrong dtype or shape."""
        if self._kv or "slot_mapping" in self._inputs:
            raise InputError("this artifact is a language model, not a function", remedy="call step")
        check_names(inputs, self._inputs)
        sizes: dict[str, int] = {}
        for name, value in inputs.items():
            match_shape(name, self._inputs[name]["shape"], self._inputs[name]["dtype"], value, sizes)
        shapes = {n: tuple(evaluate(d, sizes) for d in item["shape"]) for n, item in self._outputs.items()}
        return {name: array.copy() for name, array in self._run(inputs, sizes, shapes).items()}

    # -- the call ------------------------------------------------------------------------------------------
    def _run(
        self,
        inputs: Mapping[str, np.ndarray],
        sizes: Mapping[str, int],
        outputs: Mapping[str, tuple[int, ...]],
    ) -> dict[str, np.ndarray]:
        """Send inputs in one copy, launch, and get outputs in one copy."""
        driver = self._driver
        driver.enter()
        places, sent = _placed({name: array.nbytes for name, array in inputs.items()})
        kinds = {name: to_numpy(self._outputs[name]["dtype"]) for name in outputs}
        bytes_of = {name: math.prod(shape) * kinds[name].itemsize for name, shape in outputs.items()}
        results, got = _placed(bytes_of)
        self._make_room(sent, got, list(bytes_of.values()))
        where = self._outbox.addresses(list(bytes_of.values()))
        for name, at in places.items():
            array = inputs[name]
            self._sent[at : at + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
            self._addresses[self._arguments[name]] = self._inbox.address + at
        for name, address in zip(results, where, strict=True):
            self._addresses[self._arguments[f"output:{name}"]] = address
        driver.upload(self._inbox.address, self._sent[:sent])
        self._program.prepared(sizes, self._addresses).run(driver)
        for (name, at), address in zip(results.items(), where, strict=True):
            driver.download(self._got[at : at + bytes_of[name]], address)
        driver.wait()
        return {
            name: self._got[at : at + bytes_of[name]].view(kinds[name]).reshape(outputs[name])
            for name, at in results.items()
        }

    def _make_room(self, sent: int, got: int, outputs: Sequence[int]) -> None:
        """Memory for what a step sends and gets, here and there; `outputs`: bytes of each that it gets."""
        if sent > min(self._inbox.size, len(self._sent)):
            self._program.forget()
            self._inbox.grow(sent)
            self._sent = self._driver.pinned(self._inbox.size)
        wanted = self._outbox.allocations(outputs)
        if self._outbox.lacks(wanted) or got > len(self._got):
            self._program.forget()
            self._outbox.grow(wanted)
            self._got = self._driver.pinned(got + got // 2)


def _turned(
    stored: np.ndarray, item: Mapping[str, Any], rotary: Rotary, shift: int, head_dim: int
) -> np.ndarray:
    """Bytes [pages, of all keys of one layer] with the keys turned back. They are [heads, page_size,
    head_dim], of int8 with a float32 behind each head and token.
    """
    dtype = to_numpy(item["dtype"])
    _, _, heads, size, width = item["shape"]
    rows = np.ascontiguousarray(stored).view(dtype).reshape(len(stored), heads, size, width)
    keys = np.ascontiguousarray(rows[..., :head_dim].swapaxes(-1, -2))
    if dtype == np.int8:
        scales = np.ascontiguousarray(rows[..., head_dim:]).view(np.float32)[..., 0]
        turn_codes(rotary, keys, scales, shift)
        rows[..., head_dim:] = np.ascontiguousarray(scales[..., None]).view(np.int8)
    else:
        keys = turn_keys(rotary, keys, shift)
    rows[..., :head_dim] = keys.swapaxes(-1, -2)
    return rows.view(np.uint8).reshape(stored.shape)


def _widened(table: np.ndarray, columns: int) -> np.ndarray:
    """A block table with more columns, of zeros."""
    wide = np.zeros((len(table), columns), table.dtype)
    wide[:, : table.shape[1]] = table
    return wide


def _placed(sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Where each array begins in one piece of memory, and its bytes."""
    places: dict[str, int] = {}
    at = 0
    for name, size in sizes.items():
        places[name] = at
        at = round_up(at + size, _ALIGNMENT)
    return places, at
