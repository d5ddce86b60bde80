"""GGUF's schemes over the graph.

    linear(x, w)                            → quantized_linear(x, blocks of w)
    linear(x, [wq; wk; wv]), wv in Q6_K     → concat(quantized_linear(x, [wq; wk]), quantized_linear(x, wv))
    embedding(ids, w)                       → quantized_embedding(ids, blocks of w)

Every matrix is encoded once, into the bytes that a GGUF file holds. Targets run it from these (`ir.ggml`
takes codes, scales and minimums out of them), and `--target gguf` writes them as they are.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np

from ....ir.core import Graph, Value
from ....ir.dtypes import to_numpy
from ....ir.errors import InputError
from ....ir.ggml import BLOCK_TYPES, block_parts
from ....ir.ops.nn import Linear
from ....ir.weights import LazyTensor, QuantizedTensors, ShapeOnlyTensor, quantized_of
from ...base import Pass, PassContext, PassResult
from ...derived import ConcatRows
from ...registry import Quantizer
from ...work import WorkFolder
from ..attach import is_head, is_quantizable
from ..keep import attach_stored, split_by_grid
from ..moe import fall_back
from .encode import encode
from .importance import importances
from .mixture import SCHEMES, Role, block_type
from .names import named_parts

Array = np.ndarray[Any, Any]
PIECE: Final = 1 << 22  # values that are encoded and saved at a time


class EncodedTensor:
    """A matrix [N, K] encoded into GGML blocks when they are first wanted, then kept.

    Attributes:
        ggml_type: block type. dtype: of what was encoded, and of what `read` gives. name: the parameter.
        quantized: its parts, read from the blocks.
    """

    factor: Array | None = None

    def __init__(
        self,
        base: LazyTensor,
        ggml_type: str,
        importance: Array | None,
        work: WorkFolder | None,
        name: str,
    ) -> None:
        self.base, self.ggml_type, self.name = base, ggml_type, name
        self.shape = base.shape
        self.dtype = base.dtype
        self.source = base.source
        self._importance = importance
        self._work = work
        self._step = max(1, PIECE // max(1, base.shape[1]))
        self._kept: dict[int, Array] = {}
        self.quantized: QuantizedTensors | None = block_parts(self)

    def encode(self) -> None:
        """Make all blocks now."""
        for number in range(-(-self.shape[0] // self._step)):
            self._piece(number)

    def blocks(self, start: int = 0, stop: int | None = None) -> Array:
        """Raw bytes of rows [start:stop), uint8 [rows, bytes of a row]."""
        first, last, _ = slice(start, stop).indices(self.shape[0])
        found = [
            self._piece(i)[max(first - i * self._step, 0) : last - i * self._step]
            for i in range(first // self._step, -(-last // self._step))
        ]
        if not found or last <= first:
            return np.empty((0, BLOCK_TYPES[self.ggml_type].row_bytes(self.shape[1])), np.uint8)
        return found[0] if len(found) == 1 else np.concatenate(found)

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        """Rows [start:stop) as they are after encoding."""
        kind = BLOCK_TYPES[self.ggml_type]
        raw = self.blocks(start, stop)
        if not len(raw):
            return np.empty((0, self.shape[1]), to_numpy(self.dtype))
        scale, minimum = kind.unpack_scales(raw)
        group = kind.quant.group_size
        codes = kind.unpack_codes(raw).astype(np.float32).reshape(len(raw), -1, group)
        if minimum is None:
            codes -= np.float32(1 << (kind.quant.bits - 1))
        codes *= scale.astype(np.float32)[..., None]
        if minimum is not None:
            codes += minimum.astype(np.float32)[..., None]
        return codes.reshape(len(raw), -1).astype(to_numpy(self.dtype), copy=False)

    def _piece(self, number: int) -> Array:
        if number not in self._kept:
            self._kept[number] = self._encoded(number)
        return self._kept[number]

    def _encoded(self, number: int) -> Array:
        label = f"gguf.{_label(self.name)}.{number}"
        if self._work is not None and self._work.done(label):
            return self._work.load(label, mapped=True)["blocks"]
        start = number * self._step
        rows = self.base.read(start, min(start + self._step, self.shape[0]))
        found = encode(self.ggml_type, np.asarray(rows, np.float32), self._importance, what=self.source)
        if self._work is None:
            return found
        self._work.save(label, {"blocks": found})
        return self._work.load(label, mapped=True)["blocks"]

    def __repr__(self) -> str:
        return f"EncodedTensor({self.ggml_type}{list(self.shape)}, {self.source!r})"


def _label(name: str) -> str:
    """A piece's name: readable, of allowed characters, and unlike any other's."""
    return f"{re.sub(r'[^A-Za-z0-9_]+', '-', name)[-100:]}.{hashlib.sha256(name.encode()).hexdigest()[:12]}"


_EXPERTS = {name: (8, 64, True) if name == "q8_0" else (int(name[1]), 32, False) for name in SCHEMES}
"""By scheme, the grid of experts: bits, group, and whether it is symmetric."""


@dataclass(frozen=True)
class EncodeGguf(Pass):
    """Linear layers and embeddings in GGUF's block types, all input columns weighed alike.

    Options: `scheme`, one of q4_0, q4_k_m, q5_k_m, q6_k, q8_0.
    """

    name = "encode-gguf"
    requires = "fused"
    ensures = "quantized"
    scheme: str = "q8_0"

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise InputError(
                f"pass {self.name}: scheme={self.scheme!r}", remedy=f"use one of {', '.join(SCHEMES)}"
            )

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        weights = [w for w in graph.weights.values() if is_quantizable(w) and w.weight is not None]
        measured = self.importances(graph, weights, context)
        layers = 1 + max((Role(w.name, 0).layer or 0 for w in weights), default=0)
        encoded: list[EncodedTensor] = []
        floats: list[str] = []
        for weight in weights:
            made, left = self._weight(graph, weight, layers, measured.get(weight.name), context.work)
            encoded += made
            floats += left
        if context.work is not None:
            for i, tensor in enumerate(encoded):
                context.progress("encoding weights", i / len(encoded))
                tensor.encode()
        notes = [f"{name} stays in floats: no GGUF block type fits it" for name in floats]
        said = fall_back(graph, self.scheme, *_EXPERTS[self.scheme])
        graph.drop_dead()
        if not encoded:
            notes.append("no linear layer or embedding was found to quantize")
        return PassResult(graph, bool(encoded) or bool(said), [*notes, *said])

    def importances(self, graph: Graph, weights: Sequence[Value], context: PassContext) -> dict[str, Array]:
        """float32 [K] by the name of a weight; without one all columns count alike."""
        return {}

    def _weight(
        self,
        graph: Graph,
        weight: Value,
        layers: int,
        importance: Array | None,
        work: WorkFolder | None,
    ) -> tuple[list[EncodedTensor], list[str]]:
        """Encode one weight of the graph; the matrices that it consists of, and names of those left alone."""
        assert weight.weight is not None
        head = is_head(graph, weight) and any(isinstance(u, Linear) for u in weight.users)
        encoded: list[EncodedTensor] = []
        floats: list[str] = []
        pieces: list[LazyTensor] = []
        for name, part in named_parts(weight):
            kind = block_type(self.scheme, Role(name, part.shape[1], head), layers)
            if kind is None:
                floats.append(name)
                pieces.append(part)
                continue
            encoded.append(EncodedTensor(part, kind, importance, work, name))
            pieces.append(encoded[-1])
        if not encoded:
            return encoded, floats
        whole = pieces[0] if len(pieces) == 1 else ConcatRows(pieces)
        graph.set_weight(weight, whole)
        before = set(graph.weights.values())
        split = split_by_grid(graph, weight)
        for value in [v for v in graph.weights.values() if v not in before] if split else [weight]:
            parts = quantized_of(value.weight)
            if parts is not None:
                attach_stored(graph, value, parts)
        return encoded, floats


@dataclass(frozen=True)
class QuantizeGguf(EncodeGguf):
    """Linear layers and embeddings in GGUF's block types, by an importance matrix measured on calibration
    text.

    Options: `scheme`, one of q4_0, q4_k_m, q5_k_m, q6_k, q8_0.
    """

    name = "quantize-gguf"
    needs_calibration: ClassVar[bool] = True
    scheme: str = "q4_k_m"

    def importances(self, graph: Graph, weights: Sequence[Value], context: PassContext) -> dict[str, Array]:
        if context.calibration is None or any(isinstance(w.weight, ShapeOnlyTensor) for w in weights):
            return {}
        return importances(graph, context.calibration.sequences, context.work, context.progress)


class GgufSchemes(Quantizer):
    """`gguf-q4_k_m` and its like. 8 bits are the same with any importances, so that scheme measures none."""

    forms = tuple(f"gguf-{scheme}" for scheme in SCHEMES)
    head = None

    def passes(self, scheme: str) -> list[Pass] | None:
        kind = scheme.removeprefix("gguf-")
        if kind == scheme:
            return None
        if kind not in SCHEMES:
            raise InputError(f"--quant {scheme} is not written", remedy=f"use one of {', '.join(self.forms)}")
        return [EncodeGguf(kind) if kind == "q8_0" else QuantizeGguf(kind)]
