"""Communities of passages and the names in them, for questions about the whole.

The graph joins each passage with the entities that it names, with the documents that it links to, and with
its document's next passage; relations of triples join entities. Leiden (Traag et al. 2019) splits it. All of
it follows from one state of a store, in order of the ids and with a fixed seed: the same documents give the
same communities, whatever was written and deleted before. What is kept on disk is a copy that may be lost.
"""

from __future__ import annotations

import contextlib
import math
import random
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .arrays import Strings, read_arrays, write_arrays
from .citations import sentences, words
from .snapshot import Snapshot
from .store.base import Store, StoreReader
from .types import Chunk, Passage

FILE = "communities.arrays"
"""Its name in a store's cache folder."""
VERSION = "1"
RESOLUTION = 1.0
SEED = 7
ITERATIONS = 3
_MAX_COMMON, _FEW = 0.1, 10
"""An entity that more than this share of the passages (and more than a few) name joins everything, and so
nothing.
"""

_MOST_SAID = 4.0
"""A relation counts as often as it is said, up to this."""

_igraph_lock = threading.Lock()


@dataclass(frozen=True)
class Communities:
    """Which passages and entities belong together.

    ids          [n] ids of the chunks
    of_chunk     [n] int32: the community of each; 0 is the largest
    centrality   [n] float32: weight of a chunk's edges inside its community
    names        [m] entities
    of_entity    [m] int32; -1 for those that one passage alone names
    weights      [m] float32: weight of an entity's edges inside its community
    """

    ids: Sequence[str]
    of_chunk: np.ndarray
    centrality: np.ndarray
    names: Sequence[str]
    of_entity: np.ndarray
    weights: np.ndarray

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self.of_chunk.max(initial=-1)) + 1

    def sizes(self) -> np.ndarray:
        """[count] passages of each."""
        return np.bincount(self.of_chunk, minlength=self.count)

    def chunks(self, community: int, limit: int | None = None) -> list[str]:
        """Its chunks, the most central first."""
        members = np.flatnonzero(self.of_chunk == community)
        order = np.lexsort((members, -self.centrality[members]))
        return [self.ids[int(place)] for place in members[order][:limit]]

    def entities(self, community: int, limit: int = 8) -> list[str]:
        """Its entities, those first that hold it together."""
        members = np.flatnonzero(self.of_entity == community)
        order = np.lexsort((members, -self.weights[members]))
        return [self.names[int(place)] for place in members[order][:limit]]

    def rank(self, chunks: Sequence[str], whole: bool) -> list[int]:
        """Communities for a question: by the passages that it found, best first; of a question about the
        whole (`whole`) by their size, and by what was found among equals.
        """
        place_of = {one: place for place, one in enumerate(self.ids)} if chunks else {}
        found = np.zeros(self.count)
        for rank, chunk in enumerate(chunks):
            if chunk in place_of:
                found[self.of_chunk[place_of[chunk]]] += 1 / (10 + rank)
        sizes = self.sizes().astype(np.float64)
        score = sizes + found if whole else found + 1e-9 * sizes
        order = np.lexsort((np.arange(self.count), -score))
        return [int(one) for one in order if whole or found[one] > 0]


def communities_of(
    store: Store, snapshot: Snapshot | None = None, *, resolution: float = RESOLUTION
) -> Communities:
    """The communities of a snapshot (by custom of a store's newest state), from the store's cache folder
    where they are there and not stale.
    """
    snapshot = Snapshot.of(store) if snapshot is None else snapshot
    facts = {**snapshot.facts, "version": VERSION, "resolution": repr(resolution)}
    path = Path(store.cache_folder) / FILE if store.cache_folder else None
    kept = read_arrays(path, facts) if path is not None else None
    if kept is None:
        kept = detect(snapshot.arrays, resolution)
        if path is not None:
            with contextlib.suppress(OSError):  # a folder that cannot be written costs time, nothing else
                path.parent.mkdir(parents=True, exist_ok=True)
                write_arrays(path, kept, facts)
    return Communities(
        Strings(kept["ids_data"], kept["ids_bounds"]),
        kept["of_chunk"],
        kept["centrality"],
        Strings(kept["entities_data"], kept["entities_bounds"]),
        kept["of_entity"],
        kept["weights"],
    )


# Detection -------------------------------------------------------------------------------------------------


def detect(arrays: Mapping[str, np.ndarray], resolution: float = RESOLUTION) -> dict[str, np.ndarray]:
    """The arrays of `Communities` from those of a snapshot. Pure: the same arrays give the same."""
    chunks = len(arrays["document_of"])
    names = Strings(arrays["entities_data"], arrays["entities_bounds"])
    heads, tails, weights = _edges(arrays, names)
    nodes = chunks + len(names)
    membership = _leiden(nodes, heads, tails, weights, resolution)
    inside = membership[heads] == membership[tails]
    strength = np.bincount(heads, weights * inside, nodes) + np.bincount(tails, weights * inside, nodes)
    degree = np.bincount(heads, minlength=nodes) + np.bincount(tails, minlength=nodes)
    of_chunk, renamed = _renumbered(membership[:chunks], int(membership.max(initial=-1)) + 1)
    of_entity = np.where(degree[chunks:] > 0, renamed[membership[chunks:]], -1) if nodes else membership
    return {
        "ids_data": arrays["ids_data"],
        "ids_bounds": arrays["ids_bounds"],
        "entities_data": arrays["entities_data"],
        "entities_bounds": arrays["entities_bounds"],
        "of_chunk": of_chunk,
        "centrality": strength[:chunks].astype(np.float32),
        "of_entity": of_entity.astype(np.int32),
        "weights": strength[chunks:].astype(np.float32),
    }


def _edges(arrays: Mapping[str, np.ndarray], names: Strings) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(heads, tails, weights): chunks are nodes 0 … n - 1, entities n … n + m - 1."""
    chunks = len(arrays["document_of"])
    bounds, entities = np.asarray(arrays["chunk_entity_bounds"]), np.asarray(arrays["chunk_entities"])
    counts = np.asarray(arrays["chunk_entity_counts"], np.float64)
    df = np.bincount(entities, minlength=len(names))
    useful = (df >= 2) & (df <= max(_FEW, _MAX_COMMON * chunks))
    kept = useful[entities]
    rows = np.repeat(np.arange(chunks), np.diff(bounds))[kept]
    columns = entities[kept]
    strength = (1 + np.log(np.maximum(counts[kept], 1))) * np.sqrt(np.log((1 + chunks) / df[columns]))
    parts = [(rows, columns + chunks, strength), _neighbours(arrays), _links(arrays)]
    pairs = np.asarray(arrays["relations"], np.int64) + chunks
    said = np.minimum(np.asarray(arrays["relation_counts"], np.float64), _MOST_SAID)
    parts.append((pairs[:, 0], pairs[:, 1], said))
    heads, tails, weights = (np.concatenate([part[i] for part in parts]) for i in range(3))
    return heads.astype(np.int64), tails.astype(np.int64), weights.astype(np.float64)


def _neighbours(arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Passages of one document that follow each other."""
    document_of, ordinals = np.asarray(arrays["document_of"]), np.asarray(arrays["ordinals"])
    order = np.lexsort((ordinals, document_of))
    same = document_of[order][1:] == document_of[order][:-1]
    return order[:-1][same], order[1:][same], np.full(int(same.sum()), 2.0)


def _links(arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Passages, and the first passages of the documents that they name."""
    document_of, ordinals = np.asarray(arrays["document_of"]), np.asarray(arrays["ordinals"])
    first = np.zeros(int(document_of.max(initial=-1)) + 1, np.int64)
    opening = np.flatnonzero(ordinals == 0)
    first[document_of[opening]] = opening
    bounds = np.asarray(arrays["link_bounds"])
    rows = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    return rows, first[np.asarray(arrays["link_documents"])], np.asarray(arrays["link_weights"], np.float64)


def _leiden(
    nodes: int, heads: np.ndarray, tails: np.ndarray, weights: np.ndarray, resolution: float
) -> np.ndarray:
    """[nodes] int64. A node without edges is a community of its own."""
    if not len(heads):
        return np.arange(nodes)
    import igraph

    graph = igraph.Graph(n=nodes, edges=np.stack([heads, tails], 1))
    with _igraph_lock:  # igraph's generator belongs to the process
        igraph.set_random_number_generator(random.Random(SEED))
        try:
            found = graph.community_leiden(
                objective_function="modularity",
                weights=weights.tolist(),
                resolution=resolution,
                n_iterations=ITERATIONS,
            )
        finally:
            igraph.set_random_number_generator(random)
    return np.array(found.membership, np.int64)


def _renumbered(membership: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """([n] int32 with the largest community 0, the first chunk deciding among equals; old → new number).
    Communities without a chunk have no number: -1.
    """
    present, first, sizes = np.unique(membership, return_index=True, return_counts=True)
    order = np.lexsort((first, -sizes))
    renamed = np.full(max(count, 1), -1, np.int32)
    renamed[present[order]] = np.arange(len(present), dtype=np.int32)
    return renamed[membership], renamed


# Summaries -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """What a community is about: its entities, and its most central sentences with their places. `members`
    are all of its chunks.
    """

    community: int
    members: tuple[str, ...]
    entities: tuple[str, ...]
    sentences: tuple[Passage, ...]

    @property
    def text(self) -> str:
        """In words."""
        said = " ".join(" ".join(one.text.split()) for one in self.sentences)
        return f"{', '.join(self.entities)}. {said}" if self.entities else said


_READ = 24
"""Central chunks that a summary is made from."""
_ALIKE = 0.5
_SHORTEST, _LONGEST = 30, 400  # letters of a sentence that can stand by itself


def summarise(
    communities: Communities,
    community: int,
    reader: StoreReader,
    *,
    count: int = 4,
    question: str = "",
    behind: bool = False,
) -> Summary:
    """The extractive summary of a community: sentences that share most words with the others, not twice the
    same, each of another document where there are enough. Words of `question` count more. Lines of code, of
    tables and the like are taken only where there is no running text. `behind`: the reader's state is not the
    one that the communities are of, so that only entities count which what is read here still names.
    """
    chunks = list(reader.chunks(communities.chunks(community, _READ)))
    everything = list(_candidates(chunks))
    candidates = [one for one in everything if is_prose(one[0].text)] or everything
    spread: Counter[int] = Counter(term for _, terms in candidates for term in terms)
    asked = {word.term for word in words(question)}
    scored = sorted(
        ((_centrality(terms, spread, asked), -place) for place, (_, terms) in enumerate(candidates)),
        reverse=True,
    )
    chosen: list[tuple[Passage, frozenset[int]]] = []
    for once in (True, False):  # first each document once
        for _, place in scored:
            passage, terms = candidates[-place]
            if len(chosen) == count:
                break
            if once and any(passage.document == other.document for other, _ in chosen):
                continue
            if any(len(terms & other) > _ALIKE * min(len(terms), len(other)) for _, other in chosen):
                continue
            chosen.append((passage, terms))
    entities = communities.entities(community)
    if behind:
        named = {mention.key for chunk in chunks for mention in chunk.features.mentions}
        entities = [one for one in entities if one in named]
    return Summary(
        community,
        tuple(communities.chunks(community)),
        tuple(entities),
        tuple(passage for passage, _ in chosen),
    )


def _candidates(chunks: Sequence[Chunk]) -> Iterator[tuple[Passage, frozenset[int]]]:
    for chunk in chunks:
        for start, end in sentences(chunk.text):
            if _SHORTEST <= end - start <= _LONGEST:
                text = chunk.text[start:end]
                terms = frozenset(word.term for word in words(text))
                if terms:
                    yield _passage(chunk, text, chunk.start + start), terms


_PROSE_LETTERS, _PROSE_WORDS = 0.75, 4
_ENDS = tuple(".!?…。！？\"'”’)")
_NOT_PROSE = re.compile(r"^[\s>]*(?:\$|\||[-*•+]\s|\d{1,3}[.)]\s)|[{}=<>|\\]|::|\w\(\)|--\w")


def is_prose(text: str) -> bool:
    """Whether a stretch of text reads as a sentence: it begins and ends as one, most of it is letters, and
    nothing in it looks like a command, code or a row of a table.
    """
    text = text.strip()
    if not text or text[0].islower() or not text.endswith(_ENDS) or _NOT_PROSE.search(text):
        return False
    letters = sum(letter.isalpha() or letter == " " for letter in text)
    wordy = len(text.split()) >= _PROSE_WORDS or not text.isascii()
    return wordy and letters >= _PROSE_LETTERS * len(text)


def _passage(chunk: Chunk, text: str, start: int, score: float = 0.0) -> Passage:
    return Passage(
        chunk.id,
        chunk.document,
        chunk.title,
        chunk.heading,
        text,
        start,
        start + len(text),
        chunk.page,
        score,
    )


def _centrality(terms: frozenset[int], spread: Mapping[int, int], asked: set[int]) -> float:
    """Mean weight of a sentence's words, damped for long ones."""
    weight = sum(math.log1p(spread[term] - 1) + (2.0 if term in asked else 0.0) for term in terms)
    return weight / math.sqrt(len(terms) + 4)


_THINGS = r"(?:themes?|topics?|subjects?|ideas?|points?|patterns?|trends?|issues?|areas?|findings|categories)"
_PLACES = r"(?:documents?|corpus|collection|texts?|files|data ?set|archive|folder|library|everything)"
_WHOLE = re.compile(
    rf"\b(?:main|major|key|central|common|recurring|overall|general|broad|principal)\b.{{0,40}}\b{_THINGS}\b"
    rf"|\b{_THINGS}\b.{{0,60}}\b(?:{_PLACES}|covered)\b"
    r"|\b(?:summari[sz]e|summary of|overview of|describe|what (?:is|are))"
    rf" (?:(?:all|the|this|these|of|in|my|our|whole|entire) )*{_PLACES}\b"
    rf"|\bwhat (?:is|are) (?:all )?(?:this|these|the) (?:\w+ ){{0,2}}{_PLACES} about\b",
    re.IGNORECASE | re.DOTALL,
)

_NAME = re.compile(r"[\"'“‘(]*(?:[^\W\d_a-z]\w|\d)")


def is_about_the_whole(question: str) -> bool:
    """Whether a question asks about the documents as a whole ("What are the main topics?").

    One that names something ("a key figure in the San Francisco Bay Area") asks about that.
    """
    words = question.split()
    named = any(_NAME.match(word) for word in words[1:])
    return len(question) < 500 and not named and _WHOLE.search(question) is not None
