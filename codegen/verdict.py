"""What a compilation is asked to measure, and the text that it measures on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..ir.errors import InputError
from ..passes.base import Pass, PassContext
from ..passes.quantize.quality import (
    CHEAP,
    FULL,
    Limits,
    MeasureQuality,
    TakeReference,
    parse_percent,
)
from .calibrate import TextSource, prepare_calibration

LOSSLESS = frozenset({"keep-quantized", "encode-gguf"})
"""Passes that store a weight in another way and change no value."""


@dataclass(frozen=True)
class VerdictOptions:
    """`measure` False: no quality.json. Limits as in `Limits`: more is refused, and so is what cannot be
    measured.
    """

    measure: bool = True
    max_kl: float | None = None
    max_ppl_increase: float | None = None

    def __post_init__(self) -> None:
        if self.limits and not self.measure:
            raise InputError(
                "--no-verdict with --max-kl or --max-ppl-increase: nothing would be measured",
                remedy="leave one of them away",
            )

    @staticmethod
    def parse(*, verdict: bool, max_kl: float | None, max_ppl_increase: str | float | None) -> VerdictOptions:
        """From what a user writes: "5%" and 5 both are five percent. Raises InputError."""
        increase = parse_percent(max_ppl_increase) if isinstance(max_ppl_increase, str) else max_ppl_increase
        return VerdictOptions(verdict, max_kl, increase)

    @property
    def limits(self) -> Limits:
        """Most that may be lost."""
        return Limits(self.max_kl, self.max_ppl_increase)

    def command(self) -> list[str]:
        """The options as words of the command line."""
        words = [] if self.measure else ["--no-verdict"]
        words += [] if self.max_kl is None else ["--max-kl", f"{self.max_kl:g}"]
        return words + (
            [] if self.max_ppl_increase is None else ["--max-ppl-increase", f"{self.max_ppl_increase:g}%"]
        )


def with_verdict(scheme: str, passes: Sequence[Pass], options: VerdictOptions) -> list[Pass]:
    """The passes of a scheme with the measurement around them, where they lose anything."""
    if not options.measure or all(p.name in LOSSLESS for p in passes):
        return list(passes)
    thorough = options.limits or any(p.needs_calibration for p in passes)
    limits = (options.max_kl, options.max_ppl_increase)
    verdict = MeasureQuality(
        scheme, *(FULL if thorough else CHEAP), *(-1.0 if v is None else v for v in limits)
    )
    return [TakeReference(), *passes, verdict]


def without_verdict(passes: Sequence[Pass]) -> list[Pass]:
    """The passes of a scheme alone."""
    return [p for p in passes if not isinstance(p, TakeReference | MeasureQuality)]


def is_measured(passes: Sequence[Pass]) -> bool:
    """Whether a verdict is among the passes."""
    return any(isinstance(p, MeasureQuality) for p in passes)


def prepare_held(context: PassContext, text: TextSource) -> None:
    """Give a compilation that needs no calibration the text to be judged on, or a note why there is none."""
    if text.tokenizer is None:
        return
    try:
        found, _ = prepare_calibration(text, context.context_length)
    except InputError as error:
        if text.options.calib is not None:
            raise
        context.notes.append(f"no held-out text: {error.message}")
        return
    context.calibration = found
