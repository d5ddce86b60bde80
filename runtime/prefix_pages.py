"""Between the pages of an engine's cache and those that a folder keeps (`prefix_store`): a prompt that waits
is given what the folder has of its beginning, and a prompt that was computed leaves its full pages there.

Only prefixes without a salt are kept: those of adapters mean something in this process alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..codegen.artifact import Artifact
from ..ir.errors import InputError
from .executor.base import MovesPages
from .prefix_store import DEFAULT_BYTES, PrefixStore

if TYPE_CHECKING:
    from .block_manager import BlockManager
    from .engine import Engine
    from .engine_options import Counters
    from .scheduler import Chunk
    from .sequence import Sequence

_log = logging.getLogger("llmc.runtime")


class PrefixPages:
    """Belongs to the engine's thread."""

    def __init__(
        self, store: PrefixStore, blocks: BlockManager, executor: MovesPages, counters: Counters
    ) -> None:
        self.store = store
        self._blocks, self._executor, self._counters = blocks, executor, counters

    def restore(self, sequence: Sequence) -> None:
        """Read the pages of the sequence's prefix that are kept and not in memory; they are cached then,
        where `lookup` finds them. There must be room for all of the sequence, which begins now. Tried once
        for a sequence.
        """
        if sequence.restored or sequence.salt:
            return
        sequence.restored = True
        blocks, index = self._blocks, 0
        while (block_hash := blocks.shareable_hash(sequence, index)) is not None:
            # One that is there is the last to be given up: `adopt` takes none of this prefix.
            if blocks.find(block_hash) is None:
                contents = self.store.get(block_hash)
                if contents is None:
                    return
                page = blocks.adopt(block_hash)
                try:
                    self._executor.write_pages([page], contents[None])
                except BaseException:
                    blocks.forget(page)  # or others would take what stood there before for this prefix
                    raise
                self._counters.tokens_from_disk += blocks.page_size
            index += 1

    def save(self, chunks: Seq[Chunk[Any]]) -> None:
        """Keep the pages of prompts that are full after this step, in their order. Behind the first page that
        finds no room nothing of a prompt is kept: it would never be read.
        """
        size = self._blocks.page_size
        for chunk in chunks:
            sequence: Sequence = chunk.sequence
            if sequence.salt or chunk.start >= sequence.num_prompt or sequence.evicted:
                continue  # a page behind what was evicted holds no prefix any more
            full = min(sequence.num_computed, sequence.num_prompt) // size
            for index in range(sequence.saved, full):
                block_hash = self._blocks.prefix_hash(sequence, index)
                if not self.store.touch(block_hash):
                    if not self.store.has_room():
                        full = sequence.num_prompt // size  # as if all was saved
                        break
                    (contents,) = self._executor.read_pages([sequence.block_table[index]])
                    self.store.put(block_hash, contents)
            sequence.saved = max(sequence.saved, full)

    def close(self) -> None:
        """Write what is not written yet."""
        self.store.close()


def attach(engine: Engine, artifact: Artifact, folder: Path, limit: int | None = None) -> None:
    """Let the engine keep prefixes in `folder`, of at most `limit` bytes. A model whose pages alone do not
    hold what was computed goes on without, with a warning.

    Raises InputError where the target's pages cannot be read, or the folder cannot be written.
    """
    executor, blocks = engine.executor, engine.blocks
    if not isinstance(executor, MovesPages):
        raise InputError(
            f"{artifact.root}: the pages of this target cannot be kept on disk",
            remedy="leave prefix_cache_dir out",
        )
    if not executor.kv_bytes_per_page:
        return  # an encoder: nothing is cached
    if not blocks.prefix_cache or blocks.windows:
        _log.warning(
            "%s: no prefix cache on disk, its pages do not hold all that was computed", artifact.root
        )
        return
    key = hashlib.sha256(json.dumps(_identity(artifact, executor), sort_keys=True).encode()).digest()
    store = PrefixStore(
        folder,
        key,
        page_bytes=executor.kv_bytes_per_page,
        limit=DEFAULT_BYTES if limit is None else limit,
    )
    engine.scheduler.prefixes = PrefixPages(store, blocks, executor, engine.counters)


def _identity(artifact: Artifact, executor: MovesPages) -> dict[str, object]:
    """What the bits of a page depend on beside its tokens. The manifest holds the hashes of weights and
    kernels; levels of one artifact have kernels of their own, whose bits differ.
    """
    manifest = hashlib.sha256((artifact.root / "manifest.json").read_bytes()).hexdigest()
    return {"manifest": manifest, "page_bytes": executor.kv_bytes_per_page, **executor.identity()}
