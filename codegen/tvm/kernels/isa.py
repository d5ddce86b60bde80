"""Instruction-set levels that kernels are built for: what LLVM is told, and what a kernel may count on.

The names are those of `llmc.runtime.cpu.ISA_LEVELS`; the features told to LLVM are exactly those that the
runtime asks the processor for, since LLVM aborts the process on an intrinsic that the target lacks, and picks
instructions (`gf2p8affineqb` for a shift of bytes) that a more specific `mcpu` has and another processor of
the level has not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ....ir.errors import InputError


def triple(machine: str) -> str:
    """LLVM's name of an architecture with its operating system."""
    return f"{machine}-unknown-linux-gnu"


@dataclass(frozen=True)
class Isa:
    """One level.

    Vectors in the kernels are 16 lanes everywhere; LLVM splits them to the width of the machine.
    """

    name: str
    mcpu: str
    mattr: tuple[str, ...]
    vector_bits: int
    """Width of a vector register."""
    registers: int
    """Number of vector registers."""
    fma: bool
    """Fused multiply-add; without it a product is rounded before it is added."""
    half: bool
    """Conversion between float16 and float32 in hardware."""
    dot: str
    """How 4 uint8 × int8 products are added to an int32: "vnni512", "vnni256", "maddubs", "plain", or with
    Arm's "usdot" or "sdot", which has no product of mixed signs.
    """
    tiles: bool = False
    """AMX: products of 16 rows by 16 columns, of bytes or of bfloat16, in tile registers."""
    bfloat: bool = False
    """Whether products of two pairs of bfloat16 are one instruction, in half the time of multiply-adds."""
    spare_units: bool = False
    """Whether vector units that do not multiply stand beside those that do: what spreads halves of bytes to
    bytes, a shift and masks, then takes no time from products.
    """
    fetched_to: int = 1
    """The cache that what will be read is fetched to. The nearest one waits for few lines at a time (on Zen
    4 some 24, which is 12 GB/s where memory takes 120 ns), the second one for more.
    """
    machine: str = "x86_64"
    """The architecture, as LLVM's triples and Linux name it."""

    @property
    def target(self) -> dict[str, Any]:
        """The target for `tvm.target.Target`."""
        return {"kind": "llvm", "mtriple": triple(self.machine), "mcpu": self.mcpu, "mattr": list(self.mattr)}

    @property
    def arm(self) -> bool:
        """Whether a level is of aarch64, whose vectors have 128 bits."""
        return self.machine == "aarch64"

    @property
    def pairs_rows(self) -> bool:
        """Whether products of two rows and two columns by 8 bytes are one instruction (`llmc_mmla`)."""
        return self.dot == "usdot"

    @property
    def dot8_takes(self) -> int:
        """What `llmc_dot8` takes off each byte of weights, which the products of the level want signed."""
        return 128 if self.dot in ("maddubs", "sdot") else 0

    @property
    def live_vectors(self) -> int:
        """16-lane float32 vectors that fit into the registers."""
        return self.registers * self.vector_bits // 512


LEVELS = {
    isa.name: isa
    for isa in (
        Isa("generic", "x86-64", (), 128, 16, False, False, "plain"),
        Isa("avx2", "x86-64-v3", (), 256, 16, True, True, "maddubs"),
        Isa("avxvnni", "x86-64-v3", ("+avxvnni",), 256, 16, True, True, "vnni256"),
        Isa("avx512vnni", "x86-64-v4", ("+avx512vnni",), 512, 32, True, True, "vnni512"),
        Isa(
            "zen4",
            "x86-64-v4",
            ("+avx512vnni", "+avx512bf16", "+sse4a"),
            512,
            32,
            True,
            True,
            "vnni512",
            bfloat=True,
            spare_units=True,
            fetched_to=2,
        ),
        Isa(
            "amx",
            "x86-64-v4",
            ("+avx512vnni", "+avx512bf16", "+amx-tile", "+amx-int8", "+amx-bf16"),
            512,
            32,
            True,
            True,
            "vnni512",
            tiles=True,
        ),
        Isa("neon", "generic", ("+neon", "+dotprod"), 128, 32, True, True, "sdot", machine="aarch64"),
        Isa(
            "i8mm", "generic", ("+neon", "+dotprod", "+i8mm"), 128, 32, True, True, "usdot", machine="aarch64"
        ),
    )
}


def get_isa(name: str) -> Isa:
    """The level of that name. Raises InputError naming the levels there are."""
    if name not in LEVELS:
        raise InputError(f"no instruction-set level is named {name!r}", remedy=f"one of {', '.join(LEVELS)}")
    return LEVELS[name]
