"""Between the engine and an executor: what `sinks` needs (`eviction.py`), and keys that are turned back."""

from __future__ import annotations

from ..ir.errors import InputError
from .block_manager import BlockManager
from .engine_options import EngineOptions, ModelFacts
from .eviction import Eviction
from .executor.base import Executor, KeepsStates, RotatesKeys
from .memory import KvPlan
from .window_plan import window_sizes_of

_LEAVE = "leave sinks out"


def plan_eviction(
    options: EngineOptions, facts: ModelFacts, executor: Executor, kv: KvPlan, context: int
) -> Eviction | None:
    """What a sequence of `context` tokens gives back to go on; None without `sinks`.

    Raises InputError where the model's keys cannot be moved, where the context leaves no room beside the
    sinks, or where the cache holds less than the context: when something is evicted must not depend on how
    much memory was free.
    """
    if options.sinks is None:
        return None
    if options.sinks < 0:
        raise InputError(f"sinks is {options.sinks}", remedy="give the number of first tokens that stay")
    if isinstance(executor, KeepsStates) and executor.state_bytes:
        raise InputError(
            "sinks: the model's recurrent states keep what would be evicted from the cache", remedy=_LEAVE
        )
    if facts.moves_keys and not isinstance(executor, RotatesKeys):
        raise InputError(
            "sinks: this target cannot turn the keys in its cache to other positions",
            remedy="take tvm-cpu, onnx-cpu or tvm-cuda, or leave sinks out",
        )
    late = facts.late_scaling
    if context > late.original:
        raise InputError(
            f"sinks: keys of a context of {context} tokens turn by two kinds of frequencies, since the model "
            f"was compiled with when=needed for more than its {late.original} tokens",
            remedy=f"give a context of at most {late.original} tokens, or leave sinks out",
        )
    size = executor.page_size
    eviction = Eviction(size, context // size, -(-options.sinks // size), rotates=facts.moves_keys)
    if eviction.kept < 1:
        raise InputError(
            f"sinks: of a context of {context} tokens, {eviction.capacity} pages of {size}, "
            f"{eviction.sinks} would stay for good",
            remedy=f"fewer sinks, or a context of at least {(eviction.sinks + 2) * size} tokens",
        )
    if kv.pages < eviction.capacity:
        raise InputError(
            f"sinks: the {kv} is less than the context of {context} tokens",
            remedy=f"give a context of at most {kv.tokens} tokens, or raise kv_tokens",
        )
    for window in window_sizes_of(executor):
        if eviction.kept * size < window < eviction.tokens:
            raise InputError(
                f"sinks: layers see a window of {window} tokens, and {eviction.kept * size} tokens stay when "
                f"others are evicted from a context of {context}",
                remedy=f"give a context of at least {eviction.sinks * size + 2 * window + 2 * size} tokens, "
                f"or of at most {window}",
            )
    return eviction


def rotate_keys(blocks: BlockManager, executor: Executor) -> None:
    """Turn the keys that moved, after copies and before the step."""
    turned = [(None, blocks.rotations), *((i, window.rotations) for i, window in enumerate(blocks.windows))]
    for which, pages in turned:
        if pages:
            assert isinstance(executor, RotatesKeys) and blocks.eviction is not None
            executor.rotate_keys(pages, blocks.eviction.shift, which)
            pages.clear()


__all__ = ["plan_eviction", "rotate_keys"]
