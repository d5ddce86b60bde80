"""What `elf` must know of a machine: its relocations, how an imported function is called, its pages.

Formats: AMD64 supplement of the System V ABI, section 4.4; "ELF for the Arm 64-bit Architecture (AArch64)",
section 5.7, and for the fields of instructions DDI 0487, chapter C6.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ...ir.errors import CompileError


def linking_failed(what: str) -> CompileError:
    """The error of a link."""
    return CompileError(f"linking kernels: {what}", remedy="report the model and the target options")


@dataclass(frozen=True)
class X86_64:
    """Places hold 32-bit distances; functions elsewhere are called through a jump over the offset table."""

    name: ClassVar[str] = "x86-64"
    number: ClassVar[int] = 62
    page: ClassVar[int] = 4096
    absolute: ClassVar[int] = 1  # R_X86_64_64
    global_data: ClassVar[int] = 6
    relative: ClassVar[int] = 8
    calls: ClassVar[frozenset[int]] = frozenset({2, 4})  # PC32, PLT32
    through_table: ClassVar[frozenset[int]] = frozenset({9, 41, 42})  # GOTPCREL and its relaxable forms
    stub_size: ClassVar[int] = 8

    @staticmethod
    def stub(at: int, slot: int) -> bytes:
        """Code at address `at` that jumps to where the slot at address `slot` points: jmp *slot(%rip)."""
        return b"\xff\x25" + struct.pack("<i", slot - (at + 6)) + b"\x66\x90"

    def apply(self, image: bytearray, place: int, kind: int, value: int) -> bool:
        """Write the address `value` into the field at `place`; False where the kind is not known."""
        if kind == 24:  # PC64
            struct.pack_into("<q", image, place, value - place)
        elif kind in self.calls or kind in self.through_table:
            struct.pack_into("<i", image, place, value - place)
        else:
            return False
        return True


_ADR_PAGE, _GOT_PAGE, _GOT_LOW = 275, 311, 312
_CALLS = frozenset({282, 283})  # JUMP26, CALL26
_LOW_BITS: Mapping[int, int] = {277: 0, 278: 0, 284: 1, 285: 2, 286: 3, 299: 4, _GOT_LOW: 3}
"""ADD_ABS_LO12_NC, LDST8 … LDST128_ABS_LO12_NC: the low 12 bits of an address, in units of 2^n bytes."""


@dataclass(frozen=True)
class Aarch64:
    """Instructions hold parts of addresses. Segments keep a distance that suits pages of 64 KiB."""

    name: ClassVar[str] = "aarch64"
    number: ClassVar[int] = 183
    page: ClassVar[int] = 65536
    absolute: ClassVar[int] = 257
    global_data: ClassVar[int] = 1025
    relative: ClassVar[int] = 1027
    calls: ClassVar[frozenset[int]] = _CALLS
    through_table: ClassVar[frozenset[int]] = frozenset({_GOT_PAGE, _GOT_LOW})
    stub_size: ClassVar[int] = 16

    @staticmethod
    def stub(at: int, slot: int) -> bytes:
        """Code at address `at` that jumps to where the slot at address `slot` points."""
        code = [0x90000010, 0xF9400211, 0xD61F0220, 0xD503201F]  # adrp x16; ldr x17, [x16]; br x17; nop
        code[0] |= _page_field(at, slot)
        code[1] |= (slot & 0xFFF) >> 3 << 10
        return struct.pack("<4I", *code)

    def apply(self, image: bytearray, place: int, kind: int, value: int) -> bool:
        """Write the address `value` into the field at `place`; False where the kind is not known."""
        if kind == 260:  # PREL64
            struct.pack_into("<q", image, place, value - place)
            return True
        if kind == 261:  # PREL32
            struct.pack_into("<i", image, place, value - place)
            return True
        if kind in _CALLS:
            bits = _signed(value - place, 28) >> 2
        elif kind in (_ADR_PAGE, _GOT_PAGE):
            bits = _page_field(place, value)
        elif kind in _LOW_BITS:
            unit = _LOW_BITS[kind]
            if value % (1 << unit):
                raise linking_failed(f"address {value:#x} is not aligned to {1 << unit} bytes")
            bits = (value & 0xFFF) >> unit << 10
        else:
            return False
        (code,) = struct.unpack_from("<I", image, place)
        struct.pack_into("<I", image, place, code | bits)
        return True


def _signed(value: int, bits: int) -> int:
    if not -(1 << (bits - 1)) <= value < 1 << (bits - 1):
        raise linking_failed(f"a distance of {value} bytes does not fit an instruction")
    return value & ((1 << bits) - 1)


def _page_field(place: int, value: int) -> int:
    """The distance in pages of 4 KiB, as ADRP has it: its low 2 bits at 29, the others at 5."""
    pages = _signed((value >> 12) - (place >> 12), 21)
    return (pages & 3) << 29 | pages >> 2 << 5


Machine = X86_64 | Aarch64
MACHINES: Mapping[int, Machine] = {machine.number: machine for machine in (X86_64(), Aarch64())}
"""ELF's e_machine → machine."""
