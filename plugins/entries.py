"""What installed packages register, by entry-point group and name: found without importing any of it, loaded
with errors that name the package.

Names of ours stay ours: a package that claims one is not used under it, and a warning names it. A name that
two other packages claim is an error for whoever asks for it, and for nobody else.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING, Any, cast

from ..ir.errors import CompileError, InputError, LlmcError
from .version import API_GROUP, refusal

if TYPE_CHECKING:
    # Imported where it is used: it takes longer than all else that opens a small model.
    from importlib.metadata import EntryPoint

OURS = "llmc"
KINDS = {
    "llmc.passes": "pass",
    "llmc.ops": "ops",
    "llmc.quantizers": "quantizer",
    "llmc.targets": "target",
    "llmc.executors": "executor",
    "llmc.samplers": "sampler",
    "llmc.tool_formats": "tool format",
    "llmc.tools": "tools",
}
"""Entry-point group → what one entry of it is called."""
_NO_API = frozenset({"llmc.tools"})  # plain Python functions: there is nothing of llmc in them

_log = logging.getLogger("llmc.plugins")
_warned: set[str] = set()


@dataclass(frozen=True)
class Registered:
    """One entry. `origin` is the distribution that brought it, `rivals` are other distributions' entries of
    the same name.
    """

    name: str
    origin: str
    entry: EntryPoint
    rivals: tuple[Registered, ...] = field(default=(), compare=False)

    @property
    def kind(self) -> str:
        """ "pass", "target", …"""
        return KINDS.get(self.entry.group, self.entry.group)

    @property
    def is_ours(self) -> bool:
        return self.origin == OURS

    @property
    def version(self) -> str | None:
        """The distribution's version, where it has one."""
        dist = self.entry.dist
        try:
            return None if dist is None else dist.version
        except Exception:  # noqa: BLE001  (damaged metadata of somebody's package)
            return None

    @property
    def api(self) -> tuple[str, ...]:
        """The versions of the plugin API that its package was made for."""
        return declared_api(self.entry)

    def check_api(self) -> None:
        """Raise InputError where the package was made for another version of the plugin API."""
        if self.is_ours or (self.entry.group in _NO_API and not self.api):
            return
        wrong = refusal(self.origin, self.api)
        if wrong is not None:
            raise InputError(f"{self.kind} {self.name}: {wrong[0]}", remedy=wrong[1])

    def load(self) -> Any:
        """What the entry names. Raises InputError, naming the package, where it cannot be had."""
        if self.rivals and not self.is_ours:
            named = " and ".join(sorted({self.origin, *(one.origin for one in self.rivals)}))
            raise InputError(
                f"{self.entry.group}: {self.name} comes from both {named}", remedy="uninstall one of them"
            )
        for rival in self.rivals:
            warn(
                f"{self.kind} {self.name} is llmc's own: that of package {rival.origin} is not used; "
                f"uninstall {rival.origin}, or ask its authors for another name"
            )
        self.check_api()
        try:
            return self.entry.load()
        except (Exception, SystemExit) as error:  # a plugin's import may fail in any way
            raise InputError(
                f"{self.kind} {self.name} of package {self.origin} cannot be imported ({one_line(error)})",
                remedy=f"upgrade or uninstall {self.origin}",
            ) from error

    def load_class(self, base: type[Any]) -> type[Any]:
        """The class that the entry names. Raises InputError where it is none under `base`."""
        found = self.load()
        if not (isinstance(found, type) and issubclass(found, base)):
            raise self.wrong(f"is no {base.__name__} class")
        return found

    def wrong(self, what: str) -> InputError:
        """The error of an entry that is not what its group holds."""
        return InputError(
            f"entry point {self.name} of package {self.origin} {what}",
            remedy=f"report it to the authors of {self.origin}",
        )


@cache
def registered(group: str) -> dict[str, Registered]:
    """All entries of an entry-point group by name, sorted. Imports nothing of theirs, raises nothing."""
    from importlib.metadata import entry_points

    return collect(group, entry_points(group=group))


def collect(group: str, entries: Iterable[EntryPoint]) -> dict[str, Registered]:
    """Entries by name. One distribution found twice (editable install and build folder) is no clash."""
    found: dict[str, list[Registered]] = {}
    for entry in entries:
        item = Registered(entry.name, origin_of(entry), entry)
        same = found.setdefault(entry.name, [])
        if all((other.origin, other.entry.value) != (item.origin, entry.value) for other in same):
            same.append(item)
    chosen: dict[str, Registered] = {}
    for name in sorted(found):
        first, *rest = sorted(found[name], key=lambda item: (not item.is_ours, item.origin))
        chosen[name] = Registered(first.name, first.origin, first.entry, tuple(rest))
    return chosen


def origin_of(entry: EntryPoint) -> str:
    """The name of the distribution that brings an entry; its module where the metadata are damaged."""
    try:
        name = entry.dist.name if entry.dist is not None else None
    except Exception:  # noqa: BLE001  (a dist-info folder without METADATA)
        name = None
    return name or entry.value.partition(":")[0]


def declared_api(entry: EntryPoint) -> tuple[str, ...]:
    """The versions of the plugin API that an entry's distribution names; imports nothing."""
    if entry.dist is None:
        return ()
    return tuple(sorted({one.name for one in entry.dist.entry_points if one.group == API_GROUP}))


def warn(text: str) -> None:
    """Log a warning, once in a process."""
    if text not in _warned:
        _warned.add(text)
        _log.warning("%s", text)


def one_line(error: BaseException) -> str:
    """An exception as a line, with the place where it was raised."""
    text = " ".join(str(error).split())[:400]
    where, trace = "", error.__traceback__
    while trace is not None:
        where = f" at {os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}"
        trace = trace.tb_next
    own = isinstance(error, LlmcError | ImportError)
    return f"{type(error).__name__}: {text}" + ("" if own else where)


# Whose code it is ----------------------------------------------------------------------------------------


@cache
def _distributions() -> dict[str, list[str]]:
    from importlib.metadata import packages_distributions

    return dict(packages_distributions())


def package_of(thing: object) -> str | None:
    """The distribution that an object's class (or a class, or a function) comes from; None for ours."""
    while isinstance(thing, partial):
        thing = cast(object, thing.func)
    module: str = getattr(thing if hasattr(thing, "__qualname__") else type(thing), "__module__", "") or ""
    top = module.partition(".")[0]
    if top == OURS:
        return None
    names = tuple(sorted(set(_distributions().get(top, ()))))
    return (_bringing(module, names) if len(names) > 1 else next(iter(names), None)) or top


@cache
def _bringing(module: str, names: tuple[str, ...]) -> str:
    """Which of several distributions that share a namespace has a module; the first where none lists it."""
    from importlib.metadata import distribution

    paths = {module.replace(".", "/") + end for end in (".py", "/__init__.py")}
    listed = (n for n in names if any(file.as_posix() in paths for file in distribution(n).files or ()))
    return next(listed, names[0])


@contextmanager
def blaming(what: str, thing: object) -> Generator[None]:
    """Whatever code of another package raises inside of the block names that package; ours stays as it is.

    Args:
        what: "pass drop-layers".
        thing: an object of that package's class.
    """
    try:
        yield
    except MemoryError:
        raise
    except (Exception, SystemExit) as error:  # a plugin may raise anything
        package = package_of(thing)
        if package is None or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
            raise
        if isinstance(error, LlmcError):
            error.message = f"{what} of package {package}: {error.message}"
            error.args = (error.message, error.remedy)
            raise
        raise CompileError(
            f"{what} of package {package} raised {one_line(error)}",
            remedy=f"report it to the authors of {package}, or do without it",
        ) from error


def check_returned(what: str, thing: object, found: Any, kind: type[Any]) -> Any:
    """`found`, which code of `thing`'s class returned. Raises CompileError, naming its package, where it is
    no `kind`.
    """
    if not isinstance(found, kind):
        package = package_of(thing) or OURS
        raise CompileError(
            f"{what} gave a {type(found).__name__}, not a {kind.__name__}",
            remedy=f"report it to the authors of {package}, or do without it",
        )
    return found


def usable(items: Iterable[Registered], load: Callable[[Registered], Any]) -> list[tuple[Registered, Any]]:
    """What those entries give that can be loaded; a warning names each that cannot."""
    found: list[tuple[Registered, Any]] = []
    for item in items:
        try:
            found.append((item, load(item)))
        except LlmcError as error:
            warn(str(error))
    return found
