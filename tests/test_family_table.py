"""The families of transformers (`tests/families.py`): one of each kind of attention in every run, all of them
and their kernels in the slow one. Bars: `TOLERANCE` and `INT8_TOLERANCE` of that file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llmc
import pytest
from llmc.codegen.driver import check_model
from llmc.ir.errors import LlmcError

from .conftest import LONG
from .families import DOCS, INT8_TOLERANCE, TOLERANCE, attempt, save_family, token_ids, tried
from .family_configs import families, small_config, type_of
from .models import save_tokenizer

OF_EACH_KIND = {
    "bloom": "a slope a head, heads and batch in one axis",
    "falcon (alibi)": "a slope a head in the mask of torch's operator",
    "mpt": "slopes from a table cut to the tokens",
    "deepseek_v2": "latent keys, values narrower than keys, complex rotary embedding, experts",
    "gpt_neo": "a stored triangle, a local one in every second layer",
    "openai-gpt": "scores multiplied by a triangle of floats",
    "mpnet": "a number of each distance, from buckets",
    "qwen3_5_text": "positions of three coordinates, tables put together from parts",
    "gemma3n_text": "hidden states stacked before the batch, layers without keys of their own",
    "deberta-v2 (disentangled)": "scores of queries, keys and distances, one text a step",
    "deberta (disentangled)": "the same, with sizes that are in tensors",
    "convbert": "convolutions over tokens on both sides, one text a step",
    "doge": "a number of each key in the mask of torch's operator",
    "minimax": "weights that decay with the distance, in blocks of tokens",
    "llama4_text": "chunks of positions, experts of weighted inputs",
    "glm_moe_dsa": "an indexer that picks keys",
    "muse_spark_text": "results of experts that are normalised",
}
SLOW = (
    "falcon (alibi)",
    "deepseek_v2",
    "openai-gpt",
    "qwen3_5_text",
    "gemma3n_text",
    "llama4_text",
    "glm_moe_dsa",
    "muse_spark_text",
)
OF_ROUTERS = {"muse_spark_text": 0.12, "minimax": 0.2}
"""What int8 may lose where rounding turns the choices of routers of random weights (0.105 and 0.17 were
seen).
"""
ALL_CHOSEN: dict[str, dict[str, Any]] = {
    "dbrx": {"ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 4}},
    "minimax": {"num_local_experts": 4, "num_experts_per_tok": 4},
}
"""Families that int8 changes more than it may, with routers that choose every expert."""
KERNELS = (*OF_EACH_KIND, "falcon (new)", "deepseek_v3", "xglm", "esm", "roformer", "modernbert-decoder")
REFUSED = {
    "bart": "is an encoder-decoder",
    "inkling_text": "what is added to the scores is computed from hidden states",
}


def test_a_rotary_embedding_that_asks_for_the_largest_position(tmp_path: Path) -> None:
    """As Phi-3.5-MoE is published; of int8, experts are chosen otherwise."""
    found = attempt("phimoe (longrope)", tmp_path / "model")
    assert (found.status, found.reason) == ("equal", "")


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.slow if f in SLOW else ()) for f in OF_EACH_KIND]
)
def test_one_family_of_each_kind_of_attention_matches(family: str, tmp_path: Path) -> None:
    found = attempt(family, tmp_path / "model")
    assert (found.status, found.reason) == ("equal", "")
    assert found.float32 is not None and found.float32 <= TOLERANCE
    assert found.int8 is not None and found.int8 <= OF_ROUTERS.get(family, INT8_TOLERANCE)


@pytest.mark.parametrize("family", REFUSED)
def test_check_refuses_from_the_configuration_with_the_same_sentence(family: str, tmp_path: Path) -> None:
    found = attempt(family, tmp_path / "whole" / family)
    assert found.status == "refused" and REFUSED[family] in found.reason
    small_config(family).save_pretrained(tmp_path / family)
    with pytest.raises(LlmcError) as refused:
        check_model(str(tmp_path / family), context=64)
    assert refused.value.message == found.reason


def document() -> dict[str, tuple[str, bool]]:
    """By row of docs/families.md: its result, and whether int8 is within its bar."""
    rows = [
        line.split("|")[1:-1] for line in DOCS.read_text(encoding="utf-8").splitlines() if line[:2] == "| "
    ]
    cells = [[cell.strip() for cell in row[:5]] for row in rows]
    assert cells[0] == ["family", "does", "result", "float32", "int8"]
    return {row[0]: (row[2], "!" not in row[4]) for row in cells[1:]}


@pytest.mark.slow
def test_every_family_of_transformers_is_in_the_document_and_sixty_match() -> None:
    rows = document()
    assert list(rows) == families()
    assert len({type_of(name) for name, (result, _) in rows.items() if result == "matches"}) >= 60
    assert {result for result, _ in rows.values()} <= {"matches", "refused", "not built"}


@pytest.mark.slow
def test_families_do_what_the_document_says() -> None:
    """All of them take half an hour of one core: LLMC_LONG_TESTS=1. Else some from everywhere."""
    rows = document()
    for name in families()[:: 1 if LONG else 32]:
        found, (result, int8) = tried(name), rows[name]
        assert {"equal": "matches"}.get(found.status, found.status) == result, (name, found.reason)
        if found.status == "equal":
            assert found.float32 is not None and found.float32 <= TOLERANCE
            assert not int8 or found.int8_reason or (found.int8 or 0.0) <= INT8_TOLERANCE, name
        else:
            assert found.reason, name


@pytest.mark.slow
@pytest.mark.parametrize("family", ALL_CHOSEN)
def test_int8_loses_little_where_routers_have_no_choice(family: str, tmp_path: Path) -> None:
    """What the table marks of them is what their routers choose otherwise: .044 and .039 are left."""
    found = attempt(family, tmp_path, changed=ALL_CHOSEN[family])
    assert found.status == "equal" and found.int8 is not None and found.int8 <= INT8_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("family", KERNELS if LONG else KERNELS[::4])
@pytest.mark.usefixtures("usual_levels")
def test_compiled_kernels_equal_transformers(family: str, tmp_path: Path) -> None:
    import torch

    model, task = save_family(family, tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    llmc.compile(tmp_path / "model", tmp_path / "a.llmc", targets=["tvm-cpu"], context=128)
    llm = llmc.load(tmp_path / "a.llmc")
    for ids in (token_ids(40), token_ids(21, seed=3)):
        with torch.no_grad():
            given = torch.tensor([ids])
            wanted = model(given)[0][0] if task == "encoder" else model(given, use_cache=False).logits[0]
        assert float((torch.as_tensor(llm.logits(ids)) - wanted).abs().max()) <= TOLERANCE
