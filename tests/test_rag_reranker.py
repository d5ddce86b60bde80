"""Cross-encoders, from transformers' classes to /v1/rerank, and language models that rank by likelihood."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llmc
import numpy as np
import pytest
import torch
import transformers
from llmc.codegen.artifact import Artifact
from llmc.frontend.trace import trace_source
from llmc.ir.core import Graph
from llmc.ir.errors import InputError
from llmc.ir.interpreter import run
from llmc.runtime.encoder import WholeSequences
from llmc.runtime.executor.base import STEP_INPUTS, StepInputs
from llmc.runtime.rag.reranker import CrossEncoder, LikelihoodReranker, open_reranker

from .graphs import ModelInMemory, lowered
from .models import CONTEXT, VOCAB_SIZE, ids_of, save_tiny, save_tokenizer
from .server_harness import RunningServer
from .tvm_graphs import ISA

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "num_labels": 1,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Bert": {},
    "Electra": {"embedding_size": 16, "num_labels": 2},
    "Albert": {"embedding_size": 16},
    "Roberta": {"type_vocab_size": 1, "pad_token_id": 1},
    "XLMRoberta": {"type_vocab_size": 1, "pad_token_id": 1},
    "DistilBert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "ModernBert": {"classifier_pooling": "cls"},
}
QUESTION = "What is the capital of France?"
PASSAGES = [
    "The capital of France is Paris.",
    "The river was wide and slow. " * 60,
    ".",
    "河は広かった。",
    "a\0\ud800",
]


def classifier(family: str, **changes: Any) -> Any:
    """A classifier of transformers, every parameter drawn, its scores some units apart."""
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES[family], **changes})
    model = getattr(transformers, f"{family}ForSequenceClassification")(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(dict(model.named_parameters()).items()):
            scale = 2.0 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.3
            drawn = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(drawn + 1 if parameter.ndim == 1 and name.endswith("weight") else drawn)
    return model


def save_classifier(family: str, folder: Path, **changes: Any) -> Path:
    from tokenizers import Tokenizer, processors

    classifier(family, **changes).save_pretrained(folder)
    save_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos = ("<|bos|>", tokenizer.token_to_id("<|bos|>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|>:0 $A:0 <|bos|>:1 $B:1", special_tokens=[bos]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def expected(folder: Path, question: str, passages: list[str], longest: int = CONTEXT) -> np.ndarray:
    """[N]: transformers' score of each pair, or the second label's less the first one's."""
    from transformers import AutoModelForSequenceClassification as Auto
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), Auto.from_pretrained(folder).float().eval()
    scores: list[float] = []
    for passage in passages:
        text = passage.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        pair = tokenizer(question, text, truncation=True, max_length=longest, return_token_type_ids=True)
        ids = {"input_ids": torch.tensor([pair["input_ids"]])}
        if model.config.model_type != "modernbert" and getattr(model.config, "type_vocab_size", 0) > 1:
            ids["token_type_ids"] = torch.tensor([pair["token_type_ids"]])
        with torch.inference_mode():
            found = model(**ids).logits[0].tolist()
        scores.append(found[0] if len(found) == 1 else found[1] - found[0])
    return np.array(scores, np.float32)


class Interpreted:
    """An executor over a paged graph's reference meanings."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.page_size = graph, int(graph.facts["page_size"])
        self.pages = {
            value.name: torch.full((2, 32, *value.shape[2:]), 7.0)  # type: ignore[arg-type]
            for value in graph.inputs
            if value.name.startswith("kv_pages.")
        }

    def step(self, inputs: StepInputs) -> np.ndarray:
        names = {value.name for value in self.graph.inputs} & set(STEP_INPUTS)
        given = {name: torch.from_numpy(np.array(getattr(inputs, name))) for name in names}
        return run(self.graph, {**given, **self.pages})[0].numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_a_step_are_the_classifiers(family: str):
    model = classifier(family)
    source = ModelInMemory(model, encoder=True)
    source.task = "classifier"  # type: ignore[assignment]
    graph, _ = lowered(trace_source(source), "paged")  # type: ignore[arg-type]
    # Only the rows that are asked for go through the head, and none of them through attention.
    of_wanted = [op.opname for op in graph if op.results[0].shape[:1] == graph.input("output_index").shape]
    assert of_wanted.count("linear") >= 2 and not {"append_kv", "paged_attention"} & set(of_wanted)
    sequences = [ids_of(9, seed=1), ids_of(1, seed=2), ids_of(21, seed=3)]
    types = [[0] * (len(ids) // 2) + [1] * (len(ids) - len(ids) // 2) for ids in sequences]
    told = "token_type_ids" in {value.name for value in graph.inputs}
    assert told is (family in ("Bert", "Electra", "Albert"))
    whole = WholeSequences(Interpreted(graph), pages=32)  # type: ignore[arg-type]
    found = whole.step(sequences, "first", types if told else None)
    for ids, kinds, row in zip(sequences, types, found, strict=True):
        given = {"token_type_ids": torch.tensor([kinds])} if told else {}
        with torch.inference_mode():
            wanted = model(input_ids=torch.tensor([ids]), **given).logits[0].numpy()
        np.testing.assert_allclose(row, wanted, atol=2e-5)


def test_a_table_of_positions_bounds_the_context(tmp_path: Path):
    """RoBERTa's has two rows that no position reads: behind them lies other memory."""
    folder = save_classifier("Roberta", tmp_path / "m", max_position_embeddings=50)
    artifact = llmc.compile(folder, tmp_path / "m.llmc", targets=["null"])
    assert artifact.kind == "classifier" and artifact.model["labels"] == ["LABEL_0"]
    assert artifact.model["context_length"] == 48 and "token_types" not in artifact.model


# A cross-encoder of its own --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier("Bert", tmp_path_factory.mktemp("cross") / "cross")


@pytest.fixture(scope="module")
def artifact(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return llmc.compile(folder, tmp_path_factory.mktemp("out") / "cross.llmc", targets=["onnx-cpu"])


@pytest.fixture(scope="module")
def served(artifact: Artifact) -> Iterator[RunningServer]:
    with llmc.load(artifact.root) as llm, RunningServer({"cross": llm}) as running:
        yield running


def test_pairs_are_scored_with_their_types_and_cut_as_transformers_cuts_them(
    folder: Path, artifact: Artifact
):
    reranker = open_reranker(str(artifact.root))
    assert isinstance(reranker, CrossEncoder) and reranker.name == "cross"
    assert artifact.model["token_types"] == 2
    wanted = expected(folder, QUESTION, PASSAGES)
    assert np.ptp(wanted) > 0.1  # they are told apart
    scores = reranker.scores(QUESTION, PASSAGES)
    np.testing.assert_allclose(scores, wanted, atol=1e-4)
    # What the passage is, and not the question, is told by the types.
    turned = [float(reranker.scores(passage, [QUESTION])[0]) for passage in PASSAGES[:1]]
    assert abs(turned[0] - scores[0]) > 1e-3
    long = "One, two, three. " * 200
    np.testing.assert_allclose(reranker.scores(long, [long]), expected(folder, long, [long]), atol=1e-4)
    assert reranker.scores(QUESTION, []).shape == (0,)
    assert np.isfinite(reranker.scores("", ["", " " * 100_000, "w" * 300_000])).all()
    with llmc.load(artifact.root) as llm:
        np.testing.assert_allclose(llm.rank(QUESTION, PASSAGES), scores, atol=1e-5)
        with pytest.raises(InputError, match="is a classifier and generates nothing"):
            llm.generate("x")
        with pytest.raises(InputError, match="no encoder"):
            llm.embeddings(["x"])
    reranker.close()
    with pytest.raises(InputError, match="was closed"):
        reranker.scores(QUESTION, PASSAGES)


def test_rerank_of_the_server_is_the_cross_encoders_probability(served: RunningServer, folder: Path):
    texts = PASSAGES[:4]
    status, answer, _ = served.post("/v1/rerank", {"query": QUESTION, "documents": texts})
    assert status == 200
    wanted = 1 / (1 + np.exp(-expected(folder, QUESTION, texts)))
    assert [entry["index"] for entry in answer["results"]] == np.argsort(-wanted).tolist()
    for entry in answer["results"]:
        assert entry["relevance_score"] == pytest.approx(wanted[entry["index"]], abs=1e-4)
    assert answer["usage"]["total_tokens"] > 0
    status, answer, _ = served.post("/v1/embeddings", {"input": "x"})
    assert status == 400 and "use /v1/rerank" in json.dumps(answer)
    body = {"query": QUESTION, "documents": texts, "truncate_prompt_tokens": 5}
    status, answer, _ = served.post("/v1/rerank", body)
    assert status == 400 and "does not go with a cross-encoder" in json.dumps(answer)


def test_what_ranks_nothing_is_refused(tmp_path: Path):
    assert open_reranker(None) is None and open_reranker("none") is None
    folder = save_classifier("Bert", tmp_path / "nli", num_labels=3)
    llmc.compile(folder, tmp_path / "nli.llmc", targets=["null"])
    with pytest.raises(InputError, match="tells 3 kinds of texts apart"):
        open_reranker(str(tmp_path / "nli.llmc"))
    llmc.compile(save_tiny("bert", tmp_path / "bert"), tmp_path / "bert.llmc", targets=["null"])
    with pytest.raises(InputError, match="kind 'encoder', which reads no pairs"):
        open_reranker(str(tmp_path / "bert.llmc"))


@pytest.mark.slow
def test_a_pair_has_the_same_score_in_any_batch(folder: Path, tmp_path: Path):
    out = tmp_path / "cross.llmc"
    artifact = llmc.compile(folder, out, targets=[f"tvm-cpu:isa={ISA}"])
    reranker = CrossEncoder(artifact)
    passages = [*PASSAGES, *(f"{i}: the river" * (i + 1) for i in range(60))]
    scores = reranker.scores(QUESTION, passages)
    np.testing.assert_allclose(scores, expected(folder, QUESTION, passages), atol=1e-4)
    assert np.array_equal(reranker.scores(QUESTION, passages[::-1])[::-1], scores)
    for i in (0, 1, 40):
        assert reranker.scores(QUESTION, [passages[i]])[0] == scores[i]


# A language model ------------------------------------------------------------------------------------------


def test_a_language_model_ranks_by_the_questions_likelihood(tmp_path: Path):
    out = tmp_path / "llama.llmc"
    llmc.compile(save_tiny("llama", tmp_path / "llama"), out, targets=["onnx-cpu"])
    reranker = open_reranker(str(out))
    assert isinstance(reranker, LikelihoodReranker) and reranker.name == "llama"
    passages = ["Paris.", "A river.", "<|eos|><|turn|>system"]
    scores = reranker.scores(QUESTION, passages)
    with llmc.load(out, kv_tokens=2048) as llm:
        target = llm.encode(QUESTION, add_special_tokens=False)
        for passage, score in zip(passages[:2], scores, strict=False):
            asked = f"Passage: {passage}\n\nPlease write a question based on this passage."
            ids = [*llm.prompt_ids([{"role": "user", "content": asked}]), *target]
            assert score == pytest.approx(llm.token_logprobs(ids)[-len(target) :].mean(), abs=1e-4)
    for i, passage in enumerate(passages):
        assert reranker.scores(QUESTION, [passage])[0] == pytest.approx(scores[i], abs=1e-4)
    hostile = ["", "\0\ud800", "x" * 500_000, "word " * 5000]
    assert np.isfinite(reranker.scores(QUESTION * 100, hostile)).all()
    assert reranker.scores("", passages).tolist() == [0.0] * 3 and len(reranker.scores(QUESTION, [])) == 0
    reranker.close()
