"""The Jinja environment for templates from strangers.

On top of Jinja's immutable sandbox (https://jinja.palletsprojects.com, "Sandbox"): attributes that it hides
are an error instead of empty text; work, sizes of texts, paddings and time have limits; and what only serves
to make big texts is gone. The limits are far above what a conversation needs.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_OUTPUT = 16 << 20
MAX_WORK = 1_000_000
MAX_SECONDS = 5.0
MAX_PADDING = 1000

_PADDING_METHODS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs"})
_PADDING_FILTERS = frozenset({"batch", "center", "indent", "slice", "truncate", "wordwrap", "round"})
_REMOVED_FILTERS = frozenset({"filesizeformat", "format", "pprint", "urlize", "xmlattr"})
_REMOVED_METHODS = frozenset({"translate", "encode"})
_WIDE_FORMAT = re.compile(r"\{[^}]*:[^}]*(\d{4}|\{)")


class LimitError(Exception):
    """A template does more than it may."""


class _Budget:
    """What one rendering may still do: steps of about an iteration, 4 elements or 128 characters each, and
    time.
    """

    def __init__(self) -> None:
        self._left = MAX_WORK
        self._deadline = time.monotonic() + MAX_SECONDS

    def charge(self, work: int) -> None:
        self._left -= work
        if self._left < 0 or time.monotonic() > self._deadline:
            raise LimitError("the template does not come to an end")


_budget: ContextVar[_Budget | None] = ContextVar("llmc_template_budget", default=None)


@contextlib.contextmanager
def rendering() -> Generator[None]:
    """Give the rendering inside a budget of its own."""
    token = _budget.set(_Budget())
    try:
        yield
    finally:
        _budget.reset(token)


def _charge(work: int = 1) -> None:
    budget = _budget.get()
    if budget is not None:  # None while Jinja folds constants
        budget.charge(work)


def _charged(value: Any) -> Any:
    """Charge for a result by its size; a lazy one is charged as it is read."""
    if isinstance(value, Iterator):
        return _iterate(value)
    if isinstance(value, str | bytes | list | tuple | range):
        _check_size(len(value))
        _charge(1 + len(value) // (128 if isinstance(value, str | bytes) else 4))
    return value


def _check_size(size: int) -> None:
    if size > MAX_OUTPUT:
        raise LimitError(f"a text or list of more than {MAX_OUTPUT} elements")


def _check_padding(numbers: Iterable[Any]) -> None:
    if any(isinstance(number, int) and abs(number) > MAX_PADDING for number in numbers):
        raise LimitError(f"a width of more than {MAX_PADDING}")


def _check_replace(text: str, old: str, new: str) -> None:
    _check_size(len(text) + text.count(old) * len(new))


# Filters ---------------------------------------------------------------------------------------------------


def _iterate(values: Iterable[Any]) -> Iterator[Any]:
    """Stands around the iterable of every loop."""
    for value in values:
        _charge()
        yield value


def _concat(values: Sequence[Any]) -> str:
    """Stands for every `a ~ b`."""
    texts = [str(value) for value in values]
    _check_size(sum(map(len, texts)))
    return "".join(texts)


def _join(values: Iterable[Any], separator: str = "", attribute: str | None = None) -> str:
    """Jinja's `join`, with the size known before the text is made."""
    found = list(values)
    if attribute is not None:
        found = [value[attribute] for value in found]
    texts = [str(value) for value in found]
    _check_size(sum(map(len, texts)) + len(str(separator)) * len(texts))
    return str(separator).join(texts)


def _replace(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = str(text), str(old), str(new)
    _check_replace(text, old, new)
    return text.replace(old, new, -1 if count is None else count)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON as json.dumps writes it: Jinja's own would escape <, > and &."""
    _check_padding([indent])
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # keeps the marks by which Jinja passes context or environment
    def call(*args: Any, **kwargs: Any) -> Any:
        if name in _PADDING_FILTERS:
            _check_padding([*args, *kwargs.values()])
        return _charged(function(*args, **kwargs))

    return call


# Globals ---------------------------------------------------------------------------------------------------


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(str(pattern)[:100])


# Environment -----------------------------------------------------------------------------------------------


class _Generation(Extension):
    """`{% generation %}` … `{% endgeneration %}` marks the assistant's part for training; to rendering it is
    nothing.
    """

    tags = {"generation"}  # noqa: RUF012  (Jinja's convention)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _filter(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class SandboxEnvironment(ImmutableSandboxedEnvironment):
    """Compiles and runs templates within the limits of this module."""

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[LoopControlExtension, _Generation],
            autoescape=False,
        )
        own = {"join": _join, "replace": _replace, "tojson": _to_json, "llmc_concat": _concat}
        filters: dict[str, Any] = {**self.filters, **own, "llmc_iterate": _iterate}
        self.filters = {n: _bounded(n, f) for n, f in filters.items() if n not in _REMOVED_FILTERS}
        own_globals: dict[str, Any] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.globals = {**self.globals, **own_globals}
        del self.globals["lipsum"]

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        raise SecurityError(f"the template reaches for {type(obj).__name__}.{attribute}")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or (operator == "%" and isinstance(left, str | bytes)):
            raise SecurityError(f"the template uses {operator}, which may take all memory")
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and isinstance(times, int):
                    _check_size(len(value) * max(times, 0))
            if isinstance(left, int) and isinstance(right, int):
                _check_size(left.bit_length() + right.bit_length())
        return _charged(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None and _WIDE_FORMAT.search(value.__self__):
            raise LimitError("a format with a wide or nested field")
        return wrapped

    def call(self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str | bytes):
            if name in _REMOVED_METHODS:
                raise SecurityError(f"the template calls str.{name}")
            if name in _PADDING_METHODS:
                _check_padding(args)
            if name == "replace" and len(args) >= 2 and isinstance(owner, str):
                _check_replace(owner, str(args[0]), str(args[1]))
            if name == "join" and args:
                args = (list(args[0]), *args[1:])
                _check_size(sum(len(str(part)) + len(owner) for part in args[0]))
        return _charged(super().call(__context, __obj, *args, **kwargs))

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        """Put the limits around loops and concatenations before Jinja compiles the tree."""
        for loop in list(source.find_all(nodes.For)):
            loop.iter = _filter("llmc_iterate", loop.iter)
        for concat in list(source.find_all(nodes.Concat)):
            parts = nodes.List(list(concat.nodes), lineno=concat.lineno)
            concat.nodes = [_filter("llmc_concat", parts)]
        source.set_environment(self)
        return super()._generate(source, *args, **kwargs)
