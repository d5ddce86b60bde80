"""Every rule of cutting text that GGUF files name, beside llama.cpp's own ids of the same vocabulary."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from llmc.frontend.gguf import read_gguf
from llmc.frontend.gguf_architectures import ARCHITECTURES
from llmc.frontend.gguf_tabled import named
from llmc.frontend.hard_strings import hard_strings
from llmc.frontend.tokenizer_gguf import build
from llmc.frontend.tokenizer_rules import RANKED, known_pre_tokenizers, read_tokenizer

from .gguf_files import F32, STRING, U32, byte_vocabulary, entry, write_gguf
from .llama_cpp import LlamaCpp
from .test_frontend_tokenizer import crossing_merges
from .test_gguf_gemma4 import VOCAB
from .test_gguf_gemma4 import vocabulary as ranked_vocabulary

# Where llama.cpp's expressions are not those that the vocabulary was published with, which are ours: it takes
# white space beyond ASCII for another character, every letter for one without case, and (in its code for
# Kimi) combining marks for no letters.
CASED = r"[a-z][A-Z]|[A-Z]{2}[a-z]"
DEVIATES: dict[str, str] = {
    **dict.fromkeys(("deepseek-llm", "deepseek-coder"), r"[^\S\x00-\x7f]"),
    **dict.fromkeys(("youtu", "tiny_aya", "cohere2moe"), CASED),
    "kimi-k2": CASED + r"|[\u0300-\u036f\u0900-\u109f\u1780-\u17ff\ufe0f\u0670\u064b-\u065f\u0591-\u05c7]",
}


def model_with(pre: str, path: Path) -> tuple[Path, int]:
    """A file that llama.cpp loads, with merges learned without any cutting; how many tokens, of which the
    last two are a begin and an end.
    """
    made: set[str] = set()
    merges: list[str] = []
    for merge in crossing_merges():
        result = merge.replace(" ", "")
        if result not in made:  # llama.cpp refuses a token that stands twice
            made.add(result)
            merges.append(merge)
    vocabulary = byte_vocabulary(["<|begin|>", "<|end|>"], merges, pre)
    count = 258 + len(merges)
    ends = [entry(f"tokenizer.ggml.{name}_token_id", U32, count - i) for name, i in (("bos", 2), ("eos", 1))]
    return model_of([*vocabulary, *ends], count, path), count


def model_of(vocabulary: list[bytes], count: int, path: Path) -> Path:
    """A file that llama.cpp loads, of these key-values of a vocabulary of `count` tokens."""
    arch = ARCHITECTURES["olmo2"]
    keys = {"block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 32}
    keys |= {"attention.head_count": 2, "attention.head_count_kv": 2}
    entries = [entry("general.architecture", STRING, arch.name)]
    entries += [entry(f"{arch.name}.{key}", U32, value) for key, value in keys.items()]
    entries.append(entry(f"{arch.name}.{arch.norm_key}", F32, 1e-6))
    name_of, tensors = named(arch, 1), dict[str, np.ndarray]()
    layer = {f"self_attn.{p}_proj": 2 for p in "qkvo"} | {f"mlp.{p}_proj": 2 for p in ("gate", "up", "down")}
    layer |= dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm"), 1)
    layer["post_feedforward_layernorm"] = 1
    for parameter, axes in layer.items():
        name = name_of(f"model.layers.0.{parameter}.weight")
        assert name is not None
        tensors[name] = np.ones((32,) * axes, np.float32)
    ends_of = {f"{name}.weight": np.ones((count, 32), np.float32) for name in ("token_embd", "output")}
    tensors |= {**ends_of, "output_norm.weight": np.ones(32, np.float32)}
    return write_gguf(path, [*entries, *vocabulary], tensors)


@pytest.mark.parametrize("pre", sorted(known_pre_tokenizers()))
def test_ids_are_llama_cpps(pre: str, tmp_path: Path) -> None:
    path, count = model_with(pre, tmp_path / "m.gguf")
    read = read_tokenizer(read_gguf(path))
    ours = build("m.gguf", read)
    deviates = re.compile(DEVIATES.get(pre, r"(?!)"))
    same = other = 0
    with LlamaCpp(path) as peer:
        for text in hard_strings(["<|end|>"]):
            theirs = peer.tokenize(text, special=True)
            begin = theirs[:1] == [count - 2]
            assert begin == read.add_bos
            ids = ours.encode(text, add_special_tokens=False).ids
            if deviates.search(text):
                other += 1
            else:
                same += 1
                assert ids == theirs[begin:], text
    assert same > 150 and other < 30


@pytest.mark.parametrize("pre", sorted(RANKED))
def test_ids_of_vocabularies_in_sentencepieces_manner(pre: str, tmp_path: Path) -> None:
    """Under the name of byte-level vocabularies: white space is U+2581, and bytes stand for what has no
    token.
    """
    entries = ranked_vocabulary(("gpt2", pre))
    path = model_of(entries, VOCAB, tmp_path / "m.gguf")
    read = read_tokenizer(read_gguf(path))
    ours = build("m.gguf", read)
    with LlamaCpp(path) as peer:
        for text in hard_strings(["<turn|>"]):
            theirs = peer.tokenize(text, special=True)
            assert ours.encode(text, add_special_tokens=False).ids == theirs[int(read.add_bos) :], text
