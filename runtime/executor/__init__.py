"""Executors: what runs a compiled model.

`open_executor` picks the target and the kernels that suit this machine. Other packages add executors for
their targets by entry points: `llmc.executors`, name of the target → a module with `open_target`, or that
function.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from ...codegen.artifact import Artifact
from ...ir.errors import ArtifactError, InputError, LlmcError
from ...plugins.entries import registered
from .. import cpu
from .base import Executor, Kernels, StepInputs

__all__ = ["Executor", "StepInputs", "choose_isa", "choose_target", "open_executor"]

GROUP = "llmc.executors"

MakePlaces = Callable[[Artifact, str], AbstractContextManager[Kernels]]
"""(artifact, ISA level) → kernels over its weights that take adapters, there inside of the `with` block."""

_log = logging.getLogger("llmc.runtime")

# Target → module of this package, in the order of preference where an artifact holds several.
_MODULES = {
    "tvm-cuda": "cuda",
    "tvm-webgpu": "webgpu",
    "tvm-cpu": "tvm",
    "onnx-cpu": "onnx",
    "onnx-cuda": "onnx_cuda",
    "null": "null",
}

OURS = frozenset(_MODULES)
"""Targets that llmc itself runs."""

_MOST_THREADS = 1024  # kernels gain nothing beyond the cores, and a process may not have any number


def choose_target(available: Sequence[str], wanted: str | None = None) -> str:
    """The target to run: `wanted`, or the first of our order of preference that the artifact has, then those
    that other packages run, by name.

    Raises ArtifactError where the artifact lacks it and InputError where nothing that is installed runs it.
    """
    if wanted is not None and wanted not in available:
        raise ArtifactError(
            f"the artifact was not compiled for target {wanted!r}, only for {', '.join(available)}",
            remedy=f"compile it with --target {wanted}, or leave the target out",
        )
    ours = [name for name in _MODULES if name == wanted or (wanted is None and name in available)]
    for name in ours:
        if len(ours) == 1 or _usable(name):  # the only one is opened whatever it lacks, and says what
            return name
    others = registered(GROUP)  # asked last: looking for packages takes longer than opening a small model
    for name in [wanted] if wanted is not None else sorted(available):
        if name in others:
            return name
    raise InputError(
        f"no executor for any of the targets {', '.join(available)}",
        remedy=f"compile for one of {', '.join(_MODULES)}, or install the package that brings the target",
    )


def _usable(name: str) -> bool:
    """Whether this machine has what a target runs on, where another could be taken instead."""
    if name == "tvm-cuda":
        from .cuda_driver import why_absent
    elif name == "tvm-webgpu":
        from .webgpu_driver import why_absent
    else:
        return True
    why = why_absent()
    if why is not None:
        _log.info("target %s is left out: %s", name, why)
    return why is None


def choose_isa(kernels: Sequence[dict[str, Any]], wanted: str | None = None) -> str | None:
    """The best ISA level among a target's kernels that this CPU runs; None where the target has no kernels.

    `wanted` forces a level (to compare levels on one machine). Raises ArtifactError where none runs here.
    """
    if not kernels:
        return None
    present = [str(kernel["isa"]) for kernel in kernels]
    here = cpu.supported_isas()
    runnable = [level for level in cpu.ISA_LEVELS if level in present and level in here]
    if wanted is not None:
        runnable = [level for level in runnable if level == wanted]
    if not runnable:
        asked = f" (asked for {wanted})" if wanted is not None else ""
        runs = ", ".join(here) or "none"
        remedy = f"--target tvm-cpu:isa={here[-1]}" if here else "--target onnx-cpu"
        raise ArtifactError(
            f"the artifact has kernels for {', '.join(present)}, this CPU runs {runs}{asked}",
            remedy=f"compile it with {remedy}",
        )
    return runnable[-1]


def _name_better(artifact: Artifact, target: str, level: str) -> None:
    """Say where this processor runs better kernels than the best that an artifact has for it."""
    best = cpu.best_isa()
    if best is None or best == level:
        return
    levels = "+".join([*(str(kernel["isa"]) for kernel in artifact.target(target)["kernels"]), best])
    _log.warning(
        "%s has no kernels for %s, the best that this processor runs; compile with --target %s:isa=%s",
        artifact.root,
        best,
        target,
        levels,
    )


def open_executor(
    artifact: Artifact,
    target: str | None = None,
    *,
    threads: int | None = None,
    isa: str | None = None,
    adapters: MakePlaces | None = None,
) -> Executor:
    """Open a target of the artifact for this machine.

    `target`: name, or None for the best one present. `threads`: None for one a physical core. `isa`: None for
    the best that this CPU runs. `adapters`: makes kernels with places for adapters where the artifact's own
    have none. Raises ArtifactError or InputError where nothing of the artifact runs here.
    """
    if threads is not None and not 1 <= threads <= _MOST_THREADS:
        raise InputError(f"threads is {threads}", remedy=f"allowed: 1 to {_MOST_THREADS}")
    name = choose_target(artifact.targets, target)
    level = choose_isa(artifact.target(name).get("kernels", []), isa)
    _log.info("target %s, kernels %s", name, level or "of the target")
    if level is not None and isa is None:
        _name_better(artifact, name, level)
    if name not in _MODULES:
        from .plugin import open_plugin

        return open_plugin(registered(GROUP)[name], artifact, isa=level, threads=threads)
    module = importlib.import_module(f".{_MODULES[name]}", __name__)
    if name == "tvm-webgpu" and target is None and len(artifact.targets) > 1:
        try:
            return module.open_target(artifact, isa=None, threads=threads)
        except LlmcError as error:  # drivers differ in what they take
            _log.warning("target %s is left out: %s; %s", name, error.message, error.remedy)
        others = [other for other in artifact.targets if other != name]
        return open_executor(artifact, choose_target(others), threads=threads, isa=isa, adapters=adapters)
    if adapters is not None and level is not None and "adapters" not in artifact.target(name):
        with adapters(artifact, level) as kernels:
            return module.open_target(artifact, isa=level, threads=threads, kernels=kernels)
    return module.open_target(artifact, isa=level, threads=threads)
