"""A kernel is called with what it declares, or the graph does not compile: TVM compares neither."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from llmc.codegen.tvm.gpu.lower import CudaLowering
from llmc.codegen.tvm.kernels import make_layer_norm
from llmc.codegen.tvm.kernels.isa import get_isa
from llmc.codegen.tvm.lower import Lowering
from llmc.codegen.tvm.untyped import relax
from llmc.ir.core import Graph
from llmc.ir.errors import CompileError
from llmc.ir.ops import nn
from llmc.ir.types import TensorType, sym
from llmc.ir.weights import ArrayTensor


@pytest.mark.parametrize("target", ["tvm-cpu", "tvm-cuda"])
def test_an_operand_of_16_bits_that_no_pass_widened(target: str) -> None:
    graph = Graph()
    x = graph.add_input("x", TensorType("float32", (sym("T"), 8)))
    weight, bias = (
        graph.add_weight(name, ArrayTensor(np.ones(8, ml_dtypes.bfloat16), name)) for name in ("w", "b")
    )
    graph.outputs, graph.output_names = [graph.append(nn.LayerNorm(x, weight, bias, eps=1e-5)).result], ["y"]
    lowering = CudaLowering(graph) if target == "tvm-cuda" else Lowering(graph, get_isa("avx2"))
    with pytest.raises(
        CompileError, match=r"its buffer \w+ as float32\[8\], and is called with bfloat16\[8\]"
    ):
        lowering.run()


def test_operands_of_other_extents_ranks_or_number() -> None:
    lowering = Lowering(Graph(), get_isa("avx2"))
    rows, weight = lowering.tensor([4, 16], "float32"), lowering.tensor([16], "float32")

    def call(*types: Any, out: Any = rows) -> Any:
        args = [relax.Var(f"x{i}", type) for i, type in enumerate(types)]
        static = {"width": 16, "eps": 1e-5, "bias": False}
        return lowering.kernel("layer_norm", make_layer_norm, static, args, out)

    with lowering.builder.function("main", []):
        with lowering.builder.dataflow():
            call(rows, weight)
            for operands in ((rows, lowering.tensor([8], "float32")), (rows, rows), (rows,)):
                with pytest.raises(CompileError, match="the kernel layer_norm declares"):
                    call(*operands)
            with pytest.raises(CompileError, match=r"out as float32\[\w+, 16\], .* with float32\[4, 8\]"):
                call(rows, weight, out=lowering.tensor([4, 8], "float32"))
        lowering.builder.emit_func_output(relax.Tuple([]))
