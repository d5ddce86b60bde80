"""How many rows the state cache of recurrent layers gets."""

from __future__ import annotations

from ..ir.errors import InputError
from .engine_options import EngineOptions
from .executor.base import Executor, KeepsStates
from .state_slots import StateSlots


def allocate_states(executor: Executor, options: EngineOptions) -> StateSlots | None:
    """Rows for all sequences that run, and one for a text that is scored meanwhile; None for a model without
    recurrent layers.

    Raises InputError where the options ask for what such a model cannot do.
    """
    if not isinstance(executor, KeepsStates) or not executor.state_bytes:
        return None
    if options.speculate:
        raise InputError(
            "speculate: this model has recurrent layers, whose state does not go back to before a guess",
            remedy="leave speculate away",
        )
    states = StateSlots(options.max_sequences + 1, executor.copy_state, executor.state_bytes)
    executor.allocate_states(states.count)
    return states
