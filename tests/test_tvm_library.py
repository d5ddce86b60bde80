"""What a kernel library is made of: the linker, the threads that are linked in, and the plan of the
workspace.
"""

from __future__ import annotations

import ctypes
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llmc.codegen.tvm.elf import link
from llmc.codegen.tvm.plan import Interval, plan
from llmc.ir.errors import CompileError
from llmc.runtime import cpu

pytestmark = pytest.mark.skipif("avx" not in cpu.cpu_features(), reason="the kernel libraries are for x86-64")

STEP = """
declare i32 @call_packed(ptr, ptr, ptr)
define i32 @step(ptr %self, ptr %args, i32 %count, ptr %result) {
  %p = getelementptr { i32, i32, ptr }, ptr %args, i64 0, i32 2
  %dims = load ptr, ptr %p
  %status = getelementptr i64, ptr %dims, i64 1
  store i64 7, ptr %status
  ret i32 0
}
define i32 @llmc_step(ptr %dims, ptr %pointers) {
  %r = call i32 @call_packed(ptr @step, ptr %dims, ptr %pointers)
  ret i32 %r
}
define i32 @__tvm_ffi_workspace(ptr %self, ptr %args, i32 %count, ptr %result) {
  ret i32 -1
}
"""

Assemble = Callable[[str], bytes]


@pytest.fixture(scope="module")
def assemble(tmp_path_factory: pytest.TempPathFactory) -> Assemble:
    """LLVM IR text → a relocatable object."""
    from llmc.codegen.tvm import build

    return lambda text: build.assemble(text, tmp_path_factory.mktemp("ir"), "x86_64")


@pytest.fixture(scope="module")
def library(assemble: Assemble, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The threads with a step that does nothing."""
    from llmc.codegen.tvm.build import threads_text

    path = tmp_path_factory.mktemp("library") / "threads.so"
    path.write_bytes(link([assemble(STEP), assemble(threads_text("x86_64"))]))
    return ctypes.CDLL(str(path))


def load(data: bytes, path: Path) -> ctypes.CDLL:
    path.write_bytes(data)
    return ctypes.CDLL(str(path))


# -- the linker
# ------------------------------------------------------------------------------------------------------


def test_objects_see_each_other_and_libc(assemble: Assemble, tmp_path: Path) -> None:
    first = assemble("""
        @table = constant [3 x i32] [i32 5, i32 6, i32 7]
        @where = global ptr getelementptr (i32, ptr @table, i64 2)
        @other = external global i32
        @zeros = internal global [100 x i32] zeroinitializer
        declare double @sqrt(double)
        declare i32 @plus(i32, i32)
        define i32 @llmc_sum() {
          %p = load ptr, ptr @where
          %a = load i32, ptr %p
          %b = load i32, ptr @other
          %z = getelementptr [100 x i32], ptr @zeros, i64 0, i64 99
          %c = load i32, ptr %z
          store i32 1, ptr %z
          %d = call i32 @plus(i32 %a, i32 %b)
          %e = call i32 @plus(i32 %c, i32 %d)
          ret i32 %e
        }
        define double @llmc_root(double %x) {
          %r = call double @sqrt(double %x)
          ret double %r
        }""")
    second = assemble("""
        @other = global i32 30
        define i32 @plus(i32 %a, i32 %b) {
          %s = add i32 %a, %b
          ret i32 %s
        }""")
    for name, objects in (("ab", [first, second]), ("ba", [second, first])):
        data = link(objects)
        assert data == link(objects)
        linked = load(data, tmp_path / f"{name}.so")
        assert (linked.llmc_sum(), linked.llmc_sum()) == (37, 38)
        linked.llmc_root.restype = ctypes.c_double
        assert linked.llmc_root(ctypes.c_double(2.25)) == 1.5
        assert not hasattr(linked, "plus")  # only llmc_… is visible from outside


def test_a_strong_definition_wins_over_a_weak_one(assemble: Assemble, tmp_path: Path) -> None:
    weak = assemble("""
        @value = weak global i32 1
        define i32 @llmc_get() {
          %v = load i32, ptr @value
          ret i32 %v
        }""")
    strong = assemble("@value = global i32 2")
    for i, objects in enumerate([[weak, strong], [strong, weak], [weak]]):
        assert load(link(objects), tmp_path / f"{i}.so").llmc_get() == (2 if len(objects) == 2 else 1)


def test_what_the_linker_does_not_know_is_an_error(assemble: Assemble) -> None:
    strong = assemble("@value = global i32 2")
    with pytest.raises(CompileError, match="value is defined twice"):
        link([strong, strong])
    with pytest.raises(CompileError, match="no 64-bit little-endian ELF"):
        link([b"MZ" + bytes(100)])
    other = bytearray(strong)
    for machine, message in (
        (40, "for machine 40, not relocatable x86-64 or aarch64"),
        (183, "x86-64 and aarch64"),
    ):
        struct.pack_into("<H", other, 18, machine)
        with pytest.raises(CompileError, match=message):
            link([strong, bytes(other)])
    with pytest.raises(CompileError, match=r"section \.t.* is not supported"):
        link([assemble("@mine = thread_local global i32 3\ndefine ptr @llmc_at() {\n  ret ptr @mine\n}")])


def test_a_name_that_nobody_defines_fails_when_it_is_loaded(assemble: Assemble, tmp_path: Path) -> None:
    data = link(
        [
            assemble(
                "declare i32 @no_such_name()\n"
                "define i32 @llmc_f() {\n  %r = call i32 @no_such_name()\n  ret i32 %r\n}"
            )
        ]
    )
    with pytest.raises(OSError, match="no_such_name"):
        load(data, tmp_path / "x.so")


# -- threads
# ---------------------------------------------------------------------------------------------------------


class Region(ctypes.Structure):
    _fields_ = [("sync", ctypes.c_void_p), ("tasks", ctypes.c_int32)]


Task = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.POINTER(Region), ctypes.c_void_p)


def test_entry_points_pass_both_arrays_on(library: ctypes.CDLL) -> None:
    dims = (ctypes.c_int64 * 2)(1, 0)
    assert library.llmc_step(dims, None) == 0
    assert list(dims) == [1, 7]
    assert library.llmc_workspace(dims, None) == -1


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_task_runs_once(threads: int, library: ctypes.CDLL) -> None:
    assert library.llmc_set_threads(threads) == threads
    for given_tasks in (0, 1, 2, 7, 100):
        for _ in range(30):
            seen: Counter[int] = Counter()
            told: set[int] = set()

            @Task
            def task(
                i: int, region: object, closure: int | None, seen: Counter[int] = seen, told: set[int] = told
            ) -> int:
                seen[i] += 1
                told.add(region.contents.tasks)  # type: ignore[attr-defined]
                return 0

            assert library.llmc_launch(task, None, given_tasks) == 0
            (count,) = told
            assert count == given_tasks or (not given_tasks and count >= threads)
            assert seen == Counter(range(count))


def test_tasks_run_on_several_threads(library: ctypes.CDLL) -> None:
    meet = threading.Barrier(3, timeout=30)

    @Task
    def task(i: int, region: object, closure: int | None) -> int:
        meet.wait()  # returns only when three tasks run at once
        return 0

    for _ in range(5):
        library.llmc_set_threads(3)  # forgets that a region stalled, as Python's callbacks make them
        assert library.llmc_launch(task, None, 3) == 0


def test_after_a_region_that_stalled_the_others_come_back(library: ctypes.CDLL) -> None:
    library.llmc_set_threads(2)
    caller = threading.get_ident()
    meet = threading.Barrier(2, timeout=30)
    late = Task(lambda i, region, closure: 0 if threading.get_ident() == caller else time.sleep(0.05) or 0)
    both = Task(lambda i, region, closure: meet.wait() * 0)
    for _ in range(3):
        assert library.llmc_launch(late, None, 2) == 0
    time.sleep(0.5)  # longer than the caller ever goes on alone (2^28 cycles)
    assert library.llmc_launch(both, None, 2) == 0


def test_a_failing_task_fails_the_region_and_the_next_one_is_fine(library: ctypes.CDLL) -> None:
    library.llmc_set_threads(2)
    fails = Task(lambda i, region, closure: -1 if i == 3 else 0)
    works = Task(lambda i, region, closure: 0)
    assert library.llmc_launch(fails, None, 8) == -1
    assert library.llmc_launch(works, None, 8) == 0


def test_a_region_in_a_region_and_regions_of_two_threads(library: ctypes.CDLL) -> None:
    library.llmc_set_threads(2)
    inner_runs: list[int] = []
    inner = Task(lambda i, region, closure: inner_runs.append(i) or 0)
    outer = Task(lambda i, region, closure: library.llmc_launch(inner, None, 3))
    assert library.llmc_launch(outer, None, 4) == 0
    assert Counter(inner_runs) == Counter([0, 1, 2] * 4)

    totals = [0, 0]

    def launch(which: int) -> None:
        def add(i: int, region: object, closure: int | None) -> int:
            totals[which] += i  # Python's callbacks hold its lock
            return 0

        task = Task(add)
        for _ in range(200):
            assert library.llmc_launch(task, None, 5) == 0

    others = [threading.Thread(target=launch, args=(i,)) for i in range(2)]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join()
    assert totals == [2000, 2000]


def test_a_forked_child_computes_alone(library: ctypes.CDLL, tmp_path: Path) -> None:
    script = f"""
import ctypes, os
library = ctypes.CDLL({library._name!r})
Task = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
ran = []
task = Task(lambda i, region, closure: ran.append(i) or 0)
library.llmc_set_threads(3)
assert library.llmc_launch(task, None, 6) == 0
child = os.fork()
if child == 0:
    ran.clear()
    os._exit(0 if library.llmc_launch(task, None, 6) == 0 and sorted(ran) == list(range(6)) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=60)


# -- the workspace
# ---------------------------------------------------------------------------------------------------


@st.composite
def intervals(draw: st.DrawFn) -> list[Interval]:
    spans = draw(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12), st.integers(1, 5)), max_size=40))
    return [Interval(i, a, a + length, 64 * size, 64 * size) for i, (a, length, size) in enumerate(spans)]


@given(intervals())
def test_values_that_live_at_once_share_no_slot(values: list[Interval]) -> None:
    made = plan(values)
    for a in values:
        slot = made.slots[made.slot_of[a.key]]
        assert a.size in slot.sizes
        for b in values:
            if a.key < b.key and a.first <= b.last and b.first <= a.last:
                assert made.slot_of[a.key] != made.slot_of[b.key]


def test_a_chain_needs_two_slots() -> None:
    made = plan([Interval(i, i, i + 1, 64, 64) for i in range(100)])
    assert len(made.slots) == 2
