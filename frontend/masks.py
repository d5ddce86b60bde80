"""Attention masks while a model is traced.

transformers makes a mask of functions of (sequence, head, query, key). Where a model adds its own to the
usual ones (of a decoder that was made an encoder, say), `torch.vmap` maps them over each index, and its trace
is no program of tensor operators. They are functions of indices all the same, and give the same when they are
called once with indices that broadcast together, which is how they are called while `installed` is open.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

_LOCK = threading.RLock()  # the makers are in a table that every thread sees


@contextmanager
def installed() -> Generator[None]:
    """Within it, masks are made by broadcasting, in this process; other threads that trace wait for it."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    makers: Any = ALL_MASK_ATTENTION_FUNCTIONS
    with _LOCK:
        before = {name: makers[name] for name in ("sdpa", "eager")}
        for name, make in before.items():
            makers[name] = _broadcasting(make)
        try:
            yield
        finally:
            for name, make in before.items():
                makers[name] = make


def _broadcasting(make: Any) -> Any:
    def made(*args: Any, **kwargs: Any) -> Any:
        return make(*args, **{**kwargs, "use_vmap": False})

    return made
