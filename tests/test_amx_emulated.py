"""Kernels for AMX on a processor without it: their tests in a process that emulates its instructions."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest
from llmc.runtime import cpu

from .conftest import LONG, ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("amx" in cpu.supported_isas(), reason="this CPU has AMX: the tests themselves run"),
    pytest.mark.skipif(
        not cpu.ISA_FLAGS["amx"] - {"amx_tile", "amx_int8", "amx_bf16"} <= cpu.cpu_features(),
        reason="this CPU lacks what AMX's kernels use beside tiles",
    ),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler"),
]

ALL = {
    "tests/test_tvm_gated.py": ("amx", 12),
    "tests/test_tvm_attention_kernels.py": ("amx", 10),
    "tests/test_tvm_turned_heads.py": ("amx", 4),
    "tests/test_tvm_quantized.py": ("amx", 130),
    "tests/test_moe_kernels.py": ("amx", 40),
}
SOME = {
    "tests/test_tvm_gated.py": ("amx", 12),
    "tests/test_tvm_attention_kernels.py": ("amx", 10),
    "tests/test_tvm_turned_heads.py": ("amx", 4),
    # With numbers of a row kept apart, multiplied as float32 beside products of tiles.
    "tests/test_tvm_quantized.py": ("quantized_linear_is_exact and (1-amx or 4-amx)", 10),
}
"""File → which of its tests, and how many these are at least."""


@pytest.mark.parametrize("file", ALL if LONG else SOME)
def test_kernels_for_amx(file: str) -> None:
    which, least = (ALL if LONG else SOME)[file]
    command = ["-m", "pytest", "-p", "tests.amx_emulated", "-p", "no:cacheprovider", "-q", "-k", which, file]
    run = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    instructions = re.search(r"emulated (\d+) instructions of AMX", run.stdout)
    assert passed is not None and int(passed[1]) >= least, run.stdout[-300:]
    assert instructions is not None and int(instructions[1]) > 1000
