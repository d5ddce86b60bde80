"""IR graph → program of WGSL kernels: tvm-cuda's emitters over the kernels of `kernels.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..gpu.lower import CudaLowering
from ..gpu.program import Language
from ..gpu.source import Code
from .generic import wgsl_generic, width_of
from .kernels import make
from .text import wgsl_text


class WgslLowering(CudaLowering):
    target = "tvm-webgpu"

    def make(self, name: str, static: Mapping[str, Any]) -> Code:
        """See `CudaLowering.make`."""
        return make(name, static)


WGSL = Language({"kind": "webgpu", "max_num_threads": 256}, WgslLowering, wgsl_generic, wgsl_text, width_of)
