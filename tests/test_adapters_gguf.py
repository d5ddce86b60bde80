"""Adapters of both kinds over GGUF models: in llama.cpp's names and PEFT's, requested over codes with
factors, and one of each in a compilation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llmc
import numpy as np
import pytest
import torch
from llmc.codegen.adapters import LoraOption
from llmc.frontend.source import open_source

from .llama_cpp import LlamaCpp
from .lora_files import adapter, write_lora
from .models import ids_of, reference_logits
from .test_gguf_architectures import tiny, written
from .test_gguf_factors import SIZES, factors_of, plain, stored
from .test_lora_gguf import adapted
from .test_lora_gguf import factors_of as lora_of
from .tvm_graphs import ISA

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT still calls what transformers deprecates

HERE = f"tvm-cpu:isa={ISA}"
IDS = ids_of(24)
TENSORS = ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_down")
MODULES = ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"]


def over(source: Any, sizes: dict[str, Any]) -> Any:
    """transformers' model with the weights of an opened one."""
    model = tiny("llama", **sizes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(source.weights[name].read().astype(np.float32)))
    return model


@pytest.fixture(scope="module")
def nvfp4(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A file of NVFP4 with factors, and one with the same numbers multiplied out."""
    folder = tmp_path_factory.mktemp("nvfp4")
    model = tiny("llama", **SIZES)
    scales = factors_of(written(model, "llama", folder / "first.gguf", quantize=stored))
    path = written(model, "llama", folder / "m.gguf", quantize=stored, beside=scales)
    return path, plain(path, model, "llama", scales, folder / "plain.gguf")


# As floats within what llama.cpp's cache of float16 rounds; as codes what 8 bits of activations round beside.
@pytest.mark.parametrize(("scheme", "tolerance"), [("none", 0.01), ("keep", 0.08)])
def test_requests_choose_over_codes_with_factors(
    scheme: str, tolerance: float, nvfp4: tuple[Path, Path], tmp_path: Path
) -> None:
    """An adapter in llama.cpp's names, and PEFT's of LoRA and DoRA, beside the same model in floats."""
    pytest.importorskip("peft")
    path, floats = nvfp4
    file = write_lora(tmp_path / "file.gguf", lora_of(path, TENSORS))
    wanted: dict[str, np.ndarray] = {}
    with LlamaCpp(floats) as model:
        wanted[""] = model.logits(IDS)
        model.adapt([(file, 1.0)])
        wanted["file.gguf"] = model.logits(IDS)
    for name, dora in (("lora", False), ("dora", True)):
        changed = adapter(
            over(open_source(floats), SIZES), tmp_path / name, target_modules=MODULES, use_dora=dora
        )
        wanted[name] = reference_logits(changed, IDS)
    made = llmc.compile(
        path, tmp_path / "a.llmc", targets=[HERE], quant=scheme, kv_dtype="float32", adapters=True
    )
    assert ("quantized_linear" in made.read_text("ir.txt")) == (scheme == "keep")
    names = {name: tmp_path / name for name in wanted if name}
    with llmc.load(made.root, adapters=names, threads=1, kv_tokens=512, context=64) as llm:
        for name, logits in wanted.items():
            found = llm.logits(IDS, adapter=name or None)
            size = np.linalg.norm(logits)
            assert np.linalg.norm(found - logits) <= tolerance * size, name
            assert not name or np.linalg.norm(logits - wanted[""]) > 4 * tolerance * size


@pytest.mark.slow
def test_requests_choose_over_layers_of_several_types(tmp_path: Path) -> None:
    """As in Q4_K_M: keys and values, gates and ups in other blocks than what they are merged with, which are
    then products of their own. What 8 bits of activations and factors round is 5 % here, 5.6 % where all are
    of one type.
    """
    pytest.importorskip("peft")
    kinds = {"attn_k": "Q8_0", "attn_v": "Q5_1", "ffn_up": "Q8_0"}

    def kind(name: str) -> str:
        return next((kinds[part] for part in kinds if part in name), "Q4_0")

    path = written(tiny("llama", **SIZES), "llama", tmp_path / "m.gguf", quantize=kind)
    made = llmc.compile(
        path, tmp_path / "a.llmc", targets=[HERE], quant="keep", kv_dtype="float32", adapters=True
    )
    for name in ("q_proj.weight+k_proj+v_proj.part2.q", "gate_proj.weight+up_proj.part1.q"):
        assert name in made.read_text("ir.txt")
    modules = [*MODULES, "v_proj", "gate_proj"]
    wanted = {"": reference_logits(over(open_source(path), SIZES), IDS)}
    for name, dora in (("lora", False), ("dora", True)):
        changed = adapter(
            over(open_source(path), SIZES), tmp_path / name, target_modules=modules, use_dora=dora
        )
        wanted[name] = reference_logits(changed, IDS)
    names = {name: tmp_path / name for name in wanted if name}
    with llmc.load(made.root, adapters=names, threads=1, kv_tokens=512, context=64) as llm:
        for name, logits in wanted.items():
            found = llm.logits(IDS, adapter=name or None)
            size = np.linalg.norm(logits)
            assert np.linalg.norm(found - logits) <= 0.08 * size, name
            assert not name or np.linalg.norm(logits - wanted[""]) > size


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_file_and_a_folder_in_one_compilation(order: tuple[int, int], tmp_path: Path) -> None:
    """Whichever is named first: a file changes the model's tensors, a folder what is made of them."""
    pytest.importorskip("peft")
    path = written(tiny("llama"), "llama", tmp_path / "m.gguf")
    file = write_lora(tmp_path / "file.gguf", lora_of(path, TENSORS))
    with_file, _ = adapted(path, LoraOption(file, 0.5))
    changed = adapter(over(with_file, {}), tmp_path / "folder", target_modules=[*MODULES, "v_proj"])
    before, wanted = reference_logits(over(with_file, {}), IDS), reference_logits(changed, IDS)
    options = [f"{file}:0.5", str(tmp_path / "folder")]
    made = llmc.compile(
        path, tmp_path / "a.llmc", targets=[HERE], kv_dtype="float32", lora=[options[i] for i in order]
    )
    assert made.manifest["command"].count("--lora") == 2
    with llmc.load(made.root, threads=1, kv_tokens=512, context=64) as llm:
        found = llm.logits(IDS)
    assert np.abs(found - wanted).max() < 1e-4
    assert (
        min(np.abs(wanted - before).max(), np.abs(before - reference_logits(tiny("llama"), IDS)).max()) > 0.1
    )
