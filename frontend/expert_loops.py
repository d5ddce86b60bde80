"""Experts that a module computes in a loop of its own over those that were chosen.

    for e in those that some token chose: result[tokens] += share · down[e] · (act(gate[e] · x) · up[e] · x)

Which experts that are depends on the values of a tensor, so torch.export cannot write the loop down. Such a
module is known by what it is called with, `_TAKEN`, and what it computes is found by trying it: its
parameters may stand for gates, ups and downs in a few orders (`_layouts`), what it computes between its
products with them is tried for itself (`expert_gates.py`), and the order is taken that gives the same numbers
as the module: over tokens that choose the first and the last expert, over large ones, which whatever limits
what it takes or gives would change, over many that choose the same experts, and over such as choose a number
beyond the last one. Numbers beyond it may be refused, add nothing, or add the token itself, as experts do
that compute nothing.

The trial runs the module as it is, in its own sizes, with parameters that take hardly any memory: views whose
rows overlap.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

from ..ir.ops.moe import Gate, mix
from . import expert_gates, repeats

if TYPE_CHECKING:
    import torch

_TAKEN = ("hidden_states", "top_k_index", "top_k_weights")
_TOLERANCE = 1e-4
_MOST_LARGE = 16
"""Experts that are tried with large numbers."""
"""Largest difference, in units of the largest value, between a module and what stands for it."""
_STEPS = (3, 5)
"""Between the rows, and between the elements of a row, of an overlapping matrix: it is not its own transpose,
and no expert is like another.
"""

Compute = Callable[..., Any]
"""A form, parameters by name, hidden [T, D], indices and weights [T, k] → [T, D]."""


@dataclass(frozen=True)
class _Matrix:
    """A parameter as one matrix for each expert, [E, N, K] as `Moe` takes them, or turned: [E, K, N]."""

    name: str
    turned: bool

    def of(self, parameters: Mapping[str, torch.Tensor], experts: int) -> torch.Tensor:
        """[E, …] as it is stored; parameters of two axes have their experts one below the other."""
        x = parameters[self.name]
        x = x.view(experts, -1, x.shape[-1]) if x.dim() == 2 else x
        return x if x.shape[0] == experts else x[:experts]


@dataclass(frozen=True)
class Form:
    """What a module of experts computes.

    ups: one parameter of gates and ups, one of each, or one of ups alone. beyond: what an expert of a number
    beyond the last one does: "" where the module refuses such a number, "nothing", "passes" the token.
    ranks: axes of hidden states that were tried.
    """

    experts: int
    ups: tuple[_Matrix, ...]
    down: _Matrix
    gate: Gate
    beyond: str = ""
    ranks: tuple[int, ...] = (2,)

    def width(self, parameters: Mapping[str, torch.Tensor]) -> int:
        """D."""
        return self.down.of(parameters, self.experts).shape[-1 if self.down.turned else -2]

    def inner(self, parameters: Mapping[str, torch.Tensor]) -> int:
        """I."""
        return self.down.of(parameters, self.experts).shape[-2 if self.down.turned else -1]

    def weights(self, parameters: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """gate_up and down, and whether both are turned."""
        import torch

        every = [one.of(parameters, self.experts) for one in (*self.ups, self.down)]
        turned = all(one.turned for one in (*self.ups, self.down))
        if not turned:
            pairs = zip(every, (*self.ups, self.down), strict=True)
            every = [x.transpose(1, 2) if one.turned else x for x, one in pairs]
        *ups, down = every
        return (ups[0] if len(ups) == 1 else torch.cat(ups, 2 if turned else 1)), down, turned

    def expert(self, parameters: Mapping[str, torch.Tensor], e: int) -> tuple[torch.Tensor, torch.Tensor]:
        """gate_up [2I, D] and down [D, I] of one expert."""
        import torch

        every = [(one.of(parameters, self.experts)[e], one.turned) for one in (*self.ups, self.down)]
        *ups, down = (x.T if turned else x for x, turned in every)
        return (ups[0] if len(ups) == 1 else torch.cat(ups)), down

    def __call__(
        self, parameters: Mapping[str, torch.Tensor], given: Sequence[torch.Tensor], compute: Compute
    ) -> torch.Tensor:
        """What the module gives for hidden states [..., D], choice and shares [T, k]."""
        hidden, indices, shares = given
        flat = hidden.reshape(-1, hidden.shape[-1])
        shares = shares.to(hidden.dtype)
        if not self.beyond:
            return compute(self, parameters, flat, indices, shares).reshape(hidden.shape)
        own = indices < self.experts
        kept = shares * own
        result = compute(self, parameters, flat, indices * own, kept)
        if self.beyond == "passes":
            result = result + flat * (shares - kept).sum(-1, keepdim=True)
        return result.reshape(hidden.shape)


def forms_of(model: torch.nn.Module) -> tuple[list[tuple[torch.nn.Module, Form]], list[str]]:
    """The modules of a model that compute experts in a loop of their own and what each computes; the paths of
    those, called as such modules are, of which it was not found out.
    """
    found: list[tuple[torch.nn.Module, Form]] = []
    unknown: list[str] = []
    tried: list[tuple[torch.nn.Module, Form | None]] = []
    for path, module in model.named_modules():
        if not _is_called_so(module):
            continue
        known = [(other, one) for other, one in tried if repeats.alike(other, module)]
        form = known[0][1] if known else _form_of(module)
        tried.append((module, form))
        if form is None:
            unknown.append(path)
        else:
            found.append((module, form))
    return found, unknown


def has_interface(module: torch.nn.Module) -> bool:
    """Whether a module computes experts through transformers' interface, which `experts.py` knows."""
    return hasattr(type(module), "_apply_gate") and hasattr(module, "is_transposed")


def _is_called_so(module: torch.nn.Module) -> bool:
    return _parameters(type(module)) == _TAKEN and not has_interface(module)


@functools.cache
def _parameters(kind: type[torch.nn.Module]) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(kind.forward).parameters)[1:]
    except (TypeError, ValueError):
        return ()


def standing(form: Form, compute: Compute) -> Callable[..., Any]:
    """What is called as a module's forward method; one object for one form, so that layers stay alike."""

    def forward(self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
        if hidden_states.dim() not in form.ranks:  # not tried: the module itself says what it does
            return type(self).forward(self, hidden_states, top_k_index, top_k_weights)
        parameters = dict(self.named_parameters())
        return form(parameters, (hidden_states, top_k_index, top_k_weights), compute)

    return forward


@contextlib.contextmanager
def replaced(found: Sequence[tuple[torch.nn.Module, Form]], compute: Compute) -> Generator[None]:
    """Within it, the modules found leave what `compute` leaves."""
    made = {form: standing(form, compute) for _, form in found}
    with contextlib.ExitStack() as stack:
        for module, form in found:
            stack.enter_context(repeats.replaced(module, "forward", MethodType(made[form], module)))
        yield


# -- finding out


def _form_of(module: torch.nn.Module) -> Form | None:
    import torch

    parameters = {name: _overlapping(p.shape, i) for i, (name, p) in enumerate(module.named_parameters())}
    with torch.no_grad():
        for form in _candidates(module, parameters):
            proven = _proven(module, form, parameters)
            if proven is not None:
                return proven
    return None


def _overlapping(shape: Sequence[int], seed: int) -> torch.Tensor:
    """A tensor of this shape whose rows overlap in memory, so that it takes little; drawn at random."""
    import torch

    row, element = _STEPS
    strides = [element]
    for i in range(len(shape) - 2, -1, -1):
        strides.insert(0, row if i == len(shape) - 2 else strides[0] * shape[i + 1])
    size = 1 + sum(step * (n - 1) for step, n in zip(strides, shape, strict=True))
    drawn = torch.randn(max(size, 1), generator=torch.Generator().manual_seed(seed))
    return (drawn / max(shape[-1], 1) ** 0.5).as_strided(tuple(shape), tuple(strides))


def _candidates(module: torch.nn.Module, parameters: Mapping[str, Any]) -> Iterator[Form]:
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    if len(shapes) not in (2, 3) or not all(len(s) in (2, 3) for s in shapes.values()):
        return
    gates: dict[tuple[object, ...], Gate | None] = {}
    for experts in _counts(module, shapes):
        stacked = {n: s if len(s) == 3 else (experts, s[0] // experts, s[1]) for n, s in shapes.items()}
        for ups, down, gated in _layouts(stacked):
            form = Form(experts, ups, down, Gate(gated=gated))
            key = experts, *(one.name for one in (*ups, down)), form.inner(parameters)
            if key not in gates:
                gates[key] = _gate_of(module, form, parameters)
            gate = gates[key]
            if gate is not None:
                yield Form(experts, ups, down, gate)


def _gate_of(module: torch.nn.Module, form: Form, parameters: Mapping[str, Any]) -> Gate | None:
    """What the module computes between the products of a form; None where it multiplies otherwise."""
    import torch

    for rank in (2, 3):

        def call(tokens: int, rank: int = rank) -> object:
            return torch.func.functional_call(
                module, dict(parameters), _equal(form, parameters, rank, tokens)
            )

        matrices = [one.name for one in form.ups], form.down.name
        between = expert_gates.Between(call, parameters, matrices, form.inner(parameters))
        gate = expert_gates.gate_between(between, form.gate.gated)
        if gate is not None:
            return gate
    return None


def _equal(form: Form, parameters: Mapping[str, Any], rank: int, tokens: int) -> _Given:
    """Tokens that all choose the first expert and the last one."""
    import torch

    hidden = torch.ones((1,) * (rank - 2) + (tokens, form.width(parameters)))
    indices = torch.tensor([[0, form.experts - 1]]).repeat(tokens, 1)
    return hidden, indices, torch.ones(tokens, 2)


def _counts(module: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> list[int]:
    """How many experts there may be."""
    stacks = [s[0] for s in shapes.values() if len(s) == 3]
    flat = [s[0] for s in shapes.values() if len(s) == 2]
    plain = [n for n in vars(module).values() if isinstance(n, int) and n > 1]
    some = [min(stacks)] if stacks else sorted(set(plain))
    return [n for n in some if n > 0 and all(rows % n == 0 for rows in flat)]


def _layouts(stacked: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[tuple[_Matrix, ...], _Matrix, bool]]:
    """Ups, down, and whether there are gates: parameters [E, a, b] in every order that their shapes allow."""
    common = set.intersection(*(set(s[1:]) for s in stacked.values()))
    for order, width in itertools.product(itertools.permutations(stacked), sorted(common, reverse=True)):
        *above, last = order
        others = [_other(stacked[name], width) for name in order]
        inner = others[-1]
        gated = len(above) == 2 or others[0] == 2 * inner
        if others[:-1] != [inner * (2 if gated and len(above) == 1 else 1)] * len(above):
            continue
        sides = [_turned(stacked[name], width, -1) for name in above] + [_turned(stacked[last], width, -2)]
        for turned in itertools.product(*sides):
            matrices = [_Matrix(name, t) for name, t in zip(order, turned, strict=True)]
            yield tuple(matrices[:-1]), matrices[-1], gated


def _other(shape: tuple[int, ...], width: int) -> int:
    """The length beside `width` of a matrix."""
    return shape[1] if shape[2] == width else shape[2]


def _turned(shape: tuple[int, ...], width: int, axis: int) -> list[bool]:
    """Whether `width` stands along the axis where `Moe` has it, along the other one, or both."""
    other = -3 - axis
    return [turned for turned, at in ((False, axis), (True, other)) if shape[at] == width]


def _proven(module: torch.nn.Module, form: Form, parameters: Mapping[str, Any]) -> Form | None:
    """The form with what it does beyond its experts, where it gives what the module does."""
    ranks = tuple(
        rank for rank in (2, 3) if _agrees(module, form, parameters, _given(form, parameters, 0, rank))
    )
    if not ranks:
        return None
    strained = _large(form, parameters, ranks[0]), _alike(form, parameters, ranks[0])
    if not all(_agrees(module, form, parameters, given) for given in strained):
        return None
    ways = [_agreeing(module, form, parameters, more, ranks[0]) for more in (1, 2, 3)]
    beyond = {way for way in ways if way}
    if len(beyond) > 1 or None in ways:
        return None
    return Form(form.experts, form.ups, form.down, form.gate, next(iter(beyond), ""), ranks)


def _agreeing(
    module: torch.nn.Module, form: Form, parameters: Mapping[str, Any], more: int, rank: int
) -> str | None:
    """What an expert beyond the last one does; None where that is nothing known."""
    given = _given(form, parameters, more, rank)
    if _called(module, parameters, given) is None:
        return ""
    for beyond in ("passes", "nothing"):
        one = Form(form.experts, form.ups, form.down, form.gate, beyond)
        if _agrees(module, one, parameters, given):
            return beyond
    return None


_Given = tuple[Any, Any, Any]
"""Hidden states, indices and weights."""


def _given(form: Form, parameters: Mapping[str, Any], more: int, rank: int) -> _Given:
    """Three tokens that choose the first expert, one in the middle and the last one; with `more`, one that
    is so many beyond the last instead of it.
    """
    import torch

    shape = (1,) * (rank - 2) + (3, form.width(parameters))
    hidden = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    middle, last = form.experts // 2, form.experts - 1 + more
    indices = torch.tensor([[0, last], [last, middle], [middle, 0]])
    return hidden, indices, torch.tensor([[0.7, 0.2], [0.4, 1.1], [0.5, 0.3]])


def _large(form: Form, parameters: Mapping[str, Any], rank: int) -> _Given:
    """Tokens a hundred times larger, three for each expert and the one before it: limits may be an expert's
    own. Of many experts sixteen.
    """
    import torch

    hidden, _, shares = _given(form, parameters, 0, rank)
    count = min(form.experts, _MOST_LARGE)
    chosen = torch.linspace(0, form.experts - 1, count).round().long()
    indices = torch.stack([chosen, chosen.roll(1)], -1).repeat(3, 1)
    return torch.cat([hidden * 100] * count, -2), indices, shares.repeat(count, 1)


def _alike(form: Form, parameters: Mapping[str, Any], rank: int) -> _Given:
    """192 tokens of which all choose the last expert."""
    import torch

    hidden, _, shares = _given(form, parameters, 0, rank)
    indices = torch.tensor([[form.experts - 1, 0]]).repeat(192, 1)
    return torch.cat([hidden] * 64, -2), indices, shares.repeat(64, 1)


def _called(module: torch.nn.Module, parameters: Mapping[str, Any], given: _Given) -> Any:
    """What the module gives; None where it refuses the call."""
    import torch

    try:
        result = torch.func.functional_call(module, dict(parameters), given)
    except Exception:  # noqa: BLE001  (whatever it raises for numbers that it does not know)
        return None
    return result if isinstance(result, torch.Tensor) and result.shape == given[0].shape else None


def _agrees(module: torch.nn.Module, form: Form, parameters: Mapping[str, Any], given: _Given) -> bool:
    wanted = _called(module, parameters, given)
    if wanted is None:
        return False
    ours = form(parameters, given, _computed)
    return float((ours - wanted).abs().max()) <= _TOLERANCE * float(wanted.abs().max())  # no NaN


def _computed(
    form: Form, parameters: Mapping[str, Any], hidden: Any, indices: Any, weights: Any
) -> torch.Tensor:
    """The meaning of `Moe`, of the experts that are chosen alone: all of them would take memory."""
    return mix(hidden, indices, weights, lambda e: form.expert(parameters, e), form.gate)
