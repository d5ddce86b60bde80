"""The typed objects on the arrows of retrieval: what readers, chunking, features, store and search hand on.

file → Source → reader → Text → chunking → Chunk → features → store → Snapshot → search → Passage
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True)
class Section:
    """A part of a document's text: characters `start` to `end` of `Text.text`.

    `heading` is the path of headings above it, outermost first; `page` counts from 1, where there are pages.
    `unbroken` text is not to be cut inside if it can be helped (a table, a block of code).
    """

    start: int
    end: int
    heading: tuple[str, ...] = ()
    page: int | None = None
    unbroken: bool = False


@dataclass(frozen=True)
class Text:
    """A document as a reader gives it: the extracted text, and sections that cover what is worth finding.

    `id` is the document's: the file's path below the folder, with `/`; where one file holds many documents
    (a row of JSON lines or CSV), `path#row id`. `title` is empty where the document does not say one.
    """

    id: str
    title: str
    text: str
    sections: tuple[Section, ...]
    media_type: str
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])


class Mention(NamedTuple):
    """An entity named in a chunk: the folded name, and what stands at characters `start` to `end` of the
    chunk's text.
    """

    key: str
    surface: str
    start: int
    end: int


@dataclass(frozen=True)
class Features:
    """What is worked out of a chunk alone, once, when it is written. Pure functions of title and text.

    terms        [n] uint64, ascending: hashes of the stemmed words
    title_counts [n] uint16: how often each stands in the title
    text_counts  [n] uint16: how often each stands in the text
    spans        [m] uint64, ascending, distinct: hashes of the word sequences that could be another
                 document's title
    mentions     entities by rules, in the text's order
    """

    terms: np.ndarray
    title_counts: np.ndarray
    text_counts: np.ndarray
    spans: np.ndarray
    mentions: tuple[Mention, ...] = ()


@dataclass(frozen=True)
class Chunk:
    """A passage as it is stored.

    `id` is a hash of document, ordinal, title and text (32 hex digits), so that the same documents give the
    same ids in any order. `start` and `end` are characters of the document's extracted text; `text` is what
    stands there. `vector` [dimensions] float16 of length 1, or None where no embedder is used.
    """

    id: str
    document: str
    ordinal: int
    title: str
    heading: str
    text: str
    start: int
    end: int
    page: int | None
    tokens: int
    features: Features
    vector: np.ndarray | None = None


@dataclass(frozen=True)
class Document:
    """A document as it is stored. `digest` is the sha256 of the bytes that it was read from (for a row: of
    the row); `size` in bytes and `modified_ns` are the file's, and tell an unchanged file without reading it.
    `path` is the file's path below the folder (of many documents, where the file holds many).
    """

    id: str
    path: str
    title: str
    media_type: str
    digest: str
    size: int
    modified_ns: int
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Triple:
    """A relation that a model (or a file) found in a chunk; `origin` says which ("file:NAME", "llm:HASH")."""

    chunk: str
    subject: str
    predicate: str
    object: str
    origin: str


@dataclass(frozen=True)
class Passage:
    """One result of a search. `score` orders results of one question and is not comparable between questions;
    `scores` holds the parts it was made of, by name, each as it entered the fusion (`--explain`).
    """

    chunk: str
    document: str
    title: str
    heading: str
    text: str
    start: int
    end: int
    page: int | None
    score: float
    scores: Mapping[str, float] = field(default_factory=dict[str, float])
