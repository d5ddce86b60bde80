"""A store of documents with the models that read it: what commands, the server and tools work with."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ...ir.errors import InputError
from .features import FEATURES_VERSION
from .folder import UNSURE, File, Listing, checked_name, file_of, list_folder
from .ingest import Progress, SyncReport, Writer, known_paths, parts, sync_listing
from .location import default_location, locate
from .notes import forget_notes
from .opening import embed_command, open_embedder_of, open_named_reranker
from .renew import SPEC, UNFINISHED, reembed, renew_features, with_embedder
from .store import is_postgres, open_store
from .store.base import Settings, Store
from .types import Passage

if TYPE_CHECKING:
    from .embedder import Embedder
    from .estimate import Estimate
    from .extract import ExtractEstimate
    from .readers import ReadLimits
    from .reranker import Reranker
    from .retrieve import Retriever

__all__ = ["CHUNK_TOKENS", "KnowledgeBase", "default_location", "locate"]

CHUNK_TOKENS = 256

_FOLDER = ".folder"  # of Settings.extra, see renew.py: where the documents lie
_DOCUMENTS_AT_ONCE = 500


class KnowledgeBase:
    """Documents that can be searched. Safe to use from several threads; one at a time writes."""

    def __init__(self, store: Store, embedder: Embedder | None, reranker: Reranker | None = None) -> None:
        self.store = store
        self.embedder = embedder
        self.reranker = reranker
        self.patience: float | None = None
        """Seconds that a search waits for what is derived of a write, before it searches the state before."""
        self._lock = threading.Lock()
        self._retriever: Retriever | None = None

    # Opening ------------------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        location: str | os.PathLike[str],
        *,
        embedder: str | None = "auto",
        reranker: str | None = None,
        create: bool = False,
        chunk_tokens: int | None = None,
        graph: str | None = None,
    ) -> KnowledgeBase:
        """Opens a store; with `create`, makes it where there is none.

        `embedder` "auto" is the one that the store was made with (for a new one, what `open_embedder` finds);
        "none" or None does without: words and graph still find things. `chunk_tokens` and `graph` are those
        of a new store; an existing one must have chunks of as many tokens.
        """
        place = os.fspath(location)
        missing = not is_postgres(place) and not Path(place).exists()
        if missing and not create:
            raise InputError(f"{place} does not exist", remedy="llmc rag index FOLDER makes one")
        with contextlib.ExitStack() as stack:
            # Before a file is made, so that none is left where the embedder cannot be opened.
            opened = open_embedder_of(place, embedder, Settings(), fresh=True) if missing else None
            store = stack.enter_context(contextlib.closing(open_store(place, create=create)))
            settings = store.settings()
            fresh = SPEC not in settings.extra
            opened = opened or open_embedder_of(place, embedder, settings, fresh=fresh)
            if opened is not None:
                stack.callback(opened.close)
            kb = cls(store, opened, open_named_reranker(reranker))
            if fresh and create:
                kb._settle(embedder, chunk_tokens, graph)
            else:
                kb._agree(chunk_tokens, graph)
            stack.pop_all()
        return kb

    def _settle(self, spec: str | None, chunk_tokens: int | None, graph: str | None) -> None:
        """Writes down what a new store is made with."""
        settings = with_embedder(self.settings, self.embedder, spec)
        self.store.set_settings(
            replace(
                settings,
                chunk_tokens=chunk_tokens or CHUNK_TOKENS,
                graph=graph or "fast",
                features_version=FEATURES_VERSION,
            )
        )

    def _agree(self, chunk_tokens: int | None, graph: str | None) -> None:
        settings = self.settings
        if chunk_tokens is not None and chunk_tokens != settings.chunk_tokens:
            raise InputError(
                f"{self.store.location} has chunks of {settings.chunk_tokens} tokens, not {chunk_tokens}",
                remedy="leave --chunk-tokens out, or index into another store",
            )
        if graph is not None and graph != settings.graph:
            self.store.set_settings(replace(settings, graph=graph))

    def close(self) -> None:
        """Gives the models and the store back."""
        with self._lock:
            retriever, self._retriever = self._retriever, None
        if retriever is not None:
            retriever.close()
        for part in (self.embedder, self.reranker, self.store):
            if part is not None:
                part.close()

    def __enter__(self) -> KnowledgeBase:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def settings(self) -> Settings:
        """What the store was made with, as it says now."""
        return self.store.settings()

    @property
    def folder(self) -> Path | None:
        """The folder that was indexed last, where one was."""
        folder = self.settings.extra.get(_FOLDER)
        return Path(folder) if folder else None

    # Writing ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _changing(self) -> Generator[None]:
        """The right to write; afterwards what was derived of the state before is renewed or forgotten."""
        with self.store.writing():
            try:
                yield
            finally:
                forget_notes(self.store)
        retriever = self._retriever
        if retriever is not None and self.patience is not None:
            retriever.newest.renew()

    @contextlib.contextmanager
    def _writing(self) -> Generator[None]:
        """The right to write documents, once it is sure that they would be written like the others."""
        with self._changing():
            settings = self.settings
            if settings.extra.get(UNFINISHED):
                raise InputError(
                    f"{self.store.location} is only partly embedded",
                    remedy=f"finish: {embed_command(self.store.location, settings.extra[UNFINISHED])}",
                )
            self._check_embedder(settings)
            if settings.embedder_hash and self.embedder is None:
                raise InputError(
                    f"{self.store.location} was embedded with {settings.embedder}, which is not open",
                    remedy="leave --embedder out, or drop its vectors: "
                    + embed_command(self.store.location, "none"),
                )
            if settings.features_version != FEATURES_VERSION:
                renew_features(self.store)
            yield

    def _writer(self, limits: ReadLimits | None) -> Writer:
        from .readers import ReadLimits

        return Writer(self.store, self.embedder, self.settings.chunk_tokens, limits or ReadLimits())

    def _listing(self, folder: Path) -> Listing:
        own = () if is_postgres(self.store.location) else (Path(self.store.location),)
        return list_folder(folder, exclude=own)

    def sync(
        self, folder: Path, *, progress: Progress | None = None, limits: ReadLimits | None = None
    ) -> SyncReport:
        """Makes the store hold what the folder holds. Documents that were added by hand stay."""
        listing = self._listing(folder)
        with self._writing():
            place = os.path.realpath(folder)
            settings = self.settings
            if settings.extra.get(_FOLDER) != place:
                self.store.set_settings(replace(settings, extra={**settings.extra, _FOLDER: place}))
            return sync_listing(self._writer(limits), self.store, listing, progress)

    def add(
        self,
        paths: Sequence[Path],
        *,
        root: Path | None = None,
        progress: Progress | None = None,
        limits: ReadLimits | None = None,
    ) -> SyncReport:
        """Reads files and folders into the store, replacing what is there under their names: paths below
        `root`, or below the folder that was indexed where they lie in it, or else the files' own names.
        """
        with self._writing():
            writer = self._writer(limits)
            files = list(self._files(paths, root, writer.report))
            known = known_paths(self.store, (file.name for file, _ in files))
            for index, (file, added) in enumerate(files):
                if progress is not None:
                    progress("reading and embedding", index / len(files))
                writer.file(file, known.get(file.name), added=added)
            writer.flush()
            return writer.report

    def _files(
        self, paths: Sequence[Path], root: Path | None, report: SyncReport
    ) -> Iterator[tuple[File, bool]]:
        """Files with their names, and whether they lie outside of the folder that is kept in step."""
        for path in paths:
            name, added = self._name(path, root)
            if not path.is_dir():
                yield file_of(path, name), added
                continue
            listing = self._listing(path)
            for below, reason in listing.failed:
                report.fail(f"{name}/{below}", reason)
            report.unsupported += [f"{name}/{below}" for below in listing.unsupported]
            report.empty += [f"{name}/{below}" for below in listing.empty]
            for file in listing.files:
                yield replace(file, name=f"{name}/{file.name}" if name else file.name), added

    def _name(self, path: Path, root: Path | None) -> tuple[str, bool]:
        folder = self.folder
        real = Path(os.path.realpath(path))
        if root is not None:
            above = Path(os.path.realpath(root))
            if not real.is_relative_to(above):
                raise InputError(f"{path} does not lie in {root}", remedy="name the folder above it")
            name = "" if real == above else real.relative_to(above).as_posix()
            return name, folder is None or above != folder
        if folder is not None and real.is_relative_to(folder):
            return "" if real == folder else real.relative_to(folder).as_posix(), False
        return real.name, True

    def unknown(self, paths: Sequence[Path], *, root: Path | None = None) -> list[str]:
        """Those of the paths, as `add` would name them, that the store has nothing of."""
        found: list[str] = []
        for path in paths:
            name, _ = self._name(path, root)
            if path.is_dir():
                name = f"{name}/" if name else ""
            if name and not self.matching(name):
                found.append(str(path))
        return found

    def add_bytes(
        self, name: str, data: bytes, *, limits: ReadLimits | None = None, progress: Progress | None = None
    ) -> SyncReport:
        """A document that somebody sent, under a name that is checked (InputError)."""
        from .readers import ReadLimits, is_supported, read_documents

        name = checked_name(name)
        limits = limits or ReadLimits()
        with tempfile.TemporaryDirectory(prefix="llmc-upload-") as folder, contextlib.ExitStack() as stack:
            # The readers take files; this one's name says only what kind it is.
            path = Path(folder) / f"upload{PurePosixPath(name).suffix}"
            path.write_bytes(data)
            if not is_supported(path):
                raise InputError(
                    f"{name} is of a kind that is not read", remedy="llmc rag index --help lists them"
                )
            stack.enter_context(self._writing())
            writer = self._writer(limits)
            digest = hashlib.sha256(data).hexdigest()
            texts = read_documents(path, name, limits, writer.report.fail)
            writer.texts(name, texts, digest, len(data))
            writer.flush()
            return writer.report

    def delete(self, ids_or_paths: Iterable[str]) -> int:
        """Takes documents out, by id, by path, or all of a folder (`name/`); returns how many there were."""
        with self._changing():
            ids = dict.fromkeys(id for name in ids_or_paths for id in self.matching(name))
            self._unsettle(ids)
            return sum(self.store.delete(part) for part in parts(ids, _DOCUMENTS_AT_ONCE))

    def delete_document(self, id: str) -> bool:
        """Takes out the document of this very id; whether there was one."""
        with self._changing():
            self._unsettle([id])
            return self.store.delete([id]) > 0

    def _unsettle(self, ids: Collection[str]) -> None:
        """What is left of files that lose a part is read again by the next sync."""
        documents = [self.store.document(id) for id in ids]
        paths = {one.path for one in documents if one is not None and one.path != one.id}
        for path in sorted(paths):
            left = [one for one in self.store.documents_of_path(path) if one.id not in ids]
            self.store.touch(replace(one, modified_ns=UNSURE) for one in left)

    def matching(self, name: str) -> list[str]:
        """Ids of the documents that a name means; none where there are none."""
        if self.store.document(name) is not None:
            return [name]
        if name.endswith("/"):
            found: list[str] = []
            for document in self.store.documents(after=name):
                if not document.id.startswith(name):
                    break
                found.append(document.id)
            return found
        return [document.id for document in self.store.documents_of_path(name)]

    def vacuum(self) -> None:
        """Gives space of deleted documents back."""
        self.store.vacuum()

    def reembed(self, spec: str | None, *, progress: Progress | None = None) -> int:
        """Gives all chunks vectors of another embedder ("none": of none); returns how many were made.

        Killed in between, it goes on from there when called again; until its end the store has no embedder.
        """
        from .embedder import open_embedder

        embedder = open_embedder(spec)
        try:
            with self.store.writing():
                count = reembed(self.store, embedder, spec, progress)
        except BaseException:
            if embedder is not None:
                embedder.close()
            raise
        with self._lock:
            old, self.embedder = self.embedder, embedder
            retriever, self._retriever = self._retriever, None
        if retriever is not None:
            retriever.close()
        if old is not None:
            old.close()
        return count

    # Reading ------------------------------------------------------------------------------------------------

    def search(
        self,
        question: str,
        *,
        top: int = 5,
        mode: str = "auto",
        per_document: int = 1,
        explain: bool = False,
    ) -> list[Passage]:
        """Passages, best first. `per_document` bounds how many of one document come among them.

        Mode "global" gives sentences that sum up what the documents are about; "auto" is "global" for
        questions about the whole, else "graph".
        """
        if mode in ("auto", "global"):
            from .communities import is_about_the_whole
            from .global_answer import global_passages

            if mode == "global" or is_about_the_whole(question):
                return global_passages(self, question, top=top)
        settings = self.settings
        if mode == "auto":
            mode = "hybrid" if settings.graph == "none" else "graph"
        retriever = self._retriever_of(settings)
        return retriever.search(question, top=top, mode=mode, explain=explain, per_document=per_document)

    def graph_neighbours(self, focus: str, limit: int = 50) -> dict[str, Any]:
        """The graph around a document or a name ("" for the whole): {"nodes": […], "edges": […]}, at most
        `limit` nodes; see `neighbours.py`.
        """
        from .neighbours import neighbours

        snapshot = self.retriever.snapshot()
        with self.store.reading() as reader:
            return neighbours(snapshot, reader, focus, limit)

    @property
    def retriever(self) -> Retriever:
        """Made when it is first asked for. Raises InputError where the store is not what it was opened as."""
        return self._retriever_of(self.settings)

    def _retriever_of(self, settings: Settings) -> Retriever:
        """The same of settings that were read just now: reading them again asks the database again."""
        if settings.features_version != FEATURES_VERSION:
            raise InputError(
                f"{self.store.location} was indexed by another version of llmc",
                remedy=f"renew it: llmc rag sync {self.store.location}",
            )
        self._check_embedder(settings)
        with self._lock:
            if self._retriever is None:
                from .retrieve import Retriever

                self._retriever = Retriever(self.store, self.embedder, self.reranker)
            self._retriever.patience = self.patience
            return self._retriever

    def _check_embedder(self, settings: Settings) -> None:
        """Another process may have embedded the store again."""
        if self.embedder is not None and self.embedder.hash != settings.embedder_hash:
            now = settings.embedder or "no embedder"
            raise InputError(
                f"{self.store.location} was opened with {self.embedder.name}, and has those of {now} by now",
                remedy="open it again",
            )

    def prepare(self, *, wait: bool = True) -> None:
        """Works out what the first search would otherwise wait for. Without `wait` in the background: what
        goes wrong there is raised by the first search.
        """
        if wait:
            self.retriever.snapshot()
        else:
            self.retriever.newest.renew()

    def estimate(
        self,
        folder: Path,
        *,
        limits: ReadLimits | None = None,
        progress: Progress | None = None,
        extraction: Callable[[Store], ExtractEstimate] | None = None,
    ) -> Estimate:
        """What indexing a folder would take, from a sample of it; see `estimate_listing`."""
        from .estimate import estimate_listing
        from .readers import ReadLimits

        listing = self._listing(folder)
        tokens = self.settings.chunk_tokens
        return estimate_listing(listing, self.embedder, tokens, limits or ReadLimits(), progress, extraction)

    def stats(self) -> dict[str, Any]:
        """Counts and settings, as plain values."""
        settings = self.settings
        location = self.store.location
        retriever = self._retriever
        size = None if is_postgres(location) else _bytes_of(Path(location))
        cache = Path(self.store.cache_folder)
        derived = sum(file.stat().st_size for file in cache.glob("*.arrays")) if cache.is_dir() else 0
        return {
            "location": location,
            **self.store.counts(),
            "embedder": settings.embedder or None,
            "embedder_hash": settings.embedder_hash or None,
            "dimensions": settings.dimensions,
            "chunk_tokens": settings.chunk_tokens,
            "graph": settings.graph,
            "folder": settings.extra.get(_FOLDER),
            "generation": self.store.generation,
            "searched": None if retriever is None else retriever.newest.facts(),
            "bytes": size,
            "derived_bytes": derived,
        }


def _bytes_of(path: Path) -> int:
    beside = (path, Path(f"{path}-wal"))
    return sum(file.stat().st_size for file in beside if file.exists())
