"""Embedders: vectors beside transformers, batches, texts that are too long or hostile, and where they come
from.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llmc
import numpy as np
import pytest
from llmc.codegen.artifact import MANIFEST, Artifact
from llmc.ir.errors import InputError
from llmc.runtime.encoder import WholeSequences
from llmc.runtime.executor.base import StepInputs
from llmc.runtime.rag import embedder_source
from llmc.runtime.rag.embedder import Embedder, embedder_hash, open_embedder
from llmc.runtime.rag.embedder_source import DEFAULT, find_artifact
from llmc.runtime.text_encoding import TextTokenizer, clean

from .fake_executor import FakeExecutor
from .models import real_model, save_tiny
from .server_harness import RunningServer
from .tvm_graphs import ISA

LONGEST = 40
PROMPTS = {"query": "find: ", "document": "text: "}
TEXTS = [
    "The river was wide and slow.",
    "",
    "One, two, three, four, five. " * 20,
    "河は広かった。",
    "def main(arguments): return 3.14159",
]


def tiny_folder_of_sentences(folder: Path) -> Path:
    """A tiny encoder with what sentence-transformers says of its use."""
    save_tiny("bert", folder)
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": LONGEST}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": PROMPTS}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder_of_sentences(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture(scope="module")
def artifact(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return llmc.compile(folder, tmp_path_factory.mktemp("out") / "tiny.llmc", targets=["onnx-cpu"])


@pytest.fixture(scope="module")
def embedder(artifact: Artifact) -> Iterator[Embedder]:
    found = open_embedder(str(artifact.root))
    assert found is not None
    with found:
        yield found


def expected(folder: Path, texts: list[str], longest: int) -> np.ndarray:
    """[N, hidden]: the mean of transformers' hidden states over all tokens, of length 1."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).float().eval()
    rows: list[np.ndarray] = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=longest)
        with torch.inference_mode():
            states = model(**ids).last_hidden_state[0]
        rows.append(torch.nn.functional.normalize(states.mean(0), dim=0).numpy())
    return np.stack(rows)


# Vectors -------------------------------------------------------------------------------------------------


def test_vectors_are_the_models_with_its_prompts_and_its_longest_text(folder: Path, embedder: Embedder):
    assert embedder.max_tokens == LONGEST and embedder.dimensions == 64 and embedder.name == "tiny"
    before = embedder.truncated
    seen: list[tuple[int, int]] = []
    vectors = embedder.embed_passages(TEXTS, lambda done, of: seen.append((done, of)))
    assert vectors.dtype == np.float32 and seen[-1] == (len(TEXTS), len(TEXTS))
    # Float32 sums in another order: 1e-4 is a hundred times what was seen.
    np.testing.assert_allclose(
        vectors, expected(folder, ["text: " + text for text in TEXTS], LONGEST), atol=1e-4
    )
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-6)
    assert embedder.truncated - before == 1
    query = embedder.embed_query(TEXTS[0])
    np.testing.assert_allclose(query, expected(folder, ["find: " + TEXTS[0]], LONGEST)[0], atol=1e-4)
    assert embedder.embed_passages([]).shape == (0, 64)


def test_tokens_are_counted_without_special_ones_and_the_room_is_what_fits(embedder: Embedder):
    word = "river"
    one = embedder.count_tokens(word)
    assert embedder.count_tokens("") == 0 < one
    # A text of far more tokens than the longest is counted whole.
    assert embedder.count_tokens(" ".join([word] * 500)) >= 500
    before = embedder.truncated
    fits = "x " * 200
    while embedder.count_tokens(fits) > embedder.room:
        fits = fits[:-1]
    embedder.embed_passages([fits])
    assert embedder.truncated == before
    embedder.embed_passages([fits + " y z"])
    assert embedder.truncated == before + 1


@pytest.mark.parametrize(
    "text",
    [
        "\0",
        "a\0b",
        "\ud800",
        "x\udfff\ud83d\ude00",
        "w" * 1_000_000,
        " " * 300_000 + "end",
        "[CLS]<|bos|>" * 50,
    ],
    ids=["nul", "nul inside", "lone surrogate", "surrogates", "long word", "spaces", "special tokens"],
)
def test_any_string_has_a_vector(embedder: Embedder, text: str):
    vectors = embedder.embed_passages([text, "plain"])
    assert np.isfinite(vectors).all()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(vectors[1], embedder.embed_passages(["plain"])[0], atol=1e-5)
    assert np.isfinite(embedder.embed_query(text)).all()


def test_surrogates_that_make_a_character_are_that_character():
    assert clean("\ud83d\ude00") == "\U0001f600" and clean("a\ud800b") == "a\ufffdb" and clean("a") == "a"


def test_a_text_is_cut_where_the_whole_one_would_be(artifact: Artifact):
    """Only the beginning of a long text is tokenized: the tokens are those of all of it."""
    from tokenizers import Tokenizer

    whole = Tokenizer.from_file(str(artifact.path("tokenizer.json")))
    whole.no_padding()
    whole.enable_truncation(8)
    tokenizer = TextTokenizer(artifact, 8)
    texts = ["the river " * 50, " " * 5000 + "river", "x" * 700, "capital" * 400, "\u6cb3" * 300, "short", ""]
    found = tokenizer.encode(texts)
    assert [ids for ids, _ in found] == [whole.encode(text).ids for text in texts]
    assert [cut for _, cut in found] == [True, True, True, True, True, False, False]


def test_batches_hold_what_a_step_has_room_for():
    sequences = WholeSequences(FakeExecutor(), pages=10, tokens=20)  # pages of 4 tokens
    parts = [(part.start, part.stop) for part in sequences.batches([8, 12, 1, 19, 20, *[1] * 11])]
    assert parts == [(0, 2), (2, 4), (4, 5), (5, 15), (15, 16)]
    assert list(sequences.batches([])) == []


def test_sequences_of_a_step_get_pages_of_their_own():
    executor = FakeExecutor()
    executor.allocate_kv(10)
    executor.keep_steps = True
    sequences = [[5, 6, 7, 8, 9], [1], [2, 3, 4, 5]]
    found = WholeSequences(executor, pages=10).step(sequences, "last")
    (inputs,) = executor.steps
    assert isinstance(inputs, StepInputs) and inputs.block_table.tolist() == [[0, 1], [2, 0], [3, 0]]
    assert inputs.slot_mapping.tolist() == [0, 1, 2, 3, 4, 8, 12, 13, 14, 15]
    for one, row in zip(sequences, found, strict=True):
        executor.allocate_kv(10)
        assert np.array_equal(WholeSequences(executor, pages=10).step([one], "last")[0], row)


def test_a_closed_embedder_says_so(artifact: Artifact):
    found = Embedder(artifact)
    found.close()
    with pytest.raises(InputError, match="was closed"):
        found.embed_query("x")


def test_modules_that_are_not_compiled_are_refused(tmp_path: Path):
    folder = tiny_folder_of_sentences(tmp_path / "m")
    kinds = ["Transformer", "Pooling", "LSTM"]
    parts = [{"idx": i, "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(parts))
    with pytest.raises(InputError, match=r"modules\.json puts LSTM"):
        llmc.compile(folder, tmp_path / "m.llmc", targets=["null"])
    (folder / "modules.json").write_text("{}")
    with pytest.raises(InputError, match=r"modules\.json holds no list"):
        llmc.compile(folder, tmp_path / "m.llmc", targets=["null"])


def test_a_snapshot_says_how_vectors_are_made_or_the_hub_is_asked(tmp_path: Path):
    """Another program keeps no more of a repository than it reads."""
    snapshot = tmp_path / "models--x--y" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    assert not embedder_source._says_all(snapshot)
    missing = tmp_path / "models--x--y" / ".no_exist" / "0123"
    missing.mkdir(parents=True)
    (missing / "modules.json").touch()
    assert embedder_source._says_all(snapshot)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense", "3_Normalize": "Normalize"}
    parts = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (snapshot / "modules.json").write_text(json.dumps(parts))
    for name in ("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"):
        assert not embedder_source._says_all(snapshot)
        (snapshot / name).parent.mkdir(exist_ok=True)
        (snapshot / name).touch()
    assert embedder_source._says_all(snapshot)


def test_the_server_ranks_by_the_same_vectors(artifact: Artifact, embedder: Embedder):
    """Before the query and the documents stands what the model wants there."""
    documents = ["The river was wide and slow.", "河は広かった。", "x"]
    with RunningServer({"m": llmc.load(artifact.root)}) as server:
        asked = {"query": "How wide?", "documents": documents}
        status, answer, _ = server.post("/v1/rerank", asked)
    assert status == 200
    found = {one["index"]: one["relevance_score"] for one in answer["results"]}
    wanted = embedder.embed_passages(documents) @ embedder.embed_query("How wide?")
    np.testing.assert_allclose([found[i] for i in range(3)], wanted, atol=1e-6)


# Which vectors can be compared -----------------------------------------------------------------------------


def test_the_hash_tells_apart_what_cannot_be_compared(artifact: Artifact):
    def changed(**model: Any) -> Artifact:
        manifest = copy.deepcopy(artifact.manifest)
        manifest["model"] |= model
        return Artifact(artifact.root, manifest)

    own = embedder_hash(artifact)
    assert embedder_hash(changed()) == own and len(own) == 32
    assert embedder_hash(changed(name="another name")) == own
    others = [
        changed(pooling="cls"),
        changed(max_seq_length=LONGEST - 1),
        changed(prompts={**PROMPTS, "query": ""}),
    ]
    weights = copy.deepcopy(artifact.manifest)
    weights["files"][artifact.target("onnx-cpu")["weights"]]["sha256"] = "0" * 64
    others.append(Artifact(artifact.root, weights))
    assert len({own, *map(embedder_hash, others)}) == 5


# Where embedders come from ---------------------------------------------------------------------------------


class Compilations:
    """Stands for `llmc compile`: writes down what was asked for, and makes a folder with a manifest."""

    def __init__(self) -> None:
        self.models: list[str] = []
        self.notes: list[str] = []
        self.error: InputError | None = None

    def __call__(self, model: str, place: Path) -> None:
        self.models.append(model)
        if self.error is not None:
            raise self.error
        place.mkdir(parents=True)
        (place / MANIFEST).write_text("{}")

    def find(self, spec: str | None) -> Path | None:
        return find_artifact(spec, self.notes.append)


@pytest.fixture
def compilations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compilations:
    """No environment of the developer's own: empty caches, and a hub at a port where nobody listens."""
    for name in ("LLMC_EMBEDDER", "HF_HUB_CACHE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    made = Compilations()
    monkeypatch.setattr(embedder_source, "_compile", made)
    return made


def hub_snapshot(home: Path) -> Path:
    """The default model as Hugging Face's cache would hold it."""
    repository = home / "hub" / f"models--{DEFAULT.replace('/', '--')}"
    snapshot = repository / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123\n")
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (snapshot / name).write_text("{}")
    return snapshot


def test_none_is_none(compilations: Compilations):
    assert [compilations.find(spec) for spec in (None, "", "none")] == [None] * 3
    assert not compilations.models and not compilations.notes


def test_auto_without_a_model_or_a_hub_is_none_with_a_note(
    compilations: Compilations, monkeypatch: pytest.MonkeyPatch
):
    assert compilations.find("auto") is None
    (note,) = compilations.notes
    assert "the hub cannot be reached" in note and "llmc rag embed" in note and "LLMC_EMBEDDER" in note
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(embedder_source.subprocess, "run", None)  # the network is not even tried
    assert compilations.find("auto") is None
    assert "HF_HUB_OFFLINE forbids" in compilations.notes[1] and not compilations.models


def test_auto_goes_from_the_variable_to_the_caches(
    compilations: Compilations, artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    snapshot = hub_snapshot(tmp_path / "hf")
    made = compilations.find("auto")
    assert made is not None and compilations.models == [str(snapshot)]
    assert made.parent == tmp_path / "cache" / "encoders" and "all-MiniLM-L6-v2" in made.name
    # What was compiled is taken from then on, the snapshot no longer needed.
    shutil.rmtree(tmp_path / "hf")
    assert compilations.find("auto") == made == compilations.find(DEFAULT) and len(compilations.models) == 1
    monkeypatch.setenv("LLMC_EMBEDDER", str(artifact.root))
    assert compilations.find("auto") == artifact.root
    assert compilations.find(DEFAULT) == made  # what is named is taken, whatever the variable says
    monkeypatch.setenv("LLMC_EMBEDDER", "none")
    assert compilations.find("auto") is None and len(compilations.notes) == 1
    monkeypatch.setenv("LLMC_EMBEDDER", str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="nothing' is neither an artifact nor a model's folder or hub id"):
        compilations.find("auto")


def test_a_default_that_does_not_compile_is_none_with_the_reason(compilations: Compilations, tmp_path: Path):
    hub_snapshot(tmp_path / "hf")
    compilations.error = InputError("torch is not installed", remedy="pip install 'llmc[compile]'")
    assert compilations.find("auto") is None
    assert "torch is not installed" in compilations.notes[-1]
    with pytest.raises(InputError, match="torch is not installed"):
        compilations.find(DEFAULT)


def test_a_folder_is_compiled_once_for_what_its_files_hold(
    compilations: Compilations, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    own = shutil.copytree(folder, tmp_path / "model")
    first = compilations.find(str(own))
    assert compilations.models == [str(own)]
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere" / "model")
    assert compilations.find(str(elsewhere)) == first and len(compilations.models) == 1
    with monkeypatch.context() as patch:
        patch.setattr(embedder_source, "_hashed", None)  # not even hashed again
        assert compilations.find(str(own)) == first
    weights = own / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert compilations.find(str(own)) != first and len(compilations.models) == 2


@pytest.mark.parametrize("spec", ["no/such\0thing", "a/b/c", "../up", "x" * 5000, "~nobody-here/x", "a/../b"])
def test_what_names_nothing_is_refused(compilations: Compilations, spec: str):
    with pytest.raises(InputError, match="neither an artifact nor"):
        compilations.find(spec)


def test_folders_and_artifacts_that_are_no_encoder_are_refused(compilations: Compilations, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="neither an artifact nor a model"):
        compilations.find(str(tmp_path / "empty"))
    out = tmp_path / "lm.llmc"
    llmc.compile(save_tiny("llama", tmp_path / "lm"), out, targets=["null"])
    with pytest.raises(InputError, match="kind 'causal_lm', not an encoder"):
        open_embedder(str(out))


# The real one ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def passages(shared_data: Path) -> list[str]:
    with (shared_data / "hotpotqa500" / "corpus.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(next(file)) for _ in range(40)]
    return [f"{row['title']}. {row['text']}" for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize(("quant", "least"), [("none", 0.9999), ("int8", 0.995)])
def test_minilm_beside_transformers(quant: str, least: float, passages: list[str], tmp_path: Path):
    source = real_model("minilm")
    out = tmp_path / "minilm.llmc"
    llmc.compile(source, out, targets=[f"tvm-cpu:isa={ISA}"], quant=quant, verdict=False)
    wanted = expected(source, passages, 256)
    with Embedder(Artifact.open(out)) as embedder:
        assert embedder.max_tokens == 256
        vectors = embedder.embed_passages(passages)
        cosines = np.einsum("nd,nd->n", vectors, wanted)
        assert cosines.min() >= least, cosines.min()
        # These kernels promise it: a text's vector is the same alone, in a batch, and in another order.
        for i in (0, 7, 39):
            assert np.array_equal(embedder.embed_query(passages[i]), vectors[i])
        assert np.array_equal(embedder.embed_passages(passages[::-1])[::-1], vectors)
    with Embedder(Artifact.open(out), threads=1) as embedder:
        assert np.array_equal(embedder.embed_passages(passages[:20]), vectors[:20])


@pytest.mark.slow
def test_a_folder_is_compiled_into_the_cache_by_a_process_of_its_own(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path))
    notes: list[str] = []
    with open_embedder(str(folder), say=notes.append) as embedder:  # type: ignore[union-attr]
        # int8 and a cache of bfloat16 on a model of random numbers: real ones keep 0.999.
        wanted = expected(folder, ["text: " + text for text in TEXTS], LONGEST)
        assert np.einsum("nd,nd->n", embedder.embed_passages(TEXTS), wanted).min() > 0.99
    assert len(notes) == 1 and notes[0].startswith("compiling tiny")
    again = open_embedder(str(folder), say=notes.append)
    assert again is not None and again.hash == embedder.hash and len(notes) == 1
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(InputError, match="cannot be compiled: unknown architecture nonsense"):
        open_embedder(str(broken), say=notes.append)
