"""Small stores for tests of search: words as vectors, songs and cities."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from llmc.runtime.rag.features import FEATURES_VERSION, features_of
from llmc.runtime.rag.features.terms import words_of
from llmc.runtime.rag.retrieve import Retriever
from llmc.runtime.rag.store import Record, Settings, Store, open_store
from llmc.runtime.rag.types import Chunk, Document

DIMENSIONS = 16


def vector_of(text: str) -> np.ndarray:
    """Words as a vector: texts that share words are near each other."""
    total = np.zeros(DIMENSIONS)
    for word in words_of(text):
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "little")
        total += np.random.default_rng(seed).normal(size=DIMENSIONS)
    return (total / max(np.linalg.norm(total), 1e-9)).astype(np.float32)


class WordEmbedder:
    hash = "w"

    def embed_query(self, text: str) -> np.ndarray:
        return vector_of(text)


def record(name: str, title: str, texts: Sequence[str], *, vectors: bool = True) -> Record:
    chunks: list[Chunk] = []
    for ordinal, text in enumerate(texts):
        identity = hashlib.sha256(f"{name}\n{ordinal}\n{title}\n{text}".encode()).hexdigest()[:32]
        vector = vector_of(f"{title} {text}").astype(np.float16) if vectors else None
        features = features_of(title, text)
        chunks.append(
            Chunk(
                identity,
                name,
                ordinal,
                title,
                "",
                text,
                0,
                len(text),
                None,
                len(text.split()),
                features,
                vector,
            )
        )
    digest = hashlib.sha256("".join(texts).encode()).hexdigest()
    return Record(Document(name, name, title, "text/plain", digest, 1, 1), tuple(chunks))


def filled(path: Path, records: Iterable[Record], *, vectors: bool = True) -> Store:
    store = open_store(str(path), create=True)
    if vectors:
        store.set_settings(
            Settings(
                embedder="words",
                embedder_hash="w",
                dimensions=DIMENSIONS,
                features_version=FEATURES_VERSION,
            )
        )
    store.put(records)
    return store


SONGS = {
    "Brother (Pearl Jam song)": "Brother is a song by the rock band Pearl Jam, written by Stone Gossard.",
    "Pearl Jam": "Pearl Jam is an American rock band formed in 1990 in Seattle, Washington.",
    "Seattle": "Seattle typically receives some snowfall on an annual basis but heavy snow is rare.",
    "Detroit": "Detroit receives average snowfall of forty inches; the usual snowfall of the city is even.",
    "Boston": "The usual average snowfall in the city of Boston is higher near the coast.",
    "Richmond, Virginia": "Average snowfall in Richmond, Virginia is usual for a city in the south.",
    "Metallica": "Metallica is an American heavy metal band formed in Los Angeles.",
    "Ann Arbor": "The city has a humid climate with usual average snowfall in winter.",
}


def song_store(folder: Path) -> Store:
    """A store of the songs and cities, one passage each."""
    return filled(folder / "songs.kb", [record(f"{t}.txt", t, [x]) for t, x in SONGS.items()])


def titles(retriever: Retriever, question: str, **options: Any) -> list[str]:
    return [passage.title for passage in retriever.search(question, **options)]
