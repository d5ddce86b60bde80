"""Mixtures of experts while a model is traced.

transformers computes experts through an interface (`ALL_EXPERTS_FUNCTIONS`): every model that uses it calls
one function with hidden states [T, D], the router's choice [T, k] and its weights [T, k], and the module that
holds the stacked matrices. While `installed` is open, that function is one operator of ours, which the
importer turns into a `moe`; what routers compute stays tensor ops. Modules that compute experts in a loop of
their own leave the same operator, where it is found out what they compute (`expert_loops.py`). A model that
computes experts in another way is refused by the first operator that is not known.

What happens between the two products of an expert is a method of the module, which is tried (`gate_of`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..ir.core import Value
from ..ir.errors import InputError, UnsupportedError
from ..ir.ops.moe import Gate, Moe
from . import expert_gates, expert_loops
from .aten_table import registered
from .export import depends_on_values
from .operators import Definition, define_operators

if TYPE_CHECKING:
    import torch

    from .importer import Importer

NAMESPACE = "llmc_experts"
_numbers = itertools.count()  # of our functions in transformers' registry: other threads may trace too
_SCHEMA = (
    "(Tensor hidden, Tensor indices, Tensor weights, Tensor gate_up, Tensor down, Tensor? up_bias, "
    "Tensor? down_bias, str activation, float alpha, float limit, float offset, bool interleaved, "
    "bool gated, bool limits_active, bool transposed) -> Tensor"
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
                remedy="experts may have two or three matrices each, without biases, and between them what "
                "Gate in ir/ops/moe.py computes; or report the model",
            ) from error


@contextmanager
def _interface(model: Any) -> Generator[None]:
    """Experts that are computed through transformers' interface leave one operator each."""
    found = [(path, one) for path, one in model.named_modules() if expert_loops.has_interface(one)]
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
    import torch

    if module.has_gate:
        gate = expert_gates.found_gate(expert_gates.of_products(module._apply_gate), torch.float64)
    else:
        gate = expert_gates.found_activation(module.act_fn, torch.float64)
    if gate is None:
        kind = "a gate" if module.has_gate else "an activation"
        raise UnsupportedError(
            f"the experts of {path} have {kind} of a kind that is not known",
            remedy="add it to Gate in ir/ops/moe.py, or report the model",
        )
    return gate


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
