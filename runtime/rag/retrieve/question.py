"""A question as the snapshot sees it: its terms, the entities it names, the documents whose names stand in
it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ....ir.errors import InputError
from ..features.entities import mentions_in
from ..features.names import FUNCTION_WORDS, Token, key_of, tokens_of
from ..features.terms import entity_hash, hash_of, term_of, words_of
from ..features.titles import MAX_TITLE_WORDS
from ..snapshot import Snapshot, find

MAX_QUESTION = 100_000
MAX_NAMING = 5000
"""Characters of a question in which names are looked for: a longer one is a document, and named by its
words."""
MAX_TERMS = 256
"""Different words of a question that are searched for, the rarest: a pasted page is no slower than a
paragraph."""


@dataclass(frozen=True)
class Question:
    """terms [q] ids, and how rare each is; entities [e] ids; named [d] documents, and how surely each is
    meant."""

    text: str
    terms: np.ndarray
    idf: np.ndarray
    entities: np.ndarray
    named: np.ndarray
    certainty: np.ndarray


def check_question(text: str) -> str:
    """The question without blanks around it; InputError where there is none, or a book."""
    text = text.strip()
    if not text:
        raise InputError("the question is empty", remedy="ask something")
    if len(text) > MAX_QUESTION:
        raise InputError(
            f"the question has {len(text):,} characters, at most {MAX_QUESTION:,} are searched for",
            remedy="shorten it; a document to search with belongs into the index",
        )
    return text


def parse(text: str, snapshot: Snapshot) -> Question:
    words = words_of(text)
    content = [word for word in words if word not in FUNCTION_WORDS] or words
    terms = snapshot.term_ids(list(dict.fromkeys(term_of(word) for word in content)))
    idf = snapshot.term_idf[terms]
    if len(terms) > MAX_TERMS:
        rarest = np.sort(np.argsort(-idf, kind="stable")[:MAX_TERMS])
        terms, idf = terms[rarest], idf[rarest]
    tokens = tokens_of(text[:MAX_NAMING])
    names = _names_in(tokens, snapshot)
    keys = [hash_of(mention.key) for mention in mentions_in(text[:MAX_NAMING], tokens)]
    keys += [int(snapshot.arrays["name_hashes"][name]) for name in names]
    entities = np.unique(snapshot.entity_ids([entity_hash(key) for key in keys]))
    named, certainty = _documents_named(names, snapshot)
    return Question(text, terms, idf, entities, named, certainty)


def _names_in(tokens: list[Token], snapshot: Snapshot) -> list[int]:
    """Names of documents that stand in the question, none inside a longer one.

    As in passages, half of a name's words must be capitalised; but in a question without capitals (many
    people type so) any sequence of two words or more may be one, and a single word that passages mostly use
    as a name.
    """
    lower = not any(token.capital for token in tokens[1:])
    spans: list[tuple[int, int]] = []
    hashes: list[int] = []
    for first in range(len(tokens)):
        solid = 0
        for last in range(first, min(first + MAX_TITLE_WORDS, len(tokens))):
            if last > first and not tokens[last].flowing:
                break
            solid += tokens[last].capital or tokens[last].number
            size = last - first + 1
            if size == 1 and tokens[first].folded in FUNCTION_WORDS:
                continue
            if 2 * solid >= size or (lower and (size > 1 or _mostly_a_name(tokens[first].folded, snapshot))):
                spans.append((first, last + 1))
                hashes.append(hash_of(key_of([token.folded for token in tokens[first : last + 1]])))
    known = snapshot.arrays["name_hashes"]
    found: list[tuple[int, int, int]] = []
    for (first, end), key in sorted(
        zip(spans, hashes, strict=True), key=lambda item: item[0][0] - item[0][1]
    ):
        at = find(known, [key])
        if len(at) and not any(other <= first and end <= stop for other, stop, _ in found):
            found.append((first, end, int(at[0])))
    return [name for _, _, name in found]


def _mostly_a_name(word: str, snapshot: Snapshot) -> bool:
    entity, term = snapshot.entity_ids([entity_hash(hash_of(word))]), snapshot.term_ids([term_of(word)])
    if not len(entity) or not len(term):
        return False
    bounds = snapshot.arrays["posting_bounds"]
    return bool(2 * snapshot.entity_frequency[entity[0]] >= bounds[term[0] + 1] - bounds[term[0]])


def _documents_named(names: list[int], snapshot: Snapshot) -> tuple[np.ndarray, np.ndarray]:
    """Documents, and how surely each is meant: the name's certainty by the root of how many carry it."""
    a = snapshot.arrays
    best: dict[int, float] = {}
    for name in names:
        start, end = int(a["name_bounds"][name]), int(a["name_bounds"][name + 1])
        for document, weight in zip(
            a["name_documents"][start:end], a["name_weights"][start:end], strict=True
        ):
            best[int(document)] = max(best.get(int(document), 0.0), float(weight) / (end - start) ** 0.5)
    documents = sorted(best)
    return np.array(documents, np.int64), np.array([best[one] for one in documents], np.float32)
