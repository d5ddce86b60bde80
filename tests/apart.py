"""Work in a process of its own, which may die, hang or grow without taking the others with it."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import resource
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _child(work: Callable[[], Any], most_bytes: int | None, result: Any) -> None:
    import torch

    torch.set_num_threads(1)  # after a fork there are no other threads: a parallel region would wait for them
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if most_bytes is not None:
        resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    try:
        result.send((work(), ""))
    except Exception as error:  # noqa: BLE001  (a bug of ours, which must be shown and not hidden)
        last = traceback.extract_tb(error.__traceback__)[-4:]
        places = " < ".join(f"{Path(p.filename).name}:{p.lineno}" for p in reversed(last))
        result.send((None, f"{type(error).__name__}: {str(error)[:200]} ({places})"))


def run_apart(work: Callable[[], Any], seconds: float, most_bytes: int | None = None) -> tuple[Any, str]:
    """What `work` returns, or None and what it raised; None and "" where the process died or took longer.

    Args:
        most_bytes: of address space.
    """
    context = multiprocessing.get_context("fork")  # what is imported already stays so
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(work, most_bytes, theirs))
    process.start()
    theirs.close()
    found: tuple[Any, str] = (None, "")
    with contextlib.suppress(EOFError):
        if ours.poll(seconds):
            found = ours.recv()
    process.kill()
    process.join()
    return found
