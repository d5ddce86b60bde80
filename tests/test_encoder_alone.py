"""Encoders and classifiers whose tokens meet in ways of their own: a step takes one sequence."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import llmc
import numpy as np
import pytest
import torch
import transformers
from llmc.codegen.artifact import Artifact
from llmc.codegen.driver import check_model
from llmc.runtime.encoder import WholeSequences, reads_alone
from llmc.runtime.rag.embedder import Embedder
from llmc.runtime.rag.reranker import CrossEncoder

from .models import CONTEXT, VOCAB_SIZE, save_tokenizer
from .server_harness import RunningServer
from .tvm_graphs import ISA

TARGETS = {"tvm-cpu": f"tvm-cpu:isa={ISA}", "onnx-cpu": "onnx-cpu"}
TEXTS = ["The capital of France is Paris.", "a", "The river was wide and slow. " * 5]
QUESTION = "What is the capital of France?"


@cache
def disentangled(kind: str) -> Any:
    """A DeBERTa with relative positions, every parameter drawn."""
    config = transformers.DebertaV2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        num_labels=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"DebertaV2{kind}")(config).to(torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.2 / parameter.shape[-1] ** 0.5)
            else:
                parameter.normal_(mean=float("LayerNorm.weight" in name), std=0.2)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("alone")
    for kind in ("Model", "ForSequenceClassification"):
        disentangled(kind).save_pretrained(made / kind)
        save_tokenizer(made / kind)
    return made


@pytest.fixture(scope="module", params=[pytest.param("tvm-cpu", marks=pytest.mark.slow), "onnx-cpu"])
def artifacts(request: pytest.FixtureRequest, folder: Path) -> dict[str, Artifact]:
    """The encoder and the classifier, for each target."""
    target = request.param
    found: dict[str, Artifact] = {}
    for kind in ("Model", "ForSequenceClassification"):
        out = folder / f"{kind}-{target}.llmc"
        found[kind] = llmc.compile(folder / kind, out, targets=[TARGETS[target]])
    return found


def test_it_is_said_before_and_in_the_manifest(folder: Path, artifacts: dict[str, Artifact]) -> None:
    assert any("a step takes one text" in note for note in check_model(folder / "Model").notes)
    assert all(reads_alone(one.model) for one in artifacts.values())


def test_vectors_equal_transformers_and_do_not_depend_on_neighbours(artifacts: dict[str, Artifact]) -> None:
    """Within 1e-5: sums in another order."""
    with llmc.load(artifacts["Model"].root) as llm:
        found = llm.embeddings(TEXTS)
        for text, vector in zip(TEXTS, found, strict=True):
            ids = torch.tensor([llm.prompt_ids(text)])
            with torch.no_grad():
                states = disentangled("Model")(ids)[0][0]
            np.testing.assert_allclose(llm.logits(ids[0].tolist()), states.numpy(), atol=1e-5)
            pooled = states.mean(0) / states.mean(0).norm()
            np.testing.assert_allclose(vector, pooled.numpy(), atol=1e-5)
            assert np.array_equal(llm.embeddings([text])[0], vector)


def test_pairs_are_scored_as_transformers_does(artifacts: dict[str, Artifact]) -> None:
    with llmc.load(artifacts["ForSequenceClassification"].root) as llm:
        scores = llm.rank(QUESTION, TEXTS)
        for text, score in zip(TEXTS, scores, strict=True):
            ((ids, types),) = llm._pairs.encode_pairs(QUESTION, [text])  # pyright: ignore[reportPrivateUsage]
            model = disentangled("ForSequenceClassification")
            with torch.no_grad():
                given = {"input_ids": torch.tensor([ids]), "token_type_ids": torch.tensor([types])}
                assert abs(float(model(**given).logits) - score) <= 1e-5


def test_embedder_and_cross_encoder_read_one_at_a_time(artifacts: dict[str, Artifact]) -> None:
    with Embedder(artifacts["Model"]) as embedder:
        many = embedder.embed_passages(TEXTS)
        for text, row in zip(TEXTS, many, strict=True):
            np.testing.assert_array_equal(embedder.embed_passages([text])[0], row)
    scores = CrossEncoder(artifacts["ForSequenceClassification"]).scores(QUESTION, TEXTS)
    with llmc.load(artifacts["ForSequenceClassification"].root) as llm:
        np.testing.assert_array_equal(scores, llm.rank(QUESTION, TEXTS))


def test_the_server_gives_the_same(artifacts: dict[str, Artifact]) -> None:
    with llmc.load(artifacts["Model"].root) as llm, RunningServer({"encoder": llm}) as server:
        status, answer, _ = server.post("/v1/embeddings", {"input": TEXTS})
        assert status == 200
        rows = np.array([one["embedding"] for one in answer["data"]], np.float32)
        np.testing.assert_allclose(rows, llm.embeddings(TEXTS), atol=1e-6)


def test_steps_take_one_sequence() -> None:
    class Pages:
        page_size = 4

    sequences = WholeSequences(Pages(), pages=10, tokens=20, alone=True)  # type: ignore[arg-type]
    assert [(part.start, part.stop) for part in sequences.batches([3, 5, 1])] == [(0, 1), (1, 2), (2, 3)]
