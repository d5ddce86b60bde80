"""Search: `Retriever(store, embedder, reranker).search(question, top=5, mode="auto")`."""

from __future__ import annotations

from .search import MODES, Retriever

__all__ = ["MODES", "Retriever"]
