"""Tables of the values that a code stands for, where codes are no evenly spaced grid.

A weight with `Quantization.codebook` is scale · TABLE[q]. Values are those of the float32 tables that the
formats' own readers multiply by.

    nf4      normal float 4: quantiles of a normal distribution, scaled to ±1 (Dettmers et al. 2023,
             "QLoRA", appendix E); the numbers are those of bitsandbytes
             (https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/functional.py)
    iq4_nl   GGML's non-linear 4-bit values, integers, of IQ4_NL and IQ4_XS
             (https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h, `kvalues_iq4nl`)
    iq2      GGML's magnitudes of IQ2_XXS, IQ2_XS and IQ2_S with their signs: six values, in the first places
    iq3_xxs, iq3_s
             those of IQ3_XXS and of IQ3_S
    iq1_m    eight times the values of IQ1_M, -1, 0 and 1, moved by an eighth up or down: six integers
    mxfp4    twice the values of a float with 2 bits of exponent and 1 of mantissa, integers (OCP Microscaling
             Formats 1.0, section 5.3.3), in ascending order: 0 stands twice
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import CompileError

CODEBOOKS: dict[str, tuple[float, ...]] = {
    "nf4": (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    "iq4_nl": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
    "iq2": (-43, -25, -8, 8, 25, *(43,) * 11),
    "iq3_xxs": (-62, -52, -44, -36, -28, -20, -12, -4, 4, 12, 20, 28, 36, 44, 52, 62),
    "iq1_m": (-9, -7, -1, 1, 7, *(9,) * 11),
    "iq3_s": tuple(range(-15, 16, 2)),
    "mxfp4": (-12, -8, -6, -4, -3, -2, -1, 0, 0, 1, 2, 3, 4, 6, 8, 12),
}
"""Name → 16 values in ascending order."""
E2M1_PLACES: np.ndarray[Any, Any] = np.array([*range(8, 16), *range(7, -1, -1)], np.uint8)
"""Where the table "mxfp4" has a float E2M1: a sign bit and a magnitude of three bits → the code."""


def codebook(name: str) -> np.ndarray[Any, Any]:
    """The table of a codebook, float32 [16]. Raises CompileError for a name that is not in `CODEBOOKS`."""
    if name not in CODEBOOKS:
        raise CompileError(f"no codebook is named {name!r}", remedy=f"one of {', '.join(sorted(CODEBOOKS))}")
    return np.array(CODEBOOKS[name], dtype=np.float32)
