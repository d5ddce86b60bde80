"""Matrices, rows of tokens and embeddings that requests choose: PEFT's logits, over models that tie
embeddings and head, that store weights transposed, and quantized; what is refused.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import llmc
import numpy as np
import pytest
from llmc.codegen.artifact import Artifact
from llmc.frontend.lora import read_adapter
from llmc.ir.adapters import Adapter, TokenRows
from llmc.ir.errors import InputError, UnsupportedError
from llmc.ir.weights import ArrayTensor
from llmc.runtime.adapter_places import AdapterPlaces, Place

from .lora_files import TIED, adapter
from .models import ids_of, reference_logits, save_tiny, tiny_model
from .tvm_graphs import ISA

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT still calls what transformers deprecates
pytest.importorskip("peft")

HERE = f"tvm-cpu:isa={ISA}"


def logits(
    folder: Path, kinds: dict[str, dict[str, Any]], family: str, sizes: dict[str, Any], **options: Any
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(found, PEFT's) by kind; "" is without an adapter."""
    ids = ids_of(19)
    llmc.compile(save_tiny(family, folder / "base", **sizes), folder / "a.llmc", targets=[HERE], **options)
    wanted = {"": reference_logits(tiny_model(family, **sizes), ids)}
    for kind, asked in kinds.items():
        adapted = adapter(tiny_model(family, **sizes), folder / kind, scale=0.1, **asked)
        wanted[kind] = reference_logits(adapted, ids)
    files = {kind: folder / kind for kind in kinds}
    with llmc.load(folder / "a.llmc", adapters=files, kv_tokens=1024, context=256) as llm:
        found = {kind: llm.logits(ids, adapter=kind or None).copy() for kind in wanted}
        for kind in kinds:
            pieces = [part.copy() for part in llm.iter_logits(ids, 7, kind)]
            np.testing.assert_array_equal(np.concatenate(pieces), found[kind])
    return {kind: (found[kind], wanted[kind]) for kind in wanted}


@pytest.mark.slow
def test_of_a_table_that_is_tied_the_place_asked_for_is_changed(tmp_path: Path) -> None:
    found = logits(tmp_path, TIED, "qwen2", {"tie_word_embeddings": True})
    plain = found[""][1]
    for kind, (ours, peft) in found.items():
        assert np.abs(ours - peft).max() < 1e-4, kind
        assert not kind or np.abs(peft - plain).max() > 1e-2, kind


def test_square_matrices_that_are_stored_transposed(tmp_path: Path) -> None:
    """Whose shapes do not tell; and positions, an embedding too."""
    kinds: dict[str, dict[str, Any]] = {
        "saved": {"target_modules": ["c_attn"], "modules_to_save": ["c_proj"], "fan_in_fan_out": True},
        "embeddings": {"target_modules": ["wte", "wpe"]},
    }
    found = logits(tmp_path, kinds, "gpt2", {})
    for kind, (ours, peft) in found.items():
        assert np.abs(ours - peft).max() < 1e-4, kind
        assert not kind or np.abs(peft - found[""][1]).max() > 1e-2, kind


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_over_8_bits_beside_peft(tied: bool, tmp_path: Path) -> None:
    """Rotated tables, factors of 8 bits: no further from PEFT's than 2.5 times what the base alone is from
    its own float model.
    """
    kinds = {
        kind: TIED[kind] for kind in ("embedding", "saved embedding", "saved both", "rows", "rows of each")
    }
    options = {"quant": "int8", "kv_dtype": "float32", "adapters": True}
    found = logits(tmp_path, kinds, "qwen2", {"tie_word_embeddings": tied}, **options)
    text = Artifact.open(tmp_path / "a.llmc").read_text("ir.txt")
    assert ('hadamard(%0) {size = 64} loc "model.embed_tokens"' in text) == tied
    (base, plain) = found.pop("")
    rounding = np.abs(base - plain).max()
    for kind, (ours, peft) in found.items():
        assert np.abs(ours - peft).max() < 2.5 * rounding, kind
        assert np.abs(peft - plain).max() > 4 * rounding, kind


class Zeros:
    """`BaseWeights` of a model of zeros."""

    def __init__(self, width: int = 4) -> None:
        self.width = width

    def gains(self, module: str, a: np.ndarray, b: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def rows(self, module: str, start: int, stop: int) -> np.ndarray:
        return np.zeros((stop - start, self.width), np.float32)

    def is_transposed(self, module: str) -> bool:
        return False

    def bias(self, module: str, rows: int) -> np.ndarray | None:
        raise NotImplementedError


TABLE = Place(9, (("e", 4),), embedding=True, tied=("head",))
HEAD = Place(4, (("head", 9),), gains=True)


def drawn(*shape: int) -> ArrayTensor:
    return ArrayTensor(np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32), "a.bin")


def made(**parts: Any) -> Adapter:
    return Adapter("one", {}, **{"replaced": {}, **parts})


def test_rows_and_matrices_as_factors() -> None:
    both = AdapterPlaces(16, (TABLE, HEAD))
    rows = drawn(2, 4)
    found = both.factors(made(rows={"e": TokenRows((7, 2), rows)}), None, Zeros())
    (table,), (head,) = found[0], found[1]
    assert table is not None and head is not None
    np.testing.assert_array_equal((table[1] @ table[0]).T, head[1] @ head[0])
    np.testing.assert_array_equal((head[1] @ head[0])[[7, 2]], rows.read())
    assert not np.delete(head[1] @ head[0], [7, 2], 0).any()
    whole = drawn(9, 4)
    found = both.factors(made(replaced={"e.weight": whole}), None, Zeros())
    assert list(found) == [0]  # a module that PEFT was asked to save is its own
    unasked = made(replaced={"e.weight": whole}, optional=frozenset(["e.weight"]))
    found = both.factors(unasked, None, Zeros())
    (table,), (head,) = found[0], found[1]
    assert table is not None and head is not None
    np.testing.assert_array_equal((table[1] @ table[0]).T, whole.read())
    np.testing.assert_array_equal(head[1] @ head[0], whole.read())


BOTH = (TABLE, HEAD)
ROWS_OF_E = {"rows": {"e": TokenRows((7, 2), drawn(2, 4))}}
HEADS = {"replaced": {"head.weight": drawn(9, 4)}}


@pytest.mark.parametrize(
    ("places", "changed", "reason"),
    [
        (BOTH, {"rows": {"e": TokenRows((7, 9), drawn(2, 4))}}, r"up to 9, where e has \[9, 4\]"),
        (BOTH, {"rows": {"e": TokenRows((7, 2), drawn(2, 5))}}, r"rows \[2, 5\] of tokens"),
        (BOTH, {"replaced": {"e.weight": drawn(10, 4)}}, r"\[10, 4\], where e has \[9, 4\]"),
        (BOTH, {"replaced": {"head.weight": drawn(4, 9)}}, r"\[4, 9\], where head has \[9, 4\]"),
    ],
)
def test_what_does_not_fit_is_refused(
    places: tuple[Place, ...], changed: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        AdapterPlaces(16, places).factors(made(**changed), None, Zeros())
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("places", "changed", "reason"),
    [
        (
            (TABLE,),
            ROWS_OF_E,
            "rows of embeddings, of e .*per request",
        ),  # the head that has its table has none
        ((HEAD,), ROWS_OF_E, "rows of embeddings, of e .*per request"),
        ((replace(TABLE, tied=None), HEAD), ROWS_OF_E, "does not say what else has its table"),
        ((replace(HEAD, gains=False),), HEADS, "replaces whole tensors, head.weight"),
    ],
)
def test_what_has_no_place_is_refused(
    places: tuple[Place, ...], changed: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnsupportedError, match=reason) as caught:
        AdapterPlaces(16, places).factors(made(**changed), None, Zeros())
    assert caught.value.remedy


def test_without_the_compiler_matrices_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="which needs what compiles models"):
        AdapterPlaces(16, BOTH).factors(made(**HEADS))


def test_a_change_of_the_other_kind_is_none_of_this_model(tmp_path: Path) -> None:
    """Factors of a linear layer for an embedding."""
    adapter(tiny_model("qwen2"), tmp_path, target_modules=["embed_tokens"])
    one = read_adapter(tmp_path)
    ((name, change),) = one.changes.items()
    table = AdapterPlaces(16, (Place(change.a.shape[1], ((name, change.b.shape[0]),), embedding=True),))
    assert list(table.factors(one)) == [0]
    other = replace(one, changes={name: replace(change, embedding=False)})
    with pytest.raises(InputError, match=f"changes {name}, which this model has no place for"):
        table.factors(other)
