"""A family of models works because its operations do: no family's name stands in the compiler."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

TABLES = {
    "frontend/tokenizer_rules.py": "GGUF names the rules of splitting text (tokenizer.ggml.pre) after models",
    "frontend/gguf_architectures.py": "GGUF names layouts of weights (general.architecture) after models",
    "frontend/gguf_hybrids.py": "those of recurrent layers",
    "frontend/gguf_encoders.py": "those of encoders",
    "frontend/gguf_fields.py": "what these layouts say of a model",
    "frontend/gguf_windows.py": "what they say of its windows",
    "frontend/quantized/__init__.py": "quantization_config names methods (quant_method) after models",
    "codegen/gguf/vocabulary.py": "the names of GGUF's rules of splitting text, to try them",
}
"""Files that hold names which a file format fixes; each is a table of them."""

OTHER_MEANINGS = {
    "data": "what a file holds",
    "dots": "products of vectors",
    "codegen": "the folder of targets",
    "git": "the program",
    "gpt": "a speaker in published conversations",
    "opt": "LLVM's option",
    "phi": "LLVM's instruction",
}
NAMES_OF_OTHERS = re.compile(
    r"llama\.cpp|llama[-_]vocab\.cpp|llama-gguf-split|llama_tensor_get_type|llama-quant|sentence_bert_config|\"llama3\""
)
"""Programs, a file that sentence-transformers writes, and a kind of rope_scaling in configurations."""


def families() -> set[str]:
    """The model types of transformers' tables of text models, and what stands before their versions."""
    from transformers.models.auto import modeling_auto as auto

    tables = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    )
    names = {name.replace("-", "_") for table in tables for name in table}
    stems = {re.split(r"_?\d", name)[0] for name in names}
    return {n for n in names | stems if len(n) > 2} - OTHER_MEANINGS.keys()


def found_in(text: str, names: set[str]) -> list[str]:
    """Lines that hold a name as a word, in any spelling of it ("Foo 2", "foo-2", "foo_2", "_FOO2")."""
    spelled = "|".join(re.escape(n).replace("_", "[-_ ]?") for n in sorted(names, key=lambda n: (-len(n), n)))
    word = re.compile(rf"(?<![a-z])(?:{spelled})(?![a-z])", re.IGNORECASE)
    return [line for line in text.splitlines() if word.search(NAMES_OF_OTHERS.sub("", line))]


@pytest.mark.parametrize("folder", ["frontend", "passes", "codegen"])
def test_no_family_is_named(folder: str) -> None:
    names = families()
    assert len(names) > 250 and {"llama", "qwen", "gemma", "mixtral", "bert"} <= names
    lines = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        if str(path.relative_to(ROOT)) not in TABLES
        for line in found_in(path.read_text(), names)
    ]
    assert not lines, "\n".join(lines)


def test_exempted_tables_are_there_and_do_name_families() -> None:
    names = families()
    for path in TABLES:
        assert found_in((ROOT / path).read_text(), names), f"{path} needs no exemption"


@pytest.mark.parametrize(
    "line", ["# as in Llama", "if qwen2:", "_GEMMA_3 = 1", 'kind == "mixtral"', "x_bert()"]
)
def test_a_name_is_found(line: str) -> None:
    assert found_in(line, families()) == [line]


@pytest.mark.parametrize(
    "line", ["data = 64", "llama.cpp reads it", "robust", "a_bit", "sentence_bert_config.json"]
)
def test_other_words_are_left_alone(line: str) -> None:
    assert not found_in(line, families())
