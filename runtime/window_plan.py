"""Between the engine and an executor: pages of layers that see a window (`window_pages.py`)."""

from __future__ import annotations

from .block_manager import BlockManager
from .engine_options import EngineOptions
from .executor.base import Executor
from .executor.windows import KeepsWindows
from .memory import KvPlan
from .window_pages import most_pages


def window_sizes(executor: Executor, options: EngineOptions) -> list[tuple[int, int]]:
    """(pages that are needed at most, bytes of one) of each window whose layers have pages of their own."""
    if not isinstance(executor, KeepsWindows):
        return []
    sizes = {"max_sequences": options.max_sequences, "max_batch_tokens": options.max_batch_tokens}
    return [
        (most_pages(window, executor.page_size, **sizes), size)
        for window, size in zip(executor.windows, executor.window_bytes_per_page, strict=True)
    ]


def window_sizes_of(executor: Executor) -> tuple[int, ...]:
    """Tokens of each window whose layers have pages of their own."""
    return executor.windows if isinstance(executor, KeepsWindows) else ()


def allocate_windows(executor: Executor, plan: KvPlan) -> list[tuple[int, int]]:
    """Pages for the layers of each window; (tokens, pages) as `BlockManager` takes them."""
    if not isinstance(executor, KeepsWindows) or not executor.windows:
        return []
    executor.allocate_windows(plan.windows)
    return list(zip(executor.windows, plan.windows, strict=True))


def copy_window_pages(blocks: BlockManager, executor: Executor) -> None:
    """The copies that pages given to sequences ask for, before the step."""
    for which, window in enumerate(blocks.windows):
        if window.copies:
            assert isinstance(executor, KeepsWindows)
            sources, destinations = zip(*window.copies, strict=True)
            executor.copy_window_pages(which, sources, destinations)
            window.copies.clear()
