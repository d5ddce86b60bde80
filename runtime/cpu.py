"""What this processor runs: the ISA levels that kernels are compiled for, and how many threads make sense.

A level is a set of CPU features that a kernel of that level may use, no more: codegen compiles a level with
exactly these features. The levels are ordered by preference but do not nest (Cascade Lake has AVX512-VNNI and
no AVX-VNNI), so each is checked on its own. Names of features are those of Linux's /proc/cpuinfo (Linux:
arch/x86/include/asm/cpufeatures.h), which leaves out what the kernel or a hypervisor has switched off.
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path

ISA_LEVELS = ("generic", "avx2", "avxvnni", "avx512vnni", "zen4", "amx", "neon", "i8mm")
"""All levels, the best of each architecture last."""

ISA_MACHINES: Mapping[str, str] = {
    level: "aarch64" if level in ("neon", "i8mm") else "x86_64" for level in ISA_LEVELS
}
"""Level → architecture, as `platform.machine` names it on Linux."""

_AVX2 = frozenset({"avx", "avx2", "fma", "f16c", "bmi1", "bmi2", "movbe", "abm"})
_AVX512 = frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni"})

ISA_FLAGS: Mapping[str, frozenset[str]] = {
    "generic": frozenset(),
    "avx2": _AVX2,
    "avxvnni": _AVX2 | {"avx_vnni"},
    "avx512vnni": _AVX2 | _AVX512,
    "zen4": _AVX2 | _AVX512 | {"avx512_bf16", "sse4a"},
    "amx": _AVX2 | _AVX512 | {"avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"},
    "neon": frozenset({"asimd", "asimddp"}),
    "i8mm": frozenset({"asimd", "asimddp", "i8mm"}),
}
"""Level → flags of /proc/cpuinfo that it requires. "generic" is the baseline of x86-64.

In LLVM's names: avx2 = x86-64-v3 (abm is lzcnt); avxvnni adds +avxvnni; avx512vnni is x86-64-v4 with
+avx512vnni; zen4 adds +avx512bf16, and +sse4a, which Intel's processors lack (their vector units and caches
want other sizes); amx adds +avx512bf16, +amx-tile, +amx-int8 and +amx-bf16; neon is armv8-a with +dotprod,
i8mm adds +i8mm.
"""

# macOS (sysctl machdep.cpu) writes the same features differently; the VNNI names are the ones it has used.
_DARWIN_NAMES = {"avx1.0": "avx", "lzcnt": "abm", "avx512vnni": "avx512_vnni", "avxvnni": "avx_vnni"}


def parse_cpuinfo(text: str) -> frozenset[str]:
    """Features that every processor listed has (the processors of a hybrid CPU may differ); empty if none are
    listed.
    """
    sets = [
        frozenset(line.split(":", 1)[1].split())
        for line in text.splitlines()
        if line.split(":", 1)[0].strip() in ("flags", "Features") and ":" in line
    ]
    return frozenset.intersection(*sets) if sets else frozenset()


def _darwin_features() -> frozenset[str]:
    keys = ("machdep.cpu.features", "machdep.cpu.leaf7_features", "machdep.cpu.extfeatures")
    found: set[str] = set()
    for key in keys:
        try:
            out = subprocess.run(["/usr/sbin/sysctl", "-n", key], capture_output=True, text=True, timeout=5)
        except (OSError, subprocess.SubprocessError):
            continue
        found.update(out.stdout.lower().split())
    return frozenset(_DARWIN_NAMES.get(name, name) for name in found)


def cpu_features() -> frozenset[str]:
    """Features of this CPU in /proc/cpuinfo's names; empty where they cannot be found out."""
    if platform.system() == "Darwin":
        return _darwin_features()
    try:
        return parse_cpuinfo(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return frozenset()


_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM = 0x1023
_XFEATURE_XTILEDATA = 18


@cache
def may_use_tiles() -> bool:
    """Ask Linux for AMX's tile registers, which a process may not touch before; whether it has them then.

    They are for all threads of the process. The kernel refuses where it is older than 5.16, under some
    sandboxes, and where a thread's alternative signal stack is too small for them (Linux:
    Documentation/arch/x86/xstate.rst).
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0


def supported_isas(features: frozenset[str] | None = None, machine: str = "x86_64") -> list[str]:
    """The levels whose features are all present, the best last. "generic" is among them on every x86-64; on
    aarch64 without dot products (Cortex-A72), and on other machines, there are none.

    `features`: of another CPU than this one, of architecture `machine`, for which nothing is asked of its
    operating system.
    """
    if features is None:
        have, machine = cpu_features(), platform.machine()
    else:
        have = features
    levels = [level for level in ISA_LEVELS if ISA_MACHINES[level] == machine and ISA_FLAGS[level] <= have]
    if features is None and "amx" in levels and not may_use_tiles():
        levels.remove("amx")
    return levels


def best_isa() -> str | None:
    """The best level of this CPU; None where there is none for it."""
    return next(reversed(supported_isas()), None)


def _physical_cores(text: str, usable: set[int]) -> int:
    """Distinct (package, core) pairs among the usable processors of a /proc/cpuinfo text; 0 if it does not
    say.
    """
    cores: set[tuple[str, str]] = set()
    for block in text.split("\n\n"):
        fields = {
            key.strip(): value.strip()
            for key, _, value in (line.partition(":") for line in block.splitlines())
        }
        number = fields.get("processor", "")
        if number.isdigit() and int(number) in usable and "core id" in fields:
            cores.add((fields.get("physical id", "0"), fields["core id"]))
    return len(cores)


def _quota() -> float | None:
    """Processors that the control group allows (v2 cpu.max, then v1 cfs quota); None without a limit."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        pass
    try:
        limit_us = int(Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").read_text())
        period_us = int(Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us").read_text())
        return limit_us / period_us if limit_us > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def default_threads() -> int:
    """Threads to compute with: one a physical core that this process may use, within the control group's
    quota.
    """
    if hasattr(os, "sched_getaffinity"):
        usable = os.sched_getaffinity(0)
    else:
        usable = set(range(os.cpu_count() or 1))
    try:
        cores = _physical_cores(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"), usable)
    except OSError:
        cores = 0
    count = cores or len(usable)
    quota = _quota()
    return max(1, min(count, int(quota)) if quota is not None else count)
