"""Instruction-set levels: which are compiled, which one a machine takes, what stands in their libraries."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from llmc.codegen.tvm import cpu as target
from llmc.codegen.tvm.cpu import TvmCpu
from llmc.codegen.tvm.kernels.codebook import make_codebook_linear
from llmc.codegen.tvm.kernels.isa import LEVELS, Isa, get_isa
from llmc.codegen.tvm.kernels.quantized import make_quantized_linear
from llmc.ir.errors import ArtifactError, CompileError, InputError
from llmc.runtime import cpu
from llmc.runtime.executor import choose_isa

HASWELL = "fpu sse4_2 avx avx2 fma f16c bmi1 bmi2 movbe abm"
ALDER_LAKE = HASWELL + " avx_vnni"
CASCADE_LAKE = HASWELL + " avx512f avx512bw avx512cd avx512dq avx512vl avx512_vnni"
ZEN_5 = CASCADE_LAKE + " avx_vnni avx512_bf16 sse4a"
SAPPHIRE_RAPIDS_WITHOUT_TILES = CASCADE_LAKE + " avx_vnni avx512_bf16"
SAPPHIRE_RAPIDS = SAPPHIRE_RAPIDS_WITHOUT_TILES + " amx_bf16 amx_tile amx_int8"
RASPBERRY_PI_4 = "fp asimd evtstrm crc32 cpuid"
GRAVITON_2 = (
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
)
GRAVITON_3 = GRAVITON_2 + " sve i8mm bf16"

ALL = [{"isa": level, "path": f"{level}.so"} for level in reversed(LEVELS)]


@pytest.mark.parametrize(
    ("machine", "flags", "best"),
    [
        ("x86_64", "fpu sse2", "generic"),
        ("x86_64", HASWELL, "avx2"),
        ("x86_64", ALDER_LAKE, "avxvnni"),
        ("x86_64", CASCADE_LAKE, "avx512vnni"),
        ("x86_64", ZEN_5, "zen4"),
        ("x86_64", SAPPHIRE_RAPIDS_WITHOUT_TILES, "avx512vnni"),
        ("x86_64", SAPPHIRE_RAPIDS, "amx"),
        ("aarch64", GRAVITON_2, "neon"),
        ("aarch64", GRAVITON_3, "i8mm"),
    ],
)
def test_of_all_levels_the_best_is_taken(
    machine: str, flags: str, best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "cpu_features", lambda: frozenset(flags.split()))
    monkeypatch.setattr(cpu.platform, "machine", lambda: machine)
    monkeypatch.setattr(cpu, "may_use_tiles", lambda: True)
    assert choose_isa(ALL) == best == cpu.best_isa()
    # What is masked is not taken, and a level of the other architecture never is.
    for level in cpu.supported_isas():
        assert cpu.ISA_MACHINES[level] == machine
    assert choose_isa([{"isa": level} for level in cpu.supported_isas()[:1]]) == cpu.supported_isas()[0]


def test_a_machine_without_a_level_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "cpu_features", lambda: frozenset(RASPBERRY_PI_4.split()))
    monkeypatch.setattr(cpu.platform, "machine", lambda: "aarch64")
    assert cpu.supported_isas() == [] and cpu.best_isa() is None
    with pytest.raises(ArtifactError, match="this CPU runs none") as caught:
        choose_isa(ALL)
    assert caught.value.remedy == "compile it with --target onnx-cpu"


def test_names_of_levels() -> None:
    assert TvmCpu(isa="all").levels() == tuple(LEVELS) == cpu.ISA_LEVELS
    assert TvmCpu(isa="i8mm+avx2").levels() == ("avx2", "i8mm")
    for wrong in ("avx3", "all+avx2", "", "avx2+"):
        with pytest.raises(InputError, match="no instruction-set level") as caught:
            TvmCpu(isa=wrong)
        assert "isa=all" in caught.value.remedy
    for isa in LEVELS.values():
        assert cpu.ISA_MACHINES[isa.name] == isa.machine


@pytest.mark.parametrize(
    ("best", "default", "usual"),
    [
        ("avx512vnni", "avx2+avx512vnni", "avx2+avx512vnni+amx"),  # the same bytes on most machines
        ("avxvnni", "avx2+avxvnni", "avx2+avxvnni+avx512vnni+amx"),
        ("generic", "generic+avx2", "generic+avx2+avx512vnni+amx"),
        ("zen4", "avx2+zen4", "avx2+avx512vnni+zen4+amx"),
        ("avx2", "avx2", "avx2+avx512vnni+amx"),
    ],
)
def test_levels_of_this_machine_and_of_others(
    best: str, default: str, usual: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "best_isa", lambda: best)
    monkeypatch.setattr(target, "_BASELINE", ("avx2",))
    monkeypatch.setattr(target, "_USUAL", ("avx2", "avx512vnni", "amx"))
    assert TvmCpu().options()["isa"] == default and str(TvmCpu()) == "tvm-cpu"
    assert TvmCpu(isa="usual").options()["isa"] == usual
    assert TvmCpu(isa="baseline").levels() == ("avx2",)
    native = TvmCpu(isa="native")
    assert native.levels() == (best,) and native.options()["isa"] == best
    assert str(native) == "tvm-cpu:isa=native"
    assert TvmCpu(isa="native+i8mm").levels() == (best, "i8mm")


def test_a_machine_without_a_level_is_told_before_anything_is_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(target, "best_isa", lambda: None)
    for isa in ("usual", "native", "native+baseline"):
        with pytest.raises(InputError, match="no instruction-set level for this machine"):
            TvmCpu(isa=isa)
    assert TvmCpu(isa="neon").levels() == ("neon",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"machine": "vax"}, "makes no code for vax, which level avx2 is for"),
        ({"mattr": ("+avx2", "+avx9", "+warp")}, "does not know avx9, warp, which level avx2 needs"),
    ],
)
def test_what_llvm_cannot_target_is_refused(change: dict[str, Any], message: str) -> None:
    pytest.importorskip("tvm")
    from llmc.codegen.tvm.backends import require

    for isa in LEVELS.values():
        require(isa)
    with pytest.raises(CompileError, match=message) as caught:
        require(replace(get_isa("avx2"), **change))
    assert "leave that level out" in caught.value.remedy


def _assembly(maker: Any, isa: str, **parameters: Any) -> str:
    from .kernel_harness import compiled

    return compiled(maker(**parameters, isa=isa), isa).inspect_source("asm")


@pytest.mark.parametrize(
    ("isa", "bits", "wanted", "unwanted"),
    [
        ("neon", 4, r"sdot\s+v\d+\.4s, v\d+\.16b, v\d+\.(16b|4b\[\d\])", "usdot|mmla"),
        ("neon", 8, r"\bsdot\s+v\d+\.4s", "usdot|mmla"),
        ("i8mm", 4, r"\busmmla\s+v\d+\.4s", "usdot"),
        ("i8mm", 8, r"\busmmla\s+v\d+\.4s", r"\bsdot"),
        ("i8mm", 8, r"\busdot\s+v\d+\.4s", r"\bsdot"),  # below 16 rows
    ],
)
def test_arm_multiplies_bytes_with_dot_products(isa: str, bits: int, wanted: str, unwanted: str) -> None:
    """Assembled on any machine."""
    assembly = _assembly(make_quantized_linear, isa, n=32, k=64, bits=bits, group_size=64)
    assert re.search(wanted, assembly)
    assert not re.search(unwanted, assembly)
    # Nothing of the compiler's library, which is not linked, and no scalable vectors.
    assert not re.search(r"\bbl\s+__(?!tvm|TVM)|\bptrue\s", assembly)


def test_arm_looks_codes_up_in_registers() -> None:
    parameters = {"n": 32, "k": 64, "bits": 4, "group_size": 32}
    floats = _assembly(make_codebook_linear, "neon", **parameters, codebook="nf4")
    assert re.search(r"tbl\s+v\d+\.16b, \{ ?v\d+\.16b, v\d+\.16b, v\d+\.16b, v\d+\.16b ?\}", floats)
    integers = _assembly(make_quantized_linear, "neon", **parameters, codebook="iq4_nl")
    assert re.search(r"tbl\s+v\d+\.16b, \{ ?v\d+\.16b ?\}", integers)


# What later x86-64 have and AVX2 has not: wide and upper registers, masks, tiles, and VEX or EVEX forms that
# came after it.
_BEYOND = re.compile(r"%(zmm|tmm|k[0-7]\b|[xy]mm(1[6-9]|[23]\d))|\b(vpdp|tdp|vp?ternlog|vgf2p8|vpopcnt)")


@pytest.mark.slow
def test_the_avx2_library_holds_nothing_beyond_avx2(tmp_path: Path) -> None:
    from .test_tvm_model import Model

    artifact = Model(quantized=True).compile(tmp_path / "m.llmc", "avx2+avx512vnni")
    found: dict[str, bool] = {}
    for kernel in artifact.target("tvm-cpu")["kernels"]:
        found[kernel["isa"]] = bool(_BEYOND.search(_disassembled(artifact.path(kernel["path"]))))
    assert found == {"avx2": False, "avx512vnni": True}  # the pattern finds what it should where it is


def _disassembled(library: Path) -> str:
    """The instructions of the library's executable segment; it has no sections that a disassembler knows."""
    import shutil
    import struct

    program = shutil.which("objdump")
    if program is None:
        pytest.skip("needs objdump (Debian: apt-get install binutils)")
    data = library.read_bytes()
    (at,) = struct.unpack_from("<Q", data, 32)
    headers = [struct.unpack_from("<IIQQQQQQ", data, at + 56 * i) for i in range(6)]
    (code,) = [h for h in headers if h[0] == 1 and h[1] & 1]
    raw = library.with_suffix(".code")
    raw.write_bytes(data[code[2] : code[2] + code[5]])
    command = [program, "-D", "-b", "binary", "-m", "i386:x86-64", str(raw)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_levels_differ_in_what_they_may_use() -> None:
    """No level asks a processor for less than LLVM is told."""
    known = {"neon": "asimd", "dotprod": "asimddp", "avx512vnni": "avx512_vnni", "avxvnni": "avx_vnni"}
    known |= {"avx512bf16": "avx512_bf16"}
    for isa in LEVELS.values():
        told = {name[1:] for name in isa.mattr}
        flags = {known.get(name, name.replace("-", "_")) for name in told}
        assert flags <= cpu.ISA_FLAGS[isa.name], isa.name
    assert isinstance(get_isa("neon"), Isa)
