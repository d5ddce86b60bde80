"""What the benchmarks write beside their numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import commands


def artifact(folder: Path, name: str, **manifest: object) -> Path:
    path = folder / name
    path.mkdir()
    (path / "manifest.json").write_text(json.dumps({"model": {"name": "Tiny"}, **manifest}))
    return path


def test_labels_name_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "machine", lambda: "a processor, 2 threads; llmc 1")
    kept = {"quantization": {"scheme": "keep", "source": "Q4_1"}}
    one = artifact(tmp_path, "one.llmc", kv_dtype="bfloat16", **kept)
    other = artifact(tmp_path, "other.llmc", kv_dtype="int8", **kept)
    bare = artifact(tmp_path, "bare.llmc")
    found = commands.labels(one, other)
    assert found == {
        "model": "Tiny",
        "source": "Q4_1",
        "quant": "keep",
        "kv_dtype": ["bfloat16", "int8"],
        "artifact": ["one.llmc", "other.llmc"],
        "machine": "a processor, 2 threads; llmc 1",
    }
    assert (commands.labels(bare)["quant"], commands.labels(bare)["artifact"]) == ("none", "bare.llmc")
