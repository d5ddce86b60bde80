"""CUDA C++ → machine code of a GPU, without a GPU: by NVRTC (package nvidia-cuda-nvrtc-cu12, or a CUDA
toolkit), else by nvcc.

What was made is read back from the file itself: registers and stack of each kernel (`resources`).
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import os
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ....ir.errors import CompileError

_REMEDY = "pip install 'llmc[cuda]', or install the CUDA toolkit and name it in CUDA_HOME"


@dataclass(frozen=True)
class Resources:
    """What a kernel takes of a multiprocessor."""

    registers: int
    """Of a thread."""
    stack: int
    """Bytes of a thread: where registers did not suffice, or an array is indexed by what is known late."""


def compile_text(text: str, arch: str) -> bytes:
    """Machine code for "sm_80" (a cubin), or for "compute_80" what a driver compiles further (PTX).

    Raises CompileError where there is no compiler, or it refuses the text or the architecture.
    """
    library = _nvrtc()
    if library is not None:
        return _by_nvrtc(library, text, arch)
    nvcc = _nvcc()
    if nvcc is None:
        raise CompileError("there is neither NVRTC nor nvcc, which compile for tvm-cuda", remedy=_REMEDY)
    return _by_nvcc(nvcc, text, arch)


def compiler_name() -> str | None:
    """What would compile: a path, or None where nothing is installed."""
    library = _nvrtc()
    return _nvcc() if library is None else str(getattr(library, "_name", "nvrtc"))


def _nvrtc() -> ctypes.CDLL | None:
    for path in _candidates():
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    return None


def _candidates() -> list[str]:
    """Where NVRTC may lie: NVIDIA's packages, the toolkit that the environment names, the system."""
    found: list[str] = []
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec is not None else ():
        found += sorted(map(str, Path(folder).glob("*/lib/libnvrtc.so.*")), reverse=True)
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home:
            found += sorted(map(str, Path(home).glob("lib64/libnvrtc.so.*")), reverse=True)
    system = ctypes.util.find_library("nvrtc")
    found = [path for path in found if "builtins" not in path and ".alt." not in path]
    return [*found, system] if system else found


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and Path(home, "bin", "nvcc").exists():
        return str(Path(home, "bin", "nvcc"))
    return shutil.which("nvcc")


def _by_nvrtc(library: ctypes.CDLL, text: str, arch: str) -> bytes:
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    created = library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"llmc.cu", 0, None, None)
    if created != 0:
        raise CompileError(f"NVRTC does not start (error {created})", remedy=_REMEDY)
    try:
        options = [f"--gpu-architecture={arch}".encode(), b"--std=c++17", b"-w"]
        given = (ctypes.c_char_p * len(options))(*options)
        if library.nvrtcCompileProgram(program, len(options), given) != 0:
            library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, log)
            raise _refused("NVRTC", arch, log.value.decode(errors="replace"))
        kind = "CUBIN" if arch.startswith("sm_") else "PTX"
        getattr(library, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        getattr(library, f"nvrtcGet{kind}")(program, code)
        return code.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _by_nvcc(nvcc: str, text: str, arch: str) -> bytes:
    with tempfile.TemporaryDirectory(prefix="llmc-cuda-") as folder:
        source, out = Path(folder, "llmc.cu"), Path(folder, "llmc.bin")
        source.write_text(text, encoding="utf-8")
        kind = "-cubin" if arch.startswith("sm_") else "-ptx"
        command = [nvcc, kind, f"-arch={arch}", "-std=c++17", "-w", "-o", str(out), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise _refused(nvcc, arch, done.stdout + done.stderr)
        return out.read_bytes()


def _refused(what: str, arch: str, log: str) -> CompileError:
    lines = [line for line in log.splitlines() if "error" in line.lower()] or log.splitlines()
    return CompileError(
        f"{what} does not compile the kernels for {arch}: {' '.join(lines[:3])}",
        remedy="leave that architecture out of --target tvm-cuda:arch=…, or install another CUDA version",
    )


# -- what is in a cubin ------------------------------------------------------------------------------------
_FRAME_SIZE, _REGISTERS = 0x11, 0x2F
_WITH_SIZE = 4  # an attribute that says how long it is; others have a value of two bytes


def resources(cubin: bytes) -> dict[str, Resources]:
    """Registers and stack of each kernel of a cubin.

    They stand in its section .nv.info, as (4, attribute, bytes, symbol, value) with little-endian words; an
    ELF file's sections and symbols: System V ABI, "Object Files".
    """
    header = struct.unpack_from("<QIHHHHHH", cubin, 40)
    table, count, names = header[0], header[6], header[7]
    size = header[5]
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + i * size) for i in range(count)]

    def name_at(section: int, offset: int) -> str:
        start = sections[section][4] + offset
        return cubin[start : cubin.index(b"\0", start)].decode()

    named = {name_at(names, s[0]): s for s in sections}
    symbols, info = named[".symtab"], named[".nv.info"]
    registers: dict[str, int] = {}
    stack: dict[str, int] = {}
    at, end = info[4], info[4] + info[5]
    while at < end:
        form, attribute, length = struct.unpack_from("<BBH", cubin, at)
        at += 4
        if form != _WITH_SIZE:
            continue
        if attribute in (_FRAME_SIZE, _REGISTERS):
            symbol, value = struct.unpack_from("<II", cubin, at)
            offset = struct.unpack_from("<I", cubin, symbols[4] + 24 * symbol)[0]
            (registers if attribute == _REGISTERS else stack)[name_at(symbols[6], offset)] = value
        at += length
    return {name: Resources(count, stack.get(name, 0)) for name, count in sorted(registers.items())}
