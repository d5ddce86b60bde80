"""What importers ask of a checkpoint's tensors and configuration before they believe either."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ...ir.errors import InputError
from ...ir.weights import LazyTensor

Config = Mapping[str, Any]
_DISAGREE: Final = "quantization_config and tensors are of different checkpoints; download it again"


def disagree(tensor: LazyTensor | str, what: str) -> InputError:
    """The error for a tensor that does not fit its configuration or its siblings."""
    name = tensor if isinstance(tensor, str) else tensor.source
    return InputError(f"{name} {what}", remedy=_DISAGREE)


def integer(config: Config, *names: str, default: int | None = None) -> int:
    """An integer of the configuration by the first of its names that is there."""
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if value is not None:
            break
    else:
        value = None
        if default is not None:
            return default
    raise InputError(
        f"quantization_config: {names[0]} is {value!r}, no integer", remedy="download config.json again"
    )


@dataclass(frozen=True)
class Module:
    """The tensors of one quantized module: `prefix` is its name with a dot."""

    prefix: str
    tensors: Mapping[str, LazyTensor]

    def has(self, name: str) -> bool:
        return self.prefix + name in self.tensors

    def get(self, name: str, rank: int, *dtypes: str) -> LazyTensor:
        """A tensor by its last name, of that rank and one of these dtypes."""
        tensor = self.tensors.get(self.prefix + name)
        if tensor is None:
            raise disagree(f"tensor {self.prefix}{name}", "is missing")
        if tensor.dtype not in dtypes or len(tensor.shape) != rank:
            raise disagree(
                tensor, f"is {tensor.dtype}{list(tensor.shape)}, not {' or '.join(dtypes)} of {rank} axes"
            )
        if 0 in tensor.shape:
            raise disagree(tensor, f"is empty: {list(tensor.shape)}")
        return tensor


def expect_shape(tensor: LazyTensor, shape: tuple[int, ...], why: str) -> None:
    if tensor.shape != shape:
        raise disagree(tensor, f"has the shape {list(tensor.shape)}, {why} asks for {list(shape)}")


def groups_of(k: int, group_size: int, tensor: LazyTensor) -> int:
    """Groups a row of K values; -1 stands for one. Raises InputError for another size below 1."""
    if group_size == -1:
        return 1
    if group_size < 1:
        raise disagree(tensor, f"has groups of {group_size} by quantization_config, which is no size")
    return -(-k // group_size)


def column_order(g_idx: LazyTensor, k: int, group_size: int) -> np.ndarray[Any, Any] | None:
    """The columns sorted by group, so that groups are consecutive; None where they are already.

    Args:
        g_idx: integer [K], the group of each column. All -1 (never filled in) means groups in order.
    Raises:
        InputError: an index out of range, or groups that do not have `group_size` columns each.
    """
    expect_shape(g_idx, (k,), "the number of columns")
    groups = g_idx.read().astype(np.int64)
    count = -(-k // group_size)
    wanted = np.arange(k) // group_size
    if (groups == -1).all():
        return None
    if groups.size and (groups.min() < 0 or groups.max() >= count):
        raise disagree(g_idx, f"names group {groups.max() if groups.min() >= 0 else groups.min()} of {count}")
    columns = np.argsort(groups, kind="stable")
    if not np.array_equal(groups[columns], wanted):
        raise disagree(g_idx, f"has groups of other sizes than {group_size} columns")
    return None if np.array_equal(columns, np.arange(k)) else columns
