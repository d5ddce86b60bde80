"""What a store's chunks carry besides their text, made anew: vectors of another embedder, features of another
version."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from .features import FEATURES_VERSION, features_of
from .ingest import Progress, parts, passage_text
from .store.base import Record, Settings, Store
from .types import Document

if TYPE_CHECKING:
    from .embedder import Embedder

# Names of Settings.extra: with a point, what says where things lie on this machine, which is no part of the
# logical content.
SPEC = ".embedder"
"""What opens the embedder again."""
UNFINISHED, _UNFINISHED_HASH = "embedding", "embedding_hash"
"""While a store is being embedded again: by which embedder."""

_CHUNKS_AT_ONCE = 512
_DOCUMENTS_AT_ONCE = 100


def reembed(store: Store, embedder: Embedder | None, spec: str | None, progress: Progress | None) -> int:
    """Gives all chunks vectors of an embedder, or takes them; returns how many were made.

    To be called inside `store.writing()`. Killed in between, it goes on from there when it is called again
    with the same embedder; until its end the store counts as one without.
    """
    bare = with_embedder(store.settings(), None, spec)
    if embedder is None:
        store.drop_vectors()
        store.set_settings(bare)
        return 0
    if store.settings().extra.get(_UNFINISHED_HASH) != embedder.hash:
        # Two steps, since vectors and their dimensions change together: killed in between, it begins again.
        unknown = {**bare.extra, UNFINISHED: _again(spec)}
        store.set_settings(replace(bare, dimensions=store.settings().dimensions, extra=unknown))
        store.drop_vectors()
        extra = {**unknown, _UNFINISHED_HASH: embedder.hash}
        store.set_settings(replace(bare, dimensions=embedder.dimensions, extra=extra))
    total = max(1, store.counts()["chunks"])
    count = 0
    with store.reading() as reader:
        missing = (chunk for chunk in reader.chunks() if chunk.vector is None)
        for part in parts(missing, _CHUNKS_AT_ONCE):
            if progress is not None:
                progress("embedding", count / total)
            texts = [passage_text(chunk.title, chunk.heading, chunk.text) for chunk in part]
            vectors = embedder.embed_passages(texts).astype(np.float16)
            store.set_vectors(dict(zip((chunk.id for chunk in part), vectors, strict=True)))
            count += len(part)
    store.set_settings(with_embedder(store.settings(), embedder, spec))
    return count


def renew_features(store: Store) -> None:
    """What is worked out of the text alone, as this version does it; inside `store.writing()`."""

    def renewed(documents: Sequence[Document]) -> Iterator[Record]:
        for document in documents:
            chunks = store.chunks(document=document.id)
            yield Record(
                document,
                tuple(replace(one, features=features_of(one.title, one.text)) for one in chunks),
            )

    for part in parts(list(store.documents()), _DOCUMENTS_AT_ONCE):
        store.put(list(renewed(part)))
    store.set_settings(replace(store.settings(), features_version=FEATURES_VERSION))


def with_embedder(settings: Settings, embedder: Embedder | None, spec: str | None) -> Settings:
    """The settings of a store whose vectors are this embedder's; None: that has none."""
    marks = (UNFINISHED, _UNFINISHED_HASH)
    extra = {key: value for key, value in settings.extra.items() if key not in marks}
    extra[SPEC] = _again(spec) if embedder is not None else "none"
    return replace(
        settings,
        embedder="" if embedder is None else embedder.name,
        embedder_hash="" if embedder is None else embedder.hash,
        dimensions=0 if embedder is None else embedder.dimensions,
        extra=extra,
    )


def _again(spec: str | None) -> str:
    """What opens the embedder again from any directory."""
    if spec is None or spec == "none":
        return "none"
    return os.path.abspath(spec) if os.path.exists(spec) else spec
