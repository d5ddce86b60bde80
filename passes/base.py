"""What a pass is: a frozen dataclass whose fields are its options, with one method `run`.

    @dataclass(frozen=True)
    class MyPass(Pass):
        '''before → after'''
        name = "my-pass"
        group: int = 64

        def run(self, graph, context):
            ...
            return PassResult(graph, changed=True, notes=["..."])

A pass changes the graph it is given (through `Graph`'s methods or the rewriter) or returns another one. The
manager verifies after it.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..ir.core import Graph
from ..ir.rewriter import Rule, apply_rules
from .calibration import TOKENS, Calibration
from .work import WorkFolder

Progress = Callable[[str, float], None]  # what is being done, share of it that is done (0 … 1)


def no_progress(what: str, share: float) -> None:
    """A listener for those who do not listen."""


@dataclass
class PassContext:
    """What passes share in one compilation.

    `calibration` and `work` (a folder that survives a `kill -9`, for `--resume`) are there where a pass
    declares `needs_calibration`; a caller that is no compilation may give no `work`. `max_ram` is the cap of
    the whole process tree, in bytes.
    """

    progress: Progress = no_progress
    context_length: int | None = None
    notes: list[str] = field(default_factory=list[str])
    """What the passes so far had to say."""
    calibration: Calibration | None = None
    work: WorkFolder | None = None
    max_ram: int | None = None
    bits: dict[str, int] = field(default_factory=dict[str, int])
    """Bits by the name of a linear layer's weight, where quantizers are to use others than their own
    (`mixed.py`)."""
    reference: Graph | None = None
    """The float graph that a quantized one is compared with (`quantize/quality.py`)."""
    quality: dict[str, Any] | None = None
    """What the comparison found: the content of quality.json."""
    later: list[Callable[[Progress], None]] | None = None
    """What changes nothing of the graph and may be done beside targets' work; None: nothing is put off."""


@dataclass
class PassResult:
    """`notes` are sentences for the user: what was refused and why, what was chosen."""

    graph: Graph
    changed: bool
    notes: list[str] = field(default_factory=list[str])


@dataclass(frozen=True)
class Pass(ABC):
    """Base of all passes.

    `requires` is the stage that a graph must have, `ensures` the stage it has afterwards (None: unchanged).
    `for_int8_activations`: whether a quantizer's pass is of use only where the targets round activations to 8
    bits, and left out for others. `needs_calibration`: whether `run` wants `context.calibration`;
    `calibration_tokens`: how many tokens of it it does well with, where the user does not say.
    `scales_channels`: whether layers may read other numbers afterwards than their modules do, so that no
    adapter suits them.
    """

    name: ClassVar[str] = ""
    requires: ClassVar[str | None] = None
    ensures: ClassVar[str | None] = None
    for_int8_activations: ClassVar[bool] = False
    needs_calibration: ClassVar[bool] = False
    scales_channels: ClassVar[bool] = False
    calibration_tokens: ClassVar[int] = TOKENS

    @abstractmethod
    def run(self, graph: Graph, context: PassContext) -> PassResult: ...

    def __str__(self) -> str:
        options = ",".join(f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self))
        return self.name + (f"{{{options}}}" if options else "")


@dataclass(frozen=True)
class RulePass(Pass):
    """A pass that applies rewrite rules until nothing changes."""

    rules: ClassVar[Sequence[Rule]] = ()

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        count, notes = apply_rules(graph, self.rules)
        return PassResult(graph, count > 0, notes)
