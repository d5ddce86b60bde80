"""The families of transformers (`tests/families.py`): one of each kind of attention in every run, all of them
and their kernels in the slow one. Bars: `TOLERANCE` and `INT8_TOLERANCE` of that file.
"""

from __future__ import annotations

from pathlib import Path

import llmc
import pytest
from llmc.codegen.driver import check_model
from llmc.ir.errors import LlmcError

from .families import DOCS, INT8_TOLERANCE, TOLERANCE, attempt, save_family, token_ids, tried
from .family_configs import families, type_of

OF_EACH_KIND = {
    "bloom": "a slope a head, heads and batch in one axis",
    "falcon (alibi)": "a slope a head in the mask of torch's operator",
    "mpt": "slopes from a table cut to the tokens",
    "deepseek_v2": "latent keys, values narrower than keys, complex rotary embedding, experts",
    "gpt_neo": "a stored triangle, a local one in every second layer",
    "openai-gpt": "scores multiplied by a triangle of floats",
}
KERNELS = (*OF_EACH_KIND, "falcon (new)", "deepseek_v3", "xglm", "esm", "roformer", "modernbert-decoder")
REFUSED = {
    "bart": "is an encoder-decoder",
    "mpnet": "a bias of positions is added to the scores that is no slope a head",
    "xlnet": "cannot be traced",
}


@pytest.mark.parametrize("family", OF_EACH_KIND)
def test_one_family_of_each_kind_of_attention_matches(family: str, tmp_path: Path) -> None:
    found = attempt(family, tmp_path / "model")
    assert (found.status, found.reason) == ("equal", "")
    assert found.float32 is not None and found.float32 <= TOLERANCE
    assert found.int8 is not None and found.int8 <= INT8_TOLERANCE


@pytest.mark.parametrize("family", ["bart", "mpnet"])
def test_check_refuses_from_the_configuration_with_the_same_sentence(family: str, tmp_path: Path) -> None:
    from .family_configs import small_config

    found = attempt(family, tmp_path / "whole" / family)
    assert found.status == "refused" and REFUSED[family] in found.reason
    small_config(family).save_pretrained(tmp_path / family)
    with pytest.raises(LlmcError) as refused:
        check_model(str(tmp_path / family), context=64)
    assert refused.value.message == found.reason


@pytest.mark.slow
def test_every_family_of_the_document_is_one_of_transformers_and_none_is_left_out() -> None:
    rows = [line.split("|")[1].strip() for line in DOCS.read_text().splitlines() if line.startswith("| ")]
    assert rows[0] == "family" and rows[1:] == families()


@pytest.mark.slow
def test_no_family_differs_or_breaks_and_sixty_match() -> None:
    """Each is compiled right, or refused with a sentence. Takes half an hour."""
    outcomes = {family: tried(family) for family in families()}
    bad = {n: o.reason for n, o in outcomes.items() if o.status not in ("equal", "refused", "not built")}
    assert not bad
    assert all(o.reason for o in outcomes.values() if o.status == "refused")
    assert len({type_of(n) for n, o in outcomes.items() if o.status == "equal"}) >= 60


@pytest.mark.slow
@pytest.mark.parametrize("family", KERNELS)
def test_compiled_kernels_equal_transformers(family: str, tmp_path: Path) -> None:
    import torch

    model, task = save_family(family, tmp_path / "model")
    llmc.compile(tmp_path / "model", tmp_path / "a.llmc", targets=["tvm-cpu"], context=128)
    llm = llmc.load(tmp_path / "a.llmc")
    for ids in (token_ids(40), token_ids(21, seed=3)):
        with torch.no_grad():
            given = torch.tensor([ids])
            wanted = model(given)[0][0] if task == "encoder" else model(given, use_cache=False).logits[0]
        assert float((torch.as_tensor(llm.logits(ids)) - wanted).abs().max()) <= TOLERANCE
