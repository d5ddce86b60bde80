"""Opening what a store is read with: its embedder, and a reranker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...ir.errors import InputError
from .renew import SPEC
from .store.base import Settings

if TYPE_CHECKING:
    from .embedder import Embedder
    from .reranker import Reranker


def open_embedder_of(location: str, asked: str | None, settings: Settings, *, fresh: bool) -> Embedder | None:
    """The embedder for a store. One with other vectors than the store's is refused."""
    from .embedder import open_embedder

    if asked is None or asked == "none":
        return None
    kept = settings.extra.get(SPEC, "none")
    if not fresh and not settings.embedder_hash and asked == "auto":
        return None
    try:
        embedder = open_embedder(asked if fresh or asked != "auto" else kept)
    except InputError as error:
        if fresh or asked != "auto":
            raise
        raise InputError(
            f"{location} was embedded with {settings.embedder}, which cannot be opened: {error.message}",
            remedy="say where it is now with --embedder, or do without: --embedder none",
        ) from error
    if fresh or embedder is None or embedder.hash == settings.embedder_hash:
        return embedder
    name = embedder.name
    embedder.close()
    had = f"embedded with {settings.embedder}" if settings.embedder_hash else "made without an embedder"
    again = "auto" if asked == "auto" else asked
    raise InputError(
        f"{location} was {had}, and {name} gives other vectors",
        remedy=f"re-embed it: {embed_command(location, again)}",
    )


def embed_command(location: str, spec: str) -> str:
    """What embeds a store with another embedder."""
    return f"llmc rag embed {location} --embedder {spec}"


def open_named_reranker(spec: str | None) -> Reranker | None:
    """The reranker that `spec` names, if it names one."""
    if spec is None or spec == "none":
        return None
    from .reranker import open_reranker

    return open_reranker(spec)
