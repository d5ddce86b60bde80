"""An artifact in our own runtime."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from llmc.runtime.loader import load
from llmc.runtime.sampling_params import SamplingParams
from protocol import Order, Prompts, serve  # pyright: ignore[reportMissingImports]


class Llmc:
    def __init__(self, order: Order) -> None:
        self._llm = load(
            order.model,
            threads=order.threads,
            context=order.context,
            kv_tokens=order.tokens,
            max_sequences=order.sequences,
            prefix_cache=False,
        )
        # The engine's own thread would otherwise ask for work between our steps.
        self._paused = self._llm.engine.paused()
        self._engine = self._paused.__enter__()

    def generate(self, prompts: Prompts, tokens: int) -> float:
        began = time.perf_counter()
        self._start(prompts, tokens)
        while self._engine.has_work:
            self._engine.step()
        return time.perf_counter() - began

    def decode(self, prompts: Prompts, tokens: int) -> float:
        ids = self._start(prompts, tokens + len(prompts) + 1)
        waiting = set(ids)
        while waiting:  # a step that computes prompts finishes one at least
            waiting -= {output.request_id for output in self._engine.step()}
        began = time.perf_counter()
        for _ in range(tokens):
            self._engine.step()
        seconds = time.perf_counter() - began
        for request in ids:
            self._engine.cancel(request)
        return seconds / tokens

    def _start(self, prompts: Prompts, tokens: int) -> list[str]:
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        return [self._engine.add_request(prompt, params) for prompt in prompts]


if __name__ == "__main__":
    serve(Llmc, ("llmc",))
