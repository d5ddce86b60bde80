"""A program of its own: compiles a grammar and follows it for a few bytes, within bounds of memory and time.

Started by `grammar_trial.py`, it stands alone: only the standard library and llguidance. What it must prove
is that it ends; whether the grammar is right is for the caller to find out.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

_STEPS = 64
_SLOW = 0.2  # seconds of work for a mask over 256 bytes; real vocabularies take longer


def main() -> int:
    """Reads {"source", "specials", "limits", "memory", "seconds", "stack"} from standard input.

    Prints "ok", or "slow" where masks take long. 0 where it came to an end.
    """
    task: dict[str, Any] = json.load(sys.stdin)
    _bound(task["memory"], task["seconds"])
    threading.stack_size(task["stack"])
    thread = threading.Thread(target=_try, args=(task,))
    thread.start()
    thread.join()
    return 0


def _bound(memory: int, seconds: int) -> None:
    try:
        import resource
    except ImportError:
        return  # no such bounds on this system: the caller's clock is left
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def _try(task: dict[str, Any]) -> None:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

    specials = [text.encode() for text in task["specials"]]
    tokens = [bytes([byte]) for byte in range(256)] + [b"\xff<end>", *specials]

    class Bytes(SimpleNamespace):
        def __call__(self, text: bytes) -> list[int]:
            return list(text)

    ids = list(range(256, len(tokens)))
    wrapper = TokenizerWrapper(
        Bytes(eos_token_id=256, bos_token_id=None, tokens=tokens, special_token_ids=ids)
    )
    limits = LLParserLimits(**task["limits"])
    state = LLMatcher(LLTokenizer(wrapper), task["source"], log_level=0, limits=limits)
    drawn = 1
    for _ in range(_STEPS):
        began = time.thread_time()
        mask = state.compute_bitmask()
        if time.thread_time() - began > _SLOW:
            print("slow")
            return
        allowed = [byte for byte in range(256) if mask[byte // 8] >> byte % 8 & 1]
        if state.is_error() or state.is_stopped() or not allowed:
            break
        drawn = drawn * 1103515245 + 12345 & 0x7FFFFFFF
        state.consume_token(allowed[(drawn >> 8) % len(allowed)])
    print("ok")


if __name__ == "__main__":
    sys.exit(main())
