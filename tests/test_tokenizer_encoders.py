"""Vocabularies of encoders in GGUF files: ids are llama.cpp's, and what is refused. Those of scores
(`tokenizer.ggml.model` "t5"), of merges ("gpt2", by names that encoders have), and of words' pieces ("bert").
"""

from __future__ import annotations

import json
import struct
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from llmc.codegen.driver import compile_model
from llmc.frontend.charsmap import CharsMap
from llmc.frontend.gguf import GGUFFile, read_gguf
from llmc.frontend.hard_strings import HARD_STRINGS
from llmc.frontend.tokenizer_gguf import build, rewriting
from llmc.frontend.tokenizer_reference import ReferenceEncoder
from llmc.frontend.tokenizer_rules import read_tokenizer
from llmc.ir.errors import InputError
from llmc.runtime.loader import load

from .charsmaps import compiled, composing
from .gguf_files import BOOL, F32, I32, STRING, U32, array, assemble, byte_vocabulary, entry
from .llama_cpp import LlamaCpp
from .models import real_model
from .test_frontend_tokenizer import crossing_merges
from .test_gguf_encoders import tiny, written

U8 = 0
TEXTS = [
    *HARD_STRINGS,
    *(unicodedata.normalize("NFD", text) for text in HARD_STRINGS),
    "a<s>b</s> c<unk><mask>d <pad>",
    "\uff1cs\uff1e \uff21\uff22\uff23 \u2460\u0301 \u00aa\u0301 \ufb01 \uff76\uff9e",
    "\u0634\u064e\u062f\u0651\u064e\u0629 \u0634\u0651\u064e \u0645\u064f\u062d\u064e\u0645\u0651",
    "[PAD1] \u2581 \u2581a \u0651a",
    " \u200b a\u00a0\u3000 b \t",
]


@cache
def charsmap() -> bytes:
    return compiled(composing(TEXTS))


@cache
def pieces() -> tuple[tuple[str, float], ...]:
    """Of a model trained on the texts, as the library trains it."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(rewriting(CharsMap(charsmap(), "m")))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=1200, show_progress=False, unk_token="<unk>")
    tokenizer.train_from_iterator([text for text in HARD_STRINGS if len(text) < 400] * 3, trainer)
    vocab = json.loads(tokenizer.to_str())["model"]["vocab"]
    left_out = ("<unk>", "\0", "\u6c34", "\U0001f600")
    return tuple((token, score) for token, score in vocab if token not in left_out)


def entries(**changes: Any) -> dict[str, bytes]:
    """Metadata as llama.cpp's converter writes it for XLM-RoBERTa, each by its key."""
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *(token for token, _ in pieces()), "<mask>", "[PAD1]"]
    types = [3, 3, 3, 2, *[1] * len(pieces()), 4, 5]
    scores = [0.0] * 4 + [score for _, score in pieces()] + [0.0, -10000.0]
    found = {
        "model": entry("tokenizer.ggml.model", STRING, "t5"),
        "pre": entry("tokenizer.ggml.pre", STRING, "default"),
        "tokens": array("tokenizer.ggml.tokens", STRING, tokens),
        "scores": array("tokenizer.ggml.scores", F32, scores),
        "types": array("tokenizer.ggml.token_type", I32, types),
        "charsmap": bytes_of(charsmap()),
        **{f"{n}_token_id": entry(f"tokenizer.ggml.{n}_token_id", U32, i) for n, i in IDS.items()},
        **{n: entry(f"tokenizer.ggml.{n}", BOOL, True) for n in ("add_bos_token", "add_eos_token")},
    }
    for name in ("add_space_prefix", "remove_extra_whitespaces"):
        if name in changes:
            found[name] = entry(f"tokenizer.ggml.{name}", BOOL, changes.pop(name))
    found |= changes
    return {key: raw for key, raw in found.items() if raw}


IDS = {"bos": 0, "padding": 1, "eos": 2, "unknown": 3}


def bytes_of(data: bytes) -> bytes:
    head = entry("tokenizer.ggml.precompiled_charsmap", STRING, "")[:-12]
    return head + struct.pack("<IIQ", 9, U8, len(data)) + data


def header(made: dict[str, bytes], folder: Path) -> GGUFFile:
    path = folder / "model.gguf"
    path.write_bytes(assemble([entry("general.architecture", STRING, "bert"), *made.values()], [], b""))
    return read_gguf(path)


def compared(vocabulary: list[bytes], size: int, folder: Path, texts: list[str] = TEXTS) -> Any:
    """What is built, after its ids of the texts and the reference's were compared with llama.cpp's."""
    path = folder / "m.gguf"
    written(tiny("bert", vocab_size=size, num_hidden_layers=1), "bert", path, vocabulary=vocabulary)
    rules = read_tokenizer(read_gguf(path))
    reference, built = ReferenceEncoder(rules), build("m.gguf", rules)
    with LlamaCpp(path) as opened:
        for text in texts:
            wanted = opened.tokenize(text, special=True)
            assert reference.encode(text) == wanted, ascii(text)
            assert built.encode(text).ids == wanted, ascii(text)
    return built


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("mapped", [True, False])
def test_ids_equal_llama_cpp(merge: bool, prefix: bool, mapped: bool, tmp_path: Path) -> None:
    made = entries(add_space_prefix=prefix, remove_extra_whitespaces=merge)
    if not mapped:
        del made["charsmap"]
    built = compared(list(made.values()), len(pieces()) + 6, tmp_path)
    text = "mixed \u4e2d\u6587 and English"
    decoded = built.decode(built.encode(text).ids)
    assert decoded == text


def test_what_a_file_does_not_say(tmp_path: Path) -> None:
    """llama.cpp's own ids of special tokens, an end and no beginning, and spaces as they are."""
    ids = {f"{name}_token_id": b"" for name in IDS}
    made = entries(**ids, add_bos_token=b"", add_eos_token=b"", scores=b"", charsmap=b"")
    rules = read_tokenizer(header(made, tmp_path))
    assert (rules.bos, rules.eos, rules.unk, rules.pad) == (None, 1, 2, 0)
    assert (rules.add_bos, rules.add_eos, rules.space_prefix, rules.merge_spaces) == (False, True) + (
        False,
    ) * 2
    model = tiny("bert", vocab_size=len(pieces()) + 6, num_hidden_layers=1)
    path = written(model, "bert", tmp_path / "m.gguf", vocabulary=list(made.values()))
    built = build("m", rules)
    with LlamaCpp(path) as opened:
        for text in ("  a b ", "a\u6c34 \U0001f600", ""):
            assert built.encode(text).ids == opened.tokenize(text, special=True), text


def test_a_charsmap_rewrites_as_its_rules_say() -> None:
    rules = {"a": "b", "ab": "", "\u0301": " ", "abc\u00e9": "long", "\u00e9": "e\u0301"}
    found = CharsMap(compiled(rules), "m")
    text = "aabbabc\u00e9abc\u00e9\u00e9 \u6f22\U0001f600\0"
    assert found.rewritten(text) == "bblonglonge\u0301 \u6f22\U0001f600\0"
    assert not found.composes
    assert CharsMap(charsmap(), "m").composes


def _trie(data: bytes) -> int:
    return int(struct.unpack("<I", data[:4])[0])


def _with_word(data: bytes, at: int, word: int) -> bytes:
    return data[: 4 + 4 * at] + struct.pack("<I", word) + data[8 + 4 * at :]


def damaged() -> dict[str, tuple[dict[str, bytes], str]]:
    """What is wrong → metadata, and what is said of it."""
    data = compiled({"a": "b", "cd": "\u00e9"})
    long = compiled({"a" * 300: "b"})
    key = "tokenizer.ggml.precompiled_charsmap"
    text = entry(key, STRING, "abc")
    of = {
        "a text": (text, "no array of bytes"),
        "numbers": (array(key, I32, [1, 2]), "no array of bytes"),
        "three bytes": (bytes_of(b"abc"), "a trie of 0 bytes in 3"),
        "longer than it is": (bytes_of(struct.pack("<I", 1 << 20) + data[4:]), "a trie of 1048576 bytes"),
        "no whole blocks": (bytes_of(struct.pack("<I", 1026) + data[4:]), "a trie of 1026 bytes"),
        "a text without an end": (bytes_of(data[:-1]), "a text that does not end"),
        "no UTF-8": (bytes_of(data[:-1] + b"\xff\0"), "texts that are no UTF-8"),
        "a root outside": (bytes_of(_with_word(data, 0, 1 << 30)), "nodes outside of its trie"),
        "a child outside": (
            bytes_of(_with_word(data, 256 ^ ord("c"), ord("c") | 1 << 30)),
            "nodes outside of its trie",
        ),
        "a rule without a text": (
            bytes_of(_with_word(data, _trie(data) // 4 - 256, 1 << 31 | 999)),
            "rules without a text",
        ),
        "a rule within a character": (
            bytes_of(_with_word(data, _trie(data) // 4 - 256, 1 << 31 | 3)),
            "rules whose text begins within a character",
        ),
        "too long": (bytes_of(long), "rules for texts of more than 256 bytes"),
    }
    found = {
        what: ({"charsmap": raw}, f"precompiled_charsmap (has|is) {said}") for what, (raw, said) in of.items()
    }
    count = len(pieces()) + 6
    for name, number in (("infinity", np.inf), ("no number", np.nan)):
        scores = array("tokenizer.ggml.scores", F32, [0.0] * (count - 1) + [float(number)])
        found[name] = ({"scores": scores}, r"tokenizer\.ggml\.scores has a score that is no number")
    found["too few scores"] = (
        {"scores": array("tokenizer.ggml.scores", F32, [0.0])},
        r"tokenizer\.ggml\.scores does not have one number for each",
    )
    types = array("tokenizer.ggml.token_type", I32, [3] * count)
    found["no normal token"] = ({"types": types}, r"tokenizer\.ggml\.token_type names no normal token")
    unknown = entry("tokenizer.ggml.unknown_token_id", U32, count)
    found["another's unknown"] = ({"unknown_token_id": unknown}, f"unknown_token_id is {count}")
    return found


@pytest.mark.parametrize("what", damaged())
def test_what_is_damaged_is_refused(what: str, tmp_path: Path) -> None:
    changes, said = damaged()[what]
    with pytest.raises(InputError, match=said) as raised:
        read_tokenizer(header(entries(**changes), tmp_path))
    assert raised.value.remedy


def test_two_tokens_without_an_unknown_one(tmp_path: Path) -> None:
    made = {
        "model": entry("tokenizer.ggml.model", STRING, "t5"),
        "tokens": array("tokenizer.ggml.tokens", STRING, ["a", "b"]),
    }
    with pytest.raises(InputError, match=r"lacks tokenizer\.ggml\.unknown_token_id"):
        read_tokenizer(header(made, tmp_path))


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("pre", ["roberta-bpe", "modern-bert", "jina-v1-en", "jina-v2-code"])
def test_merges(pre: str, ends: bool, tmp_path: Path) -> None:
    merges = list({merge.replace(" ", ""): merge for merge in crossing_merges()}.values())
    first = 256 + len(merges)
    vocabulary = byte_vocabulary(["<|b|>", "<|e|>", "<|u|>", "<mask>"], merges, pre)
    ids = {"bos": first, "eos": first + 1, "seperator": first + 1, "unknown": first + 2}
    vocabulary += [entry(f"tokenizer.ggml.{name}_token_id", U32, i) for name, i in ids.items()]
    flags = ("add_bos_token", "add_eos_token", "add_sep_token") if ends else ()
    vocabulary += [entry(f"tokenizer.ggml.{name}", BOOL, True) for name in flags]
    compared(vocabulary, first + 4, tmp_path)


def pieces_of_words(tokens: list[str]) -> list[bytes]:
    """Metadata of a published vocabulary, as llama.cpp's converter writes it."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    spelled = [t if t in special else t[2:] if t[:2] == "##" else f"\u2581{t}" for t in tokens]
    names = ("padding", "unknown", "bos", "seperator", "mask")
    return [
        entry("tokenizer.ggml.model", STRING, "bert"),
        array("tokenizer.ggml.tokens", STRING, spelled),
        array("tokenizer.ggml.token_type", I32, [3 if t in special else 1 for t in tokens]),
        *(
            entry(f"tokenizer.ggml.{n}_token_id", U32, tokens.index(t))
            for n, t in zip(names, special, strict=True)
        ),
    ]


@pytest.mark.parametrize(
    "said",
    [{}, {"lowercase": False}, {"strip_accents": False}, {"lowercase": False, "strip_accents": True}],
)
def test_pieces_of_words(said: dict[str, bool], tmp_path: Path) -> None:
    """Marks of Indic scripts and the vowels of Hangul are gone where accents are, as in llama.cpp."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=1000, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(HARD_STRINGS, trainer)
    vocab = tokenizer.get_vocab()
    tokens = sorted(vocab, key=lambda token: vocab[token])
    vocabulary = pieces_of_words(tokens)
    vocabulary += [entry(f"tokenizer.ggml.normalizer.{name}", BOOL, value) for name, value in said.items()]
    compared(vocabulary, len(tokens), tmp_path)


def test_pieces_of_words_always_have_ends(tmp_path: Path) -> None:
    tokens = [*"abcdefgh", *(f"[unused{i}]" for i in range(95))]
    tokens[98:] = ["[PAD]", "[MASK]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = pieces_of_words(tokens)[:3]
    vocabulary += [entry(f"tokenizer.ggml.add_{n}_token", BOOL, False) for n in ("bos", "eos", "sep")]
    built = compared(vocabulary, len(tokens), tmp_path, ["a b", "", "x", "a[MASK]b"])
    assert built.encode("a b").ids == [101, 0, 1, 102]


def embedded(path: Path, folder: Path, texts: list[str]) -> np.ndarray[Any, Any]:
    """Vectors of texts by a file that is compiled, tokenizer and all."""
    artifact = compile_model(path, folder / "m.llmc", targets=["onnx-cpu"], kv_dtype="float32").artifact
    with load(artifact.root) as llm:
        return llm.embeddings(texts)


def by_llama_cpp(path: Path, texts: list[str]) -> np.ndarray[Any, Any]:
    with LlamaCpp(path) as opened:
        means = [opened.hidden(opened.tokenize(text, special=True)).mean(0) for text in texts]
    return np.stack([mean / np.linalg.norm(mean) for mean in means])


def test_texts_to_vectors(tmp_path: Path) -> None:
    """The means of hidden states, of texts that llama.cpp cuts by itself."""
    made = entries(add_space_prefix=True, remove_extra_whitespaces=True)
    model = tiny("bert", vocab_size=len(pieces()) + 6, type_vocab_size=1)
    texts = ["  mixed \u4e2d\u6587 and English ", "Zw\u00f6lf Boxka\u0308mpfer", "\u6c34 \U0001f600!"]
    plain = written(model, "bert", tmp_path / "m.gguf", vocabulary=list(made.values()))
    pooled = written(model, "bert", tmp_path / "p.gguf", vocabulary=list(made.values()), pooling_type=1)
    found = embedded(pooled, tmp_path, texts)
    np.testing.assert_allclose(found, by_llama_cpp(plain, texts), atol=5e-3)


@pytest.mark.slow
def test_a_published_encoder_as_a_file(tmp_path: Path) -> None:
    """all-MiniLM-L6-v2 with its vocabulary."""
    folder = real_model("minilm")
    model = transformers.AutoModel.from_pretrained(folder)
    vocabulary = pieces_of_words((folder / "vocab.txt").read_text().split("\n")[:-1])
    compared(vocabulary, 30522, tmp_path)
    texts = [
        "The river was wide and slow.",
        "Der Flu\u00df war breit; les bateaux \u00e9taient charg\u00e9s!",
    ]
    plain = written(model, "bert", tmp_path / "w.gguf", vocabulary=vocabulary)
    pooled = written(model, "bert", tmp_path / "p.gguf", vocabulary=vocabulary, pooling_type=1)
    found = embedded(pooled, tmp_path, texts)
    np.testing.assert_allclose(found, by_llama_cpp(plain, texts), atol=2e-3)
