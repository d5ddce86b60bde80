"""A store as arrays: everything that search needs of one consistent state, derived purely from its documents.

    snapshot = Snapshot.of(store)

The arrays lie in a file in the store's cache folder, named by generation and versions; it is written beside
and renamed, mapped into memory, and older ones are removed. Where the folder cannot be written, the arrays
stay in memory. What a deletion leaves is what a rebuild would give, because nothing is updated: a newer
generation is derived anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .arrays import Strings, read_arrays, write_arrays
from .derive import DERIVATION_VERSION, derive
from .features import FEATURES_VERSION
from .features.names import name_key
from .features.terms import hash_of
from .store.base import Store, StoreReader
from .walk import entity_idf

_EXACT_ELEMENTS = 10_000_000
"""Vectors up to so many elements are kept as float32; more are compared as int8 first."""


class Snapshot:
    """Passages 0 … n − 1 in order of their ids, with their terms, entities, names, links and vectors."""

    def __init__(self, arrays: dict[str, np.ndarray], facts: Mapping[str, str]) -> None:
        self.arrays = arrays
        self.facts = dict(facts)
        """What it was derived from, and by which version: what tells one snapshot from another."""
        self.generation = int(facts["generation"])
        self.ids = Strings(arrays["ids_data"], arrays["ids_bounds"])
        self.documents = Strings(arrays["documents_data"], arrays["documents_bounds"])
        self.entities = Strings(arrays["entities_data"], arrays["entities_bounds"])
        self.document_of = np.asarray(arrays["document_of"])
        self.ordinals = np.asarray(arrays["ordinals"])

    @classmethod
    def of(cls, store: Store) -> Snapshot:
        """Of the store's newest state."""
        with store.reading() as reader:
            return cls.of_reader(reader, Path(store.cache_folder) if store.cache_folder else None)

    @classmethod
    def of_reader(cls, reader: StoreReader, folder: Path | None = None) -> Snapshot:
        """Of one state; kept in `folder`, if that can be written."""
        facts = _facts(reader)
        found = None if folder is None else cls.kept(folder, facts)
        if found is not None:
            return found
        arrays = derive(reader)
        if folder is not None:
            path = _path(folder, facts)
            with contextlib.suppress(OSError):  # a folder that cannot be written costs time, nothing else
                path.parent.mkdir(parents=True, exist_ok=True)
                write_arrays(path, arrays, facts)
                for old in path.parent.glob("snapshot-*.arrays"):
                    if old != path:
                        old.unlink(missing_ok=True)
                arrays = read_arrays(path, facts) or arrays
        return cls(arrays, facts)

    @classmethod
    def at_hand(cls, store: Store) -> Snapshot | None:
        """Of the store's newest state, where that lies in its cache folder already; nothing is derived."""
        if not store.cache_folder:
            return None
        with store.reading() as reader:
            return cls.kept(Path(store.cache_folder), _facts(reader))

    @classmethod
    def kept(cls, folder: Path, facts: Mapping[str, str]) -> Snapshot | None:
        """The one of these facts that lies in a folder; None where there is none."""
        found = read_arrays(_path(folder, facts), facts)
        return None if found is None else cls(found, facts)

    def __len__(self) -> int:
        return len(self.document_of)

    # Terms ---------------------------------------------------------------------------------------

    @cached_property
    def lengths(self) -> np.ndarray:
        """Words of each passage, those of the title counted twice."""
        return self.arrays["text_lengths"] + 2 * self.arrays["title_lengths"]

    @cached_property
    def average_length(self) -> float:
        return max(float(self.lengths.mean()), 1e-9) if len(self) else 1.0

    @cached_property
    def term_idf(self) -> np.ndarray:
        """Of each term ln(1 + (N − n + ½)/(n + ½))."""
        return entity_idf(len(self), np.diff(self.arrays["posting_bounds"]))

    def term_ids(self, hashes: list[int]) -> np.ndarray:
        """Those of the terms that stand in any passage, in the order given."""
        return find(self.arrays["vocabulary"], hashes)

    # Entities and names --------------------------------------------------------------------------

    @cached_property
    def entity_frequency(self) -> np.ndarray:
        """How many passages name each entity."""
        return np.bincount(self.arrays["chunk_entities"], minlength=len(self.entities))

    @cached_property
    def entity_idf(self) -> np.ndarray:
        return entity_idf(len(self), self.entity_frequency)

    def entity_ids(self, hashes: list[int]) -> np.ndarray:
        return find(self.arrays["entity_hashes"], hashes)

    def entities_of(self, chunk: int) -> np.ndarray:
        bounds = self.arrays["chunk_entity_bounds"]
        return self.arrays["chunk_entities"][bounds[chunk] : bounds[chunk + 1]]

    @cached_property
    def chunks_by_entity(self) -> Any:
        """[entities, passages] compressed rows: who names an entity, and how often."""
        from scipy.sparse import csr_matrix

        a = self.arrays
        shape = (len(self), len(self.entities))
        return csr_matrix(
            (a["chunk_entity_counts"], a["chunk_entities"], a["chunk_entity_bounds"]), shape=shape
        ).T.tocsr()

    @cached_property
    def links(self) -> Any:
        """[passages, documents] compressed rows: how surely a passage names a document."""
        from scipy.sparse import csr_matrix

        a = self.arrays
        return csr_matrix(
            (a["link_weights"], a["link_documents"], a["link_bounds"]), shape=(len(self), len(self.documents))
        )

    @cached_property
    def walk(self) -> Any:
        """The random walk's matrix, passages first, then entities."""
        from scipy.sparse import csr_matrix

        a = self.arrays
        size = len(self) + len(self.entities)
        return csr_matrix((a["walk_shares"], a["walk_nodes"], a["walk_bounds"]), shape=(size, size))

    # Vectors -------------------------------------------------------------------------------------

    @property
    def has_vectors(self) -> bool:
        return self.arrays["vectors"].shape[1] > 0

    @cached_property
    def exact(self) -> np.ndarray | None:
        """All vectors as float32, where they are few enough."""
        vectors = self.arrays["vectors"]
        return vectors.astype(np.float32) if vectors.size <= _EXACT_ELEMENTS else None

    def vectors_of(self, chunks: np.ndarray) -> np.ndarray:
        if self.exact is not None:
            return self.exact[chunks]
        return self.arrays["vectors"][chunks].astype(np.float32)


def _facts(reader: StoreReader) -> dict[str, str]:
    return {
        "generation": str(reader.generation),
        "features": f"{FEATURES_VERSION}.{DERIVATION_VERSION}",
        "embedder": reader.settings().embedder_hash,
        "chunks": str(reader.counts().get("chunks", 0)),
    }


def _path(folder: Path, facts: Mapping[str, str]) -> Path:
    return folder / f"snapshot-{facts['generation']}-{facts['features']}.arrays"


def find(known: np.ndarray, hashes: list[int]) -> np.ndarray:
    """Where the hashes stand in an ascending array; those that do not are left out."""
    wanted = np.array(hashes, np.uint64)
    if not len(known) or not len(wanted):
        return np.zeros(0, np.int64)
    at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return at[known[at] == wanted]


__all__ = ["Snapshot", "find", "hash_of", "name_key"]
