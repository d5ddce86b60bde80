"""Giving freed memory back to the system."""

from __future__ import annotations

import ctypes
import gc


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
