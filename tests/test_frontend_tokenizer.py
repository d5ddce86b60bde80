"""Tokenizers and chat templates: ids equal to the source's, and what must be refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from llmc.frontend.chat_shapes import MESSAGE_SHAPES
from llmc.frontend.gguf import GGUFFile, read_gguf
from llmc.frontend.hard_strings import HARD_STRINGS, hard_strings
from llmc.frontend.source import open_source
from llmc.frontend.tokenizer import check_chat_template, compare, export_tokenizer
from llmc.frontend.tokenizer_gguf import build
from llmc.frontend.tokenizer_reference import ReferenceEncoder, byte_alphabet
from llmc.frontend.tokenizer_rules import GGUFTokenizer, known_pre_tokenizers, read_tokenizer
from llmc.ir.errors import CompileError, InputError, LlmcError, UnsupportedError
from llmc.runtime.chat_template import ChatTemplate

from .conftest import GOLDEN
from .gguf_files import (
    BOOL,
    F32,
    I32,
    STRING,
    U32,
    array,
    assemble,
    byte_vocabulary,
    entry,
    llama_entries,
    llama_tensors,
    write_gguf,
)
from .models import BOS, TURN, real_model, save_tiny, save_tokenizer, tiny_tokenizer


def render(
    template: str,
    messages: Sequence[Any],
    special: Mapping[str, str],
    prompt: bool,
    tools: Sequence[Any] | None,
) -> str:
    return ChatTemplate(template, special).render(messages, tools=tools, add_generation_prompt=prompt)


def _header(entries: list[bytes], folder: Path) -> GGUFFile:
    path = folder / "model.gguf"
    path.write_bytes(assemble([entry("general.architecture", STRING, "llama"), *entries], [], b""))
    return read_gguf(path)


@lru_cache
def crossing_merges() -> tuple[str, ...]:
    """Merges learned without any cutting, so that a wrong cut shows in the ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(vocab_size=1200, initial_alphabet=byte_alphabet(), show_progress=False)
    tokenizer.train_from_iterator(list(HARD_STRINGS) * 3, trainer)
    return tuple(" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"])


def _agree(rules: GGUFTokenizer, texts: Sequence[str]) -> Any:
    """The built tokenizer, after comparing it with the reference encoder on texts."""
    built = build("model.gguf", rules)
    reference = ReferenceEncoder(rules)
    assert compare(
        "model.gguf", lambda t, s: built.encode(t, add_special_tokens=s).ids, reference.encode, texts
    ) == len(texts)
    return built


# GGUF vocabularies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", sorted(known_pre_tokenizers()))
def test_each_pre_tokenizer_cuts_as_its_rules_say(pre: str, tmp_path: Path) -> None:
    merges = list(crossing_merges())
    rules = read_tokenizer(_header(byte_vocabulary(["<|end|>"], merges, pre), tmp_path))
    built = _agree(rules, hard_strings(["<|end|>"]))
    for text in HARD_STRINGS:
        assert (
            built.decode(built.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text
        )


CUTS: dict[str, tuple[str, list[str]]] = {
    "gpt-2": ("I'm  12345\n\n x", ["I", "'m", " ", " 12345", "\n\n", " x"]),
    "smollm": ("I'm  12345\n\n x", ["I", "'m", "  ", "1", "2", "3", "4", "5", "\n\n", " x"]),
    "llama-bpe": ("I'M  12345\n\n x", ["I", "'M", " ", " ", "123", "45", "\n\n", " x"]),
    "qwen2": ("I'M  123\n\n x!!\n", ["I", "'M", " ", " ", "1", "2", "3", "\n\n", " x", "!!\n"]),
    "default": ("I'm 12345", ["I", "'", "m", " ", "123", "45"]),
    "deepseek-v3": ("ab12345漢字c", ["ab", "123", "45", "漢字", "c"]),
    "gpt-4o": ("HelloWorld's", ["Hello", "World's"]),
    "tekken": ("HelloWorld12", ["Hello", "World", "1", "2"]),
}


@pytest.mark.parametrize("pre", CUTS)
def test_cuts_by_example(pre: str, tmp_path: Path) -> None:
    text, pieces = CUTS[pre]
    rules = read_tokenizer(_header(byte_vocabulary(pre=pre), tmp_path))
    cut = build("model.gguf", rules).pre_tokenizer.pre_tokenize_str(text)
    alphabet = {char: byte for byte, char in enumerate(byte_alphabet())}
    assert [bytes(alphabet[c] for c in piece).decode() for piece, _ in cut] == pieces


def test_whole_pieces_are_taken_before_merging(tmp_path: Path) -> None:
    entries = byte_vocabulary(merges=["a b", "b c"], pre="llama-bpe")
    tokens = [*byte_alphabet(), "ab", "bc", "abc"]
    entries[2] = array("tokenizer.ggml.tokens", STRING, tokens)
    entries[3] = array("tokenizer.ggml.token_type", I32, [1] * len(tokens))
    rules = read_tokenizer(_header(entries, tmp_path))
    built = _agree(rules, ["abc", "abcabc", "xabc abc"])
    assert built.encode("abc", add_special_tokens=False).ids == [258]


def _spm_entries(space_prefix: bool | None = None, **flags: int) -> list[bytes]:
    """A SentencePiece vocabulary: control, bytes, letters, and words made by scores."""
    words = [
        "\u2581", "a", "b", "c", "\u2581a", "ab", "\u2581ab", "bc", "aa", "aaa", "aaaa", "\u2581b", "abc",
        "é", "\u2581\u2581", "\u2581\u2581\u2581",
    ]  # fmt: skip
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words, "<mask>", "  "]
    types = [2, 3, 3, *[6] * 256, *[1] * len(words), 4, 4]
    scores = [0.0] * 259 + [-float(i) for i in range(len(words))] + [0.0, 0.0]
    entries = [
        entry("tokenizer.ggml.model", STRING, "llama"),
        array("tokenizer.ggml.tokens", STRING, tokens),
        array("tokenizer.ggml.token_type", I32, types),
        array("tokenizer.ggml.scores", F32, scores),
        entry("tokenizer.ggml.bos_token_id", U32, 1),
        entry("tokenizer.ggml.eos_token_id", U32, 2),
        *(entry(f"tokenizer.ggml.{key}", BOOL, value) for key, value in flags.items()),
    ]
    if space_prefix is not None:
        entries.append(entry("tokenizer.ggml.add_space_prefix", BOOL, int(space_prefix)))
    return entries


@pytest.mark.parametrize("space_prefix", [None, True, False])
def test_sentencepiece_by_scores(space_prefix: bool | None, tmp_path: Path) -> None:
    rules = read_tokenizer(_header(_spm_entries(space_prefix), tmp_path))
    texts = [*hard_strings(["<s>", "</s>", "<mask>"]), "a" * 9, "ab ab", "aab<s>ab", "abc", " abc", "a  b"]
    built = _agree(rules, texts)
    assert rules.add_bos
    assert not rules.add_eos
    assert built.encode("", add_special_tokens=True).ids == [1]
    assert built.decode(built.encode("ab é 漢", add_special_tokens=False).ids) == "ab é 漢"
    first = rules.tokens[built.encode("ab", add_special_tokens=False).ids[0]]
    assert first == ("ab" if space_prefix is False else "\u2581ab")


def test_begin_and_end_are_added_as_the_file_says(tmp_path: Path) -> None:
    rules = read_tokenizer(_header(_spm_entries(add_bos_token=0, add_eos_token=1), tmp_path))
    built = _agree(rules, list(HARD_STRINGS))
    assert built.encode("a").ids[-1] == 2
    assert built.encode("a").ids[0] != 1


def test_wordpiece(tmp_path: Path) -> None:
    words = [
        "\u2581un",
        "want",
        "ed",
        "\u2581run",
        "ning",
        "\u2581,",
        "\u2581漢",
        "\u2581e",
        "\u2581!",
        "\u2581want",
    ]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    entries = [
        entry("tokenizer.ggml.model", STRING, "bert"),
        array("tokenizer.ggml.tokens", STRING, tokens),
        array("tokenizer.ggml.token_type", I32, [3] * 5 + [1] * len(words)),
        entry("tokenizer.ggml.bos_token_id", U32, 2),
        entry("tokenizer.ggml.seperator_token_id", U32, 3),
        entry("tokenizer.ggml.unknown_token_id", U32, 1),
    ]
    rules = read_tokenizer(_header(entries, tmp_path))
    built = _agree(
        rules, ["UNwanted, running!", "é 漢漢", "xyz want", "", "unwant edrunning", "want\u0301ed"]
    )
    assert built.encode("unwanted, want").ids == [2, 5, 6, 7, 10, 14, 3]


@pytest.mark.parametrize(
    ("change", "kind", "reason"),
    [
        ([entry("tokenizer.ggml.model", STRING, "rwkv")], UnsupportedError, "tokenizer model 'rwkv'"),
        (byte_vocabulary(pre="martian"), UnsupportedError, "pre-tokenizer 'martian'"),
        (byte_vocabulary()[:2], InputError, "no tokenizer.ggml.tokens"),
        (
            [*byte_vocabulary()[:3], array("tokenizer.ggml.token_type", I32, [1])],
            InputError,
            "token_type does not have one number for each",
        ),
        ([*byte_vocabulary()[:4], array("tokenizer.ggml.merges", STRING, ["ab"])], InputError, "is no pair"),
        (
            [*byte_vocabulary(), entry("tokenizer.ggml.bos_token_id", U32, 999)],
            InputError,
            "bos_token_id is 999",
        ),
    ],
)
def test_vocabularies_that_are_refused(
    change: list[bytes], kind: type[LlmcError], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(kind) as raised:
        read_tokenizer(_header(change, tmp_path))
    assert reason in str(raised.value)
    assert raised.value.remedy


def _golden(model: str) -> list[tuple[str, list[int]]]:
    lines = (GOLDEN / "llama_cpp_tokens.jsonl").read_text().splitlines()
    return [(text, ids) for name, text, ids in map(json.loads, lines) if name == model]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["smollm2", "gemma3", "qwen2.5-coder"])
def test_ids_equal_llama_cpp(model: str) -> None:
    """The golden file was written by llama.cpp itself (xllamacpp 2026.10, /tokenize with parse_special)."""
    rules = read_tokenizer(read_gguf(real_model(model)))
    reference, built = ReferenceEncoder(rules), build(model, rules)
    cases = _golden(model)
    assert len(cases) > 200
    for text, ids in cases:
        assert reference.encode(text, add_special=False) == ids, text
        assert built.encode(text, add_special_tokens=False).ids == ids, text


def _many_texts(shared_data: Path, count: int) -> list[str]:
    """Pieces of real text and random strings over many scripts."""
    import random

    lines = (shared_data / "wikitext2_raw" / "wiki.test.raw").read_text().splitlines()
    lines += (shared_data / "longtext" / "alice_in_wonderland.txt").read_text().split("\n\n")
    chosen = random.Random(0)
    texts = [line[: chosen.randrange(1, 400)] for line in chosen.sample(lines, min(len(lines), count // 2))]
    alphabet = sorted(set("".join(HARD_STRINGS)))
    while len(texts) < count:
        words = chosen.choices(HARD_STRINGS, k=2)
        noise = "".join(chosen.choices(alphabet, k=chosen.randrange(1, 30)))
        texts.append(words[0][chosen.randrange(20) :] + noise + words[1][: chosen.randrange(20)])
    return texts


@pytest.mark.slow
@pytest.mark.parametrize("model", ["smollm2", "gemma3", "qwen2.5-coder"])
def test_ten_thousand_texts(model: str, shared_data: Path) -> None:
    rules = read_tokenizer(read_gguf(real_model(model)))
    _agree(rules, _many_texts(shared_data, 10_000))


# Export ----------------------------------------------------------------------------------------------------


def test_gguf_export(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    entries = [
        *llama_entries(),
        *byte_vocabulary(["<|end|>"], list(crossing_merges()), "smollm"),
        entry("tokenizer.ggml.eos_token_id", U32, 256 + len(crossing_merges())),
        entry("tokenizer.chat_template", STRING, template),
    ]
    source = open_source(write_gguf(tmp_path / "m.gguf", entries, llama_tensors()))
    facts = export_tokenizer(source, tmp_path, render)
    assert facts is not None
    assert facts.kind == "byte-level BPE"
    assert facts.special_tokens == {"eos_token": "<|end|>"}
    assert facts.special_token_ids == {"eos_token": 256 + len(crossing_merges())}
    assert facts.checked_strings == len(hard_strings(["<|end|>"]))
    assert (tmp_path / "chat_template.jinja").read_text() == template
    assert facts.chat_template == "chat_template.jinja"
    first = (tmp_path / "tokenizer.json").read_bytes()
    export_tokenizer(source, tmp_path, render)
    assert (tmp_path / "tokenizer.json").read_bytes() == first


@pytest.mark.parametrize(
    ("left", "right", "short"),
    [("l", "o", True), (" ", "o", False), ("#version", "o", False)],
)
def test_merges_are_short_where_a_line_says_the_same(
    left: str, right: str, short: bool, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    parts = ["l", "o", "w", left, right, left + right]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(parts))}
    given = Tokenizer(models.BPE(vocab=vocab, merges=[(left, right)]))
    folder = save_tiny("llama", tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=given).save_pretrained(folder)
    export_tokenizer(open_source(folder), tmp_path)
    written = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    assert written == ([f"{left} {right}"] if short else [[left, right]])
    read = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert json.loads(read.to_str())["model"] == json.loads(given.to_str())["model"]
    assert read.encode(left + right).ids == given.encode(left + right).ids


def test_folder_export(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    source = open_source(save_tiny("llama", tmp_path / "model"))
    facts = export_tokenizer(source, tmp_path, render)
    assert facts is not None
    assert facts.special_tokens["bos_token"] == BOS
    assert (facts.adds_bos, facts.adds_eos) == (True, False)
    assert facts.chat_template == "chat_template.jinja"
    exported, original = Tokenizer.from_file(str(tmp_path / "tokenizer.json")), tiny_tokenizer()
    for text in hard_strings([TURN]):
        assert exported.encode(text).ids == original.encode(text).ids


def test_saved_truncation_and_padding_are_dropped(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    folder = save_tiny("llama", tmp_path / "model")
    limited = Tokenizer.from_file(str(folder / "tokenizer.json"))
    limited.enable_truncation(4)
    limited.enable_padding(length=8)
    limited.save(str(folder / "tokenizer.json"))
    export_tokenizer(open_source(folder), tmp_path)
    exported = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert len(exported.encode("a long text of many more tokens").ids) > 8
    assert len(exported.encode("a").ids) == 2


def test_a_difference_is_an_error_with_both_lists() -> None:
    def shorter(text: str, special: bool) -> list[int]:
        return [1, 2, 3] if text == "b" and special else [1]

    with pytest.raises(CompileError, match=r"tokenizer of m differs on 'b': \[1, 2, 3\] instead of \[1\]"):
        compare("m", shorter, lambda _, __: [1], ["a", "b"])


def test_export_compares_with_the_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A tokenizer built by other rules than the file's is noticed."""
    import llmc.frontend.tokenizer as exporting

    entries = [*llama_entries(), *byte_vocabulary(["<|end|>"], list(crossing_merges()), "smollm")]
    source = open_source(write_gguf(tmp_path / "m.gguf", entries, llama_tensors()))
    wrong = read_tokenizer(_header(byte_vocabulary(["<|end|>"], list(crossing_merges()), "gpt-2"), tmp_path))
    monkeypatch.setattr(exporting.tokenizer_gguf, "build", lambda name, rules: build(name, wrong))
    with pytest.raises(CompileError, match=r"tokenizer of m\.gguf differs on"):
        export_tokenizer(source, tmp_path)


def test_missing_and_damaged_tokenizer_files(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    source = open_source(folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {}}')
    with pytest.raises(InputError, match="tokenizer of model cannot be loaded"):
        export_tokenizer(source, tmp_path)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"model has no tokenizer\.json"):
        export_tokenizer(source, tmp_path)


def test_tokenizer_code_of_a_folder_is_not_run(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    save_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    facts = export_tokenizer(open_source(folder), tmp_path)
    assert facts is not None
    assert (tmp_path / facts.path).is_file()
    assert "evil" not in sys.modules


def test_a_module_has_no_tokenizer(tmp_path: Path) -> None:
    import torch

    assert export_tokenizer(open_source(torch.nn.Linear(2, 2)), tmp_path) is None


# Chat templates --------------------------------------------------------------------------------------------


def test_shapes_that_a_template_refuses_are_listed() -> None:
    template = (
        "{% for m in messages %}"
        "{% if m.role == 'system' and not loop.first %}{{ raise_exception('late') }}{% endif %}"
        "{{ m.role + ': ' + m.content }}\n{% endfor %}"
    )
    assert check_chat_template(template, {}, "m", render) == ["a late system message", "content in parts"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("\n{{ messages.__class__ }}", r"\(line 2\).*__class__"),
        ("{% if false %}\n\n{{ ''['__mro__'] }}{% endif %}", r"\(line 3\).*__mro__"),
        ("{{ ''|attr('__cla' ~ 'ss__') }}", "__class__"),
        ("{{ 'a'.format.__globals__ }}", "__globals__"),
        ("{% for m in messages %}", "fails on a user message"),
        ("{{ unclosed", "end of template"),
        ("{{ 'unclosed", "no valid jinja2"),
        ("{{ raise_exception('no') }}", "fails on a user message.*no"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
            "does not come to an end",
        ),
    ],
)
def test_templates_that_are_refused(template: str, reason: str) -> None:
    with pytest.raises(InputError, match=f"(?s)chat template of m.*{reason}"):
        check_chat_template(template, {}, "m", render)


def test_without_a_renderer_the_template_is_only_read() -> None:
    assert check_chat_template("{{ raise_exception('no') }}", {}, "m") == []
    with pytest.raises(InputError, match="__class__"):
        check_chat_template("{{ x.__class__ }}", {}, "m")


def test_generation_blocks_and_dunder_text_are_allowed() -> None:
    template = (
        "__init__ {% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    assert check_chat_template(template, {}, "m") == []
    assert check_chat_template(template, {}, "m", render) == []  # nor is a shape of messages refused


def test_a_hostile_template_leaves_no_file(tmp_path: Path) -> None:
    entries = [
        *llama_entries(),
        *byte_vocabulary(),
        entry("tokenizer.chat_template", STRING, "{{ x.__class__ }}"),
    ]
    source = open_source(write_gguf(tmp_path / "m.gguf", entries, llama_tensors()))
    with pytest.raises(InputError, match="chat template of tiny"):
        export_tokenizer(source, tmp_path, render)
    assert not (tmp_path / "chat_template.jinja").exists()


def test_message_shapes_have_distinct_names() -> None:
    names = [shape.name for shape in MESSAGE_SHAPES]
    assert len(set(names)) == len(names)
    assert any(shape.required for shape in MESSAGE_SHAPES)
