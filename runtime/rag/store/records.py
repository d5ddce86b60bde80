"""The form in which both stores keep documents, chunks and their features, and what may be written at all.

Arrays are little-endian bytes: terms and spans 8 a piece, counts 2, vectors 2 (float16). Mentions are arrays
too (`pack_mentions`). What only people and no query looks into (metadata, settings) is JSON.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ....ir.errors import InputError
from ...json_depth import deeper
from ..features.terms import hash_of
from ..types import Chunk, Document, Features, Mention, Triple
from .base import Record, Settings

QUARANTINED = (
    "SELECT c.id, e.quarantine FROM extracted e JOIN chunks c ON c.row = e.chunk"
    " WHERE e.quarantine IS NOT NULL ORDER BY c.id, e.origin"
)
EXTRACTIONS = (
    "SELECT c.id, e.origin, e.quarantine FROM extracted e JOIN chunks c ON c.row = e.chunk"
    " ORDER BY c.id, e.origin"
)
"""Queries that both databases read alike."""

U64 = np.dtype("<u8")
U32 = np.dtype("<u4")
U16 = np.dtype("<u2")
F16 = np.dtype("<f2")

MAX_ID_BYTES = 2048
"""Of a document's id and path: PostgreSQL's indexes take no key of more than 2,704 bytes."""
MAX_INTEGER = 2**63 - 1
_DEEPEST = 400
"""Levels of a document's metadata: Python 3.11 reads some 1,000, 3.13 more than 5,000."""

FeatureRow = tuple[bytes, bytes, bytes, bytes, bytes]
"""terms, title_counts, text_counts, spans, mentions as they are kept."""


# What may be written ---------------------------------------------------------------------------------------


def check_record(record: Record, settings: Settings) -> None:
    """Raise InputError, naming the document, where a store could not give back what it was given."""
    document = record.document
    name = f"document {document.id[:80]!r}"
    for field, text in (("id", document.id), ("path", document.path)):
        if not text or len(text.encode("utf-8", "surrogatepass")) > MAX_ID_BYTES:
            raise InputError(f"{name}: its {field} is empty or longer than {MAX_ID_BYTES} bytes")
    metadata = metadata_text(document)
    texts = (document.id, document.path, document.title, document.media_type, document.digest, metadata)
    _check_texts(name, texts)
    if not 0 <= document.size <= MAX_INTEGER or not -MAX_INTEGER <= document.modified_ns <= MAX_INTEGER:
        raise InputError(f"{name}: its size or time of change is out of range")
    seen: set[str] = set()
    for ordinal, chunk in enumerate(record.chunks):
        _check_chunk(f"{name}, chunk {ordinal}", chunk, settings)
        if chunk.document != document.id or chunk.ordinal != ordinal or chunk.id in seen:
            raise InputError(f"{name}, chunk {ordinal}: its document, its ordinal or its id is another's")
        seen.add(chunk.id)


def _check_chunk(name: str, chunk: Chunk, settings: Settings) -> None:
    if not chunk.id or len(chunk.id) > 128:
        raise InputError(f"{name}: its id is empty or longer than 128 characters")
    _check_texts(name, (chunk.id, chunk.title, chunk.heading, chunk.text))
    features = chunk.features
    if not len(features.terms) == len(features.title_counts) == len(features.text_counts):
        raise InputError(f"{name}: terms and their counts are of different lengths")
    _check_texts(name, [mention.key for mention in features.mentions])
    if any(chunk.text[one.start : one.end] != one.surface for one in features.mentions):
        raise InputError(f"{name}: an entity is not what stands at its place")
    if chunk.vector is not None:
        check_vector(name, chunk.vector, settings)


def check_vector(name: str, vector: np.ndarray, settings: Settings) -> None:
    """Raise InputError where this is no vector of the store's embedder."""
    if vector.shape != (settings.dimensions,):
        raise InputError(
            f"{name}: a vector of shape {list(vector.shape)}, the store's are of [{settings.dimensions}]",
            remedy="use the embedder that the store was made with, or embed it again",
        )
    if not bool(np.isfinite(vector).all()):
        raise InputError(f"{name}: its vector holds infinite or undefined numbers")


def check_triples(chunk: str, triples: Sequence[Triple], origin: str, quarantine: str | None) -> None:
    """Raise InputError where triples are of another chunk, or of text that cannot be kept."""
    name = f"triples of chunk {chunk[:80]!r}"
    for triple in triples:
        if triple.chunk != chunk:
            raise InputError(f"{name}: one is of chunk {triple.chunk[:80]!r}")
        _check_texts(name, (triple.subject, triple.predicate, triple.object, triple.origin))
    _check_texts(name, (origin, quarantine or ""))


def origins_of(triples: Sequence[Triple], origin: str) -> list[str]:
    """What an extraction is of: where its triples are from, or `origin` where they do not say."""
    return sorted({one.origin for one in triples} | ({origin} if origin or not triples else set()))


def check_settings(settings: Settings) -> None:
    """Raise InputError where settings cannot be kept."""
    if settings.dimensions < 0:
        raise InputError(f"settings: dimensions is {settings.dimensions}")
    _check_texts("settings", (settings_text(settings),))


def _check_texts(name: str, texts: Sequence[str]) -> None:
    for text in texts:
        if "\0" in text:
            raise InputError(f"{name}: its text holds a NUL character, so it is not text")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(f"{name}: its text holds half of a surrogate pair, so it is not text") from None


# To rows and back ------------------------------------------------------------------------------------------


def metadata_text(document: Document) -> str:
    """A document's metadata as JSON; equal metadata give equal text."""
    try:
        text = _json(dict(document.metadata))
        if deeper(document.metadata, _DEEPEST):
            raise ValueError(f"they have more than {_DEEPEST} levels")
        return text
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"document {document.id[:80]!r}: its metadata are not JSON: {error}") from None


def settings_text(settings: Settings) -> str:
    """Settings as JSON; equal settings give equal text."""
    return _json({**asdict(settings), "extra": dict(settings.extra)})


def settings_of(text: str) -> Settings:
    """The settings of `settings_text`; what a newer llmc added is left out."""
    found: dict[str, Any] = json.loads(text)
    known = Settings.__dataclass_fields__
    return Settings(**{name: value for name, value in found.items() if name in known})


def document_of(row: Sequence[Any]) -> Document:
    """A document of (id, path, title, media_type, digest, size, modified_ns, metadata)."""
    return Document(*row[:7], metadata=json.loads(row[7]))


def document_row(document: Document) -> tuple[str | int, ...]:
    """What `document_of` reads."""
    return (
        document.id,
        document.path,
        document.title,
        document.media_type,
        document.digest,
        int(document.size),
        int(document.modified_ns),
        metadata_text(document),
    )


def feature_row(features: Features) -> FeatureRow:
    """Features as they are kept."""
    return (
        _bytes(features.terms, U64),
        _bytes(features.title_counts, U16),
        _bytes(features.text_counts, U16),
        _bytes(features.spans, U64),
        pack_mentions(features.mentions),
    )


def is_whole(row: Sequence[Any]) -> bool:
    """Whether five columns are a FeatureRow: arrays of whole numbers, as many of one as of the other."""
    if not all(isinstance(one, bytes) for one in row):
        return False
    terms, title_counts, text_counts, spans, mentions = row
    counted = len(terms) == 4 * len(title_counts) == 4 * len(text_counts)
    return counted and len(terms) % 8 == len(spans) % 8 == 0 and _are_mentions(mentions)


def _are_mentions(data: bytes) -> bool:
    if not data:
        return True
    count = int.from_bytes(data[:_COUNT], "little")
    keys = _COUNT + 16 * count
    try:
        data[keys:].decode()
    except UnicodeDecodeError:
        return False
    return keys <= len(data) and data.count(b"\0", keys) == count - 1


def damaged_features(location: str, chunk: str, document: str) -> InputError:
    """What to tell people where what was worked out of a chunk is not there, or not whole."""
    store = shlex.quote(location)
    return InputError(
        f"{location}: is damaged: the words and names of passage {chunk} of document {document!r}",
        remedy=f"work them out again: llmc rag delete {store} {shlex.quote(document)}, then sync or add it",
    )


def damaged_vector(location: str, chunk: str) -> InputError:
    """The same where a chunk's vector is of another length than the store's."""
    return InputError(
        f"{location}: is damaged: the vector of passage {chunk}",
        remedy=f"make them anew: llmc rag embed {shlex.quote(location)} --embedder SPEC",
    )


def features_of_row(row: Sequence[Any], text: str) -> Features:
    """Features of a FeatureRow that `is_whole`, and its chunk's text; its arrays are views of the bytes, and
    cannot be written to."""
    terms, title_counts, text_counts, spans, mentions = row
    return Features(
        terms=np.frombuffer(terms, U64),
        title_counts=np.frombuffer(title_counts, U16),
        text_counts=np.frombuffer(text_counts, U16),
        spans=np.frombuffer(spans, U64),
        mentions=mentions_of(mentions, text),
    )


_COUNT = 4
"""Bytes before the arrays of packed mentions: how many there are."""


def pack_mentions(mentions: Sequence[Mention]) -> bytes:
    """Mentions [n] as bytes: n, the keys' hashes [n] u64, starts [n] u32, ends [n] u32, the keys in UTF-8
    with a NUL between two. What stands at its place in the text is not kept twice.
    """
    if not mentions:
        return b""
    hashes = np.array([hash_of(one.key) for one in mentions], U64)
    places = np.array([[one.start for one in mentions], [one.end for one in mentions]], U32)
    keys = "\0".join([one.key for one in mentions]).encode()
    return len(mentions).to_bytes(_COUNT, "little") + hashes.tobytes() + places.tobytes() + keys


def mentions_of(data: bytes, text: str) -> tuple[Mention, ...]:
    """The mentions of packed ones, in a chunk of this text."""
    keys = mention_keys(data)
    if not keys:
        return ()
    places = np.frombuffer(data, U32, 2 * len(keys), _COUNT + 8 * len(keys)).tolist()
    starts, ends = places[: len(keys)], places[len(keys) :]
    surfaces = [text[start:end] for start, end in zip(starts, ends, strict=True)]
    return tuple(map(Mention, keys, surfaces, starts, ends))


def mention_hashes(data: bytes) -> bytes:
    """Of packed mentions the keys' hashes, [n] u64."""
    count = int.from_bytes(data[:_COUNT], "little")
    return data[_COUNT : _COUNT + 8 * count]


def mention_starts(data: bytes) -> list[int]:
    """Of packed mentions the places where they begin."""
    count = int.from_bytes(data[:_COUNT], "little")
    return np.frombuffer(data, U32, count, _COUNT + 8 * count).tolist() if count else []


def mention_keys(data: bytes) -> list[str]:
    """Of packed mentions the keys."""
    if not data:
        return []
    count = int.from_bytes(data[:_COUNT], "little")
    return data[_COUNT + 16 * count :].decode().split("\0")


def asked(id: str) -> str:
    """An id that somebody asks for, as a database takes it: with a NUL or half a surrogate it is nobody's."""
    return id.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def vector_bytes(vector: np.ndarray) -> bytes:
    """A vector as float16, little-endian."""
    return _bytes(vector, F16)


def _bytes(array: np.ndarray, dtype: np.dtype[Any]) -> bytes:
    return np.ascontiguousarray(array, dtype=dtype).tobytes()


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
