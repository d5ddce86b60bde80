"""transformers in bfloat16 with SDPA, as its users run it on a CPU: one prompt after the other."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import torch
from protocol import Order, Prompts, serve  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM


class Transformers:
    def __init__(self, order: Order) -> None:
        torch.set_num_threads(order.threads)
        self._model: Any = AutoModelForCausalLM.from_pretrained(order.model, dtype=torch.bfloat16).eval()

    def generate(self, prompts: Prompts, tokens: int) -> float:
        began = time.perf_counter()
        for prompt in prompts:
            self._continue(*self._first(prompt), tokens - 1)
        return time.perf_counter() - began

    def decode(self, prompts: Prompts, tokens: int) -> float:
        (prompt,) = prompts
        cache, token = self._first(prompt)
        began = time.perf_counter()
        self._continue(cache, token, tokens)
        return (time.perf_counter() - began) / tokens

    def _first(self, prompt: Any) -> tuple[Any, Any]:
        with torch.inference_mode():
            result = self._model(input_ids=torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
            return result.past_key_values, result.logits[:, -1:].argmax(-1)

    def _continue(self, cache: Any, token: Any, tokens: int) -> None:
        with torch.inference_mode():
            for _ in range(tokens):
                result = self._model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, token = result.past_key_values, result.logits[:, -1:].argmax(-1)


if __name__ == "__main__":
    serve(Transformers, ("transformers", "torch"))
