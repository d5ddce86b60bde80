"""What one compilation was asked for: its plan, its words for the manifest, and its key for --resume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..frontend.rope import RopeScaling
from ..frontend.source import ModelSource
from ..ir.dtypes import FLOAT8
from ..ir.errors import InputError
from ..passes.base import Pass
from ..passes.cache.positions import CheckPositions
from ..passes.quantize.rotate import RotateLinears
from ..passes.quantize.scheme import weight_passes
from ..passes.registry import make_pass
from .adapters import LoraOption, adapter_passes
from .calibrate import CalibrationOptions
from .target import Target, get_target
from .verdict import VerdictOptions, is_measured, with_verdict

DEFAULT_CALIBRATION = CalibrationOptions()
DEFAULT_VERDICT = VerdictOptions()
NO_VERDICT = VerdictOptions(measure=False)
KV_DTYPES = ("float32", "bfloat16", "float16", "int8", FLOAT8)


@dataclass(frozen=True)
class Plan:
    """The options of one compilation, checked before the model is opened."""

    targets: tuple[Target, ...]
    scheme: str
    quantize: tuple[Pass, ...]
    extra: tuple[Pass, ...]
    kv_dtype: str
    adapt: tuple[Pass, ...] = ()

    @property
    def calibrated(self) -> bool:
        """Whether a pass needs calibration."""
        return any(p.needs_calibration for p in (*self.quantize, *self.extra))

    @property
    def measured(self) -> bool:
        """Whether a verdict is among the passes."""
        return is_measured(self.quantize)

    @property
    def calibration_tokens(self) -> int:
        """How many the passes do well with."""
        return max(p.calibration_tokens for p in (*self.quantize, *self.extra) if p.needs_calibration)

    @staticmethod
    def make(
        targets: Sequence[str],
        quant: str,
        kv_dtype: str | None,
        passes: Sequence[str],
        quant_head: str | None = None,
        bits_per_weight: float | None = None,
        verdict: VerdictOptions = NO_VERDICT,
        lora: Sequence[LoraOption] = (),
    ) -> Plan:
        if not targets:
            raise InputError("no target was given", remedy="pass --target tvm-cpu")
        chosen = tuple(get_target(t) for t in targets)
        names = [t.name for t in chosen]
        if len(set(names)) != len(names):
            raise InputError(
                f"target {max(names, key=names.count)} was given twice",
                remedy="join its options in one --target",
            )
        if kv_dtype not in (None, *KV_DTYPES):
            raise InputError(
                f"kv_dtype {kv_dtype!r} is no element type of the cache",
                remedy=f"one of {', '.join(KV_DTYPES)}",
            )
        # A model in float32 keeps its cache in float32; a quantized one has given up more than 16 bits round
        # away.
        natural = {target.kv_dtype for target in chosen}
        quantized = natural.pop() if len(natural) == 1 else "float16"
        cache = kv_dtype or ("float32" if quant == "none" else quantized)
        for target in chosen:
            if target.kv_dtypes and cache not in target.kv_dtypes:
                raise InputError(
                    f"target {target.name} keeps no cache of {cache}",
                    remedy=f"pass --kv-dtype {' or '.join(target.kv_dtypes)}, or another --target",
                )
        weights = weight_passes(quant, quant_head, bits_per_weight)
        if not all(target.int8_activations for target in chosen):
            weights = [p for p in weights if not p.for_int8_activations]
        quantize = tuple(with_verdict(quant, weights, verdict))
        extra = tuple(make_pass(p) for p in passes)
        if quant == "keep" and any(isinstance(p, RotateLinears) for p in extra):
            raise InputError(
                "--quant keep keeps the codes that the checkpoint has, which rotate-linears would change",
                remedy="leave the pass out, or choose another --quant",
            )
        _check_adapters(chosen, (*quantize, *extra), quant)
        return Plan(chosen, quant, quantize, extra, cache, adapter_passes(lora))


def _check_adapters(targets: Sequence[Target], passes: Sequence[Pass], quant: str) -> None:
    """Raise InputError where kernels are to have places for adapters, and layers will read other numbers than
    their modules do.
    """
    scaling = next((p for p in passes if p.scales_channels), None)
    if scaling is not None and any(getattr(target, "adapters", False) for target in targets):
        raise InputError(
            f"--adapters: {scaling.name} (--quant {quant}) scales what layers read, and adapters know of no "
            "scales",
            remedy="merge the adapter with --lora, or choose another scheme, such as gptq-int4-g32",
        )


def with_scaling(plan: Plan, scaling: RopeScaling | None) -> Plan:
    """The plan, with what must be checked for rotary embeddings that are not scaled for all sequences."""
    if scaling is None or not scaling.needed:
        return plan
    return replace(plan, extra=(CheckPositions(), *plan.extra))


@dataclass(frozen=True)
class Request:
    """The options as they were given; `lora` read from its words."""

    targets: tuple[str, ...]
    quant: str
    quant_head: str | None
    bits_per_weight: float | None
    context: int | None
    kv_dtype: str | None
    passes: tuple[str, ...]
    lora: tuple[LoraOption, ...]
    calibration: CalibrationOptions
    verdict: VerdictOptions
    rope_scaling: RopeScaling | None = None

    def plan(self) -> Plan:
        """Raises InputError for an option that is wrong."""
        plan = Plan.make(
            self.targets,
            self.quant,
            self.kv_dtype,
            self.passes,
            self.quant_head,
            self.bits_per_weight,
            self.verdict,
            self.lora,
        )
        return with_scaling(plan, self.rope_scaling)

    def key(self, length: int | None) -> dict[str, Any]:
        """What interrupted work depends on besides model and text; `length` is the longest sequence."""
        return {
            "scheme": self.quant,
            "head": self.quant_head,
            "bits": self.bits_per_weight,
            "passes": list(self.passes),
            "rotated": any(p.for_int8_activations for p in self.plan().quantize),
            "context": length,
            "lora": [one.key() for one in self.lora],
            "rope_scaling": None if self.rope_scaling is None else self.rope_scaling.key(),
        }

    def command(self, source: ModelSource, *, calibrated: bool) -> list[str]:
        """The command without output path and folders, so that the same inputs give the same bytes."""
        # A hub id says more than its snapshot's folder.
        local = source.path is not None and source.name.count("/") == 0
        model = source.path.name if local and source.path is not None else source.name
        command = ["llmc", "compile", model]
        for target in self.targets:
            command += ["--target", target]
        command += ["--quant", self.quant]
        for flag, value in (
            ("--quant-head", self.quant_head),
            ("--bits-per-weight", self.bits_per_weight),
            ("--context", self.context),
            ("--rope-scaling", None if self.rope_scaling is None else self.rope_scaling.command()),
            ("--kv-dtype", self.kv_dtype),
        ):
            command += [flag, str(value)] if value is not None else []
        for one in self.passes:
            command += ["--pass", one]
        for adapter in self.lora:
            command += adapter.command()
        return [
            *command,
            *(self.calibration.command() if calibrated else []),
            *self.verdict.command(),
        ]
