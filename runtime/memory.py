"""How much memory this process may still take, and how many pages of KV cache that makes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..ir.errors import InputError

_SHARE = 0.6  # of the free memory: the rest is for activations, the weights' page cache, and the neighbours


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def _meminfo(text: str) -> int | None:
    for line in text.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _group_folders(root: Path, membership: str) -> list[tuple[Path, str]]:
    """Folders (with version "v1" or "v2") of the control groups that bound this process, from its own to the
    root.
    """
    found: list[tuple[Path, str]] = []
    for line in membership.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if number == "0" and not controllers:
            base, version = root, "v2"
        elif "memory" in controllers.split(","):
            base, version = root / "memory", "v1"
        else:
            continue
        folder = base / name.strip("/")
        while True:
            found.append((folder, version))
            if folder == base or base not in folder.parents:
                break
            folder = folder.parent
    return found


def _reclaimable(folder: Path) -> int:
    """File pages of a group that the kernel gives back on demand: mapped weights count here."""
    try:
        stats = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(stats.get("total_inactive_file", stats.get("inactive_file", 0)))


def group_memory(root: Path = Path("/sys/fs/cgroup"), membership: str | None = None) -> int | None:
    """Bytes that the control groups still allow; None without a limit."""
    if membership is None:
        try:
            membership = Path("/proc/self/cgroup").read_text()
        except OSError:
            return None
    free: list[int] = []
    for folder, version in _group_folders(root, membership):
        names = (
            ("memory.max", "memory.current")
            if version == "v2"
            else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        )
        limit, used = (_read_int(folder / name) for name in names)
        if limit is not None and used is not None and limit < 2**60:  # v1 writes a huge number for "none"
            free.append(max(0, limit - used + _reclaimable(folder)))
    return min(free, default=None)


def available_memory() -> int:
    """Bytes that can be taken without swapping: the machine's MemAvailable and the control groups' limits."""
    try:
        free = _meminfo(Path("/proc/meminfo").read_text())
    except OSError:
        free = None
    if free is None:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    allowed = group_memory()
    return free if allowed is None else min(free, allowed)


@dataclass(frozen=True, slots=True)
class KvPlan:
    """Size of the KV cache."""

    pages: int
    page_size: int
    bytes: int
    windows: tuple[int, ...] = ()
    """Pages of the layers of each window, which have pages of their own."""

    @property
    def tokens(self) -> int:
        """Tokens that it holds."""
        return self.pages * self.page_size

    def __str__(self) -> str:
        return f"kv cache: {self.pages} pages = {self.tokens} tokens, {self.bytes / 1e6:.1f} MB"


def _bytes(pages: int, bytes_per_page: int, windows: Sequence[tuple[int, int]]) -> int:
    """Of a cache of so many pages, with the layers of each window at no more than they need."""
    return pages * bytes_per_page - sum(max(0, pages - most) * size for most, size in windows)


def _fitting(budget: int, bytes_per_page: int, windows: Sequence[tuple[int, int]], wanted: int) -> int:
    """The largest number of pages within a budget of bytes. Where all layers see a window, any number may
    fit: then no more than `wanted`.
    """
    low = budget // bytes_per_page
    rest = bytes_per_page - sum(size for _, size in windows)
    high = max(low, budget // rest if rest else wanted)
    while low < high:
        middle = (low + high + 1) // 2
        if _bytes(middle, bytes_per_page, windows) <= budget:
            low = middle
        else:
            high = middle - 1
    return low


def plan_kv_cache(
    *,
    page_size: int,
    bytes_per_page: int,
    context: int,
    max_sequences: int,
    max_pages: int | None = None,
    kv_tokens: int | None = None,
    kv_bytes: int | None = None,
    available: int | None = None,
    beside: int = 0,
    windows: Sequence[tuple[int, int]] = (),
) -> KvPlan:
    """Choose the number of pages.

    `kv_tokens` or `kv_bytes` decide where given. Otherwise the cache takes 60 % of the memory available, and
    no more than `max_sequences` sequences of `context` tokens would fill or the kernels can count
    (`max_pages`). `beside`: bytes that are taken before, by a state cache. `windows`: of the layers of each
    window the pages that are needed at most, and the bytes of one, which count in `bytes_per_page` too.
    Raises InputError where not one page fits, or where the size asked for is not there.
    """
    free = (available_memory() if available is None else available) - beside
    if free < 0:
        raise InputError(
            f"the states of {max_sequences} sequences take {beside / 1e6:.0f} MB, "
            f"{(free + beside) / 1e6:.0f} MB are free",
            remedy="lower max_sequences or free some memory",
        )
    for name, value in (("kv_tokens", kv_tokens), ("kv_cache_bytes", kv_bytes)):
        if value is not None and value <= 0:
            raise InputError(f"{name} is {value}", remedy="give a number above 0")
    if kv_tokens is not None:
        pages = -(-kv_tokens // page_size)
    else:
        pages = max_sequences * -(-context // page_size)
        if bytes_per_page:
            budget = int(free * _SHARE) if kv_bytes is None else kv_bytes
            fitting = _fitting(budget, bytes_per_page, windows, pages)
            pages = fitting if kv_bytes is not None else min(pages, fitting)
        if kv_bytes is None and max_pages is not None:
            pages = min(pages, max_pages)
    each = tuple(min(pages, most) for most, _ in windows)
    plan = KvPlan(pages, page_size, _bytes(pages, bytes_per_page, windows), each)
    if pages < 1:
        size = f"{bytes_per_page / 1e6:.1f} MB"
        raise InputError(
            f"not one page of KV cache ({size}) fits into the {free / 1e6:.0f} MB that are free",
            remedy="free some memory or raise kv_cache_bytes",
        )
    if plan.bytes > free:
        raise InputError(
            f"the {plan} is more than the {free / 1e6:.0f} MB that are free",
            remedy="lower kv_cache_bytes, kv_tokens or the context",
        )
    return plan
