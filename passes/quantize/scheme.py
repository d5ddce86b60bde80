"""From `--quant`, `--quant-head` and `--bits-per-weight` to passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from ...ir.errors import InputError
from ..base import Pass
from ..registry import default_head, quantization_passes
from .heads import QuantizeHead, head_passes
from .keep import KeepQuantized
from .rotate import RotateLinears
from .sensitivity import ChooseBits, SupposeBits
from .walk import QuantizeRtn


def weight_passes(scheme: str, head: str | None = None, bits_per_weight: float | None = None) -> list[Pass]:
    """The passes that quantize weights.

    Args:
        head: the scheme of embeddings and output head; that of the quantizer where None.
        bits_per_weight: the size of all weights together, in bits a weight; layers then differ in their bits.

    Raises:
        InputError: a scheme is unknown, or has no bits to choose.
    """
    linear = quantization_passes(scheme)
    if bits_per_weight is not None:  # layers may get fewer bits than the 8 that rotation is for
        linear = [p for p in linear if not p.for_int8_activations]
    default = default_head(scheme)
    if head is not None and default is None:
        raise InputError(
            f"--quant-head {head}: the scheme {scheme} itself says how embeddings and head are stored",
            remedy="leave it out, or choose another --quant",
        )
    heads = head_passes(default if head is None else head)
    if any(isinstance(p, QuantizeHead) and p.as_rotated for p in heads):
        linear = [replace(p, head=True) if isinstance(p, RotateLinears) and not p.size else p for p in linear]
    linear = [replace(p, head=True) if isinstance(p, KeepQuantized) and heads else p for p in linear]
    if bits_per_weight is None:
        return [*linear, *heads]
    return [_chooser(scheme, linear, heads, head is None, bits_per_weight), *linear, *heads]


def without_calibration(passes: Sequence[Pass]) -> list[Pass]:
    """Passes that leave weights of the same shapes but read none of them, to predict sizes."""
    found: list[Pass] = []
    for one in passes:
        options = {f.name: getattr(one, f.name) for f in fields(one)}
        if isinstance(one, ChooseBits):
            found.append(SupposeBits(**options))
        elif one.needs_calibration and one.ensures != "quantized":
            continue  # it changes values, not shapes
        elif one.needs_calibration and _has_grid(one):
            found.append(QuantizeRtn(options["bits"], options["group"], options["symmetric"]))
        else:
            found.append(one)
    return found


def _has_grid(one: Pass) -> bool:
    return {"bits", "group", "symmetric"} <= {f.name for f in fields(one)}


def _chooser(
    scheme: str, linear: list[Pass], heads: list[Pass], free_head: bool, bits_per_weight: float
) -> ChooseBits:
    """The pass that gives each layer its bits, for the grids of these quantizers."""
    if not 1 <= bits_per_weight <= 9:
        raise InputError(f"--bits-per-weight {bits_per_weight:g}", remedy="ask for a number from 2 to 9")
    options: list[Any] = [p for p in linear if _has_grid(p)]
    if not options:
        raise InputError(
            f"--bits-per-weight goes with no scheme of fixed grids, such as {scheme}",
            remedy="use --quant int4-gN, gptq-int4-gN, awq-int4-gN or best-int4-gN",
        )
    one = options[-1]
    chosen = next((p for p in heads if isinstance(p, QuantizeHead)), None)
    return ChooseBits(
        target=bits_per_weight,
        group=one.group,
        symmetric=one.symmetric,
        head=free_head and chosen is not None,
        head_bits=0 if chosen is None else chosen.bits,
        head_group=64 if chosen is None else chosen.group,
        head_symmetric=chosen is None or chosen.symmetric,
    )
