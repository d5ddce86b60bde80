"""Decoders that are used as encoders, and encoders with dense layers behind the pooling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import llmc
import numpy as np
import pytest
import torch
import transformers
from llmc.codegen.driver import check_model
from llmc.frontend.classifier import pool_every_token, see_padding
from llmc.frontend.skeleton import model_class
from llmc.frontend.source import open_source
from llmc.frontend.trace import trace_source
from llmc.ir.core import Graph
from llmc.ir.errors import InputError, UnsupportedError
from llmc.ir.interpreter import run
from llmc.ir.ops import math
from llmc.ir.ops.nn import Embedding
from llmc.ir.ops.shape import Arange, Full, Index, Reshape, Slice
from llmc.ir.types import TensorType, sym
from llmc.ir.weights import ArrayTensor
from llmc.runtime.rag.embedder import Embedder
from safetensors.torch import save_file

from .family_configs import random_model, small_config
from .gguf_files import BOOL, U32, byte_vocabulary, entry, llama_entries, llama_tensors, write_gguf
from .graphs import logits_of, lowered, opnames, traced
from .models import CONTEXT, ids_of, save_tiny, save_tokenizer
from .test_text_part import whole_model
from .tvm_graphs import ISA

TARGETS = ["onnx-cpu", f"tvm-cpu:isa={ISA}"]
TEXTS = ["The capital of France is Paris.", "a", "The river was wide and slow. " * 3]
WINDOW = 6


def looking_both_ways() -> Any:
    """A tiny model of the kind of EmbeddingGemma: a decoder whose tokens attend to later ones, in windows and
    without.
    """
    config = small_config("gemma3_text")
    config.use_bidirectional_attention = True
    config.use_cache = False
    config.sliding_window = WINDOW
    config.architectures = ["Gemma3TextModel"]
    torch.manual_seed(0)
    return transformers.Gemma3TextModel(config).eval()


def put_behind_the_pooling(folder: Path, pooling: str, layers: list[tuple[int, int, str, bool]]) -> None:
    """The files of sentence-transformers for layers (out, in, activation, with a bias)."""
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
    kinds = ["Transformer", "Pooling", *(["Dense"] * len(layers)), "Normalize"]
    paths = ["", "1_Pooling", *(f"{i + 2}_Dense" for i in range(len(layers))), "9_Normalize"]
    parts = [
        {"idx": i, "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(parts))
    drawn = torch.Generator().manual_seed(3)
    for i, (rows, columns, activation, biased) in enumerate(layers):
        place = folder / f"{i + 2}_Dense"
        place.mkdir()
        config = {
            "in_features": columns,
            "out_features": rows,
            "bias": biased,
            "activation_function": f"torch.nn.modules.x.{activation}",
        }
        (place / "config.json").write_text(json.dumps(config))
        held = {"linear.weight": torch.randn(rows, columns, generator=drawn) / columns**0.5}
        held |= {"linear.bias": torch.randn(rows, generator=drawn) / 4} if biased else {}
        save_file(held, place / "model.safetensors")


def expected(folder: Path, model: Any, pooling: str, count: int) -> np.ndarray:
    """[N, width]: transformers' hidden states, pooled, through torch's layers, of length 1."""
    from safetensors.torch import load_file

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows: list[np.ndarray] = []
    for text in TEXTS:
        with torch.inference_mode():
            ids = tokenizer(text, return_tensors="pt").input_ids
            states = model(input_ids=ids).last_hidden_state[0]
            x = {"mean_tokens": states.mean(0), "cls_token": states[0], "lasttoken": states[-1]}[pooling]
            for i in range(count):
                place = folder / f"{i + 2}_Dense"
                held = load_file(place / "model.safetensors")
                x = torch.nn.functional.linear(x, held["linear.weight"], held.get("linear.bias"))
                name = json.loads((place / "config.json").read_text())["activation_function"]
                x = getattr(torch.nn, name.rpartition(".")[2])()(x)
        rows.append(torch.nn.functional.normalize(x, dim=0).numpy())
    return np.stack(rows)


@pytest.mark.parametrize("target", TARGETS)
def test_affine_layers_behind_the_mean_are_one(tmp_path: Path, target: str):
    """As EmbeddingGemma is published: a bidirectional decoder, its mean through D → 3 D → D."""
    model, folder = looking_both_ways(), tmp_path / "m"
    model.save_pretrained(folder)
    save_tokenizer(folder)
    put_behind_the_pooling(folder, "mean_tokens", [(192, 64, "Identity", True), (64, 192, "Identity", False)])
    artifact = llmc.compile(folder, tmp_path / "m.llmc", targets=[target], kv_dtype="float32")
    with Embedder(artifact) as embedder:
        assert embedder.dimensions == 64
        # Sums in float32, in another order: 1e-5 is twenty times what was seen.
        np.testing.assert_allclose(
            embedder.embed_passages(TEXTS), expected(folder, model, "mean_tokens", 2), atol=1e-5
        )
    own = sum(p.numel() for p in open_source(folder).build_model().parameters())
    stored = check_model(folder, targets=["null"], kv_dtype="float32").weight_bytes
    assert 4 * (own + 64 * 64 + 64) <= stored < 4 * (own + 64 * 64 + 64) + 4096  # rotary frequencies


@pytest.mark.parametrize("target", TARGETS)
def test_layers_of_any_activation_behind_the_first_token(tmp_path: Path, target: str):
    folder = save_tiny("bert", tmp_path / "m")
    put_behind_the_pooling(folder, "cls_token", [(64, 64, "Tanh", True), (24, 64, "ReLU", False)])
    model = transformers.AutoModel.from_pretrained(folder).eval()
    artifact = llmc.compile(folder, tmp_path / "m.llmc", targets=[target], kv_dtype="float32")
    with Embedder(artifact) as embedder:
        assert embedder.dimensions == 24
        np.testing.assert_allclose(
            embedder.embed_passages(TEXTS), expected(folder, model, "cls_token", 2), atol=1e-5
        )


def test_the_encoder_of_an_encoder_decoder(tmp_path: Path):
    """As sentence-t5 is published. Its configuration says no length, but sentence-transformers' files do."""
    config, folder = small_config("t5 (encoder)"), tmp_path / "m"
    torch.manual_seed(0)
    model = transformers.T5EncoderModel(config).eval()
    model.save_pretrained(folder)
    save_tokenizer(folder)
    put_behind_the_pooling(folder, "mean_tokens", [(32, 64, "Identity", False)])
    length = json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"]
    artifact = llmc.compile(folder, tmp_path / "l.llmc", targets=["null"])
    assert artifact.model["context_length"] == length
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 48}')
    artifact = llmc.compile(folder, tmp_path / "m.llmc", targets=["onnx-cpu"], kv_dtype="float32")
    assert artifact.model["context_length"] == 48
    with Embedder(artifact) as embedder:
        np.testing.assert_allclose(
            embedder.embed_passages(TEXTS), expected(folder, model, "mean_tokens", 1), atol=1e-5
        )


def test_layers_that_cannot_be_are_refused(tmp_path: Path):
    folder = save_tiny("bert", tmp_path / "m")
    put_behind_the_pooling(folder, "mean_tokens", [(32, 64, "Identity", True)])
    config, parts = folder / "2_Dense" / "config.json", folder / "modules.json"

    def refused(path: Path, change: dict[str, Any] | list[Any], match: str) -> None:
        before = path.read_text()
        held = json.loads(before)
        path.write_text(json.dumps({**held, **change} if isinstance(change, dict) else change))
        with pytest.raises(InputError, match=match):
            llmc.compile(folder, tmp_path / "m.llmc", targets=["null"])
        path.write_text(before)

    refused(config, {"activation_function": "torch.nn.Tanh"}, "cannot be applied before it")
    refused(config, {"activation_function": "os.system"}, r"asks for the activation os\.system")
    refused(config, {"out_features": 31}, r"linear\.weight of .* is float32\[32, 64\]")
    refused(config, {"in_features": 0}, "no out_features and in_features")
    given = json.loads(parts.read_text())
    refused(parts, [*given[:2], {**given[2], "path": "../m/2_Dense"}], "reaches for other files")
    refused(parts, [given[0], given[2], given[1]], "one behind the other")
    refused(parts, [*given, {**given[2], "type": "models.LSTM"}], "puts LSTM")
    refused(parts, [*given[:2], *([given[2]] * 2)], "takes vectors of 64, not of 32")
    refused(parts, [*given[:2], *([given[2]] * 99)], "99 layers behind")
    (folder / "2_Dense" / "model.safetensors").unlink()
    assert check_model(folder, targets=["null"]).ops > 0  # for which no weights are opened
    with pytest.raises(InputError, match="pickle"):
        llmc.compile(folder, tmp_path / "m.llmc", targets=["null"])


@pytest.mark.parametrize("length", [2, WINDOW, 2 * WINDOW, CONTEXT // 2])
def test_windows_that_see_both_ways(length: int):
    """The window of a bidirectional model is the union of the causal one and one on both sides."""
    model, ids = looking_both_ways(), ids_of(length)
    graph, _ = lowered(traced(model, encoder=True), "fused")
    seen = sorted((op.window or 0) for op in graph if type(op).__name__ == "Attention" and not op.causal)
    with torch.inference_mode():
        want = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    assert seen == [0, model.config.sliding_window]
    np.testing.assert_allclose(logits_of(graph, ids), want, atol=1e-5)


@pytest.mark.parametrize("kind", ["Qwen3ForCausalLM", "Qwen3Model"])
@pytest.mark.parametrize("causal", [True, False])
def test_decoders_that_are_pooled(tmp_path: Path, kind: str, causal: bool):
    """As Qwen3-Embedding is published: a decoder, with a head or without, whose last hidden state is the
    vector; and as others are, whose configuration takes the causal mask away.
    """
    config, folder = small_config("qwen3"), tmp_path / "m"
    config.is_causal = causal
    torch.manual_seed(0)
    getattr(transformers, kind)(config).eval().save_pretrained(folder)
    save_tokenizer(folder)
    if not causal and kind == "Qwen3ForCausalLM":
        with pytest.raises(UnsupportedError, match="attend to later ones"):
            llmc.compile(folder, tmp_path / "m.llmc", targets=["null"])
    put_behind_the_pooling(folder, "lasttoken", [])
    model = transformers.AutoModel.from_pretrained(folder).eval()
    artifact = llmc.compile(folder, tmp_path / "m.llmc", targets=["onnx-cpu"], kv_dtype="float32")
    assert artifact.kind == "encoder" and artifact.model["pooling"] == "last"
    with Embedder(artifact) as embedder:
        np.testing.assert_allclose(
            embedder.embed_passages(TEXTS), expected(folder, model, "lasttoken", 0), atol=1e-5
        )


def test_what_classifies_stays_a_classifier(tmp_path: Path):
    folder = tmp_path / "m"
    transformers.BertForSequenceClassification(small_config("bert")).save_pretrained(folder)
    save_tokenizer(folder)
    put_behind_the_pooling(folder, "cls_token", [])
    assert open_source(folder).task == "classifier"


def test_the_text_of_a_model_of_more(tmp_path: Path):
    """As Qwen3-VL-Embedding is published: a text model that transformers has without a head."""
    folder = tmp_path / "m"
    model = whole_model("qwen3_vl", folder)
    put_behind_the_pooling(folder, "lasttoken", [])
    artifact = llmc.compile(folder, tmp_path / "m.llmc", targets=["onnx-cpu"], kv_dtype="float32")
    assert artifact.kind == "encoder"
    with Embedder(artifact) as embedder:
        found = embedder.embed_passages(TEXTS)
    text = model.model.language_model
    np.testing.assert_allclose(found, expected(folder, text, "lasttoken", 0), atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_gguf_files_that_are_pooled(tmp_path: Path, causal: bool):
    """`pooling_type` and `attention.causal` of a file, which may hold a head that is not used."""
    rng, path = np.random.default_rng(0), tmp_path / "m.gguf"
    tensors = {name: 0.1 * array for name, array in llama_tensors().items()}
    table = rng.standard_normal((257, 64)).astype(np.float32)
    tensors |= {"token_embd.weight": table, "output.weight": table[::-1].copy()}
    entries = [one for one in llama_entries() if b"vocab_size" not in one]
    entries += [
        *byte_vocabulary(["<|end|>"]),
        entry("tokenizer.ggml.eos_token_id", U32, 256),
        entry("llama.pooling_type", U32, 1),
        entry("llama.attention.causal", BOOL, causal),
    ]
    write_gguf(path, entries, tensors)
    source = open_source(path)
    model = transformers.LlamaModel(source.config).eval()
    model.load_state_dict({name: torch.tensor(one.read()) for name, one in source.weights.items()})
    artifact = llmc.compile(path, tmp_path / "m.llmc", targets=["onnx-cpu"], kv_dtype="float32")
    with llmc.load(artifact.root) as llm, torch.inference_mode():
        for text in TEXTS:
            states = model(input_ids=torch.tensor([llm.prompt_ids(text)])).last_hidden_state[0]
            want = torch.nn.functional.normalize(states.mean(0), dim=0)
            np.testing.assert_allclose(llm.embeddings([text])[0], want, atol=1e-5)


# -- encoders whose result is one token's vector


def encoder_of_one_row(kind: str, projection: int) -> Any:
    config = small_config("dpr", changed={"projection_dim": projection, "architectures": [kind]})
    return random_model(config, getattr(transformers, kind))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("kind", "projection"), [("DPRQuestionEncoder", 0), ("DPRContextEncoder", 0), ("DPRContextEncoder", 24)]
)
def test_an_encoder_that_gives_its_first_tokens_vector(
    kind: str, projection: int, target: str, tmp_path: Path
) -> None:
    """Beside transformers' vectors in float32, both of length 1: within 1e-5."""
    model = encoder_of_one_row(kind, projection)
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    llmc.compile(tmp_path / "model", tmp_path / "m.llmc", targets=[target])
    with llmc.load(tmp_path / "m.llmc") as llm:
        assert llm.artifact is not None and llm.artifact.model["pooling"] == "cls"
        assert llm.artifact.model["hidden_size"] == (projection or 64)
        ids = [llm.prompt_ids(text) for text in TEXTS]
        with torch.no_grad():
            rows = [model(torch.tensor([one])).pooler_output[0].numpy() for one in ids]
        wanted = np.stack([row / np.linalg.norm(row) for row in rows])
        np.testing.assert_allclose(llm.embeddings(TEXTS), wanted, atol=1e-5)


def test_an_encoder_of_one_row_that_is_said_to_pool_otherwise(tmp_path: Path) -> None:
    encoder_of_one_row("DPRQuestionEncoder", 0).save_pretrained(tmp_path)
    put_behind_the_pooling(tmp_path, "mean_tokens", [])
    with pytest.raises(InputError, match=r"pools by mean, and its model gives one row of a text \(cls\)"):
        trace_source(open_source(tmp_path))


def test_a_head_whose_first_result_is_no_vector_is_no_encoder(tmp_path: Path) -> None:
    config = small_config("dpr", changed={"architectures": ["DPRReader"]})
    with pytest.raises(InputError, match=r"unknown architecture dpr \(DPRReader\)"):
        model_class(config)


def _ends(form: str) -> Graph:
    """An encoder of one layer, and the row that it gives."""
    graph = Graph("m")
    x = graph.add_input("input_ids", TensorType("int64", (1, sym("T"))))
    table = graph.add_weight("table", ArrayTensor(np.ones((384, 8), np.float32)))

    def put(op: Any) -> Any:
        graph.append(op)
        return op.result

    hidden = put(Embedding(x, table))
    if form == "mean":
        row = put(math.ReduceMean(hidden, axes=(-2,), keepdim=False))
    else:
        start, stop = {"first": (0, 1), "last": (sym("T") - 1, sym("T")), "second": (1, 2)}[form]
        row = put(Reshape(put(Slice(hidden, axis=-2, start=start, stop=stop)), shape=(1, 8)))
    graph.outputs, graph.output_names = [row], ["hidden"]
    return graph


@pytest.mark.parametrize(("form", "pooling"), [("first", "cls"), ("last", "last")])
def test_whose_row_it_is(form: str, pooling: str) -> None:
    graph = _ends(form)
    pool_every_token(graph)
    assert graph.facts["pooling"] == pooling and graph.outputs[0].shape == (1, sym("T"), 8)


@pytest.mark.parametrize("form", ["mean", "second"])
def test_a_row_of_several_tokens_is_refused(form: str) -> None:
    with pytest.raises(UnsupportedError, match="a row that is not of the first or last token alone"):
        pool_every_token(_ends(form))


def test_ids_of_padding_are_seen_in_masks_and_nowhere_else() -> None:
    graph = Graph("m")
    ids = graph.add_input("input_ids", TensorType("int64", (1, sym("T"))))

    def put(op: Any) -> Any:
        graph.append(op)
        return op.result

    pad = put(Full(value=0.0, dtype="int64", shape=()))
    places, none = put(Arange(length=sym("T"))), put(Full(value=0.0, dtype="int64", shape=(1,)))
    masks = [put(math.NotEqual(ids, pad)) for _ in range(2)]
    graph.outputs = [put(Index(mask, [none, places])) for mask in masks]
    graph.outputs.append(put(math.Cast(masks[1], dtype="float32")))
    of_each = graph.add_weight("of each", ArrayTensor(np.array([1.0, 2.0], np.float32)))
    chosen = put(math.NotEqual(ids, pad))
    graph.outputs.append(put(Index(of_each, [chosen])))
    graph.output_names = ["a", "b", "c", "d"]
    see_padding(graph, 3)
    assert opnames(graph).count("not_equal") == 3
    see_padding(graph, 0)
    assert opnames(graph).count("not_equal") == 2
    given = {"input_ids": torch.tensor([[5, 0, 7]])}
    assert [out.tolist() for out in run(graph, given)] == [
        [True] * 3,
        [True, False, True],
        [[1.0, 0.0, 1.0]],
        [[2.0, 1.0, 2.0]],
    ]
