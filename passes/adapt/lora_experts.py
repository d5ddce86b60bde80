"""Places for adapters in mixtures of experts: what a token's adapter adds to the products of those that the
token has chosen.

    moe(%x, %i, %w, @up, @down)  →  lora_moe(%x, %i, %w, @up, @down, %adapter, %lora_rank.0, …)

Two places each, of gates and ups and of downs, whose parts are the matrices of each expert. They have slots
of their own (the input `expert_adapter` says which is each token's): hundreds of parts take room that
adapters of other layers need not have. Stacks that are put together of several parameters have no places:
adapters call those by other names. Nor have mixtures that the target has no kernels for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...ir.codebooks import codebook
from ...ir.core import Graph, Op, Value
from ...ir.ops.lora_experts import LoraMoe, QuantizedLoraMoe, factor_shapes
from ...ir.ops.moe import Moe, QuantizedMoe
from ...ir.types import TensorType, sym

SLOTS, BLOCKS = sym("AE"), sym("LE")
_CODES = ".q"


def factor_dtype(codes: Value) -> str:
    """Of factors beside quantized weights: where codes are whole numbers targets multiply them by activations
    of 8 bits, and factors of 8 bits lose no more than these.
    """
    quant = codes.type.quant
    if quant is None:
        return "float32"
    whole = quant.codebook is None or bool((codebook(quant.codebook) % 1 == 0).all())
    return "int8" if whole else "float32"


def place_experts(
    graph: Graph, mixtures: Sequence[Moe | QuantizedMoe], adapter_of: Callable[[Op], Value], number: int
) -> list[dict[str, Any]]:
    """Make mixtures take adapters, `adapter_of` each of their tokens; inputs are counted from `number` on.
    What stands where, as `lora_places.py` has it.
    """
    places: list[dict[str, Any]] = []
    for op in mixtures:
        up, down = (_parameter(graph, stack) for stack in op.stacks)
        assert up is not None and down is not None
        factors = _factors(graph, op, number + len(places))
        kind: Any = QuantizedLoraMoe if isinstance(op, QuantizedMoe) else LoraMoe
        fields = {f.name: getattr(op, f.name) for f in op.operand_fields} | op.attributes()
        new = kind(**fields, adapter=adapter_of(op), **factors)
        new.loc = op.loc
        graph.insert(new, before=op)
        graph.replace(op, [new.result])
        name, gated = str(up["of"]), op.gate.gated
        stacks = new.stacks
        rows = _size(stacks[0].shape[1]) // op.gate.products
        parts = [[f"{name}.gate", rows], [f"{name}.up", rows]] if gated else [[name, rows]]
        places.append(_entry(stacks[0], parts, up))
        places.append(_entry(stacks[1], [[str(down["of"]), _size(stacks[1].shape[1])]], down))
    return places


def mixtures_of(graph: Graph) -> list[Moe | QuantizedMoe]:
    """Those of a final graph that adapters can change, in order."""
    found = [op for op in graph if isinstance(op, Moe | QuantizedMoe) and _takes(graph, op)]
    users: dict[str, set[str]] = {}
    for op in found:
        for stack in op.stacks:
            users.setdefault(stack.name, set()).add(op.loc)
    return [op for op in found if all(len(users[stack.name]) == 1 for stack in op.stacks)]


def _takes(graph: Graph, op: Moe | QuantizedMoe) -> bool:
    if op.x.type.rank != 2 or op.x.dtype != "float32" or op.result.dtype != "float32":
        return False
    return all(stack.is_weight and _parameter(graph, stack) is not None for stack in op.stacks)


def _parameter(graph: Graph, stack: Value) -> dict[str, Any] | None:
    """The parameter that a stack is, as `normalize-experts` says it; None where it is none."""
    name = stack.name.removesuffix(_CODES)
    known = graph.facts.get("experts", {}).get(name)
    if known is not None:
        return known
    made = name.endswith(".rows") or "+" in name or "." not in name
    return None if made else {"of": name, "interleaved": False, "unsaid": False}


def _factors(graph: Graph, op: Moe | QuantizedMoe, number: int) -> dict[str, Value]:
    found: dict[str, Value] = {}
    shapes = factor_shapes(op, SLOTS, BLOCKS)
    for i, (which, stack) in enumerate(zip(("up", "down"), op.stacks, strict=True)):
        dtype = factor_dtype(stack)
        dtypes = {"rank": "int32", "scale": "float32", "a": dtype, "b": dtype}
        for (kind, of_kind), shape in zip(dtypes.items(), shapes[which], strict=True):
            added = graph.add_input(f"lora_{kind}.{number + i}", TensorType(of_kind, shape))
            found[f"lora_{which}_{kind}"] = added
    return found


def _entry(stack: Value, parts: list[list[Any]], parameter: dict[str, Any]) -> dict[str, Any]:
    experts, _, k = (_size(d) for d in stack.shape)
    return {"k": k, "parts": parts, "dtype": factor_dtype(stack), "experts": experts, **parameter}


def _size(d: Any) -> int:
    assert isinstance(d, int)
    return d


__all__ = ["factor_dtype", "mixtures_of", "place_experts"]
