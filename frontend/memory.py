"""Giving freed memory back to the system, and when to look for it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Generator[None]:
    """Look for no reference cycles meanwhile: importing torch and transformers makes a million objects that
    stay, and going through them again and again takes a fifth of the time.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
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
