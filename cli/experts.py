"""`llmc eval --moe`: how evenly the routers of a mixture of experts spread a text.

The artifact's graph runs by the interpreter, with the weights that were shipped: kernels give logits and
nothing else. A layer's

    share of expert e      tokens that chose it, of all tokens: k / E where all are used alike
    load-balancing loss    E · Σ_e f_e · P_e with f_e that share, and P_e the mean over tokens of the router's
                           softmax: k where all are used alike (Fedus et al. 2021, equations 4 to 6, for k
                           experts a token as transformers' `load_balancing_loss_func` has it)

The loss of the model is that of all layers' tokens together, as there; it needs the same E in all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ir.errors import InputError
from .output import table

if TYPE_CHECKING:
    from ..codegen.artifact import Artifact
    from ..ir.core import Graph, Op, Value
    from ..ir.ops.moe import Moe, QuantizedMoe

STARVED = 0.1
"""An expert with less than this part of an even share starves."""
Array = np.ndarray[Any, Any]


@dataclass
class Layer:
    """Sums over tokens of one mixture: how often each expert was chosen, and the softmax of its router."""

    name: str
    k: int
    chosen: Array
    probability: Array
    tokens: int = 0

    def add(self, indices: Array, logits: Array) -> None:
        """indices [T, k], logits float [T, E]."""
        exact = logits.astype(np.float64)
        odds = np.exp(exact - exact.max(-1, keepdims=True))
        self.probability += (odds / odds.sum(-1, keepdims=True)).sum(0)
        self.chosen += np.bincount(indices.reshape(-1), minlength=len(self.chosen))
        self.tokens += len(logits)

    @property
    def shares(self) -> Array:
        return self.chosen / max(1, self.tokens)

    @property
    def starved(self) -> list[int]:
        """Experts with less than `STARVED` of an even share."""
        even = self.k / len(self.chosen)
        return [int(e) for e in np.flatnonzero(self.shares < STARVED * even)]

    @property
    def loss(self) -> float:
        return balance_loss([self])

    def result(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "experts": len(self.chosen),
            "k": self.k,
            "tokens": self.tokens,
            "loss": self.loss,
            "shares": [round(float(s), 6) for s in self.shares],
            "starved": self.starved,
        }


def balance_loss(layers: Sequence[Layer]) -> float:
    """E · Σ_e f_e · P_e over the tokens of all layers together."""
    tokens = max(1, sum(layer.tokens for layer in layers))
    share = np.sum([layer.chosen for layer in layers], axis=0) / tokens
    probability = np.sum([layer.probability for layer in layers], axis=0) / tokens
    return float(len(share) * (share * probability).sum())


@dataclass
class Experts:
    """What an artifact's routers did with a text."""

    layers: list[Layer] = field(default_factory=list[Layer])

    def result(self) -> dict[str, Any]:
        """The keys of `--json`: `loss` is null where layers differ in their number of experts."""
        alike = len({len(layer.chosen) for layer in self.layers}) == 1
        return {
            "loss": balance_loss(self.layers) if alike else None,
            "layers": [layer.result() for layer in self.layers],
        }

    def warnings(self) -> list[str]:
        """One a layer with experts that starve."""
        found: list[str] = []
        for layer in self.layers:
            if layer.starved:
                named = ", ".join(f"{e} ({layer.shares[e]:.2%})" for e in layer.starved[:8])
                more = f" and {len(layer.starved) - 8} more" if len(layer.starved) > 8 else ""
                even = layer.k / len(layer.chosen)
                found.append(
                    f"{layer.name}: {len(layer.starved)} of {len(layer.chosen)} experts starve, with less "
                    f"than {STARVED:.0%} of the even share {even:.2%}: {named}{more}"
                )
        return found


def measure_experts(
    artifact: Artifact, windows: Sequence[Array], progress: Callable[[str, float], None]
) -> Experts:
    """Run the windows of token ids through the artifact's graph, each alone.

    Raises InputError for an artifact without experts, or one whose graph is not to be had.
    """
    from ..codegen.tvm.stored import stored_graph
    from ..ir.interpreter import run

    graph = stored_graph(artifact)
    routers = find_routers(graph)
    if not routers:
        raise InputError(f"{artifact.root} has no experts", remedy="leave --moe away")
    layers: dict[Op, Layer] = {
        op: Layer(op.loc, int(str(op.operands[1].shape[-1])), np.zeros(experts, np.int64), np.zeros(experts))
        for op, (_, experts) in routers.items()
    }
    made: dict[Value, Array] = {}
    wanted = {logits for logits, _ in routers.values()}

    def observe(op: Op, operands: Sequence[Any], results: Sequence[Any]) -> None:
        for value, result in zip(op.results, results, strict=True):
            if value in wanted:
                made[value] = result.float().numpy()
        if op in layers:
            logits, experts = routers[op]
            layer = layers[op]
            layer.add(operands[1].numpy().reshape(-1, layer.k), made.pop(logits).reshape(-1, experts))

    for number, window in enumerate(windows):
        progress("experts", number / len(windows))
        run(graph, one_step(graph, artifact, window), observe=observe)
    return Experts(list(layers.values()))


def mixtures(text: str) -> list[Op]:
    """The mixtures of experts in a graph's text."""
    from ..ir.ops.moe import Moe, QuantizedMoe
    from ..ir.parser import parse

    return [op for op in parse(text) if isinstance(op, Moe | QuantizedMoe)]


def find_routers(graph: Graph) -> dict[Op, tuple[Value, int]]:
    """Each mixture → the logits [..., E] that its choice was made by, and E."""
    from ..ir.ops.moe import Moe, QuantizedMoe

    found: dict[Op, tuple[Value, int]] = {}
    for op in graph:
        if isinstance(op, Moe | QuantizedMoe):
            experts = op.operands[3].shape[0]
            assert isinstance(experts, int)
            found[op] = (_logits_of(op, experts), experts)
    return found


def _logits_of(op: Moe | QuantizedMoe, experts: int) -> Value:
    """The layer's result [..., E] that the indices of a mixture come from."""
    from ..ir.ops.math import MatMul
    from ..ir.ops.nn import Linear
    from ..ir.ops.quant import QuantizedLinear

    waiting, seen = [op.indices], set[Any]()
    while waiting:
        value = waiting.pop(0)
        producer = value.producer
        if producer is None or value in seen:
            continue
        seen.add(value)
        if isinstance(producer, Linear | QuantizedLinear | MatMul):
            if value.shape[-1] == experts:
                return value
            continue
        waiting += producer.operands
    raise InputError(
        f"the router of {op.loc or 'a mixture'} is no linear layer of {experts} results",
        remedy="the loss is defined for such routers only",
    )


def one_step(graph: Graph, artifact: Artifact, window: Array) -> dict[str, Any]:
    """Inputs of the paged step for one sequence alone, of which no logits but the last are asked for."""
    import torch

    size, tokens = int(artifact.manifest["page_size"]), len(window)
    pages = -(-tokens // size)
    rows = torch.arange(tokens, dtype=torch.int32)
    given: dict[str, Any] = {
        "token_ids": torch.from_numpy(np.asarray(window, np.int32)),
        "positions": rows,
        "slot_mapping": rows,
        "query_start": torch.tensor([0, tokens], dtype=torch.int32),
        "context_len": torch.tensor([tokens], dtype=torch.int32),
        "block_table": torch.arange(pages, dtype=torch.int32)[None],
        "output_index": torch.tensor([tokens - 1], dtype=torch.int32),
    }
    for value in graph.inputs:
        if value.name.startswith("kv_pages."):
            shape = [pages if i == 1 else int(str(d)) for i, d in enumerate(value.shape)]
            given[value.name] = torch.zeros(shape, dtype=getattr(torch, value.dtype))
        elif value.name.startswith(("slot_mapping.", "block_table.")):  # a window's, whose pages are all here
            given[value.name] = given[value.name.partition(".")[0]]
        elif value.name == "state_slot":
            given[value.name] = torch.zeros(1, dtype=torch.int32)
        elif value.name.startswith("state."):  # of recurrent layers: a sequence begins with zeros
            given[value.name] = torch.zeros((1, *(int(str(d)) for d in value.shape[1:])))
    return given


def experts_text(result: dict[str, Any]) -> str:
    """For people: one line a layer."""
    rows = [
        (
            layer["name"],
            f"{layer['k']} of {layer['experts']}",
            f"{layer['loss']:.4f}",
            f"{min(layer['shares']):.2%}",
            f"{max(layer['shares']):.2%}",
            len(layer["starved"]) or "",
        )
        for layer in result["layers"]
    ]
    header = ("layer", "experts a token", "loss", "least share", "largest", "starved")
    total = "" if result["loss"] is None else f"load-balancing loss {result['loss']:.6f}\n\n"
    return total + table(header, rows)


def picture(result: dict[str, Any]) -> str:
    """The shares as an SVG page: a row a layer, a cell an expert, the darker the more tokens; an expert that
    starves has a frame. Numbers are the cells' titles.
    """
    layers: list[dict[str, Any]] = result["layers"]
    most = max(len(layer["shares"]) for layer in layers)
    left, cell, line = 210, max(4, min(28, 840 // most)), 22
    width, height = left + cell * most + 20, 46 + line * len(layers)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="system-ui, sans-serif" font-size="12">',
        "<title>Share of tokens that chose each expert, by layer</title>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="{left}" y="20">experts 0 … {most - 1}; white: none, blue: twice the even share and more; '
        "red frame: starved</text>",
    ]
    for row, layer in enumerate(layers):
        top, even = 32 + line * row, layer["k"] / layer["experts"]
        name = layer["name"] if len(layer["name"]) <= 30 else f"…{layer['name'][-29:]}"
        parts.append(f'<text x="{left - 8}" y="{top + 14}" text-anchor="end">{escape(name)}</text>')
        for e, share in enumerate(layer["shares"]):
            shade = min(1.0, share / (2 * even))
            color = "#" + "".join(f"{round(255 - shade * (255 - c)):02x}" for c in (0x1F, 0x5F, 0x8F))
            frame = ' stroke="#c0392b" stroke-width="2"' if e in layer["starved"] else ' stroke="#ddd"'
            parts.append(
                f'<rect x="{left + cell * e}" y="{top}" width="{cell - 2}" height="{line - 4}" fill="{color}"'
                f"{frame}><title>expert {e}: {share:.2%}</title></rect>"
            )
    return "\n".join([*parts, "</svg>", ""])
