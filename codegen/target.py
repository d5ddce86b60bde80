"""Targets: what turns a final graph into files of an artifact. One class a kernel family.

    @dataclass(frozen=True)
    class TvmCpu(Target):
        name = "tvm-cpu"
        operations = frozenset({"linear", "rms_norm", ...})
        isa: str = field(default="avx2", metadata={"help": "..."})

        def compile(self, graph, writer, *, progress): ...

The dataclass fields are the options of `--target tvm-cpu:isa=avx2`. Anyone's package adds a target through
the entry-point group `llmc.targets` (name → class), and what runs it through `llmc.executors`; ours are
registered in the same way.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, ClassVar

from ..ir.define import OPS
from ..ir.errors import CompileError, InputError
from ..plugins.entries import Registered, blaming, check_returned, package_of, registered
from ..plugins.entries import collect as collect_entries
from ..plugins.options import make_from_texts
from .legalize import legalize

if TYPE_CHECKING:
    from ..frontend.source import ModelSource
    from ..ir.core import Graph, Op
    from .artifact import ArtifactWriter

GROUP = "llmc.targets"

Progress = Callable[[str, float], None]
"""(what is being done, share of this target's work that is done, 0 to 1)."""


def no_progress(what: str, share: float) -> None:
    """A `Progress` that says nothing."""


@dataclass(frozen=True)
class Target(ABC):
    """A kernel family. Subclasses are frozen dataclasses; their fields (str, int, float or bool, each with a
    default and a "help" in its metadata) are the options.
    """

    name: ClassVar[str] = ""
    """The name on the command line and in the manifest; the entry point's name as well."""
    operations: ClassVar[frozenset[str]] = frozenset()
    """Names of the IR ops that it can emit; `legal` decomposes the others."""
    emits_as: ClassVar[str] = ""
    """The target whose emitters serve this one too, where that is another (`Op.emitters` names those)."""
    kv_dtype: ClassVar[str] = "float16"
    """Element type of a quantized model's cache, where the user names none and the targets agree."""
    kv_dtypes: ClassVar[tuple[str, ...]] = ()
    """Element types that it takes for the cache; any where this is empty. Others are refused at once."""

    int8_activations: ClassVar[bool] = False
    """Whether products by quantized weights round activations to 8 bits, a scale a group of the weights."""

    def workers(self) -> int:
        """Other processes that compile kernels, each of some 400 MB (`peak.WORKER_BYTES`)."""
        return 0

    def prepared(self) -> AbstractContextManager[None]:
        """What the target begins before there is a graph, in other processes than this one: entered before
        the model is opened, left after the last `compile`. Not asked for under a cap of memory.
        """
        return nullcontext()

    def begun(self, graph: Graph, writer: ArtifactWriter) -> AbstractContextManager[None]:
        """What other processes than this one can do of `compile` before it is called: entered once `graph` is
        as `compile` will get it, while quality is measured, and left after `compile`. Asked of the first
        target alone, and not under a cap of memory.
        """
        return nullcontext()

    @abstractmethod
    def compile(self, graph: Graph, writer: ArtifactWriter, *, progress: Progress) -> dict[str, Any]:
        """Write kernels to `targets/<name>/` and weights to `weights/<name>.safetensors`; `graph` is left as
        it was.

        Returns the target's manifest entry: "options", "batch_invariant", the names of its files, and
        whatever its executor needs. Raises UnsupportedError for an op that it can neither emit nor decompose,
        and CompileError where the backend fails.
        """

    def compile_source(
        self, source: ModelSource, graph: Graph, writer: ArtifactWriter, *, progress: Progress
    ) -> dict[str, Any]:
        """`compile`, for targets that need more of the model than its graph (its configuration, its
        tokenizer); what the driver calls.
        """
        return self.compile(graph, writer, progress=progress)

    def emitted(self) -> frozenset[str]:
        """`operations`, and other packages' ops that name an emitter for this target (`Op.emitters`)."""
        table = self.emits_as or self.name
        return self.operations | {name for name, op in OPS.items() if table in op.emitters}

    def supports(self, op: Op) -> bool:
        """Whether the target takes this instance of an op that it emits; others are decomposed."""
        return True

    def legal(self, graph: Graph) -> Graph:
        """A copy of a graph in what the target takes. Raises UnsupportedError for an op that it can neither
        emit nor decompose.
        """
        return legalize(graph, self.emitted(), self.supports, f"target {self.name}")

    def check(self, source: ModelSource, graph: Graph) -> None:
        """Raise what `compile_source` would raise for such a model, as far as that is known without the
        weights' values. Asked by `llmc check`, and before the long work of a calibrated scheme; the graph is
        as `compile` gets it, but that values of quantized weights must not be read. Without a method of its
        own, a target that names `operations` is asked for those that it can neither emit nor decompose.
        """
        if self.emitted():
            self.legal(graph)

    def options(self) -> dict[str, Any]:
        """Option name → value, for the manifest."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def __str__(self) -> str:
        """The spec that makes this target again; options that have their default are left out."""
        given = [
            f"{f.name}={_text(getattr(self, f.name))}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return self.name + (":" + ",".join(given) if given else "")


@dataclass(frozen=True)
class Option:
    """One option of a target, for help texts."""

    name: str
    type: str
    default: Any
    help: str


@dataclass(frozen=True)
class TargetEntry:
    """A registered target, not yet imported."""

    item: Registered

    @property
    def name(self) -> str:
        return self.item.name

    @property
    def package(self) -> str:
        """The distribution that registers it ("llmc", or somebody's plugin)."""
        return self.item.origin

    def load(self) -> type[Target]:
        """Import the class. Raises InputError, naming the package, where that fails or is no target."""
        cls = self.item.load()
        if not (isinstance(cls, type) and issubclass(cls, Target)) or cls.name != self.name:
            raise self.item.wrong("is no Target class of that name")
        return cls

    def options(self) -> list[Option]:
        """The target's options in order; imports the class."""
        cls = self.load()
        with blaming(f"target {self.name}", cls):
            hints = typing.get_type_hints(cls)
        return [
            Option(f.name, _kind(hints[f.name]).__name__, f.default, str(f.metadata.get("help", "")))
            for f in dataclasses.fields(cls)
        ]


def list_targets() -> list[TargetEntry]:
    """Every registered target by name; imports none."""
    return [TargetEntry(item) for item in registered(GROUP).values()]


def collect(points: Iterable[metadata.EntryPoint]) -> list[TargetEntry]:
    """Entry points → entries sorted by name. One whose name another package claims as well raises when it is
    loaded.
    """
    return [TargetEntry(item) for item in collect_entries(GROUP, points).values()]


def prepare_targets(targets: Iterable[Target], stack: ExitStack) -> None:
    """Let targets begin what takes a while, until `stack` is closed; an error of another package's names
    it.
    """
    for target in targets:
        with blaming(f"target {target.name}", target):
            stack.enter_context(target.prepared())


def begin_target(target: Target, graph: Graph, writer: ArtifactWriter, stack: ExitStack) -> None:
    """Let a target begin to compile, until `stack` is closed; an error of another package's names it, and
    such a target gets a copy of the graph.
    """
    with blaming(f"target {target.name}", target):
        given = graph if package_of(target) is None else graph.clone()
        stack.enter_context(target.begun(given, writer))


def ask_target(target: Target, source: ModelSource, graph: Graph) -> None:
    """Raise where a target will not take such a model (`Target.check`); an error of another package's names
    it, and such a target gets a copy of the graph.
    """
    with blaming(f"target {target.name}", target):
        target.check(source, graph if package_of(target) is None else graph.clone())


def emit_target(
    target: Target, source: ModelSource, graph: Graph, writer: ArtifactWriter, *, progress: Progress
) -> dict[str, Any]:
    """The manifest's entry of a target that has written its files.

    Raises what the target raises; of another package's, errors that name it. Such a target gets a copy of the
    graph: whatever it does there, the targets after it see the graph as it was.
    """
    package = package_of(target)
    what = f"target {target.name}"
    with blaming(what, target):
        given = graph if package is None else graph.clone()
        entry: Any = target.compile_source(source, given, writer, progress=progress)
        check_returned("its compile", target, entry, dict)
    if package is None:
        return entry
    try:
        return json.loads(json.dumps({"options": target.options(), "batch_invariant": False, **entry}))
    except (TypeError, ValueError) as error:
        raise CompileError(
            f"{what} of package {package} returned a manifest entry that is no JSON ({error})",
            remedy=f"report it to the authors of {package}, or compile for another target",
        ) from None


def get_target(spec: str) -> Target:
    """`NAME[:option=value,…]` → the target.

    Raises InputError, listing what exists, for an unknown name or option.
    """
    name, texts = parse_spec(spec)
    entries = {entry.name: entry for entry in list_targets()}
    if name not in entries:
        known = ", ".join(sorted(entries)) or "none is registered: reinstall llmc"
        raise InputError(f"no target is named {name!r}", remedy=f"targets: {known}")
    return make_target(entries[name].load(), texts)


def with_tune(specs: Sequence[str], seconds: int) -> tuple[str, ...]:
    """Target specs that ask for a search of so many seconds, where a target has one (option `tune`). Raises
    InputError where none has.
    """
    return _with(specs, "tune", seconds, "has nothing to search for")


def with_adapters(specs: Sequence[str]) -> tuple[str, ...]:
    """Target specs that ask for places for adapters, where a target can have them (option `adapters`). Raises
    InputError where none can.
    """
    return _with(specs, "adapters", True, "takes no adapters per request")


def _with(specs: Sequence[str], option: str, value: Any, refusal: str) -> tuple[str, ...]:
    targets = [get_target(spec) for spec in specs]
    can = [any(f.name == option for f in dataclasses.fields(target)) for target in targets]
    if not any(can):
        raise InputError(
            f"--{option}: {', '.join(t.name for t in targets)} {refusal}",
            remedy=f"leave --{option} away, or compile for tvm-cpu",
        )
    return tuple(
        str(dataclasses.replace(target, **{option: value})) if one else spec
        for spec, target, one in zip(specs, targets, can, strict=True)
    )


def parse_spec(spec: str) -> tuple[str, dict[str, str]]:
    """`NAME[:option=value,…]` → name and option texts. Raises InputError where it is not of this form."""
    name, colon, rest = spec.strip().partition(":")
    options: dict[str, str] = {}
    for part in rest.split(",") if colon else []:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not key or not equals or not value:
            raise InputError(
                f"target {spec!r}: {part!r} is no option=value", remedy="write NAME:option=value,…"
            )
        if key in options:
            raise InputError(f"target {spec!r} gives {key} twice", remedy="give it once")
        options[key] = value
    if not name:
        raise InputError(f"target {spec!r} has no name", remedy="write NAME:option=value,…")
    return name, options


def make_target(cls: type[Target], texts: dict[str, str]) -> Target:
    """An instance from option texts.

    Raises InputError for an unknown option or a value that is not of its type.
    """
    return make_from_texts(cls, f"target {cls.name}", texts)


def _kind(annotation: Any) -> type:
    return annotation if annotation in (str, int, float, bool) else str


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
