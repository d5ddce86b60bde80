"""The tokenizer as GGUF's key-values: a GGUF source's own, or made of a tokenizer.json.

GGUF knows tokenizers by a handful of names. Which one a tokenizer.json is like is found by trying: the names'
rules (`frontend/tokenizer_reference.py`) and the file must give the same ids on the hard strings.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from ...frontend.hard_strings import hard_strings
from ...frontend.source import ModelSource
from ...frontend.tokenizer_reference import ReferenceEncoder
from ...frontend.tokenizer_rules import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    GGUFTokenizer,
    pre_tokenizer_rules,
)
from ...ir.errors import InputError, UnsupportedError

_LOWEST: Final = -1e6  # the score of a token that no merge makes


def tokenizer_metadata(source: ModelSource, folder: Path, vocab_size: int) -> dict[str, Any]:
    """Key-values of the tokenizer, chat template included.

    Args:
        folder: where tokenizer.json and chat_template.jinja of the artifact lie.
        vocab_size: rows of the embedding; tokens are filled up to it.

    Raises UnsupportedError where GGUF has no name for the tokenizer's rules.
    """
    if source.gguf is not None:
        return {k: v for k, v in source.gguf.metadata.items() if k.startswith("tokenizer.")}
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            f"{source.name} has no tokenizer, which a GGUF file holds", remedy="give the model's whole folder"
        )
    text = path.read_text(encoding="utf-8")
    keys = _Vocabulary(json.loads(text), source, vocab_size, text).metadata()
    template = folder / "chat_template.jinja"
    if template.is_file():
        keys["tokenizer.chat_template"] = template.read_text(encoding="utf-8")
    return keys


class _Vocabulary:
    """A tokenizer.json, read for GGUF."""

    def __init__(self, data: Mapping[str, Any], source: ModelSource, vocab_size: int, text: str) -> None:
        from tokenizers import Tokenizer

        self.data, self.source, self.vocab_size = data, source, vocab_size
        self.model: Mapping[str, Any] = data["model"]
        self.tokenizer = Tokenizer.from_str(text)
        if self.model.get("type") != "BPE":
            raise UnsupportedError(
                f"{source.name} has a tokenizer of kind {self.model.get('type')}, which target gguf does not "
                "write",
                remedy="use another target, or start from a GGUF file of the model",
            )
        self.spm = bool(self.model.get("byte_fallback"))
        self.merges = [tuple(m) if isinstance(m, list) else _pair(m) for m in self.model["merges"]]
        self.tokens, self.types = self._tokens()
        begins = self.tokenizer.encode("a", add_special_tokens=True).ids
        plain = self.tokenizer.encode("a", add_special_tokens=False).ids
        at = next((i for i in range(len(begins)) if begins[i : i + len(plain)] == plain), 0)
        self.begin, self.end = begins[:at], begins[at + len(plain) :]

    def _tokens(self) -> tuple[list[str], np.ndarray[Any, Any]]:
        tokens: list[str | None] = [None] * self.vocab_size
        types = np.full(self.vocab_size, UNUSED, np.int32)
        for text, i in self.model["vocab"].items():
            tokens[i], types[i] = text, NORMAL
            if self.spm and len(text) == 6 and text.startswith("<0x"):
                types[i] = BYTE
        for added in self.data.get("added_tokens", []):
            i = added["id"]
            if i >= self.vocab_size:
                continue  # the model has no row for it, whoever encodes it
            tokens[i], types[i] = added["content"], CONTROL if added["special"] else USER_DEFINED
        unk = self.unk
        if unk is not None and self.spm:
            types[unk] = UNKNOWN
        return [f"[PAD{i}]" if one is None else one for i, one in enumerate(tokens)], types

    @property
    def unk(self) -> int | None:
        text = self.model.get("unk_token")
        return None if text is None else self.tokenizer.token_to_id(text)

    def scores(self) -> np.ndarray[Any, Any]:
        """SentencePiece's scores as far as they matter: a token's is the rank of the first merge that makes
        it.
        """
        ranks: dict[str, int] = {}
        for rank, (left, right) in enumerate(self.merges):
            ranks.setdefault(left + right, rank)
        found = [-float(ranks[one]) if one in ranks else _LOWEST for one in self.tokens]
        return np.where(self.types == NORMAL, np.array(found, np.float32), np.float32(0.0))

    def _as(self, pre: str) -> GGUFTokenizer:
        """The tokenizer that a GGUF reader would take it for under a pre-tokenizer's name."""
        splits, whole = ((), False) if self.spm else pre_tokenizer_rules(pre)
        ids = self._special_ids()
        return GGUFTokenizer(
            kind="spm" if self.spm else "bpe",
            tokens=self.tokens,
            types=self.types,
            scores=self.scores() if self.spm else np.zeros(0),
            merges=[] if self.spm else [(a, b) for a, b in self.merges],
            splits=splits,
            whole_pieces=whole,
            space_prefix=self._space_prefix() if self.spm else False,
            bos=ids.get("bos"),
            eos=ids.get("eos"),
            unk=self.unk,
            pad=ids.get("padding"),
            add_bos=bool(self.begin),
            add_eos=bool(self.end),
        )

    def _space_prefix(self) -> bool:
        first = self.tokenizer.encode("a", add_special_tokens=False).tokens
        return bool(first) and first[0].startswith("\u2581")

    def _special_ids(self) -> dict[str, int]:
        config = self.source.config
        generation = self.source.generation
        bos = self.begin[0] if self.begin else generation.bos_token_id
        eos = generation.eos_token_ids[0] if generation.eos_token_ids else None
        pad = getattr(config, "pad_token_id", None)
        found = {"bos": bos, "eos": eos, "padding": pad, "unknown": self.unk}
        return {k: int(v) for k, v in found.items() if v is not None and 0 <= int(v) < self.vocab_size}

    def _agrees(self, pre: str) -> bool:
        """Whether the rules of a name give the tokenizer's ids. What GGUF never says is left out: composing
        characters (llama.cpp has no NFC), and tokens that the model has no row for.
        """
        reference = ReferenceEncoder(self._as(pre))
        composes = (self.data.get("normalizer") or {}).get("type") == "NFC"
        for text in hard_strings():
            given = unicodedata.normalize("NFC", text) if composes else text
            wanted = self.tokenizer.encode(given, add_special_tokens=False).ids
            if max(wanted, default=0) < self.vocab_size and wanted != reference.encode(given, False):
                return False
        return True

    def metadata(self) -> dict[str, Any]:
        names = ["default"] if self.spm else _CANDIDATES
        pre = next((name for name in names if self._agrees(name)), None)
        if pre is None or len(self.begin) > 1 or len(self.end) > 1:
            raise UnsupportedError(
                f"the tokenizer of {self.source.name} follows rules that no GGUF name stands for",
                remedy="start from a GGUF file of the model, or use another target",
            )
        keys: dict[str, Any] = {
            "tokenizer.ggml.model": "llama" if self.spm else "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": self.tokens,
            "tokenizer.ggml.token_type": self.types,
        }
        if self.spm:
            keys["tokenizer.ggml.scores"] = self.scores()
            keys["tokenizer.ggml.add_space_prefix"] = self._space_prefix()
        else:
            keys["tokenizer.ggml.merges"] = [f"{left} {right}" for left, right in self.merges]
        keys |= {f"tokenizer.ggml.{name}_token_id": i for name, i in self._special_ids().items()}
        keys["tokenizer.ggml.add_bos_token"] = bool(self.begin)
        keys["tokenizer.ggml.add_eos_token"] = bool(self.end)
        return keys


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


# One name for each set of rules, the more common ones first.
_CANDIDATES: Final = ("gpt-2", "llama-bpe", "qwen2", "smollm", "tekken", "gpt-4o", "falcon", "deepseek-coder",
                      "deepseek-v3", "bloom", "viking", "default")  # fmt: skip
