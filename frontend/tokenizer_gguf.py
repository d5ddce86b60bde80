"""A `tokenizer.json` for a GGUF file, which carries a vocabulary but no such file."""

from __future__ import annotations

import unicodedata
from functools import cache
from typing import Any, Final

import numpy as np

from ..ir.errors import InputError
from .charsmap import CharsMap
from .tokenizer_rules import CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, GGUFTokenizer

_SPACE = "\u2581"  # how SentencePiece writes a space
_NEVER: Final = 1000.0
_PARTS: Final = "\ufdee"
_UNSORTED: Final = "\ufdef"
"""Characters that Unicode keeps for programs' own use; they part others and are gone in the end."""
_INITIALS, _VOWELS, _FINALS = "\u1100-\u1112", "\u1161-\u1175", "\u11a8-\u11c2"
"""What syllables of Hangul are composed of."""


def build(source: str, tokenizer: GGUFTokenizer) -> Any:
    """A `tokenizers.Tokenizer` with the file's vocabulary, special tokens and begin/end tokens.

    Args:
        source: the file's name, for errors.
    """
    makers = {
        "bpe": _byte_level,
        "spm": _sentencepiece,
        "ranked": _sentencepiece,
        "unigram": _unigram,
        "wordpiece": _wordpiece,
    }
    try:
        built = makers[tokenizer.kind](tokenizer)
        _add_special(built, tokenizer)
        _add_post_processor(built, tokenizer)
    except Exception as error:  # the library raises bare Exception for any contradiction in a vocabulary
        raise InputError(
            f"the tokenizer of {source} cannot be built: {error}", remedy="download the file again"
        ) from error
    return built


def _byte_level(t: GGUFTokenizer) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: i for i, token in enumerate(t.tokens)}
    merges = [(a, b) for a, b in t.merges if a in vocab and b in vocab and a + b in vocab]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=t.whole_pieces))
    steps: list[Any] = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in t.splits]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(t: GGUFTokenizer) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocab = {token: i for i, token in enumerate(t.tokens)}
    listed = [(a, b) for a, b in t.merges if a in vocab and b in vocab and a + b in vocab]
    model = models.BPE(
        vocab=vocab,
        merges=listed if t.kind == "ranked" else _merges_of_scores(t, vocab),
        unk_token=None if t.unk is None else t.tokens[t.unk],
        byte_fallback=True,
        fuse_unk=False,
    )
    tokenizer = Tokenizer(model)
    replace = normalizers.Replace(" ", _SPACE)
    prefixed = normalizers.Sequence([normalizers.Prepend(_SPACE), replace])
    tokenizer.normalizer = prefixed if t.space_prefix else replace
    if t.line_prefix:  # the library replaces no empty matches: the first line is prefixed, then looked at
        first = normalizers.Replace(Regex(rf"\A{_SPACE}(?=[{_SPACE}\n])"), "")
        others = normalizers.Replace(Regex(rf"\n(?=[^{_SPACE}\n])"), f"\n{_SPACE}")
        tokenizer.normalizer = normalizers.Sequence([prefixed, first, others])
    if t.splits:
        cuts = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in t.splits]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if t.space_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges_of_scores(t: GGUFTokenizer, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The merges that scores imply: every way to make a token of two others, tokens of higher score first."""
    allowed = np.isin(t.types, (CONTROL, UNKNOWN), invert=True)
    order = np.lexsort((np.arange(len(t.tokens)), -t.scores))
    merges: list[tuple[str, str]] = []
    for i in order:
        token = t.tokens[i]
        if not allowed[i] or vocab[token] != i:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                merges.append((left, right))
    return merges


def _unigram(t: GGUFTokenizer) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers

    pieces = np.isin(t.types, (NORMAL, USER_DEFINED, UNUSED))
    scores = np.where(t.types == USER_DEFINED, 0.0, t.scores.astype(np.float64))
    # The library finds any token in the text; a score that low is never part of the best cut.
    scores = np.where(pieces, scores, scores[pieces].min() - _NEVER)
    vocab = list(zip(t.tokens, scores.tolist(), strict=True))
    tokenizer = Tokenizer(models.Unigram(vocab=vocab, unk_id=t.unk, byte_fallback=False))
    steps: list[Any] = [] if t.charsmap is None else rewriting(t.charsmap)
    if t.merge_spaces:
        steps += [normalizers.Replace(Regex(" +"), " "), normalizers.Replace(Regex(r"\A | \z"), "")]
        steps += [normalizers.Prepend(_SPACE)]
    elif t.space_prefix:  # not where there are only spaces
        steps += [normalizers.Prepend(_SPACE), normalizers.Replace(Regex(rf"\A{_SPACE}(?= *\z)"), "")]
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    after: list[Any] = [decoders.Replace(_SPACE, " "), decoders.Fuse()]
    if t.merge_spaces or t.space_prefix:
        after.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(after)
    return tokenizer


def rewriting(charsmap: CharsMap) -> list[Any]:
    """Normalizers of the library that do what a charsmap says.

    `Precompiled` applies the map to clusters of up to five bytes, by the first rule that fits, and to single
    characters of longer ones. So clusters are parted before it, and what the map composes of parts is
    composed behind it, by Unicode's normal form; that would also sort marks, so marks out of its order are
    parted too.
    """
    from tokenizers import Regex, normalizers

    part = normalizers.Replace(Regex(r"(?!\A)(?=[\n\p{M}\u200c\u200d])"), _PARTS)
    steps: list[Any] = [part, normalizers.Precompiled(charsmap.data), normalizers.Replace(_PARTS, "")]
    if charsmap.composes:
        order = normalizers.Replace(Regex(_out_of_order()), _UNSORTED)
        steps = [order, *steps, normalizers.NFC(), normalizers.Replace(_UNSORTED, "")]
    return steps


@cache
def _out_of_order() -> str:
    """An expression for places between two marks that Unicode's normal forms would exchange."""
    marks: dict[int, list[str]] = {}
    for code in range(0x110000):
        if (order := unicodedata.combining(chr(code))) != 0:
            marks.setdefault(order, []).append(chr(code))
    places: list[str] = []
    for order in sorted(marks)[:-1]:
        later = "".join(char for other, chars in sorted(marks.items()) if other > order for char in chars)
        places.append(f"(?<=[{later}])(?=[{''.join(marks[order])}])")
    return "|".join(places)


def _wordpiece(t: GGUFTokenizer) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    def spelled(i: int, token: str) -> str:
        # GGUF marks the start of a word, the published vocabulary its continuation. The mark alone continues.
        if token.startswith(_SPACE) and token != _SPACE:
            return token[1:]
        return token if t.types[i] == CONTROL or (token[:1] == "[" and token[-1:] == "]") else "##" + token

    vocab = {spelled(i, token): i for i, token in enumerate(t.tokens)}
    unk = "[UNK]" if t.unk is None else spelled(t.unk, t.tokens[t.unk])
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token=unk, max_input_chars_per_word=1 << 20))
    tokenizer.normalizer = normalizers.Sequence(_letters(t))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


def _letters(t: GGUFTokenizer) -> list[Any]:
    """Normalizers of the library that do to the letters of words what llama.cpp does: of a composed character
    it leaves the first, a syllable's consonant too; marks and controls are gone.
    """
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if t.strip_accents:
        apart = normalizers.Replace(Regex(rf"(?!\A)(?=[{_VOWELS}{_FINALS}])"), _PARTS)
        rest = normalizers.Replace(Regex(rf"(?<=[{_INITIALS}{_VOWELS}])[{_VOWELS}{_FINALS}]"), "")
        steps += [apart, normalizers.NFD(), rest, normalizers.Replace(Regex(r"\p{M}"), "")]
    gone = rf"[\ufffd{_PARTS}]|(?![\t-\r\u0085])[\p{{Cc}}\p{{Cf}}\p{{Co}}]"
    steps.append(normalizers.Replace(Regex(gone), ""))
    # A token that begins a word is found within one too, behind the sign that it begins with.
    letter = rf"[^\s\p{{P}}$+<=>^`|~{_SPACE}]"
    steps.append(normalizers.Replace(Regex(f"(?<={letter}){_SPACE}(?={letter})"), " "))
    if t.lowercase:
        steps.append(normalizers.Replace("\u0130", "i"))
    steps.append(normalizers.BertNormalizer(clean_text=False, strip_accents=False, lowercase=t.lowercase))
    return steps


def _add_special(tokenizer: Any, t: GGUFTokenizer) -> None:
    """Tokens that are matched whole in the text; those for control are hidden when decoding."""
    from tokenizers import AddedToken

    for kinds, special in (((CONTROL, UNKNOWN), True), ((USER_DEFINED,), False)):
        ids = np.flatnonzero(np.isin(t.types, kinds))
        added = [AddedToken(t.tokens[i], normalized=False, special=special) for i in ids if t.tokens[i]]
        if special:
            tokenizer.add_special_tokens(added)
        else:
            tokenizer.add_tokens(added)


def _add_post_processor(tokenizer: Any, t: GGUFTokenizer) -> None:
    from tokenizers import processors

    begin = [t.bos] if t.add_bos and t.bos is not None else []
    end = [t.eos] if t.add_eos and t.eos is not None else []
    if begin or end:
        named = {t.tokens[i]: i for i in (*begin, *end)}
        parts = [*(t.tokens[i] for i in begin), "$A", *(t.tokens[i] for i in end)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[f"{part}:0" if part == "$A" else part for part in parts],
            special_tokens=list(named.items()),
        )
