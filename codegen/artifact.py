"""The artifact: a folder that holds all that serving a model needs. Written here, and read here;
docs/architecture.md.

Neither half needs torch, transformers or TVM. Nothing in an artifact is executed as Python: JSON,
safetensors, text, and the compiled kernels of its targets.

    with ArtifactWriter("model.llmc") as writer:
        writer.path("ir.txt").write_text(text)
        writer.write_weights("weights/tvm-cpu.safetensors", [("w", (4, 8), "float32", [rows])])
        artifact = writer.finish(manifest)

    artifact = Artifact.open("model.llmc")
    artifact.weights("tvm-cpu")["w"]
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import numpy as np
from llmc import __version__

from ..ir import gguf_rows, stored_modules
from ..ir.errors import ArtifactError, InputError
from .weight_file import TensorSpec, map_weight_file, weight_file_size, write_weight_file

SCHEMA = 1
REQUIRES_LLMC = "0.1.0"
KINDS = ("causal_lm", "encoder", "classifier", "function")
MANIFEST = "manifest.json"
QUALITY = "quality.json"
_MAX_MANIFEST = 64 << 20
_AGAIN = "compile the model again or copy the artifact again"

Verify = Literal["full", "size"]
_T = TypeVar("_T")


def safe_relative(name: str) -> bool:
    """Whether `name` is a plain relative path that stays inside the folder: no root, no `..`, no backslash,
    no drive.
    """
    if not name or "\0" in name or "\\" in name or ":" in name:
        return False
    return all(part not in ("", ".", "..") for part in name.split("/"))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_full(error: OSError, what: str, needed: int | None = None) -> InputError:
    amount = f", which needs {needed / 1e6:.0f} MB" if needed is not None else ""
    return InputError(
        f"no space left on the disk while writing {what}{amount} ({error.strerror})",
        remedy="free some space or choose another output folder; nothing was left behind",
    )


class ArtifactWriter:
    """Writes `NAME.partial/` and renames it to `NAME` when it is complete, so a name never holds half an
    artifact.

    A context manager: an exception removes the partial folder, and a full disk becomes an InputError that
    names the file. After a `kill -9` the partial folder stays, is never taken for an artifact, and the next
    writer removes it.
    """

    def __init__(self, out_path: str | os.PathLike[str]):
        self.out = Path(out_path)
        if not self.out.name:
            raise InputError(
                f"{out_path!s} is no name for an artifact", remedy="give a path such as model.llmc"
            )
        self.partial = self.out.with_name(self.out.name + ".partial")
        self._old = self.out.with_name(self.out.name + ".old")
        self._digests: dict[str, tuple[str, int]] = {}
        self._lock: int | None = None
        self._finished = False

    def __enter__(self) -> ArtifactWriter:
        if not self.out.exists() and (self._old / MANIFEST).exists():
            os.rename(self._old, self.out)  # a writer died between its two renames
        self._check_replaceable()
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.partial.mkdir(exist_ok=True)
            self._take_lock()
            _clear(self.partial)
        except OSError as error:
            self._release()
            raise InputError(
                f"cannot write {self.partial}: {error.strerror}", remedy="choose another output folder"
            ) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if not self._finished:
                shutil.rmtree(self.partial, ignore_errors=True)
        finally:
            self._release()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(error, str(error.filename or self.partial)) from error

    def _check_replaceable(self) -> None:
        """Only an artifact or an empty folder is ever replaced: `-o ~/Documents` must not cost anyone their
        files.
        """
        if not os.path.lexists(self.out):
            return
        is_ours = self.out.is_dir() and ((self.out / MANIFEST).is_file() or not any(self.out.iterdir()))
        if self.out.is_symlink() or not is_ours:
            raise InputError(
                f"{self.out} exists and is not an artifact", remedy="choose another name or remove it first"
            )

    def _take_lock(self) -> None:
        self._lock = os.open(self.partial, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._release()
            raise InputError(
                f"another process is writing {self.partial}", remedy="wait for it or choose another name"
            ) from None
        except OSError:
            return  # a file system without locks: two writers at once go unnoticed there

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def path(self, rel: str) -> Path:
        """Where to write the file `rel` ("targets/tvm-cpu/avx2.so"); its folder exists afterwards."""
        if not safe_relative(rel) or rel == MANIFEST:
            raise ValueError(f"{rel!r} is not a file name inside an artifact")
        path = self.partial / rel
        path.parent.mkdir(parents=True, exist_ok=True)
        self._digests.pop(rel, None)
        return path

    def write_weights(self, rel: str, tensors: Sequence[TensorSpec]) -> None:
        """Stream tensors (name, shape, dtype name, row chunks) into the safetensors file `rel`; memory is one
        chunk.

        Raises InputError where the disk cannot hold the file, before the first chunk is asked for where that
        is known.
        """
        path = self.path(rel)
        needed = weight_file_size(tensors)
        free = shutil.disk_usage(path.parent).free
        if free < needed:
            error = OSError(errno.ENOSPC, f"{free / 1e6:.0f} MB are free")
            raise _disk_full(error, str(path), needed)
        try:
            self._digests[rel] = write_weight_file(path, tensors)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _disk_full(error, str(path), needed) from error
            raise

    def write_quality(self, quality: Mapping[str, Any]) -> None:
        """Write `quality.json`; no number in it may be infinite or NaN."""
        text = json.dumps(quality, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        self.path(QUALITY).write_text(text, encoding="utf-8", newline="\n")

    def size_of(self, rel: str) -> int:
        """Bytes of a file that was written."""
        return (self.partial / rel).stat().st_size

    def finish(self, manifest: Mapping[str, Any]) -> Artifact:
        """Hash the files, write the manifest last, make everything durable and give the folder its final
        name.

        `manifest` lacks "files" (added here); "schema", "requires_llmc" and "llmc" have defaults. Returns the
        artifact. Raises ArtifactError where the manifest does not describe the files that were written.
        """
        files = sorted(p.relative_to(self.partial).as_posix() for p in self.partial.rglob("*") if p.is_file())
        defaults = {"schema": SCHEMA, "requires_llmc": REQUIRES_LLMC, "llmc": __version__, "command": []}
        full = {**defaults, **manifest, "files": {rel: self._entry(rel) for rel in files}}
        check_manifest(full, self.partial / MANIFEST)
        text = json.dumps(full, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        target = self.partial / MANIFEST
        target.write_text(text, encoding="utf-8", newline="\n")
        for path in [target, *(self.partial / rel for rel in files)]:
            _sync(path)
        for folder in [p for p in self.partial.rglob("*") if p.is_dir()] + [self.partial]:
            _sync(folder)
        self._rename()
        self._finished = True
        return Artifact(self.out, full)

    def _entry(self, rel: str) -> dict[str, Any]:
        path = self.partial / rel
        if path.is_symlink():
            raise ValueError(f"{rel!r} is a link; an artifact holds its files itself")
        size = path.stat().st_size
        known = self._digests.get(rel)
        digest = known[0] if known is not None and known[1] == size else _sha256(path)
        return {"sha256": digest, "size": size}

    def _rename(self) -> None:
        if self._old.exists():
            shutil.rmtree(self._old)
        if self.out.exists():
            os.rename(self.out, self._old)
        try:
            os.rename(self.partial, self.out)
        except OSError:
            if self._old.exists():
                os.rename(self._old, self.out)
            raise
        _sync(self.out.parent)
        shutil.rmtree(self._old, ignore_errors=True)


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


# --------------------------------------------------------------------------------------
# Reading


class Artifact:
    """An artifact that was opened and checked. Get one from `Artifact.open`."""

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.root = path
        self.manifest = manifest
        self._maps: dict[str, dict[str, np.ndarray]] = {}

    @staticmethod
    def open(path: str | os.PathLike[str], verify: Verify = "full") -> Artifact:
        """Open `path` and check it: schema, structure, the size of every file, and with "full" every sha256.

        Raises ArtifactError, naming the file, the cause and the remedy, for anything that is not a whole
        artifact that this version reads.
        """
        if verify not in ("full", "size"):
            raise InputError(f"verify is {verify!r}", remedy='use "full" or "size"')
        root = Path(path)
        manifest = _read_manifest(root)
        check_manifest(manifest, root / MANIFEST)
        _check_files(root, manifest["files"])
        artifact = Artifact(root, manifest)
        if verify == "full":
            artifact.verify()
        return artifact

    def verify(self) -> None:
        """Check the sha256 of every file, several at a time. Raises ArtifactError where one differs."""
        _check_hashes(self.root, self.manifest["files"])

    @property
    def kind(self) -> str:
        """ "causal_lm", "encoder", "classifier" or "function"."""
        return self.manifest["kind"]

    @property
    def model(self) -> dict[str, Any]:
        """Facts of the model: the manifest's "model" entry."""
        return self.manifest["model"]

    @property
    def targets(self) -> list[str]:
        """Names of the targets that it was compiled for, sorted."""
        return sorted(self.manifest["targets"])

    def target(self, name: str) -> dict[str, Any]:
        """The manifest's entry of one target. Raises ArtifactError where it was not compiled for that one."""
        try:
            return self.manifest["targets"][name]
        except KeyError:
            raise ArtifactError(
                f"{self.root} was not compiled for target {name!r}, only for {', '.join(self.targets)}",
                remedy=f"compile it with --target {name}",
            ) from None

    @property
    def quality(self) -> dict[str, Any] | None:
        """What quantization cost, as it was measured at compile time (`quality.json`); None where it was not.

        Raises ArtifactError where the file is no JSON object.
        """
        return self._json(QUALITY)

    @property
    def gguf_rows(self) -> gguf_rows.GGUFRows | None:
        """Where its modules stand in the GGUF file that it was compiled from; None where it was none. Raises
        ArtifactError where the file is damaged.
        """
        return self._read(gguf_rows.FILE, gguf_rows.GGUFRows.from_json)

    @property
    def stored_modules(self) -> stored_modules.StoredModules | None:
        """What its checkpoint calls its modules, where it has other names than the model; as `gguf_rows`."""
        return self._read(stored_modules.FILE, stored_modules.StoredModules.from_json)

    def _read(self, rel: str, parse: Callable[[Any], _T]) -> _T | None:
        found = self._json(rel)
        try:
            return None if found is None else parse(found)
        except ValueError as error:
            raise ArtifactError(f"{rel} of {self.root.name} is damaged: {error}", remedy=_AGAIN) from None

    def _json(self, rel: str) -> dict[str, Any] | None:
        """The object in a file; None where the artifact has no such file."""
        if rel not in self.manifest["files"]:
            return None
        try:
            found = json.loads(self.read_text(rel))
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise ArtifactError(f"{self.root / rel} is damaged: no JSON object", remedy=_AGAIN)
        return found

    def path(self, rel: str) -> Path:
        """The file `rel` of the artifact. Raises ArtifactError where the manifest does not list it."""
        if rel not in self.manifest["files"]:
            raise ArtifactError(f"{self.root} lists no file {rel!r}", remedy=_AGAIN)
        return self.root / rel

    def read_text(self, rel: str) -> str:
        """A text file of the artifact. Raises ArtifactError where it is not UTF-8."""
        try:
            return self.path(rel).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ArtifactError(f"{self.root / rel} is not UTF-8 text", remedy=_AGAIN) from None

    def weights(self, target: str) -> dict[str, np.ndarray]:
        """The weights of a target: name → read-only view of the mapped file, 64-byte aligned.

        Empty where it has none.
        """
        rel = self.target(target).get("weights")
        if rel is None:
            return {}
        if rel not in self._maps:
            self._maps[rel] = map_weight_file(self.path(rel))
        return self._maps[rel]


def _no_artifact(root: Path) -> ArtifactError:
    """Why `root` is not an artifact, as precisely as a look at it allows."""
    if root.name.endswith(".partial"):
        return ArtifactError(
            f"{root} is unfinished: its compilation was interrupted", remedy="run the compilation again"
        )
    if not os.path.lexists(root):
        if root.with_name(root.name + ".partial").exists():
            return ArtifactError(
                f"{root} does not exist: its compilation did not finish", remedy="run it again"
            )
        return ArtifactError(f"{root} does not exist", remedy="check the path, or compile the model first")
    if (root / "config.json").is_file():
        what = "is a model folder, not an artifact"
    elif root.is_file():
        what = "is a file, not an artifact folder"
    else:
        return ArtifactError(
            f"{root} is not an artifact: it has no {MANIFEST}", remedy="give the NAME.llmc folder"
        )
    return ArtifactError(
        f"{root} {what}", remedy=f"compile it first: llmc compile {root} -o {root.stem}.llmc"
    )


def _read_manifest(root: Path) -> dict[str, Any]:
    path = root / MANIFEST
    if not path.is_file() or root.name.endswith(".partial"):
        raise _no_artifact(root)
    if path.stat().st_size > _MAX_MANIFEST:
        raise ArtifactError(f"{path} has {path.stat().st_size} bytes, too many for a manifest", remedy=_AGAIN)
    try:
        manifest = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged: not JSON ({type(error).__name__})", remedy=_AGAIN) from None
    if not isinstance(manifest, dict):
        raise ArtifactError(f"{path} is not a JSON object", remedy=_AGAIN)
    return manifest


def check_manifest(manifest: Mapping[str, Any], path: Path) -> None:
    """Raise ArtifactError where the manifest is of a newer schema, incomplete, or leaves its folder."""
    schema = manifest.get("schema")
    if type(schema) is not int or schema < 1:
        raise ArtifactError(f"{path} has no schema number", remedy="give the folder that llmc compile wrote")
    if schema > SCHEMA:
        needs = str(manifest.get("requires_llmc", "a newer version"))[:40]
        raise ArtifactError(
            f"{path} has schema {schema}, this llmc reads up to {SCHEMA}; needs llmc >= {needs}",
            remedy="upgrade llmc, or compile the model again with this version",
        )
    expected: dict[str, type] = {"kind": str, "model": dict, "targets": dict, "files": dict}
    for key, kind in expected.items():
        if not isinstance(manifest.get(key), kind):
            raise ArtifactError(
                f"{path}: entry {key!r} is missing or not of type {kind.__name__}", remedy=_AGAIN
            )
    if manifest["kind"] not in KINDS:
        raise ArtifactError(f"{path}: kind {manifest['kind']!r} is none of {', '.join(KINDS)}", remedy=_AGAIN)
    _check_file_list(manifest["files"], path)
    for rel in _references(manifest, path):
        if rel not in manifest["files"]:
            raise ArtifactError(f"{path} refers to {rel!r}, which its file list lacks", remedy=_AGAIN)


def _check_file_list(files: Mapping[str, Any], path: Path) -> None:
    for rel, entry in files.items():
        if not safe_relative(rel):
            raise ArtifactError(
                f"{path}: file name {rel!r} leaves the artifact", remedy="do not use this artifact"
            )
        digest = entry.get("sha256") if isinstance(entry, dict) else None
        size = entry.get("size") if isinstance(entry, dict) else None
        if not isinstance(digest, str) or len(digest) != 64 or type(size) is not int or size < 0:
            raise ArtifactError(f"{path}: file {rel!r} has no valid sha256 and size", remedy=_AGAIN)


def _references(manifest: Mapping[str, Any], path: Path) -> list[str]:
    """Every file that an entry of the manifest names, apart from the file list."""
    found: list[Any] = []
    for name, target in manifest["targets"].items():
        if not isinstance(target, dict) or not isinstance(target.get("kernels", []), list):
            raise ArtifactError(f"{path}: target {name!r} is malformed", remedy=_AGAIN)
        found += [target.get("weights"), target.get("model")]
        found += [
            kernel.get("path") if isinstance(kernel, dict) else kernel for kernel in target.get("kernels", [])
        ]
    tokenizer = manifest.get("tokenizer")
    if isinstance(tokenizer, dict):
        found += [tokenizer.get("path"), tokenizer.get("chat_template")]
    named = [rel for rel in found if rel is not None]
    for rel in named:
        if not isinstance(rel, str):
            raise ArtifactError(f"{path}: {rel!r} stands where a file name belongs", remedy=_AGAIN)
    return named


def _check_files(root: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    inside = root.resolve()
    for rel, entry in files.items():
        path = root / rel
        if not path.resolve().is_relative_to(inside):
            raise ArtifactError(
                f"{path} is a link out of the artifact", remedy="copy the artifact with its files"
            )
        try:
            status = path.stat()
        except OSError:
            raise ArtifactError(f"{path} is missing", remedy=_AGAIN) from None
        if not stat.S_ISREG(status.st_mode):
            raise ArtifactError(f"{path} is not a file", remedy=_AGAIN)
        if status.st_size != entry["size"]:
            raise ArtifactError(
                f"{path} has {status.st_size} bytes instead of {entry['size']}: it was cut short or changed",
                remedy=_AGAIN,
            )


def _check_hashes(root: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    largest_first = sorted(files, key=lambda rel: -files[rel]["size"])
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # hashlib lets go of the GIL
        for rel, digest in zip(
            largest_first, pool.map(lambda r: _sha256(root / r), largest_first), strict=True
        ):
            if digest != files[rel]["sha256"]:
                raise ArtifactError(
                    f"{root / rel} is damaged: its sha256 is not the manifest's", remedy=_AGAIN
                )
