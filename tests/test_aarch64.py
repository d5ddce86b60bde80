"""Linking for aarch64: fields of instructions as the manual encodes them, and the shape of a library. That
libraries run is shown by test_isa_emulated.py.
"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from llmc.codegen.tvm.relocations import MACHINES, Aarch64
from llmc.ir.errors import CompileError

ADRP, ADD, LDR_X, LDR_Q, LDR_B, BL = 0x90000000, 0x91000000, 0xF9400000, 0x3DC00000, 0x39400000, 0x94000000


@pytest.mark.parametrize(
    ("kind", "code", "place", "value", "expected"),
    [
        (275, ADRP, 0x1FFC, 0x2345, 0xB0000000),  # one page on, wherever in it
        (275, ADRP, 0x2000, 0x1FFF, 0xF0FFFFE0),  # one page back
        (275, ADRP, 0x1000, 0x1000, 0x90000000),
        (275, ADRP, 0, 5 << 12, 0xB0000020),
        (277, ADD, 0, 0x5123, 0x91048C00),
        (278, LDR_B, 0, 0x5FFF, 0x397FFC00),
        (286, LDR_X, 0, 0x5008, 0xF9400400),
        (299, LDR_Q, 0, 0x5010, 0x3DC00400),
        (312, LDR_X, 0, 0x5FF8, 0xF947FC00),
        (283, BL, 0x1000, 0x1008, 0x94000002),
        (283, BL, 0x1000, 0x0FFC, 0x97FFFFFF),
        (261, 0, 0x1000, 0x0F00, 0xFFFFFF00),
    ],
)
def test_fields_of_instructions(kind: int, code: int, place: int, value: int, expected: int) -> None:
    image = bytearray(place + 8)
    struct.pack_into("<I", image, place, code)
    assert Aarch64().apply(image, place, kind, value)
    assert struct.unpack_from("<I", image, place) == (expected,)


def test_what_does_not_fit_is_an_error() -> None:
    image = bytearray(8)
    with pytest.raises(CompileError, match="not aligned to 16 bytes"):
        Aarch64().apply(image, 0, 299, 0x1008)
    for value in (1 << 27, -(1 << 27) - 4):
        with pytest.raises(CompileError, match="does not fit an instruction"):
            Aarch64().apply(image, 0, 283, value)
    with pytest.raises(CompileError, match="does not fit an instruction"):
        Aarch64().apply(image, 0, 275, 1 << 33)
    assert not Aarch64().apply(image, 0, 549, 0)  # of thread-local data


def test_a_stub_jumps_through_its_slot() -> None:
    adrp, load, branch, _ = struct.unpack("<4I", Aarch64.stub(0x11000, 0x23458))
    image = bytearray(struct.pack("<2I", ADRP | 16, LDR_X | 16 << 5 | 17))
    whole = bytearray(0x11000) + image
    Aarch64().apply(whole, 0x11000, 275, 0x23458)
    Aarch64().apply(whole, 0x11004, 286, 0x23458)
    assert (adrp, load) == struct.unpack_from("<2I", whole, 0x11000)
    assert branch == 0xD61F0220  # br x17


def test_a_library_is_laid_out_for_pages_of_64_kib(tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    from llmc.codegen.tvm.build import assemble, threads_text
    from llmc.codegen.tvm.elf import link

    step = """
        define i32 @llmc_step(ptr %dims, ptr %pointers) {
          %r = call i32 @call_packed(ptr @__tvm_ffi_workspace, ptr %dims, ptr %pointers)
          ret i32 %r
        }
        declare i32 @call_packed(ptr, ptr, ptr)
        define i32 @__tvm_ffi_workspace(ptr %self, ptr %args, i32 %count, ptr %result) {
          ret i32 -1
        }"""
    objects = [assemble(text, tmp_path, "aarch64") for text in (step, threads_text("aarch64"))]
    data = link(objects)
    assert data == link(objects)
    kind, machine = struct.unpack_from("<HH", data, 16)
    assert (kind, machine) == (3, 183) and MACHINES[machine].name == "aarch64"
    segments = [struct.unpack_from("<IIQQQQQQ", data, 64 + 56 * i) for i in range(3)]
    for type_, _, offset, address, *_, alignment in segments:
        assert type_ == 1 and alignment == 65536 and offset % alignment == address % alignment == 0
