"""The strict GGUF reader: what it reads, and every way in which a header can lie."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llmc.frontend.gguf import read_gguf
from llmc.frontend.weights import (
    GGUFTensor,
    ReorderedTensor,
    TransformedTensor,
    open_gguf_tensors,
    transformed,
)
from llmc.ir.errors import InputError
from llmc.ir.weights import ArrayTensor, LazyTensor, read_chunks

from .gguf_files import (
    ARRAY,
    BOOL,
    F32,
    I32,
    STRING,
    U32,
    array,
    assemble,
    entry,
    llama_entries,
    llama_tensors,
    tensor_info,
    text,
    write_gguf,
)

ARCH = entry("general.architecture", STRING, "llama")


def _write(folder: Path, data: bytes) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(data)
    return path


def test_metadata_and_tensors_are_read(tmp_path: Path) -> None:
    entries = [
        ARCH,
        entry("a.bool", BOOL, 1),
        entry("a.float", F32, 0.5),
        array("a.strings", STRING, ["x", "", "ü"]),
        array("a.numbers", I32, [-1, 2]),
        array("a.flags", BOOL, [0, 1]),
    ]
    data = np.arange(6, dtype=np.float32).reshape(2, 3)
    path = write_gguf(tmp_path / "m.gguf", entries, {"t": data})
    file = read_gguf(path)
    assert file.version == 3
    assert file.architecture == "llama"
    assert file.metadata["a.bool"] is True
    assert file.metadata["a.float"] == 0.5
    assert file.metadata["a.strings"] == ["x", "", "ü"]
    assert file.metadata["a.numbers"].tolist() == [-1, 2]
    assert file.metadata["a.flags"].tolist() == [False, True]
    assert file.tensors["t"].shape == (2, 3)
    assert np.array_equal(open_gguf_tensors(file)["t"].read(), data)


def test_version_2_is_read(tmp_path: Path) -> None:
    file = read_gguf(_write(tmp_path, assemble([ARCH], [], b"", version=2)))
    assert (file.version, file.tensors) == (2, {})


_F32_8 = b"\0" * 32  # data of eight float32


def _info(**changes: Any) -> bytes:
    return tensor_info(**{"name": "t", "shape": (8,), "ggml_type": 0, "offset": 0, **changes})


def _value(kind: int, raw: bytes) -> bytes:
    """A file whose only key has a value of `kind` with these bytes."""
    return assemble([text("k") + struct.pack("<I", kind) + raw], [], b"")


LIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no GGUF file"),
    "four bytes": (b"GGUF", "version needs 4 bytes"),
    "other magic": (b"PK\x03\x04" + b"\0" * 60, "no GGUF file"),
    "version 1": (assemble([ARCH], [], b"", version=1), "GGUF version 1"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "absurd tensor count": (b"GGUF" + struct.pack("<IQQ", 3, 1 << 62, 0) + b"\0" * 64, "cannot fit"),
    "absurd key count": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 63) + b"\0" * 64, "cannot fit"),
    "absurd key length": (assemble([struct.pack("<Q", 1 << 40) + b"\0" * 64], [], b""), "65535"),
    "absurd string": (_value(STRING, struct.pack("<Q", 1 << 50) + b"x" * 32), "truncated"),
    "absurd array": (_value(ARRAY, struct.pack("<IQ", F32, 1 << 60) + b"x" * 32), "elements"),
    "absurd strings": (_value(ARRAY, struct.pack("<IQ", STRING, 1 << 60) + b"x" * 32), "strings"),
    "nested array": (_value(ARRAY, struct.pack("<IQ", ARRAY, 1) + b"x" * 32), "unsupported type 9"),
    "unknown value type": (_value(77, b"x" * 32), "unknown value type 77"),
    "bad boolean": (assemble([entry("k", BOOL, 7)], [], b""), "boolean of value 7"),
    "bad UTF-8": (_value(STRING, struct.pack("<Q", 2) + b"\xff\xfe"), "not UTF-8"),
    "key twice": (assemble([ARCH, ARCH], [], b""), "occurs twice"),
    "no dimensions": (assemble([ARCH], [_info(shape=())], _F32_8), "0 dimensions"),
    "five dimensions": (assemble([ARCH], [_info(shape=(1, 1, 1, 1, 8))], _F32_8), "5 dimensions"),
    "zero dimension": (assemble([ARCH], [_info(shape=(0, 8))], _F32_8), "impossible shape"),
    "overflowing shape": (assemble([ARCH], [_info(shape=(1 << 40, 1 << 40))], _F32_8), "impossible shape"),
    "unknown block type": (assemble([ARCH], [_info(ggml_type=4)], _F32_8), "unknown type 4"),
    "broken block": (assemble([ARCH], [_info(ggml_type=2)], _F32_8), "no whole Q4_0 blocks"),
    "offset past the end": (assemble([ARCH], [_info(offset=1 << 40)], _F32_8), "starts at byte"),
    "extent past the end": (assemble([ARCH], [_info(shape=(16,))], _F32_8), "truncated"),
    "unaligned offset": (assemble([ARCH], [_info(shape=(1,), offset=4)], _F32_8), "not aligned"),
    "tensor twice": (assemble([ARCH], [_info(), _info(offset=32)], _F32_8 * 2), "occurs twice"),
    "overlap": (
        assemble([ARCH], [_info(shape=(16,)), _info(name="u", offset=32)], _F32_8 * 2), "overlap"
    ),
    "alignment 3": (assemble([ARCH, entry("general.alignment", U32, 3)], [_info()], _F32_8), "power of two"),
    "alignment text": (
        assemble([ARCH, entry("general.alignment", STRING, "a")], [_info()], _F32_8), "power of two"
    ),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_lying_headers_are_refused_by_name(lie: str, tmp_path: Path) -> None:
    data, reason = LIES[lie]
    with pytest.raises(InputError) as raised:
        read_gguf(_write(tmp_path, data))
    assert reason in str(raised.value)
    assert "model.gguf" in str(raised.value)
    assert raised.value.remedy
    assert raised.value.exit_code == 2


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.gguf: No such file"):
        read_gguf(tmp_path / "nothing.gguf")


def test_truncation_anywhere_is_noticed(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf", llama_entries(), llama_tensors(), "Q4_0").read_bytes()
    for size in range(0, len(whole), max(1, len(whole) // 97)):
        with pytest.raises(InputError):
            read_gguf(_write(tmp_path, whole[:size]))
    assert read_gguf(_write(tmp_path, whole)).tensors


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 1200), st.integers(0, 255)), min_size=1, max_size=6))
def test_changed_bytes_never_end_in_another_error(changes: list[tuple[int, int]], tmp_path: Path) -> None:
    path = tmp_path / "source.gguf"
    if not path.exists():
        write_gguf(path, llama_entries(), llama_tensors(layers=1), "Q8_0")
    data = bytearray(path.read_bytes())
    for position, byte in changes:
        data[position] = byte
    _write(tmp_path, bytes(data))
    try:
        tensors = open_gguf_tensors(read_gguf(tmp_path / "model.gguf"))
    except InputError:  # a changed number that no longer fits; any other exception fails the test
        return
    with np.errstate(all="ignore"):  # changed scales may overflow
        assert all(tensor.read(0, 1).dtype == np.float32 for tensor in tensors.values())


_CORPUS_SCRIPT = """
import resource, sys
from pathlib import Path
from llmc.frontend.source import open_source
from llmc.ir.errors import LlmcError
import gguf.constants
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = peak()
for path in map(Path, sys.argv[1:]):
    try:
        open_source(path)
        print("opened", path.name)
    except LlmcError as error:
        assert error.exit_code == 2 and error.remedy
        print("refused", error)
    assert peak() - start < 100_000, (path, peak() - start)
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("folder", ["fuzz_corpus", "fixtures", "vocab"])
def test_hostile_corpus_is_refused_before_anything_is_loaded(folder: str, shared_data: Path) -> None:
    paths = sorted(map(str, (shared_data / "gguf_files" / folder).iterdir()))
    done = subprocess.run(
        [sys.executable, "-c", _CORPUS_SCRIPT, *paths],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(paths)


# Lazy tensors ----------------------------------------------------------------------------------------------

BLOCK_TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_rows_are_dequantized_alone_as_in_the_whole(kind: str, tmp_path: Path) -> None:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    data = np.random.default_rng(1).standard_normal((37, 256)).astype(np.float32)
    path = write_gguf(tmp_path / "m.gguf", [ARCH], {"pad": data[:1], "t": data}, kind)
    tensor = open_gguf_tensors(read_gguf(path))["t"]
    blocks = quantize(data, GGMLQuantizationType[kind])
    whole = dequantize(blocks, GGMLQuantizationType[kind])
    assert tensor.ggml_type == kind
    assert tensor.dtype == "float32"
    assert np.array_equal(tensor.read(), whole)
    assert np.array_equal(tensor.read(5, 19), whole[5:19])
    assert np.array_equal(tensor.read(36, 99), whole[36:])
    assert tensor.read(4, 4).shape == (0, 256)
    assert np.array_equal(np.concatenate(list(read_chunks(tensor, 5000))), whole)
    raw = tensor.blocks(3, 7)
    assert raw.dtype == np.uint8
    assert raw.tobytes() == np.ascontiguousarray(blocks[3:7]).tobytes()


READ_ONLY_TYPES = (
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS",
    "IQ2_S", "IQ3_XXS", "IQ3_S", "NVFP4",
)  # fmt: skip


@pytest.mark.parametrize("kind", READ_ONLY_TYPES)
def test_block_types_that_gguf_only_reads(kind: str, tmp_path: Path) -> None:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    type_id = GGMLQuantizationType[kind]
    block, size = GGML_QUANT_SIZES[type_id]
    # Small bytes: any bit pattern is a valid block, but large ones would make scales of not-a-number.
    raw = np.random.default_rng(2).integers(0, 60, (9, 512 // block * size), dtype=np.uint8)
    info = _info(shape=(9, 512), ggml_type=int(type_id))
    path = _write(tmp_path, assemble([ARCH], [info], raw.tobytes()))
    tensor = open_gguf_tensors(read_gguf(path))["t"]
    whole = dequantize(raw, type_id)
    assert np.array_equal(tensor.read(2, 8), whole[2:8], equal_nan=True)
    assert np.array_equal(tensor.blocks(2, 8), raw[2:8])


def test_a_type_without_dequantizer_is_named(tmp_path: Path) -> None:
    path = _write(tmp_path, assemble([ARCH], [_info(ggml_type=28)], b"\0" * 64))  # float64
    with pytest.raises(InputError, match=r"model\.gguf:t has the type F64"):
        open_gguf_tensors(read_gguf(path))


def test_three_axes_are_read_by_the_first(tmp_path: Path) -> None:
    data = np.random.default_rng(3).standard_normal((5, 6, 32)).astype(np.float32)
    tensor = open_gguf_tensors(read_gguf(write_gguf(tmp_path / "m.gguf", [ARCH], {"t": data}, "F32")))["t"]
    assert np.array_equal(tensor.read(1, 4), data[1:4])
    assert tensor.blocks(1, 4).shape == (3, 6, 128)


def _gguf_tensor(folder: Path, shape: tuple[int, ...]) -> GGUFTensor:
    data = np.random.default_rng(4).standard_normal(shape).astype(np.float32)
    return open_gguf_tensors(read_gguf(write_gguf(folder / "m.gguf", [ARCH], {"t": data}, "F32")))["t"]


class _Counting(ArrayTensor):
    """Remembers the rows that were read."""

    rows = 0

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
        out = super().read(start, stop)
        self.rows += len(out)
        return out


def test_a_transform_that_does_nothing_leaves_the_tensor(tmp_path: Path) -> None:
    base = _gguf_tensor(tmp_path, (12, 32))
    assert transformed(base, lambda a: a) is base


def test_reordered_rows_keep_their_blocks(tmp_path: Path) -> None:
    def interleave(a: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return a.reshape(3, 2, 2, *a.shape[1:]).swapaxes(1, 2).reshape(a.shape)

    base = _gguf_tensor(tmp_path, (12, 32))
    tensor = transformed(base, interleave)
    assert isinstance(tensor, ReorderedTensor)
    assert np.array_equal(tensor.read(), interleave(base.read()))
    assert np.array_equal(tensor.read(3, 9), interleave(base.read())[3:9])
    assert np.array_equal(tensor.blocks(3, 9), interleave(base.blocks())[3:9])
    assert tensor.ggml_type == "F32"
    assert tensor.read(2, 2).shape == (0, 32)


@pytest.mark.parametrize(
    ("transform", "rows_read_for_two"),
    [
        pytest.param(lambda a: a - 1, 2, id="elementwise"),
        pytest.param(lambda a: np.expand_dims(a, 1), 2, id="inserted axis"),
        pytest.param(lambda a: a.T, 12, id="transpose"),
        pytest.param(lambda a: np.expand_dims(a, 0), 12, id="leading axis"),
        pytest.param(lambda a: a[::-1] * 2, 12, id="reversed and scaled"),
        pytest.param(lambda a: a.reshape(12, 8, 4), 12, id="needs the real columns"),
    ],
)
def test_transforms_read_no_more_than_they_need(transform: Any, rows_read_for_two: int) -> None:
    data = np.random.default_rng(5).standard_normal((12, 32)).astype(np.float32)
    base = _Counting(data)
    tensor: LazyTensor = transformed(base, transform)
    assert isinstance(tensor, TransformedTensor)
    assert tensor.shape == transform(data).shape
    base.rows = 0
    assert np.array_equal(tensor.read(0, 2), transform(data)[:2])
    assert base.rows == rows_read_for_two
    assert np.array_equal(tensor.read(), transform(data))
