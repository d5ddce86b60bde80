"""A model in onnxruntime-genai: its generator, prompts of one length as one batch.

    PYTHON run_onnxruntime.py --prepare FOLDER OUT

converts a Hugging Face folder by onnxruntime-genai's model builder: weights of 4 bits in groups of 32, the
head among them, products with int8 activations.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from protocol import Order, Prompts, serve  # pyright: ignore[reportMissingImports]


def prepare(folder: Path, out: Path) -> None:
    what = ["-i", str(folder), "-o", str(out), "-p", "int4", "-e", "cpu", "-c", str(out / "cache")]
    extra = ["--extra_options", "int4_accuracy_level=4", "int4_block_size=32", "hf_token=false"]
    subprocess.run([sys.executable, "-m", "onnxruntime_genai.models.builder", *what, *extra], check=True)


class OnnxRuntime:
    def __init__(self, order: Order) -> None:
        import onnxruntime_genai as og  # pyright: ignore[reportMissingImports]

        config: Any = og.Config(order.model)
        session = {"session_options": {"intra_op_num_threads": order.threads}}
        config.overlay(json.dumps({"model": {"decoder": session}}))
        self._og, self._model = og, og.Model(config)

    def generate(self, prompts: Prompts, tokens: int) -> float:
        began = time.perf_counter()
        generator = self._first(prompts, tokens)
        for _ in range(tokens - 1):
            generator.generate_next_token()
        return time.perf_counter() - began

    def decode(self, prompts: Prompts, tokens: int) -> float:
        generator = self._first(prompts, tokens + 1)
        began = time.perf_counter()
        for _ in range(tokens):
            generator.generate_next_token()
        return (time.perf_counter() - began) / tokens

    def _first(self, prompts: Prompts, tokens: int) -> Any:
        """A generator after the first token of each answer. No answer ends before it is full."""
        import numpy as np

        ids = np.array(prompts, np.int32)
        length = ids.shape[1] + tokens
        params: Any = self._og.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, batch_size=len(ids), min_length=length, max_length=length)
        generator = self._og.Generator(self._model, params)
        generator.append_tokens(ids if len(ids) > 1 else ids[0])
        generator.generate_next_token()
        return generator


if __name__ == "__main__":
    serve(OnnxRuntime, ("onnxruntime-genai", "onnxruntime"), prepare)
