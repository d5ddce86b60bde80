"""--lora: adapters merged as PEFT merges them, over floats and NF4; what belongs to another model is named.

PEFT's merge_and_unload is the oracle.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llmc.codegen.adapters import LoraOption
from llmc.codegen.trace_cache import trace_once
from llmc.frontend.lora import read_adapter
from llmc.frontend.source import open_source
from llmc.ir.core import Graph
from llmc.ir.errors import InputError, UnsupportedError
from llmc.ir.ops.nn import Linear
from llmc.ir.weights import quantized_of
from llmc.passes.adapt.lora import MergeLora
from llmc.passes.base import PassContext
from llmc.passes.manager import run_passes
from safetensors.numpy import load_file, save_file

from .families import save_family
from .graphs import logits_of, lowered, worst
from .lora_files import ROWS, TIED, adapter, edit
from .models import ids_of, reference_logits, save_tiny, save_tokenizer, tiny_model
from .quantized_files import save_bnb, save_gptq

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT still calls what transformers deprecates
peft = pytest.importorskip("peft")

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "rslora": {"target_modules": ["o_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "rank_pattern": {"k_proj": 2, "layers.0.mlp.up_proj": 5},
        "alpha_pattern": {"up_proj": 3, r"layers\.1\.self_attn\.q_proj": 32},
    },
    "embedding": {"target_modules": ["embed_tokens", "gate_proj"]},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "saved modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": ROWS},
    "rows of both": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": ROWS, "lm_head": [3, 7]},
    },
}


def merged(folder: Path, *options: str) -> Graph:
    parsed = [LoraOption.parse(text) for text in options]
    passes = [MergeLora(read_adapter(one.path), one.scale) for one in parsed]
    return run_passes(trace_once(open_source(folder)), passes, PassContext())[0]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen2", tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("kind", KINDS)
def test_merged_as_peft_merges(kind: str, base: Path, tmp_path: Path) -> None:
    adapted = adapter(tiny_model("qwen2"), tmp_path, **KINDS[kind])
    ids = ids_of(19)
    wanted = reference_logits(adapted.merge_and_unload(), ids)
    assert worst(wanted, reference_logits(tiny_model("qwen2"), ids)) > 1e-2
    assert worst(logits_of(merged(base, str(tmp_path)), ids), wanted) < 2e-5


def halves(family: str, dtype: str, folder: Path, **changes: Any) -> Any:
    """A folder stored in a dtype; the model of its numbers in float32."""
    model = tiny_model(family, **changes)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(getattr(torch, dtype)))
    copy.deepcopy(model).to(getattr(torch, dtype)).save_pretrained(folder)
    save_tokenizer(folder)
    return model


@pytest.mark.parametrize(("kind", "dtype"), [*((kind, "bfloat16") for kind in KINDS), ("lora", "float16")])
def test_over_weights_of_16_bits_nothing_is_rounded(kind: str, dtype: str, tmp_path: Path) -> None:
    """As most models are published. Adapters of some of the layers that are computed as one, too."""
    adapted = adapter(halves("qwen2", dtype, tmp_path / "base"), tmp_path / "a", scale=0.05, **KINDS[kind])
    ids = ids_of(19)
    wanted = reference_logits(adapted, ids)
    graph = merged(tmp_path / "base", str(tmp_path / "a"))
    assert worst(logits_of(graph, ids), wanted) < 2e-5
    fused, _ = lowered(graph, "fused")
    assert worst(logits_of(fused, ids), wanted) < 2e-5
    assert sum(isinstance(op, Linear) for op in fused) == 2 * 4 + 1, "queries, keys and values stay one layer"


@pytest.mark.parametrize("kind", TIED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_of_a_weight_that_is_tied_the_place_asked_for_is_changed(
    kind: str, dtype: str, tmp_path: Path
) -> None:
    """As PEFT computes it, without merging: its merge changes the other place too."""
    model = halves("qwen2", dtype, tmp_path / "base", tie_word_embeddings=True)
    adapted = adapter(model, tmp_path / "a", scale=0.1, **TIED[kind])
    ids = ids_of(19)
    wanted = reference_logits(adapted, ids)
    fused, _ = lowered(merged(tmp_path / "base", str(tmp_path / "a")), "fused")
    assert worst(logits_of(fused, ids), wanted) < 2e-5


@pytest.mark.parametrize("tied", [False, True])
def test_two_adapters_of_the_head(tied: bool, tmp_path: Path) -> None:
    """PEFT saves the base's head beside each: it takes nothing back."""
    base = halves("qwen2", "float32", tmp_path / "base", tie_word_embeddings=tied)
    adapted = adapter(base, tmp_path / "one", target_modules=["lm_head"])
    again = tiny_model("qwen2", tie_word_embeddings=tied)
    adapter(again, tmp_path / "two", seed=5, target_modules=["lm_head"])
    adapted.load_adapter(str(tmp_path / "two"), "two")
    adapted.base_model.set_adapter(["default", "two"])
    wanted = reference_logits(adapted, ids_of(19))
    graph = merged(tmp_path / "base", str(tmp_path / "one"), str(tmp_path / "two"))
    assert worst(logits_of(graph, ids_of(19)), wanted) < 2e-5


def test_blocks_that_are_used_twice_are_refused(tmp_path: Path) -> None:
    blocks = {"layers_block_type": ["hybrid", "hybrid"], "hybrid_layer_ids": [0, 1]}
    model, _ = save_family("zamba2", tmp_path / "base", changed=blocks)
    adapter(model, tmp_path / "a", target_modules=["q_proj"])
    with pytest.raises(UnsupportedError, match=r"layers\.\d.*q_proj\.weight, which base shares with model\."):
        merged(tmp_path / "base", str(tmp_path / "a"))


def test_transposed_weights_of_16_bits(tmp_path: Path) -> None:
    model = halves("gpt2", "bfloat16", tmp_path / "base")
    options = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    wanted = reference_logits(adapter(model, tmp_path / "a", **options).merge_and_unload(), ids_of(9))
    fused, _ = lowered(merged(tmp_path / "base", str(tmp_path / "a")), "fused")
    assert worst(logits_of(fused, ids_of(9)), wanted) < 2e-5


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_of_nothing_but_rows(tied: bool, tmp_path: Path) -> None:
    halves("qwen2", "float32", tmp_path / "base", tie_word_embeddings=tied)
    model = tiny_model("qwen2", tie_word_embeddings=tied)
    adapted: Any = peft.get_peft_model(model, peft.TrainableTokensConfig(token_indices=ROWS))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(0.3)
    adapted.save_pretrained(str(tmp_path / "a"))
    wanted = reference_logits(adapted, ids_of(19))
    assert worst(logits_of(merged(tmp_path / "base", str(tmp_path / "a")), ids_of(19)), wanted) < 2e-5


def test_rows_that_are_there_twice(base: Path, tmp_path: Path) -> None:
    adapter(tiny_model("qwen2"), tmp_path, target_modules=["q_proj"], trainable_token_indices=ROWS)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "trainable_tokens_delta" in name)
    save_file({**tensors, name.replace("token_adapter.", ""): tensors[name]}, file)
    with pytest.raises(InputError, match=r"embed_tokens.* and .*embed_tokens.* are of one module"):
        merged(base, str(tmp_path))


def test_rows_in_pieces_are_those_of_the_whole(base: Path, tmp_path: Path) -> None:
    """As packing reads them."""
    adapter(tiny_model("qwen2"), tmp_path, target_modules=["q_proj"], trainable_token_indices=ROWS)
    weight = merged(base, str(tmp_path)).weights["model.embed_tokens.weight"].weight
    assert weight is not None
    rows = weight.shape[0]
    pieces = [weight.read(start, min(start + 50, rows)) for start in range(0, rows, 50)]
    np.testing.assert_array_equal(np.concatenate(pieces), weight.read())


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ([1], "does not name as many tokens"),
        ([1, 1], "does not name as many tokens"),
        ([1, -2], "does not name as many tokens"),
        ([1, "2"], "does not name as many tokens"),
        (None, "does not name as many tokens"),
        ({"lm_head": [1, 2]}, "does not name as many tokens"),
        ([1, 999_999], r"of tokens up to 999999, model\.embed_tokens\.weight is \["),
    ],
)
def test_rows_of_tokens_that_are_not_there(asked: object, wanted: str, base: Path, tmp_path: Path) -> None:
    adapter(tiny_model("qwen2"), tmp_path, target_modules=["q_proj"], trainable_token_indices=[1, 2])
    edit(tmp_path, trainable_token_indices=asked)
    with pytest.raises(InputError, match=wanted):
        merged(base, str(tmp_path))


def test_transposed_weights(tmp_path: Path) -> None:
    """GPT-2's layers are [K, N], and c_proj is square in its attention."""
    base = save_tiny("gpt2", tmp_path / "base")
    adapted = adapter(
        tiny_model("gpt2"), tmp_path / "a", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True
    )
    wanted = reference_logits(adapted.merge_and_unload(), ids_of(9))
    assert worst(logits_of(merged(base, str(tmp_path / "a")), ids_of(9)), wanted) < 2e-5


def test_two_adapters_and_a_scale(base: Path, tmp_path: Path) -> None:
    one = adapter(tiny_model("qwen2"), tmp_path / "one", target_modules=["q_proj"])
    name = "model.layers.1.self_attn.q_proj.weight"
    plain = dict(tiny_model("qwen2").named_parameters())[name].detach()
    change = dict(one.merge_and_unload().named_parameters())[name].detach() - plain
    graph = merged(base, f"{tmp_path / 'one'}:-0.5", f"{tmp_path / 'one'}:2")
    data = graph.weights[name].weight
    assert data is not None
    np.testing.assert_allclose(data.read(), (plain + 1.5 * change).numpy(), atol=2e-6)
    np.testing.assert_array_equal(np.concatenate([data.read(0, 7), data.read(7)]), data.read())


def test_several_with_weights_as_peft_weighs_them(base: Path, tmp_path: Path) -> None:
    """Of different ranks and targets, beside what PEFT concatenates."""
    one = adapter(tiny_model("qwen2"), tmp_path / "one", target_modules=["q_proj", "up_proj"])
    two = {"target_modules": ["q_proj", "down_proj"], "r": 3, "use_rslora": True}
    adapter(tiny_model("qwen2"), tmp_path / "two", seed=5, **two)
    one.load_adapter(str(tmp_path / "two"), "two")
    one.add_weighted_adapter(["default", "two"], [0.5, 1.5], "both", combination_type="cat")
    one.set_adapter("both")
    ids = ids_of(11)
    wanted = reference_logits(one, ids)
    found = logits_of(merged(base, f"{tmp_path / 'one'}:0.5", f"{tmp_path / 'two'}:1.5"), ids)
    assert worst(found, wanted) < 5e-5
    assert worst(logits_of(merged(base, str(tmp_path / "one")), ids), wanted) > 1e-2


def test_merged_before_quantizing_and_named_in_the_artifact(base: Path, tmp_path: Path) -> None:
    from llmc.codegen.driver import compile_model

    adapter(tiny_model("qwen2"), tmp_path / "one", target_modules=["q_proj"])
    made = [
        compile_model(base, tmp_path / f"{i}.llmc", targets=["null"], quant="int4-g32", lora=lora).artifact
        for i, lora in enumerate([[], [f"{tmp_path / 'one'}:0.5"]])
    ]
    command = made[1].manifest["command"]
    assert command[command.index("--lora") + 1] == "one:0.5"
    assert "--lora" not in made[0].manifest["command"]


def test_over_nf4_it_is_quantized_again(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    import bitsandbytes.functional as bnb

    base = save_tiny("llama", tmp_path / "base")
    values = save_bnb(base)
    adapted = adapter(tiny_model("llama"), tmp_path / "one", target_modules=["q_proj"])
    graph = merged(base, str(tmp_path / "one"))
    name = "model.layers.0.self_attn.q_proj.weight"
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    wanted = values[name] + layer.get_delta_weight("default").detach().numpy()
    data = graph.weights[name].weight
    assert data is not None
    np.testing.assert_allclose(data.read(), wanted, atol=2e-6)
    parts = quantized_of(data)
    assert parts is not None and parts.quant.codebook == "nf4"
    codes, _ = bnb.quantize_4bit(torch.from_numpy(data.read()), quant_type="nf4", compress_statistics=True)
    flat = parts.codes.read().reshape(-1)
    np.testing.assert_array_equal(flat[::2] << 4 | flat[1::2], codes.numpy().reshape(-1))


def test_over_another_grid_it_becomes_floats_and_that_is_said(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base")
    save_gptq(base)
    adapter(tiny_model("llama"), tmp_path / "one", target_modules=["q_proj"])
    source = trace_once(open_source(base))
    result = MergeLora(read_adapter(tmp_path / "one")).run(source, PassContext())
    assert result.notes == ["adapter one: 2 quantized weights became floats"]


@pytest.mark.slow
def test_bad_adapters(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "one"
    adapter(tiny_model("qwen2"), folder, target_modules=["q_proj"])
    tensors = load_file(folder / "adapter_model.safetensors")
    label = "base_model.model.model.layers.0.self_attn.q_proj"

    def saved(**changes: Any) -> None:
        module = changes.pop("rename", "q_proj")
        new = {n.replace("q_proj", module): t for n, t in tensors.items()}
        save_file(
            {**new, **{f"{label}.{n}.weight": v for n, v in changes.items()}},
            folder / "adapter_model.safetensors",
        )

    saved(rename="w_proj")
    with pytest.raises(
        InputError, match=r"adapter one changes model.layers.0.self_attn.w_proj, model.layers.1"
    ):
        merged(base, str(folder))
    one = {n.replace("q_proj", "w_proj"): t for n, t in tensors.items() if "layers.0" in n}
    save_file(one, folder / "adapter_model.safetensors")
    with pytest.raises(
        InputError, match=r"adapter_model.safetensors:.*changes model.layers.0.self_attn.w_proj"
    ):
        merged(base, str(folder))
    labels = [f"base_model.model.model.layers.{i}.self_attn.{m}_proj" for i in (0, 7) for m in ("q", "w")]
    parts = {"lora_A": np.ones((4, 64), np.float32), "lora_B": np.ones((80, 4), np.float32)}
    save_file(
        {f"{one}.{part}.weight": array for one in labels for part, array in parts.items()},
        folder / "adapter_model.safetensors",
    )
    with pytest.raises(
        InputError, match=r"changes .*layers\.0.*w_proj, .*layers\.7.*q_proj, .*w_proj, which"
    ):
        merged(base, str(folder))
    with pytest.raises(InputError, match=r"q_proj \[80, 64\] where the model has \[64, 64\]"):
        merged(base, str(folder))
    saved(lora_A=np.ones((4, 9), np.float32))
    with pytest.raises(InputError, match=r"changes a weight of \[64, 9\], model.layers.0.self_attn.q_proj"):
        merged(base, str(folder))
    saved(lora_A=np.ones((3, 64), np.float32))
    with pytest.raises(InputError, match="are no factors of a matrix"):
        read_adapter(folder)
    saved(lora_A=np.full((4, 64), np.nan, np.float32))
    with pytest.raises(InputError, match=r"lora_A\.weight holds NaN"):
        read_adapter(folder)
    saved(lora_A=np.ones((4, 64), np.int64))
    with pytest.raises(InputError, match="is int64, no float"):
        read_adapter(folder)
    saved()
    for config, reason in (
        ({"r": 7}, "has the rank 4, adapter_config.json says 7"),
        ({"r": 0}, "r is 0, no rank"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x', no number"),
        ({"alpha_pattern": {"(": 3}}, r"has the pattern '\('"),
    ):
        kept = (folder / "adapter_config.json").read_text()
        edit(folder, **config)
        with pytest.raises(InputError, match=reason):
            read_adapter(folder)
        (folder / "adapter_config.json").write_text(kept)
    for config, reason in (
        ({"peft_type": "IA3"}, "of kind 'IA3'"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base model"),
        ({"rank_pattern": {"(a+)+": 3}}, "which is not evaluated"),
        ({"rank_pattern": {".{0,}" * 10: 3}}, "which is not evaluated"),
        ({"rank_pattern": {".?" * 10: 3}}, "which is not evaluated"),
        ({"rank_pattern": {"a{99999999999}": 3}}, "which is not evaluated"),
    ):
        kept = (folder / "adapter_config.json").read_text()
        edit(folder, **config)
        with pytest.raises(UnsupportedError, match=reason):
            read_adapter(folder)
        (folder / "adapter_config.json").write_text(kept)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match="only a pickle file"):
        read_adapter(folder)
    with pytest.raises(InputError, match=r"no adapter_config\.json there"):
        read_adapter(tmp_path)


def test_options(tmp_path: Path) -> None:
    (tmp_path / "a:2").mkdir()
    assert LoraOption.parse("a") == LoraOption(Path("a"))
    assert LoraOption.parse("a:0.5") == LoraOption(Path("a"), 0.5)
    assert LoraOption.parse("a:b") == LoraOption(Path("a:b"))
    assert LoraOption.parse(str(tmp_path / "a:2")) == LoraOption(tmp_path / "a:2")
    with pytest.raises(InputError, match="nan is no scale"):
        LoraOption.parse("a:nan")
