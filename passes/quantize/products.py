"""Matrix products from bfloat16 factors, summed in float32: two to three times as fast on CPUs that have
instructions for them (AMX, AVX512-BF16, Neoverse).

Only where many products are averaged. A factor rounded to 8 bits is off by up to 2⁻⁹ of its size at random: a
Hessian of such inputs x (1 + ε) is positive semidefinite as ever, and its diagonal off by 2⁻¹⁸ of itself or
less, where `gptq.DAMPING` adds far more.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any


@contextmanager
def short_factors() -> Generator[None]:
    """While inside, torch multiplies float32 matrices that way where the CPU is the faster for it; elsewhere
    nothing changes.
    """
    from torch.backends import mkldnn

    backend: Any = mkldnn  # torch declares no type for its matmul
    matmul = backend.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
