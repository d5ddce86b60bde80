"""The parser on text that is nearly a graph: a CompileError that names the line, and nothing else."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from llmc.ir.core import Graph
from llmc.ir.dtypes import NAMES
from llmc.ir.errors import LlmcError
from llmc.ir.parser import parse
from llmc.ir.printer import equal, print_graph
from llmc.ir.types import TensorType

from .conftest import GOLDEN

TEXT = (GOLDEN / "llama-paged.txt").read_text()
LINES = TEXT.splitlines()
PIECES = [
    "",
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    "%0",
    "%x",
    "@",
    '"',
    "$T",
    "$",
    "null",
    "-1",
    "1e999",
    "float32[",
    "<q4",
    "=",
]


def attempt(text: str) -> Graph | None:
    try:
        return parse(text)
    except LlmcError as error:
        refused = str(error)
    assert "\n" not in refused
    return None


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 1 << 30))
def test_damaged_text_is_refused_or_read_never_worse(seed: int) -> None:
    rng = random.Random(seed)
    lines = list(LINES)
    for _ in range(rng.randint(1, 3)):
        i = rng.randrange(len(lines))
        line = lines[i]
        a, b = sorted(rng.randrange(len(line) + 1) for _ in range(2))
        lines[i] = line[:a] + rng.choice([*PIECES, line[a:b] * 2]) + line[b if rng.random() < 0.5 else a :]
    graph = attempt("\n".join(lines))
    if graph is not None:
        attempt(print_graph(graph))


def test_every_prefix_of_lines_is_a_graph_without_the_rest() -> None:
    for count in range(0, len(LINES), 7):
        graph = attempt("\n".join(LINES[:count]))
        assert graph is not None and not graph.outputs


def test_every_element_type_is_read_as_it_was_written() -> None:
    graph = Graph("types")
    for name in sorted(NAMES):
        graph.add_input(name, TensorType(name, (2,)))
    assert equal(parse(print_graph(graph)), graph)
