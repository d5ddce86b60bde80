"""The best of what is known at given bits: `best-int4-g32`.

    1. GPTQ through the quantized prefix, scales by error, refits and coordinate descent (`gptq.py`)
    2. scales and norms tuned on the whole model's KL to the source (`tune.py`), on sequences that the first
       step did not see: its own it knows by heart (their KL is half of that on other text)
    3. of the untuned, the half tuned and the tuned weights, the ones with the least KL on held text

Kernels, bits and artifact are the same as any other quantizer's of this grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...ir.core import Graph
from ..base import Pass, PassContext, PassResult
from ..registry import Quantizer
from ..work import WorkFolder
from .calibrated import Array, Walked, attach_walked, need_calibration, open_work
from .gptq_pass import QuantizeGptq
from .options import parse_scheme
from .tune import BATCH, Tuning, divergence, tune

if TYPE_CHECKING:
    import torch

SHARES = (0.0, 0.5, 1.0)
"""How much of the tuning is tried."""
TUNED_PART = 4  # one sequence in so many is kept for tuning,
MOST_TUNED = 16  # and no more: four times as many changed a small model's KL by less than 0.1 %
_WALK, _TUNE = 0.6, 0.95  # shares of the progress bar where these steps end


@dataclass(frozen=True)
class QuantizeBest(QuantizeGptq):
    """GPTQ, then scales and norms tuned against the float model, as far as held text confirms it.

    Options: `bits`; `group` along K, 0 for whole rows; `symmetric`; `sweeps` of scale refits and coordinate
    descent; `tune`: whether to tune.
    """

    name = "quantize-best"
    calibration_tokens = 64 * 512
    sweeps: int = 2
    tune: bool = True

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        calibration = need_calibration(context, self.name)
        tuned = self.tune and graph.facts.get("kind") == "causal_lm"
        first, rest = split_sequences(calibration.sequences, calibration.held if tuned else ())
        held = list(calibration.held) if tuned else []
        with ExitStack() as stack:
            work = open_work(context, stack)
            found = self.walk(graph, context, work, first, [*rest, *held], _WALK)
            if tuned and found.coded and rest and held:
                found.notes.append(_tune(graph, context, work, found, first, rest, held))
        attach_walked(graph, found)
        return PassResult(graph, bool(found.coded), found.notes)


def split_sequences(sequences: Sequence[Array], held: Sequence[Array]) -> tuple[list[Array], list[Array]]:
    """Sequences to quantize on, and those to tune on: every fourth, up to MOST_TUNED, a multiple of the
    batch; none of the latter where they would be fewer than a batch or nothing is held to judge them.
    """
    rest = list(sequences[TUNED_PART - 1 :: TUNED_PART])[:MOST_TUNED]
    rest = rest[: len(rest) // BATCH * BATCH] if held else []
    taken = {id(one) for one in rest}
    return [one for one in sequences if id(one) not in taken], rest


def _tune(
    graph: Graph,
    context: PassContext,
    work: WorkFolder,
    found: Walked,
    first: Sequence[Array],
    rest: Sequence[Array],
    held: Sequence[Array],
) -> str:
    """Tune, choose by held text, and say what came of it."""
    tuning = Tuning.start(graph, found, work.scratch("head"))
    if work.done("tuning"):
        tuning.restore(work.load("tuning"))

    def source(number: int) -> torch.Tensor:
        return found.exact.load(number, [tuning.head.x])[tuning.head.x][0]

    def after(loss: float) -> None:
        done = tuning.seen / len(rest)
        context.progress("tuning scales and norms", _WALK + (_TUNE - _WALK) * done)
        if tuning.seen % (2 * BATCH) == 0 or tuning.seen == len(rest):
            work.save("tuning", tuning.arrays())

    tune(tuning, rest, lambda i: source(len(first) + i), after=after)
    losses: list[float] = []
    for share in SHARES:
        context.progress("judging the tuning", _TUNE)
        tuning.share = share
        each = [divergence(tuning, ids, source(len(first) + len(rest) + i)) for i, ids in enumerate(held)]
        losses.append(sum(each) / len(each))
    tuning.share = SHARES[losses.index(min(losses))]
    tuning.finish()
    told = ", ".join(f"{share:.0%}: {loss:.4f}" for share, loss in zip(SHARES, losses, strict=True))
    return f"KL on held text by share of the tuning: {told}; taken: {tuning.share:.0%}"


class Best(Quantizer):
    """`best-int4-gN[-sym]`, other bits likewise; `int4` is `best-int4-g32`."""

    forms = ("int4", "best-int{2,3,4,5,6,8}-gN[-sym]")

    def passes(self, scheme: str) -> list[Pass] | None:
        found = parse_scheme("best-int4-g32" if scheme == "int4" else scheme, "best", "234568")
        if found is None:
            return None
        bits, group, symmetric = found
        return [QuantizeBest(bits=bits, group=group, symmetric=symmetric)]
