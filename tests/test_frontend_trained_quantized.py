"""Checkpoints of models that were trained for their quantized weights, beside transformers' own layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import llmc
import numpy as np
import pytest
import torch
from llmc.codegen.trace_cache import trace_once
from llmc.frontend.quantized import open_quantized
from llmc.frontend.skeleton import model_class
from llmc.frontend.source import open_source
from llmc.ir.weights import ArrayTensor, quantized_of
from llmc.passes.registry import quantization_passes
from llmc.runtime.executor import open_executor
from transformers import AutoModelForCausalLM

from .family_configs import random_model, small_config
from .graphs import PagedRun, lowered, worst
from .models import ids_of, save_tokenizer
from .quantized_formats import save_bitnet, save_rows
from .test_frontend_quantized import first_step
from .tvm_graphs import ISA

MADE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "divided": ("bitnet", lambda f: save_bitnet(f)),
    "multiplied": ("llama", lambda f: save_bitnet(f, kind="autobitlinear")),
    "rows": ("llama", lambda f: save_rows(f, embeddings=1)),
    "rows, tied": ("gemma3_text", lambda f: save_rows(f)),
}
COMPILED = ("divided", "rows")
LAYERS = {"BitLinear", "AutoBitLinear", "QuantizedLinear"}


def by_transformers(folder: Path, ids: list[int]) -> np.ndarray[Any, Any]:
    """Logits [T, vocab] of the folder as transformers runs it, in float32."""
    pytest.importorskip("accelerate")
    with torch.compiler.set_stance("force_eager"), torch.no_grad():  # functions of its layers are compiled
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert LAYERS & {type(module).__name__ for module in model.modules()}, "it runs unquantized"
        return model(torch.tensor([ids])).logits[0].float().numpy()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "divided" else ()) for name in MADE]
)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Ternary models but for activations, which its layers round to 8 bits: those of random weights amplify
    every flip to percents. So do the kernels of others, whose layers here round nothing.
    """
    family, save = MADE[name]
    config, folder = small_config(family), tmp_path / "model"
    config.tie_word_embeddings = "tied" in name
    random_model(config, model_class(config)[0]).save_pretrained(folder)
    save_tokenizer(folder)
    save(folder)
    ids = ids_of(23)
    wanted = by_transformers(folder, ids)
    source = open_source(folder)
    assert not source.unused_tensors
    graph, _ = lowered(trace_once(source), "paged", quantization_passes("keep"))
    (floats,) = PagedRun(graph).step([("a", ids)])
    assert worst(floats, wanted) < (1e-5 if "rows" in name else 0.05)
    if name not in COMPILED:
        return
    out = llmc.compile(
        folder, tmp_path / "out.llmc", targets=[f"tvm-cpu:isa={ISA}"], quant="keep", quant_head="none",
        kv_dtype="float32",
    )  # fmt: skip
    assert worst(first_step(open_executor(out), ids), wanted) < 0.08


@pytest.mark.parametrize("kind", ["bitlinear", "autobitlinear"])
def test_a_layer_is_transformers_own(kind: str) -> None:
    """One layer's results, with its input rounded as its kernels would: a row is one group."""
    own = pytest.importorskip("transformers.integrations.bitnet")
    rng = torch.Generator().manual_seed(3)
    ternary, x = torch.randint(-1, 2, (96, 64), generator=rng), torch.randn(5, 64, generator=rng)
    layer = (own.BitLinear if kind == "bitlinear" else own.AutoBitLinear)(64, 96, False, dtype=torch.float32)
    layer.weight_scale.fill_(0.37)
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        packed = own.pack_weights(ternary.clone())
        layer.weight.data = packed if kind == "bitlinear" else ternary.float()
        wanted = layer(x)
    tensors = {
        "m.weight": ArrayTensor(packed.numpy()),
        "m.weight_scale": ArrayTensor(np.array([0.37], np.float32)),
    }
    weight = open_quantized(tensors, {"quant_method": "bitnet", "linear_class": kind}, "folder")["m.weight"]
    scale = x.abs().amax(-1, keepdim=True) / 127
    got = (x / scale).round() * scale @ torch.from_numpy(weight.read()).T
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    parts = quantized_of(weight)
    assert parts is not None and parts.quant.group_size == 64 and parts.quant.bits == 2
