"""Executors of other packages: opened by their entry point, and held to what the engine relies on. What one
raises, or answers in another form than the step's, becomes an error that names its package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ...codegen.artifact import Artifact
from ...ir.errors import CompileError
from ...plugins.entries import Registered, blaming
from .base import Executor, KeepsStates, StepInputs

_NUMBERS = ("page_size", "vocab_size", "kv_bytes_per_page")
_METHODS = ("allocate_kv", "copy_pages", "step", "run")


class PluginExecutor:
    """An executor of another package behind the engine's own terms."""

    def __init__(self, inner: Any, item: Registered) -> None:
        self._inner, self._item = inner, item
        self._what = f"executor {item.name}"
        for name in _NUMBERS:
            value = getattr(inner, name, None)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise self._wrong(f"has {value!r} as its {name}, where a number belongs")
        missing = [name for name in _METHODS if not callable(getattr(inner, name, None))]
        if missing:
            raise self._wrong(f"has no method {missing[0]}")
        self.page_size: int = inner.page_size
        self.vocab_size: int = inner.vocab_size
        self.kv_bytes_per_page: int = inner.kv_bytes_per_page
        self.max_pages: int | None = getattr(inner, "max_pages", None)
        self.batch_invariant = getattr(inner, "batch_invariant", False) is True

    def _wrong(self, what: str) -> CompileError:
        return CompileError(
            f"{self._what} of package {self._item.origin} {what}",
            remedy=f"report it to the authors of {self._item.origin}, or compile for another target",
        )

    def allocate_kv(self, num_pages: int) -> None:
        """As `Executor.allocate_kv`."""
        with blaming(self._what, self._inner):
            self._inner.allocate_kv(num_pages)

    def copy_pages(self, src: Sequence[int], dst: Sequence[int]) -> None:
        """As `Executor.copy_pages`."""
        with blaming(self._what, self._inner):
            self._inner.copy_pages(src, dst)

    def step(self, inputs: StepInputs) -> np.ndarray:
        """As `Executor.step`. Raises CompileError where the answer is no float32 [R, vocab_size]."""
        with blaming(self._what, self._inner):
            logits: Any = self._inner.step(inputs)
        wanted = (len(inputs.output_index), self.vocab_size)
        if not isinstance(logits, np.ndarray) or logits.dtype != np.float32 or logits.shape != wanted:
            found: Any = logits
            shown = f"{getattr(found, 'dtype', type(found).__name__)}{list(getattr(found, 'shape', ()))}"
            raise self._wrong(f"answered a step with {shown}, not float32{list(wanted)}")
        # The engine samples in place.
        return logits if logits.flags.writeable else logits.copy()

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """As `Executor.run`."""
        with blaming(self._what, self._inner):
            return self._inner.run(inputs)


class _StatefulExecutor(PluginExecutor):
    """One whose model may have recurrent layers."""

    def __init__(self, inner: KeepsStates, item: Registered) -> None:
        super().__init__(inner, item)
        self._states = inner
        self.state_bytes: int = inner.state_bytes

    def allocate_states(self, count: int) -> None:
        """As `KeepsStates.allocate_states`."""
        with blaming(self._what, self._inner):
            self._states.allocate_states(count)

    def copy_state(self, src: int, dst: int) -> None:
        """As `KeepsStates.copy_state`."""
        with blaming(self._what, self._inner):
            self._states.copy_state(src, dst)


def load_opener(item: Registered) -> Callable[..., Any]:
    """`open_target` of an entry. Raises InputError, naming its package."""
    found = item.load()
    opener: Callable[..., Any] | None = found if callable(found) else getattr(found, "open_target", None)
    if opener is None:
        raise item.wrong("is neither a function nor a module with open_target(artifact, *, isa, threads)")
    return opener


def open_plugin(item: Registered, artifact: Artifact, *, isa: str | None, threads: int | None) -> Executor:
    """The executor of an entry. Raises InputError or CompileError, naming its package."""
    opener = load_opener(item)
    with blaming(f"executor {item.name}", opener):
        inner = opener(artifact, isa=isa, threads=threads)
    return _StatefulExecutor(inner, item) if isinstance(inner, KeepsStates) else PluginExecutor(inner, item)
