"""`--quant keep` of mixtures in folders: the codes of an expert's matrices, which transformers stacks as it
loads them, are what the kernels read.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import llmc
import numpy as np
import pytest
import torch
from llmc.codegen.driver import compile_model
from llmc.frontend.skeleton import model_class
from llmc.frontend.source import open_source
from llmc.frontend.trace import trace_source
from llmc.ir.ops.moe import Moe, QuantizedMoe
from llmc.ir.ops.quant import dequantized
from llmc.passes.quantize.keep import KeepQuantized

from .family_configs import random_model, small_config
from .graphs import lowered
from .models import ids_of, save_tokenizer
from .quantized_files import Values, save_awq, save_compressed, save_fp8, save_gptq, save_mxfp4, save_nvfp4
from .quantized_formats import save_mlx_experts

Save = Callable[[Path], Any]
FORMS: dict[str, Save] = {
    "gptq": save_gptq,
    "gptq, symmetric": lambda f: save_gptq(f, sym=True, group=32),
    "gptq 8 bits": lambda f: save_gptq(f, bits=8, group=32, sym=True),
    "awq": save_awq,
    "compressed int4": lambda f: save_compressed(f, group=32),
    "compressed int8": lambda f: save_compressed(f, bits=8, strategy="channel", group=None, packed=False),
    "nvfp4": save_nvfp4,
    "mlx": save_mlx_experts,
}
FAMILIES = ("mixtral", "qwen2_moe", "olmoe", "deepseek_v3", "glm4_moe")


def mixture(family: str, folder: Path, save: Save) -> Values:
    """A small mixture as it is published, an expert's matrices apart. Every token takes all experts: of
    random weights, rounded activations choose others.
    """
    config = small_config(family)
    sizes = {"hidden_size": 128, "moe_intermediate_size": 64, "intermediate_size": 64, "use_cache": False}
    sizes["num_experts_per_tok"] = 4
    for name, value in sizes.items():
        if hasattr(config, name):
            setattr(config, name, value)
    random_model(config, model_class(config)[0]).save_pretrained(folder)
    save_tokenizer(folder)
    return save(folder)


def experts_of(folder: Path, *, keep: bool) -> tuple[list[np.ndarray], set[str]]:
    """The matrices of all experts, by the meaning of their codes or as floats, and the types of scales."""
    source = open_source(folder)
    graph, records = lowered(trace_source(source), "fused", [KeepQuantized()] if keep else [])
    found, scales = list[np.ndarray](), set[str]()
    for op in graph:
        assert not (keep and isinstance(op, Moe)), [n for r in records for n in r.notes]
        if isinstance(op, Moe):
            found += [op.gate_up.weight.read(), op.down.weight.read()]
        elif isinstance(op, QuantizedMoe):
            for parts in (
                (op.up_q, op.up_scale, op.up_zero_point),
                (op.down_q, op.down_scale, op.down_zero_point),
            ):
                read = [None if p is None else torch.from_numpy(p.weight.read()) for p in parts]
                scales.add(parts[1].type.dtype)
                found.append(dequantized(parts[0].type.quant, *read).numpy())
    return found, scales


@pytest.mark.parametrize(
    ("family", "form"),
    [
        *(("qwen3_moe", form) for form in FORMS),
        *((family, "gptq") for family in FAMILIES),
        ("deepseek_v3", "mlx"),
        # A loop of its own, over some of the experts that are stored.
        pytest.param("longcat_flash", "compressed int4", marks=pytest.mark.slow),
        ("gpt_oss", "mxfp4"),
    ],
)
def test_experts_are_kept_as_they_are_stored(family: str, form: str, tmp_path: Path) -> None:
    values = mixture(family, tmp_path, save_mxfp4 if form == "mxfp4" else FORMS[form])
    floats, _ = experts_of(tmp_path, keep=False)
    codes, scales = experts_of(tmp_path, keep=True)
    assert len(floats) == len(codes) >= 2
    assert scales == ({"float32"} if form == "nvfp4" else {"float16"})
    for one, other in zip(floats, codes, strict=True):
        assert np.array_equal(one, other)
    # The first expert of the last mixture is what its own tensors say.
    if form != "mxfp4":
        name = [n for n in values if n.endswith(("experts.0.down_proj.weight", "experts.0.w2.weight"))][-1]
        np.testing.assert_allclose(codes[-1][0], values[name], rtol=3e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("family", "form"),
    [
        pytest.param("qwen3_moe", "gptq, symmetric", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "nvfp4", marks=pytest.mark.slow),
        pytest.param("gpt_oss", "mxfp4", marks=pytest.mark.slow),
    ],
)
def test_the_artifact_is_the_folders_model(family: str, form: str, tmp_path: Path) -> None:
    """But for activations of 8 bits."""
    mixture(family, tmp_path / "model", save_mxfp4 if form == "mxfp4" else FORMS[form])
    ids, logits = ids_of(40), dict[str, np.ndarray]()
    for scheme in ("none", "keep"):
        compile_model(tmp_path / "model", tmp_path / scheme, quant=scheme, context=64)
        llm = llmc.load(tmp_path / scheme)
        logits[scheme] = llm.logits(ids)
        assert np.array_equal(llm.logits(ids[:3]), logits[scheme][:3])
    gap = np.linalg.norm(logits["keep"] - logits["none"]) / np.linalg.norm(logits["none"])
    assert gap < 0.03


def test_experts_in_floats_of_eight_bits_are_floats(tmp_path: Path) -> None:
    mixture("qwen3_moe", tmp_path, save_fp8)
    floats, _ = experts_of(tmp_path, keep=False)
    assert floats[0].dtype == np.float32 and 0.01 < np.abs(floats[0]).mean() < 1
