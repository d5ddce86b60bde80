"""What a GGUF file says about its tokenizer, and the rules that go with each kind.

The file names a kind (`tokenizer.ggml.model`) and, for byte-pair encodings, how text is cut before merging
(`tokenizer.ggml.pre`). The expressions that belong to each name are facts about the models, as llama.cpp
records them (llama-vocab.cpp, `llm_tokenizer_bpe`); they are applied one after the other, each inside the
pieces of the one before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ..ir.errors import InputError, UnsupportedError
from .charsmap import KEY as CHARSMAP
from .charsmap import CharsMap
from .gguf import GGUFFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_CONTRACTION: Final = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_TAIL: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3: Final = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _TAIL
_QWEN2: Final = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _TAIL
_UPPER: Final = r"(?=\p{L})[^a-z]"
_LOWER: Final = r"(?=\p{L})[^A-Z]"
_UPPER_OR_MARK: Final = r"(?=[\p{L}\p{M}])[^a-z]"
_LOWER_OR_MARK: Final = r"(?=[\p{L}\p{M}])[^A-Z]"
_SLASH_TAIL: Final = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD_A: Final = rf"[^\r\n\p{{L}}\p{{N}}]?(?:{_UPPER})*(?:{_LOWER})+"
_WORD_B: Final = rf"[^\r\n\p{{L}}\p{{N}}]?(?:{_UPPER})+(?:{_LOWER})*"
_TEKKEN: Final = rf"{_WORD_A}|{_WORD_B}|\p{{N}}|{_SLASH_TAIL}"
_GPT4O: Final = rf"{_WORD_A}{_CONTRACTION}?|{_WORD_B}{_CONTRACTION}?|\p{{N}}{{1,3}}|{_SLASH_TAIL}"
_CASED: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_CAPITALS: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_BEFORE: Final = r"[^\r\n\p{L}\p{N}]?"
_BY_CASE: Final = rf"{_BEFORE}{_CASED}{_CONTRACTION}?|{_BEFORE}{_CAPITALS}{_CONTRACTION}?"
_NO_HAN: Final = r"(?!\p{Han})"
_KIMI: Final = (
    r"\p{Han}+|"
    rf"{_BEFORE}(?:{_NO_HAN}[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}])*"
    rf"(?:{_NO_HAN}[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}])+{_CONTRACTION}?|"
    rf"{_BEFORE}(?:{_NO_HAN}[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}])+"
    rf"(?:{_NO_HAN}[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}])*{_CONTRACTION}?|"
    r"\p{N}{1,3}|" + _TAIL
)
# Letters with case, as the vocabulary's own expression has them: those of Georgian are left out.
_LETTERS: Final = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛ"
    "ὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-"
    "ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_DEEPSEEK: Final = (
    r"[\r\n]",
    rf"\s?[{_LETTERS}]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    r"[一-龥ࠀ-一가-퟿]+",
    r"\p{N}+",
)
_BLOOM: Final = r" ?[^(\s|.,!?…。，、।۔،)]+"
_CJK: Final = r"[一-龥ࠀ-一가-퟿]+"
_FALCON: Final = r"[\p{P}\$\+<=>\^~\|`]+"
_CODER_PUNCTUATION: Final = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
_DEEPSEEK3: Final = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    _CODER_PUNCTUATION
    + r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)

_WHITE: Final = "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4, "1,2"))

_SPLITS: Final[dict[str, tuple[str, ...]]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "smollm": (r"\p{N}", _GPT2),
    "falcon": (_FALCON, _GPT2, r"[0-9][0-9][0-9]"),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"),
    "deepseek-v3": _DEEPSEEK3,
    "tekken": (_TEKKEN,),
    "gpt-4o": (_GPT4O,),
    "bloom": (_BLOOM,),
    "viking": (_BLOOM, r"\p{N}"),
    "qwen35": (
        _CONTRACTION
        + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
        + r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "deepseek-llm": _DEEPSEEK,
    "kimi-k2": (_KIMI,),
    "bailingmoe": (
        r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    ),
    "seed-coder": (
        _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "exaone-moe": (
        _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
    ),
    "youtu": (
        r"[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+",
        rf"{_BY_CASE}|\p{{N}}|{_SLASH_TAIL}",
    ),
    "afmoe": (  # of digits, those in front of groups of three first
        r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))",
        "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf"
        "\u0e40-\u0e7f\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af"
        "\u1100-\u11ff]+",
        _DEEPSEEK3[2],
    ),
    "tiny_aya": (r"\d{1,3}(?=(?:\d{3})*\b)", rf"{_BY_CASE}|\p{{N}}{{1,3}}|{_SLASH_TAIL}"),
    "jais-2": (
        _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        rf"|{_WHITE}|\s",
    ),
    "minicpm5": (r"\p{N}{1,3}", _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+|" + _TAIL),
    "granite-embed-multi-97m": (
        rf"{_BEFORE}(?:{_UPPER_OR_MARK})*(?:{_LOWER_OR_MARK})+{_CONTRACTION}?"
        rf"|{_BEFORE}(?:{_UPPER_OR_MARK})+(?:{_LOWER_OR_MARK})*{_CONTRACTION}?"
        rf"|\p{{N}}{{1,3}}|{_SLASH_TAIL}",
    ),
    "laguna": (r"[^\n]+|[\n]+", _QWEN2),
}
_SAME: Final[dict[str, str]] = {
    **dict.fromkeys(
        ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "dbrx", "smaug-bpe",
         "chatglm-bpe", "glm4", "jina-v5-nano"), "llama-bpe"),
    **dict.fromkeys(
        ("deepseek-r1-qwen", "kormo", "stablelm2", "megrez", "hunyuan", "f2llmv2", "solar-open", "grok-2"),
        "qwen2"),
    **dict.fromkeys(
        ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"), "smollm"),
    **dict.fromkeys(
        ("phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "gigachat", "a.x-4.0", "mellum", "mpt",
         "olmo", "jais", "trillion", "granite-docling", "exaone4", "modern-bert", "roberta-bpe", "jina-v1-en",
         "jina-v2-code"), "gpt-2"),
    **dict.fromkeys(("llama4", "kanana2", "minimax-m2", "talkie"), "gpt-4o"),
    **dict.fromkeys(("poro-chat", "gpt3-finnish"), "bloom"),
    **dict.fromkeys(("hunyuan-dense", "joyai-llm", "hy_v4"), "deepseek-v3"),
    **dict.fromkeys(("bailingmoe2", "llada-moe"), "bailingmoe"),
    "cohere2moe": "tiny_aya",
}  # fmt: skip
# Kinds that take a piece whole where the vocabulary has it, before merging, and those that begin with a
# token.
_WHOLE_PIECES: Final = frozenset(
    {
        "llama3",
        "llama-v3",
        "llama-bpe",
        "falcon3",
        "falcon-h1",
        "pixtral",
        "midm-2.0",
        "lfm2",
        "tekken",
        "jina-v5-nano",
        "youtu",
        "minicpm5",
        "granite-embed-multi-97m",
    }
)
_BEGUN: Final = _WHOLE_PIECES - {"youtu", "minicpm5", "granite-embed-multi-97m"}
"""Whose texts have a begin where the file does not say."""


RANKED: Final = frozenset({"gemma4", "granite-embed-multi-311m", "mmbert"})
"""Kinds whose vocabulary is SentencePiece's, with merges, though the model is called `gpt2`."""
_WORDS: Final = frozenset({"mmbert"})
"""Those of them that cut lines into words, the first of which has a space too."""
_LINES: Final = r"[^\n]+|\n+"
_WORD: Final = "\u2581[^\u2581]*|[^\u2581]+"
_UNKNOWNS: Final = {"spm": 0, "ranked": 3, "wordpiece": 100, "unigram": 2}
_ENDS: Final = {"wordpiece": ("seperator", 102), "unigram": ("eos", 1)}
"""llama.cpp's ids of what is not in the vocabulary, and of the end of a text, where a file says none."""


def known_pre_tokenizers() -> frozenset[str]:
    """Names of `tokenizer.ggml.pre` whose rules are known."""
    return frozenset({*_SPLITS, *_SAME})


def pre_tokenizer_rules(pre: str) -> tuple[tuple[str, ...], bool]:
    """Of a name of `tokenizer.ggml.pre`: its expressions, and whether pieces in the vocabulary stay whole."""
    return _SPLITS[_SAME.get(pre, pre)], pre in _WHOLE_PIECES


@dataclass(frozen=True)
class GGUFTokenizer:
    """A GGUF file's tokenizer, checked.

    Attributes:
        kind: "bpe" (byte-level), "spm" (SentencePiece BPE with scores), "ranked" (the same with merges),
            "unigram" (SentencePiece's other kind: the cut with the best sum of scores) or "wordpiece".
        tokens, types, scores: by id; scores are empty for kinds without.
        merges: of "bpe" and "ranked", best first.
        splits: its expressions, applied one inside the other.
        whole_pieces: a piece that is in the vocabulary is taken before merging.
        space_prefix: SPM puts a space before the text and after every special token.
        line_prefix: "ranked" puts a space before each line that begins with none.
        merge_spaces: "unigram" leaves one space between words, and none around the text but that before it.
        lowercase, strip_accents: what "wordpiece" does to letters.
        charsmap: how "unigram" rewrites text first, or None.
        bos, eos, unk, pad: ids or None.
        add_bos, add_eos: whether encoding a text adds them.
    """

    kind: str
    tokens: list[str]
    types: np.ndarray[Any, Any]
    scores: np.ndarray[Any, Any]
    merges: list[tuple[str, str]]
    splits: tuple[str, ...]
    whole_pieces: bool
    space_prefix: bool
    bos: int | None
    eos: int | None
    unk: int | None
    pad: int | None
    add_bos: bool
    add_eos: bool
    line_prefix: bool = False
    merge_spaces: bool = False
    charsmap: CharsMap | None = None
    lowercase: bool = True
    strip_accents: bool = True

    def special_ids(self) -> list[int]:
        """Tokens that are matched as a whole in the text, longest first as llama.cpp matches them."""
        marked = np.flatnonzero(np.isin(self.types, (UNKNOWN, CONTROL, USER_DEFINED)))
        return sorted((int(i) for i in marked if self.tokens[i]), key=lambda i: -len(self.tokens[i].encode()))


def read_tokenizer(file: GGUFFile) -> GGUFTokenizer:
    """The tokenizer that the metadata describes.

    Raises UnsupportedError naming a tokenizer model or pre-tokenizer that llmc does not know, InputError for
    metadata that contradicts itself.
    """
    meta = file.metadata
    model = meta.get("tokenizer.ggml.model")
    kinds = {"gpt2": "bpe", "llama": "spm", "gemma4": "ranked", "bert": "wordpiece", "t5": "unigram"}
    if model not in kinds:
        raise UnsupportedError(
            f"{file.path.name} has the tokenizer model {model!r}; llmc reads {', '.join(kinds)}",
            remedy="give the model as a Hugging Face folder",
        )
    pre = str(meta.get("tokenizer.ggml.pre", "default"))
    kind = "ranked" if model == "gpt2" and pre in RANKED else kinds[model]
    tokens = meta.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise InputError(f"{file.path.name} has no tokenizer.ggml.tokens", remedy="give a complete GGUF file")
    words = kind == "ranked" and pre in _WORDS
    splits: tuple[str, ...] = (_LINES,) if kind == "ranked" else ()
    splits += (_WORD,) if words else ()
    if kind == "bpe":
        splits = _SPLITS.get(_SAME.get(pre, pre), ())
        if not splits:
            raise UnsupportedError(
                f"{file.path.name} has the pre-tokenizer {pre!r}, whose rules llmc does not know",
                remedy="give the model as a Hugging Face folder",
            )
    unigram = kind == "unigram"
    lowercase = meta.get("tokenizer.ggml.normalizer.lowercase", True)
    end, end_id = _ENDS.get(kind, ("eos", None))
    found = GGUFTokenizer(
        kind=kind,
        tokens=tokens,
        types=_numbers(file, "token_type", len(tokens), default=NORMAL),
        scores=_numbers(file, "scores", len(tokens), default=0.0 if kind in ("spm", "unigram") else None),
        merges=[_pair(file, merge) for merge in meta.get("tokenizer.ggml.merges", [])]
        if kind in ("bpe", "ranked")
        else [],
        splits=splits,
        whole_pieces=pre in _WHOLE_PIECES,
        space_prefix=kind in ("spm", "unigram")
        and bool(meta.get("tokenizer.ggml.add_space_prefix", not unigram)),
        bos=_token_id(file, "bos", len(tokens), 101 if kind == "wordpiece" else None),
        eos=_token_id(file, end, len(tokens), end_id),
        unk=_token_id(file, "unknown", len(tokens), _UNKNOWNS.get(kind)),
        pad=_token_id(file, "padding", len(tokens), 0 if unigram else None),
        add_bos=_adds(file, "bos", kind, pre in _BEGUN or model in ("llama", "gemma4")),
        add_eos=_adds(file, "eos", kind, unigram),
        line_prefix=words,
        merge_spaces=unigram and bool(meta.get("tokenizer.ggml.remove_extra_whitespaces", False)),
        charsmap=_charsmap(file) if unigram else None,
        lowercase=bool(lowercase),
        strip_accents=bool(meta.get("tokenizer.ggml.normalizer.strip_accents", lowercase)),
    )
    if unigram:
        _check_unigram(file, found)
    return found


def _adds(file: GGUFFile, name: str, kind: str, default: bool) -> bool:
    """Whether encoding adds a begin or an end; llama.cpp always does to words' pieces."""
    return kind == "wordpiece" or bool(file.metadata.get(f"tokenizer.ggml.add_{name}_token", default))


def _check_unigram(file: GGUFFile, found: GGUFTokenizer) -> None:
    name, again = file.path.name, "download the file again"
    if found.unk is None:
        raise InputError(f"{name} lacks tokenizer.ggml.unknown_token_id", remedy=again)
    if not np.isfinite(found.scores).all():
        raise InputError(f"{name}: tokenizer.ggml.scores has a score that is no number", remedy=again)
    if not np.any(found.types == NORMAL):
        raise InputError(f"{name}: tokenizer.ggml.token_type names no normal token", remedy=again)


def _charsmap(file: GGUFFile) -> CharsMap | None:
    held = file.metadata.get(CHARSMAP)
    if held is None:
        return None
    if not isinstance(held, np.ndarray) or held.dtype.itemsize != 1 or held.dtype.kind not in "iu":
        raise InputError(
            f"{file.path.name}: {CHARSMAP} is no array of bytes", remedy="download the file again"
        )
    return CharsMap(held.tobytes(), file.path.name) if len(held) else None


def _numbers(file: GGUFFile, name: str, count: int, default: float | None) -> np.ndarray[Any, Any]:
    values = file.metadata.get(f"tokenizer.ggml.{name}")
    if values is None:
        return np.zeros(0) if default is None else np.full(count, default)
    if not isinstance(values, np.ndarray) or len(values) != count:
        raise InputError(
            f"{file.path.name}: tokenizer.ggml.{name} does not have one number for each of {count} tokens",
            remedy="download the file again",
        )
    return values


def _pair(file: GGUFFile, merge: str) -> tuple[str, str]:
    at = merge.find(" ", 1)
    if at < 0:
        raise InputError(
            f"{file.path.name}: the merge {merge!r} is no pair", remedy="download the file again"
        )
    return merge[:at], merge[at + 1 :]


def _token_id(file: GGUFFile, name: str, count: int, default: int | None) -> int | None:
    value = file.metadata.get(f"tokenizer.ggml.{name}_token_id", default)
    if value is None or (value == default and value >= count):
        return None
    if not isinstance(value, int) or not 0 <= value < count:
        raise InputError(
            f"{file.path.name}: {name}_token_id is {value}, the vocabulary has {count} tokens",
            remedy="download the file again",
        )
    return value
