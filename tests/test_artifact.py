"""The artifact's format: same bytes for the same input, whole or not there, and every fault named with its
remedy.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from llmc.codegen import artifact as artifact_module
from llmc.codegen.artifact import MANIFEST, Artifact, ArtifactWriter, safe_relative
from llmc.ir.errors import ArtifactError, InputError
from safetensors import safe_open

RNG = np.random.default_rng(0)
TENSORS: dict[str, np.ndarray] = {
    "embed": RNG.normal(size=(7, 5)).astype(np.float32),
    "half": RNG.normal(size=(3, 3)).astype(np.float16),
    "brain": RNG.normal(size=(4, 2)).astype(ml_dtypes.bfloat16),
    "packed": RNG.integers(0, 255, (5, 3), np.uint8),
    "signed": RNG.integers(-100, 100, 11).astype(np.int8),
    "index": np.arange(6, dtype=np.int32).reshape(2, 3),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 4), np.float32),
}


def _manifest() -> dict[str, Any]:
    return {
        "kind": "causal_lm",
        "model": {"name": "tiny", "vocab_size": 8, "context_length": 16, "eos_token_ids": [1]},
        "targets": {"null": {"weights": "weights/null.safetensors", "options": {}}},
        "tokenizer": None,
    }


def _chunks(array: np.ndarray, rows: int = 2):
    if array.ndim == 0:
        yield array
    for start in range(0, len(array) if array.ndim else 0, rows):
        yield array[start : start + rows]


def _write(out: Path, note: str = "graph\n") -> Artifact:
    with ArtifactWriter(out) as writer:
        writer.path("ir.txt").write_text(note)
        specs = [(name, a.shape, str(a.dtype), _chunks(a)) for name, a in TENSORS.items()]
        writer.write_weights("weights/null.safetensors", specs)
        return writer.finish(_manifest())


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    _write(tmp_path / "m.llmc")
    return tmp_path / "m.llmc"


def test_weights_come_back_mapped_aligned_and_read_only(made: Path):
    weights = Artifact.open(made).weights("null")
    assert set(weights) == set(TENSORS)
    for name, array in TENSORS.items():
        assert weights[name].dtype == array.dtype
        assert np.array_equal(weights[name], array)
        assert weights[name].ctypes.data % 64 == 0 or array.size == 0
        assert not weights[name].flags.writeable


def test_weight_files_are_plain_safetensors(made: Path):
    with safe_open(made / "weights/null.safetensors", "np") as file:
        assert np.array_equal(file.get_tensor("embed"), TENSORS["embed"])
        assert {name for name in file.keys() if not name.startswith("__")} == set(TENSORS)  # noqa: SIM118


def test_the_same_input_gives_the_same_bytes_also_over_an_old_artifact(made: Path, tmp_path: Path):
    first = _bytes(made)
    time.sleep(0.01)
    _write(tmp_path / "other.llmc", "something else\n")
    _write(tmp_path / "other.llmc")
    assert _bytes(tmp_path / "other.llmc") == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.llmc", "other.llmc"]


def test_an_exception_leaves_nothing_and_keeps_the_old_artifact(made: Path):
    before = _bytes(made)

    def fail() -> None:
        with ArtifactWriter(made) as writer:
            writer.path("ir.txt").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert _bytes(made) == before
    assert [p.name for p in made.parent.iterdir()] == ["m.llmc"]


def test_kill_9_leaves_no_artifact_and_the_next_run_clears_up(tmp_path: Path):
    out = tmp_path / "m.llmc"
    code = (
        "import sys, time\nfrom llmc.codegen.artifact import ArtifactWriter\n"
        "with ArtifactWriter(sys.argv[1]) as w:\n w.path('junk').write_text('half')\n"
        " print('ready', flush=True)\n time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    with pytest.raises(InputError, match="another process is writing"):
        _write(out)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not out.exists()
    with pytest.raises(ArtifactError, match="did not finish"):
        Artifact.open(out)
    with pytest.raises(ArtifactError, match="unfinished"):
        Artifact.open(tmp_path / "m.llmc.partial")
    _write(out)
    assert "junk" not in Artifact.open(out).manifest["files"]
    assert [p.name for p in tmp_path.iterdir()] == ["m.llmc"]


def test_death_between_the_two_renames_is_repaired(made: Path):
    made.rename(made.with_name("m.llmc.old"))

    def fail() -> None:
        with ArtifactWriter(made):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert Artifact.open(made).kind == "causal_lm"


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_is_no_artifact_is_never_replaced(tmp_path: Path, what: str):
    out = tmp_path / "documents"
    if what == "folder":
        out.mkdir()
        (out / "letter.txt").write_text("dear")
    else:
        out.write_text("dear")
    with pytest.raises(InputError, match="is not an artifact"):
        _write(out)
    assert ((out / "letter.txt") if what == "folder" else out).read_text() == "dear"


def test_disk_full_names_the_file_and_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(path: Path, specs: object) -> tuple[str, int]:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(artifact_module, "write_weight_file", full)
    with pytest.raises(InputError, match=r"no space left .*weights/null\.safetensors, which needs \d+ MB"):
        _write(tmp_path / "m.llmc")
    assert list(tmp_path.iterdir()) == []


def test_disk_full_is_noticed_before_the_first_byte(tmp_path: Path):
    def never() -> Any:
        raise AssertionError("a chunk was asked for")
        yield

    def write() -> None:
        with ArtifactWriter(tmp_path / "m.llmc") as writer:
            writer.write_weights("weights/w.safetensors", [("w", (2**50,), "float32", never())])

    with pytest.raises(InputError, match="no space left"):
        write()


def test_disk_full_in_a_file_of_the_caller(tmp_path: Path):
    def write() -> None:
        with ArtifactWriter(tmp_path / "m.llmc") as writer:
            raise OSError(errno.ENOSPC, "No space left on device", str(writer.path("targets/x.so")))

    with pytest.raises(InputError, match=r"no space left .*targets/x\.so"):
        write()


def test_weights_are_streamed(tmp_path: Path):
    rows, width = 64, 1 << 18  # 64 MB in chunks of 1 MB

    def chunks():
        for _ in range(rows):
            yield np.zeros((1, width), np.float32)

    with ArtifactWriter(tmp_path / "m.llmc") as writer:
        tracemalloc.start()
        writer.write_weights("weights/null.safetensors", [("w", (rows, width), "float32", chunks())])
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        writer.finish(_manifest())
    assert peak < 8 << 20


@pytest.mark.parametrize(
    ("shape", "dtype", "chunks"),
    [
        ((4, 2), "float32", [np.zeros((3, 2), np.float32)]),
        ((4, 2), "float32", [np.zeros((5, 2), np.float32)]),
        ((4, 2), "float32", [np.zeros((4, 3), np.float32)]),
        ((4, 2), "float32", [np.zeros((4, 2), np.float16)]),
    ],
)
def test_chunks_that_are_not_the_tensor_are_a_mistake(tmp_path: Path, shape: Any, dtype: str, chunks: Any):
    with pytest.raises(ValueError, match="weight 'w'"), ArtifactWriter(tmp_path / "m.llmc") as writer:
        writer.write_weights("w.safetensors", [("w", shape, dtype, chunks)])
    assert list(tmp_path.iterdir()) == []


# Faults
# ------------------------------------------------------------------------------------------------------


def _edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        manifest = json.loads((root / MANIFEST).read_text())
        change(manifest)
        (root / MANIFEST).write_text(json.dumps(manifest))

    return apply


def _set(*path_and_value: Any) -> Callable[[Path], None]:
    *path, last, value = path_and_value

    def change(manifest: dict[str, Any]) -> None:
        for key in path:
            manifest = manifest[key]
        manifest[last] = value

    return _edit(change)


def _flip(root: Path) -> None:
    path = root / "weights/null.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _cut(root: Path) -> None:
    os.truncate(root / "weights/null.safetensors", 100)


def _link_out(root: Path) -> None:
    outside = root.parent / "ir.txt"
    shutil.move(root / "ir.txt", outside)
    (root / "ir.txt").symlink_to(outside)


def _fifo(root: Path) -> None:
    (root / "ir.txt").unlink()
    os.mkfifo(root / "ir.txt")


def _steal(root: Path) -> None:
    secret = root.parent / "secret"
    secret.write_text("x")
    _edit(lambda m: m["files"].update({"../secret": {"sha256": "0" * 64, "size": 1}}))(root)


FAULTS: list[tuple[str, Callable[[Path], Any], str]] = [
    ("cut short", _cut, "has 100 bytes instead of"),
    ("one bit flipped", _flip, "its sha256 is not the manifest's"),
    ("file missing", lambda root: (root / "ir.txt").unlink(), "ir.txt is missing"),
    ("no manifest", lambda root: (root / MANIFEST).unlink(), "has no manifest.json"),
    ("manifest cut", lambda root: os.truncate(root / MANIFEST, 50), "not JSON"),
    ("manifest empty", lambda root: (root / MANIFEST).write_bytes(b""), "not JSON"),
    ("manifest nested", lambda root: (root / MANIFEST).write_text("[" * 100_000), "not JSON"),
    ("manifest not UTF-8", lambda root: (root / MANIFEST).write_bytes(b"\xff\xfe{"), "not JSON"),
    ("manifest a list", lambda root: (root / MANIFEST).write_text("[]"), "not a JSON object"),
    ("newer schema", _edit(lambda m: m.update(schema=2, requires_llmc="0.9.0")), r"needs llmc >= 0\.9\.0"),
    ("no schema", _edit(lambda m: m.pop("schema")), "no schema number"),
    ("odd schema", _set("schema", "1"), "no schema number"),
    ("kind", _set("kind", "virus"), "kind 'virus'"),
    ("no files", _edit(lambda m: m.pop("files")), "entry 'files' is missing"),
    ("targets a list", _set("targets", []), "entry 'targets' is missing or not of type dict"),
    ("traversal", _steal, "leaves the artifact"),
    ("absolute", _edit(lambda m: m["files"].update({"/etc/passwd": {}})), "leaves the artifact"),
    ("target traversal", _set("targets", "null", "weights", "../x"), "which its file list lacks"),
    (
        "kernel unlisted",
        _set("targets", "null", "kernels", [{"isa": "avx2", "path": "a.so"}]),
        "file list lacks",
    ),
    ("kernels a number", _set("targets", "null", "kernels", 5), "target 'null' is malformed"),
    ("weights a number", _set("targets", "null", "weights", 5), "stands where a file name belongs"),
    ("tokenizer", _set("tokenizer", {"path": "tokenizer.json", "chat_template": None}), "file list lacks"),
    ("size", _set("files", "ir.txt", "size", -1), "no valid sha256 and size"),
    ("hash", _set("files", "ir.txt", "sha256", 7), "no valid sha256 and size"),
    ("link out", _link_out, "is a link out of the artifact"),
    ("fifo", _fifo, "is not a file"),
]


@pytest.mark.parametrize(("fault", "message"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_faults_are_refused_with_file_reason_and_remedy(
    made: Path, fault: Callable[[Path], Any], message: str
):
    fault(made)
    with pytest.raises(ArtifactError, match=message) as caught:
        Artifact.open(made)
    assert caught.value.remedy
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert str(made) in str(caught.value)


def test_size_alone_is_checked_where_asked(made: Path):
    _flip(made)
    assert Artifact.open(made, verify="size").kind == "causal_lm"
    _cut(made)
    with pytest.raises(ArtifactError, match="cut short"):
        Artifact.open(made, verify="size")


def test_what_is_not_an_artifact_says_what_it_is(tmp_path: Path):
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    with pytest.raises(ArtifactError, match=r"is a file.*compile it first: llmc compile"):
        Artifact.open(gguf)
    folder = tmp_path / "hf"
    folder.mkdir()
    with pytest.raises(ArtifactError, match="it has no manifest"):
        Artifact.open(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="is a model folder, not an artifact"):
        Artifact.open(folder)
    with pytest.raises(ArtifactError, match="does not exist"):
        Artifact.open(tmp_path / "nothing.llmc")


def _header(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = root / "weights/null.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data_offsets", [0, 1 << 40], "do not fit"),
        ("data_offsets", [140, 0], "do not fit"),
        ("data_offsets", [-64, 76], "impossible"),
        ("data_offsets", [4, 144], "not 64-byte aligned"),
        ("data_offsets", "x", "incomplete"),
        ("shape", [1 << 62, 1 << 62], "do not fit"),
        ("shape", [7, 5.0], "impossible"),
        ("shape", [True, 35], "impossible"),
        ("dtype", "F99", "impossible"),
        ("dtype", ["F32"], "impossible"),
    ],
)
def test_weight_headers_are_checked_before_anything_is_read(made: Path, key: str, value: Any, message: str):
    artifact = Artifact.open(made)
    _header(made, lambda header: header["embed"].update({key: value}))
    with pytest.raises(ArtifactError, match=message):
        artifact.weights("null")


@pytest.mark.parametrize("data", [b"", b"\0" * 7, b"\xff" * 64, (200).to_bytes(8, "little") + b"{}"])
def test_weight_files_that_are_none(made: Path, data: bytes):
    artifact = Artifact.open(made)
    (made / "weights/null.safetensors").write_bytes(data)
    with pytest.raises(ArtifactError, match="the header says"):
        artifact.weights("null")


def test_unknown_target_and_file_are_named(made: Path):
    artifact = Artifact.open(made)
    with pytest.raises(ArtifactError, match=r"not compiled for target 'tvm-cuda', only for null"):
        artifact.target("tvm-cuda")
    with pytest.raises(ArtifactError, match="lists no file"):
        artifact.path("../../etc/passwd")


UNSAFE = ["", ".", "..", "a/../b", "/a", "a//b", "a\\b", "C:x", "a\0b", "a/", "./a"]


@pytest.mark.parametrize("name", UNSAFE)
def test_unsafe_names(name: str):
    assert not safe_relative(name)
    assert safe_relative("targets/tvm-cpu/avx2.so")


def test_neither_torch_nor_tvm_is_imported(made: Path):
    code = (
        "import sys\nfor name in ('torch', 'transformers', 'tvm', 'onnxruntime'): sys.modules[name] = None\n"
        "from llmc.runtime.loader import load\n"
        "llm = load(sys.argv[1], kv_tokens=64)\nprint(llm.generate([1, 2, 3], max_tokens=2).token_ids)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(made)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "[0, 0]\n", done.stderr
