"""Layers that are alike are traced once.

torch.export takes some hundred milliseconds a decoder layer, all of it Python, and the layers of a model
mostly compute the same with other weights. While a model is traced inside `Repeats.installed`, the first one
of each kind is traced between two marks, and each later one leaves one call that names it:

    enter(x…) → ops of layer 0 → leave(y…)         again(x…) → y…        for layers 1, 2, …

The importer turns a call of `again` into a copy of the ops between the marks, with that layer's weights
(`Bodies`). Layers are alike where their classes, parameters, buffers and all other attributes are
equal, and what they are called with has the same structure, shapes and dtypes. A layer's own number is an
attribute that differs; it is hidden while the model is traced, and code that reads it ends the attempt
(`CannotRepeat`): the model is then traced as a whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum
from types import MethodType
from typing import TYPE_CHECKING, Any

from .operators import Definition, define_operators

if TYPE_CHECKING:
    import torch

    from ..ir.core import Graph, Op, Value

NAMESPACE = "llmc_trace"
NUMBERS = ("layer_idx", "layer_index", "layer_id")
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_state_dict_hooks", "_load_state_dict_pre_hooks",
)  # fmt: skip
_ORIGINAL = "llmc_original"  # of a forward function of ours: what it stands for
_PLAIN = (int, float, complex, str, bytes, bool, type(None), type, Enum)


class CannotRepeat(Exception):
    """A layer cannot be copied: its code depends on its number, or it changes what it was given."""


class _HiddenNumber:
    """Stands for a layer's number; anything that reads it raises CannotRepeat."""

    def _read(self, *_: Any) -> Any:
        raise CannotRepeat

    __index__ = __int__ = __float__ = __bool__ = __str__ = __format__ = __hash__ = _read
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _read
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __neg__ = _read
    __floordiv__ = __rfloordiv__ = __truediv__ = __rtruediv__ = __mod__ = __rmod__ = _read


@dataclass(frozen=True)
class Copy:
    """A call of `again`: the paths of the module that was traced and of the one that is like it."""

    traced: str
    path: str

    def place_of(self, name: str) -> str:
        """A module's or weight's path in the one that was traced → in the other; others as they are."""
        if name == self.traced or name.startswith(self.traced + "."):
            return self.path + name[len(self.traced) :]
        return name


@dataclass
class _Traced:
    """A layer between two marks, and what it was called with."""

    path: str
    module: torch.nn.Module
    call: tuple[Any, ...]
    place: int
    outputs: list[torch.Tensor]
    structure: Any


class Repeats:
    """The layers of one model. `copies[n]` says what the call of `again` with place `n` stands for, and
    `begun[n]` is the place of the marks that it copies.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.copies: dict[int, Copy] = {}
        self.begun: dict[int, int] = {}
        self._traced: list[_Traced] = []
        self._places = 0

    @contextmanager
    def installed(self) -> Generator[None]:
        """Within it, the model's layers leave marks and calls as above."""
        with ExitStack() as stack:
            stack.callback(_current.reset, _current.set(self))
            for path, layer in _layers(self.model):
                stack.enter_context(replaced(layer, "forward", self._wrapped(path, layer)))
                for part in layer.modules():
                    for name in NUMBERS:
                        if isinstance(vars(part).get(name), int):
                            stack.enter_context(replaced(part, name, _HiddenNumber()))
            yield

    def twin_of(self, name: str) -> str | None:
        """The name that a weight of a layer that was not traced has in the one that was; None for others."""
        for copy in self.copies.values():
            if name.startswith(copy.path + "."):
                return copy.traced + name[len(copy.path) :]
        return None

    def outputs_of(self, place: int) -> list[torch.Tensor]:
        """What the layer that a call of `again` stands for returned where it was traced."""
        number = self.begun[place]
        return next(one.outputs for one in self._traced if one.place == number)

    def _wrapped(self, path: str, layer: torch.nn.Module) -> Callable[..., Any]:
        import torch
        from torch.utils._pytree import tree_flatten, tree_unflatten

        ops = _operators()
        original = layer.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            flat, structure = tree_flatten((args, kwargs))
            tensors = [x for x in flat if isinstance(x, torch.Tensor)]
            call = (structure, *_described(flat))
            place, self._places = self._places, self._places + 1
            twin = next(
                (one for one in self._traced if _same(one.call, call) and alike(one.module, layer)), None
            )
            if twin is not None:
                self.begun[place] = twin.place
                self.copies[place] = Copy(twin.path, path)
                return tree_unflatten(ops.again(tensors, place), twin.structure)
            given = iter(ops.enter(tensors, place)) if tensors else iter(())
            flat = [next(given) if isinstance(x, torch.Tensor) else x for x in flat]
            args, kwargs = tree_unflatten(flat, structure)
            made, result = tree_flatten(original(*args, **kwargs))
            if not tensors or not made or not all(isinstance(x, torch.Tensor) for x in made):
                return tree_unflatten(made, result)
            made = ops.leave(made, place)
            self._traced.append(_Traced(path, layer, call, place, made, result))
            return tree_unflatten(made, result)

        vars(forward)[_ORIGINAL] = original
        return forward


@dataclass
class _Body:
    """What a traced layer became: ops in order, between values."""

    inputs: list[Value]
    ops: list[Op]
    outputs: list[Value]


class Bodies:
    """Turns marks and calls of `again` into values while a traced program is imported.

    `weights` are the graph's weights by the names of parameters and buffers; the importer fills it.
    """

    def __init__(self, graph: Graph, repeats: Repeats) -> None:
        self.graph = graph
        self.repeats = repeats
        self.weights: dict[str, Value] = {}
        self._open: tuple[int, list[Value], Op | None] | None = None
        self._bodies: dict[int, _Body] = {}

    def run(self, name: str, values: Sequence[Value], place: int) -> tuple[Value, ...]:
        """The results of a call of one of the three operators, which is named without its namespace."""
        if name == "leave":
            return self._leave(values, place)
        if self._open is not None:  # a layer within a layer
            raise CannotRepeat
        if name == "enter":
            self._open = (place, list(values), self.graph.last)
            return tuple(values)
        return self._again(values, place)

    def is_given(self, value: Value) -> bool:
        """Whether a value is one that the layer which is being imported was called with."""
        return self._open is not None and any(v is value for v in self._open[1])

    def _leave(self, values: Sequence[Value], place: int) -> tuple[Value, ...]:
        assert self._open is not None and self._open[0] == place
        _, inputs, before = self._open
        self._open = None
        op = self.graph.first if before is None else before.next
        ops: list[Op] = []
        while op is not None:
            ops.append(op)
            op = op.next
        self._bodies[place] = _Body(inputs, ops, list(values))
        return tuple(values)

    def _again(self, values: Sequence[Value], place: int) -> tuple[Value, ...]:
        copy = self.repeats.copies[place]
        body = self._bodies[self.repeats.begun[place]]
        mapping: dict[Value, Value] = {}
        pairs = [*zip(body.inputs, values, strict=True), *self._pairs(copy)]
        for old, new in pairs:
            if mapping.setdefault(old, new) is not new:
                raise CannotRepeat  # one value in the layer that was traced, two in this one
        for op in body.ops:
            made = op.clone(mapping)
            made.loc = copy.place_of(op.loc)
            self.graph.append(made)
            mapping.update(zip(op.results, made.results, strict=True))
        return tuple(mapping.get(v, v) for v in body.outputs)

    def _pairs(self, copy: Copy) -> list[tuple[Value, Value]]:
        """Weights of the layer that was traced, and this one's."""
        return [
            (value, self.weights[copy.place_of(name)])
            for name, value in list(self.weights.items())
            if copy.place_of(name) != name
        ]


@contextmanager
def replaced(module: torch.nn.Module, name: str, value: Any) -> Generator[None]:
    """An instance attribute for a while; what was there comes back."""
    missing = object()
    before = vars(module).get(name, missing)
    vars(module)[name] = value
    try:
        yield
    finally:
        if before is missing:
            del vars(module)[name]
        else:
            vars(module)[name] = before


_current: ContextVar[Repeats] = ContextVar("repeats")
"""What this thread traces."""


@functools.cache
def _operators() -> Any:
    """The three operators, for tensors without data."""
    import torch

    def fresh(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.empty_like(x) for x in tensors]

    def marked(tensors: Sequence[torch.Tensor], place: int) -> list[torch.Tensor]:
        return fresh(tensors)

    def again(tensors: Sequence[torch.Tensor], place: int) -> list[torch.Tensor]:
        return fresh(_current.get().outputs_of(place))

    schema = "(Tensor[] tensors, int place) -> Tensor[]"
    made = {"enter": marked, "leave": marked, "again": again}
    return define_operators(NAMESPACE, {name: Definition(schema, fake) for name, fake in made.items()})


def _layers(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """Members of lists of modules of one class, by their paths; lists within such members are theirs."""
    import torch

    found: list[tuple[str, torch.nn.Module]] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(layer + ".") for layer, _ in found)
        if isinstance(module, torch.nn.ModuleList) and len(module) > 1 and not inside:
            found += [(f"{path}.{i}", one) for i, one in enumerate(module)]
    return found


def _described(flat: Sequence[Any]) -> list[Any]:
    """What two calls must have in common: each tensor's type, which of them are one, and all other values."""
    import torch

    first: dict[int, int] = {}
    return [
        (first.setdefault(id(x), i), x.dtype, tuple(map(str, (*x.shape, "of", *x.stride()))))
        if isinstance(x, torch.Tensor)
        else x
        for i, x in enumerate(flat)
    ]


def alike(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Whether two modules compute the same but for their parameters, as far as their attributes say."""
    import torch

    if type(a) is not type(b) or any(vars(m).get(name) for m in (a, b) for name in _HOOKS):
        return False
    ours, theirs = vars(a), vars(b)
    if ours.keys() != theirs.keys():
        return False
    for name, value in ours.items():
        other = theirs[name]
        if name in ("_parameters", "_buffers", "_modules"):
            if value.keys() != other.keys():
                return False
            pairs = zip(value.values(), other.values(), strict=True)
            if not all(_alike_member(x, y) for x, y in pairs):
                return False
        elif name == "forward":
            if not _same_forward((value, a), (other, b)):
                return False
        elif isinstance(value, _HiddenNumber) and isinstance(other, _HiddenNumber):
            continue
        elif not _same(value, other):
            return False
    return not isinstance(a, torch.nn.ModuleList) or len(a) == len(b)  # type: ignore[arg-type]


def _same_forward(ours: tuple[Any, Any], theirs: tuple[Any, Any]) -> bool:
    """Whether two modules' own forward functions, each with its module, are of one class or one function."""
    (x, a), (y, b) = ours, theirs
    x, y = getattr(x, _ORIGINAL, x), getattr(y, _ORIGINAL, y)
    if isinstance(x, MethodType) and isinstance(y, MethodType):
        return x.__func__ is y.__func__ and x.__self__ is a and y.__self__ is b
    return x is y


def _alike_member(x: Any, y: Any) -> bool:
    """Parameters are alike in type, buffers in what they hold, submodules as modules are."""
    import torch

    if x is None or y is None:
        return x is y
    if isinstance(x, torch.nn.Module):
        return isinstance(y, torch.nn.Module) and alike(x, y)
    if x.dtype != y.dtype or x.shape != y.shape or type(x) is not type(y):
        return False
    if isinstance(x, torch.nn.Parameter):
        return True
    return x.device == y.device and not x.is_meta and torch.equal(x, y)


def _same(x: Any, y: Any) -> bool:
    """Equality where it is certain; other objects must be one."""
    import torch
    from torch.utils._pytree import TreeSpec

    if x is y:
        return True
    if type(x) is not type(y):
        return False
    if isinstance(x, (tuple, list)):
        return len(x) == len(y) and all(_same(a, b) for a, b in zip(x, y, strict=True))
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(_same(x[k], y[k]) for k in x)
    if isinstance(x, (set, frozenset)):
        return x == y and all(isinstance(one, _PLAIN) for one in x)
    if isinstance(x, functools.partial):
        return _same((x.func, x.args, x.keywords), (y.func, y.args, y.keywords))
    if isinstance(x, MethodType):
        return x.__func__ is y.__func__ and x.__self__ is y.__self__
    return isinstance(x, (*_PLAIN, torch.dtype, torch.device, TreeSpec)) and x == y
