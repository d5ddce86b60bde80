"""Memory of a compilation: sizes as people write them, and the cap of `--max-ram`.

A cap is kept twice: what cannot fit by the prediction (`peak.py`) is refused before it starts, and a watch
ends a compilation that grows beyond it all the same. Both count the whole process tree, pages that processes
share for each of them.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from ..ir.errors import CompileError, InputError
from .peak import Peak

_EVERY = 0.05  # seconds between two looks
_capped: ContextVar[bool] = ContextVar("capped", default=False)

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def parse_size(text: str) -> int:
    """Bytes of "1.5GB" (10⁹), "4GiB" (2³⁰), "800M" (10⁶) or "900000000". InputError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    if found is None or (found.group(3) and not found.group(2)):
        raise InputError(f"{text!r} is no size", remedy="write 1.5GB (10⁹ bytes) or 4GiB (2³⁰ bytes)")
    number, unit, binary = found.groups()
    scale = 1024 ** ("kmgt".index(unit) + 1) if binary else _UNITS[unit]
    return int(float(number) * scale)


def size_text(size: int) -> str:
    """Bytes as --max-ram takes them, in MB rounded up."""
    return f"{-(-size // 10**6)}MB"


def check_peak(peak: Peak, cap: int | None, say: Callable[[str], None]) -> None:
    """Tell the predicted peak, and raise InputError where it is above the cap."""
    limit = "" if cap is None else f" of {size_text(cap)} (--max-ram)"
    say(f"predicted peak of memory: {size_text(peak.bytes)}{limit}, while: {peak.phase}")
    if cap is not None and peak.bytes > cap:
        raise InputError(
            f"--max-ram {size_text(cap)} is less than this compilation takes: {size_text(peak.bytes)} "
            f"while: {peak.phase}",
            remedy=f"give --max-ram {size_text(peak.bytes)} or more, or use a machine that has it",
        )


def processes_at_once(most: int, each: int) -> int:
    """Processes of `each` bytes to run beside this one, `most` at most: one a core, in a quarter of the
    machine's memory; and one where a cap is kept.
    """
    if _capped.get():
        return 1
    return max(1, min(most, processors(), _memory() // (4 * each)))


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> int:
    """Bytes that the machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def watched(cap: int | None, root: int | None = None) -> Generator[None]:
    """Keep a cap: `processes_at_once` knows of it, and CompileError is raised in the main thread once the
    process tree takes more than `cap` bytes.
    """
    before = _capped.set(cap is not None)
    try:
        with _watched(cap, root):
            yield
    finally:
        _capped.reset(before)


@contextmanager
def _watched(cap: int | None, root: int | None) -> Generator[None]:
    """Raise CompileError in the main thread once the process tree takes more than `cap` bytes.

    Looks every 50 ms at /proc; where there is none, and outside of the main thread, nothing is watched.
    SIGUSR1 carries it to the main thread: it ends waits too, and unlike SIGINT no shell has it ignored for
    jobs in the background.
    """
    main = threading.current_thread() is threading.main_thread()
    if cap is None or not main or sys.platform != "linux":
        yield
        return
    stop, over = threading.Event(), list[int]()
    pid = os.getpid() if root is None else root

    def look() -> None:
        while not stop.wait(_EVERY):
            taken = tree_bytes(pid)
            if taken > cap:
                over.append(taken)
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
                return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    thread = threading.Thread(target=look, name="max-ram", daemon=True)
    thread.start()
    try:
        yield
        stop.set()
        thread.join()
        if over:  # between the last line and here: the interrupt is on its way
            threading.Event().wait(1)
    except KeyboardInterrupt:
        if not over:
            raise
        raise CompileError(
            f"memory reached {size_text(over[0])}, above --max-ram {size_text(cap)}: stopped",
            remedy="give more, fewer --calib-tokens, or a scheme without calibration",
        ) from None
    finally:
        stop.set()
        thread.join()
        signal.signal(signal.SIGUSR1, signal.SIG_DFL if before is None else before)


def tree_bytes(root: int) -> int:
    """Sum of the resident sets of a process and of all that it started, in bytes (Linux)."""
    page = os.sysconf("SC_PAGE_SIZE")
    total, waiting, seen = 0, [root], set[int]()
    while waiting:
        process = waiting.pop()
        if process in seen:
            continue
        seen.add(process)
        folder = Path("/proc", str(process))
        try:
            total += page * int((folder / "statm").read_text().split()[1])
            for task in (folder / "task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except (OSError, IndexError, ValueError):  # it has ended
            continue
    return total
