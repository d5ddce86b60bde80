"""Kernel libraries that are kept between compilations: the same bytes, and never in the way."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from llmc.codegen.artifact import ArtifactWriter
from llmc.codegen.target import get_target, no_progress
from llmc.codegen.tvm import libraries, library_cache
from llmc.codegen.tvm.cpu import TvmCpu
from llmc.codegen.tvm.kernels.schedule import Schedule
from llmc.codegen.tvm.libraries import Libraries
from llmc.codegen.tvm.library_cache import LibraryCache
from llmc.codegen.tvm.worker import Compilation
from llmc.ir.core import Graph
from llmc.ir.printer import print_graph

from .tvm_graphs import ISA, Ops, compile_graph, m

BUILT = {"symbols": [], "arguments": ["input:x"], "calls": [["kernel", None]]}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder's `kernels`, empty."""
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


def graph() -> Graph:
    o = Ops()
    o.out("sum", m.Add(o.a, o.b))
    return o.graph


def no_worker(*arguments: object) -> None:
    raise AssertionError("a worker was started")


def kept(text: str, content: bytes, tmp_path: Path, isa: str = ISA) -> None:
    library = tmp_path / "made.so"
    library.write_bytes(content)
    LibraryCache(text).keep(isa, None, library, BUILT)


def test_the_second_compilation_starts_no_worker_and_gives_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compile_graph(graph(), tmp_path / "first.llmc")
    assert len(list(folder.glob("*.so"))) == 1
    monkeypatch.setattr(libraries, "Compilation", no_worker)
    second = compile_graph(graph(), tmp_path / "second.llmc")
    assert first.manifest["targets"] == second.manifest["targets"]
    name = f"targets/tvm-cpu/{ISA}.so"
    assert (tmp_path / "first.llmc" / name).read_bytes() == (tmp_path / "second.llmc" / name).read_bytes()


def test_another_graph_level_or_schedule_is_another_library(folder: Path, tmp_path: Path) -> None:
    kept("a", b"library", tmp_path)
    out = tmp_path / "out.so"
    assert LibraryCache("a").take(ISA, None, out) == BUILT
    assert out.read_bytes() == b"library"
    assert LibraryCache("b").take(ISA, None, out) is None
    assert LibraryCache("a").take("another", None, out) is None
    schedule = Schedule(few=(4, 1), many=(8, 1), width=2, unpack=8)
    assert LibraryCache("a").take(ISA, {"kernel": schedule}, out) is None


def test_another_compiler_finds_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept("a", b"library", tmp_path)
    monkeypatch.setattr(library_cache, "fingerprint", lambda *given: "another")
    assert LibraryCache("a").take(ISA, None, tmp_path / "out.so") is None


@pytest.mark.parametrize(
    ("suffix", "content"), [(".so", b"cut"), (".json", b"{"), (".json", b"[]"), (".json", b'{"sha256": 1}')]
)
def test_a_damaged_library_is_compiled_again(
    suffix: str, content: bytes, folder: Path, tmp_path: Path
) -> None:
    compile_graph(graph(), tmp_path / "first.llmc")
    (library,) = folder.glob("*.so")
    before = library.read_bytes()
    library.with_suffix(suffix).write_bytes(content)
    compile_graph(graph(), tmp_path / "second.llmc")
    name = f"targets/tvm-cpu/{ISA}.so"
    assert (tmp_path / "second.llmc" / name).read_bytes() == before == library.read_bytes()
    assert json.loads(library.with_suffix(".json").read_text())["isa"] == ISA


def test_a_folder_that_cannot_be_written_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "file"))
    compile_graph(graph(), tmp_path / "f.llmc")
    assert (tmp_path / "f.llmc" / f"targets/tvm-cpu/{ISA}.so").stat().st_size > 0


def test_what_was_not_used_for_longest_goes_first(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library_cache, "_LIMIT_BYTES", 250)
    for number, name in enumerate("abc"):
        kept(name, bytes(100), tmp_path)
        for path in folder.glob("*.so"):
            age = os.stat(path).st_mtime
            os.utime(path, (age - 10 * (3 - number), age - 10 * (3 - number)))
    found = [LibraryCache(name).take(ISA, None, tmp_path / "out.so") is not None for name in "abc"]
    assert found == [False, True, True]
    assert len(list(folder.iterdir())) == 4


def test_an_interrupted_compilation_leaves_nothing_in_the_cache(folder: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        Libraries(print_graph(graph()), {ISA: tmp_path / "x.so"}, {ISA: None}),
    ):
        raise KeyboardInterrupt
    assert not folder.exists()


# Begun before `compile` ----------------------------------------------------------------------------------


@pytest.fixture
def workers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The graphs that workers were started for."""
    started: list[str] = []

    class Counted(Compilation):
        def __init__(self, graph_text: str, *arguments: Any) -> None:
            started.append(graph_text)
            super().__init__(graph_text, *arguments)

    monkeypatch.setattr(libraries, "Compilation", Counted)
    return started


def compile_begun(begun: Graph, graph: Graph, out: Path) -> bytes:
    """The library of a graph that is compiled after a target has begun with one."""
    target = get_target(f"tvm-cpu:isa={ISA}")
    with ArtifactWriter(out) as writer:
        with target.begun(begun, writer):
            entry = target.compile(graph, writer, progress=no_progress)
        writer.finish({"kind": "function", "model": {}, "targets": {"tvm-cpu": entry}})
    return (out / f"targets/tvm-cpu/{ISA}.so").read_bytes()


def test_a_library_that_was_begun_is_compiled_once(workers: list[str], folder: Path, tmp_path: Path) -> None:
    library = compile_begun(graph(), graph(), tmp_path / "begun.llmc")
    assert len(workers) == 1
    shutil.rmtree(folder)
    compile_graph(graph(), tmp_path / "plain.llmc")
    assert library == (tmp_path / f"plain.llmc/targets/tvm-cpu/{ISA}.so").read_bytes()


def test_what_was_begun_ends_with_its_compilation(folder: Path, tmp_path: Path) -> None:
    """Not with the block: other targets compile within it."""
    target = get_target(f"tvm-cpu:isa={ISA}")
    with ArtifactWriter(tmp_path / "a.llmc") as writer, target.begun(graph(), writer):
        assert _waiting(), "a thread waits for the kernel compiler"
        target.compile(graph(), writer, progress=no_progress)
        assert not _waiting()


def _waiting() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name.startswith("kernels")]


def test_another_library_than_what_was_begun_ends_that_first(
    workers: list[str], folder: Path, tmp_path: Path
) -> None:
    other = Ops()
    other.out("product", m.Mul(other.a, other.b))
    library = compile_begun(other.graph, graph(), tmp_path / "begun.llmc")
    assert workers[-1] == print_graph(graph())
    assert len(list(folder.glob("*.so"))) == 1, "what was begun for nothing is not kept"
    shutil.rmtree(folder)
    compile_graph(graph(), tmp_path / "plain.llmc")
    assert library == (tmp_path / f"plain.llmc/targets/tvm-cpu/{ISA}.so").read_bytes()


def test_what_has_ended_is_not_taken_again(workers: list[str], folder: Path, tmp_path: Path) -> None:
    other = Ops()
    other.out("product", m.Mul(other.a, other.b))
    target = get_target(f"tvm-cpu:isa={ISA}")
    with ArtifactWriter(tmp_path / "a.llmc") as writer:
        with target.begun(graph(), writer):
            for one in (other.graph, graph()):
                entry = target.compile(one, writer, progress=no_progress)
        writer.finish({"kind": "function", "model": {}, "targets": {"tvm-cpu": entry}})
    assert workers[-1] == print_graph(graph())


def test_a_target_that_compiles_in_its_own_manner_begins_nothing(workers: list[str], tmp_path: Path) -> None:
    class Own(TvmCpu):
        def compile(self, *arguments: Any, **options: Any) -> dict[str, Any]:
            return super().compile(*arguments, **options)

    with ArtifactWriter(tmp_path / "a.llmc") as writer, Own(isa=ISA).begun(graph(), writer):
        pass
    assert workers == []


def test_a_search_for_sizes_begins_nothing(workers: list[str], tmp_path: Path) -> None:
    with (
        ArtifactWriter(tmp_path / "a.llmc") as writer,
        get_target(f"tvm-cpu:isa={ISA},tune=1").begun(graph(), writer),
    ):
        pass
    assert workers == []
