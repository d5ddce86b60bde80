"""DoRA and biases that requests choose: what multiplies a layer's result and is added to it, read out of an
artifact. Logits beside PEFT's are in test_adapters.py.
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
from llmc.ir.weights import ArrayTensor
from llmc.runtime import adapters
from llmc.runtime.adapter_places import AdapterPlaces, Factors, Place

from .conftest import only_long
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

    def bias(self, module: str, rows: int) -> np.ndarray | None:
        return np.arange(rows, dtype=np.float32) if module == ONE else None


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
        pytest.param("int4-g32", 4e-2, {}, marks=only_long),
        ("nf4", 6e-2, {}),
        pytest.param("gguf-q4_k_m", 4e-2, WIDE, marks=pytest.mark.slow),
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
        bias, added = weights.get(f"{module}.bias", np.zeros(len(b), np.float32)), base.bias(module, len(b))
        np.testing.assert_array_equal(0 * bias if added is None else added, bias)
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


TWO = "model.layers.0.self_attn.o_proj"


def one_more() -> AdapterPlaces:
    return AdapterPlaces(256, (Place(64, ((ONE, 32),), gains=True), Place(64, ((TWO, 64),), gains=True)))


def drawn(*shape: int) -> ArrayTensor:
    return ArrayTensor(np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32), "a.bin")


def test_biases_are_added_to_what_the_layer_gives(one: Adapter) -> None:
    """lora_bias after scaling; one in the place of the layer's, what that is more; with DoRA beside both."""
    change = one.changes[ONE]
    m = change.magnitude
    assert m is not None
    scaled, added, trained = m.read(), drawn(32), drawn(32)
    own = np.arange(32, dtype=np.float32)
    biased = only(one, magnitude=None, bias=added)
    (found,) = places().factors(biased)[0]  # nothing of the model is asked for
    assert found is not None
    gain, shift = found[2]
    assert (gain == 1).all()
    np.testing.assert_allclose(shift, added.read() * np.float32(change.scaling), rtol=1e-6)
    for magnitude, wanted in ((None, np.ones(32)), (m, scaled)):
        both = replace(only(one, magnitude=magnitude, bias=added), replaced={f"{ONE}.bias": trained})
        (found,) = places().factors(both, None, Ones())[0]
        assert found is not None
        gain, shift = found[2]
        np.testing.assert_allclose(gain, wanted, rtol=1e-6)
        total = added.read() * np.float32(change.scaling) + trained.read() - own
        np.testing.assert_allclose(shift, total, rtol=1e-5, atol=1e-5)
    salts = {adapters._digest(places().factors(a, None, Ones())) for a in (both, biased, only(one))}
    assert len(salts) == 3


def test_a_bias_alone_is_a_change(one: Adapter) -> None:
    """`bias="all"` trains those of layers that have no factors."""
    trained = drawn(32)
    alone = replace(one, changes={}, replaced={f"{ONE}.bias": trained})
    found = one_more().factors(alone, None, Ones())
    assert list(found) == [0]
    (part,) = found[0]
    assert part is not None and not part[0].any() and not part[1].any()
    np.testing.assert_allclose(part[2][1], trained.read() - np.arange(32), rtol=1e-5, atol=1e-5)


def test_a_copy_of_the_bases_bias_is_no_change(one: Adapter) -> None:
    """PEFT saves a head's bias beside its factors, unasked."""
    name = f"{ONE}.bias"
    copied = replace(only(one, magnitude=None), replaced={name: drawn(32)}, copies=frozenset([name]))
    (found,) = places(gains=False).factors(copied)[0]
    assert found is not None and len(found) == 2


def test_biases_that_do_not_fit_are_refused(one: Adapter) -> None:
    def refused(adapter: Adapter, base: Any, kind: type[Exception], text: str, gains: bool = True) -> None:
        with pytest.raises(kind, match=text):
            (one_more() if gains else places(gains=False)).factors(adapter, None, base)

    biased = only(one, magnitude=None, bias=drawn(32))
    refused(
        biased, Ones(), UnsupportedError, "has biases, which these kernels have no places for", gains=False
    )
    refused(
        only(one, magnitude=None, bias=drawn(31)),
        None,
        InputError,
        r"a\.bin has the shape \[31\], not \[32\]",
    )
    trained = replace(one, changes={}, replaced={f"{ONE}.bias": drawn(32)})
    refused(trained, None, UnsupportedError, "trained biases, which needs what compiles models")
    other = replace(one, changes={}, replaced={f"{TWO}.bias": drawn(64)})
    refused(other, Ones(), InputError, f"is a bias of {TWO}, which has none here")
    named = replace(trained, replaced={**trained.replaced, ONE: drawn(32)})
    refused(named, Ones(), UnsupportedError, rf"replaces whole tensors, {ONE} \(")
    norms = replace(trained, replaced={**trained.replaced, "model.norm.bias": drawn(64)})
    refused(norms, Ones(), UnsupportedError, r"replaces whole tensors, model\.norm\.bias \(")


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
    kinds: dict[str, dict[str, Any]] = {
        "dora": {"use_dora": True},
        "biases": {"bias": "lora_only", "lora_bias": True},
    }
    wanted = {
        name: reference_logits(
            adapter(tiny_model("qwen2"), tmp_path / name, target_modules=LINEAR, **options), ids
        )
        for name, options in kinds.items()
    }
    files = {name: tmp_path / name for name in kinds}
    with llmc.load(tmp_path / "a.llmc", adapters=files, kv_tokens=512, context=256) as llm:
        rounding = np.abs(llm.logits(ids) - plain).max()
        for name, logits in wanted.items():
            found = llm.logits(ids, adapter=name).copy()
            pieces = [part.copy() for part in llm.iter_logits(ids, 7, name)]
            assert np.abs(found - logits).max() < 2.5 * rounding
            assert np.abs(logits - plain).max() > 8 * rounding
            np.testing.assert_array_equal(np.concatenate(pieces), found)
