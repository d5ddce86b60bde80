"""The experts of a mixture as GGUF has them and as transformers has them, both stacked along axis 0."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from ..ir.row_orders import Rows
from ..ir.weights import LazyTensor, QuantizedTensors, concat_quantized
from .weights import TurnedTensor

_STACKED: Final = re.compile(
    r".*\blayers\.(?P<layer>\d+)\..*"
    r"(?P<part>\bexperts\.gate_up_proj|\bexperts\.up_proj|\bexperts\.down_proj"
    r"|input_linear\.weight|output_linear\.weight)"
    r"(?P<bias>_bias)?"
)


class JoinedTensor:
    """Two tensors [E, I, …] as one of [E, 2 I, …]: the second's rows behind the first's, or in turns."""

    def __init__(self, parts: Sequence[LazyTensor], *, in_turns: bool) -> None:
        first, second = parts
        self.parts = parts
        self._in_turns = in_turns
        self.shape: tuple[int, ...] = (first.shape[0], first.shape[1] + second.shape[1], *first.shape[2:])
        self.dtype = first.dtype
        self.source = f"{first.source} and {second.source}"

    @property
    def quantized(self) -> QuantizedTensors | None:
        """The parts' own quantized parts, where both have them on one grid."""

        def join(parts: Sequence[LazyTensor]) -> LazyTensor:
            return JoinedTensor(parts, in_turns=self._in_turns)

        return concat_quantized(self.parts, join)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
        arrays = [part.read(start, stop) for part in self.parts]
        if not self._in_turns:
            return np.concatenate(arrays, axis=1)
        return np.stack(arrays, axis=2).reshape(len(arrays[0]), *self.shape[1:])

    def __repr__(self) -> str:
        return f"JoinedTensor({self.dtype}{list(self.shape)}, {self.source!r})"


def stacked_experts(
    model: Any, tensors: Mapping[str, LazyTensor], *, turned: bool, in_turns: bool
) -> tuple[dict[str, LazyTensor], set[str]]:
    """The model's parameters that hold all experts of a layer, and the names of the tensors behind them.

    GGUF has ffn_gate_exps, ffn_up_exps [E, I, H] and ffn_down_exps [E, H, I], some with biases. transformers
    has gate and up in one, [E, 2 I, H], or up alone where experts have no gate; `turned`: [E, H, 2 I], and
    down [E, I, H]; `in_turns`: a row of the gate, then one of up.
    """
    found, used = dict[str, LazyTensor](), set[str]()
    for parameter, _ in model.named_parameters():
        match = _STACKED.fullmatch(parameter)
        if match is None:
            continue
        kind = "bias" if match["bias"] else "weight"
        down = match["part"] in ("experts.down_proj", "output_linear.weight")
        block = f"blk.{match['layer']}.ffn"
        if not down and f"{block}_gate_up_exps.{kind}" in tensors and not turned:
            found[parameter] = tensors[f"{block}_gate_up_exps.{kind}"]
            used.add(f"{block}_gate_up_exps.{kind}")
            continue
        gated = match["part"] != "experts.up_proj"
        parts = ("down",) if down else ("gate", "up") if gated else ("up",)
        names = [f"{block}_{part}_exps.{kind}" for part in parts]
        held = [tensors[name] for name in names if name in tensors]
        if len(held) < len(names) or any(part.shape != held[0].shape for part in held):
            continue  # a parameter without a tensor is an error that is told later
        used |= set(names)
        joined = held[0] if len(held) == 1 else JoinedTensor(held, in_turns=in_turns)
        found[parameter] = TurnedTensor(joined) if turned and kind == "weight" else joined
    return found, used


def stacks_of_file(
    weights: Mapping[str, LazyTensor], stored: Mapping[str, LazyTensor]
) -> dict[str, list[tuple[str, Rows]]]:
    """The tensors of a file (`stored`) that a model's stacks are (`weights`, by parameter), as
    `StoredModules` has them: of each the name with a "*" for the matrix's number, and all of its rows.
    """
    names = {id(tensor): name for name, tensor in stored.items()}
    found: dict[str, list[tuple[str, Rows]]] = {}
    for parameter, tensor in weights.items():
        base = tensor.straight if isinstance(tensor, TurnedTensor) else tensor
        parts = base.parts if isinstance(base, JoinedTensor) else [base]
        known = [names.get(id(part)) for part in parts]
        if len(tensor.shape) == 3 and all(name is not None for name in known):
            found[parameter] = [
                (matrix_of(str(name), "*", part.shape[0]), np.arange(part.shape[1]))
                for name, part in zip(known, parts, strict=True)
            ]
    return found


def matrix_of(tensor: str, number: int | str, count: int) -> str:
    """What one of so many matrices in a file's tensor is called: one of another number is another's."""
    return f"{tensor.removesuffix('.weight')}.{number}/{count}"
