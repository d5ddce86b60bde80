"""Recurrences are traced as one operator each.

What a recurrent layer does along the tokens is a loop in Python, or a computation in chunks, whose number
of turns torch.export would write down as a constant. transformers keeps each such recurrence in a function of
its own, because libraries of kernels replace it; so do we while a model is traced (`installed`):

    causal_conv1d_fn(x, weight, bias, activation)      →  transpose → llmc_state.causal_conv1d → transpose

A function is known by the names of its parameters (`_FORMS`), not by the model that it belongs to. Names are
no proof: before the first use it is called with small random tensors, and what stands for it must give the
same numbers, in each variant that the model may ask for (`_proven`).
"""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import logging
import math
import sys
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FunctionType
from typing import TYPE_CHECKING, Any, cast

from ..ir.core import Value
from ..ir.errors import UnsupportedError
from ..ir.ops import state as ops
from ..ir.ops.nn import ACTIVATIONS
from ..ir.types import TensorType
from . import recurrence_trials as trials
from .aten_table import Handler, registered
from .operators import Definition, define_operators, operand_names, schema_of

if TYPE_CHECKING:
    import torch

    from .importer import Importer

NAMESPACE = "llmc_state"
Kind = type[ops.Recurrence]
OPERATORS: Mapping[str, Kind] = {
    cls.opname: cls
    for cls in (
        ops.CausalConv1d,
        ops.SelectiveScan,
        ops.SsdScan,
        ops.GatedDeltaRule,
        ops.LinearRecurrence,
        ops.Wkv,
    )
}
_TOLERANCE = 1e-4
"""Largest difference, in units of the largest value, between a function and what stands for it."""

_NAMES = {"swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
"""transformers' names of activations that have other ones in `ACTIVATIONS`."""


def _made(kind: Kind, operands: Sequence[Value | None], attributes: Mapping[str, Any]) -> ops.Recurrence:
    """The op over a whole sequence."""
    return cast("Callable[..., ops.Recurrence]", kind)(*operands, [], **attributes)


def _importing(kind: Kind) -> Handler:
    """Operator → op; arguments as the operator has them."""

    def handler(c: Importer, *args: Any) -> Value:
        operands = len(operand_names(kind))
        given = [*args[:operands], *[None] * (operands - len(args))]
        attributes = dict(zip(kind.attribute_fields, args[operands:], strict=False))
        return c.emit(_made(kind, given, attributes))

    return handler


for _name, _kind in OPERATORS.items():
    registered(f"{NAMESPACE}.{_name}.default")(_importing(_kind))


@functools.cache
def _operators() -> Any:
    """Our operators. On the CPU they are the reference meanings of the ops."""
    return define_operators(
        NAMESPACE,
        {
            name: Definition(schema_of(kind), _fake(kind), _reference(kind))
            for name, kind in OPERATORS.items()
        },
    )


def _fake(kind: Kind) -> Callable[..., Any]:
    def fake(*args: Any) -> Any:
        return args[kind.shaped_like].new_empty(args[kind.shaped_like].shape)

    return fake


def _reference(kind: Kind) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        operands = len(operand_names(kind))
        values = [None if x is None else _value(x) for x in args[:operands]]
        op = _made(kind, values, dict(zip(kind.attribute_fields, args[operands:], strict=False)))
        return op.reference({}, *args[:operands], [])

    return run


def _value(x: torch.Tensor) -> Value:
    return Value(TensorType(str(x.dtype).removeprefix("torch."), tuple(x.shape)))


# -- what stands for the functions, with their names of parameters


def _nothing_of(**given: Any) -> None:
    """Refuses arguments that would change the result."""
    for name, x in given.items():
        if x is not None and x is not False:
            raise _refused(name)


def _refused(name: str) -> UnsupportedError:
    return UnsupportedError(
        f"a recurrence is given {name}, which is not supported", remedy="report the model"
    )


def _causal_conv1d(hidden_states: Any, weight: Any, bias: Any = None, activation: str | None = None) -> Any:
    name = _NAMES.get(activation or "", activation)
    inside = name if name in ACTIVATIONS else None
    x, filters = hidden_states.transpose(1, 2), weight.transpose(0, 1)
    y = _operators().causal_conv1d(x, filters, bias, inside)
    if activation is not None and inside is None:
        from transformers.activations import ACT2FN

        y = ACT2FN[activation](y)
    return y.transpose(1, 2)


def _selective_scan(
    hidden_states: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any = None,
    z: Any = None,
    delta_bias: Any = None,
    delta_softplus: bool = False,
    use_mambapy: bool = False,
    use_associative_scan: bool = False,
) -> Any:
    """The two flags `use_…` choose among ways to the same numbers."""
    import torch

    x, step, b, c = (v.transpose(1, 2) for v in (hidden_states, dt, B, C))
    y = _operators().selective_scan(x, step, b, c, A.transpose(0, 1), D, delta_bias, delta_softplus)
    if z is not None:
        y = y * torch.nn.functional.silu(z.transpose(1, 2))
    return y.transpose(1, 2)


def _ssd_scan(
    hidden_states: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    chunk_size: int,
    D: Any = None,
    dt_bias: Any = None,
    initial_states: Any = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Any:
    import torch

    _nothing_of(initial_states=initial_states)
    dt = dt if dt_bias is None else dt + dt_bias
    dt = torch.nn.functional.softplus(dt) if dt_softplus else dt
    low, high = dt_limit
    if low > 0 or not dt_softplus:
        dt = torch.clamp(dt, min=low)
    if math.isfinite(high):
        dt = torch.clamp(dt, max=high)
    a_head = D is None or D.dim() == 1
    y = _operators().ssd_scan(hidden_states, dt, B, C, A, D if a_head else None)
    return y if a_head else y + D * hidden_states


def _gated_delta_rule(
    query: Any,
    key: Any,
    value: Any,
    g: Any,
    beta: Any,
    chunk_size: int = 0,
    initial_state: Any = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Any, None]:
    _nothing_of(initial_state=initial_state, output_final_state=output_final_state)
    scale = key.shape[-1] ** -0.5
    if use_qk_l2norm_in_kernel:
        query, key = (_unit(x, 1e-6) for x in (query, key))
    return _operators().gated_delta_rule(query, key, value, g, beta, scale), None


def _unit(x: Any, eps: float) -> Any:
    """x / sqrt(sum(x²) + eps) over the last axis, written as the norm by the mean that has a kernel."""
    import torch

    width = x.shape[-1]
    mean = x.pow(2).mean(-1, keepdim=True)
    return x * torch.rsqrt(mean + eps / width) * width**-0.5


def _linear_recurrence(
    self: Any,
    hidden_states: Any,
    recurrent_gate: Any,
    reset: Any,
    recurrent_states: Any = None,
    acc_dtype: Any = None,
) -> tuple[Any, None]:
    """`reset` is where a sequence begins, before which there is no state that the gate could keep."""
    _nothing_of(recurrent_states=recurrent_states)
    return _operators().linear_recurrence(hidden_states, recurrent_gate), None


def _wkv(
    time_decay: Any, time_first: Any, key: Any, value: Any, state: Any = None, return_state: bool = False
) -> tuple[Any, None]:
    _nothing_of(state=state, return_state=return_state)
    return _operators().wkv(key, value, -time_decay.exp(), time_first), None


# -- how functions are known, and proven


@dataclass(frozen=True)
class _Form:
    """A recurrence: the parameters that a function of it has, in order; what stands for it; arguments of each
    variant that is tried, and the name of the variant that a call asks for.
    """

    parameters: tuple[str, ...]
    stands: Callable[..., Any]
    trials: Callable[[], list[trials.Arguments]]
    variant: Callable[[Mapping[str, Any]], str] = lambda given: ""
    beside: tuple[str, ...] = ()
    """Further parameters, wherever they stand."""

    def fits(self, names: Sequence[str]) -> bool:
        return tuple(names[: len(self.parameters)]) == self.parameters and set(self.beside) <= set(names)


_FORMS = (
    _Form(
        ("hidden_states", "weight", "bias", "activation"),
        _causal_conv1d,
        trials.conv_trials,
        trials.conv_variant,
    ),
    _Form(
        ("hidden_states", "dt", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus"),
        _selective_scan,
        trials.selective_trials,
        trials.selective_variant,
    ),
    _Form(
        ("hidden_states", "dt", "A", "B", "C", "chunk_size", "D"),
        _ssd_scan,
        trials.ssd_trials,
        trials.ssd_variant,
        beside=("dt_bias", "dt_softplus", "dt_limit"),
    ),
    _Form(
        ("query", "key", "value", "g", "beta", "chunk_size"),
        _gated_delta_rule,
        trials.delta_trials,
        trials.delta_variant,
        beside=("initial_state", "output_final_state", "use_qk_l2norm_in_kernel"),
    ),
    _Form(
        ("self", "hidden_states", "recurrent_gate", "reset", "recurrent_states"),
        _linear_recurrence,
        trials.linear_trials,
    ),
    _Form(
        ("time_decay", "time_first", "key", "value", "state", "return_state"),
        _wkv,
        trials.wkv_trials,
    ),
)


@functools.cache
def _proven(function: Callable[..., Any], form: _Form) -> frozenset[str]:
    """The variants in which what stands for a function gives the same numbers."""
    import torch

    found: set[str] = set()
    with torch.no_grad():
        for arguments in form.trials():
            ours, theirs = _tensor(form.stands(**arguments)), None
            with contextlib.suppress(Exception):  # it may refuse a variant in any way
                theirs = _tensor(function(**arguments))
            if not isinstance(theirs, torch.Tensor) or ours.shape != theirs.shape:
                continue
            if float((ours - theirs.float()).abs().max()) <= _TOLERANCE * float(theirs.abs().max()):  # no NaN
                found.add(form.variant(arguments))
    return frozenset(found)


def _tensor(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) and result else result


_tracing: ContextVar[bool] = ContextVar("tracing", default=False)
_lock = threading.RLock()


@contextmanager
def installed(model: torch.nn.Module) -> Generator[None]:
    """Within it, in this thread, the recurrences of the model's modules are our operators."""
    with _lock, ExitStack() as stack:
        for holder, name, function, form in _found(model):
            before = logging.root.manager.disable
            logging.disable(logging.CRITICAL)  # that it is slow without a library of kernels
            try:
                variants = _proven(function, form)
            finally:
                logging.disable(before)
            if variants:  # else it is another function, that has parameters of the same names
                stack.callback(setattr, holder, name, function)
                setattr(holder, name, _standing(function, form, variants))
        stack.callback(_tracing.reset, _tracing.set(True))
        yield


def _standing(function: Callable[..., Any], form: _Form, variants: frozenset[str]) -> Callable[..., Any]:
    """What is called in a function's place while a model is traced. It raises UnsupportedError for a variant
    that is not proven, and for arguments that change the result in ways that nothing here knows.
    """
    signature, ignored = inspect.signature(function), _ignored(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not _tracing.get():  # another thread
            return function(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        if ignored:
            bound.arguments.pop(ignored, None)
        given = _known(bound, form)
        asked = form.variant(given)
        if asked not in variants:
            raise UnsupportedError(
                f"{function.__name__} in {function.__module__} ({asked}) does not compute what "
                "its parameters say",
                remedy=f"it does in these variants: {'; '.join(sorted(variants))}"
                if any(variants)
                else "report the model",
            )
        return form.stands(**given)

    return call


def _ignored(function: Callable[..., Any]) -> str:
    """The name under which a function takes arguments by any name (`**kwargs`), where it never reads them; ""
    where it does, or takes none.
    """
    rest = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.VAR_KEYWORD]
    code = getattr(inspect.unwrap(function), "__code__", None)
    if not rest or code is None or rest[0] in code.co_cellvars:
        return ""
    return "" if any(one.argval == rest[0] for one in dis.get_instructions(code)) else rest[0]


def _known(bound: inspect.BoundArguments, form: _Form) -> dict[str, Any]:
    """A call's arguments by name, without those that `form.stands` has no name for and that ask for nothing:
    they are what the function takes anyway. Raises UnsupportedError for other ones.
    """
    named, parameters = inspect.signature(form.stands).parameters, bound.signature.parameters
    given: dict[str, Any] = {}
    for name, x in bound.arguments.items():
        given |= x if parameters[name].kind is inspect.Parameter.VAR_KEYWORD else {name: x}
    for name in given.keys() - named.keys():
        x = given.pop(name)
        default = parameters[name].default if name in parameters else False
        if x is not None and not _is_same(x, default):
            raise _refused(name)
    return given


def _is_same(x: Any, default: Any) -> bool:
    plain = isinstance(x, bool | int | float | str) and type(x) is type(default)
    return x is default or (plain and x == default)


def _found(model: torch.nn.Module) -> list[tuple[Any, str, Callable[..., Any], _Form]]:
    """Functions of the model's modules, and methods of its classes, that have the parameters of a form: who
    holds each, and its name there.
    """
    classes = {kind for module in model.modules() for kind in type(module).__mro__}
    names = sorted({kind.__module__ for kind in classes})
    holders: list[Any] = [sys.modules[name] for name in names if name in sys.modules]
    holders += sorted(classes, key=lambda kind: (kind.__module__, kind.__qualname__))
    found: list[tuple[Any, str, Callable[..., Any], _Form]] = []
    for holder in holders:
        for name, function in list(vars(holder).items()):
            if not isinstance(function, FunctionType):
                continue
            parameters = _parameters(function)
            found += [(holder, name, function, form) for form in _FORMS if form.fits(parameters)]
    return found


@functools.cache
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()
