"""Schedules of kernels: all give the same bits; the search, its file, and `--tune` from end to end."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llmc.codegen.driver import compile_model
from llmc.codegen.legalize import legalize
from llmc.codegen.target import with_tune
from llmc.codegen.tvm.cpu import OPERATIONS
from llmc.codegen.tvm.kernels.isa import get_isa
from llmc.codegen.tvm.kernels.layout import QuantLayout
from llmc.codegen.tvm.kernels.schedule import Schedule, alternatives, default_schedule
from llmc.ir.errors import InputError

from .kernel_harness import HERE, call
from .tvm_graphs import compile_graph, inputs_of, open_tvm, quantized_layer

tune = pytest.importorskip("llmc.codegen.tvm.tune")

K, N, GROUP = 192, 112, 64
LAYOUT = QuantLayout(N, K, 4, GROUP, None, "float16", "uint8", 0)
ROWS = (1, 2, 3, 5, 7, 8, 15, 16, 21, 31, 33, 50, 70)


def form(layout: QuantLayout) -> dict[str, Any]:
    names = ("bits", "group_size", "codebook", "scale_dtype", "zero_point", "super_group")
    return {name: getattr(layout, name) for name in names}


def operands(rows: int) -> list[np.ndarray]:
    rng = np.random.default_rng(rows)
    a = rng.integers(-127, 128, (rows, LAYOUT.k_padded), dtype=np.int8)
    sums = a.reshape(rows, LAYOUT.groups, -1).astype(np.float32).sum(2)
    column = rng.integers(0, K, (rows, 1)).astype(np.float32)  # of the one that is kept apart
    return [
        a,
        np.hstack((sums, column)),
        rng.random((rows, LAYOUT.groups + 1), dtype=np.float32) + 0.1,
        np.random.default_rng(1).integers(0, 256, LAYOUT.weight_shape, dtype=np.uint8),
        (np.random.default_rng(2).random(LAYOUT.scale_shape) + 0.1).astype(LAYOUT.scale_storage),
        np.random.default_rng(3).integers(0, 256, LAYOUT.zero_shape, dtype=np.uint8),
        np.zeros((rows, N), np.float32),
    ]


SCHEDULES = [
    Schedule((1,), (2, 1), 1, 4, 0),
    Schedule((8, 4, 2, 1), (5, 2, 1), 3, 16, 512),
    Schedule((6, 2, 1), (8, 4, 2, 1), 2, 32, 4096),
    Schedule((3, 1), (3, 1), 4, 0, 1 << 16),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_gives_the_same_bits(schedule: Schedule) -> None:
    from llmc.codegen.tvm.kernels.quantized import make_quantized_linear

    shape = {"n": N, "k": K, **form(LAYOUT), "apart": 1}
    for rows in ROWS:
        arrays = operands(rows)
        wanted = call(make_quantized_linear, HERE[-1], shape, *arrays)
        got = call(make_quantized_linear, HERE[-1], {**shape, "schedule": schedule}, *arrays)
        assert np.abs(wanted).min() > 0
        np.testing.assert_array_equal(got, wanted, err_msg=f"{rows} rows")


@pytest.mark.parametrize("schedule", SCHEDULES[:2])
def test_every_schedule_gives_the_same_bits_of_a_gated_mlp(schedule: Schedule) -> None:
    from llmc.codegen.tvm.kernels.gated import make_quantized_gated_mlp

    width = 64
    lay = QuantLayout(2 * width, K, 4, GROUP, None, "float16", None, 0)
    static = {"width": width, "k": K, **form(lay), "activation": "silu", "quantize": (64, 8), "apart": 1}
    rng = np.random.default_rng(0)
    weight = rng.integers(0, 256, lay.weight_shape, dtype=np.uint8)
    scale = (rng.random(lay.scale_shape) * 0.01).astype(lay.scale_storage)
    for rows in (1, 3, 9, 17, 40):
        a, sums, a_scale = operands(rows)[:3]
        outputs = [np.zeros((rows, width), np.int8), *(np.zeros((rows, 1), np.float32) for _ in range(2))]
        arrays = [a, sums, a_scale, weight, scale, *outputs]
        results = [
            call(make_quantized_gated_mlp, HERE[-1], parameters, *arrays, outputs=3)
            for parameters in (static, {**static, "schedule": schedule})
        ]
        assert results[0][0].any()
        for wanted, got in zip(*results, strict=True):
            np.testing.assert_array_equal(got, wanted, err_msg=f"{rows} rows")


@pytest.mark.parametrize("isa", ["generic", "avx2", "avxvnni", "avx512vnni", "zen4", "amx"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_is_shipped_and_what_is_tried_are_schedules(isa: str, bits: int) -> None:
    lay = replace(LAYOUT, bits=bits, zero_point=None)
    for tiles in {get_isa(isa).tiles, False}:
        start = default_schedule(get_isa(isa), lay, tiles=tiles)
        assert Schedule.parse(json.loads(json.dumps(start.as_json()))) == start
        for name, values in alternatives(start, lay, tiles=tiles):
            assert getattr(start, name) not in values
            for value in values:
                other = replace(start, **{name: value})
                assert Schedule.parse(json.loads(json.dumps(other.as_json()))) == other


GOOD = {"few": [4, 2, 1], "many": [6, 1], "width": 2, "unpack": 20, "ahead": 2048}


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        [],
        {**GOOD, "few": [4, 2]},
        {**GOOD, "few": []},
        {**GOOD, "few": [1, 1]},
        {**GOOD, "many": [2, 4, 1]},
        {**GOOD, "many": [99, 1]},
        {**GOOD, "many": [True]},
        {**GOOD, "width": 0},
        {**GOOD, "width": 1.0},
        {**GOOD, "unpack": -1},
        {**GOOD, "ahead": 1 << 40},
        {**GOOD, "more": 1},
        {k: v for k, v in GOOD.items() if k != "ahead"},
    ],
)
def test_what_is_no_schedule_is_none(wrong: object) -> None:
    assert Schedule.parse(GOOD) is not None
    assert Schedule.parse(wrong) is None


# -- the file
def test_the_file_keeps_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "schedules.json"
    assert tune.read_cache(path, "avx2") == {}
    tune.write_cache(path, "avx2", {"one": SCHEDULES[0]})
    tune.write_cache(path, "avx2", {"two": SCHEDULES[1]})
    tune.write_cache(path, "amx", {"one": SCHEDULES[2]})
    assert tune.read_cache(path, "avx2") == {"one": SCHEDULES[0], "two": SCHEDULES[1]}
    assert tune.read_cache(path, "amx") == {"one": SCHEDULES[2]}
    assert os.listdir(path.parent) == ["schedules.json"]
    monkeypatch.setattr(tune, "processor", lambda: "another one")
    assert tune.read_cache(path, "avx2") == {}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b'{"version": 0, "schedules": {}}',
        b'{"version": 1, "schedules": 5}',
        b"[" * 99999,
    ],
)
def test_a_damaged_file_is_as_none(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "schedules.json"
    path.write_bytes(content)
    assert tune.read_cache(path, "avx2") == {}
    tune.write_cache(path, "avx2", {"one": SCHEDULES[0]})
    assert tune.read_cache(path, "avx2") == {"one": SCHEDULES[0]}


def test_an_entry_that_is_no_schedule_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "schedules.json"
    tune.write_cache(path, "avx2", {"one": SCHEDULES[0], "two": SCHEDULES[1]})
    stored = json.loads(path.read_text())
    (entries,) = stored["schedules"].values()
    entries["one"]["few"] = [10**9]
    path.write_text(json.dumps(stored))
    assert tune.read_cache(path, "avx2") == {"two": SCHEDULES[1]}


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("no folder")
    with pytest.raises(InputError, match=r"taken/schedules\.json, which cannot be written.*LLMC_CACHE"):
        tune.write_cache(tmp_path / "taken" / "schedules.json", "avx2", {})


def test_the_folder_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CACHE", "/a")
    assert tune.cache_file() == Path("/a/schedules.json")
    monkeypatch.delenv("LLMC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert tune.cache_file() == Path("/b/llmc/schedules.json")


# -- the search
def searching(monkeypatch: pytest.MonkeyPatch, times: Any) -> Any:
    """A search whose measurements are those of `times(schedule, rows)`."""
    monkeypatch.setattr(tune.Search, "_function", lambda self, schedule: schedule)
    monkeypatch.setattr(tune.Search, "_sets", lambda self, kernel, rows: rows)
    monkeypatch.setattr(tune, "_time", times)
    return tune.Search(lambda **_: None, get_isa("avx2"), LAYOUT)


def test_the_fastest_value_of_each_field_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def times(schedule: Schedule, rows: int) -> float:
        seconds = 1.0
        if rows == 1:
            seconds *= {1024: 0.9, 512: 0.8}.get(schedule.ahead, 1.0)
        if schedule.few == (6, 2, 1):
            seconds *= 0.98  # less than measuring errs
        seconds *= {24: 0.9, 48: 0.7}.get(schedule.unpack, 1.0)
        if schedule.unpack == 48 and rows == 8:
            seconds *= 2  # faster on the whole, and too slow here
        return seconds

    found = searching(monkeypatch, times).run(time.monotonic() + 100)
    start = default_schedule(get_isa("avx2"), LAYOUT, tiles=False)
    assert found == replace(start, ahead=512, unpack=24)


def test_without_time_there_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    search = searching(monkeypatch, lambda schedule, rows: 1.0)
    assert search.run(time.monotonic() - 1) is None
    assert search.run(time.monotonic() + 100) == search.start


def test_targets_without_a_search_are_named() -> None:
    assert with_tune(["tvm-cpu:isa=avx2", "onnx-cpu"], 9) == ("tvm-cpu:isa=avx2,tune=9", "onnx-cpu")
    with pytest.raises(InputError, match="--tune: onnx-cpu has nothing to search for"):
        with_tune(["onnx-cpu"], 9)


def test_a_search_under_a_cap_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--tune with --max-ram"):
        compile_model("no-model", tmp_path / "out.llmc", tune=5, max_ram=10**9)


def test_a_kept_schedule_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what is built, without a search, and it changes no result."""
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path))
    graph = quantized_layer()
    (key,) = tune.lower(legalize(graph, OPERATIONS), get_isa(HERE[-1])).scheduled
    tune.write_cache(tmp_path / "schedules.json", HERE[-1], {key: SCHEDULES[1]})
    plain = compile_graph(graph, tmp_path / "plain.llmc", isa=HERE[-1])
    assert "tuned" not in plain.target("tvm-cpu")
    tuned = compile_graph(graph, tmp_path / "tuned.llmc", isa=HERE[-1], tune=1)
    assert tuned.target("tvm-cpu")["tuned"] == {"isa": HERE[-1], "kernels": 1, "searched": 1}
    library = f"targets/tvm-cpu/{HERE[-1]}.so"
    assert (plain.root / library).read_bytes() != (tuned.root / library).read_bytes()
    given = {"a": inputs_of(40)["a"]}
    wanted = open_tvm(plain).run(given)["y"]
    assert wanted.any()
    np.testing.assert_array_equal(open_tvm(tuned).run(given)["y"], wanted)


@pytest.mark.slow
def test_a_search_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path))
    graph = quantized_layer()
    first = compile_graph(graph, tmp_path / "first.llmc", isa=HERE[-1], tune=1000)
    assert first.target("tvm-cpu")["tuned"] == {"isa": HERE[-1], "kernels": 1, "searched": 1}
    (schedule,) = tune.read_cache(tmp_path / "schedules.json", HERE[-1]).values()
    began = time.monotonic()
    second = compile_graph(graph, tmp_path / "second.llmc", isa=HERE[-1], tune=1000)
    assert time.monotonic() - began < 60, "searched again"
    library = f"targets/tvm-cpu/{HERE[-1]}.so"
    assert (first.root / library).read_bytes() == (second.root / library).read_bytes()
    assert tune.read_cache(tmp_path / "schedules.json", HERE[-1]) != {}
    assert schedule.few[-1] == 1
