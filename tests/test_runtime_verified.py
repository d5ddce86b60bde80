"""Hashes are computed once for a state of an artifact's files, and again for any other."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from llmc.codegen.artifact import Artifact
from llmc.ir.errors import ArtifactError
from llmc.runtime import verified
from llmc.runtime.loader import load

from .test_runtime_llm import write_artifact


@pytest.fixture
def hashings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Artifacts that were hashed, by name; records of their own, and no wait until files are old enough."""
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(verified, "_SETTLED_SECONDS", -1.0)
    found: list[str] = []
    whole = Artifact.verify

    def counted(artifact: Artifact) -> None:
        found.append(artifact.root.name)
        whole(artifact)

    monkeypatch.setattr(Artifact, "verify", counted)
    return found


def test_a_second_load_hashes_nothing(tmp_path: Path, hashings: list[str]) -> None:
    path = write_artifact(tmp_path / "m.llmc")
    for _ in range(3):
        load(path).close()
    assert hashings == ["m.llmc"]
    load(path, verify="full").close()
    assert hashings == ["m.llmc"] * 2
    load(path, verify="size").close()
    assert len(hashings) == 2
    shutil.copytree(path, tmp_path / "copy.llmc")
    load(tmp_path / "copy.llmc").close()
    assert hashings[2:] == ["copy.llmc"]


def _same_size_and_time(file: Path) -> None:
    """What hides a change best: as many bytes, and the old time of modification."""
    before = file.stat()
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def _replaced(file: Path) -> None:
    other = file.with_name("other")
    shutil.copy2(file, other)
    _same_size_and_time(other)
    os.replace(other, file)


@pytest.mark.parametrize("change", [_same_size_and_time, _replaced])
def test_a_changed_file_is_found(tmp_path: Path, hashings: list[str], change: Callable[[Path], None]) -> None:
    path = write_artifact(tmp_path / "m.llmc")
    load(path).close()
    change(path / "chat_template.jinja")
    for _ in range(2):  # a state that was found wrong is not remembered as right
        with pytest.raises(ArtifactError, match=r"chat_template\.jinja is damaged"):
            load(path)
    assert len(hashings) == 3


def test_another_manifest_is_another_artifact(tmp_path: Path, hashings: list[str]) -> None:
    path = write_artifact(tmp_path / "m.llmc")
    load(path).close()
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["tokenizer.json"]["sha256"] = "0" * 64
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is damaged"):
        load(path)


def test_files_that_just_changed_are_hashed_again(
    tmp_path: Path, hashings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verified, "_SETTLED_SECONDS", 3600.0)
    path = write_artifact(tmp_path / "m.llmc")
    for _ in range(2):
        load(path).close()
    assert len(hashings) == 2
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("broken", ["{", "[]", '{"manifest": 1}', "\x00"])
def test_a_broken_record_costs_the_hashing_only(tmp_path: Path, hashings: list[str], broken: str) -> None:
    path = write_artifact(tmp_path / "m.llmc")
    load(path).close()
    (record,) = (tmp_path / "cache" / "verified").iterdir()
    record.write_text(broken)
    for _ in range(2):
        load(path).close()
    assert len(hashings) == 2


def test_no_place_for_records(tmp_path: Path, hashings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "file"))
    path = write_artifact(tmp_path / "m.llmc")
    for _ in range(2):
        load(path).close()
    assert len(hashings) == 2
