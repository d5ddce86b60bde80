"""/v1/embeddings and /v1/rerank with a real encoder, beside transformers in float32."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import llmc
import numpy as np
import openai
import pytest

from .models import real_model
from .server_harness import RunningServer

pytestmark = pytest.mark.slow

TEXTS = ["A cat sits on the mat.", "The dog barks.", "Interest rates rose by a quarter of a percent again."]


@pytest.fixture(scope="module")
def source() -> Path:
    return real_model("minilm")


@pytest.fixture(scope="module")
def server(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    out = tmp_path_factory.mktemp("encoder") / "minilm.llmc"
    artifact = llmc.compile(str(source), out, targets=["onnx-cpu"])
    assert artifact.model["pooling"] == "mean"
    with RunningServer({"minilm": llmc.load(out)}) as running:
        yield running


@pytest.fixture(scope="module")
def expected(source: Path) -> np.ndarray:
    """[3, 384]: the mean of the hidden states, of length 1, as the model's 1_Pooling and 2_Normalize say."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModel.from_pretrained(source).float().eval()
    rows = []
    for text in TEXTS:
        with torch.inference_mode():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        rows.append(torch.nn.functional.normalize(states.mean(0), dim=0).numpy())
    return np.stack(rows)


def test_vectors_are_the_models(server: RunningServer, expected: np.ndarray):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.embeddings.create(model="minilm", input=TEXTS)  # the package asks for base64
        found = np.array([entry.embedding for entry in answer.data])
        # Float32 sums in another order: 1e-5 is a hundred times what was seen.
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert answer.usage.prompt_tokens == sum(len(server.models["minilm"].encode(text)) for text in TEXTS)
        short = client.embeddings.create(model="minilm", input=TEXTS, dimensions=128)
        first = expected[:, :128] / np.linalg.norm(expected[:, :128], axis=1, keepdims=True)
        np.testing.assert_allclose([entry.embedding for entry in short.data], first, atol=1e-5)
        with pytest.raises(openai.BadRequestError, match="vectors have 384"):
            client.embeddings.create(model="minilm", input="x", dimensions=385)
        with pytest.raises(openai.BadRequestError, match="it is an encoder"):
            client.completions.create(model="minilm", prompt="x")
        with pytest.raises(openai.BadRequestError, match="context_length_exceeded"):
            client.embeddings.create(model="minilm", input="word " * 2000)
    ids = [server.models["minilm"].encode(text) for text in TEXTS]
    status, body, _ = server.post("/v1/embeddings", {"input": ids, "encoding_format": "float"})
    assert status == 200
    np.testing.assert_allclose([entry["embedding"] for entry in body["data"]], expected, atol=1e-5)
    status, body, _ = server.post("/v1/embeddings", {"input": TEXTS[0], "encoding_format": "base64"})
    vector = np.frombuffer(base64.b64decode(body["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(vector, expected[0], atol=1e-5)


def test_documents_are_ranked_by_likeness(server: RunningServer):
    body = {"query": "Where is the kitten?", "documents": TEXTS, "top_n": 2}
    status, answer, _ = server.post("/v1/rerank", body)
    assert status == 200
    assert [entry["index"] for entry in answer["results"]] == [0, 1]
    assert answer["results"][0]["document"]["text"] == TEXTS[0]
    scores = [entry["relevance_score"] for entry in answer["results"]]
    assert scores[0] > scores[1]
