"""Giving freed memory back to the system, and when to look for it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Generator
from contextlib import contextmanager


@contextmanager
def few_collections() -> Generator[Callable[[], None]]:
    """Look for reference cycles seldom: importing torch and transformers and tracing a model make a million
    objects that stay, and going through them again and again takes a fifth of the time. Cycles are looked for
    once when the function that this gives is called, and not before; and later no more among the objects of
    then, until the block is left; where somebody else has objects stay so already, that is left to them.
    """
    enabled, frozen = gc.isenabled(), gc.get_freeze_count() > 0
    gc.disable()

    def settled() -> None:
        gc.collect()
        if not frozen:
            gc.freeze()
        if enabled:
            gc.enable()

    try:
        yield settled
    finally:
        if not frozen:
            gc.unfreeze()
        if enabled:
            gc.enable()


def release_freed_memory() -> None:
    """Return memory that was freed to the system, where the C library can (glibc's `malloc_trim`).

    Loading a large vocabulary needs some hundred megabytes for a moment. glibc would keep them for later use,
    and they would count in the peak of whatever the compile does next.
    """
    gc.collect()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library, or no global handle (Windows)
        return
    trim(0)
