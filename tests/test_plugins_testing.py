"""What authors of targets try their executors on is what `llmc compile` gives them later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from llmc.codegen.artifact import Artifact
from llmc.codegen.driver import compile_model
from llmc.codegen.null import Null
from llmc.plugins.testing import compile_tiny, tiny_model

pytest.importorskip("torch")


def test_a_tiny_artifact_says_what_a_compiled_one_says(tiny_folder: Any, tmp_path: Path) -> None:
    compiled = compile_model(tiny_folder("llama"), tmp_path / "a.llmc", targets=["null"]).artifact
    tiny = compile_tiny(Null(), tiny_model(layers=2), tmp_path / "b.llmc")
    assert Artifact.open(tmp_path / "b.llmc").manifest == tiny.manifest
    ours, theirs = tiny.manifest, compiled.manifest
    assert set(ours) == set(theirs)
    assert set(ours["model"]) == set(theirs["model"])
    assert set(ours["quantization"]) == set(theirs["quantization"])
    for key in ("inputs", "outputs"):
        assert ours[key][0].keys() == theirs[key][0].keys()
    shapes = [{one["name"]: one["shape"] for one in m["inputs"]} for m in (ours, theirs)]
    kinds = [{name: list(map(type, dims)) for name, dims in of.items()} for of in shapes]
    assert kinds[0] == kinds[1]
    assert set(theirs["files"]) - set(ours["files"]) <= {"tokenizer.json", "chat_template.jinja"}
    assert len(compiled.read_text("ir.txt")) > 0 < len(tiny.read_text("ir.txt"))
