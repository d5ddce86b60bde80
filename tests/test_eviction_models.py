"""Generation beyond the context on compiled models, beside transformers, whose cache is cut and turned by hand
(Xiao et al. 2023, arXiv:2309.17453, section 3.2); and what the compiler says of keys.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import llmc
import numpy as np
import pytest
from llmc.codegen.artifact import Artifact
from llmc.ir.errors import ArtifactError, InputError
from llmc.passes.cache.rotary import rotary_facts
from llmc.runtime.engine import ModelFacts
from llmc.runtime.executor import open_executor
from llmc.runtime.executor.rotation import read_rotary

from .graphs import lowered, traced, worst
from .models import TINY, VOCAB_SIZE, ids_of, save_tiny, tiny_model
from .schedules import check_schedule, endless, random_schedule
from .tvm_graphs import ISA

PAGE = 16
LENGTH = 96
"""Of the cache in tokens: a page of sinks, and two of the other five stay."""
TARGETS = ("tvm-cpu", "onnx-cpu")
# Halves that turn; pairs side by side in a part of the head; layers with a window of 12; two frequencies.
CHANGES: dict[str, dict[str, Any]] = {"llama": {}, "gpt_neox": {}, "gemma2": {}, "gemma3": {}}


def streamed(model: Any, ids: list[int], *, length: int = LENGTH, sinks: int = PAGE) -> np.ndarray:
    """Logits [T, vocab] of transformers in float32 where, whenever `length` tokens are in the cache, all but
    the first `sinks` and the newest half of the other pages are cut out of it and the keys behind the gap are
    turned to their new positions, in float64.
    """
    import torch
    from transformers import DynamicCache

    kept = (length - sinks) // PAGE // 2 * PAGE
    held, rows, past = 0, list[Any](), DynamicCache()
    for start in range(0, len(ids), 8):
        if held == length:
            for index, layer in enumerate(past.layers):
                new = turned_back(model, index, layer.keys[:, :, length - kept :], length - sinks - kept)
                layer.keys = torch.cat([layer.keys[:, :, :sinks], new], dim=2)
                layer.values = torch.cat(
                    [layer.values[:, :, :sinks], layer.values[:, :, length - kept :]], dim=2
                )
            held = sinks + kept
        chunk = torch.tensor([ids[start : start + 8]])
        places = torch.arange(held, held + chunk.shape[1])[None]
        with torch.no_grad():
            out = model(input_ids=chunk, position_ids=places, past_key_values=past, use_cache=True)
        rows.append(out.logits[0].float())
        held += chunk.shape[1]
    return torch.cat(rows).numpy()


def turned_back(model: Any, layer: int, keys: Any, shift: int) -> Any:
    """keys [1, heads, T, D] of a layer, turned by -shift in pairs (i, i + R / 2) of the first R elements."""
    import torch

    rotary = next(m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding"))
    kinds = getattr(model.config, "layer_types", None)
    named = f"{kinds[layer]}_inv_freq" if kinds else "inv_freq"
    angles = getattr(rotary, named if hasattr(rotary, named) else "inv_freq").double() * shift
    cos, sin, half = angles.cos(), angles.sin(), len(angles)
    a, b, rest = keys.double().split([half, half, keys.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin, rest], dim=-1).to(keys.dtype)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(family, kv_dtype) → artifact for all targets, made once."""
    folder = tmp_path_factory.mktemp("eviction")

    @cache
    def make(family: str, kv_dtype: str = "float32") -> Path:
        source, out = folder / family, folder / f"{family}-{kv_dtype}.llmc"
        if not source.exists():
            save_tiny(family, source)
        targets = [f"tvm-cpu:isa={ISA}"] + ["onnx-cpu"] * (kv_dtype != "bfloat16")
        llmc.compile(source, out, targets=targets, kv_dtype=kv_dtype)
        return out

    return make


@pytest.mark.parametrize("family", CHANGES)
def test_logits_beyond_the_context_equal_transformers(family: str, compiled: Any) -> None:
    """Bar: largest difference ≤ 1e-4 of the largest logit, as without eviction (tests/test_families.py)."""
    ids = ids_of(5 * LENGTH)
    wanted = streamed(tiny_model(family), ids)
    for target in TARGETS:
        with llmc.load(compiled(family), target=target, context=LENGTH, sinks=4) as llm:
            assert worst(llm.logits(ids), wanted) <= 1e-4, target
