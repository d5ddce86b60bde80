"""Models that change their own weights once, the first time they run.

Such a model notes in a flag that it has done so (weights that are divided for inference, say); what it
computes from then on is what is to be compiled. A trace is its first run, so the change is in the program, as
an operator on a weight. Without such a note it would change them each time, which a compiled function cannot.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass
class Settling:
    noted: bool = False
    """Whether a flag of some module was another behind its run than before it."""


@contextmanager
def settling(model: torch.nn.Module) -> Generator[Settling]:
    """Within it, a run of the model is looked at for what it notes. (torch.export puts attributes back.)"""
    before = {module: _flags(module) for module in model.modules()}
    found = Settling()

    def look(*_: Any) -> None:
        found.noted = any(_flags(module) != flags for module, flags in before.items())

    hook = model.register_forward_hook(look)
    try:
        yield found
    finally:
        hook.remove()


def _flags(module: torch.nn.Module) -> dict[str, bool]:
    """Its attributes that are true or false. A number may count how often it ran."""
    return {name: x for name, x in vars(module).items() if isinstance(x, bool)}
