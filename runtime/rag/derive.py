"""The arrays of a snapshot, from the chunks of one consistent state of a store: `derive(reader)`. Nothing
depends on how that state came about: chunks are read in order of their ids, and every number is worked out
of them alone.

Chunks are read as columns, some hundred at a time, and no object is made for each. Memory stays near the
result's: hashes go through temporary files and are looked up a block at a time.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from typing import IO, Any

import numpy as np

from .arrays import Strings
from .features.demonyms import PLACE_OF
from .features.names import FUNCTION_WORDS, name_key, title_keys
from .features.terms import entity_hash, hash_of, term_of
from .features.titles import MAX_TITLE_WORDS
from .store.base import BEGINNING, Columns, StoreReader
from .store.records import mention_hashes, mention_keys, mention_starts
from .types import Triple
from .walk import walk_matrix

DERIVATION_VERSION = 1
"""Grows whenever the same chunks would give other arrays."""

MAX_NAMESAKES = 8
"""A name that more documents carry says nothing about which is meant."""

_BLOCK = 1 << 20

_SUBJECT_ENDS = re.compile(r"\s(?:is|was|are|were|refers?|means?|stands)\s")
_COMMON_MOST = 20
_OWN, _SHORT, _ALIAS, _COMMON = 1.0, 0.7, 0.5, 0.5
"""How sure a mention of a document's name is: its title; the title without parenthesis; a name of its first
sentence."""


class _Column:
    """One array per chunk, kept back to back in a temporary file."""

    def __init__(self, dtype: str) -> None:
        self._dtype = np.dtype(dtype)
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (gone when the column is)
        self._sizes: list[int] = []
        self._size = 0

    def add(self, arrays: Sequence[bytes]) -> None:
        """The arrays of some more chunks, as bytes."""
        self._file.writelines(arrays)
        sizes = [len(one) // self._dtype.itemsize for one in arrays]
        self._sizes += sizes
        self._size += sum(sizes)

    def bounds(self) -> np.ndarray:
        """[chunks + 1] int64: where each chunk's array begins; and the end."""
        bounds = np.zeros(len(self._sizes) + 1, np.int64)
        np.cumsum(self._sizes, out=bounds[1:])
        return bounds

    def array(self) -> np.ndarray:
        self._file.flush()
        if not self._size:
            return np.zeros(0, self._dtype)
        return np.memmap(self._file, self._dtype, mode="r", shape=(self._size,))

    def close(self) -> None:
        self._file.close()


class Derivation:
    """Collects chunks, then gives the arrays."""

    def __init__(self) -> None:
        self._ids: list[str] = []
        self._documents: dict[str, int] = {}
        self._document_of: list[int] = []
        self._ordinals: list[int] = []
        self._title_of: list[str] = []
        self._subjects: dict[int, tuple[int, list[int]]] = {}
        """Document → the names that its first sentence begins with (0 for none) and that it holds besides."""
        self._terms, self._in_title, self._in_text = _Column("<u8"), _Column("<u2"), _Column("<u2")
        self._spans, self._mentions = _Column("<u8"), _Column("<u8")
        self._names: dict[int, str] = {}
        self._triples: list[tuple[str, int, int]] = []

    def add(self, chunks: Columns) -> None:
        """Some more chunks."""
        known = self._documents
        of = [known.setdefault(document, len(known)) for document in chunks.documents]
        self._ids += chunks.ids
        self._document_of += of
        self._ordinals += chunks.ordinals
        self._title_of += [title.strip() for title in chunks.titles]
        for column, arrays in (
            (self._terms, chunks.terms),
            (self._in_title, chunks.title_counts),
            (self._in_text, chunks.text_counts),
            (self._spans, chunks.spans),
        ):
            column.add(arrays)
        hashes = [mention_hashes(data) for data in chunks.mentions]
        self._mentions.add(hashes)
        self._name(chunks.mentions, hashes)
        for place, ordinal in enumerate(chunks.ordinals):
            if ordinal == 0:
                found = np.frombuffer(hashes[place], "<u8").tolist()
                starts = mention_starts(chunks.mentions[place])
                self._subjects[of[place]] = _subject_of(chunks.beginnings[place], found, starts)

    def _name(self, mentions: Sequence[bytes], hashes: Sequence[bytes]) -> None:
        """Learns the names that some chunks are the first to mention."""
        known = self._names
        for data, one in zip(mentions, hashes, strict=True):
            keys = np.frombuffer(one, "<u8").tolist()
            if not known.keys() >= set(keys):
                for key, name in zip(keys, mention_keys(data), strict=True):
                    known.setdefault(key, name)

    def close(self) -> None:
        """Give the temporary files back; what `arrays` gave does not need them."""
        for column in (self._terms, self._in_title, self._in_text, self._spans, self._mentions):
            column.close()

    def relate(self, triple: Triple) -> None:
        """A relation found in a chunk: subject and object are entities of the chunk, and neighbours."""
        keys = [name_key(name) for name in (triple.subject, triple.object)]
        hashes = [hash_of(key) for key in keys]
        if not all(keys) or entity_hash(hashes[0]) == entity_hash(hashes[1]):
            return
        for key, value in zip(hashes, keys, strict=True):
            self._names.setdefault(key, value)
        self._triples.append((triple.chunk, hashes[0], hashes[1]))

    def arrays(self) -> dict[str, np.ndarray]:
        count = len(self._ids)
        document_of = np.array(self._document_of, np.int32)
        documents = list(self._documents)
        names = self._document_names(len(documents))
        arrays: dict[str, np.ndarray] = {
            "document_of": document_of,
            "ordinals": np.array(self._ordinals, np.int32),
            **_strings("ids", self._ids),
            **_strings("documents", documents),
        }
        arrays |= _postings(count, self._terms, self._in_title, self._in_text)
        name_table = _name_table(names)
        arrays |= name_table
        arrays |= self._entities(count, names, document_of)
        arrays |= _entity_terms(arrays)
        arrays |= _links(
            count,
            self._spans,
            name_table,
            self._contained(),
            document_of,
            self._common(arrays),
        )
        arrays |= _relations(arrays, self._triples)
        arrays |= walk_matrix(arrays)
        return arrays

    def _document_names(self, count: int) -> list[list[tuple[int, float]]]:
        """Of each document its names and how sure each is, the surest first."""
        titles: list[str] = [""] * count
        for document, title in zip(self._document_of, self._title_of, strict=True):
            titles[document] = titles[document] or title
        self._titles = titles
        names: list[list[tuple[int, float]]] = []
        for document, title in enumerate(titles):
            first, others = self._subjects.get(document, (0, []))
            keys = title_keys(title) if title else []
            found: dict[int, float] = {}
            for place, key in enumerate(keys):
                hashed = hash_of(key)
                self._names.setdefault(hashed, key)
                found[hashed] = _SHORT if place else _OWN
            for hashed in [first, *others]:
                if hashed:
                    found.setdefault(hashed, _ALIAS if keys or hashed != first else _OWN)
            names.append(list(found.items()))
        self._name_keys = {h for row in names for h, _ in row}
        self._title_keys = {h for row in names for h, weight in row if weight > _ALIAS}
        return names

    def _common(self, arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Passages that hold a title of one word as a word, in whatever case: "a cranberry bog" →
        "Cranberry"."""
        known, vocabulary, bounds = arrays["name_hashes"], arrays["vocabulary"], arrays["posting_bounds"]
        most = max(_COMMON_MOST, len(self._ids) // 500)
        chunks: list[np.ndarray] = [np.zeros(0, np.int64)]
        names: list[np.ndarray] = [np.zeros(0, np.int64)]
        for place, key in enumerate(known.tolist()):
            word = self._names[key]
            if " " in word or key not in self._title_keys or word in PLACE_OF:
                continue  # the term of "dutch" is that of its place, which the title does not name
            term = term_of(word)
            at = int(np.searchsorted(vocabulary, np.uint64(term)))
            if at == len(vocabulary) or vocabulary[at] != term or bounds[at + 1] - bounds[at] > most:
                continue
            here = slice(bounds[at], bounds[at + 1])
            found = arrays["posting_chunks"][here][arrays["posting_texts"][here] > 0]
            chunks.append(found)
            names.append(np.full(len(found), place))
        return np.concatenate(chunks), np.concatenate(names)

    def _contained(self) -> dict[int, list[int]]:
        """Names inside longer names: where "new york city" is mentioned, "new york" is not."""
        found: dict[int, list[int]] = {}
        by_name = {self._names[key]: key for key in self._name_keys}
        for name, longer in by_name.items():
            words = name.split(" ")
            if not 1 < len(words) <= MAX_TITLE_WORDS:
                continue
            parts = {" ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}
            shorter = (parts & by_name.keys()) - {name}
            if shorter:
                found[longer] = sorted(by_name[part] for part in shorter)
        return found

    def _entities(
        self, count: int, names: list[list[tuple[int, float]]], document_of: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Entities, and the matrix of how often each chunk names each: mentions once, its document's title
        twice."""
        from scipy.sparse import csr_matrix

        mentions = self._mentions.array()
        named = {entity_hash(key): PLACE_OF.get(name, name) for key, name in self._names.items()}
        known = np.array(sorted(named), np.uint64)
        own = [[(key, 2.0 * weight) for key, weight in row if weight > _ALIAS] for row in names]
        extra = [
            (chunk, key, weight)
            for chunk, document in enumerate(document_of)
            for key, weight in own[document]
        ]
        place = {chunk: i for i, chunk in enumerate(self._ids)} if self._triples else {}
        extra += [(place[c], key, 1.0) for c, *ends in self._triples if c in place for key in ends]
        sizes = np.diff(self._mentions.bounds())
        rows = np.concatenate([np.repeat(np.arange(count), sizes), [e[0] for e in extra]]).astype(np.int32)
        keys = np.concatenate([np.asarray(mentions), np.array([e[1] for e in extra], np.uint64)])
        weights = np.concatenate([np.ones(len(mentions)), [e[2] for e in extra]]).astype(np.float32)
        columns = _entity_places(known, keys)
        matrix = csr_matrix((weights, (rows, columns)), shape=(count, len(known)))
        matrix.sum_duplicates()
        return {
            "entity_hashes": known,
            **_strings("entities", [named[int(key)] for key in known]),
            "chunk_entity_bounds": matrix.indptr.astype(np.int64),
            "chunk_entities": matrix.indices.astype(np.int32),
            "chunk_entity_counts": matrix.data,
        }


def _entity_places(known: np.ndarray, names: np.ndarray) -> np.ndarray:
    """Of hashes of names the entities that they name: places in `known`, which ascends."""
    distinct, which = np.unique(names, return_inverse=True)
    entities = np.array([entity_hash(int(name)) for name in distinct], np.uint64)
    return np.searchsorted(known, entities)[which].reshape(names.shape).astype(np.int32)


def _strings(name: str, values: list[str]) -> dict[str, np.ndarray]:
    strings = Strings.of(values)
    return {f"{name}_data": strings.data, f"{name}_bounds": strings.bounds}


def _postings(count: int, terms: _Column, in_title: _Column, in_text: _Column) -> dict[str, np.ndarray]:
    """Of each term the chunks that hold it, ascending, and how often title and text do (at most 255)."""
    from scipy.sparse import csr_matrix

    hashes, bounds = terms.array(), terms.bounds()
    parts = [np.unique(hashes[at : at + _BLOCK]) for at in range(0, len(hashes), _BLOCK)]
    vocabulary = np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.uint64)
    ids = np.empty(len(hashes), np.int32)
    for at in range(0, len(hashes), _BLOCK):
        ids[at : at + _BLOCK] = np.searchsorted(vocabulary, hashes[at : at + _BLOCK])
    titles, texts = np.minimum(in_title.array(), 255), np.minimum(in_text.array(), 255)
    # scipy transposes by counting, without sorting; both counts travel as one number
    both = titles.astype(np.uint16) << 8 | texts.astype(np.uint16)
    columns: Any = csr_matrix((both, ids, bounds), shape=(count, len(vocabulary))).tocsc()
    rows = np.repeat(np.arange(count, dtype=np.int32), np.diff(bounds))
    return {
        "vocabulary": vocabulary,
        "chunk_term_bounds": bounds,
        "chunk_terms": ids,
        "chunk_term_titles": titles.astype(np.uint8),
        "chunk_term_texts": texts.astype(np.uint8),
        "posting_bounds": columns.indptr.astype(np.int64),
        "posting_chunks": columns.indices.astype(np.int32),
        "posting_titles": (columns.data >> 8).astype(np.uint8),
        "posting_texts": (columns.data & 255).astype(np.uint8),
        "title_lengths": np.bincount(rows, in_title.array(), count).astype(np.float32),
        "text_lengths": np.bincount(rows, in_text.array(), count).astype(np.float32),
    }


def _entity_terms(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of each entity the terms of its name that stand in any chunk, without function words."""
    vocabulary = arrays["vocabulary"]
    names = Strings(arrays["entities_data"], arrays["entities_bounds"])
    words = [name.split(" ") for name in names]
    term = dict.fromkeys((word for of_name in words for word in of_name), 0)
    for word in term:
        term[word] = 0 if word in FUNCTION_WORDS else term_of(word)
    rows = np.repeat(np.arange(len(words)), [len(of_name) for of_name in words])
    hashes = np.array([term[word] for of_name in words for word in of_name], np.uint64)
    place = np.minimum(np.searchsorted(vocabulary, hashes), max(len(vocabulary) - 1, 0))
    known = (vocabulary[place] == hashes) & (hashes > 0) if len(vocabulary) else np.zeros(len(hashes), bool)
    rows, place = rows[known], place[known]
    order = np.lexsort((place, rows))  # stable: of a word that stands twice in a name, the first stays
    again = np.zeros(len(rows), bool)
    again[order[1:]] = (np.diff(rows[order]) == 0) & (np.diff(place[order]) == 0)
    counts = np.bincount(rows[~again], minlength=len(words))
    bounds = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return {"entity_term_bounds": bounds, "entity_terms": place[~again].astype(np.int32)}


def _relations(arrays: dict[str, np.ndarray], triples: list[tuple[str, int, int]]) -> dict[str, np.ndarray]:
    """Pairs of entities that a model (or a file) related, and how often."""
    known = arrays["entity_hashes"]
    hashes = np.array([ends for _, *ends in triples], np.uint64).reshape(-1, 2)
    pairs = np.sort(_entity_places(known, hashes), axis=1)
    distinct, counts = np.unique(pairs, axis=0, return_counts=True)
    return {"relations": distinct.astype(np.int32), "relation_counts": counts.astype(np.float32)}


def _name_table(names: list[list[tuple[int, float]]]) -> dict[str, np.ndarray]:
    """Of each name the documents that carry it, and how surely."""
    rows = sorted((key, document, weight) for document, row in enumerate(names) for key, weight in row)
    hashes = np.array([row[0] for row in rows], np.uint64)
    known, starts = np.unique(hashes, return_index=True)
    return {
        "name_hashes": known,
        "name_bounds": np.append(starts, len(rows)).astype(np.int64),
        "name_documents": np.array([row[1] for row in rows], np.int32),
        "name_weights": np.array([row[2] for row in rows], np.float32),
    }


def _links(
    count: int,
    column: _Column,
    table: dict[str, np.ndarray],
    contained: dict[int, list[int]],
    document_of: np.ndarray,
    common: tuple[np.ndarray, np.ndarray],
) -> dict[str, np.ndarray]:
    """chunk → document links: the chunk names the document, and no longer name there contains that name.

    Weight: how sure the name is, divided by the root of the number of documents that carry it.
    """
    from scipy.sparse import csr_matrix

    known = table["name_hashes"]
    spans, bounds = column.array(), column.bounds()
    rows: list[np.ndarray] = []
    named: list[np.ndarray] = []
    if len(known):
        for at in range(0, len(spans), _BLOCK):
            block = np.asarray(spans[at : at + _BLOCK])
            place = np.minimum(np.searchsorted(known, block), len(known) - 1)
            hit = np.flatnonzero(known[place] == block)
            rows.append(np.searchsorted(bounds, hit + at, side="right") - 1)
            named.append(place[hit])
    chunks = np.concatenate(rows) if rows else np.zeros(0, np.int64)
    name = np.concatenate(named) if named else np.zeros(0, np.int64)
    longer = _places(known, contained)
    width = max(len(known), 1)
    hidden = [chunks[i] * width + longer[n] for i, n in enumerate(name.tolist()) if n in longer]
    if hidden:
        keep = ~np.isin(chunks * width + name, np.concatenate(hidden))
        chunks, name = chunks[keep], name[keep]
    sureness = np.repeat([1.0, _COMMON], [len(name), len(common[1])])
    chunks, name = np.concatenate([chunks, common[0]]), np.concatenate([name, common[1]])
    sizes = np.diff(table["name_bounds"])[name]
    keep = sizes <= MAX_NAMESAKES
    chunks, name, sizes, sureness = chunks[keep], name[keep], sizes[keep], sureness[keep]
    sources = np.repeat(chunks, sizes)
    starts = np.repeat(table["name_bounds"][name], sizes)
    offset = np.arange(len(sources)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    entry = starts + offset
    targets = table["name_documents"][entry]
    weights = table["name_weights"][entry] / np.sqrt(np.repeat(sizes, sizes)) * np.repeat(sureness, sizes)
    keep = targets != document_of[sources]
    order = np.lexsort((-weights[keep], targets[keep], sources[keep]))
    sources, targets, weights = sources[keep][order], targets[keep][order], weights[keep][order]
    first = np.ones(len(sources), bool)
    first[1:] = (sources[1:] != sources[:-1]) | (targets[1:] != targets[:-1])
    matrix = csr_matrix(
        (weights[first].astype(np.float32), (sources[first], targets[first])),
        shape=(count, int(document_of.max(initial=-1)) + 1),
    )
    return {
        "link_bounds": matrix.indptr.astype(np.int64),
        "link_documents": matrix.indices.astype(np.int32),
        "link_weights": matrix.data.astype(np.float32),
    }


def _places(known: np.ndarray, contained: dict[int, list[int]]) -> dict[int, np.ndarray]:
    """The same by places among the known names. All are looked up at once: numpy converts what it is given,
    and one by one that takes longer than all the rest."""
    longer = np.searchsorted(known, np.array(list(contained), np.uint64)).tolist()
    parts = list(contained.values())
    flat = np.searchsorted(known, np.array([part for of in parts for part in of], np.uint64))
    ends = np.cumsum([len(of) for of in parts])[:-1] if parts else []
    return dict(zip(longer, np.split(flat, ends), strict=True)) if parts else {}


def derive(store: StoreReader) -> dict[str, np.ndarray]:
    """The arrays of a snapshot, without vectors."""
    derivation = Derivation()
    try:
        for chunks in store.columns():
            derivation.add(chunks)
        for triple in store.triples():
            derivation.relate(triple)
        arrays = derivation.arrays()
    finally:
        derivation.close()
    return arrays | _vectors(store, Strings(arrays["ids_data"], arrays["ids_bounds"]))


def _vectors(store: StoreReader, ids: Strings) -> dict[str, np.ndarray]:
    """Vectors in the order of the passages, zero where there is none: float16, and int8 with a scale for
    each."""
    known, found = store.vectors()
    width = found.shape[1] if len(known) else 0
    if list(ids) == known:
        vectors = np.asarray(found, np.float16)
    else:
        vectors = np.zeros((len(ids), width), np.float16)
        place = {chunk: i for i, chunk in enumerate(ids)}
        rows = [(place[chunk], i) for i, chunk in enumerate(known) if chunk in place]
        if rows:
            target, source = np.array(rows).T
            vectors[target] = found[source]
    small = np.zeros(vectors.shape, np.int8)
    scales = np.zeros(len(vectors), np.float32)
    for at in range(0, len(vectors), 4096):
        block = vectors[at : at + 4096].astype(np.float32)
        scale = np.abs(block).max(axis=1, initial=0) / 127
        small[at : at + 4096] = np.round(block / np.maximum(scale, 1e-9)[:, None])
        scales[at : at + 4096] = scale
    return {"vectors": vectors, "small_vectors": small, "vector_scales": scales}


def _subject_of(beginning: str, hashes: list[int], starts: list[int]) -> tuple[int, list[int]]:
    """What the first sentence is about: the name that it begins with (0 for none), and the other names before
    its verb."""
    verb = _SUBJECT_ENDS.search(beginning[:BEGINNING])
    limit = verb.start() if verb else 0
    first = hashes[0] if hashes and starts[0] <= 4 else 0
    before = (key for key, start in zip(hashes, starts, strict=True) if start < limit)
    return first, [key for key in before if key != first]
