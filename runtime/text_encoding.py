"""Token ids of texts and pairs for encoders and classifiers. Any string will do; what is too long is cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer as _Tokenizer

from ..codegen.artifact import Artifact
from ..ir.errors import ArtifactError, InputError
from .encoder import prompts
from .pair_prompts import PairPrompts

_CUT = 16
"""Characters a token, at first: no more of a text is tokenized, so that one of megabytes costs no more than
its beginning.
"""


def clean(text: str) -> str:
    """The text as valid Unicode: halves of surrogate pairs, which no file in UTF-8 has, become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def longest_text(artifact: Artifact) -> int:
    """Tokens of a text at most, special ones included: what its publisher trained it for."""
    model = artifact.model
    limits = [model.get(name) for name in ("max_seq_length", "context_length")]
    given = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    if not given:
        raise ArtifactError(
            f"{artifact.root} does not say how long a text may be", remedy="compile the model again"
        )
    return min(given)


class TextTokenizer:
    """The artifact's tokenizer, which keeps the beginning of what is too long. Safe for several threads."""

    def __init__(self, artifact: Artifact, longest: int) -> None:
        """`longest`: tokens of a text or pair at most, special ones included."""
        self.longest = longest
        entry = artifact.manifest.get("tokenizer")
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise InputError(f"{artifact.root} has no tokenizer", remedy="compile the model from its folder")
        path = artifact.path(entry["path"])
        try:
            self._inner = _Tokenizer.from_file(str(path))
        except Exception as error:  # noqa: BLE001  (the library raises Exception itself)
            raise ArtifactError(
                f"{path} is not a tokenizer ({str(error)[:100]})", remedy="compile the model again"
            ) from None
        self._inner.no_padding()
        self._inner.enable_truncation(longest)  # of a pair, the longer text is cut first
        model = artifact.model
        self._prompts = None if model.get("pairs") is None else PairPrompts(artifact, self._inner, longest)
        self._before = prompts(model)[0]
        self._padding = model.get("padding")

    def count(self, text: str) -> int:
        """Tokens of a whole text, without special ones."""
        whole = self._inner.encode(clean(text), add_special_tokens=False)
        return len(whole.ids) + sum(len(part.ids) for part in whole.overflowing)

    @property
    def specials(self) -> int:
        """Special tokens that a text gets."""
        return self._inner.num_special_tokens_to_add(False)

    def encode(self, texts: Sequence[str]) -> list[tuple[list[int], bool]]:
        """Token ids of each text with special tokens, and whether some were left out."""
        found = self._encodings(None, texts)
        return [(one.ids, bool(one.overflowing)) for one in found]

    def encode_pairs(self, first: str, second: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """Token ids and token types of the pairs of one text with each of others."""
        # It is tokenized for each pair, and all of it where it is long: no more than can be kept.
        reach = _CUT * self.longest
        first = clean(first)[:reach]
        if self._prompts is not None:
            found = self._prompts.encode(first, [clean(text[:reach]) for text in second])
            return [(ids, [0] * len(ids)) for ids in map(self._unpadded, found)]
        pairs = self._encodings(self._before + first, second)
        found = [self._unpadded(one.ids) for one in pairs]
        return [(ids, one.type_ids[: len(ids)]) for ids, one in zip(found, pairs, strict=True)]

    def _unpadded(self, ids: list[int]) -> list[int]:
        """Without padding at the end (a decoder's end of text, mostly), where scores are the last token's."""
        end = len(ids)
        while end > 1 and ids[end - 1] == self._padding:
            end -= 1
        return ids[:end]

    def _encodings(self, first: str | None, texts: Sequence[str]) -> list[Any]:
        reach = _CUT * self.longest
        whole = [clean(text) for text in texts]
        cut = [text[:reach] if first is None else (first, text[:reach]) for text in whole]
        return [
            one if len(text) <= reach or _settled(one, reach) else self._longer(first, text, 4 * reach)
            for text, one in zip(whole, self._inner.encode_batch(cut), strict=True)
        ]

    def _longer(self, first: str | None, text: str, reach: int) -> Any:
        """The encoding of a text whose beginning did not suffice (one that begins with spaces, say)."""
        while True:
            short = text[:reach]
            one = self._inner.encode(short) if first is None else self._inner.encode(first, short)
            if len(text) <= reach or _settled(one, reach):
                return one
            reach *= 4


def _settled(encoding: Any, reach: int) -> bool:
    """Whether a text's first `reach` characters give the tokens that are kept of the whole text: there are
    enough of them, and none is near the cut, which may have gone through a word.
    """
    last = encoding.n_sequences - 1
    places = zip(encoding.offsets, encoding.sequence_ids, strict=True)
    ends = [end for (_, end), of in places if of == last]
    return bool(encoding.overflowing) and max(ends, default=0) <= reach // 2
