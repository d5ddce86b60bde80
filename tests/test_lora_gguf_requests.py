"""Adapters in GGUF files that requests choose among, over artifacts of GGUF models. llama.cpp is the
oracle.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import llmc
import numpy as np
import pytest
from llmc.codegen.artifact import Artifact
from llmc.frontend.gguf_architectures import ARCHITECTURES
from llmc.frontend.lora_gguf import read_gguf_adapter
from llmc.ir import gguf_rows
from llmc.ir.errors import InputError, UnsupportedError
from llmc.ir.gguf_rows import GGUFRows
from llmc.runtime.llm import LLM

from .llama_cpp import LlamaCpp
from .lora_files import write_lora
from .models import ids_of, save_tiny
from .test_gguf_architectures import tiny, written
from .test_gguf_target import write
from .test_lora_gguf import factors_of
from .tvm_graphs import ISA

HERE = f"tvm-cpu:isa={ISA}"
IDS = ids_of(40)
ALL = ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


KINDS = [
    "llama",
    "qwen3",
    "phi3",
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("granite", "phi")),
]


@pytest.fixture(scope="module", params=KINDS)
def opened(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, str, LLM]]:
    """A GGUF model, llama.cpp's name of its architecture, and its artifact."""
    folder = tmp_path_factory.mktemp(request.param)
    kind, architecture = request.param, ARCHITECTURES[request.param].name
    path = folder / "model.gguf"
    path = write(save_tiny(kind, folder), folder) if kind == "llama" else written(tiny(kind), kind, path)
    llmc.compile(path, folder / "base.llmc", targets=[HERE])
    with llmc.load(folder / "base.llmc", adapters={}, threads=2, kv_tokens=1024, context=64) as llm:
        yield path, architecture, llm


def test_logits_are_those_of_llama_cpp(opened: tuple[Path, str, LLM], tmp_path: Path) -> None:
    """Rows in another order than the model's, matrices that are one there and several here."""
    base, architecture, llm = opened
    scaled: list[tuple[Path, float]] = []
    for number, alpha in enumerate((6.0, 0.0)):
        factors = factors_of(base, ALL, 2 + number, seed=number)
        path = tmp_path / f"{number}.gguf"
        scaled.append((write_lora(path, factors, architecture=architecture, alpha=alpha), 1.0))
        llm.load_adapter(str(number), path)
    with LlamaCpp(base) as model:
        plain = model.logits(IDS)
        for number, one in enumerate(scaled):
            model.adapt([one])
            wanted, found = model.logits(IDS), llm.logits(IDS, adapter=str(number))
            assert np.abs(wanted - plain).max() > 0.1
            # llama.cpp keeps its cache in float16.
            assert np.abs(found - wanted).max() <= 0.01 * np.abs(wanted).max()
    assert np.abs(llm.logits(IDS) - plain).max() <= 0.01 * np.abs(plain).max()
    for number in range(2):
        llm.unload_adapter(str(number))


def test_rows_in_the_order_of_the_file_would_be_wrong(
    opened: tuple[Path, str, LLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tolerance above tells."""
    base, architecture, llm = opened
    registry = llm.engine.engine.adapters
    rows = registry.gguf_rows()
    assert rows is not None
    path = write_lora(
        tmp_path / "one.gguf", factors_of(base, ("attn_q", "attn_k")), architecture=architecture
    )
    unordered = GGUFRows(
        rows.architecture, {module: (name, None) for module, (name, _) in rows.modules.items()}
    )
    if all(order is None for _, order in rows.modules.values()):
        pytest.skip("this file has rows in the model's order")
    llm.load_adapter("right", path)
    monkeypatch.setattr(registry, "gguf_rows", lambda: unordered)
    llm.load_adapter("wrong", path)
    right, wrong = llm.logits(IDS, adapter="right").copy(), llm.logits(IDS, adapter="wrong")
    assert np.abs(wrong - right).max() > 0.02 * np.abs(right).max()
    for name in ("right", "wrong"):
        llm.unload_adapter(name)


def test_what_does_not_fit_is_refused(opened: tuple[Path, str, LLM], tmp_path: Path) -> None:
    base, architecture, llm = opened
    factors = factors_of(base, ("attn_output",))
    name = next(iter(factors)).removesuffix(".lora_a")

    def refused(
        why: str, given: dict[str, np.ndarray], kind: type[Exception], of: str = architecture
    ) -> None:
        path = write_lora(tmp_path / "bad.gguf", given, architecture=of)
        with pytest.raises(kind, match=why):
            llm.load_adapter("bad", path)

    refused("this model is", factors, InputError, "mamba")
    strange = {"blk.9.x.weight.lora_a": np.ones((2, 4), "f"), "blk.9.x.weight.lora_b": np.ones((4, 2), "f")}
    refused(r"changes blk\.9\.x\.weight, which requests cannot choose", strange, UnsupportedError)
    refused("which requests cannot choose", factors_of(base, ("token_embd",)), UnsupportedError)
    refused(r"has no .*\.lora_b", {f"{name}.lora_a": factors[f"{name}.lora_a"]}, InputError)
    refused("are no factors of", {**factors, f"{name}.lora_a": np.ones((9, 64), "f")}, InputError)
    refused("NaN", {**factors, f"{name}.lora_b": np.full_like(factors[f"{name}.lora_b"], np.nan)}, InputError)
    for part, shape in (("a", (3, 63)), ("b", (63, 3))):
        refused("o_proj|dense", {**factors, f"{name}.lora_{part}": np.ones(shape, "f")}, InputError)
    assert not llm.adapters


def test_norms_are_left_out_and_that_is_said(
    opened: tuple[Path, str, LLM], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, architecture, llm = opened
    norms = {"blk.0.attn_norm.weight": np.ones(64, np.float32)}
    factors = {**factors_of(base, ("attn_output",)), **norms}
    llm.load_adapter("one", write_lora(tmp_path / "one.gguf", factors, architecture=architecture))
    assert "adapter one.gguf: blk.0.attn_norm.weight are left out" in caplog.text
    llm.unload_adapter("one")


def test_without_the_package_that_is_told(
    opened: tuple[Path, str, LLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, architecture, llm = opened
    one = write_lora(tmp_path / "one.gguf", factors_of(base, ("attn_q",)), architecture=architecture)
    monkeypatch.setattr("llmc.runtime.adapters.find_spec", lambda _: None)
    with pytest.raises(UnsupportedError, match="which the package gguf reads"):
        llm.load_adapter("one", one)


def test_a_model_that_was_no_file_is_told(tmp_path: Path) -> None:
    llmc.compile(save_tiny("llama", tmp_path / "folder"), tmp_path / "x.llmc", targets=[HERE])
    one = write_lora(tmp_path / "one.gguf", {"blk.0.attn_q.weight.lora_a": np.ones((2, 64), "f")})
    with (
        llmc.load(tmp_path / "x.llmc", adapters={}, threads=1, kv_tokens=256, context=64) as llm,
        pytest.raises(UnsupportedError, match="artifact was compiled of another"),
    ):
        llm.load_adapter("one", one)


def test_a_matrix_that_is_three_modules(tmp_path: Path) -> None:
    """Each gets its rows of B, and all of A."""
    name, rng = "blk.0.attn_qkv.weight", np.random.default_rng(0)
    a, b = rng.normal(size=(2, 6)).astype(np.float32), rng.normal(size=(12, 2)).astype(np.float32)
    path = write_lora(tmp_path / "one.gguf", {f"{name}.lora_a": a, f"{name}.lora_b": b}, alpha=3.0)
    parts = {"q": np.array([1, 0, 3, 2]), "k": np.arange(4, 8), "v": np.arange(8, 12)}
    rows = GGUFRows("llama", {part: (name, order) for part, order in parts.items()})
    adapter = read_gguf_adapter(path, "it", "llama").of_modules(rows)
    for part, order in parts.items():
        change = adapter.changes[part]
        assert np.array_equal(change.a.read(), a) and np.array_equal(change.b.read(), b[order])
        assert change.scaling == 1.5
    for missing in parts:
        fewer = GGUFRows("llama", {part: (name, order) for part, order in parts.items() if part != missing})
        with pytest.raises(InputError, match="are no factors of blk"):
            read_gguf_adapter(path, "it", "llama").of_modules(fewer)


def test_rows_survive_being_written() -> None:
    rng = np.random.default_rng(0)
    orders = [
        rng.permutation(50),
        np.arange(8).reshape(2, 2, 2).swapaxes(1, 2).reshape(-1),
        np.arange(3),
        None,
    ]
    orders += [np.array([4]), np.array([5, 5, 3])]
    rows = GGUFRows("llama", {str(i): (f"t{i}", order) for i, order in enumerate([*orders, orders[1]])})
    text = json.dumps(rows.to_json())
    read = GGUFRows.from_json(json.loads(text))
    assert read.architecture == "llama" and list(read.modules) == list(rows.modules)
    for (name, one), (other, two) in zip(rows.modules.values(), read.modules.values(), strict=True):
        assert name == other and (one is None) == (two is None)
        assert one is None or np.array_equal(one, two)
    assert len(rows.to_json()["orders"]) == 5


@pytest.mark.parametrize(
    "damage",
    [
        [],
        {},
        {"architecture": "llama", "orders": [[[0, 1]]], "modules": {}},
        {"architecture": "llama", "orders": [[[0, 1, 1 << 40]]], "modules": {}},
        {"architecture": "llama", "orders": [[[0.0, 1, 2]]], "modules": {}},
        {"architecture": "llama", "orders": [[[1, 2**63 - 1, 2]]], "modules": {}},
        {"architecture": "llama", "orders": [[[0, 1, 1 << 23]]] * 3, "modules": {}},
        {"architecture": "llama", "orders": [[[0, -1, 2]]], "modules": {}},
        {"architecture": "llama", "orders": [["abc"]], "modules": {}},
        {"architecture": "llama", "orders": [], "modules": {"a": ["t", 0]}},
        {"architecture": "llama", "orders": [], "modules": {"a": 3}},
    ],
)
def test_damaged_rows(damage: object) -> None:
    with pytest.raises(ValueError):
        GGUFRows.from_json(damage)


def test_rows_are_few_bytes(opened: tuple[Path, str, LLM]) -> None:
    """Orders that many layers share stand there once."""
    folder = next(parent for parent in opened[0].parents if (parent / "base.llmc").exists())
    found = json.loads(Artifact.open(folder / "base.llmc").read_text(gguf_rows.FILE))
    assert len(found["modules"]) >= 4 and len(found["orders"]) <= 3
