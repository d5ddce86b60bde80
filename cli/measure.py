"""Speeds of an engine: prefill, decode, and many requests at once. Prompts are random ids, never seen
before, so that the prefix cache has no part in any figure.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING, Any

from ..runtime.sampling_params import SamplingParams

if TYPE_CHECKING:
    from ..runtime.engine import Engine


class Prompts:
    """Prompts of random token ids, the same in every run, no two alike."""

    def __init__(self, vocab_size: int, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._vocab_size = vocab_size

    def take(self, length: int) -> list[int]:
        return self._random.choices(range(self._vocab_size), k=length)


def _params(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)


def prefill_seconds(engine: Engine, prompt: Sequence[int]) -> float:
    """Time from adding a prompt to its first token."""
    began = time.perf_counter()
    engine.add_request(prompt, _params(1))
    while engine.has_work:
        engine.step()
    return time.perf_counter() - began


def decode_seconds(engine: Engine, prompt: Sequence[int], tokens: int) -> float:
    """Time of one token after the first, over `tokens` of them."""
    engine.add_request(prompt, _params(tokens + 1))
    while not engine.step():
        pass  # the chunks of the prompt: the first output is the first token
    began = time.perf_counter()
    while engine.has_work:
        engine.step()
    return (time.perf_counter() - began) / tokens


def batch_seconds(engine: Engine, prompts: Sequence[Sequence[int]], tokens: int) -> float:
    """Time until all prompts, added at once, have `tokens` tokens each."""
    began = time.perf_counter()
    for prompt in prompts:
        engine.add_request(prompt, _params(tokens))
    while engine.has_work:
        engine.step()
    return time.perf_counter() - began


@contextmanager
def answering(engine: Engine, prompts: Sequence[Sequence[int]], steps: int) -> Generator[None]:
    """All prompts are computed, and each answer goes on for `steps` steps at least."""
    params = _params(steps + 1 + len(prompts))  # a step that computes prompts finishes one at least
    ids = [engine.add_request(prompt, params) for prompt in prompts]
    waiting = set(ids)
    while waiting:
        waiting -= {output.request_id for output in engine.step()}
    try:
        yield
    finally:
        for request in ids:
            engine.cancel(request)


def speeds(
    engine: Engine,
    *,
    prompt_tokens: int,
    output_tokens: int,
    concurrency: Sequence[int],
    repeat: int,
    between: Callable[[str, int], None],
    progress: Callable[[str, float], None],
) -> dict[str, Any]:
    """Medians over `repeat` runs: `prefill_tok_s`, `decode_tok_s` and `batch`.

    `between(what, tokens)` is called after each repetition of "prefill" and "decode": the place where a
    peer is measured under the same conditions.
    """
    prompts = Prompts(engine.facts.vocab_size)
    prefill_seconds(engine, prompts.take(prompt_tokens))  # first touch of weights and cache
    prefills: list[float] = []
    decodes: list[float] = []
    for number in range(repeat):
        progress("prefill and decode", number / repeat)
        prefills.append(prefill_seconds(engine, prompts.take(prompt_tokens)))
        between("prefill", prompt_tokens)
        decodes.append(decode_seconds(engine, prompts.take(16), output_tokens))
        between("decode", output_tokens)
    rows: list[dict[str, Any]] = []
    for count in concurrency:
        progress(f"{count} requests at once", 0.0)
        seconds = median(
            batch_seconds(engine, [prompts.take(128) for _ in range(count)], output_tokens)
            for _ in range(max(1, repeat // 2))
        )
        rows.append(
            {
                "concurrency": count,
                "output_tok_s": round(count * output_tokens / seconds, 2),
                "total_tok_s": round(count * (128 + output_tokens) / seconds, 2),
            }
        )
    return {
        "prefill_tok_s": round(prompt_tokens / median(prefills), 2),
        "decode_tok_s": round(1 / median(decodes), 2),
        "batch": rows,
    }
