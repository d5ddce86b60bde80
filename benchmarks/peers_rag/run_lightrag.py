"""LightRAG's pipeline and retrieval (`aquery_data`), with vectors from an address of OpenAI's API.

No language model is there. In its place stands a function that answers from a file: asked to extract from a
passage, it says the file's triples of that passage in LightRAG's own form (each entity described by its
triples); asked for a summary of descriptions, it returns the first of them. The keywords that a model would
take from a question are: of the low level, the file's entities that the question names, and its capitalised
words; of the high level, the question itself. Without triples only mode `naive`, search by vector, has
something to search. All passages are inserted as chunks of one document (`ainsert_custom_chunks`).
"""

from __future__ import annotations

import asyncio
import html
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from protocol import Answer, Order, Watch, embed, serve  # pyright: ignore[reportMissingImports]

_WORD = re.compile(r"\w+|[^\w\s]")
_NAME = re.compile(r"\b[A-Z][\w'’-]*(?: [A-Z][\w'’-]*)*")
_INPUT = re.compile(r"---Input Text---\n```\n(.*?)\n```", re.DOTALL)
_DESCRIPTION = re.compile(r'"Description": ?"(.*?)"\}')
_DESCRIPTIONS = 10  # of an entity that stands in many passages
_LONGEST = 8  # words of an entity that is looked for in a question


class _Words:
    """Words and signs: the tokenizer that LightRAG wants to bound its prompts with."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._words: list[str] = []

    def __deepcopy__(self, memo: object) -> _Words:
        return self

    def encode(self, content: str) -> list[int]:
        ids: list[int] = []
        for word in _WORD.findall(content):
            if word not in self._ids:
                self._ids[word] = len(self._words)
                self._words.append(word)
            ids.append(self._ids[word])
        return ids

    def decode(self, tokens: list[int]) -> str:
        return " ".join(self._words[token] for token in tokens)


class _FromFile:
    """Stands where LightRAG's language model does."""

    def __init__(self, contents: Sequence[str], extracted: Sequence[dict[str, Any]]) -> None:
        self._extracted = {_key(content): found for content, found in zip(contents, extracted, strict=True)}

    async def __call__(self, prompt: str, *_: object, **__: object) -> str:
        if text := _INPUT.search(prompt):
            return _records(self._extracted.get(_key(text[1]), {"triples": []})["triples"])
        descriptions = _DESCRIPTION.findall(prompt)
        if not descriptions:
            raise RuntimeError("asked for what no file can say")
        return " ".join(descriptions[:_DESCRIPTIONS])


def _key(text: str) -> str:
    """What of a chunk is the same before and after: LightRAG resolves HTML's entities ("&amp;amp;" becomes
    "&amp;") and leaves out control characters and blanks. So all entities are resolved, and what can be seen
    counts.
    """
    while (resolved := html.unescape(text)) != text:
        text = resolved
    return "".join(letter for letter in text if letter.isprintable() and letter != " ")


def _records(triples: Sequence[Sequence[str]]) -> str:
    """Entities and relations in the form of LightRAG's extraction prompt."""
    said: dict[str, list[str]] = {}
    lines: list[str] = []
    for triple in triples:
        subject, predicate, object_ = (" ".join(part.replace("<|", "").split()) for part in triple)
        sentence = f"{subject} {predicate} {object_}"
        for name in (subject, object_):
            said.setdefault(name, []).append(sentence)
        lines.append("<|#|>".join(("relation", subject, object_, predicate, sentence)))
    entities = [
        "<|#|>".join(("entity", name, "other", ". ".join(dict.fromkeys(sentences))))
        for name, sentences in said.items()
    ]
    return "\n".join([*entities, *lines, "<|COMPLETE|>"])


def keywords(question: str, entities: frozenset[str]) -> list[str]:
    """Entities that a question names (the longest at each place), and its capitalised words."""
    words = re.findall(r"[\w'’.-]+", question.rstrip("?"))
    found: list[str] = []
    start = 0
    while start < len(words):
        for length in range(min(_LONGEST, len(words) - start), 0, -1):
            name = " ".join(words[start : start + length])
            if name.lower() in entities and (length > 1 or name[0].isupper()):
                found.append(name)
                start += length - 1
                break
        start += 1
    found += _NAME.findall(question)[1 if question[:1].isupper() else 0 :]
    return list(dict.fromkeys(found)) or [question]


async def _run(order: Order) -> Answer:
    import numpy as np  # pyright: ignore[reportMissingImports]
    from lightrag import LightRAG, QueryParam  # pyright: ignore[reportMissingImports]
    from lightrag.utils import EmbeddingFunc, Tokenizer  # pyright: ignore[reportMissingImports]

    async def vectors(texts: Sequence[str], **_: object) -> Any:
        return np.asarray(await asyncio.to_thread(embed, order, texts), np.float32)

    contents = [f"{title}\n{text}" if title else text for title, text in order.passages]
    extracted = order.extracted or [{"triples": []}] * len(contents)
    watch = Watch()
    rag = LightRAG(
        working_dir=order.folder,
        embedding_func=EmbeddingFunc(len(embed(order, ["a text"])[0]), vectors),
        llm_model_func=_FromFile(contents, extracted),
        tokenizer=Tokenizer("words", _Words()),
        embedding_batch_num=128,
        entity_extract_max_gleaning=0,
        enable_llm_cache=False,
        enable_llm_cache_for_entity_extract=False,
    )
    await rag.initialize_storages()
    await rag.ainsert_custom_chunks("\n\n".join(contents), contents)
    answer = Answer(index_seconds=watch.seconds, index_cpu_seconds=watch.cpu_seconds)
    at = {_key(content): index for index, content in enumerate(contents)}
    names = frozenset(
        part.lower() for found in extracted for triple in found["triples"] for part in (triple[0], triple[2])
    )
    for question in order.questions:
        param = QueryParam(
            mode=order.mode,
            chunk_top_k=order.top,
            ll_keywords=keywords(question, names),
            hl_keywords=[question],
            enable_rerank=False,
        )
        began = Watch()
        data = (await rag.aquery_data(question, param)).get("data", {})
        answer.add_time(began)
        found = [at[_key(chunk["content"])] for chunk in data.get("chunks", [])]
        answer.found.append(list(dict.fromkeys(found))[: order.top])
    graph = rag.chunk_entity_relation_graph
    nodes, edges = len(await graph.get_all_nodes()), len(await graph.get_all_edges())
    answer.note = (
        f"mode {order.mode}; {nodes} entities and {edges} relations from a file of GPT-3.5's triples, "
        "no language model: keywords by rule"
    )
    await rag.finalize_storages()
    return answer


def run(order: Order) -> Answer:
    os.environ |= {"OMP_NUM_THREADS": str(order.threads), "OPENBLAS_NUM_THREADS": str(order.threads)}
    return asyncio.run(_run(order))


if __name__ == "__main__":
    serve(run, ("lightrag-hku", "nano-vectordb", "networkx"))
