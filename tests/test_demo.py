"""What `make demo` runs, from the published wheel to an answer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT
from .models import real_model


@pytest.mark.slow
@pytest.mark.network
def test_the_demo_answers_its_question(tmp_path: Path) -> None:
    real_model("smollm2")
    command = [sys.executable, "-m", "examples.demo", "What", "is", "the", "capital", "of", "France?"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "tok/s" in done.stderr
    assert (tmp_path / ".demo" / "smollm2-int4.llmc" / "manifest.json").is_file()
