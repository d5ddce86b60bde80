"""The verdict as passes: what quantization cost, and whether that is too much.

    take-reference  →  the passes of a scheme  →  measure-quality

The first keeps the float graph (its weights stay where they are), the last compares (verdict.py) and raises
where a limit is passed, so that a compilation that lost too much leaves no artifact.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ...ir.core import Graph
from ...ir.errors import InputError, LlmcError
from ..base import Pass, PassContext, PassResult, Progress
from ..calibration import LENGTH, Calibration
from ..registry import quantization_passes
from .products import short_factors
from .verdict import LayerError, Measured, measure

CHEAP = (2, 256)
FULL = (8, LENGTH)
"""Held-out sequences that a scheme is judged on, and their tokens: fewer where the scheme itself takes only
seconds, and no limit asks for more (a KL of 0.358 ± 0.014 by the former, 0.341 by 4 of 512).
"""

_COARSE = 4  # bits of weights whose loss is far above that of short factors
_WORST = 3  # layers that a sentence names
_DIGITS = 6  # that are kept of a measured number: the last ones differ between machines
_HOW = (
    "quantized weights as they are shipped, activations and cache in float32; kl is D(source || quantized) "
    "in nats per predicted token; a layer's error is that of its output, relative to the float layer's, both "
    "given the float model's input, as a root mean square over tokens; _stderr: standard errors over "
    "predictions"
)
_ROUGHLY = "; products are made of factors of 16 bits on a processor that is the faster for it"


@dataclass(frozen=True)
class Limits:
    """Most that may be lost: KL in nats, increase of perplexity in percent. None: anything."""

    max_kl: float | None = None
    max_ppl_increase: float | None = None

    def __post_init__(self) -> None:
        for option, value in (("--max-kl", self.max_kl), ("--max-ppl-increase", self.max_ppl_increase)):
            if value is not None and not 0 <= value < math.inf:
                raise InputError(f"{option} {value}", remedy="give a number from 0")

    def __bool__(self) -> bool:
        return self.max_kl is not None or self.max_ppl_increase is not None


def parse_percent(text: str) -> float:
    """Percent of "5%" or "5". InputError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%?\s*", text)
    if found is None:
        raise InputError(f"--max-ppl-increase {text!r} is no percentage", remedy="write it as 5%")
    return float(found.group(1))


@dataclass(frozen=True)
class TakeReference(Pass):
    """Keeps a copy of the graph's structure; the weights' data is shared."""

    name = "take-reference"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        context.reference = graph.clone()
        return PassResult(graph, False)


@dataclass(frozen=True)
class MeasureQuality(Pass):
    """Compares the graph with the reference on the first `length` tokens of `sequences` held-out sequences,
    and leaves the result in the context as `quality`, the content of quality.json.

    Options: the scheme's name, for what a refusal recommends; `max_kl` and `max_ppl_increase` (percent),
    negative for no limit.
    """

    name = "measure-quality"
    scheme: str = ""
    sequences: int = FULL[0]
    length: int = FULL[1]
    max_kl: float = -1.0
    max_ppl_increase: float = -1.0

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        why = _unmeasurable(graph, context)
        if why is not None:
            if self.max_kl >= 0 or self.max_ppl_increase >= 0:
                raise InputError(f"the loss cannot be measured: {why}", remedy=_WITHOUT_LIMITS)
            context.quality = {**_empty(), "reason": why}
            return PassResult(graph, False, [f"quality was not measured: {why}"])
        work = self._measuring(graph, context)
        if context.later is None:
            work(partial(_last_part, context.progress))
        else:
            context.later.append(work)
        return PassResult(graph, False)

    def _measuring(self, graph: Graph, context: PassContext) -> Callable[[Progress], None]:
        """The work, on a copy of the graph, which other passes change after this one."""
        assert context.reference is not None
        assert context.calibration is not None
        reference, context.reference = context.reference, None
        graphs = (reference, graph if context.later is None else graph.clone())
        return partial(self._measure, *graphs, context, context.calibration)

    def _measure(
        self,
        reference: Graph,
        graph: Graph,
        context: PassContext,
        calibration: Calibration,
        progress: Progress,
    ) -> None:
        length = min(self.length, context.context_length or self.length)
        held = [ids[:length] for ids in calibration.held[: self.sequences]]
        rough = self._is_rough(graph)
        with (
            tempfile.TemporaryDirectory(prefix="llmc-quality-") as folder,
            short_factors() if rough else nullcontext(),
        ):
            found = measure(reference, graph, held, Path(folder), progress)
        text = {"name": calibration.name, "sha256": calibration.sha256}
        context.quality = report(found, {**text, "sequences": len(held), "length": len(held[0])})
        if rough:
            context.quality["how"] += _ROUGHLY
        self._judge(found)

    def _is_rough(self, graph: Graph) -> bool:
        """Whether short factors change less than the choice of text does: weights of 4 bits (a KL of
        0.346 ± 0.010 by 0.0007, benchmarks/README.md), and no limit to be kept.
        """
        grids = [v.type.quant for v in graph.weights.values()]
        coarse = any(grid is not None and grid.bits <= _COARSE for grid in grids)
        return coarse and (self.sequences, self.length) == CHEAP

    def _judge(self, found: Measured) -> None:
        """Raise LlmcError where a limit is passed. Numbers that are no numbers pass every limit."""
        lost: list[str] = []
        if self.max_kl >= 0 and not found.kl <= self.max_kl:
            lost.append(f"KL {found.kl:.4g} nats, --max-kl allows {self.max_kl:g}")
        increase = percent(found.ppl, found.ppl_source)
        if self.max_ppl_increase >= 0 and not increase <= self.max_ppl_increase:
            lost.append(
                f"perplexity {increase:+.1f} % ({found.ppl_source:.2f} → {found.ppl:.2f}), "
                f"--max-ppl-increase allows {self.max_ppl_increase:g} %"
            )
        if not lost:
            return
        if not found.tokens:
            raise InputError("the model predicts no tokens: it has no KL to limit", remedy=_WITHOUT_LIMITS)
        named = ", ".join(f"{one.name} ({one.error:.1%})" for one in worst(found.layers, _WORST))
        raise LlmcError(
            f"--quant {self.scheme} lost too much: {'; '.join(lost)}"
            + (f"; the largest errors are those of {named}" if named else ""),
            remedy=advice(self.scheme, found.layers),
        )


def _last_part(progress: Progress, what: str, share: float) -> None:
    """It runs last, after passes that reported shares of all the work themselves."""
    progress(what, 0.9 + 0.1 * share)


_WITHOUT_LIMITS = "leave --max-kl and --max-ppl-increase away"


def _unmeasurable(graph: Graph, context: PassContext) -> str | None:
    """Why there can be no verdict; None where there can."""
    if graph.facts.get("kind") == "function":
        return "a function takes no text"
    if context.reference is None:
        return "the float graph was not kept"
    if len(graph.inputs) != 1:
        return f"the graph has {len(graph.inputs)} inputs, of which text is one"
    if context.calibration is None or not context.calibration.held:
        return "there is no held-out text"
    return None


# Reports -------------------------------------------------------------------------------------------------


def _empty() -> dict[str, Any]:
    keys = ("ppl", "ppl_source", "ppl_increase_percent", "ppl_increase_percent_stderr", "kl", "kl_stderr")
    return {
        "text": None,
        "tokens": 0,
        **dict.fromkeys((*keys, "top1_agreement", "output_error")),
        "layers": [],
    }


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.{_DIGITS}g}")


def percent(value: float, reference: float) -> float:
    """How much larger a value is, in percent."""
    return 100 * (value / reference - 1)


def report(found: Measured, text: Mapping[str, Any]) -> dict[str, Any]:
    """The content of quality.json; `text` says what it was measured on. What the model has not, or what is no
    finite number, is null.
    """
    result: dict[str, Any] = {
        **_empty(),
        "text": dict(text),
        "tokens": found.tokens,
        "ppl": _number(found.ppl),
        "ppl_source": _number(found.ppl_source),
        "ppl_increase_percent": _number(percent(found.ppl, found.ppl_source)),
        "ppl_increase_percent_stderr": _number(found.increase_stderr),
        "kl": _number(found.kl),
        "kl_stderr": _number(found.kl_stderr),
        "top1_agreement": _number(found.agreement),
        "output_error": _number(found.output_error),
        "layers": [{"name": one.name, "error": _number(one.error)} for one in found.layers],
        "how": _HOW,
    }
    if not found.tokens:
        result["reason"] = "the model gives hidden states and no logits: only their error was measured"
    return result


def worst(layers: Sequence[LayerError], count: int) -> list[LayerError]:
    """The layers of the largest errors, largest first."""
    known = [one for one in layers if one.error is not None and math.isfinite(one.error)]
    return sorted(known, key=lambda one: -(one.error or 0.0))[:count]


def advice(scheme: str, layers: Sequence[LayerError]) -> str:
    """What would lose less than `scheme`, among what this installation has."""
    named = [one for one in _better(scheme) if _exists(one)]
    parts = [f"--quant {one}" for one in named[:2]]
    errors = sorted(one.error for one in layers if one.error is not None)
    if errors and errors[-1] > 2 * errors[len(errors) // 2] and "int4" in scheme:
        worst_name = worst(layers, 1)[0].name
        head = worst_name in ("head", "embedding")
        parts.append("--quant-head int8" if head else f"--bits-per-weight for more bits in {worst_name}")
    return f"try {' or '.join(parts)}" if parts else "use --quant none, or allow more"


def _better(scheme: str) -> list[str]:
    """Schemes that lose less than one, the nearest first."""
    found = re.fullmatch(r"(?:(\w+)-)?int(\d)(?:-g(\d+))?(-sym)?", scheme)
    if found is None:
        ladder = ["gguf-q4_0", "gguf-q4_k_m", "gguf-q5_k_m", "gguf-q6_k", "gguf-q8_0"]
        return ladder[ladder.index(scheme) + 1 :] if scheme in ladder else ["best-int4-g32", "int8"]
    method, bits, group = found.group(1), int(found.group(2)), int(found.group(3) or 32)
    if bits >= 8:
        return ["none"]
    if bits < 4:
        return [f"gptq-int4-g{group}", "best-int4-g32"]
    better = [] if method == "best" else [f"best-int4-g{group}{found.group(4) or ''}"]
    if found.group(4):
        better.append(f"best-int4-g{group}")
    if group > 32:
        better.append("best-int4-g32")
    return [*better, "int8"]


def _exists(scheme: str) -> bool:
    try:
        quantization_passes(scheme)
    except InputError:
        return False
    return True
