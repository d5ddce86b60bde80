"""A GGUF file in llama.cpp: its C functions by way of llama-cpp-python, without sampler or server."""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import llama_cpp as ll  # pyright: ignore[reportMissingImports]
import numpy as np
from protocol import Order, Prompts, serve  # pyright: ignore[reportMissingImports]

BATCH = 2048
"""Tokens of one `llama_decode` at most (llama.cpp's default)."""


@ll.llama_log_callback
def _silent(level: int, text: bytes, data: Any) -> None:
    """llama.cpp tells a page about every context."""


class Session:
    """A context for some prompts, and what has been computed of them."""

    def __init__(self, model: Any, vocab: int, threads: int, prompts: Prompts, tokens: int) -> None:
        self._vocab, self._prompts = vocab, prompts
        params = ll.llama_context_default_params()
        each = max(map(len, prompts)) + tokens + 1
        params.n_seq_max = len(prompts)
        params.n_ctx = len(prompts) * -(-each // 256) * 256  # shared out among the sequences
        params.n_batch, params.n_threads, params.n_threads_batch = BATCH, threads, threads
        self._context = ll.llama_init_from_model(model, params)
        self._batch = ll.llama_batch_init(BATCH, 0, 1)
        size = (BATCH,)
        self._tokens = np.ctypeslib.as_array(self._batch.token, size)
        self._positions = np.ctypeslib.as_array(self._batch.pos, size)
        self._wanted = np.ctypeslib.as_array(self._batch.logits, size)
        np.ctypeslib.as_array(self._batch.n_seq_id, size)[:] = 1
        self._pieces = self._cut()

    def _cut(self) -> list[tuple[np.ndarray, np.ndarray, list[int], list[tuple[int, int]]]]:
        """The prompts' tokens in batches: ids, positions, sequences, and (place, sequence) of last tokens."""
        flat = [(t, i, s, i == len(p) - 1) for s, p in enumerate(self._prompts) for i, t in enumerate(p)]
        pieces = [flat[i : i + BATCH] for i in range(0, len(flat), BATCH)]
        return [
            (
                np.array([item[0] for item in piece], np.int32),
                np.array([item[1] for item in piece], np.int32),
                [item[2] for item in piece],
                [(place, item[2]) for place, item in enumerate(piece) if item[3]],
            )
            for piece in pieces
        ]

    def first(self) -> None:
        """Compute the prompts, and the first token of each answer."""
        self._next = np.zeros(len(self._prompts), np.int32)
        for ids, positions, sequences, last in self._pieces:
            for place, sequence in enumerate(sequences):
                self._batch.seq_id[place][0] = sequence
            self._wanted[: len(ids)] = 0
            self._wanted[[place for place, _ in last]] = 1
            self._decode(ids, positions)
            for place, sequence in last:
                self._next[sequence] = self._best(place)
        self._at = np.array([len(prompt) for prompt in self._prompts], np.int32)
        for sequence in range(len(self._prompts)):
            self._batch.seq_id[sequence][0] = sequence
        self._wanted[: len(self._prompts)] = 1

    def step(self) -> None:
        """A token more for each answer."""
        self._decode(self._next, self._at)
        for sequence in range(len(self._next)):
            self._next[sequence] = self._best(sequence)
        self._at += 1

    def _decode(self, ids: np.ndarray, positions: np.ndarray) -> None:
        self._batch.n_tokens = len(ids)
        self._tokens[: len(ids)], self._positions[: len(ids)] = ids, positions
        if ll.llama_decode(self._context, self._batch):
            raise RuntimeError("llama_decode refused a batch")

    def _best(self, place: int) -> int:
        logits = ll.llama_get_logits_ith(self._context, place)
        address = ctypes.addressof(logits.contents)
        return int(np.frombuffer((ctypes.c_float * self._vocab).from_address(address), np.float32).argmax())

    def close(self) -> None:
        ll.llama_batch_free(self._batch)
        ll.llama_free(self._context)


class LlamaCpp:
    def __init__(self, order: Order) -> None:
        ll.llama_log_set(_silent, ctypes.c_void_p(0))
        params = ll.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = ll.llama_model_load_from_file(order.model.encode(), params)
        self._vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(self._model))
        self._threads = order.threads

    def generate(self, prompts: Prompts, tokens: int) -> float:
        session = Session(self._model, self._vocab, self._threads, prompts, tokens)
        began = time.perf_counter()
        session.first()
        for _ in range(tokens - 1):
            session.step()
        seconds = time.perf_counter() - began
        session.close()
        return seconds

    def decode(self, prompts: Prompts, tokens: int) -> float:
        session = Session(self._model, self._vocab, self._threads, prompts, tokens)
        session.first()
        began = time.perf_counter()
        for _ in range(tokens):
            session.step()
        seconds = (time.perf_counter() - began) / tokens
        session.close()
        return seconds


if __name__ == "__main__":
    serve(LlamaCpp, ("llama-cpp-python",))
