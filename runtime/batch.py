"""From a plan to the arrays of one step."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Seq

import numpy as np

from .executor.base import StepInputs
from .executor.windows import WindowTables
from .scheduler import Chunk, S


def build_inputs(chunks: Seq[Chunk[S]], page_size: int, *, all_rows: bool = False) -> StepInputs:
    """The ragged batch of the chunks, in their order.

    Logits are asked for at the tokens that a chunk scores and at the last token of each chunk that ends its
    sequence, or at every token with `all_rows`. The work in Python is a few calls a sequence, whatever the
    number of tokens.
    """
    if not all_rows and all(chunk.count == 1 and chunk.is_last and not chunk.scored for chunk in chunks):
        return _decoding(chunks, page_size)
    batch = len(chunks)
    query_start = np.zeros(batch + 1, np.int32)
    np.cumsum([chunk.count for chunk in chunks], out=query_start[1:])
    context_len = np.array([chunk.place + chunk.count for chunk in chunks], np.int32)
    block_table = _block_table(chunks)
    starts = np.array([chunk.place for chunk in chunks], np.int32)
    token_ids = np.concatenate([_tokens(chunk) for chunk in chunks])
    counts = np.diff(query_start)
    row = np.repeat(np.arange(batch), counts)
    positions = np.arange(len(token_ids), dtype=np.int32) + np.repeat(starts - query_start[:-1], counts)
    slot_mapping = block_table[row, positions // page_size] * np.int32(page_size) + positions % page_size
    if all_rows:
        output_index = np.arange(len(token_ids), dtype=np.int32)
    else:
        ends = [chunk.is_last for chunk in chunks]
        output_index = query_start[1:][ends] - np.int32(1)
        if any(chunk.scored for chunk in chunks):
            output_index = np.array(_rows_wanted(chunks), np.int32)
    adapter = _adapters(chunks)
    shift = _first_positions(chunks)
    windows = [
        (table[row, positions // page_size] * np.int32(page_size) + positions % page_size, table)
        for table in _window_tables(chunks)
    ]
    return StepInputs(
        token_ids,
        positions if shift is None else positions + np.repeat(shift, counts),
        slot_mapping,
        query_start,
        context_len,
        block_table,
        output_index,
        adapter=adapter if adapter is None else np.repeat(adapter, counts),
        state_slot=_states(chunks),
        windows=windows or None,
    )


def _first_positions(chunks: Seq[Chunk[S]]) -> np.ndarray | None:
    """[B] int32: what each sequence's positions are counted from; None where it is 0 for all."""
    first = [chunk.sequence.first_position for chunk in chunks]
    return np.array(first, np.int32) if any(first) else None


def _adapters(chunks: Seq[Chunk[S]]) -> np.ndarray | None:
    """[B] int32: the slot of each sequence's adapter, -1 for none; None where none has one."""
    slots = [chunk.sequence.adapter for chunk in chunks]
    return np.array(slots, np.int32) if max(slots) >= 0 else None


def _states(chunks: Seq[Chunk[S]]) -> np.ndarray | None:
    """[B] int32: the row of the state cache that each sequence owns; None where there is no such cache."""
    slots = [chunk.sequence.state_slot for chunk in chunks]
    return np.array(slots, np.int32) if slots[0] >= 0 else None


def _rows_wanted(chunks: Seq[Chunk[S]]) -> list[int]:
    """Rows of the batch whose logits are wanted, a chunk's scored tokens before its last one."""
    rows: list[int] = []
    begin = 0
    for chunk in chunks:
        rows += [begin + place - chunk.start for place in chunk.scored]
        begin += chunk.count
        if chunk.is_last:
            rows.append(begin - 1)
    return rows


def _decoding(chunks: Seq[Chunk[S]], page_size: int) -> StepInputs:
    """The same where each sequence computes its last token: every step but a prompt's, and so short that
    numbers in Python are faster than calls of numpy.
    """
    batch = len(chunks)
    starts = [chunk.place for chunk in chunks]
    slots: list[int] = []
    for chunk, start in zip(chunks, starts, strict=True):
        page, offset = divmod(start, page_size)
        slots.append(chunk.sequence.block_table[page] * page_size + offset)
    steps = np.arange(batch + 1, dtype=np.int32)
    tokens = [chunk.sequence.tokens[chunk.start] for chunk in chunks]
    # One array of all, since making one takes longer than filling it.
    arrays = np.array([tokens, starts, slots, [start + 1 for start in starts]], np.int32)
    shift = _first_positions(chunks)
    windows: list[WindowTables] = []
    for table in _window_tables(chunks):
        at, offset = np.divmod(np.array(starts, np.int32), np.int32(page_size))
        windows.append((table[steps[:-1], at] * np.int32(page_size) + offset, table))
    return StepInputs(
        token_ids=arrays[0],
        positions=arrays[1] if shift is None else arrays[1] + shift,
        slot_mapping=arrays[2],
        query_start=steps,
        context_len=arrays[3],
        block_table=_block_table(chunks),
        output_index=steps[:-1],
        adapter=_adapters(chunks),
        state_slot=_states(chunks),
        windows=windows or None,
    )


def _tokens(chunk: Chunk[S]) -> np.ndarray:
    """The chunk's tokens without a copy; the view must be gone before the sequence grows."""
    return np.frombuffer(chunk.sequence.tokens, np.int32, count=chunk.count, offset=4 * chunk.start)


def _block_table(chunks: Seq[Chunk[S]]) -> np.ndarray:
    """[B, P] int32, P the largest number of pages in use; the rest is 0."""
    return _joined([chunk.sequence.block_table for chunk in chunks])


def _window_tables(chunks: Seq[Chunk[S]]) -> list[np.ndarray]:
    """The like of the layers of each window; pages before a window are 0 too."""
    windows = len(chunks[0].sequence.window_tables)
    return [_joined([chunk.sequence.window_tables[which] for chunk in chunks]) for which in range(windows)]


def _joined(tables: list[array[int]]) -> np.ndarray:
    width = max(len(table) for table in tables)
    result = np.zeros((len(tables), width), np.int32)
    for row, table in zip(result, tables, strict=True):
        row[: len(table)] = np.frombuffer(table, np.int32)
    return result
