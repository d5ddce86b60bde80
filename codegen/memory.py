"""Memory of a compilation: sizes as people write them, the peak to expect, and the cap of `--max-ram`.

The peak is of the whole process tree, pages that processes share counted for each. It is predicted from the
graph by phases, of which one is in memory at a time:

    tokenizer     the vocabulary and its reference
    quantizing    of the largest linear layer [N, K]: second moments and their factors [K, K], copies of the
                  weight [N, K], the values of one sequence, the head in pieces
    kernels       packing of weights, and the kernel compiler's process beside it

Constants were measured on Linux, x86-64, with torch 2.13 for the CPU. A cap is kept twice: what cannot fit is
refused before it starts, and a watch ends a compilation that grows beyond it all the same.
"""

from __future__ import annotations

import _thread
import os
import re
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..ir.core import Graph, Value
from ..ir.errors import CompileError, InputError
from ..ir.ops.nn import Linear

# What a compilation keeps in memory: torch and transformers; an entry of the vocabulary in the tokenizer and
# in its reference; rows in flight while weights are quantized and packed; the kernel compiler. Mapped weights
# are given back once they were read (frontend/mapped.py).
IMPORTS_BYTES = 430_000_000
TOKEN_BYTES = 1700
CHUNK_BYTES = 96 << 20
WORKER_BYTES = 400_000_000
_MOMENTS = 9  # float32 [K, K] while one is factored: two of the inputs, damped and permuted ones, inverse
_KEPT = 4  # of them while codes are made and scales refitted
_COPIES = 18  # float32 [N, K] then: weight, target, codes, scales and zero points by column, candidates
_HEAD_ROWS = 16384  # of the head at a time, with as many logits for each token of a sequence
_EVERY = 0.05  # seconds between two looks

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


@dataclass(frozen=True)
class Peak:
    """Bytes that each phase of a compilation will take, by its name."""

    phases: dict[str, int]

    @property
    def bytes(self) -> int:
        return max(self.phases.values())

    @property
    def phase(self) -> str:
        """The largest one."""
        return max(self.phases, key=lambda name: self.phases[name])


def predict_peak(
    graph: Graph,
    *,
    vocabulary: int,
    length: int,
    calibrated: bool,
    measured: bool,
    kernels: bool,
    group: int = 0,
) -> Peak:
    """The peak of compiling a traced (or fused) graph.

    Args:
        vocabulary: entries of the tokenizer.
        length: tokens of a calibration sequence.
        calibrated, measured: whether a pass calibrates, whether the verdict runs.
        kernels: whether a kernel compiler runs in a process of its own.
        group: weights that share a scale, 0 for whole rows.
    """
    matrices = [w for w in graph.weights.values() if len(w.shape) == 2]
    largest = max((_bytes(w) for w in graph.weights.values()), default=0)
    phases = {
        "tokenizer": IMPORTS_BYTES + TOKEN_BYTES * vocabulary,
        "kernels": IMPORTS_BYTES + min(largest, CHUNK_BYTES) + (WORKER_BYTES if kernels else 0),
    }
    inner = [w for w in matrices if max(_sides(w)) < max(vocabulary, 1)]
    layer = max((_layer_bytes(w, length, group) for w in inner), default=0)
    head = max((4 * _HEAD_ROWS * (min(_sides(w)) + 4 * length) for w in matrices), default=0)
    if calibrated:
        phases["quantizing"] = IMPORTS_BYTES + max(layer, head)
    if measured:
        values = max((_values(w, length) for w in inner), default=0)
        phases["verdict"] = IMPORTS_BYTES + 2 * head + 4 * values  # of the model and of its source
    return Peak(phases)


def _sides(weight: Value) -> tuple[int, int]:
    n, k = weight.shape
    assert isinstance(n, int)
    assert isinstance(k, int)
    return n, k


def _bytes(weight: Value) -> int:
    count = 4
    for side in weight.shape:
        assert isinstance(side, int)
        count *= side
    return count


def _values(weight: Value, length: int) -> int:
    n, k = _sides(weight)
    return 4 * (2 * n * k + 6 * length * (n + k))


def _layer_bytes(weight: Value, length: int, group: int) -> int:
    n, k = _sides(weight)
    if not any(isinstance(u, Linear) for u in weight.users):
        k, n = max(n, k), min(n, k)  # before fusion a transposed weight does not tell which is K
    groups = -(-k // group) if group else 1
    factoring = _MOMENTS * k * k + 4 * n * k
    refitting = _KEPT * k * k + _COPIES * n * k + 3 * n * groups * groups
    return 4 * (max(factoring, refitting) + 6 * length * (n + k))


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


@contextmanager
def watched(cap: int | None, root: int | None = None) -> Generator[None]:
    """Raise CompileError in the main thread once the process tree takes more than `cap` bytes.

    Looks every 50 ms at /proc; where there is none, and outside of the main thread, nothing is watched.
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
                _thread.interrupt_main()
                return

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
