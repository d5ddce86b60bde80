"""Steps of executors for GPUs, and what they are checked against: transformers, and the ops' meanings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llmc.ir import interpreter
from llmc.ir.core import Graph
from llmc.ir.dtypes import to_numpy
from llmc.runtime.executor import StepInputs
from llmc.runtime.executor.gpu import GpuExecutor

from .models import ids_of, reference_logits, tiny_model
from .moe_models import MOE, tiny_moe
from .state_models import state_logits

PAGE = 16
TOLERANCE = 0.05
"""Of logits of about 6: weights and tokens are float16 (11 bits) where the oracle has float32. A term that is
left out shows as 0.5 and more."""


def step(
    executor: Any,
    tokens: Sequence[Sequence[int]],
    before: Sequence[int],
    tables: Sequence[Sequence[int]],
    states: Sequence[int] | None = None,
) -> Any:
    """Logits of all new tokens of some sequences; `before`: how many of each are in the cache."""
    ids = [t for one in tokens for t in one]
    starts = np.cumsum([0, *(len(one) for one in tokens)])
    positions = [b + i for one, b in zip(tokens, before, strict=True) for i in range(len(one))]
    slots = [
        table[p // PAGE] * PAGE + p % PAGE
        for one, b, table in zip(tokens, before, tables, strict=True)
        for p in range(b, b + len(one))
    ]
    context = [b + len(one) for one, b in zip(tokens, before, strict=True)]
    arrays = (ids, positions, slots, starts, context, tables, range(len(ids)))
    slot = None if states is None else np.array(states, np.int32)
    return executor.step(StepInputs(*(np.array(a, np.int32) for a in arrays), state_slot=slot)).copy()


def interpreted(graph: Graph, ids: Sequence[int], table: Sequence[int]) -> np.ndarray:
    """Logits of one sequence by the ops' meanings, in float32 over the same codes."""
    count, at = len(ids), range(len(ids))
    slots = [table[p // PAGE] * PAGE + p % PAGE for p in at]
    arrays = (ids, at, slots, [0, count], [count], [table], at)
    inputs = StepInputs(*(np.array(a, np.int32) for a in arrays)).given()
    feed: dict[str, Any] = {name: interpreter.to_torch(array) for name, array in inputs.items()}
    for value in graph.inputs:
        if value.name.startswith("kv_pages."):
            shape = [max(table) + 1 if not isinstance(d, int) else d for d in value.shape]
            feed[value.name] = interpreter.to_torch(np.zeros(shape, to_numpy(value.dtype)))
    return interpreter.run(graph, feed)[0].numpy()


def check_steps(executor: GpuExecutor, name: str) -> None:
    """Logits of a ragged step of a tiny model against transformers', and the same bits however it is cut."""
    executor.allocate_kv(32)
    model = (tiny_moe if name in MOE else tiny_model)(name)
    first, second = ids_of(40, seed=1), ids_of(17, seed=2)
    whole = step(executor, [first, second], [0, 0], [[3, 5, 7], [2, 9, 0]])
    for ids, rows in ((first, whole[:40]), (second, whole[40:])):
        wanted = np.asarray(reference_logits(model, ids)).reshape(len(ids), -1)
        near = np.abs(rows - wanted).max(1) < TOLERANCE
        assert near.all() or (name in MOE and near.mean() > 0.9)  # a router's near tie may fall the other way
        assert (rows.argmax(1) == wanted.argmax(1)).mean() > 0.9
    parts = [
        step(executor, [first[at : at + n]], [at], [[11, 12, 13]]) for at, n in ((0, 7), (7, 1), (8, 32))
    ]
    assert np.array_equal(np.concatenate(parts), whole[:40])
    copied = step(executor, [first[:33]], [0], [[20, 21, 22]])
    assert np.array_equal(copied, whole[:33])
    executor.copy_pages([20, 21, 22], [23, 24, 25])
    assert np.array_equal(step(executor, [first[33:]], [33], [[23, 24, 25]]), whole[33:40])
    kept = executor.read_pages([23, 24])
    executor.write_pages([29, 28], kept)
    assert np.array_equal(executor.read_pages([29, 28]), kept)
    assert np.array_equal(step(executor, [first[32:]], [32], [[29, 28, 30]]), whole[32:40])


def check_recurrence(executor: GpuExecutor, name: str) -> None:
    """Logits of a tiny recurrent model, and a state that was copied in the middle of a text goes on with the
    same bits.
    """
    executor.allocate_kv(16)
    executor.allocate_states(4)
    first, second = ids_of(40, seed=1), ids_of(17, seed=2)
    whole = step(executor, [first, second], [0, 0], [[1, 2, 3], [4, 5, 0]], states=[2, 0])
    for ids, rows in ((first, whole[:40]), (second, whole[40:])):
        wanted = state_logits(name, ids).reshape(len(ids), -1)
        assert np.linalg.norm(rows - wanted) < 0.01 * np.linalg.norm(wanted)  # errors of a state add up
    head = step(executor, [first[:13]], [0], [[6, 7, 8]], states=[1])
    executor.copy_state(1, 3)
    tail = step(executor, [first[13:]], [13], [[6, 7, 8]], states=[3])
    assert np.array_equal(np.concatenate([head, tail]), whole[:40])
