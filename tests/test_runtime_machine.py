"""What the machine runs and how much memory it has, from texts of machines that are not here."""

from __future__ import annotations

from pathlib import Path

import pytest
from llmc.ir.errors import InputError
from llmc.runtime import cpu, memory
from llmc.runtime.memory import plan_kv_cache

HASWELL = "fpu sse4_2 avx avx2 fma f16c bmi1 bmi2 movbe abm"
CASCADE_LAKE = HASWELL + " avx512f avx512bw avx512cd avx512dq avx512vl avx512_vnni"
SAPPHIRE_RAPIDS = CASCADE_LAKE + " avx_vnni avx512_bf16 amx_bf16 amx_tile amx_int8"


@pytest.mark.parametrize(
    ("flags", "levels"),
    [
        ("", ["generic"]),
        ("fpu sse4_2 avx", ["generic"]),
        (HASWELL, ["generic", "avx2"]),
        (HASWELL.replace(" fma", ""), ["generic"]),
        (HASWELL + " avx_vnni", ["generic", "avx2", "avxvnni"]),
        (CASCADE_LAKE, ["generic", "avx2", "avx512vnni"]),
        (CASCADE_LAKE.replace("avx512vl ", ""), ["generic", "avx2"]),
        (CASCADE_LAKE + " avx512_bf16 sse4a", ["generic", "avx2", "avx512vnni", "zen4"]),
        (SAPPHIRE_RAPIDS.replace(" amx_int8", ""), ["generic", "avx2", "avxvnni", "avx512vnni"]),
        (SAPPHIRE_RAPIDS.replace(" avx512_bf16", ""), ["generic", "avx2", "avxvnni", "avx512vnni"]),
        (SAPPHIRE_RAPIDS, ["generic", "avx2", "avxvnni", "avx512vnni", "amx"]),
    ],
)
def test_levels_of_known_processors(flags: str, levels: list[str]):
    text = f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: {flags} extra\n"
    assert cpu.supported_isas(cpu.parse_cpuinfo(text)) == levels


def test_processors_that_differ_have_what_all_of_them_have():
    text = f"processor: 0\nflags: {CASCADE_LAKE}\n\nprocessor: 1\nflags: {HASWELL}\n"
    assert cpu.supported_isas(cpu.parse_cpuinfo(text)) == ["generic", "avx2"]


def test_tiles_that_the_operating_system_refuses_are_no_level(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu, "cpu_features", lambda: cpu.parse_cpuinfo(f"flags : {SAPPHIRE_RAPIDS}\n"))
    for allowed, best in ((True, "amx"), (False, "avx512vnni")):
        monkeypatch.setattr(cpu, "may_use_tiles", lambda allowed=allowed: allowed)
        assert cpu.supported_isas()[-1] == best


def test_nothing_at_all_is_generic_and_arm_has_levels_of_its_own():
    assert cpu.supported_isas(cpu.parse_cpuinfo("")) == ["generic"]
    for features, levels in (
        ("fp asimd", []),
        ("fp asimd asimddp", ["neon"]),
        ("fp asimd asimddp i8mm", ["neon", "i8mm"]),
    ):
        found = cpu.parse_cpuinfo(f"processor : 0\nFeatures : {features}\n")
        assert cpu.supported_isas(found, "aarch64") == levels
    assert cpu.supported_isas(frozenset(), "riscv64") == []


def test_this_machine():
    assert cpu.best_isa() in cpu.ISA_LEVELS
    assert set(cpu.ISA_FLAGS) == set(cpu.ISA_LEVELS)
    assert cpu.default_threads() >= 1
    assert memory.available_memory() > 0


def test_threads_are_cores_that_may_be_used():
    blocks = [f"processor : {n}\nphysical id : 0\ncore id : {n // 2}\n" for n in range(8)]
    text = "\n".join(blocks)
    assert cpu._physical_cores(text, set(range(8))) == 4
    assert cpu._physical_cores(text, {0, 1, 2}) == 2
    assert cpu._physical_cores("processor : 0\n", {0}) == 0


def _group(folder: Path, limit: str, used: int, inactive: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(limit)
    (folder / "memory.current").write_text(str(used))
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n")


def test_the_tightest_control_group_counts(tmp_path: Path):
    _group(tmp_path, "max\n", 0)
    _group(tmp_path / "a", "1000\n", 600, 100)
    _group(tmp_path / "a" / "b", "900\n", 100)
    assert memory.group_memory(tmp_path, "0::/a/b\n") == 500
    assert memory.group_memory(tmp_path, "0::/a\n") == 500
    assert memory.group_memory(tmp_path, "0::/\n") is None
    assert memory.group_memory(tmp_path, "0::/../../elsewhere\n") is None


def test_version_1_control_groups(tmp_path: Path):
    folder = tmp_path / "memory" / "docker"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("5000")
    (folder / "memory.usage_in_bytes").write_text("2000")
    (folder / "memory.stat").write_text("total_inactive_file 300\n")
    assert memory.group_memory(tmp_path, "7:cpu:/x\n5:memory:/docker\n") == 3300
    (folder / "memory.limit_in_bytes").write_text(str(2**63 - 4096))
    assert memory.group_memory(tmp_path, "5:memory:/docker\n") is None


SIZES = {"page_size": 16, "bytes_per_page": 1000, "context": 160, "max_sequences": 4}


@pytest.mark.parametrize(
    ("more", "pages"),
    [
        ({"available": 10**9}, 40),  # all sequences at full length
        ({"available": 20_000}, 12),  # 60 % of the free memory
        ({"available": 10**9, "kv_tokens": 17}, 2),
        ({"available": 10**9, "kv_bytes": 7999}, 7),
        ({"available": 10**9, "bytes_per_page": 0}, 40),
        ({"available": 10**9, "bytes_per_page": 0, "kv_bytes": 5}, 40),
    ],
)
def test_the_cache_is_sized_by_memory_and_need(more: dict[str, int], pages: int):
    plan = plan_kv_cache(**{**SIZES, **more})
    assert plan.pages == pages
    assert plan.tokens == 16 * pages


def test_the_size_is_told_in_one_line():
    plan = plan_kv_cache(**SIZES, available=10**9)
    assert str(plan) == "kv cache: 40 pages = 640 tokens, 0.0 MB"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"available": 1000}, "not one page of KV cache"),
        ({"available": 5000, "kv_tokens": 160}, "is more than the 0 MB that are free"),
        ({"available": 5000, "kv_bytes": 999}, "not one page"),
        ({"available": 5000, "kv_bytes": -1}, "kv_cache_bytes is -1"),
        ({"available": 5000, "kv_tokens": 0}, "kv_tokens is 0"),
    ],
)
def test_what_does_not_fit_is_refused(more: dict[str, int], message: str):
    with pytest.raises(InputError, match=message) as caught:
        plan_kv_cache(**{**SIZES, **more})
    assert caught.value.remedy


def test_the_cache_is_no_larger_than_the_kernels_can_count():
    wanted = {"page_size": 16, "bytes_per_page": 1 << 20, "context": 1 << 17, "max_sequences": 64}
    assert plan_kv_cache(**wanted, available=1 << 40, max_pages=1000).pages == 1000
    assert plan_kv_cache(**wanted, available=1 << 40).pages == 64 * (1 << 13)
