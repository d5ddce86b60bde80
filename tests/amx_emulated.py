"""Plugin of pytest, `-p tests.amx_emulated`: tests see a processor with AMX, whose instructions a handler of
signals carries out (`amx_emulator.c`). The other instructions of the level must be there.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from pathlib import Path

import pytest
from llmc.runtime import cpu

FLAGS = frozenset({"amx_tile", "amx_int8", "amx_bf16"})

_folder = tempfile.TemporaryDirectory(prefix="llmc-amx-")


def _build() -> ctypes.CDLL:
    source, library = Path(__file__).parent / "amx_emulator.c", Path(_folder.name) / "libamx.so"
    # Products and sums are not contracted: what is to be fused says so.
    flags = ["-O2", "-shared", "-fPIC", "-ffp-contract=off", "-mavx2", "-mfma", "-Wall", "-Werror"]
    subprocess.run(["gcc", *flags, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


_library = _build()
_library.amx_emulated.restype = ctypes.c_uint64
_features = cpu.cpu_features
cpu.cpu_features = lambda: _features() | FLAGS
cpu.may_use_tiles = lambda: True


def pytest_sessionstart() -> None:
    """Once pytest has set its own handler of faults."""
    assert _library.amx_emulate() == 0


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"emulated {_library.amx_emulated()} instructions of AMX")
