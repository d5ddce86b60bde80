"""Whether a grammar can be compiled without harm: tried first in a process that may fail.

A few hundred bytes can ask the compiler for gigabytes, and a failed allocation or an overflown stack ends the
process that it runs in. No bound on sizes tells all of these from honest grammars, so what is not plainly
small is tried where only the trial dies.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from .json_schema.errors import GrammarError

STACK_BYTES = 256 << 20
"""Reserved, not used: the compiler descends once for each nested or referenced schema."""
_MEMORY = 2 << 30  # of addresses, the stack among them
_SECONDS = 3
_TIMEOUT = 30  # by the clock, on a machine that is busy
_CHILD = Path(__file__).with_name("grammar_child.py")
_one_at_a_time = threading.Lock()


def try_grammar(source: str, specials: Sequence[str], limits: Mapping[str, int]) -> None:
    """Raise GrammarError where compiling `source`, or following it, takes too much memory or time.

    `specials`: the special tokens that it may name.
    """
    task = {
        "source": source,
        "specials": list(specials),
        "limits": dict(limits),
        "memory": _MEMORY,
        "seconds": _SECONDS,
        "stack": STACK_BYTES,
    }
    try:
        with _one_at_a_time:
            done = subprocess.run(
                [sys.executable, "-I", str(_CHILD)],
                input=json.dumps(task).encode(),
                capture_output=True,
                timeout=_TIMEOUT,
                check=False,
            )
    except subprocess.TimeoutExpired:
        raise _too_much() from None
    if done.returncode or done.stdout.strip() != b"ok":
        raise _too_much()


def _too_much() -> GrammarError:
    return GrammarError("the grammar takes too much memory or time to follow", remedy="simplify it")
