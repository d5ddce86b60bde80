"""The command line called within a test's process."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llmc.cli.main import main

Capture = pytest.CaptureFixture[str]


def run(capsys: Capture, *words: object) -> tuple[int, str, str]:
    """The exit code of `llmc` with these words, and what it wrote on stdout and stderr."""
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys: Capture, *words: object, code: int = 0) -> dict[str, Any]:
    """The object that it prints with --json; fails where its exit code is another than `code`."""
    got, out, err = run(capsys, *words, "--json")
    assert got == code, err
    return json.loads(out)
