"""Language models that rank: those with a head that classifies, and those whose answer is read off the logits
of "yes" and "no"; and classifiers of the mean of hidden states.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import llmc
import numpy as np
import pytest
import torch
import transformers
from llmc.codegen.driver import check_model
from llmc.frontend.source import open_source
from llmc.ir.errors import InputError
from llmc.runtime.rag.reranker import CrossEncoder

from .family_configs import small_config
from .models import save_tokenizer
from .server_harness import RunningServer
from .tvm_graphs import ISA

TARGETS = ["onnx-cpu", f"tvm-cpu:isa={ISA}"]
QUESTION = "What is the capital of France?"
PASSAGES = ["The capital of France is Paris.", "a", "The river was wide and slow. " * 4, ""]
YES, NO = 93, 47
SYSTEM = "Judge whether the passage answers the question."
TEMPLATE = (
    "{% set s = messages | selectattr('role', 'eq', 'system') | map(attribute='content') | first %}"
    "Instruct: {{ s | default('Find passages.') }}\n"
    "Query: {{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }}\n"
    "Document: {{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }}\n"
    "Answer{% if mark %}{{ mark }}{% endif %}:"
)


def saved(folder: Path, family: str, cls: str, **changes: Any) -> Any:
    """A tiny model of a class, saved with a tokenizer; as it is read again."""
    config = small_config(family)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    kind = getattr(transformers, cls)
    kind(config).eval().save_pretrained(folder)
    save_tokenizer(folder)
    return kind.from_pretrained(folder).eval()


def write_sentence_files(folder: Path, *, scored: dict[str, Any] | None, message: Any = None) -> None:
    """The files of sentence-transformers' CrossEncoder since 5.4."""
    kinds = ["Transformer", *(["LogitScore"] if scored is not None else [])]
    parts = [
        {"idx": i, "path": f"1_{kind}" if i else "", "type": f"sentence_transformers.x.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(parts))
    if scored is not None:
        (folder / "1_LogitScore").mkdir()
        (folder / "1_LogitScore" / "config.json").write_text(json.dumps(scored))
    if message is not None:
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        kwargs = {"chat_template": {"mark": "!", "restore_suffix": True}}
        given = {"modality_config": {"message": message}, "max_seq_length": 96, "processing_kwargs": kwargs}
        (folder / "sentence_bert_config.json").write_text(json.dumps(given))
        prompts = {"prompts": {"judge": SYSTEM}, "default_prompt_name": "judge"}
        (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))


def prompt_ids(folder: Path, passage: str, longest: int = 96) -> list[int]:
    """As sentence-transformers makes them: rendered, cut on the right, the template's end put back."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    asked = [("system", SYSTEM), ("query", QUESTION), ("document", passage)]
    messages = [{"role": role, "content": text} for role, text in asked]
    text = tokenizer.apply_chat_template(messages, chat_template=TEMPLATE, mark="!", tokenize=False)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    end = tokenizer("\nAnswer!:", add_special_tokens=False).input_ids
    return ids if len(ids) <= longest else [*ids[: longest - len(end)], *end]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", ["qwen3", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_a_language_model_that_is_asked_for_yes_or_no(tmp_path: Path, target: str, family: str):
    """As Qwen3-Reranker is published. Gemma 2 caps its logits behind the head."""
    folder = tmp_path / "m"
    cls = {"qwen3": "Qwen3ForCausalLM", "gemma2": "Gemma2ForCausalLM"}[family]
    model = saved(folder, family, cls)
    scored = {"true_token_id": YES, "false_token_id": NO}
    write_sentence_files(folder, scored=scored, message={"method": "forward", "format": "flat"})
    assert check_model(folder, targets=["null"]).facts["task"] == "classifier"
    artifact = llmc.compile(folder, tmp_path / "m.llmc", targets=[target], kv_dtype="float32")
    assert artifact.kind == "classifier" and artifact.model["labels"] == ["false", "true"]
    want = []
    for passage in PASSAGES:
        with torch.inference_mode():
            logits = model(torch.tensor([prompt_ids(folder, passage)])).logits[0, -1]
        want.append(float(logits[YES] - logits[NO]))
    assert len(prompt_ids(folder, PASSAGES[2])) == 96  # one is cut
    found = CrossEncoder(artifact)
    # Sums in float32, in another order: 1e-4 is ten times what was seen.
    np.testing.assert_allclose(found.scores(QUESTION, PASSAGES), want, atol=1e-4)
    found.close()
    with llmc.load(artifact.root) as llm:
        np.testing.assert_allclose(llm.rank(QUESTION, PASSAGES), want, atol=1e-4)
    # Of the head two rows are left.
    text = (artifact.root / "ir.txt").read_text()
    assert "float32[R, 2] = linear(" in text and f"[R, {model.config.vocab_size}]" not in text


def test_quantized_and_asked_for_yes_alone_over_http(tmp_path: Path):
    folder = tmp_path / "m"
    model = saved(folder, "qwen3", "Qwen3ForCausalLM")
    write_sentence_files(folder, scored={"true_token_id": YES}, message={"method": "forward"})
    artifact = llmc.compile(folder, tmp_path / "m.llmc", targets=[TARGETS[1]], quant="int8")
    want = []
    for passage in PASSAGES[:3]:
        with torch.inference_mode():
            want.append(float(model(torch.tensor([prompt_ids(folder, passage)])).logits[0, -1, YES]))
    with RunningServer({"m": llmc.load(artifact.root)}) as server:
        asked = {"model": "m", "query": QUESTION, "documents": PASSAGES[:3]}
        status, answer, _ = server.post("/v1/rerank", asked)
    assert status == 200
    scores = {one["index"]: one["relevance_score"] for one in answer["results"]}
    found = np.array([scores[i] for i in range(3)])
    # The endpoint gives probabilities; int8 weights of a tiny model move a logit by some hundredths.
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-np.array(want))), atol=0.03)


def test_special_tokens_of_a_passage_are_text(tmp_path: Path):
    """A passage that holds the tokens of the template cannot end its part of the prompt."""
    folder = tmp_path / "m"
    saved(folder, "qwen3", "Qwen3ForCausalLM")
    write_sentence_files(folder, scored={"true_token_id": YES}, message={"method": "forward"})
    artifact = llmc.compile(folder, tmp_path / "m.llmc", targets=["null"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    special = next(iter(tokenizer.all_special_tokens))
    from llmc.runtime.text_encoding import TextTokenizer

    ((ids, types),) = TextTokenizer(artifact, 96).encode_pairs(QUESTION, [f"x {special} y"])
    assert tokenizer.convert_tokens_to_ids(special) not in ids and set(types) == {0}
    assert prompt_ids(folder, "x y")[:8] == ids[:8]


@pytest.mark.parametrize("family", ["qwen3:Qwen3", "llama:Llama", "gpt2:GPT2", "gemma3_text:Gemma3Text"])
def test_decoders_with_a_head_that_classifies(tmp_path: Path, family: str):
    name, _, cls = family.partition(":")
    folder = tmp_path / "m"
    model = saved(folder, name, f"{cls}ForSequenceClassification", num_labels=2, pad_token_id=0)
    artifact = llmc.compile(folder, tmp_path / "m.llmc", targets=["onnx-cpu"], kv_dtype="float32")
    assert artifact.model["scored"] == "last" and open_source(folder).task == "classifier"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    want = []
    for passage in PASSAGES:
        with torch.inference_mode():
            scores = model(**tokenizer([[QUESTION, passage]], return_tensors="pt")).logits[0]
        want.append(float(scores[1] - scores[0]))
    with llmc.load(artifact.root) as llm:
        np.testing.assert_allclose(llm.rank(QUESTION, PASSAGES), want, atol=1e-5)


def test_padding_at_the_end_is_left_out(tmp_path: Path):
    """A decoder's padding is mostly its end of text, which a tokenizer may append: transformers takes the
    last token before it.
    """
    from tokenizers import processors

    folder = tmp_path / "m"
    model = saved(folder, "qwen3", "Qwen3ForSequenceClassification", num_labels=1, pad_token_id=2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    end = tokenizer.convert_ids_to_tokens(2)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B:1 {end}:1", special_tokens=[(end, 2)]
    )
    tokenizer.save_pretrained(folder)
    artifact = llmc.compile(folder, tmp_path / "m.llmc", targets=["onnx-cpu"], kv_dtype="float32")
    assert artifact.model["padding"] == 2
    want = []
    for passage in PASSAGES[:3]:
        ids = tokenizer([[QUESTION, passage]], return_tensors="pt").input_ids
        assert ids[0, -1] == 2
        with torch.inference_mode():
            want.append(float(model(ids).logits[0, 0]))
    with llmc.load(artifact.root) as llm:
        np.testing.assert_allclose(llm.rank(QUESTION, PASSAGES[:3]), want, atol=1e-5)


def test_a_prompt_before_the_question_without_a_template(tmp_path: Path):
    folder = tmp_path / "m"
    model = saved(folder, "llama", "LlamaForSequenceClassification", num_labels=1)
    write_sentence_files(folder, scored=None)
    prompts = {"prompts": {"judge": SYSTEM}, "default_prompt_name": "judge"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    artifact = llmc.compile(folder, tmp_path / "m.llmc", targets=["onnx-cpu"], kv_dtype="float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer([[SYSTEM + QUESTION, PASSAGES[0]]], return_tensors="pt").input_ids
    with llmc.load(artifact.root) as llm, torch.inference_mode():
        np.testing.assert_allclose(llm.rank(QUESTION, PASSAGES[:1]), model(ids).logits[0], atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2:GPT2", "xlm-roberta:XLMRoberta"])
def test_the_users_own_module_stays_as_it_is(kind: str, tmp_path: Path):
    name, _, cls = kind.partition(":")
    config = small_config(name)
    config.pad_token_id, config.architectures = 1, [f"{cls}ForSequenceClassification"]
    model = getattr(transformers, config.architectures[0])(config).eval()
    llmc.compile(model, tmp_path / "m.llmc", targets=["null"])
    assert model.config.pad_token_id == 1


def test_a_configuration_that_checks_its_fields(tmp_path: Path):
    """No padding is a value that some configurations refuse."""
    folder = tmp_path / "m"
    saved(folder, "nomic_bert", "NomicBertForSequenceClassification")
    assert llmc.compile(folder, tmp_path / "m.llmc", targets=["null"]).kind == "classifier"


@pytest.mark.parametrize("target", TARGETS)
def test_a_classifier_of_the_mean(tmp_path: Path, target: str):
    """As gte-reranker-modernbert-base is published: a head behind the mean, which no single token gives."""
    folder = tmp_path / "m"
    model = saved(
        folder, "modernbert", "ModernBertForSequenceClassification", classifier_pooling="mean", num_labels=1
    )
    artifact = llmc.compile(folder, tmp_path / "m.llmc", targets=[target], kv_dtype="float32")
    assert artifact.model["alone"] is True
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    want = []
    for passage in PASSAGES:
        with torch.inference_mode():
            want.append(float(model(**tokenizer([[QUESTION, passage]], return_tensors="pt")).logits[0, 0]))
    found = CrossEncoder(artifact)
    np.testing.assert_allclose(found.scores(QUESTION, PASSAGES), want, atol=1e-5)
    found.close()


def test_rerankers_that_cannot_be_are_refused(tmp_path: Path):
    folder = tmp_path / "m"
    saved(folder, "qwen3", "Qwen3ForCausalLM")
    write_sentence_files(folder, scored={"true_token_id": YES}, message={"method": "forward"})
    numbers = itertools.count()

    def refused(path: Path, text: str, match: str) -> None:
        before = path.read_text()
        path.write_text(text)
        with pytest.raises(InputError, match=match):
            CrossEncoder(llmc.compile(folder, tmp_path / f"{next(numbers)}.llmc", targets=["null"]))
        path.write_text(before)

    tokens, config = folder / "1_LogitScore" / "config.json", folder / "sentence_bert_config.json"
    refused(tokens, '{"true_token_id": 99999}', r"scored by the tokens \[99999\]")
    refused(tokens, '{"false_token_id": 3}', "without ids of tokens")
    refused(tokens, '{"true_token_id": "yes"}', "without ids of tokens")
    refused(folder / "modules.json", '[{"type": "x.LogitScore", "path": "1_LogitScore"}]', "has LogitScore")
    there = json.loads((folder / "modules.json").read_text())
    outside = json.dumps([there[0], {**there[1], "path": "../m/1_LogitScore"}])
    refused(folder / "modules.json", outside, "reaches for other files")
    refused(config, '{"modality_config": {"message": {"format": "xml"}}}', "in the form 'xml'")
    for told in (
        '{"self": 1}',
        '{"x": NaN}',
        f'{{"x": 1{"0" * 400}}}',
        '{"x": [1]}',
        '{"x": "\\ud800"}',
        '{"a b": 1}',
    ):
        kwargs = f'{{"chat_template": {told}}}'
        given = f'{{"modality_config": {{"message": {{}}}}, "processing_kwargs": {kwargs}}}'
        refused(config, given, "tells the chat template")
    short = json.dumps({**json.loads(config.read_text()), "max_seq_length": 20})
    refused(config, short, "tokens, and a prompt may have 20")
    template = folder / "chat_template.jinja"
    kept = config.read_text()
    config.write_text('{"modality_config": {"message": {}}}')
    refused(template, "{{ messages[0].content.x.y }}", "fails on a question and a passage")
    config.write_text(kept)
    refused(template, "{{ messages[-1].content }}", "leaves out the question or the passage")
    template.unlink()
    with pytest.raises(InputError, match="into a chat template, and has none"):
        CrossEncoder(llmc.compile(folder, tmp_path / f"{next(numbers)}.llmc", targets=["null"]))
