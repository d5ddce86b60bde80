"""llama.cpp as an oracle: its C functions, in the shared object of the wheel `xllamacpp`, through ctypes.

Structures are passed as opaque bytes, larger than llama.cpp's own: only the leading fields that
`include/llama.h` has had in every version are written.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

_FLOATS = ctypes.POINTER(ctypes.c_float)


class _Params(ctypes.Structure):
    """llama_model_params or llama_context_params, by value: longer than 16 bytes, so passed in memory."""

    _fields_ = [("words", ctypes.c_uint32 * 256)]


class _Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", _FLOATS),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_silent = _LOG(lambda level, text, data: None)


@cache
def library() -> Any:
    """llama.cpp's functions; skips the test where the wheel is not installed."""
    spec = importlib.util.find_spec("xllamacpp")
    files = list(Path(spec.origin).parent.glob("*.so")) if spec is not None and spec.origin else []
    if not files:
        pytest.skip("xllamacpp, which brings llama.cpp, is not installed")
    lib = ctypes.CDLL(str(files[0]))
    pointer = ctypes.c_void_p
    for name, result, arguments in (
        ("llama_model_default_params", _Params, []),
        ("llama_context_default_params", _Params, []),
        ("llama_model_load_from_file", pointer, [ctypes.c_char_p, _Params]),
        ("llama_init_from_model", pointer, [pointer, _Params]),
        ("llama_model_get_vocab", pointer, [pointer]),
        ("llama_vocab_n_tokens", ctypes.c_int32, [pointer]),
        ("llama_batch_init", _Batch, [ctypes.c_int32, ctypes.c_int32, ctypes.c_int32]),
        ("llama_batch_free", None, [_Batch]),
        ("llama_decode", ctypes.c_int32, [pointer, _Batch]),
        ("llama_get_logits", _FLOATS, [pointer]),
        ("llama_get_embeddings", _FLOATS, [pointer]),
        ("llama_set_embeddings", None, [pointer, ctypes.c_bool]),
        ("llama_model_n_embd", ctypes.c_int32, [pointer]),
        ("llama_get_memory", pointer, [pointer]),
        ("llama_memory_clear", None, [pointer, ctypes.c_bool]),
        ("llama_free", None, [pointer]),
        ("llama_model_free", None, [pointer]),
        ("llama_adapter_lora_init", pointer, [pointer, ctypes.c_char_p]),
        ("llama_set_adapters_lora", ctypes.c_int32, [pointer, pointer, ctypes.c_size_t, pointer]),
        ("llama_log_set", None, [_LOG, pointer]),
        (
            "llama_tokenize",
            ctypes.c_int32,
            [pointer, ctypes.c_char_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32), ctypes.c_int32]
            + [ctypes.c_bool] * 2,
        ),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.llama_log_set(_silent, None)
    lib.llama_backend_init()
    return lib


def quantize(ggml_type: str, w: np.ndarray, importance: np.ndarray | None, row_bytes: int) -> np.ndarray:
    """llama.cpp's blocks of float32 rows [N, K], uint8 [N, row_bytes]; importance float32 [K] or None."""
    function = getattr(library(), "quantize_" + ggml_type.lower().replace("_k", "_K"))
    function.restype = ctypes.c_size_t
    out = np.empty((len(w), row_bytes), np.uint8)
    given = None if importance is None else importance.ctypes.data_as(_FLOATS)
    sizes = (ctypes.c_int64(w.shape[0]), ctypes.c_int64(w.shape[1]))
    written = function(w.ctypes.data_as(_FLOATS), out.ctypes.data_as(ctypes.c_void_p), *sizes, given)
    assert written == out.nbytes
    return out


class LlamaCpp:
    """A GGUF file opened by llama.cpp; `with LlamaCpp(path) as model`."""

    def __init__(self, path: Path, *, window: int = 512, threads: int = 2) -> None:
        lib = self._lib = library()
        self._model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        assert self._model, f"llama.cpp does not load {path.name}"
        params = lib.llama_context_default_params()
        params.words[0] = params.words[1] = params.words[2] = window  # n_ctx, n_batch, n_ubatch
        self._context = lib.llama_init_from_model(self._model, params)
        assert self._context, f"llama.cpp makes no context for {path.name}"
        lib.llama_set_n_threads(ctypes.c_void_p(self._context), threads, threads)
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.vocab_size = lib.llama_vocab_n_tokens(self._vocab)
        self._window = window

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids, with what the file says is added at the beginning."""
        raw = text.encode()
        out = (ctypes.c_int32 * (len(raw) + 8))()
        count = self._lib.llama_tokenize(self._vocab, raw, len(raw), out, len(out), True, special)
        assert count >= 0
        return list(out[:count])

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits of every token of one sequence, float32 [T, vocab], with an empty cache."""
        return self._computed(ids, self._lib.llama_get_logits, self.vocab_size)

    def adapt(self, adapters: Sequence[tuple[Path, float]]) -> None:
        """Apply LoRA adapters from now on, each times a number; freed with the model."""
        found = [self._lib.llama_adapter_lora_init(self._model, str(path).encode()) for path, _ in adapters]
        assert all(found), "llama.cpp does not load the adapter"
        handles = (ctypes.c_void_p * len(found))(*found)
        scales = (ctypes.c_float * len(found))(*(scale for _, scale in adapters))
        assert self._lib.llama_set_adapters_lora(self._context, handles, len(found), scales) == 0

    def hidden(self, ids: Sequence[int]) -> np.ndarray:
        """Hidden states of every token, float32 [T, hidden], of a file that says no pooling."""
        self._lib.llama_set_embeddings(self._context, True)
        return self._computed(ids, self._lib.llama_get_embeddings, self._lib.llama_model_n_embd(self._model))

    def _computed(self, ids: Sequence[int], results: Any, width: int) -> np.ndarray:
        lib = self._lib
        assert len(ids) <= self._window
        if (memory := lib.llama_get_memory(self._context)) is not None:  # encoders have none
            lib.llama_memory_clear(memory, True)
        batch = lib.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i] = int(token), i
                batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
            assert lib.llama_decode(self._context, batch) == 0
            return np.ctypeslib.as_array(results(self._context), (len(ids), width)).copy()
        finally:
            lib.llama_batch_free(batch)
