"""Runs target `onnx-cpu` by onnxruntime.

The weights stay in their file, which onnxruntime maps. The cache is numpy memory that the model reads in
place; it returns the rows of the new tokens, and `step` writes them to their slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...codegen.artifact import Artifact
from ...ir.dtypes import kv_bytes, to_numpy
from ...ir.errors import ArtifactError, InputError
from .. import cpu
from .base import STEP_INPUTS, Executor, StepInputs, check_step, columns, scaled_from
from .pages import pages_as_bytes, pages_from_bytes
from .rotation import Rotary, read_rotary, turn_rows
from .windows import tables_of, window_of

CPU_PROVIDER = "CPUExecutionProvider"


class OnnxExecutor:
    """One session and one cache. Used by one thread at a time (see `base.Executor`)."""

    def __init__(
        self,
        artifact: Artifact,
        *,
        threads: int | None = None,
        target: str = "onnx-cpu",
        providers: Sequence[str] = (CPU_PROVIDER,),
    ):
        """`providers`: onnxruntime's, by preference. What runs is in `providers` afterwards."""
        entry = artifact.target(target)
        self.target_name = target
        self._artifact, self._kind = artifact, artifact.kind
        self._session = _open_session(artifact, entry, threads, providers)
        self.providers: list[str] = self._session.get_providers()
        self._inputs = {v.name: v for v in self._session.get_inputs()}
        self._outputs = [v.name for v in self._session.get_outputs()]
        self.batch_invariant = bool(entry.get("batch_invariant", False))
        self.page_size = int(entry.get("page_size") or artifact.manifest.get("page_size", 16))
        model = artifact.model
        self.vocab_size = columns(artifact)
        self._types = int(model.get("token_types") or 0)
        self._scaled_from = scaled_from(model)
        self._kv_dtype = str(entry.get("kv_dtype", "float32"))
        self._layers = _cache_layers(self._inputs, self._outputs)
        per_token = sum(2 * heads * kv_bytes(self._kv_dtype, dim) for _, heads, dim in self._layers)
        self.kv_bytes_per_page = per_token * self.page_size
        self._window_of = [window_of(self._inputs[f"k_pages.{i}"].shape[1]) for i, _, _ in self._layers]
        self.windows = tuple(sorted({w for w in self._window_of if w is not None}))
        self.window_bytes_per_page = tuple(
            sum(
                2 * heads * kv_bytes(self._kv_dtype, dim) * self.page_size
                for (_, heads, dim), of in zip(self._layers, self._window_of, strict=True)
                if of == window
            )
            for window in self.windows
        )
        self._window_pages: tuple[int, ...] = ()
        self._rotary: list[Rotary | None] | None = None  # read when keys first turn
        self.max_pages: int | None = None
        self._num_pages = 0
        self._cache: list[np.ndarray] = []
        self._scales: list[np.ndarray] = []
        self._cache_feed: dict[str, np.ndarray] = {}

    def allocate_kv(self, num_pages: int) -> None:
        """Zeroed pages [2, Hkv, num_pages, page_size, D] a layer, of int8 with scales [2, Hkv, num_pages,
        page_size]; the system gives the memory when it is written.
        """
        if num_pages < 1:
            raise InputError(f"a cache of {num_pages} pages holds nothing", remedy="give at least one page")
        self._num_pages, self._window_pages = num_pages, ()
        self._allocate([num_pages] * len(self._layers))

    def allocate_windows(self, pages: Sequence[int]) -> None:
        """See `windows.KeepsWindows`."""
        counts = dict(zip(self.windows, pages, strict=True))
        self._window_pages = tuple(pages)
        self._allocate([self._num_pages if w is None else counts[w] for w in self._window_of])

    def _allocate(self, counts: Sequence[int]) -> None:
        """`counts`: pages of each layer."""
        dtype, size = to_numpy(self._kv_dtype), self.page_size
        layers = list(zip(self._layers, counts, strict=True))
        self._cache = [np.zeros((2, heads, count, size, dim), dtype) for (_, heads, dim), count in layers]
        scaled = layers if self._kv_dtype == "int8" else []
        self._scales = [np.zeros((2, heads, count, size), np.float32) for (_, heads, _), count in scaled]
        self._cache_feed = {}
        for kind, arrays in (("pages", self._cache), ("scales", self._scales)):
            for (index, _, _), array in zip(self._layers, arrays, strict=False):
                self._cache_feed |= {f"{part}_{kind}.{index}": array[i] for i, part in enumerate("kv")}

    def copy_pages(self, src: Sequence[int], dst: Sequence[int]) -> None:
        """Copy pages in all layers, but those of windows with pages of their own."""
        self._copy([w is None or not self._window_pages for w in self._window_of], src, dst)

    def copy_window_pages(self, which: int, src: Sequence[int], dst: Sequence[int]) -> None:
        """See `windows.KeepsWindows`."""
        self._copy([w == self.windows[which] for w in self._window_of], src, dst)

    def _copy(self, layers: Sequence[bool], src: Sequence[int], dst: Sequence[int]) -> None:
        source, target = np.asarray(src, np.int64), np.asarray(dst, np.int64)
        for arrays in (self._cache, self._scales):
            for array, wanted in zip(arrays, layers, strict=False):
                if wanted:
                    array[:, :, target] = array[:, :, source]

    def rotate_keys(self, pages: Sequence[int], shift: int, window: int | None = None) -> None:
        """See `base.RotatesKeys`."""
        if self._rotary is None:
            self._rotary = read_rotary(self._artifact)
        wanted = None if window is None else self.windows[window]
        for i, ((layer, _, _), of) in enumerate(zip(self._layers, self._window_of, strict=True)):
            rotary, own = self._rotary[int(layer)], of if self._window_pages else None
            if own == wanted and rotary is not None:
                scales = self._scales[i][0] if self._scales else None
                turn_rows(rotary, self._cache[i][0], scales, pages, shift)

    def step(self, inputs: StepInputs) -> np.ndarray:
        """Run the model, write the new rows to their slots, return its first output: logits [R, vocab_size]
        float32 (hidden states of an encoder).

        Raises InputError before `allocate_kv` and for an artifact without a step.
        """
        if "output_index" not in self._inputs:
            raise InputError("this artifact is a plain function and has no step", remedy="call run")
        if len(self._cache) != len(self._layers):
            raise InputError("the cache has no pages yet", remedy="call allocate_kv first")
        check_step(
            inputs,
            num_pages=self._num_pages,
            page_size=self.page_size,
            vocabulary=None,  # the upper end is checked by Gather
            types=self._types,
            scaled_from=self._scaled_from,
        )
        if not len(inputs.token_ids):  # the model's first group of queries cannot be empty
            return np.zeros((0, self.vocab_size), np.float32)
        tables = dict(
            zip(
                self.windows,
                tables_of(inputs, self.windows, self._window_pages, self.page_size),
                strict=True,
            )
        )
        slots = {None: inputs.slot_mapping, **{window: given for window, (given, _) in tables.items()}}
        places = {window: np.divmod(given, self.page_size) for window, given in slots.items()}
        self._clear({window: page[place == 0] for window, (page, place) in places.items()})
        feed = {name: getattr(inputs, name) for name in STEP_INPUTS if name in self._inputs}
        feed |= {f"block_table.{window}": table for window, (_, table) in tables.items()}
        results = self._run_model(feed, self._cache_feed)
        rows = dict(zip(self._outputs, results, strict=True))
        for kind, arrays in (("", self._cache), ("_scale", self._scales)):
            for (index, _, _), window, array in zip(self._layers, self._window_of, arrays, strict=False):
                page, place = places[window]
                for i, part in enumerate("kv"):
                    array[i][:, page, place] = rows[f"new_{part}{kind}.{index}"].swapaxes(0, 1)
        return results[0]

    def _run_model(self, feed: dict[str, Any], cache: dict[str, np.ndarray]) -> list[np.ndarray]:
        return self._session.run(self._outputs, {**feed, **cache})

    def identity(self) -> dict[str, str]:
        """See `base.MovesPages`: onnxruntime brings the kernels."""
        import onnxruntime as ort

        return {"target": self.target_name, "onnxruntime": ort.__version__, "provider": self.providers[0]}

    def read_pages(self, pages: Sequence[int]) -> np.ndarray:
        """See `base.MovesPages`."""
        return pages_as_bytes([*self._cache, *self._scales], 2, pages)

    def write_pages(self, pages: Sequence[int], contents: np.ndarray) -> None:
        """See `base.MovesPages`."""
        pages_from_bytes([*self._cache, *self._scales], 2, pages, contents)

    def _clear(self, pages: Mapping[int | None, np.ndarray]) -> None:
        """Zero pages that a step begins to fill. The model reads whole pages and masks what is not there by
        adding -inf, which a NaN that an earlier sequence left would outlive.
        """
        arrays = self._scales or self._cache  # a scale of 0 makes its codes 0
        for window, array in zip(self._window_of, arrays, strict=True):
            if pages[window].size:
                array[:, :, pages[window]] = 0

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Artifacts of kind "function": inputs by name → outputs by name.

        Raises InputError for a missing, unknown or wrongly shaped input.
        """
        if self._kind != "function":
            raise InputError(f"an artifact of kind {self._kind!r} is no function", remedy="call step")
        wrong = sorted(set(self._inputs) ^ set(inputs))
        if wrong:
            raise InputError(
                f"inputs {', '.join(wrong)} are missing or unknown", remedy=f"give {', '.join(self._inputs)}"
            )
        arrays = {name: np.ascontiguousarray(a).reshape(np.shape(a)) for name, a in inputs.items()}
        from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

        try:
            results = self._session.run(self._outputs, arrays)
        except InvalidArgument as error:
            wanted = ", ".join(f"{v.name} {v.type} {v.shape}" for v in self._inputs.values())
            raise InputError(f"an input does not fit ({error})", remedy=f"give {wanted}") from None
        return dict(zip(self._outputs, results, strict=True))


def _cache_layers(inputs: Mapping[str, Any], outputs: Sequence[str]) -> list[tuple[str, int, int]]:
    """(index, kv_heads, head_dim) of every layer with a cache, in the order of the model's outputs."""
    layers: list[tuple[str, int, int]] = []
    for name in outputs:
        if name.startswith("new_k."):
            index = name.removeprefix("new_k.")
            heads, _, _, dim = inputs[f"k_pages.{index}"].shape
            layers.append((index, int(heads), int(dim)))
    return layers


def _open_session(
    artifact: Artifact, entry: Mapping[str, Any], threads: int | None, providers: Sequence[str]
) -> Any:
    """A session over the model, with the folder of the weight file as the one that it may read from."""
    import onnxruntime as ort

    ort.disable_telemetry_events()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads or cpu.default_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # no busy threads between steps
    if not entry.get("prepack", True):  # repacking copies every matrix; see the target's option `pack`
        options.add_session_config_entry("session.disable_prepacking", "1")
    path = artifact.path(entry["model"])
    if "weights" in entry:
        folder = artifact.path(entry["weights"]).resolve().parent
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    try:
        # From memory: older versions heed the folder only then (onnxruntime pull requests 23557 and 29459).
        # No fallback: where a provider fails, onnxruntime goes on with the CPU and says so on stdout alone.
        return ort.InferenceSession(
            path.read_bytes(), options, providers=list(providers), enable_fallback=False
        )
    except Exception as error:  # onnxruntime's exceptions share no base class but this one
        raise ArtifactError(
            f"{path}: onnxruntime {ort.__version__} cannot load it ({error})",
            remedy="install a newer onnxruntime, or compile the model again",
        ) from error


def open_target(artifact: Artifact, *, isa: str | None, threads: int | None) -> Executor:
    """Open `onnx-cpu`; onnxruntime picks its kernels for the CPU itself, so `isa` means nothing to it."""
    return OnnxExecutor(artifact, threads=threads)
