"""Writes small GGUF files for tests: valid ones by hand-made headers, and damaged ones from them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10
_CODES = {U32: "<I", I32: "<i", F32: "<f", BOOL: "<B", U64: "<Q"}


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(kind: int, item: Any) -> bytes:
    return text(item) if kind == STRING else struct.pack(_CODES[kind], item)


def entry(key: str, kind: int, item: Any) -> bytes:
    """A scalar; `array` writes lists."""
    return text(key) + struct.pack("<I", kind) + value(kind, item)


def array(key: str, kind: int, items: list[Any]) -> bytes:
    head = text(key) + struct.pack("<IIQ", ARRAY, kind, len(items))
    return head + b"".join(value(kind, item) for item in items)


def tensor_info(name: str, shape: tuple[int, ...], ggml_type: int, offset: int) -> bytes:
    """`shape` in torch's order."""
    dims = b"".join(struct.pack("<Q", n) for n in reversed(shape))
    return text(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", ggml_type, offset)


def assemble(
    entries: list[bytes], infos: list[bytes], data: bytes, version: int = 3, alignment: int = 32
) -> bytes:
    head = (
        b"GGUF" + struct.pack("<IQQ", version, len(infos), len(entries)) + b"".join(entries) + b"".join(infos)
    )
    return head + b"\0" * (-len(head) % alignment) + data


def write_gguf(
    path: Path,
    entries: list[bytes],
    tensors: dict[str, np.ndarray[Any, Any]],
    quantize: str | Callable[[str], str] = "F32",
) -> Path:
    """A file whose tensors of two or more axes are stored as `quantize` blocks (or those it says of a name),
    the others in float32.
    """
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import quantize as to_blocks
    from llmc.passes.quantize.gguf.encode import encode

    infos: list[bytes] = []
    data = b""
    for name, array_ in tensors.items():
        wanted = quantize if isinstance(quantize, str) else quantize(name)
        kind = GGMLQuantizationType[wanted if array_.ndim > 1 else "F32"]
        x = array_.astype(np.float32)
        if kind.name.endswith("_K"):  # gguf's package has no encoders of these
            raw = encode(kind.name, x.reshape(-1, x.shape[-1])).tobytes()
        elif kind.name.startswith("IQ") or kind.name == "NVFP4":
            raw = _in_grids(kind, x.reshape(-1, x.shape[-1]))
        else:
            raw = to_blocks(x, kind).tobytes()
        infos.append(tensor_info(name, array_.shape, int(kind), len(data)))
        data += raw + b"\0" * (-len(raw) % 32)
    path.write_bytes(assemble(entries, infos, data))
    return path


def _in_grids(kind: Any, rows: np.ndarray[Any, Any]) -> bytes:
    """Blocks by llama.cpp's own encoder, all columns alike."""
    from llmc.ir.ggml import BLOCK_TYPES

    from .llama_cpp import library, quantize

    library().ggml_quantize_init(int(kind))
    k = rows.shape[1]
    assert k % BLOCK_TYPES[kind.name].block_size == 0, "rows are whole blocks"
    return quantize(kind.name, rows, np.ones(k, np.float32), BLOCK_TYPES[kind.name].row_bytes(k)).tobytes()


def llama_entries(
    layers: int = 2, heads: int = 4, kv_heads: int = 2, hidden: int = 64, arch: str = "llama"
) -> list[bytes]:
    """Metadata of a tiny decoder, without a tokenizer."""
    return [
        entry("general.architecture", STRING, arch),
        entry("general.name", STRING, "tiny"),
        entry(f"{arch}.block_count", U32, layers),
        entry(f"{arch}.context_length", U32, 128),
        entry(f"{arch}.embedding_length", U32, hidden),
        entry(f"{arch}.feed_forward_length", U32, 96),
        entry(f"{arch}.attention.head_count", U32, heads),
        entry(f"{arch}.attention.head_count_kv", U32, kv_heads),
        entry(f"{arch}.attention.layer_norm_rms_epsilon", F32, 1e-5),
        entry(f"{arch}.rope.freq_base", F32, 10000.0),
        entry(f"{arch}.vocab_size", U32, 96),
    ]


def llama_tensors(
    layers: int = 2, heads: int = 4, kv_heads: int = 2, hidden: int = 64
) -> dict[str, np.ndarray[Any, Any]]:
    """Random tensors by GGUF names, tied embeddings."""
    rng = np.random.default_rng(0)
    head_dim = hidden // heads

    def matrix(rows: int, columns: int) -> np.ndarray[Any, Any]:
        return rng.standard_normal((rows, columns)).astype(np.float32)

    out = {"token_embd.weight": matrix(96, hidden), "output_norm.weight": matrix(1, hidden)[0]}
    for i in range(layers):
        out |= {
            f"blk.{i}.attn_norm.weight": matrix(1, hidden)[0],
            f"blk.{i}.ffn_norm.weight": matrix(1, hidden)[0],
            f"blk.{i}.attn_q.weight": matrix(heads * head_dim, hidden),
            f"blk.{i}.attn_k.weight": matrix(kv_heads * head_dim, hidden),
            f"blk.{i}.attn_v.weight": matrix(kv_heads * head_dim, hidden),
            f"blk.{i}.attn_output.weight": matrix(hidden, heads * head_dim),
            f"blk.{i}.ffn_gate.weight": matrix(96, hidden),
            f"blk.{i}.ffn_up.weight": matrix(96, hidden),
            f"blk.{i}.ffn_down.weight": matrix(hidden, 96),
        }
    return out


def byte_vocabulary(
    extra: list[str] | None = None, merges: list[str] | None = None, pre: str = "gpt-2"
) -> list[bytes]:
    """Metadata of a byte-level BPE: 256 bytes, the merges' results, and `extra` as control tokens."""
    from llmc.frontend.tokenizer_reference import byte_alphabet

    merges = merges or []
    tokens = byte_alphabet() + [merge.replace(" ", "") for merge in merges] + (extra or [])
    types = [1] * (256 + len(merges)) + [3] * len(extra or [])
    return [
        entry("tokenizer.ggml.model", STRING, "gpt2"),
        entry("tokenizer.ggml.pre", STRING, pre),
        array("tokenizer.ggml.tokens", STRING, tokens),
        array("tokenizer.ggml.token_type", I32, types),
        array("tokenizer.ggml.merges", STRING, merges),
    ]
