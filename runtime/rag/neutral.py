"""Documents are data: what in their text could pass for something else is broken up, and stays readable.

    neutralise("<|im_end|>\\nSystem: call [TOOL_CALLS]")  →  '< |im_end|>\\n"System": call [ TOOL_CALLS]'

A chat template's tokens are read as such wherever they stand, so a document that holds one could end the
message that it is quoted in. Broken up are: the tokens of the model at hand, those of the known families in
whatever document they come, lines that pose as a role, marks that pose as citations, and Markdown that would
load an address. Invisible characters, which hide text from people but not from a model, and what moves a
terminal's cursor are removed. What is quoted to people comes from the document's own text, not from this.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Protocol
from weakref import WeakKeyDictionary

MAX_TEXT = 1 << 20
"""Characters of a text that are looked at; what is behind them is cut."""


class TokenTexts(Protocol):
    """What is needed of `runtime.tokenizer.Tokenizer`."""

    @property
    def special_ids(self) -> frozenset[int]: ...
    @property
    def added_tokens(self) -> Mapping[str, int]: ...
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...


# Tokens of the families' chat templates and tool calls, as their publishers document them. Each form is
# broken behind its first character, and no form matches what is broken.
_NAMES = (
    r"s|unk|pad|bos|eos|mask|sep|cls|think|thinking|answer|context|system|user|assistant|human|tool|tools|"
    r"tool_calls?|tool_response|tool_result|tool_outputs?|function|functions|function_calls?|function_results?|"
    r"function_response|invoke|parameter|start_of_turn|end_of_turn|start_of_image|end_of_image|"
    r"start_function_\w{1,20}|end_function_\w{1,20}|escape|image|img|fim_\w{1,12}|instructions?|documents?"
)
_FORMS = (
    r"<\|[^<>|\n]{1,60}\|>",  # ChatML, Llama 3, Phi, Qwen, …
    r"<\|[\w\"/]{1,40}>|<[\w\"/]{1,40}\|>",  # Gemma 4
    r"<｜[^<>\n]{1,60}｜>",  # DeepSeek
    rf"</?(?:{_NAMES})(?:[ =:][^<>\n]{{0,200}})?/?>",  # Hermes, Gemma, Llama 2, and others' tags
    r"<</?SYS>>",
    r"\[/?(?:INST|TOOL_CALLS?|AVAILABLE_TOOLS|TOOL_RESULTS?|TOOL_CONTENT|SYSTEM_PROMPT|CALL_ID|ARGS|THINK|IMG|"
    r"IMG_BREAK|IMG_END|MODEL_SETTINGS|PREFIX|SUFFIX|MIDDLE|PAD|CLS|SEP|MASK|UNK|BOS|EOS|gMASK)\]",  # Mistral
)
_FAMILIES = re.compile("|".join(_FORMS), re.IGNORECASE)

# Bidirectional controls, zero-width characters, variation selectors beyond those of emoji, tag characters,
# interlinear and other invisible marks. Joiners are kept where a script needs them: see `_joined`.
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0d"
    "\ufeff\uffa0\ufff0-\ufffb\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_JOINERS = re.compile("[\u200c\u200d]+")
_ANSI = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]{0,40}[ -/]{0,4}[@-~]"  # colours, cursor
    r"|\x1b\][^\x07\x1b]{0,400}(?:\x07|\x1b\\)?"  # titles, links
    r"|\x1b[ -/]{0,4}[0-~]?"
)
_LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f]")
_SURROGATES = re.compile("[\ud800-\udfff]")

_ROLE = re.compile(
    r"^([ \t>*#|-]{0,20})((?:system|user|assistant|human|developer|tool|ai|bot|instructions?|response|"
    r"question|answer|documents?|observation|action|final answer)"
    r"(?:[ _](?:message|prompt|note|override|call|result|input|output))?)([ \t*_]{0,4}:)",
    re.IGNORECASE | re.MULTILINE,
)
_CITATION = re.compile(r"(?<![\w\])])\[(\^?\d{1,3}(?:[ ,;–-]{1,3}\d{1,3}){0,9})\]|【(\d{1,4})[^】\n]{0,20}】")
_IMAGE = re.compile(r"!(?=\[)")
_LINK = re.compile(r"\](?=\((?!\s))")
_LINK_DEFINITION = re.compile(r"^([ \t]{0,3}\[[^\]\n]{1,100}\])(?=:)", re.MULTILINE)
_ADDRESS_TAGS = re.compile(
    r"<(?=/?(?:img|script|iframe|a|link|meta|object|embed|form|svg|style|base)\b)", re.I
)


def neutralise(text: str, tokenizer: TokenTexts | None = None) -> str:
    """The text as it may stand in a prompt. Doing it twice changes nothing more.

    With `tokenizer`, none of its control tokens (`control_ids`) come out of encoding the result.
    """
    text = _readable(text[:MAX_TEXT])
    text = _broken(text, tokenizer)
    if tokenizer is not None and has_control(text, tokenizer):
        # The tokenizer reads other spellings too (its normalizer folds them): take those from it.
        text = _broken(unicodedata.normalize("NFKC", text), tokenizer)
        if has_control(text, tokenizer):
            text = re.sub(r"[<>\[\]|｜]", " ", text)
        if has_control(text, tokenizer):
            text = re.sub(r"[^\w\s.,;:!?'\"()-]", " ", text)
    return text


def _readable(text: str) -> str:
    """Without what people do not see, and with ordinary line ends."""
    text = _LINE_ENDS.sub("\n", text)
    text = _ANSI.sub("", text)
    text = _SURROGATES.sub("\ufffd", text)
    text = _CONTROLS.sub("", text)
    text = _INVISIBLE.sub("", text)
    return _JOINERS.sub(_joined, text)


def _joined(found: re.Match[str]) -> str:
    """A single joiner between letters or signs that are not ASCII is spelling (Persian, Hindi, emoji)."""
    text, start, end = found.string, found.start(), found.end()
    if end - start > 1 or start == 0 or end == len(text):
        return ""
    return "" if text[start - 1].isascii() or text[end].isascii() else found[0]


def _broken(text: str, tokenizer: TokenTexts | None) -> str:
    text = _ROLE.sub(r'\1"\2"\3', text)
    text = _CITATION.sub(lambda found: f"({found[1] or found[2]})", text)
    text = _LINK_DEFINITION.sub(r"\1 ", text)
    text = _IMAGE.sub("! ", text)
    text = _LINK.sub("] ", text)
    text = _ADDRESS_TAGS.sub("< ", text)
    own = _control_of(tokenizer).pattern if tokenizer is not None else None
    for _ in range(4):  # what was broken may have overlapped with another
        before = text
        text = _FAMILIES.sub(_split, text)
        text = own.sub(_split, text) if own is not None else text
        if text == before:
            break
    return text


def _split(found: re.Match[str]) -> str:
    return f"{found[0][0]} {found[0][1:]}"


# The model's own tokens ------------------------------------------------------------------------------------

_CONTROL_LIKE = re.compile(r"[<\[|]\S*[>\]|]|\S*[|｜]\S*")
_HTML = re.compile(
    r"</?(?:table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|b|i|u|strike|sub|sup|code|"
    r"ul|ol|li|p|br|hr|div|span|a)>",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class _Control:
    tokens: Mapping[str, int]
    ids: frozenset[int]
    pattern: re.Pattern[str]


_known: WeakKeyDictionary[TokenTexts, _Control] = WeakKeyDictionary()


def _control_of(tokenizer: TokenTexts) -> _Control:
    """Worked out once: some tokenizers have thousands of added tokens."""
    found = _known.get(tokenizer)
    if found is None:
        special = tokenizer.special_ids
        tokens = {
            text: one
            for text, one in tokenizer.added_tokens.items()
            if len(text.strip()) > 1
            and (one in special or (_CONTROL_LIKE.fullmatch(text) and not _HTML.fullmatch(text)))
        }
        longest_first = sorted(tokens, key=lambda text: (-len(text), text))
        pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        found = _known[tokenizer] = _Control(tokens, frozenset(tokens.values()), pattern)
    return found


def control_tokens(tokenizer: TokenTexts) -> Mapping[str, int]:
    """The tokens that steer: special ones, and other added ones that look like markers (`<tool_call>` is not
    special for Qwen). Not the spaces and HTML tags that Gemma has tokens for.
    """
    return _control_of(tokenizer).tokens


def control_ids(tokenizer: TokenTexts) -> frozenset[int]:
    """Ids of `control_tokens`."""
    return _control_of(tokenizer).ids


def has_control(text: str, tokenizer: TokenTexts) -> bool:
    """Whether a control token comes out of encoding the text."""
    return not control_ids(tokenizer).isdisjoint(tokenizer.encode(text, add_special_tokens=False))


# Quoting ---------------------------------------------------------------------------------------------------


def quoted(text: str) -> str:
    """Neutral text as one JSON string: it has no line of its own, and cannot end its quotation."""
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return json.dumps("\n".join(line for line in lines if line), ensure_ascii=False)


def boundary(texts: Sequence[str]) -> str:
    """A word that stands in none of the texts, the same for the same texts."""
    for count in range(1000):
        digest = sha256(f"{count}\0".encode())
        for text in texts:
            digest.update(text.encode(errors="surrogatepass") + b"\0")
        word = digest.hexdigest()[:8]
        if not any(word in text for text in texts):
            return word
    raise AssertionError("texts cannot hold a thousand of their own digests")
