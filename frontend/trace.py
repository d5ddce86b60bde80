"""A model → `ir.Graph`, by torch.export on the meta device.

Weights are never loaded: parameters are meta tensors and become lazy weights of the graph by name. The token
count is the symbol "T". The traced function is the plain forward pass of one sequence without a cache: ids
[1, T] → logits [1, T, V] (hidden states of an encoder, scores of a classifier); the cache comes later, by a
pass.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..ir.core import Graph, Value
from ..ir.errors import CompileError, InputError, UnsupportedError
from ..ir.types import Shape, TensorType
from ..ir.weights import ArrayTensor, LazyTensor, ShapeOnlyTensor
from . import blocks, experts, masks, recurrence
from .classifier import pool_every_token, score_every_token, see_padding, unpadded
from .constants import Constants
from .export import export, is_unproven, narrower
from .importer import Importer, dtype_name, unread, written
from .repeats import CannotRepeat, Repeats
from .settled import settling
from .skeleton import is_encoder
from .source import context_length

if TYPE_CHECKING:
    import torch

    from .source import ModelSource


def _import_program(
    program: Any,
    graph: Graph,
    inputs: Sequence[str],
    weights: Mapping[str, LazyTensor],
    prefix: str,
    repeats: Repeats | None = None,
    *,
    settles: bool = False,
) -> None:
    """Fill `graph` from an ExportedProgram; `weights` by names of parameters and buffers. Tied parameters are
    one weight: the data object says which are. A model that `settles` changes weights in its first run alone.
    """
    signature = program.graph_signature
    changed = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if changed:
        raise UnsupportedError(
            f"{graph.name} changes {changed[0]} while it runs", remedy="a compiled function keeps no state"
        )
    weights = {**weights, **{n.removeprefix(prefix): w for n, w in _constants(program, graph.name).items()}}
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    held |= signature.inputs_to_lifted_tensor_constants
    importer = Importer(graph, repeats, settles=settles)
    lifted = signature.inputs_to_lifted_tensor_constants.items()
    numbers = {node: program.constants[label] for node, label in lifted}
    importer.constants = Constants(numbers, written(program.graph.nodes))
    known: dict[int, Value] = {}
    names = iter(inputs)
    used = {held[n.name].removeprefix(prefix) for n in program.graph.nodes if n.name in held and n.users}
    skipped = unread(program.graph.nodes)
    for node in program.graph.nodes:
        importer.node = node
        if node in skipped:
            continue
        if node.op == "call_function":
            importer.run_node(node)
        elif node.op == "output":
            graph.outputs = _returned(importer, node)
        elif node.op != "placeholder":
            raise UnsupportedError(f"the exported program holds a {node.op} node", remedy="report the model")
        elif node.name not in held:
            importer.values[node] = _input(importer, node, next(names, ""))
        else:
            name = held[node.name].removeprefix(prefix)
            if name not in used and (repeats is None or repeats.twin_of(name) not in used):
                continue
            data = _fitting(weights, name, importer.result_shape())
            if id(data) not in known:
                known[id(data)] = graph.add_weight(name, data)
            importer.values[node] = known[id(data)]
            if importer.bodies is not None:
                importer.bodies.weights[name] = known[id(data)]


def _input(importer: Importer, node: Any, label: str) -> Value:
    if not label or not hasattr(node.meta.get("val"), "dtype"):
        raise InputError(
            f"{importer.graph.name}: input {label or node.name} is no tensor of its own",
            remedy="give example inputs that are tensors, one a parameter",
        )
    return importer.graph.add_input(label, TensorType(importer.result_dtype(), importer.result_shape()))


def _returned(importer: Importer, node: Any) -> list[Value]:
    flat = [n for n in node.args[0] if n is not None]
    if not flat or any(n not in importer.values for n in flat):
        raise UnsupportedError(
            f"{importer.graph.name} returns something that is no tensor", remedy="return tensors only"
        )
    return [importer.values[n] for n in flat]


def _fitting(weights: Mapping[str, LazyTensor], name: str, expected: Shape) -> LazyTensor:
    """A weight by name. Raises InputError where there is none or its shape is another."""
    if name not in weights:
        raise InputError(
            f"the model has no tensor {name}", remedy="the checkpoint is incomplete; download it again"
        )
    data = weights[name]
    if tuple(data.shape) != expected:
        raise InputError(
            f"tensor {name} ({data.source}) has shape {list(data.shape)}, "
            f"the configuration asks for {list(expected)}",
            remedy="config and weights are of different models",
        )
    return data


def _constants(program: Any, name: str) -> dict[str, LazyTensor]:
    """Tensors that the module made from literals while it was traced."""
    found: dict[str, LazyTensor] = {}
    for label in program.graph_signature.inputs_to_lifted_tensor_constants.values():
        constant = program.constants[label]
        if constant.is_meta:
            raise UnsupportedError(
                f"{name} makes a tensor of numbers while it runs, and its values are lost on the meta device",
                remedy="report the model",
            )
        found[label] = array_tensor(constant, f"{name}:{label}")
    return found


def array_tensor(tensor: torch.Tensor, source: str) -> ArrayTensor:
    """A copy of a tensor of torch as a weight; bfloat16 goes through float32, which holds it exactly."""
    import torch

    plain = tensor.detach().cpu()
    plain = plain.float() if plain.dtype == torch.bfloat16 else plain
    return ArrayTensor(plain.numpy().copy(), source)


def _buffers(module: torch.nn.Module) -> dict[str, LazyTensor]:
    """The real values of a model's buffers (rotary frequencies above all), taken before it moves to the meta
    device.
    """
    return {
        name: array_tensor(b, f"buffer:{name}")
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


def _tied(module: torch.nn.Module) -> list[dict[str, bool]]:
    """Parameters with more names than one: each name, and whether it is an embedding's."""
    import torch

    by_object: dict[int, dict[str, bool]] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        holder = module.get_submodule(name.rpartition(".")[0])
        by_object.setdefault(id(p), {})[name] = isinstance(holder, torch.nn.Embedding)
    return [names for names in by_object.values() if len(names) > 1]


def trace_source(source: ModelSource) -> Graph:
    """The traced graph of a published language model.

    Result: input "input_ids" int64 [1, T]; output "logits" [1, T, V], or "hidden" [1, T, D] of an encoder, or
    "scores" [1, T, labels] of a classifier, which may take "token_type_ids" int64 [1, T] as well.
    `facts["kind"]` says which, `facts["tied"]` what other names a weight has: name → {"of": the weight's,
    "embedding": whether an embedding calls it so}.
    """
    bound = _longest(source)
    held: int | None = None
    asserting = False
    while True:
        try:
            graph = _trace_bounded(source, bound, asserting=asserting)
        except UnsupportedError as error:
            lower = narrower(error, bound)
            if lower is None and not asserting and is_unproven(error):
                asserting = True
                continue
            if lower is None:
                raise
            bound, other_above = lower
            held = bound if other_above else held
        else:
            if held is not None:
                graph.facts["positions"] = held
            return graph


def _longest(source: ModelSource) -> int:
    """Tokens that a sequence may have, as far as the configuration and the user say."""
    return max(context_length(source.config) or 0, source.length or 0) or 1 << 20


def _trace_bounded(source: ModelSource, bound: int, *, asserting: bool) -> Graph:
    """The graph for up to `bound` tokens; `asserting` as in `export`."""
    # A module from Python may do anything between its layers; transformers' models are known.
    if source.kind != "module":
        try:
            return _trace_source(source, bound, repeated=True, asserting=asserting)
        except CannotRepeat:
            pass
        except UnsupportedError as error:
            if narrower(error, bound) is not None or (not asserting and is_unproven(error)):
                raise  # tracing every layer would end there too
    return _trace_source(source, bound, repeated=False, asserting=asserting)


def _trace_source(
    source: ModelSource, bound: int | None = None, *, repeated: bool, asserting: bool = False
) -> Graph:
    import torch

    model: Any = source.build_model().eval()
    repeats = Repeats(model) if repeated else None
    stored = _shapes(model) if source.config_only else source.weights
    # A router's bias is a buffer that checkpoints hold; the module's own is what it was made with.
    kept = {name: stored[name] for name, _ in model.named_buffers() if name in stored}
    weights: dict[str, LazyTensor] = {**_buffers(model), **kept, **_aliases(model, stored)}
    tied = _tied(model)
    size = 2 * (bound or _longest(source))  # of blocks that no sequence fills
    found = blocks.blocks_of(model) if source.kind != "module" else []
    free, tables = blocks.tables_of(found, weights, size)
    weights |= tables
    # A module from Python stays as it is: export reads no values.
    device = "cpu" if source.kind == "module" else "meta"
    model = model.to(device)
    causal = source.task == "causal_lm"
    inputs = ["input_ids", *(["token_type_ids"] if _tells_types(model, source.task) else [])]
    caches = "use_cache" in inspect.signature(model.forward).parameters
    options = {"use_cache": False} if causal or caches else {}

    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model_ = model

        def forward(self, *given: torch.Tensor) -> torch.Tensor:
            named = dict(zip(inputs, given, strict=True))
            result = self.model_(**named, **options)
            return result.logits if causal else result[0]

    tokens = torch.export.Dim("T", min=2, max=bound or _longest(source))
    examples = tuple(torch.zeros(1, 6, dtype=torch.int64, device=device) for _ in inputs)
    shapes = (tuple({1: tokens} for _ in inputs),)
    layers = repeats.installed() if repeats else contextlib.nullcontext()
    ways = experts.installed(model), recurrence.installed(model), masks.installed()
    whole = blocks.installed(free, size)
    decides = source.task == "classifier" and not is_encoder(source.config)
    padding = unpadded(model) if decides else contextlib.nullcontext()
    with layers, whole, ways[0], ways[1], ways[2], padding, settling(model) as settled:
        program = export(Wrapper(), examples, shapes, source.name, asserting=asserting)
    graph = Graph(source.name)
    _import_program(program, graph, inputs, weights, "model_.", repeats, settles=settled.noted)
    graph.output_names = [_OUTPUTS[source.task]]
    graph.facts["kind"] = source.task
    if len(free) < len(found):
        graph.facts["of_values"] = True  # with other tables in its checkpoint the graph would be another
    _note_tied(graph, tied)
    if len(inputs) > 1:
        graph.facts["token_types"] = int(model.config.type_vocab_size)
    _give_rows(graph, source)
    return graph


def _give_rows(graph: Graph, source: ModelSource) -> None:
    """Let what gives scores, or one row, of a text give a row for each token. Raises CompileError where a
    model gives several results.
    """
    if source.task == "classifier":
        score_every_token(graph)
    if source.task == "encoder":
        _give_every_token(graph, source)
    if len(graph.outputs) != 1:
        raise CompileError(
            f"{source.name}: expected one output, got {len(graph.outputs)}", remedy="report the model"
        )


def _give_every_token(graph: Graph, source: ModelSource) -> None:
    """Let an encoder that gives one row of a text give each token's.

    Raises InputError where it is said that the text's vector is another one.
    """
    padding = getattr(source.config, "pad_token_id", None)
    if isinstance(padding, int):
        see_padding(graph, padding)
    if len(graph.outputs) == 1:
        pool_every_token(graph)
    pooling = graph.facts.get("pooling")
    if pooling is not None and source.pooling not in (None, pooling):
        raise InputError(
            f"{source.name} pools by {source.pooling}, and its model gives one row of a text ({pooling})",
            remedy="correct 1_Pooling/config.json",
        )


def _note_tied(graph: Graph, tied: Sequence[Mapping[str, bool]]) -> None:
    """`facts["tied"]` of what `_tied` found."""
    for names in tied:
        held = next((n for n in names if n in graph.weights), None)
        if held is not None:
            entries = {n: {"of": held, "embedding": by_ids} for n, by_ids in names.items()}
            graph.facts["tied"] = graph.facts.get("tied", {}) | entries


_OUTPUTS = {"causal_lm": "logits", "encoder": "hidden", "classifier": "scores"}


def _tells_types(model: Any, task: str) -> bool:
    """Whether a classifier is to be told which text of a pair each token is of. An encoder of single texts is
    not: all of its tokens are of the first.
    """
    takes = "token_type_ids" in inspect.signature(model.forward).parameters
    return task == "classifier" and takes and getattr(model.config, "type_vocab_size", 0) > 1


def _named_inputs(
    module: torch.nn.Module, examples: Sequence[torch.Tensor] | Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Example inputs by the names and in the order of the forward method's parameters."""
    parameters = inspect.signature(module.forward).parameters
    if not isinstance(examples, Mapping):
        labels = [*parameters, *(f"input{i}" for i in range(len(parameters), len(examples)))]
        return dict(zip(labels, examples, strict=False))
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unknown = [n for n in examples if n not in parameters and not takes_any]
    if unknown:
        raise InputError(
            f"{type(module).__name__} takes no input {unknown[0]}", remedy=f"inputs: {', '.join(parameters)}"
        )
    return {n: examples[n] for n in sorted(examples, key=[*parameters, *examples].index)}


def _held_weights(module: torch.nn.Module, name: str) -> dict[str, LazyTensor]:
    """The module's own parameters and buffers; what it holds under two names is one object."""
    made: dict[int, ArrayTensor] = {}
    weights: dict[str, LazyTensor] = {}
    for label, t in [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]:
        if t.is_floating_point() and dtype_name(t.dtype) != "float32":
            raise InputError(
                f"{name}: {label} is {dtype_name(t.dtype)}",
                remedy="compile the module in float32: call .float()",
            )
        if id(t) not in made:
            made[id(t)] = array_tensor(t, f"{name}:{label}")
        weights[label] = made[id(t)]
    return weights


def trace_module(
    module: torch.nn.Module,
    example_inputs: Sequence[torch.Tensor] | Mapping[str, torch.Tensor],
    *,
    name: str = "module",
    dynamic_shapes: Any = None,
) -> Graph:
    """The traced graph of any nn.Module with its own weights, in float32.

    Args:
        example_inputs: positional or by name; their shapes are fixed unless `dynamic_shapes` (as torch.export
            takes it) frees some.
    Result: inputs named and ordered as the module's forward method has them, outputs "output0", ….
    """
    named = _named_inputs(module, example_inputs)
    weights = _held_weights(module, name)
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        with experts.installed(module), settling(module) as settled:
            by_name = isinstance(example_inputs, Mapping)
            args, kwargs = ((), named) if by_name else (tuple(named.values()), None)
            try:
                program = export(module, args, dynamic_shapes, name, kwargs)
            except UnsupportedError as error:
                if not is_unproven(error):
                    raise
                program = export(module, args, dynamic_shapes, name, kwargs, asserting=True)
    finally:
        for m, training in modes.items():
            m.training = training
    graph = Graph(name)
    _import_program(program, graph, list(named), weights, "", settles=settled.noted)
    graph.output_names = [f"output{i}" for i in range(len(graph.outputs))]
    graph.facts["kind"] = "function"
    return graph
