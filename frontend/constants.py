"""Nodes of an exported program that are computed from numbers alone, by torch itself.

Models compute some numbers while they run that nothing about the text decides: a quantile of the normal
distribution, from the share of activations that is to stay. What no handler knows is torch's own operator's.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Set
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_LARGEST = 1024
"""Elements of anything on the way."""


class Constants:
    """What nodes are as numbers.

    Args:
        lifted: placeholder's name → the tensor that the module made from a literal.
        written: nodes whose memory an operator writes to, under whatever name.
    """

    def __init__(self, lifted: Mapping[str, torch.Tensor], written: Set[Any] = frozenset()) -> None:
        self.lifted, self.written = lifted, written
        self.known: dict[Any, Any] = {}

    def of(self, node: Any) -> Any:
        """The tensor, or list of them, that a node makes whatever the inputs are, on the CPU; None where
        that depends on an input, a weight, a size or chance, is written to, or is large.
        """
        if node not in self.known:
            self.known[node] = self._computed(node)
        return self.known[node]

    def _computed(self, node: Any) -> Any:
        import torch

        if node in self.written:
            return None
        if node.op == "placeholder":
            given = self.lifted.get(node.name)
            return given if given is not None and not given.is_meta and given.numel() <= _LARGEST else None
        if node.op != "call_function":
            return None
        if node.target is operator.getitem:
            several = self.of(node.args[0])
            return None if several is None else several[node.args[1]]
        made = node.meta.get("val")
        results = made if isinstance(made, list | tuple) else [made]
        plain = all(isinstance(r, torch.Tensor) and _is_small(r) for r in results)
        schema = getattr(node.target, "_schema", None)
        if not plain or schema is None or (schema.is_mutable and str(node.target) != "aten.detach_.default"):
            return None
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            return None
        missing = False

        def number(one: Any) -> Any:
            nonlocal missing
            found = self.of(one)
            missing = missing or found is None
            return found

        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), number)
        if missing:
            return None
        return node.target(*args, **{**kwargs, **({"device": "cpu"} if "device" in kwargs else {})})


def _is_small(tensor: torch.Tensor) -> bool:
    shape = tensor.shape
    return all(type(d) is int for d in shape) and shape.numel() <= _LARGEST


__all__ = ["Constants"]
