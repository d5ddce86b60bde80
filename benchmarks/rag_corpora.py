"""The development corpora of retrieval, and larger ones made of them.

Each is the pool of the passages that come with the questions of a public data set, one passage a document:

    hotpotqa   4,937 passages, 500 questions   HotpotQA, validation, distractor setting
    twowiki    3,112           500             2WikiMultiHopQA, train
    musique    1,890           100             MuSiQue, train; with triples that GPT-3.5 extracted

They are written as a person would have them: `jsonl` (one file, a row a passage), `named` (a text file each,
named by its title) or `untitled` (a text file each, numbered: the title stands nowhere).
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMS = ("jsonl", "named", "untitled")
QUESTIONS = "questions.jsonl"
DOCUMENTS = "documents"
_ROWS = "passages.jsonl"


@dataclass(frozen=True)
class Asked:
    """A question; `gold` are indices of the passages that answer it together."""

    id: str
    question: str
    answer: str
    gold: tuple[int, ...]


@dataclass(frozen=True)
class Extracted:
    """What a model found in a passage."""

    entities: tuple[str, ...]
    triples: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Corpus:
    """Passages as (title, text), questions, and where there are some, what was extracted of each passage."""

    name: str
    passages: list[tuple[str, str]]
    questions: list[Asked]
    extracted: list[Extracted] | None = None

    def untitled(self) -> Corpus:
        """The same without titles."""
        return Corpus(self.name, [("", text) for _, text in self.passages], self.questions, self.extracted)


# Reading -------------------------------------------------------------------------------------------------


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def hotpotqa(data: Path) -> Corpus:
    folder = data / "hotpotqa500"
    passages = [(row["title"], row["text"]) for row in _lines(folder / "corpus.jsonl")]
    at = {title: index for index, (title, _) in enumerate(passages)}
    questions = [
        Asked(row["id"], row["question"], row["answer"], tuple(at[title] for title in row["gold_titles"]))
        for row in _lines(folder / "questions.jsonl")
    ]
    return Corpus("hotpotqa", passages, questions)


def twowiki(data: Path) -> Corpus:
    rows = _json(data / "twowiki_train" / "wikihop_train_preprocess.json")
    at: dict[str, int] = {}
    passages: list[tuple[str, str]] = []
    for row in rows:
        for title, sentences in row["context"]:
            if title not in at:
                at[title] = len(passages)
                passages.append((title, " ".join(sentences)))
    questions = [
        Asked(
            row["_id"],
            row["question"],
            row["answer"],
            tuple(dict.fromkeys(at[title] for title, _ in row["supporting_facts"])),
        )
        for row in rows
    ]
    return Corpus("twowiki", passages, questions)


def musique(data: Path) -> Corpus:
    folder = data / "musique_train"
    passages = [(row["title"], row["text"]) for row in _json(folder / "musique_train_corpus.json")]
    at = {passage: index for index, passage in enumerate(passages)}
    questions = [
        Asked(
            row["id"],
            row["question"],
            row["answer"],
            tuple(at[p["title"], p["paragraph_text"]] for p in row["paragraphs"] if p["is_supporting"]),
        )
        for row in _json(folder / "musique_train.json")
    ]
    extracted = [
        Extracted(
            tuple(row["extracted_entities"]),
            # A few triples of the model's have two parts or four, or lists as parts.
            tuple(
                (triple[0], triple[1], triple[2])
                for triple in row["extracted_triples"]
                if len(triple) == 3 and all(isinstance(part, str) and part.strip() for part in triple)
            ),
        )
        for row in _json(folder / "musique_train_openie_gpt35.json")["docs"]
    ]
    return Corpus("musique", passages, questions, extracted)


CORPORA: Mapping[str, Callable[[Path], Corpus]] = {
    "hotpotqa": hotpotqa,
    "twowiki": twowiki,
    "musique": musique,
}


# Writing -------------------------------------------------------------------------------------------------


def document_ids(corpus: Corpus, form: str) -> list[str]:
    """What each passage's document is called once it is indexed."""
    if form == "jsonl":
        return [f"{_ROWS}#{index:06d}" for index in range(len(corpus.passages))]
    if form == "untitled":
        return [f"{index:06d}.txt" for index in range(len(corpus.passages))]
    seen: Counter[str] = Counter()
    names: list[str] = []
    for title, _ in corpus.passages:
        name = re.sub(r'[/\\:*?"<>|\x00-\x1f]', " ", title).strip(" .")[:100] or "passage"
        seen[name.casefold()] += 1
        count = seen[name.casefold()]
        names.append(f"{name}.txt" if count == 1 else f"{count}/{name}.txt")
    return names


def write(corpus: Corpus, form: str, folder: Path) -> list[str]:
    """The documents below folder/documents and folder/questions.jsonl; returns the documents' ids."""
    ids = document_ids(corpus, form)
    documents = folder / DOCUMENTS
    documents.mkdir(parents=True, exist_ok=True)
    if form == "jsonl":
        rows = [
            {"id": id.partition("#")[2], "title": title, "text": text}
            for id, (title, text) in zip(ids, corpus.passages, strict=True)
        ]
        _write_rows(documents / _ROWS, rows)
    else:
        for id, (_, text) in zip(ids, corpus.passages, strict=True):
            path = documents / id
            path.parent.mkdir(exist_ok=True)
            path.write_text(text + "\n", encoding="utf-8")
    _write_rows(folder / QUESTIONS, question_rows(corpus, ids))
    return ids


def question_rows(corpus: Corpus, ids: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a file of questions, with gold by document."""
    return [
        {
            "id": asked.id,
            "question": asked.question,
            "answer": asked.answer,
            "gold_documents": [ids[index] for index in asked.gold],
        }
        for asked in corpus.questions
    ]


def write_triples(corpus: Corpus, ids: Sequence[str], path: Path) -> int:
    """What was extracted, as `llmc rag index --graph FILE` takes it; how many triples."""
    assert corpus.extracted is not None
    rows = [
        {"document": id, "triples": found.triples}
        for id, found in zip(ids, corpus.extracted, strict=True)
        if found.triples
    ]
    _write_rows(path, rows)
    return sum(len(row["triples"]) for row in rows)


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


# Larger ones ---------------------------------------------------------------------------------------------


def joined(corpora: Sequence[Corpus]) -> Corpus:
    """All passages in one pool, each (title, text) once, with all questions."""
    at: dict[tuple[str, str], int] = {}
    passages: list[tuple[str, str]] = []
    questions: list[Asked] = []
    for corpus in corpora:
        for passage in corpus.passages:
            if passage not in at:
                at[passage] = len(passages)
                passages.append(passage)
        questions += [
            Asked(q.id, q.question, q.answer, tuple(at[corpus.passages[index]] for index in q.gold))
            for q in corpus.questions
        ]
    return Corpus("+".join(corpus.name for corpus in corpora), passages, questions)


def paragraphs(data: Path) -> list[tuple[str, str]]:
    """Paragraphs of WikiText-2 and of Alice in Wonderland, some 60 to 250 words each; without titles."""
    text = (data / "wikitext2_raw" / "wikitext2_train_5k.txt").read_text(encoding="utf-8")
    found = [line.strip() for line in text.splitlines()]
    book = (data / "longtext" / "alice_in_wonderland.txt").read_text(encoding="utf-8")
    found += [" ".join(part.split()) for part in book.split("\n\n")]
    return [("", part) for part in found if 60 <= len(part.split()) <= 250]


@dataclass(frozen=True)
class Mixed:
    """A passage made of sentences of others; `sources` are their indices in the pool, each with how many
    words it gave."""

    title: str
    text: str
    sources: tuple[tuple[int, int], ...]


def mixed(pool: Sequence[tuple[str, str]], count: int, seed: int = 0) -> Iterator[Mixed]:
    """Passages as long as real ones, with names as frequent as in real text: each takes a real passage, puts
    a new title (the beginning of one title with the end of another) where its own stands, and exchanges about
    half of its sentences for those of two others.
    """
    draw = random.Random(seed)
    cut = [re.split(r"(?<=[.!?]) +(?=[A-Z\"'])", text) for _, text in pool]
    titles = [title for title, _ in pool if title]
    for _ in range(count):
        index = draw.randrange(len(pool))
        title = pool[index][0]
        new = _new_title(draw, titles)
        others = [draw.randrange(len(pool)) for _ in range(2)]
        words: Counter[int] = Counter()
        sentences: list[str] = []
        for number, sentence in enumerate(cut[index]):
            source = index if number == 0 or draw.random() < 0.5 else draw.choice(others)
            taken = sentence if source == index else draw.choice(cut[source])
            words[source] += len(taken.split())
            sentences.append(taken.replace(title, new) if title and source == index else taken)
        yield Mixed(new, " ".join(sentences), tuple(sorted(words.items())))


def _new_title(draw: random.Random, titles: Sequence[str]) -> str:
    first, last = draw.choice(titles).split(), draw.choice(titles).split()
    return " ".join([*first[: max(1, len(first) // 2)], *last[len(last) // 2 :]])
