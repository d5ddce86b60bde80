"""What is installed: every package that registers something with llmc, what it brings, what is wrong with it.

Asking imports all of it, which nothing else does.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

from ..ir.errors import InputError, LlmcError
from .entries import KINDS, Registered, declared_api, origin_of, registered
from .version import API_GROUP, refusal


@dataclass
class Brought:
    """One entry of a package: `error` says why it cannot be used, `summary` is its docstring's first line."""

    kind: str
    name: str
    summary: str = ""
    error: str | None = None

    def as_json(self) -> dict[str, Any]:
        row: dict[str, Any] = {"kind": self.kind, "name": self.name, "summary": self.summary}
        return row if self.error is None else {**row, "error": self.error}


@dataclass
class Plugin:
    """An installed package; `error` is what is wrong with all of it (its version of the API)."""

    package: str
    version: str | None
    api: tuple[str, ...]
    brings: list[Brought] = field(default_factory=list[Brought])
    error: str | None = None

    def as_json(self) -> dict[str, Any]:
        row: dict[str, Any] = {
            "package": self.package,
            "version": self.version,
            "api": list(self.api),
            "brings": [one.as_json() for one in self.brings],
        }
        return row if self.error is None else {**row, "error": self.error}


def installed() -> list[Plugin]:
    """All packages other than llmc itself, by name."""
    found: dict[str, Plugin] = {}
    for entry in entry_points(group=API_GROUP):
        item = Registered(entry.name, origin_of(entry), entry)
        if not item.is_ours:
            _plugin(found, item)
    for group in KINDS:
        for item in registered(group).values():
            for one in (item, *item.rivals):
                if not one.is_ours:
                    plugin = _plugin(found, one)
                    plugin.brings.append(_brought(one, item, plugin.error))
    return [found[name] for name in sorted(found)]


def _plugin(found: dict[str, Plugin], item: Registered) -> Plugin:
    if item.origin not in found:
        api = declared_api(item.entry)
        wrong = refusal(item.origin, api)
        # Tools need not say: they are functions, and use nothing of llmc.
        needed = api or item.kind != KINDS["llmc.tools"]
        error = f"{wrong[0]}; {wrong[1]}" if wrong is not None and needed else None
        found[item.origin] = Plugin(item.origin, item.version, api, error=error)
    return found[item.origin]


def _brought(one: Registered, first: Registered, api_error: str | None) -> Brought:
    row = Brought(one.kind, one.name)
    if api_error is not None:
        return row  # of another API: importing it would tell nothing
    if first.is_ours:
        row.error = f"{one.kind} {one.name} is llmc's own: this one is not used"
        return row
    try:
        # `first` and not `one`: it knows whether two packages claim the name.
        loaded = _LOADERS[one.entry.group](first)
        row.summary = _summary(loaded)
    except LlmcError as error:
        row.error = str(error)
    return row


def _summary(thing: Any) -> str:
    paragraphs = (getattr(thing, "__doc__", None) or "").strip().split("\n\n")
    return " ".join(paragraphs[0].split())


def _module(name: str) -> Any:
    return importlib.import_module(f"..{name}", __package__)


def _load_quantizer(item: Registered) -> Any:
    module = _module("passes.registry")
    quantizer = module.make_quantizer(item)
    taken = [form for form in quantizer.forms if _is_ours(module, form)]
    if taken:
        raise InputError(f"scheme {taken[0]} is llmc's own: it is never asked of {item.origin}")
    return type(quantizer)


def _is_ours(module: Any, form: str) -> bool:
    """Whether one of our quantizers takes a scheme. Most forms ("x-intB-gN") are no scheme as they stand."""
    try:
        return module.claimed_by_ours(form)
    except LlmcError:
        return True  # it knows the form well enough to find something wrong with it


def _load_ops(item: Registered) -> Any:
    _module("codegen.extensions").load_module(item)
    return item.load()


def _load_format(item: Registered) -> Any:
    _refuse_taken(item, _module("runtime.tool_calls").FORMATS)
    _module("runtime.tool_calls.plugin").load_format(item)
    return item.load()


def _load_executor(item: Registered) -> Any:
    _refuse_taken(item, _module("runtime.executor").OURS)
    return _module("runtime.executor.plugin").load_opener(item)


def _refuse_taken(item: Registered, names: Iterable[str]) -> None:
    """What llmc has of its own without an entry point."""
    if item.name in names:
        raise InputError(f"{item.kind} {item.name} is llmc's own: this one is not used")


def _load_target(item: Registered) -> Any:
    return _module("codegen.target").TargetEntry(item).load()


def _load_tools(item: Registered) -> Any:
    functions: Iterable[Any] = _module("runtime.tools.registry").Registered(item).load()
    return next(iter(functions))


_LOADERS: dict[str, Callable[[Registered], Any]] = {
    "llmc.passes": lambda item: _module("passes.registry").load_pass(item),
    "llmc.ops": _load_ops,
    "llmc.quantizers": _load_quantizer,
    "llmc.targets": _load_target,
    "llmc.executors": _load_executor,
    "llmc.samplers": lambda item: _module("runtime.custom_sampler").load_sampler(item),
    "llmc.tool_formats": _load_format,
    "llmc.tools": _load_tools,
}
