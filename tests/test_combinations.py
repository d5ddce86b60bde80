"""Options that users give together (`tests/combinations.py` draws more)."""

from __future__ import annotations

from pathlib import Path

import pytest

from .combinations import Draw, attempt, changes, matching

DRAWS = (
    Draw("qwen2", stored="bfloat16", quant="int4-g64", lora=True, shards=True),
    Draw("llama", stored="bfloat16", lora=True, sizes="heads", kv="int8"),
    Draw("gemma3_text", stored="bfloat16", quant="gptq-int4-g32", head="int4-g32", sizes="mlp"),
    Draw("mixtral", stored="bfloat16", quant="int4-g32", kv="int8", sizes="mlp"),
    Draw("gpt_neox", stored="float16", quant="nf4", changed=("use_parallel_residual", False)),
    Draw("granitemoehybrid", stored="bfloat16", quant="int4-g32", sizes="wide"),
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PEFT still calls what transformers deprecates
@pytest.mark.parametrize("draw", DRAWS, ids=str)
def test_together(draw: Draw, tmp_path: Path) -> None:
    found = attempt(draw, tmp_path)
    assert (found.status, found.reason) == ("right", "")


@pytest.mark.slow
def test_a_draw_is_that_of_its_number() -> None:
    draws = [Draw.make(seed) for seed in range(40)]
    assert draws == [Draw.make(seed) for seed in range(40)]
    assert {draw.family for draw in draws} <= set(matching()) and len({draw.family for draw in draws}) > 20
    assert ("attention_bias", True) in changes("llama")
