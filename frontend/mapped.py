"""A file mapped for reading, which gives its pages back once they were read.

The kernel counts mapped pages that were touched as this process's memory. A compile walks through every
weight, so without giving them back its peak would hold the whole checkpoint; with `madvise(MADV_DONTNEED)` it
holds one chunk.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from types import TracebackType

from ..ir.errors import InputError

_ADVISE_DROP: int | None = getattr(mmap, "MADV_DONTNEED", None)
_AROUND = 4 << 20
"""Bytes before and behind a range that are given back with it. A page that is touched brings in its
neighbours, as many as the page cache holds in one piece (2 MiB on some kernels), those given back before too.
"""


class MappedFile:
    """A read-only mapping of a regular, non-empty file.

    Raises InputError where the file cannot be opened or is empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if self.size == 0:
                    raise InputError(f"{path.name} is empty", remedy="download it again")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise InputError(
                f"cannot read {path}: {error.strerror}", remedy="check the path and its permissions"
            ) from None

    def view(self, start: int, stop: int) -> memoryview:
        """Bytes [start:stop) without copying. The caller has checked them against `size`."""
        return memoryview(self._map)[start:stop]

    def drop(self, start: int, stop: int) -> None:
        """Give the pages of [start:stop) back; they are read from the file again when needed."""
        if _ADVISE_DROP is None:
            return
        first = max(0, start - _AROUND) // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(_ADVISE_DROP, first, min(stop + _AROUND, self.size) - first)

    def close(self) -> None:
        self._map.close()

    def __enter__(self) -> MappedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
