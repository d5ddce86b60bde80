"""What an expert computes between its products, found by trying it.

Implementations name their activations and constants as they like. So the constants of a `Gate` are read off a
few values, and what it then computes is compared with the module's own on a grid.

A module that computes experts in a loop of its own has no method to try. There the values are put in on the
way: the module runs, what its products with the first matrices give is replaced by the grid, and what it
would multiply by the last matrix is the result (`Between`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..ir.ops.moe import GATES, Gate

if TYPE_CHECKING:
    import torch

_FAR = 1e9  # beyond every limit of a gate
_TOLERANCE = 1e-5  # of a gate's result: some compute in float32
_ROUNDED = 1e-6  # of an activation, in units of its argument

Pairs = Callable[[Any, Any, bool], Any]
"""Gates [P], ups [P] and whether products are to be interleaved → results [P]."""
Each = Callable[[Any], Any]
"""Products [P] without a gate → results [P]."""


def of_products(apply: Callable[[Any], Any]) -> Pairs:
    """What `apply` computes of products [P, 2I] → [P, I], for the first of two pairs a row."""
    import torch

    def pairs(gate: torch.Tensor, up: torch.Tensor, interleaved: bool) -> torch.Tensor:
        none = torch.zeros_like(gate)
        order = [gate, up, none, none] if interleaved else [gate, none, up, none]
        return apply(torch.stack(order, -1))[:, 0]

    return pairs


def found_gate(pairs: Pairs, dtype: torch.dtype) -> Gate | None:
    """The `Gate` that computes what `pairs` does, in numbers of a dtype; None where there is none."""
    import torch

    def value(gate: float, up: float, interleaved: bool) -> float:
        given = torch.tensor([[gate], [up]], dtype=dtype)
        return float(pairs(given[0], given[1], interleaved)[0])

    # Of two pairs the first result: where the second pair stands apart, it depends on elements 0 and 1.
    interleaved = value(1.0, 1.0, True) != value(1.0, 0.0, True)
    at_zero, at_one = value(1.0, 0.0, interleaved), value(1.0, 1.0, interleaved)
    active = at_one - at_zero
    if not active or not math.isfinite(active):
        return None
    offset = _rounded(at_zero / active)
    most = value(1.0, _FAR, interleaved) / active - offset
    limit = 0.0 if most > _FAR / 2 else _rounded(most)
    candidates: list[Gate] = []
    for after in (False, True) if limit else (False,):
        form: dict[str, Any] = {"limit": limit, "offset": offset, "interleaved": interleaved}
        form["limits_active"] = after
        candidates += [Gate(name, **form) for name in GATES if name != "swish"]
        if 0 < active < 1:
            candidates.append(Gate("swish", alpha=_rounded(-math.log(1 / active - 1)), **form))
    # What a limit does shows near it and beyond it.
    near = limit * torch.tensor([-3, -1.1, -0.9, 0.9, 1.1, 3], dtype=dtype)
    grid = torch.cat([torch.linspace(-12, 12, 49, dtype=dtype), _outliers(dtype), near])
    gates, ups = torch.cartesian_prod(grid, grid).unbind(-1)
    wanted = pairs(gates, ups, interleaved)
    # The second: what float32 rounds of an activation that is nearly zero, multiplied.
    scale = _TOLERANCE * (1 + wanted.abs()) + _ROUNDED * (gates * ups).abs()

    def computed(one: Gate) -> torch.Tensor:
        order = torch.stack([gates, ups], -1)  # a single pair a row stands alike in both orders
        return one(order)[:, 0]

    return next((one for one in candidates if bool(((computed(one) - wanted).abs() <= scale).all())), None)


def found_activation(apply: Each, dtype: torch.dtype) -> Gate | None:
    """The `Gate` without a gate that computes what `apply` does, element by element."""
    import torch

    grid = torch.cat([torch.linspace(-12, 12, 4001, dtype=dtype), _outliers(dtype)])
    wanted = apply(grid)
    candidates = [Gate(name, gated=False) for name in GATES if name != "swish"]
    scale = _TOLERANCE * (1 + wanted.abs())
    return next((one for one in candidates if bool(((one(grid) - wanted).abs() <= scale).all())), None)


def _outliers(dtype: torch.dtype) -> torch.Tensor:
    """Numbers near zero, where thresholds may be, and large ones, which limits of one side alone cut."""
    import torch

    near, far = (1e-3, 5e-3, 0.02, 0.07, 0.13, 0.29, 0.37), (16, 24, 48, 100, 448, 1e3, 1e4)
    return torch.tensor([sign * x for x in (*near, *far) for sign in (-1, 1)], dtype=dtype)


def _rounded(value: float) -> float:
    """A constant as somebody wrote it, out of a result of float32 or float64."""
    return float(f"{value:.6g}")


# -- a loop of a module's own


class NothingBetween(Exception):
    """A module does not compute products as it was believed to."""


class Between:
    """What a module computes between its products with some matrices, ups, and the one with the last, down.

    call: runs the module for a number of tokens that all choose one expert. parameters: those that it runs
    with. inner: I. Raises NothingBetween where it is called and the module does not compute so.
    """

    def __init__(
        self,
        call: Callable[[int], object],
        parameters: Mapping[str, torch.Tensor],
        matrices: tuple[Sequence[str], str],
        inner: int,
    ) -> None:
        self._call, self._inner = call, inner
        ups, down = matrices
        self._ups, self._down = [parameters[name] for name in ups], parameters[down]

    def pairs(self, gate: torch.Tensor, up: torch.Tensor, interleaved: bool) -> torch.Tensor:
        """`Pairs` of a module with gates."""
        import torch

        gates, ups = self._rows(gate), self._rows(up)
        if len(self._ups) == 2:  # of matrices that stand apart, the second pair's gate is no up
            return self._between([gates, torch.zeros_like(ups) if interleaved else ups])[: len(gate)]
        both = torch.stack([gates, ups], -1).flatten(1) if interleaved else torch.cat([gates, ups], 1)
        return self._between([both])[: len(gate)]

    def each(self, products: torch.Tensor) -> torch.Tensor:
        """`Each` of a module without gates."""
        return self._between([self._rows(products)])[: len(products)]

    def _rows(self, values: torch.Tensor) -> torch.Tensor:
        """[P] → [tokens, I], the first P of them; tokens that cannot be taken for anything else."""
        import torch

        rows = max(3, -(-len(values) // self._inner))
        while rows in (self._inner, 2 * self._inner):
            rows += 1
        filled = torch.zeros(rows * self._inner)
        filled[: len(values)] = values
        return filled.view(rows, self._inner)

    def _between(self, products: list[torch.Tensor]) -> torch.Tensor:
        """Products [tokens, N] of each of `ups` → [tokens · I]."""
        put = _putting(dict(zip(map(id, self._ups), products, strict=True)), self._down)
        try:
            with put:
                self._call(len(products[0]))
        except Exception as error:  # whatever the module raises of a call that it is not made for
            raise NothingBetween from error
        found = None if put.result is None else _as_rows(put.result, (len(products[0]), self._inner))
        if found is None:
            raise NothingBetween
        return found.flatten()


def _as_rows(x: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor | None:
    """A tensor of this shape, or of the turned one, among axes of length 1."""
    lengths = tuple(n for n in x.shape if n > 1)
    if lengths == tuple(n for n in shape if n > 1):
        return x.reshape(shape)
    return x.reshape(shape[::-1]).T if lengths == tuple(n for n in shape[::-1] if n > 1) else None


def _putting(products: Mapping[int, torch.Tensor], down: torch.Tensor) -> Any:
    """A mode of torch in which a product with what is made of a parameter, by its id, gives `products`, and
    what is multiplied by anything made of `down` is `result`.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    names = ("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot")
    multiplies = {getattr(torch.ops.aten, name) for name in names}

    class Putting(TorchDispatchMode):
        result: torch.Tensor | None = None

        def __init__(self) -> None:
            super().__init__()
            # Tensors are kept, so that no other one gets the id of one that is gone.
            self.made: dict[int, tuple[int, torch.Tensor]] = {}

        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            of = [key for x in given if (key := self._key(x)) is not None]
            if not of:
                return func(*args, **kwargs)
            if func.overloadpacket not in multiplies:
                result = func(*args, **kwargs)
                for x in tree_leaves(result):
                    if isinstance(x, torch.Tensor):
                        self.made[id(x)] = of[0], x
                return result
            return self._product(func, args, kwargs, given, of[0])

        def _key(self, x: torch.Tensor) -> int | None:
            if id(x) in products or x is down:
                return id(x)
            known = self.made.get(id(x))
            return None if known is None else known[0]

        def _product(self, func: Any, args: Any, kwargs: Any, given: Sequence[Any], key: int) -> Any:
            plain = [torch.empty_like(x, device="meta") if isinstance(x, torch.Tensor) else x for x in args]
            shape = func(*plain, **kwargs).shape  # of real sizes the product itself takes long
            if key == id(down):
                others = [x for x in given if self._key(x) is None]
                self.result = others[-1].clone() if others else None
                return torch.zeros(shape)
            rows = _as_rows(products[key], (shape[-2], shape[-1])) if len(shape) > 1 else None
            if rows is None:
                raise NothingBetween
            return rows.expand(shape).clone()

    return Putting()


def gate_between(between: Between, gated: bool) -> Gate | None:
    """The `Gate` between a module's products; None where it is none, or the module multiplies otherwise."""
    import torch

    try:
        if gated:
            return found_gate(between.pairs, torch.float32)
        return found_activation(between.each, torch.float32)
    except NothingBetween:
        return None
