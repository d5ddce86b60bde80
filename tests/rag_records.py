"""Made-up documents for tests of stores, with features and vectors that look real; the same each time."""

from __future__ import annotations

import functools
import hashlib
import random
import time

import numpy as np
from llmc.ir.errors import InputError
from llmc.runtime.rag.store import Record, Settings, Store, StoreReader, open_store
from llmc.runtime.rag.types import Chunk, Document, Features, Mention, Triple

DIMENSIONS = 16
SETTINGS = Settings(embedder="made-up", embedder_hash="0123", dimensions=DIMENSIONS, extra={"language": "en"})
WORDS = (
    *("river", "stone", "bridge", "castle", "harbour", "lantern", "orchard", "violin", "copper", "meadow"),
    *("glacier", "timber", "saddle", "compass", "pepper", "candle", "anchor", "marble", "thunder", "willow"),
)


@functools.cache
def record(number: int, version: int = 0, chunks: int | None = None) -> Record:
    """Document `number` in one of its versions. Its metadata say what it was made of."""
    rng = np.random.default_rng([number, version])
    count = int(rng.integers(1, 5)) if chunks is None else chunks
    document = Document(
        id=f"folder/{number:04d}.txt",
        path=f"folder/{number:04d}.txt",
        title=f"The {WORDS[number % len(WORDS)]} of Orléans {number}",
        media_type="text/plain",
        digest=hashlib.sha256(f"{number} {version}".encode()).hexdigest(),
        size=100 + version,
        modified_ns=1_700_000_000_000_000_000 + version,
        metadata={"number": number, "version": version, "chunks": count, "tags": ["ü", None, 1.5]},
    )
    # The first chunk of a document is the same in all versions.
    versions = [0] + [version] * (count - 1)
    return Record(document, tuple(_chunk(document, *one) for one in enumerate(versions[:count])))


def _chunk(document: Document, ordinal: int, version: int) -> Chunk:
    number = int(document.metadata["number"])
    rng = np.random.default_rng([number, version, ordinal])
    words = [WORDS[place] for place in rng.integers(0, len(WORDS), 40)]
    text = f"Number {number} part {ordinal} version{version}: {' '.join(words)}. Größe 𝒳 in Zürich."
    start = text.index("Zürich")
    terms = np.unique(rng.integers(0, 2**63, 40, dtype=np.uint64) * np.uint64(2) + np.uint64(1))
    vector = rng.normal(size=DIMENSIONS)
    name = f"{document.id}\n{ordinal}\n{document.title}\n{text}"
    return Chunk(
        id=hashlib.sha256(name.encode()).hexdigest()[:32],
        document=document.id,
        ordinal=ordinal,
        title=document.title,
        heading="Part" if ordinal else "",
        text=text,
        start=1000 * ordinal,
        end=1000 * ordinal + len(text),
        page=ordinal + 1 if number % 2 else None,
        tokens=len(words),
        features=Features(
            terms=terms,
            title_counts=rng.integers(0, 3, len(terms)).astype(np.uint16),
            text_counts=rng.integers(0, 60_000, len(terms)).astype(np.uint16),
            spans=np.unique(rng.integers(0, 2**63, 25, dtype=np.uint64)),
            mentions=(Mention("zurich", "Zürich", start, start + 6), Mention(f"n{number}", "Number", 0, 6)),
        ),
        vector=(vector / np.linalg.norm(vector)).astype(np.float16) if number % 7 != 3 else None,
    )


def triples_of(chunk: Chunk, origin: str = "llm:1") -> list[Triple]:
    """Two made-up triples of a chunk."""
    return [Triple(chunk.id, "Zürich", "has", f"part {part}", origin) for part in (2, 1)]


def rebuilt(state: StoreReader) -> list[Record]:
    """The records of which a store says that it holds them, made afresh, in an order of their own."""
    numbers = [document.metadata for document in state.documents()]
    random.Random(len(numbers)).shuffle(numbers)
    return [record(one["number"], one["version"], one["chunks"]) for one in numbers]


def check_whole(state: StoreReader) -> int:
    """Fail where a document has not exactly the chunks of its version; return how many there are."""
    chunks: dict[str, set[str]] = {}
    for chunk in state.chunks():
        chunks.setdefault(chunk.document, set()).add(chunk.id)
    count = 0
    for document in state.documents():
        made = record(*(document.metadata[name] for name in ("number", "version", "chunks")))
        assert chunks.pop(document.id) == {chunk.id for chunk in made.chunks}, document.id
        count += 1
    assert not chunks, "chunks without a document"
    return count


def change_at_random(location: str, seed: int, changes: int = 10**9, documents: int = 30) -> None:
    """Put and delete until `changes` are made, or somebody kills this process."""
    rng = random.Random(seed)
    store = open_store(location)
    for _ in range(changes):
        try:
            _change(store, rng, documents)
        except InputError as error:
            # A server needs a moment to notice that the writer before was killed; and while somebody reads,
            # a file cannot shrink.
            if "is being written" not in error.message and "reads" not in error.message:
                raise
            time.sleep(0.005)
    store.close()


def _change(store: Store, rng: random.Random, documents: int) -> None:
    numbers = rng.sample(range(documents), rng.randint(1, 4))
    kind = rng.random()
    if kind < 0.3:
        store.delete([record(number).document.id for number in numbers])
    elif kind < 0.35:
        store.vacuum()
    else:
        store.put([record(number, rng.randrange(5)) for number in numbers])
        if kind > 0.9:
            chunk = record(numbers[0]).chunks[0]
            store.put_triples(chunk.id, [], quarantine="made up")
