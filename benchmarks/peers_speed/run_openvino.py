"""A model in OpenVINO GenAI: its engine with continuous batching, step by step.

    PYTHON run_openvino.py --prepare FOLDER OUT

converts a Hugging Face folder by optimum-intel: weights of 4 bits with zero points in groups of 64, the head
and the embeddings of 8 bits (what it chooses for them).
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from protocol import Order, Prompts, serve  # pyright: ignore[reportMissingImports]


def prepare(folder: Path, out: Path) -> None:
    what = ["--weight-format", "int4", "--group-size", "64", "--ratio", "1.0"]
    convert = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino"]
    convert += ["--task", "text-generation-with-past", "--model", str(folder)]
    subprocess.run([*convert, *what, str(out)], check=True)


class OpenVino:
    def __init__(self, order: Order) -> None:
        import openvino  # pyright: ignore[reportMissingImports]
        import openvino_genai as genai  # pyright: ignore[reportMissingImports]

        scheduler: Any = genai.SchedulerConfig()
        scheduler.cache_size = 2  # GB
        scheduler.max_num_seqs = order.sequences
        scheduler.max_num_batched_tokens = order.tokens
        scheduler.enable_prefix_caching = False
        self._tensor, self._config = openvino.Tensor, genai.GenerationConfig
        self._pipeline: Any = genai.ContinuousBatchingPipeline(
            order.model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": order.threads}
        )
        self._count = 0

    def generate(self, prompts: Prompts, tokens: int) -> float:
        began = time.perf_counter()
        handles = self._start(prompts, tokens)
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        seconds = time.perf_counter() - began
        for handle in handles:
            if len(handle.read_all()[0].generated_ids) != tokens:
                raise RuntimeError("OpenVINO gave fewer tokens than were asked for")
        return seconds

    def decode(self, prompts: Prompts, tokens: int) -> float:
        handles = self._start(prompts, tokens + len(prompts) + 8)
        while not all(handle.can_read() for handle in handles):
            self._pipeline.step()
        began = time.perf_counter()
        for _ in range(tokens):
            self._pipeline.step()
        seconds = time.perf_counter() - began
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        return seconds / tokens

    def _start(self, prompts: Prompts, tokens: int) -> list[Any]:
        import numpy as np

        config: Any = self._config(max_new_tokens=tokens, ignore_eos=True, do_sample=False)
        self._count += len(prompts)
        first = self._count - len(prompts)
        return [
            self._pipeline.add_request(first + i, self._tensor(np.array([prompt], np.int64)), config)
            for i, prompt in enumerate(prompts)
        ]


if __name__ == "__main__":
    serve(OpenVino, ("openvino-genai", "openvino", "optimum-intel"), prepare)
