"""Mixtures of experts while a model is traced.

transformers computes experts through an interface (`ALL_EXPERTS_FUNCTIONS`): every model that uses it calls
one function with hidden states [T, D], the router's choice [T, k] and its weights [T, k], and the module that
holds the stacked matrices. While `installed` is open, that function is one operator of ours, which the
importer turns into a `moe`; what routers compute stays tensor ops. Modules that compute experts in a loop of
their own leave the same operator, where it is found out what they compute (`expert_loops.py`). A model that
computes experts in another way is refused by the first operator that is not known.

What happens between the two products of an expert is a method of the module, and implementations name their
constants as they like. It is found by trying it (`gate_of`): the constants are read off a few values, and the
result is compared with the module's own on a grid.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..ir.core import Value
from ..ir.errors import InputError, UnsupportedError
from ..ir.ops.moe import GATES, Gate, Moe
from . import expert_loops
from .aten_table import registered
from .export import depends_on_values
from .operators import Definition, define_operators

if TYPE_CHECKING:
    import torch

    from .importer import Importer

NAMESPACE = "llmc_experts"
_numbers = itertools.count()  # of our functions in transformers' registry: other threads may trace too
_FAR = 1e9  # beyond every limit of a gate
_TOLERANCE = 1e-5  # of a gate's result: some compute in float32
_SCHEMA = (
    "(Tensor hidden, Tensor indices, Tensor weights, Tensor gate_up, Tensor down, Tensor? up_bias, "
    "Tensor? down_bias, str activation, float alpha, float limit, float offset, bool interleaved, "
    "bool gated, bool transposed) -> Tensor"
)


@contextmanager
def installed(model: Any) -> Generator[None]:
    """Within it, the model's experts leave one operator each. A model without experts is left alone.

    Raises InputError where a router is to choose more experts than there are, UnsupportedError for a gate
    that is none of `Gate`'s.
    """
    check_choice(model)
    loops, unknown = expert_loops.forms_of(model)
    with _interface(model), expert_loops.replaced(loops, _left):
        try:
            yield
        except UnsupportedError as error:
            if not unknown or not depends_on_values(error):
                raise
            raise UnsupportedError(
                f"the experts of {unknown[0]} are computed in a loop over those that were chosen, and are of "
                "a kind that is not known",
                remedy="experts may have two or three matrices each, without biases, and between them an "
                "activation that the module holds, of those of Gate in ir/ops/moe.py; or report the model",
            ) from error


@contextmanager
def _interface(model: Any) -> Generator[None]:
    """Experts that are computed through transformers' interface leave one operator each."""
    found = [(path, one) for path, one in model.named_modules() if _is_experts(one)]
    if not found:
        yield
        return
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    gates = {id(one): gate_of(path, one) for path, one in found}
    configs: dict[int, Any] = {id(one.config): one.config for _, one in found}
    before = {key: config._experts_implementation for key, config in configs.items()}
    name = f"llmc-{next(_numbers)}"
    ALL_EXPERTS_FUNCTIONS[name] = _forward(gates)
    try:
        for config in configs.values():
            config._experts_implementation = name
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation = before[key]
        del ALL_EXPERTS_FUNCTIONS[name]


def _left(
    form: expert_loops.Form, parameters: Mapping[str, Any], hidden: Any, indices: Any, weights: Any
) -> Any:
    """The operator that stands for experts which are computed in a loop."""
    up, down, turned = form.weights(parameters)
    gate = dataclasses.astuple(form.gate)
    return _operator()(hidden, indices, weights, up, down, None, None, *gate, turned)


def _is_experts(module: Any) -> bool:
    """Whether a module computes experts through transformers' interface."""
    return hasattr(type(module), "_apply_gate") and hasattr(module, "is_transposed")


def _forward(gates: dict[int, Gate]) -> Callable[..., Any]:
    """The function that stands for all experts: the module, hidden states, choice and weights → [T, D]."""
    operator = _operator()

    def forward(module: Any, hidden: Any, indices: Any, weights: Any) -> Any:
        gate = gates[id(module)]
        names = ("gate_up_proj" if gate.gated else "up_proj", "down_proj")
        biases = [getattr(module, f"{name}_bias") if module.has_bias else None for name in names]
        form = (*dataclasses.astuple(gate), module.is_transposed)
        experts = (*(getattr(module, name) for name in names), *biases)

        def computed(places: Any, shares: Any) -> Any:
            return operator(hidden, places, shares, *experts, *form)

        weights = weights.to(hidden.dtype)
        if module.has_post_expert_norm:
            return _normalised(module.post_expert_norm, computed, indices, weights)
        return computed(indices, weights)

    return forward


def _normalised(norm: Any, computed: Callable[..., Any], indices: Any, weights: Any) -> Any:
    """The weighted sum of normalised results: each token's first choice, its second, …, one operator each."""
    import torch

    whole = torch.ones_like(weights[:, :1])
    return sum(
        norm(computed(indices[:, j : j + 1], whole)) * weights[:, j : j + 1] for j in range(indices.shape[-1])
    )


@functools.cache
def _operator() -> Any:
    """Our operator, for tensors without data."""
    import torch

    def fake(hidden: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.empty_like(hidden)

    return define_operators(NAMESPACE, {"moe": Definition(_SCHEMA, fake)}).moe


@registered(f"{NAMESPACE}.moe.default")
def _moe(c: Importer, *args: Any) -> Value:
    values, form, transposed = args[:7], args[7:-1], args[-1]
    return c.emit(Moe(*values, **dataclasses.asdict(Gate(*form)), transposed=transposed))


def gate_of(path: str, module: Any) -> Gate:
    """What a module of experts computes between its two products. Raises UnsupportedError for what is no
    `Gate`.
    """
    gate = _found(module._apply_gate) if module.has_gate else _found_activation(module.act_fn)
    if gate is None:
        kind = "a gate" if module.has_gate else "an activation"
        raise UnsupportedError(
            f"the experts of {path} have {kind} of a kind that is not known",
            remedy="add it to Gate in ir/ops/moe.py, or report the model",
        )
    return gate


def _found(apply: Callable[[Any], Any]) -> Gate | None:
    """The `Gate` that computes what `apply` does: products [..., 2I] → [..., I]."""
    import torch

    def value(gate: float, up: float, interleaved: bool) -> float:
        order = [gate, up, 0.0, 0.0] if interleaved else [gate, 0.0, up, 0.0]
        return float(apply(torch.tensor([order], dtype=torch.float64))[0, 0])

    # Of two pairs the first result: where the second pair stands apart, it depends on elements 0 and 1.
    interleaved = value(1.0, 1.0, True) != value(1.0, 0.0, True)
    at_zero, at_one = value(1.0, 0.0, interleaved), value(1.0, 1.0, interleaved)
    active = at_one - at_zero
    if not active or not math.isfinite(active):
        return None
    offset = _rounded(at_zero / active)
    most = value(1.0, _FAR, interleaved) / active - offset
    limit = 0.0 if most > _FAR / 2 else _rounded(most)
    form: dict[str, Any] = {"limit": limit, "offset": offset, "interleaved": interleaved}
    candidates = [Gate(name, **form) for name in GATES if name != "swish"]
    if 0 < active < 1:
        candidates.append(Gate("swish", alpha=_rounded(-math.log(1 / active - 1)), **form))
    grid = torch.linspace(-12, 12, 49, dtype=torch.float64)
    products = torch.cartesian_prod(grid, grid)  # one pair a row stands alike in both orders
    wanted = apply(products)
    scale = _TOLERANCE * (1 + wanted.abs())
    return next((one for one in candidates if bool(((one(products) - wanted).abs() <= scale).all())), None)


def _found_activation(apply: Callable[[Any], Any]) -> Gate | None:
    """The `Gate` without a gate that computes what `apply` does, element by element."""
    import torch

    grid = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    wanted = apply(grid)
    candidates = [Gate(name, gated=False) for name in GATES if name != "swish"]
    scale = _TOLERANCE * (1 + wanted.abs())
    return next((one for one in candidates if bool(((one(grid) - wanted).abs() <= scale).all())), None)


def _rounded(value: float) -> float:
    """A constant as somebody wrote it, out of a result of float32 or float64."""
    return float(f"{value:.6g}")


_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")
_OF_MODULES = ("top_k", "topk", *_CHOSEN)  # of a configuration these may be for sampling
_EXISTING = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_GROUPS = ("num_group", "n_group")


def check_choice(model: Any) -> None:
    """Raises InputError where a router is to choose more experts, or groups of them, than there are.

    torch would say it while it traces, without a name.
    """
    config = getattr(model, "config", None)
    _check("the configuration", config, "experts", _CHOSEN, _EXISTING)
    for path, module in [("the configuration", config), *model.named_modules()]:
        _check(path or "the model", module, "groups of experts", ("topk_group",), _GROUPS)
        if module is not config:
            _check(path or "the model", module, "experts", _OF_MODULES, _EXISTING)


def _check(path: str, holder: Any, what: str, few: Sequence[str], many: Sequence[str]) -> None:
    k, n = (
        next((v for name in names if _is_count(v := getattr(holder, name, None))), None)
        for names in (few, many)
    )
    # One expert: the configuration of a model that may have some and has none, whose k means nothing.
    if k is not None and n is not None and k > n > 1:
        raise InputError(
            f"{path} chooses {k} {what} a token, and there are {n}", remedy="correct config.json"
        )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
