"""A model → `ir.Graph`, by torch.export on the meta device.

Weights are never loaded: parameters are meta tensors and become lazy weights of the graph by name. The token
count is the symbol "T". The traced function is the plain forward pass of one sequence without a cache: ids
[1, T] → logits [1, T, V] (or hidden states of an encoder); the cache comes later, by a pass.
"""

from __future__ import annotations

import contextlib
import operator
import warnings
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..ir.core import Graph, Op, Value
from ..ir.errors import CompileError, InputError, UnsupportedError
from ..ir.ops.math import Cast
from ..ir.ops.shape import DimValue, Full
from ..ir.types import Dim, DimExpr, Shape, TensorType, sym
from ..ir.weights import ArrayTensor, LazyTensor, ShapeOnlyTensor
from . import aten

if TYPE_CHECKING:
    import torch

    from .source import ModelSource


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Importer:
    """Turns the nodes of an exported program into ops. Handlers of `aten.TABLE` see this object."""

    def __init__(self, graph: Graph, symbols: dict[str, str]) -> None:
        self.graph = graph
        self.symbols = symbols  # torch's symbol → ours
        self.values: dict[Any, Any] = {}
        self.node: Any = None

    # -- what handlers use
    # -----------------------------------------------------------------------------------------------
    def emit(self, op: Op) -> Value:
        op.loc = op.loc or self.location()
        self.graph.append(op)
        return op.result

    def scalar(self, value: Any, dtype: str) -> Value:
        if isinstance(value, DimExpr):
            return self.emit(DimValue(dim=value, dtype=dtype))
        number: float | int | bool = (
            float(value)
            if dtype.startswith(("float", "bfloat"))
            else bool(value)
            if dtype == "bool"
            else int(value)
        )
        return self.emit(Full(value=number, dtype=dtype))

    def cast(self, x: Value, dtype: str) -> Value:
        return x if x.dtype == dtype else self.emit(Cast(x, dtype=dtype))

    def promote(self, a: Any, b: Any) -> tuple[Value, Value]:
        """Two operands (values, numbers or dimensions) in one dtype by torch's rules; numbers take the
        tensor's kind.
        """
        import torch

        def kind(v: Any) -> Any:
            return (
                torch.empty((1,) if v.type.rank else (), dtype=getattr(torch, v.dtype))
                if isinstance(v, Value)
                else (1 if isinstance(v, DimExpr) else v)
            )

        dtype = dtype_name(torch.result_type(kind(a), kind(b)))
        left = self.cast(a, dtype) if isinstance(a, Value) else self.scalar(a, dtype)
        right = self.cast(b, dtype) if isinstance(b, Value) else self.scalar(b, dtype)
        return left, right

    def axis(self, axis: int, x: Value) -> int:
        """A negative axis."""
        return axis if axis < 0 else axis - max(x.type.rank, 1)

    def result_shapes(self) -> list[Shape]:
        value = self.node.meta["val"]
        return [
            tuple(self.dim(d) for d in v.shape)
            for v in (value if isinstance(value, (list, tuple)) else [value])
        ]

    def result_shape(self) -> Shape:
        return self.result_shapes()[0]

    def result_dtype(self) -> str:
        value = self.node.meta["val"]
        return dtype_name((value[0] if isinstance(value, (list, tuple)) else value).dtype)

    def unsupported(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"{what} in {self.location() or 'the model'} is not supported", remedy="report the model"
        )

    # -- torch's objects → ours
    # --------------------------------------------------------------------------------------------
    def location(self) -> str:
        stack = self.node.meta.get("nn_module_stack") if self.node is not None else None
        if not stack:
            return ""
        path = str(list(stack.values())[-1][0])
        return path.removeprefix("L['self']").lstrip(".").removeprefix("model_.").removeprefix("model_")

    def dim(self, d: Any) -> Dim:
        if isinstance(d, int):
            return d
        return self.expression(d.node.expr)

    def expression(self, e: Any) -> Dim:
        if e.is_Integer:
            return int(e)
        if e.is_Symbol:
            return sym(self.symbols.setdefault(str(e), "T" if not self.symbols else f"T{len(self.symbols)}"))
        if e.is_Add or e.is_Mul:
            parts = [self.expression(a) for a in e.args]
            total = parts[0]
            for p in parts[1:]:
                total = total + p if e.is_Add else total * p
            return total
        if e.is_Pow and e.args[1].is_Integer and int(e.args[1]) > 0:
            base = self.expression(e.args[0])
            total = base
            for _ in range(int(e.args[1]) - 1):
                total = total * base
            return total
        raise UnsupportedError(
            f"the size {e} in {self.location() or 'the model'} is no polynomial of the token count",
            remedy="report the model",
        )

    def argument(self, a: Any) -> Any:
        import torch

        if isinstance(a, torch.fx.Node):
            if a in self.values:
                return self.values[a]
            return self.dim(a.meta["val"]) if not isinstance(a.meta["val"], (float, bool)) else a.meta["val"]
        if isinstance(a, (list, tuple)):
            return [self.argument(x) for x in a]
        if isinstance(a, torch.SymInt):
            return self.dim(a)
        return a

    def run_node(self, node: Any) -> None:
        import torch

        self.node = node
        if node.target is operator.getitem:
            source, index = node.args
            self.values[node] = self.values[source][index]
            return
        value = node.meta.get("val")
        if isinstance(value, (torch.SymInt, torch.SymBool, torch.SymFloat, int, bool, float)):
            return  # sizes: read from their meta value where they are used
        name = str(node.target)
        if not name.startswith("aten."):
            raise self.unsupported(f"operator {name}")
        handler = aten.lookup(name.removeprefix("aten."), self.location())
        kwargs = {
            k: self.argument(v)
            for k, v in node.kwargs.items()
            if k not in ("device", "layout", "pin_memory", "memory_format", "dtype", "non_blocking")
        }
        if "dtype" in node.kwargs and node.kwargs["dtype"] is not None and "softmax" in name:
            kwargs["dtype"] = node.kwargs["dtype"]
        self.values[node] = handler(self, *[self.argument(a) for a in node.args], **kwargs)


def _import_program(
    program: Any, graph: Graph, inputs: Sequence[str], weights: Mapping[str, LazyTensor], prefix: str
) -> None:
    """Fill `graph` from an ExportedProgram; `weights` by names of parameters, buffers and constants."""
    importer = Importer(graph, {})
    signature = program.graph_signature
    held = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    names = iter(inputs)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            importer.node = node
            if node.name in held:
                name = held[node.name].removeprefix(prefix)
                if not node.users:
                    continue
                if name not in weights:
                    raise InputError(
                        f"the model has no tensor {name}",
                        remedy="the checkpoint is incomplete; download it again",
                    )
                importer.values[node] = graph.add_weight(name, weights[name])
                expected = importer.result_shape()
                if tuple(weights[name].shape) != expected:
                    raise InputError(
                        f"tensor {name} ({weights[name].source}) has shape {list(weights[name].shape)}, "
                        f"the configuration asks for {list(expected)}",
                        remedy="config and weights are of different models",
                    )
            else:
                importer.values[node] = graph.add_input(
                    next(names), TensorType(importer.result_dtype(), importer.result_shape())
                )
        elif node.op == "call_function":
            importer.run_node(node)
        elif node.op == "output":
            flat = node.args[0]
            outputs = [importer.values[n] for n in flat if n is not None]
            graph.outputs = outputs
        else:
            raise UnsupportedError(f"the exported program holds a {node.op} node", remedy="report the model")


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _export(module: torch.nn.Module, args: tuple[Any, ...], shapes: Any, name: str) -> Any:
    import torch

    try:
        with _quiet(), torch.no_grad():
            return torch.export.export(module, args, dynamic_shapes=shapes, strict=False)
    except Exception as e:  # torch.export raises many kinds; all mean that the module cannot be traced
        first = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise UnsupportedError(
            f"{name} cannot be traced: {first[:300]}", remedy="control flow must not depend on tensor values"
        ) from e


def _buffers(module: torch.nn.Module) -> dict[str, LazyTensor]:
    """The real values of a model's buffers (rotary frequencies above all), taken before it moves to the meta
    device.
    """
    return {
        name: ArrayTensor(b.detach().cpu().numpy().copy(), f"buffer:{name}")
        for name, b in module.named_buffers(remove_duplicate=False)
        if not b.is_meta
    }


def _shapes(module: torch.nn.Module) -> dict[str, LazyTensor]:
    """Stand-ins for weights that were not opened: `llmc check` needs their shapes only."""
    return {n: ShapeOnlyTensor(tuple(p.shape), dtype_name(p.dtype), n) for n, p in module.named_parameters()}


def _aliases(module: torch.nn.Module, weights: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Tied parameters: every name of a parameter object that any of its names has data for."""
    by_object: dict[int, list[str]] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        by_object.setdefault(id(p), []).append(name)
    out: dict[str, LazyTensor] = {}
    for names in by_object.values():
        data = next((weights[n] for n in names if n in weights), None)
        if data is not None:
            out.update(dict.fromkeys(names, data))
    return out


def trace_source(source: ModelSource) -> Graph:
    """The traced graph of a published language model.

    Result: input "input_ids" int64 [1, T]; output "logits" [1, T, V], or "hidden" [1, T, D] of an encoder.
    `facts["kind"]` says which.
    """
    import torch

    model: Any = source.build_model().eval()
    stored = _shapes(model) if source.config_only else source.weights
    weights: dict[str, LazyTensor] = {**_buffers(model), **_aliases(model, stored)}
    device = (
        "cpu" if source.kind == "module" else "meta"
    )  # a module from Python stays as it is: export reads no values
    model = model.to(device)
    encoder = source.task == "encoder"

    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model_ = model

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            if encoder:
                return self.model_(input_ids=input_ids)[0]
            return self.model_(input_ids=input_ids, use_cache=False).logits

    limit = getattr(model.config, "max_position_embeddings", None)
    bound = torch.export.Dim("T", min=2, max=int(limit) if limit else 1 << 20)
    program = _export(
        Wrapper(), (torch.zeros(1, 6, dtype=torch.int64, device=device),), ({1: bound},), source.name
    )
    graph = Graph(source.name)
    _import_program(program, graph, ["input_ids"], weights, "model_.")
    graph.output_names = ["hidden" if encoder else "logits"]
    graph.facts["kind"] = "encoder" if encoder else "causal_lm"
    if len(graph.outputs) != 1:
        raise CompileError(
            f"{source.name}: expected one output, got {len(graph.outputs)}", remedy="report the model"
        )
    return graph


def trace_module(
    module: torch.nn.Module,
    example_inputs: Sequence[torch.Tensor] | Mapping[str, torch.Tensor],
    *,
    name: str = "module",
    dynamic_shapes: Any = None,
) -> Graph:
    """The traced graph of any nn.Module with its own weights.

    Args:
        example_inputs: positional or by name; their shapes are fixed unless `dynamic_shapes` (as torch.export
        takes it) frees some.
    Result: inputs named as the module's forward names them, outputs "output0", ….
    """
    import inspect

    import torch

    was_training = module.training
    module.eval()
    named = dict(example_inputs) if isinstance(example_inputs, Mapping) else None
    args = tuple(named.values()) if named is not None else tuple(example_inputs)  # type: ignore[arg-type]
    parameters = list(inspect.signature(module.forward).parameters)
    labels = (
        list(named)
        if named is not None
        else [parameters[i] if i < len(parameters) else f"input{i}" for i in range(len(args))]
    )
    weights: dict[str, LazyTensor] = {
        n: ArrayTensor(
            t.detach().cpu().float().numpy().copy()
            if t.is_floating_point()
            else t.detach().cpu().numpy().copy(),
            f"{name}:{n}",
        )
        for n, t in [
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        ]
    }
    with _quiet(), torch.no_grad():
        try:
            program = torch.export.export(
                module,
                () if named is not None else args,
                kwargs=named,
                dynamic_shapes=dynamic_shapes,
                strict=False,
            )
        except Exception as e:  # as in _export
            first = (str(e).strip().splitlines() or [type(e).__name__])[0]
            raise UnsupportedError(
                f"{name} cannot be traced: {first[:300]}",
                remedy="control flow must not depend on tensor values",
            ) from e
    constants: dict[str, Any] = dict(program.constants)
    for label, constant in constants.items():
        if hasattr(constant, "numpy") and label not in weights:
            weights[label] = ArrayTensor(constant.detach().cpu().numpy().copy(), f"{name}:{label}")
    graph = Graph(name)
    _import_program(program, graph, labels, weights, "")
    graph.output_names = [f"output{i}" for i in range(len(graph.outputs))]
    graph.facts["kind"] = "function"
    module.train(was_training)
    return graph
