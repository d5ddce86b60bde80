"""Streamed text: whole characters only, the full decoding in the end, stop strings wherever tokens split
them.
"""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmc.runtime.detokenizer import StopStrings, StreamDecoder
from llmc.runtime.tokenizer import Tokenizer
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as HfTokenizer


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3, Qwen: every byte is a character of an alphabet; a few merged tokens hold parts of
    emoji.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: number for number, char in enumerate(alphabet)}
    merges = [("ð", "Ł"), ("h", "e"), ("Ġ", "t")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    inner = HfTokenizer(models.BPE(vocab=vocab, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<|end|>", special=True)])
    inner.add_tokens([AddedToken("<think>", special=False)])
    return Tokenizer(inner)


def byte_fallback(strip: bool) -> Tokenizer:
    """As Llama 2 and Gemma: pieces with ▁ for the space, and `<0xE2>` for bytes that no piece covers."""
    pieces = ["<unk>", "▁", "▁the", "▁a", "b", "c", "é", "."] + [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    inner = HfTokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if strip else parts)
    inner.add_special_tokens([AddedToken("</s>", special=True)])
    return Tokenizer(inner)


def word_piece() -> Tokenizer:
    vocab = {"[UNK]": 0, "un": 1, "##able": 2, "##s": 3, ",": 4, "don": 5, "'": 6, "t": 7}
    inner = HfTokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    inner.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return Tokenizer(inner)


TOKENIZERS = {
    "byte level": byte_level(),
    "byte fallback": byte_fallback(False),
    "byte fallback, stripped": byte_fallback(True),
    "word piece": word_piece(),
}


def _stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    parts = [decoder.push(token_id) for token_id in ids]
    return [*parts, decoder.finish()]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_any_tokens_give_the_full_decoding_in_the_end(name: str, data: st.DataObject):
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    assert "".join(_stream(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["byte level", "byte fallback", "byte fallback, stripped"])
@given(text=st.text(alphabet=st.sampled_from("abc é日本👩‍🚀🇨🇭 the.\n"), max_size=25))
@settings(deadline=None, max_examples=100)
def test_text_comes_in_whole_characters(name: str, text: str):
    tokenizer = TOKENIZERS[name]
    parts = _stream(tokenizer, tokenizer.encode(text))
    assert all("\ufffd" not in part for part in parts)
    assert "".join(parts) == tokenizer.decode(tokenizer.encode(text))


def test_a_split_emoji_comes_with_its_last_byte_and_ascii_at_once():
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer.encode("a😀b")
    parts = _stream(tokenizer, ids)
    assert parts[0] == "a"
    assert parts[-3:] == ["😀", "b", ""]
    assert set(parts[1:-3]) == {""}


def test_special_tokens_give_no_text_and_added_ones_do():
    tokenizer = TOKENIZERS["byte level"]
    end, think = (tokenizer.encode(text)[0] for text in ("<|end|>", "<think>"))
    ids = [*tokenizer.encode("he"), end, think, *tokenizer.encode(" t"), end]
    assert "".join(_stream(tokenizer, ids)) == "he<think> t"


def test_a_fork_goes_on_by_itself():
    tokenizer = TOKENIZERS["byte level"]
    first = tokenizer.encode("日")
    decoder = StreamDecoder(tokenizer)
    start = "".join(decoder.push(i) for i in first[:-1])
    other = decoder.fork()
    assert start + decoder.push(first[-1]) == "日"
    assert start + "".join(other.push(i) for i in tokenizer.encode("x")) + other.finish() == "\ufffdx"


STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3)


@given(text=st.text(alphabet="abc", max_size=20), stops=STOPS, cuts=st.lists(st.integers(0, 20)))
@settings(max_examples=400)
def test_stop_strings_do_not_depend_on_how_the_text_is_cut(text: str, stops: list[str], cuts: list[int]):
    places = sorted({0, len(text), *(cut for cut in cuts if cut <= len(text))})
    checker = StopStrings(stops)
    shown = ""
    for start, end in itertools.pairwise(places):
        shown += checker.push(text[start:end])
        assert not any(stop in shown for stop in stops)
    if checker.found is None:
        shown += checker.finish()
    # The definition: the first place where any of them is complete ends the text before the longest of those.
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    if not ends:
        assert (shown, checker.found) == (text, None)
    else:
        longest = max((stop for stop in stops if text[: ends[0]].endswith(stop)), key=len)
        assert (shown, checker.found) == (text[: ends[0] - len(longest)], longest)


def test_text_is_held_back_only_while_it_may_begin_a_stop_string():
    checker = StopStrings(["\nUser:"])
    assert checker.push("Hi\nUs") == "Hi"
    assert checker.push("ually, yes") == "\nUsually, yes"
    assert checker.push("\nUser") == ""
    assert checker.push(": more") == ""
    assert checker.found == "\nUser:"
    assert checker.push("anything") == ""


@pytest.mark.parametrize("name", ["byte level", "byte fallback"])
@given(text=st.text(alphabet=st.sampled_from("abc é日本👩‍🚀🇨🇭 the.\n"), min_size=1, max_size=25))
@settings(deadline=None, max_examples=100)
def test_bytes_of_tokens_are_those_of_the_text(name: str, text: str):
    tokenizer = TOKENIZERS[name]
    data = b"".join(tokenizer.token_bytes(token_id) for token_id in tokenizer.encode(text))
    assert data.decode() == tokenizer.decode(tokenizer.encode(text))


def test_bytes_of_added_tokens_are_their_text():
    tokenizer = TOKENIZERS["byte level"]
    (end,) = tokenizer.encode("<|end|>")
    assert tokenizer.token_bytes(end) == b"<|end|>"
    assert tokenizer.token_bytes(10**6) == b""
