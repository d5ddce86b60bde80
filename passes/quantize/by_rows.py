"""Quantizers that treat each row of a weight by itself: the maths is a function from float rows to codes,
scales and zero points; what is around it (laziness, the graph, checks) is here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...ir.core import Graph, Value
from ...ir.errors import CompileError
from ...ir.types import Quantization
from ...ir.weights import LazyTensor
from ...plugins.entries import blaming
from .attach import attach_quantized, is_head, is_quantizable
from .moe import Parts, StackedPart, StackedRows, attach_experts, experts_of
from .nearest import QuantizedWeight

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class QuantizedRows:
    """codes uint8 [n, K], below 2^bits; scale float16 [n, G]; zero_point [n, G]: uint8 (subtracted from
    codes) or float16 (added after scaling, a minimum), None for a symmetric grid. `Quantization` has the
    formulas.
    """

    codes: Array
    scale: Array
    zero_point: Array | None = None


QuantizeRows = Callable[[Array], QuantizedRows]
"""float32 rows [n, K], finite → what they become; a row's result depends on that row alone."""


class _Rows(QuantizedWeight):
    """A weight whose rows a function quantizes as they are read."""

    def __init__(self, base: LazyTensor, quant: Quantization, function: QuantizeRows, zero: str) -> None:
        super().__init__(base, quant)
        self._function, self._zero = function, zero

    def _quantized(self, start: int, stop: int) -> dict[str, Array]:
        rows = np.asarray(self.base.read(start, stop), dtype=np.float32)
        if not np.isfinite(rows).all():
            raise CompileError(
                f"{self.base.source} holds NaN or infinite values",
                remedy="the checkpoint is damaged or must not be quantized (--quant none)",
            )
        with blaming(f"quantizing {self.base.source}", self._function):
            found: Any = self._function(rows)
            if not isinstance(found, QuantizedRows):
                raise CompileError(
                    f"{self._function.__name__} gave a {type(found).__name__}", remedy="give QuantizedRows"
                )
            self._check(found, len(rows))
        parts: dict[str, Array] = {"codes": found.codes, "scale": found.scale}
        return parts if found.zero_point is None else {**parts, "zero_point": found.zero_point}

    def _check(self, found: QuantizedRows, n: int) -> None:
        """Raise CompileError where a part is not what the quantization says."""
        wanted: list[tuple[str, Any, str, int]] = [
            ("codes", found.codes, "uint8", self.k),
            ("scale", found.scale, "float16", self.groups),
        ]
        if self._zero:
            wanted.append(("zero_point", found.zero_point, self._zero, self.groups))
        elif found.zero_point is not None:
            raise CompileError("a symmetric grid has no zero points", remedy="leave zero_point away")
        for name, part, dtype, width in wanted:
            shape, kind = getattr(part, "shape", None), getattr(part, "dtype", None)
            if shape != (n, width) or kind != dtype:
                raise CompileError(f"{name} is {kind}{shape}", remedy=f"give {dtype} [{n}, {width}]")
            if dtype == "float16" and not np.isfinite(part).all():
                raise CompileError(f"{name} holds values beyond float16", remedy="keep scales below 65504")
        top = (1 << self.quant.bits) - 1
        if found.codes.size and found.codes.max() > top:
            raise CompileError(f"a code is {found.codes.max()}", remedy=f"keep codes within 0 to {top}")


class _Part:
    """Codes, scales or zero points of `_Rows` as a lazy tensor."""

    _WIDE: ClassVar[str] = "codes"

    def __init__(self, weight: _Rows, part: str, dtype: str) -> None:
        self.weight, self.part, self.dtype = weight, part, dtype
        self.shape: tuple[int, ...] = (weight.rows, weight.k if part == self._WIDE else weight.groups)
        self.source = f"{part}({weight.base.source})"

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        end = self.shape[0] if stop is None else min(stop, self.shape[0])
        return np.ascontiguousarray(self.weight.read(self.part, start, end))


def quantize_by_rows(
    graph: Graph,
    function: QuantizeRows,
    *,
    bits: int,
    group: int,
    zero_point: str = "",
    skip: Sequence[str] = (),
) -> int:
    """Let the linear layers of a graph, and the experts of its mixtures, read weights that `function`
    quantizes; how many layers and mixtures there are. Embeddings and the output head stay as they are
    (`quantize-head` sees to them).

    Args:
        bits: of the codes, 2 to 8. group: columns that share a scale; 0 for whole rows.
        zero_point: "" for a symmetric grid, "uint8", or "float16" for a minimum (`QuantizedRows`).
        skip: names of weights that stay as they are.
    """
    count = 0
    for weight in list(graph.weights.values()):
        base = weight.weight
        if base is None or weight.name in skip or not is_quantizable(weight) or is_head(graph, weight):
            continue
        k = base.shape[1]
        quant = Quantization(bits, min(group or k, k), not zero_point)
        rows = _Rows(base, quant, function, zero_point)
        zero = _Part(rows, "zero_point", zero_point) if zero_point else None
        attach_quantized(
            graph, weight, quant, _Part(rows, "codes", "uint8"), _Part(rows, "scale", "float16"), zero
        )
        count += 1

    def experts(weight: Value) -> Parts:
        assert weight.weight is not None
        _, n, k = weight.weight.shape
        quant = Quantization(bits, min(group or k, k), not zero_point)
        rows = _Rows(StackedRows(weight.weight), quant, function, zero_point)
        zero = StackedPart(rows, "zero_point", n, zero_point) if zero_point else None
        return Parts(quant, StackedPart(rows, "codes", n), StackedPart(rows, "scale", n, "float16"), zero)

    for op in experts_of(graph):
        if op.gate_up.name not in skip and op.down.name not in skip:
            attach_experts(graph, op, experts(op.gate_up), experts(op.down))
            count += 1
    graph.drop_dead()
    return count
