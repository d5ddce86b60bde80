"""vLLM's CPU build in bfloat16: its engine, step by step, in this process."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from protocol import Order, Prompts, serve  # pyright: ignore[reportMissingImports]


class Vllm:
    def __init__(self, order: Order) -> None:
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_NO_USAGE_STATS": "1",
            "OMP_NUM_THREADS": str(order.threads),
        }
        from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

        self._params = SamplingParams
        model: Any = LLM(
            model=order.model,
            dtype="bfloat16",
            max_model_len=order.context,
            max_num_seqs=order.sequences,
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
        self._engine: Any = model.llm_engine
        self._count = 0

    def generate(self, prompts: Prompts, tokens: int) -> float:
        began = time.perf_counter()
        self._start(prompts, tokens)
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return time.perf_counter() - began

    def decode(self, prompts: Prompts, tokens: int) -> float:
        ids = self._start(prompts, tokens + len(prompts) + 8)
        waiting = set(ids)
        while waiting:
            waiting -= {output.request_id for output in self._engine.step() if output.outputs[0].token_ids}
        began = time.perf_counter()
        for _ in range(tokens):
            self._engine.step()
        seconds = time.perf_counter() - began
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return seconds / tokens

    def _start(self, prompts: Prompts, tokens: int) -> list[str]:
        params = self._params(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        ids: list[str] = []
        for prompt in prompts:
            self._count += 1
            ids.append(str(self._count))
            self._engine.add_request(ids[-1], {"prompt_token_ids": list(prompt)}, params)
        return ids


if __name__ == "__main__":
    serve(Vllm, ("vllm-cpu", "vllm", "torch"))
