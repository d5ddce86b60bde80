"""DoRA that requests choose: what multiplies a layer's result, read out of an artifact. Logits beside PEFT's
are in test_adapters.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llmc
import numpy as np
import pytest
from llmc.codegen.tvm import base_weights
from llmc.codegen.tvm.base_weights import BaseWeights
from llmc.frontend.lora import read_adapter
from llmc.ir.adapters import Adapter
from llmc.ir.errors import ArtifactError, InputError, UnsupportedError
from llmc.runtime import adapters
from llmc.runtime.adapters import AdapterPlaces, Factors, Place

from .lora_files import adapter
from .models import ids_of, reference_logits, save_tiny, tiny_model
from .tvm_graphs import ISA

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT still calls what transformers deprecates
pytest.importorskip("peft")

HERE = f"tvm-cpu:isa={ISA}"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ONE = "model.layers.0.self_attn.k_proj"


class Ones:
    """`BaseWeights` of a model that was not compiled."""

    def gains(self, module: str, a: np.ndarray, b: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
        return np.stack([magnitude, np.zeros(len(b), np.float32)])


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    folder = tmp_path_factory.mktemp("one")
    adapter(tiny_model("qwen2"), folder, target_modules=LINEAR, use_dora=True)
    return read_adapter(folder)


WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
"""As wide as a block of the K types."""


# Merged projections with biases, an output projection; rotated weights (int8), two codes a byte, a codebook
# (one scale a row), scales of two levels.
@pytest.mark.parametrize(
    ("scheme", "tolerance", "sizes"),
    [
        ("int8", 4e-3, {}),
        ("int4-g32", 4e-2, {}),
        ("nf4", 6e-2, {}),
        ("gguf-q4_k_m", 4e-2, WIDE),
    ],
)
def test_gains_are_of_the_weights_in_the_artifact(
    scheme: str, tolerance: float, sizes: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter(tiny_model("qwen2", **sizes), tmp_path / "one", target_modules=LINEAR, use_dora=True)
    one = read_adapter(tmp_path / "one")
    made = llmc.compile(
        save_tiny("qwen2", tmp_path / "base", **sizes), tmp_path / "a.llmc", targets=[HERE], quant=scheme
    )
    text = made.read_text("ir.txt")
    assert ("hadamard" in text) == (scheme == "int8") and ("super" in text) == bool(sizes)
    base = BaseWeights(made)
    errors: list[float] = []
    weights = {name: p.detach().numpy() for name, p in tiny_model("qwen2", **sizes).named_parameters()}
    for module, change in one.changes.items():
        assert change.magnitude is not None
        a, b, m = change.a.read(), change.b.read() * np.float32(change.scaling), change.magnitude.read()
        wanted = m / np.linalg.norm(weights[f"{module}.weight"] + b @ a, axis=1)
        gain, shift = base.gains(module, a, b, m)
        assert np.abs(gain / wanted - 1).max() < tolerance
        bias = weights.get(f"{module}.bias", np.zeros(len(b), np.float32))
        np.testing.assert_allclose(shift, (1 - gain) * bias, atol=1e-6)
        monkeypatch.setattr(base_weights, "rotation_of", lambda _: 0)
        errors.append(np.abs(base.gains(module, a, b, m)[0] / wanted - 1).max())
        monkeypatch.undo()
        m[::2] = np.nan
        some, shift = base.gains(module, a, b, m)
        assert (some[::2] == 1).all() and not shift[::2].any() and np.array_equal(some[1::2], gain[1::2])
    assert scheme != "int8" or max(errors) > 10 * tolerance  # A that was not rotated


def places(gains: bool = True) -> AdapterPlaces:
    return AdapterPlaces(256, (Place(64, ((ONE, 32),), gains=gains),))


def only(one: Adapter, **changed: Any) -> Adapter:
    return replace(one, changes={ONE: replace(one.changes[ONE], **changed)})


def test_kernels_without_places_for_gains_say_so(one: Adapter) -> None:
    """As tvm-cuda's, and those of a version before."""
    with pytest.raises(UnsupportedError, match="which these kernels have no places for") as caught:
        places(gains=False).factors(only(one), None, Ones())
    assert "--target tvm-cpu" in caught.value.remedy and "--lora" in caught.value.remedy


def test_without_what_reads_weights_that_is_told(one: Adapter) -> None:
    with pytest.raises(UnsupportedError, match="which needs what compiles models") as caught:
        places().factors(only(one))
    assert "llmc[compile]" in caught.value.remedy


def test_graphs_that_cannot_be_read_are_told_of() -> None:
    ones, text = np.ones((2, 2), np.float32), "llmc 1\nno graph"
    artifact: Any = SimpleNamespace(root=Path("m.llmc"), read_text=lambda name: text)
    with pytest.raises(ArtifactError, match=r"m\.llmc.ir\.txt is of another version of llmc"):
        BaseWeights(artifact).gains("q_proj", ones, ones, np.ones(2, np.float32))


def test_magnitudes_of_another_number_are_refused(one: Adapter) -> None:
    other = one.changes["model.layers.0.self_attn.q_proj"].magnitude
    with pytest.raises(InputError, match=r"q_proj.* has the shape \[64\], not \[32\]"):
        places().factors(only(one, magnitude=other), None, Ones())


def test_magnitudes_tell_adapters_apart(one: Adapter) -> None:
    """Prefixes in the cache belong to what an adapter holds."""

    def salt(factors: Factors) -> bytes:
        return adapters._digest(factors)

    plain = salt(places().factors(only(one, magnitude=None)))
    scaled = salt(places().factors(only(one), None, Ones()))
    assert plain != scaled == salt(places().factors(only(one), None, Ones()))


def test_over_8_bits_beside_peft(tmp_path: Path) -> None:
    """Rotated weights, factors of 8 bits: no further from PEFT's than 2.5 times what the base alone is from
    its own float model.
    """
    llmc.compile(
        save_tiny("qwen2", tmp_path / "base"), tmp_path / "a.llmc", targets=[HERE], quant="int8",
        kv_dtype="float32", adapters=True,
    )  # fmt: skip
    ids = ids_of(19)
    plain = reference_logits(tiny_model("qwen2"), ids)
    adapted = adapter(tiny_model("qwen2"), tmp_path / "one", target_modules=LINEAR, use_dora=True)
    wanted = reference_logits(adapted, ids)
    with llmc.load(
        tmp_path / "a.llmc", adapters={"one": tmp_path / "one"}, kv_tokens=512, context=256
    ) as llm:
        rounding = np.abs(llm.logits(ids) - plain).max()
        found = llm.logits(ids, adapter="one").copy()
        pieces = [part.copy() for part in llm.iter_logits(ids, 7, "one")]
    assert np.abs(found - wanted).max() < 2.5 * rounding
    assert np.abs(wanted - plain).max() > 8 * rounding
    np.testing.assert_array_equal(np.concatenate(pieces), found)
