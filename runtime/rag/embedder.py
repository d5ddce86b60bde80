"""Vectors of texts, by an encoder artifact.

embedder = open_embedder("auto")
vectors = embedder.embed_passages(["…", "…"])      # [N, dimensions] float32, each of length 1
scores = vectors @ embedder.embed_query("…")
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ...codegen.artifact import Artifact
from ...ir.errors import InputError
from ..encoder import prompts
from ..executor import choose_target
from ..text_encoding import TextTokenizer, longest_text
from .embedder_source import DEFAULT, Say, find_artifact, say_on_stderr
from .encoder import EncoderSteps, open_artifact

_AT_ONCE = 256
"""Texts that are tokenized together, by all cores."""


class Embedder:
    """An encoder and what its publisher says of its use: pooling, longest text, what is written before a
    question or a passage. Safe to use from several threads.
    """

    def __init__(self, artifact: Artifact, *, threads: int | None = None) -> None:
        """`threads` None: one a physical core."""
        model = artifact.model
        self._pooling: str = model.get("pooling") or "mean"
        self._query_prompt, self._passage_prompt = prompts(model)
        self.max_tokens = longest_text(artifact)
        """Tokens of a text at most, special ones included; the rest is left out."""
        self.truncated = 0
        """Passages of which a part was left out, so far."""
        self._tokenizer = TextTokenizer(artifact, self.max_tokens)
        self._steps = EncoderSteps(artifact, longest=self.max_tokens, threads=threads)
        self.name = str(model.get("name") or artifact.root.stem)
        self.hash = embedder_hash(artifact)

    @property
    def dimensions(self) -> int:
        """Elements of a vector."""
        return self._steps.width

    @property
    def room(self) -> int:
        """Tokens of a passage, as `count_tokens` counts them, of which nothing is left out."""
        return max(1, self.max_tokens - self._tokenizer.specials - self.count_tokens(self._passage_prompt))

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, without special ones."""
        return self._tokenizer.count(text) if text else 0

    def embed_passages(
        self, texts: Sequence[str], progress: Callable[[int, int], None] | None = None
    ) -> np.ndarray:
        """[N, dimensions] float32 of length 1: for each text the same vector whatever else is among them.

        `progress` is called with (texts done, texts in all). What a text has beyond `max_tokens` is left out,
        and counted in `truncated`. Any string will do; the vector of a text without tokens is zeros.
        """
        vectors = np.zeros((len(texts), self.dimensions), np.float32)
        for start in range(0, len(texts), _AT_ONCE):
            part = texts[start : start + _AT_ONCE]
            encoded = self._tokenizer.encode([self._passage_prompt + text for text in part])
            self.truncated += sum(cut for _, cut in encoded)
            self._fill(vectors[start : start + len(part)], [ids for ids, _ in encoded])
            if progress is not None:
                progress(start + len(part), len(texts))
        return vectors

    def embed_query(self, text: str) -> np.ndarray:
        """[dimensions] float32 of length 1: the vector of a question."""
        ((ids, _),) = self._tokenizer.encode([self._query_prompt + text])
        vectors = np.zeros((1, self.dimensions), np.float32)
        self._fill(vectors, [ids])
        return vectors[0]

    def _fill(self, vectors: np.ndarray, sequences: list[list[int]]) -> None:
        there = [i for i, ids in enumerate(sequences) if ids]
        ids = [sequences[i] for i in there]
        for part, found in self._steps.run(
            [len(one) for one in ids], lambda whole, part: whole.vectors(ids[part], self._pooling)
        ):
            vectors[there[part]] = found

    def close(self) -> None:
        """Give the kernels' memory back."""
        self._steps.close()

    def __enter__(self) -> Embedder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def embedder_hash(artifact: Artifact) -> str:
    """Tells apart embedders whose vectors cannot be compared: 32 hex digits.

    It covers the weights as they were compiled, since vectors of one model at int8 and at float32 differ by
    more than rounding (cosine 0.999), the tokenizer, pooling, longest text and prompts. It does not cover the
    kernels: what instruction sets make of the same weights (cosine 0.9998 between AMX and AVX2) differs less
    than either does from float32, so that a store may be filled on one machine and asked on another. A
    compilation of the same model elsewhere has the same bytes, hence the same hash.
    """
    entry = artifact.target(choose_target(artifact.targets))
    files: Mapping[str, Mapping[str, Any]] = artifact.manifest["files"]
    named = (entry.get("weights"), entry.get("weight_file"), artifact.manifest["tokenizer"]["path"])
    model = artifact.model
    facts = {
        "files": [files[rel]["sha256"] for rel in named if rel is not None],
        "pooling": model.get("pooling") or "mean",
        "longest": longest_text(artifact),
        "prompts": prompts(model),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def open_embedder(
    spec: str | None, *, threads: int | None = None, say: Say = say_on_stderr
) -> Embedder | None:
    """The embedder that `spec` names; None where there is to be none, or "auto" finds none.

    Args:
        spec: "none" or None; an artifact's folder; a Hugging Face folder or hub id of an encoder, which is
            compiled once (int8) into the user's cache; or "auto": $LLMC_EMBEDDER where that is set, else
            all-MiniLM-L6-v2 from the caches or the hub, else none.
        threads: to compute with; None for one a physical core.
        say: gets what the user should know of a compilation that takes a while, or of an embedder not found.

    Raises InputError where what was named is no encoder or cannot be had; "auto" raises for $LLMC_EMBEDDER
    only.
    """
    path = find_artifact(spec, say)
    if path is None:
        return None
    artifact = open_artifact(path)
    if artifact.kind != "encoder":
        raise InputError(
            f"{path} is an artifact of kind {artifact.kind!r}, not an encoder",
            remedy=f"give one, such as {DEFAULT}",
        )
    return Embedder(artifact, threads=threads)
