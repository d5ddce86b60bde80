"""GGUF files of Gemma 4: layers with and without a window differ in the length and the number of heads,
layers take another layer's keys, experts stand beside the layer, and the vocabulary is of a kind of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llmc.codegen.driver import compile_model
from llmc.frontend.gguf import read_gguf
from llmc.frontend.gguf_architectures import ARCHITECTURES
from llmc.frontend.gguf_tabled import named, weights
from llmc.frontend.hard_strings import hard_strings
from llmc.frontend.skeleton import model_class
from llmc.frontend.source import open_source
from llmc.frontend.tokenizer_gguf import build
from llmc.frontend.tokenizer_reference import ReferenceEncoder
from llmc.frontend.tokenizer_rules import read_tokenizer
from llmc.frontend.trace import trace_source
from llmc.frontend.weights import open_gguf_tensors
from llmc.ir.weights import ArrayTensor, LazyTensor
from llmc.runtime.loader import load
from transformers import Gemma4TextConfig

from .family_configs import random_model
from .gguf_files import BOOL, F32, I32, STRING, U32, array, entry, write_gguf
from .graphs import logits_of
from .llama_cpp import LlamaCpp
from .models import ids_of

VOCAB, WIDTH = 384, 96
PAIRS = [("b", "c"), ("a", "b"), ("\u2581", "a"), ("\u2581a", "bc"), ("\u2581", "\u2581"), ("\n", "\n")]
PAIRS += [("\n\n", "\n")]
KINDS: dict[str, dict[str, Any]] = {
    "keys that are values": {"num_global_key_value_heads": 1, "attention_k_eq_v": True},
    "shared keys": {
        "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": 3,
        "use_double_wide_mlp": True,
    },
    "experts": {
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 48,
    },
}


def vocabulary(names_of: tuple[str, str] = ("gemma4", "gemma4")) -> list[bytes]:
    """Merges are listed, by rank and not by scores; bytes stand for what has no token. `names_of` the
    tokenizer's model and its rule of cutting.
    """
    model, pre = names_of
    words = ["\u2581", "a", "b", "c", "\n", "é", *("".join(pair) for pair in PAIRS)]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{b:02X}>" for b in range(256)), *words, "<turn|>"]
    types = [3, 3, 3, 2, *[6] * 256, *[1] * len(words), 4]
    types += [1] * (VOCAB - len(tokens))
    tokens += [f"<x{i}>" for i in range(VOCAB - len(tokens))]
    names = ("padding", "eos", "bos", "unknown")
    return [
        entry("tokenizer.ggml.model", STRING, model),
        entry("tokenizer.ggml.pre", STRING, pre),
        array("tokenizer.ggml.tokens", STRING, tokens),
        array("tokenizer.ggml.token_type", I32, types),
        array("tokenizer.ggml.scores", F32, [-float(i) for i in range(VOCAB)]),
        array("tokenizer.ggml.merges", STRING, [" ".join(pair) for pair in PAIRS]),
        *(entry(f"tokenizer.ggml.{name}_token_id", U32, i) for i, name in enumerate(names)),
        entry("tokenizer.ggml.add_bos_token", BOOL, 1),
        entry("tokenizer.ggml.add_space_prefix", BOOL, 0),
    ]


def tiny(kind: str) -> Any:
    config = Gemma4TextConfig(
        **{
            "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": WIDTH, "num_hidden_layers": 6,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 32,
            "max_position_embeddings": 256, "sliding_window": 12, "final_logit_softcapping": 30.0,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 0,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
                "full_attention": {
                    "rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 5e5,
                },
            },
        }
        | KINDS[kind]
    )  # fmt: skip
    config.use_cache = False
    model = random_model(config, model_class(config)[0])
    for name, value in model.state_dict().items():
        if name.endswith("layer_scalar"):
            value.fill_(0.7)
        elif name.endswith("q_norm.weight"):  # scores are not scaled: keep them small
            value.fill_(0.2)
        elif name.endswith(("router.scale", "per_expert_scale")):
            value.copy_(torch.linspace(1.5, 0.5, value.numel()))
    return model


def written(model: Any, path: Path) -> Path:
    """Key-values and tensors as conversion/gemma.py of llama.cpp writes them."""
    config = model.config
    sliding = [kind == "sliding_attention" for kind in config.layer_types]
    shared, experts = config.num_kv_shared_layers, config.enable_moe_block
    name_of, tensors = named(ARCHITECTURES["gemma4_text"], 6), dict[str, np.ndarray[Any, Any]]()
    for parameter, value in model.state_dict().items():
        name = name_of(parameter)
        if ".experts." in parameter:
            part = "gate_up" if "gate_up" in parameter else "down"
            name = f"blk.{parameter.split('.')[2]}.ffn_{part}_exps.weight"
        assert name is not None, parameter
        if parameter != "lm_head.weight":
            tensors[name] = value.numpy().copy()
    tensors["rope_freqs.weight"] = np.array([1.0] * 4 + [1e30] * 12, np.float32)
    for i in range(6 - shared, 6):  # published, and read by nobody
        head = 16 if sliding[i] else 32
        for part, shape in (("attn_k", (2 * head, 64)), ("attn_v", (2 * head, 64)), ("attn_k_norm", (head,))):
            tensors[f"blk.{i}.{part}.weight"] = np.ones(shape, np.float32)
    numbers: dict[str, int | float] = {
        "context_length": 256, "embedding_length": 64, "block_count": 6, "attention.head_count": 4,
        "attention.key_length": 32, "attention.value_length": 32, "attention.key_length_swa": 16,
        "attention.value_length_swa": 16, "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 5e5,
        "rope.freq_base_swa": 5e3, "rope.dimension_count": 32, "rope.dimension_count_swa": 16,
        "attention.sliding_window": 12, "attention.shared_kv_layers": shared,
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input,
        "final_logit_softcapping": 30.0,
        **({"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 48} if experts else {}),
        **({} if shared else {"feed_forward_length": WIDTH}),
        **({"attention.head_count_kv": 2} if shared else {}),
    }  # fmt: skip
    entries = [entry("general.architecture", STRING, "gemma4")]
    entries += [entry(f"gemma4.{k}", F32 if isinstance(v, float) else U32, v) for k, v in numbers.items()]
    entries.append(array("gemma4.attention.sliding_window_pattern", BOOL, sliding))
    if shared:
        entries.append(array("gemma4.feed_forward_length", U32, [WIDTH] * 3 + [2 * WIDTH] * 3))
    else:
        entries.append(array("gemma4.attention.head_count_kv", U32, [2 if one else 1 for one in sliding]))
    return write_gguf(path, [*entries, *vocabulary()], tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_means_what_llama_cpp_computes(kind: str, tmp_path: Path) -> None:
    model, ids = tiny(kind), ids_of(40)
    with torch.inference_mode():
        wanted = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    path = written(model, tmp_path / "m.gguf")
    with LlamaCpp(path) as opened:  # its cache is of float16
        assert np.abs(opened.logits(ids) - wanted).max() <= 0.01 * np.abs(wanted).max()
    np.testing.assert_allclose(logits_of(trace_source(open_source(path)), ids), wanted, atol=5e-5)


def test_a_tensor_of_no_layer_is_not_left_out(tmp_path: Path) -> None:
    file, row = read_gguf(written(tiny("shared keys"), tmp_path / "m.gguf")), ARCHITECTURES["gemma4_text"]
    tensors: dict[str, LazyTensor] = {**open_gguf_tensors(file)}
    assert weights(file, row, tiny("shared keys"), tensors)[1] == ["rope_freqs.weight"]  # read elsewhere
    tensors["blk.x.attn_k.weight"] = ArrayTensor(np.zeros((32, 64), np.float32))
    assert weights(file, row, tiny("shared keys"), tensors)[1][-1] == "blk.x.attn_k.weight"


def test_the_vocabulary(tmp_path: Path) -> None:
    path = written(tiny("shared keys"), tmp_path / "m.gguf")
    rules = read_tokenizer(read_gguf(path))
    built, reference = build("m.gguf", rules), ReferenceEncoder(rules)
    texts = [*hard_strings(["<turn|>"]), "abc abc", "a\n\n\n\nb", "a\n\n<turn|>\na  bc", "\n", "é漢\n", " a"]
    with LlamaCpp(path) as peer:
        for text in texts:
            ids = reference.encode(text)
            assert built.encode(text).ids == ids, text
            assert peer.tokenize(text, special=True) == ids, text
    assert built.decode(built.encode(" ab é 漢\n\n").ids) == " ab é 漢\n\n"
    artifact = compile_model(path, tmp_path / "m.llmc", targets=["onnx-cpu"], kv_dtype="float32").artifact
    with load(artifact.root) as llm:
        assert llm.generate("abc\n", max_tokens=4, ignore_eos=True).token_ids
