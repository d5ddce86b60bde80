"""torch.export, quietly: what it logs and prints becomes one line of an error.

A tensor that the model makes of numbers while it runs, `torch.tensor(0.5, device=x.device)`, would have no
values on the meta device. It is traced as operators that hold its numbers: full, joined where they differ.
The same with a list of places, x[:, [-2]], which torch makes such a tensor of: slices, joined.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import logging
import re
import threading
import warnings
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

from ..ir.errors import UnsupportedError
from .repeats import CannotRepeat

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """torch.export logs and prints what it raises as well, over many lines; the error says it in one."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)


def _uncached() -> Any:
    """torch keeps what each operator made of which shapes. With a symbolic number of tokens hardly any comes
    again: to keep it costs a third of a trace.
    """
    import torch._dynamo.config as settings

    name = "fake_tensor_cache_enabled"
    patch: Any = settings.patch  # pyright: ignore[reportAttributeAccessIssue]  (a module that is a class)
    return patch(name, False) if hasattr(settings, name) else contextlib.nullcontext()


_TRACING = threading.Lock()
_without: list[bool] = []
"""What the setting was, once for each trace that runs."""


@contextlib.contextmanager
def _without_stacks() -> Generator[None]:
    """torch notes for each operator which lines of Python led to it, a tenth of a trace; nobody reads it."""
    import torch.fx.config as settings

    name = "do_not_emit_stack_traces"
    if not hasattr(settings, name):  # an older torch
        yield
        return
    with _TRACING:  # other threads may trace too: the first saw what the last is to put back
        _without.append(_without[0] if _without else getattr(settings, name))
        setattr(settings, name, True)
    try:
        yield
    finally:
        with _TRACING:
            before = _without.pop()
            if not _without:
                setattr(settings, name, before)


def _flat(data: Any) -> tuple[list[Any], list[int]] | None:
    """Numbers of nested lists in order, and their shape; None for anything else."""
    if isinstance(data, bool | int | float):
        return [data], []
    if not isinstance(data, Sequence) or isinstance(data, str):
        return None
    inner = [_flat(one) for one in data]
    shapes = {tuple(one[1]) for one in inner if one is not None}
    if None in inner or len(shapes) > 1:
        return None
    numbers = [n for one in inner if one is not None for n in one[0]]
    return numbers, [len(data), *(shapes.pop() if shapes else ())]


def _literals() -> Any:
    """A mode of torch in which tensors made of numbers on the meta device are made by operators."""
    import torch
    from torch.overrides import TorchFunctionMode

    makers = (torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor, torch.Tensor.new_tensor)

    class Literals(TorchFunctionMode):
        def __torch_function__(
            self,
            func: Callable[..., Any],
            types: Any,
            args: tuple[Any, ...] = (),
            kwargs: dict[str, Any] | None = None,
        ) -> Any:
            kwargs = kwargs or {}
            if func is torch.Tensor.__getitem__ and args[0].device.type == "meta":
                picked = _picked(*args)
                if picked is not None:
                    return picked
            if func in makers:
                own = func is torch.Tensor.new_tensor
                device = kwargs.get("device", args[0].device if own else None)
                found = _flat(args[1 if own else 0]) if len(args) > own else None
                if found is not None and device is not None and torch.device(device).type == "meta":
                    like = args[0].dtype if own else torch.tensor(found[0]).dtype
                    if func is torch.scalar_tensor:  # unlike the others, of integers too
                        like = torch.get_default_dtype()
                    return _made(*found, kwargs.get("dtype") or like, device)
            return func(*args, **kwargs)

    return Literals()


def _picked(x: torch.Tensor, index: Any) -> Any:
    """x[…, [2, 0], …] by slices, where all other axes are whole; None for any other index."""
    import torch

    parts = list(index) if isinstance(index, tuple) else [index]
    lists = [i for i, p in enumerate(parts) if isinstance(p, list) and p and all(type(n) is int for n in p)]
    if len(lists) != 1:
        return None
    (at,) = lists
    rest = parts[:at] + parts[at + 1 :]
    whole = [p is Ellipsis or (isinstance(p, slice) and p == slice(None)) for p in rest]
    if not all(whole) or sum(p is Ellipsis for p in rest) > 1:
        return None
    axis = x.ndim - len(parts) + at if any(p is Ellipsis for p in parts[:at]) else at
    places = [n if n >= 0 else n + x.shape[axis] for n in parts[at]]
    return torch.cat([x.narrow(axis, n, 1) for n in places], dim=axis)


def _made(numbers: list[Any], shape: list[int], dtype: torch.dtype, device: Any) -> Any:
    """The tensor of these numbers, by operators that hold them."""
    import torch

    if len(set(numbers)) == 1:
        return torch.full(shape, numbers[0], dtype=dtype, device=device)
    if not numbers:
        return torch.zeros(shape, dtype=dtype, device=device)
    runs = [(n, len(list(same))) for n, same in itertools.groupby(numbers)]
    parts = [torch.full((count,), n, dtype=dtype, device=device) for n, count in runs]
    return torch.cat(parts).reshape(shape)


def export(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    shapes: Any,
    name: str,
    kwargs: dict[str, Any] | None = None,
    *,
    asserting: bool = False,
) -> Any:
    """An ExportedProgram by torch.export, traced without Dynamo. Raises UnsupportedError with torch's first
    reason.

    Args:
        asserting: relations of sizes that torch cannot prove become operators `_assert_scalar`, which the
            importer proves (`relation_holds`), and are no reason to fail.
    """
    import torch

    try:
        with _quiet(), _uncached(), _without_stacks(), torch.no_grad(), _literals():
            return torch.export.export(
                module,
                args,
                kwargs,
                dynamic_shapes=shapes,
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=asserting,
            )
    except CannotRepeat:
        raise
    except Exception as e:  # torch.export raises many kinds; all mean that the module cannot be traced
        raise UnsupportedError(
            f"{name} cannot be traced: {_first_reason(e)}",
            remedy="control flow and shapes must not depend on tensor values or on the number of tokens",
        ) from e


class OtherSize(UnsupportedError):
    """A size is not the same function of the number of tokens for all of them."""

    def __init__(self, message: str, *, remedy: str, fewer: int | None) -> None:
        """`fewer`: up to how many tokens it is, where that is known."""
        super().__init__(message, remedy=remedy)
        self.fewer = fewer


def is_unproven(error: UnsupportedError) -> bool:
    """Whether a model could not be traced because of a relation of sizes that torch does not see through."""
    return "satisfy the generated guard" in str(error.__cause__)


def depends_on_values(error: UnsupportedError) -> bool:
    """Whether a model could not be traced because what it does next depends on the values of a tensor."""
    return _BY_VALUE in str(error.__cause__)


_BY_VALUE = "Could not guard on data-dependent expression"
_MOST_SIZES = 1 << 20


def relation_holds(relation: Any, ranges: Any) -> bool | None:
    """Whether a relation of sizes (torch's expression) holds for every number of tokens, by trying them all;
    None where it is about something else.

    That a size is not one, or not that of two tokens, is not asked for them: torch asks it wherever it might
    repeat an axis of one (all but one of two tokens is one), and what is traced for more holds for fewer.
    """
    symbols = list(relation.free_symbols)
    if relation.is_Boolean and not symbols:
        return bool(relation)
    if len(symbols) != 1 or symbols[0] not in ranges:
        return None
    least = ranges[symbols[0]].lower
    least += max(3 - int(least), 0) if relation.is_Relational and relation.rel_op == "!=" else 0
    return _holds(relation, symbols[0], least, int(min(ranges[symbols[0]].upper, _MOST_SIZES)))


@functools.lru_cache(maxsize=4096)  # every layer asks the same
def _holds(relation: Any, symbol: Any, least: Any, upper: int) -> bool | None:
    lower = int(least)
    try:  # numbers of the same library as the relation is: least + a difference
        return all(bool(relation.xreplace({symbol: least + (n - lower)})) for n in _sizes(lower, upper))
    except TypeError:  # a relation that is none after all
        return None


def _sizes(lower: int, upper: int) -> list[int]:
    """All numbers up to some thousands; beyond, those around every power of two and multiple of a thousand:
    what relations of sizes turn at are the numbers of configurations.
    """
    some = set(range(lower, min(upper, 4096) + 1))
    turns = {1 << i for i in range(12, 21)} | set(range(5000, upper, 1000)) | {upper}
    return sorted(some | {n + d for n in turns for d in (-1, 0, 1) if lower <= n + d <= upper})


_GUARD = re.compile(r"satisfy the generated guard [^\n]*?size\(\)\[1\] (!=|<=|<) (\d+)(?![\d*+ ]*[*+])")


def narrower(error: UnsupportedError, bound: int) -> tuple[int, bool] | None:
    """A bound for the number of tokens under which the model may be traced, where `bound` was too wide for
    it; and whether the model is another above it. None where that is not why it could not be traced.

    A model that cuts a table of positions to the number of tokens tells it from the table's own length, where
    there is nothing to cut: what is traced below that length holds there too. One that picks a number of its
    keys has them all where there are no more.
    """
    if isinstance(error, OtherSize):
        return (error.fewer, True) if error.fewer is not None and 2 <= error.fewer < bound else None
    found = _GUARD.search(str(error.__cause__))
    if found is None:
        return None
    relation, number = found[1], int(found[2])
    lower = number if relation == "<=" else number - 1
    return (lower, relation != "!=") if 2 <= lower < bound else None


def _first_reason(error: Exception) -> str:
    """One line of torch.export's message: the first listed violation, else the first line; in our words where
    torch has only its own.
    """
    if _BY_VALUE in str(error):
        return "what it does next, or a size, depends on the values of a tensor"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    listed = next((line.removeprefix("- ") for line in lines if line.startswith("- ")), lines[0])
    for advice in (" For more information", " If you're using mark_dynamic"):  # on torch's own interface
        listed = listed.partition(advice)[0]
    return listed[:300]
