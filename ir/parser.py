"""Reads the text form that `printer.py` writes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from . import ops
from . import ops as _ops  # noqa: F401  # pyright: ignore[reportUnusedImport]  (registers the operations)
from .core import Graph, Op, Value
from .define import OPS
from .errors import CompileError
from .types import TensorType, parse_dim
from .weights import LazyTensor, ShapeOnlyTensor

_STRING = r'"(?:[^"\\]|\\.)*"'
_TOKEN = re.compile(rf"\s*({_STRING}|@{_STRING}|%[\w.]+|\$[^,\]}}]+|[\[\](){{}},=]|[^\s\[\](){{}},=]+)")
_JSON = json.JSONDecoder()


assert ops.__all__  # importing them registers the operations


class _Line:
    """A cursor over the tokens of one line."""

    def __init__(self, text: str, number: int) -> None:
        self.text, self.number, self.at = text, number, 0

    def fail(self, what: str) -> CompileError:
        return CompileError(
            f"line {self.number} of the graph text: {what}: {self.text[:120]!r}",
            remedy="see ir/printer.py for the form",
        )

    def peek(self) -> str:
        m = _TOKEN.match(self.text, self.at)
        return m.group(1) if m else ""

    def take(self, expected: str | None = None) -> str:
        m = _TOKEN.match(self.text, self.at)
        if m is None or (expected is not None and m.group(1) != expected):
            raise self.fail(f"expected {expected or 'more'} at column {self.at}")
        self.at = m.end()
        return m.group(1)

    def type(self) -> TensorType:
        """A type runs to the closing bracket, and to the closing > where a quantization follows."""
        self.take(":")
        m = re.compile(r"\s*([a-z0-9_]+\[[^\]]*\](?:<[^>]*>)?)").match(self.text, self.at)
        if m is None:
            raise self.fail("expected a type")
        self.at = m.end()
        return TensorType.parse(m.group(1))

    def attribute(self) -> Any:
        token = self.take()
        if token == "[":
            values: list[Any] = []
            while self.peek() != "]":
                values.append(self.attribute())
                if self.peek() == ",":
                    self.take()
            self.take("]")
            return tuple(values)
        if token.startswith("$"):
            return parse_dim(token[1:])
        try:
            return _JSON.decode(token)
        except ValueError:
            raise self.fail(f"not a literal: {token}") from None


class _Parser:
    def __init__(self, weights: Mapping[str, LazyTensor] | None) -> None:
        self.data = weights
        self.graph = Graph()
        self.names: dict[str, Value] = {}

    def value(self, line: _Line, token: str) -> Value:
        if token not in self.names:
            raise line.fail(f"{token} is not defined")
        return self.names[token]

    def weight(self, line: _Line) -> None:
        token = line.take()
        name = json.loads(token[1:])
        type = line.type()
        if self.data is not None and name not in self.data:
            raise line.fail(f"no data for weight {name}")
        shape = tuple(d for d in type.shape if isinstance(d, int))
        data = self.data[name] if self.data is not None else ShapeOnlyTensor(shape, type.dtype, name)
        self.names[token] = self.graph.add_weight(name, data, type)

    def operands(self, line: _Line) -> list[Any]:
        out: list[Any] = []
        line.take("(")
        while line.peek() != ")":
            token = line.take()
            if token == "[":
                many: list[Value] = []
                while line.peek() != "]":
                    many.append(self.value(line, line.take()))
                    if line.peek() == ",":
                        line.take()
                line.take("]")
                out.append(many)
            else:
                out.append(None if token == "_" else self.value(line, token))
            if line.peek() == ",":
                line.take()
        line.take(")")
        return out

    def op(self, line: _Line) -> None:
        results: list[tuple[str, TensorType]] = []
        while True:
            results.append((line.take(), line.type()))
            if line.take() == "=":
                break
        opname = line.take()
        if opname not in OPS:
            raise line.fail(f"no op is named {opname}")
        operands = self.operands(line)
        attributes: dict[str, Any] = {}
        if line.peek() == "{":
            line.take()
            while line.peek() != "}":
                key = line.take()
                line.take("=")
                attributes[key] = line.attribute()
                if line.peek() == ",":
                    line.take()
            line.take("}")
        op: Op = OPS[opname](*operands, **attributes)
        if line.peek() == "loc":
            line.take()
            op.loc = json.loads(line.take())
        self.graph.append(op)
        for (name, type), r in zip(results, op.results, strict=True):
            if r.type != type:
                raise line.fail(f"{name} is written as {type} but {opname} gives {r.type}")
            self.names[name] = r

    def line(self, line: _Line) -> None:
        match line.peek():
            case "graph":
                line.take()
                self.graph.name = json.loads(line.take())
                line.take("stage")
                line.take("=")
                self.graph.stage = json.loads(line.take())
            case "fact":
                line.take()
                key = json.loads(line.take())
                line.take("=")
                self.graph.facts[key] = json.loads(line.text[line.at :])
            case "input":
                line.take()
                token = line.take()
                self.names[token] = self.graph.add_input(token[1:], line.type())
            case "weight":
                line.take()
                self.weight(line)
            case "return":
                line.take()
                self.graph.output_names.append(json.loads(line.take()))
                line.take("=")
                self.graph.outputs.append(self.value(line, line.take()))
            case _:
                self.op(line)


def parse(text: str, weights: Mapping[str, LazyTensor] | None = None) -> Graph:
    """The graph of a text.

    Args:
        weights: data by weight name; without it weights have shapes but no data. A missing one raises.
    Raises:
        CompileError: naming the line, where the text is not a graph.
    """
    parser = _Parser(weights)
    for number, raw in enumerate(text.splitlines(), 1):
        if not raw.strip():
            continue
        line = _Line(raw, number)
        try:
            parser.line(line)
        except CompileError:
            raise
        except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as e:
            # Op definitions and types see fields of the wrong kind here; what they raise then is their own.
            raise line.fail(f"not of the form ({type(e).__name__}: {e})") from e
    return parser.graph
