"""The plugin API of llmc: everything that another package may build on. docs/plugins.md is the guide.

    from llmc.plugins import Pass, PassContext, PassResult, Graph

Names that are listed here keep their meaning within a major number of `API_VERSION`; whatever else llmc holds
may change any day. Importing this module imports nothing else: each name loads what it needs on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .version import API_VERSION, is_compatible

if TYPE_CHECKING:
    from ..codegen.artifact import Artifact as Artifact
    from ..codegen.artifact import ArtifactWriter as ArtifactWriter
    from ..codegen.legalize import Builder as Builder
    from ..codegen.legalize import decomposes as decomposes
    from ..codegen.legalize import legalize as legalize
    from ..codegen.target import Progress as Progress
    from ..codegen.target import Target as Target
    from ..frontend.aten_table import aten as aten
    from ..frontend.aten_table import registered as torch_operator  # noqa: F401  # pyright: ignore[reportUnusedImport]  (exported)
    from ..frontend.importer import Importer as Importer
    from ..frontend.source import ModelSource as ModelSource
    from ..ir import ops as ops
    from ..ir.core import Graph as Graph
    from ..ir.core import Op as Op
    from ..ir.core import Value as Value
    from ..ir.define import Operand as Operand
    from ..ir.define import Operands as Operands
    from ..ir.define import OptionalOperand as OptionalOperand
    from ..ir.define import op as op
    from ..ir.errors import CompileError as CompileError
    from ..ir.errors import InputError as InputError
    from ..ir.errors import LlmcError as LlmcError
    from ..ir.errors import UnsupportedError as UnsupportedError
    from ..ir.errors import VerifyError as VerifyError
    from ..ir.interpreter import run as run_graph  # noqa: F401  # pyright: ignore[reportUnusedImport]  (exported)
    from ..ir.parser import parse as parse_graph  # noqa: F401  # pyright: ignore[reportUnusedImport]  (exported)
    from ..ir.printer import print_graph as print_graph
    from ..ir.rewriter import Any as AnyValue  # noqa: F401  # pyright: ignore[reportUnusedImport]  (exported)
    from ..ir.rewriter import Const as Const
    from ..ir.rewriter import Match as Match
    from ..ir.rewriter import Or as Or
    from ..ir.rewriter import P as P
    from ..ir.rewriter import Rewriter as Rewriter
    from ..ir.rewriter import Rule as Rule
    from ..ir.rewriter import Weight as Weight
    from ..ir.rewriter import single_use as single_use
    from ..ir.types import Quantization as Quantization
    from ..ir.types import TensorType as TensorType
    from ..ir.types import sym as sym
    from ..ir.verifier import verify as verify
    from ..ir.weights import ArrayTensor as ArrayTensor
    from ..ir.weights import LazyTensor as LazyTensor
    from ..ir.weights import read_chunks as read_chunks
    from ..passes.base import Pass as Pass
    from ..passes.base import PassContext as PassContext
    from ..passes.base import PassResult as PassResult
    from ..passes.base import RulePass as RulePass
    from ..passes.calibration import Calibration as Calibration
    from ..passes.quantize.attach import attach_quantized as attach_quantized
    from ..passes.quantize.attach import is_head as is_head
    from ..passes.quantize.attach import is_quantizable as is_quantizable
    from ..passes.quantize.by_rows import QuantizedRows as QuantizedRows
    from ..passes.quantize.by_rows import quantize_by_rows as quantize_by_rows
    from ..passes.registry import Quantizer as Quantizer
    from ..runtime.custom_sampler import Sampler as Sampler
    from ..runtime.custom_sampler import SamplerContext as SamplerContext
    from ..runtime.executor.base import Executor as Executor
    from ..runtime.executor.base import StepInputs as StepInputs
    from ..runtime.tokenizer import Tokenizer as Tokenizer
    from ..runtime.tool_calls.base import CallArguments as CallArguments
    from ..runtime.tool_calls.base import CallBegin as CallBegin
    from ..runtime.tool_calls.base import CallParser as CallParser
    from ..runtime.tool_calls.base import Content as Content
    from ..runtime.tool_calls.base import Event as Event
    from ..runtime.tool_calls.base import TokenIds as TokenIds
    from ..runtime.tool_calls.base import Tool as Tool
    from ..runtime.tool_calls.base import ToolCall as ToolCall
    from ..runtime.tool_calls.base import ToolFormat as ToolFormat
    from ..runtime.tool_calls.base import new_call_id as new_call_id
    from ..runtime.tools.function import tool as tool

_CORE = {
    "ir.core": "Graph Op Value",
    "ir.define": "Operand Operands OptionalOperand op",
    "ir.errors": "CompileError InputError LlmcError UnsupportedError VerifyError",
    "ir.printer": "print_graph",
    "ir.rewriter": "Const Match Or P Rewriter Rule Weight single_use",
    "ir.types": "Quantization TensorType sym",
    "ir.verifier": "verify",
    "ir.weights": "ArrayTensor LazyTensor read_chunks",
    "passes.base": "Pass PassContext PassResult RulePass",
    "passes.calibration": "Calibration",
    "passes.quantize.attach": "attach_quantized is_quantizable",
    "passes.quantize.by_rows": "QuantizedRows quantize_by_rows",
    "passes.quantize.walk": "is_head",
    "passes.registry": "Quantizer",
    "codegen.artifact": "Artifact ArtifactWriter",
    "codegen.legalize": "Builder decomposes legalize",
    "codegen.target": "Progress Target",
    "frontend.aten_table": "aten",
    "frontend.importer": "Importer",
    "frontend.source": "ModelSource",
    "runtime.custom_sampler": "Sampler SamplerContext",
    "runtime.executor.base": "Executor StepInputs",
    "runtime.tokenizer": "Tokenizer",
    "runtime.tool_calls.base": "CallArguments CallBegin CallParser Content Event TokenIds Tool ToolCall "
    "ToolFormat new_call_id",
    "runtime.tools.function": "tool",
}
_LAZY = {name: (module, name) for module, names in _CORE.items() for name in names.split()} | {
    "AnyValue": ("ir.rewriter", "Any"),  # beside typing.Any one would have to rename it anyway
    "parse_graph": ("ir.parser", "parse"),
    "run_graph": ("ir.interpreter", "run"),
    "torch_operator": ("frontend.aten_table", "registered"),
}

__all__ = ["API_VERSION", "is_compatible", "ops", *sorted(_LAZY)]  # pyright: ignore[reportUnsupportedDunderAll]  (loaded on first use)


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("..ir.ops", __name__)
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    value = getattr(importlib.import_module(f"..{module}", __name__), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
