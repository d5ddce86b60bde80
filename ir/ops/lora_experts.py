"""Low-rank changes of experts, each token its own: mixtures of experts with the factors of `lora`.

A part (`lora.py`) is a matrix of one expert: of gate_up those are expert 0's gate, its up, expert 1's gate, …
(without a gate, expert 0's matrix, expert 1's, …), of down one an expert. A token's chosen experts read the
factors of its adapter, each its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..core import Op, Value
from ..define import Operand, op
from ..errors import CompileError, VerifyError
from ..types import TensorType
from .lora import FACTOR_DTYPES, LANES, low_rank
from .moe import Change, Moe, QuantizedMoe

Dims = Mapping[str, int]
_DUE: Any = None
"""Operands that stand behind attributes with defaults must seem to have one; `Op` asks for them."""


class _Adapted(Op):
    """What both kinds of mixtures take beside their own operands, which stand first (the order of bases)."""

    adapter: Operand = _DUE
    lora_up_rank: Operand = _DUE
    lora_up_scale: Operand = _DUE
    lora_up_a: Operand = _DUE
    lora_up_b: Operand = _DUE
    lora_down_rank: Operand = _DUE
    lora_down_scale: Operand = _DUE
    lora_down_a: Operand = _DUE
    lora_down_b: Operand = _DUE

    def infer(self: Any) -> list[TensorType]:
        found = super().infer()
        _check(self)
        return found

    def verify(self: Any) -> None:
        super().verify()
        _verify(self)

    def reference(self: Any, dims: Dims, *args: Any) -> Any:
        return self.mixed(args[:-9], _changes(self, args[-9:]))


@op("lora_moe")
class LoraMoe(_Adapted, Moe):
    """`moe` whose experts are changed by each token's adapter: products x · gate_upᵀ and held · downᵀ gain
    B[s, e] (scale[s, e] · A[s, e] x) of slot s = adapter[t], and nothing where that is negative.

    x [T, D]; adapter int32 [T]; lora_up_rank int32 [A, P], lora_up_scale, lora_up_a, lora_up_b of the parts
    of gate_up, lora_down_… of those of down, as `lora` has them.
    """


@op("quantized_lora_moe")
class QuantizedLoraMoe(_Adapted, QuantizedMoe):
    """`lora_moe` by quantized experts."""


def factor_shapes(
    op: Moe | QuantizedMoe, slots: Any, blocks: Any
) -> dict[str, tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]]:
    """Shapes of rank, scale, a and b, of "up" and of "down"."""
    up, down = op.stacks
    found: dict[str, Any] = {}
    for name, stack, parts in (("up", up, op.gate.products), ("down", down, 1)):
        experts, rows, k = (d for d in stack.shape if isinstance(d, int))
        count, columns = experts * parts, experts * parts * -(-(rows // parts) // LANES)
        found[name] = (
            (slots, count),
            (slots, count, blocks, LANES),
            (slots, count, blocks, k, LANES),
            (slots, columns, blocks * LANES, LANES),
        )
    return found


def _check(op: LoraMoe | QuantizedLoraMoe) -> None:
    shapes = factor_shapes(op, op.lora_up_rank.shape[0], op.lora_up_a.shape[2])
    given = {
        "up": (op.lora_up_rank, op.lora_up_scale, op.lora_up_a, op.lora_up_b),
        "down": (op.lora_down_rank, op.lora_down_scale, op.lora_down_a, op.lora_down_b),
    }
    fits = op.x.type.rank == 2 and op.adapter.shape == op.x.shape[:1]
    if not fits or any(tuple(v.shape for v in given[name]) != shapes[name] for name in shapes):
        raise CompileError(
            f"{op.opname}: {op.x.type}, adapter {op.adapter.type}, factors {op.lora_up_a.type}, "
            f"{op.lora_down_a.type} ({op.loc})",
            remedy="a part is a matrix of one expert",
        )


def _verify(op: LoraMoe | QuantizedLoraMoe) -> None:
    if isinstance(op, Moe) and (op.transposed or op.interleaved):
        raise VerifyError(f"{op.opname}: experts as they were traced", remedy="run normalize-experts before")
    for a, b in ((op.lora_up_a, op.lora_up_b), (op.lora_down_a, op.lora_down_b)):
        if a.dtype not in FACTOR_DTYPES or a.dtype != b.dtype:
            raise VerifyError(
                f"{op.opname}: factors are {a.dtype} and {b.dtype}", remedy="both float32 or both int8"
            )


def _changes(op: LoraMoe | QuantizedLoraMoe, args: Sequence[Any]) -> tuple[Change, Change]:
    import torch

    adapter, *factors = args

    def change(stack: Value, parts: int, factors: Sequence[Any]) -> Change:
        rank, scale, a, b = factors
        total = stack.shape[1]
        assert isinstance(total, int)
        rows = total // parts
        blocks = -(-rows // LANES)

        def added(expert: int, tokens: Any, x: Any) -> Any:
            out = torch.zeros(len(x), total)
            for slot in adapter[tokens].unique().tolist():
                if slot < 0:
                    continue
                of_slot = adapter[tokens] == slot
                for i in range(parts):
                    part = expert * parts + i
                    own = b[slot, part * blocks : (part + 1) * blocks]
                    columns = slice(i * rows, (i + 1) * rows)
                    out[of_slot, columns] = low_rank(
                        x[of_slot], rows, rank[slot, part], scale[slot, part], a[slot, part], own
                    )
            return out

        return added

    up, down = op.stacks
    return change(up, op.gate.products, factors[:4]), change(down, 1, factors[4:])


__all__ = ["LoraMoe", "QuantizedLoraMoe", "factor_shapes"]
