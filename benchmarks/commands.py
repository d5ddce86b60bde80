"""Runs llmc commands as a person would, and takes their JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRATCH = Path(".bench")


def llmc(*words: str | Path) -> dict[str, Any]:
    """The JSON object that a command prints; ends this program where the command fails."""
    command = [sys.executable, "-m", "llmc.cli.main", *map(str, words), "--json"]
    print(f"$ llmc {' '.join(map(str, words))}", file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def report(record: dict[str, Any], output: Path | None) -> None:
    """Prints a record, and keeps it in `output` where one is named (benchmarks/results holds ours)."""
    text = json.dumps(record, indent=1)
    print(text, flush=True)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n", encoding="utf-8")


def write_between(text: str, path: Path, begin: str, end: str) -> None:
    """Write text between the lines `begin` and `end` of a file, or alone to a new one; ends this program
    where a file has no such lines.
    """
    before, after = "", ""
    if path.is_file():
        page = path.read_text(encoding="utf-8")
        if begin not in page or end not in page:
            sys.exit(f"error: {path} has no lines {begin} and {end}; add them where the tables belong")
        before, after = page[: page.index(begin) + len(begin)] + "\n", page[page.index(end) :]
    path.write_text(before + text + after, encoding="utf-8")


def shared_data() -> Path:
    """The folder of public texts and traces; ends this program where there is none."""
    root = Path(__file__).resolve().parent.parent
    folder = Path(os.environ.get("LLMC_SHARED_DATA") or root.parent / "shared" / "data")
    if not folder.is_dir():
        sys.exit(f"error: no shared data at {folder}; set LLMC_SHARED_DATA")
    return folder


def labels(*artifacts: Path) -> dict[str, Any]:
    """What numbers are of: model, quantization, KV cache and names of the artifacts, and the machine with
    threads and versions. Of what differs between the artifacts, all there is.
    """
    manifests = [json.loads((path / "manifest.json").read_bytes()) for path in artifacts]
    quants = [one.get("quantization") or {} for one in manifests]
    facts = {
        "model": [one["model"]["name"] for one in manifests],
        "source": [one.get("source", "") for one in quants],
        "quant": [one.get("scheme", "none") for one in quants],
        "kv_dtype": [one.get("kv_dtype", "") for one in manifests],
        "artifact": [path.resolve().name for path in artifacts],
    }
    said = {name: list(dict.fromkeys(values)) for name, values in facts.items()}
    return {
        **{name: values[0] if len(values) == 1 else values for name, values in said.items()},
        "machine": machine(),
    }


def machine() -> str:
    """Processor, threads and versions, for the line above a table of numbers."""
    report = llmc("doctor")
    names = {"apache-tvm", "onnxruntime", "torch", "transformers"}
    versions = ", ".join(f"{p['name']} {p['installed']}" for p in report["packages"] if p["name"] in names)
    cpu = report["cpu"]
    return f"{cpu['model']}, {cpu['threads_used']} threads, {cpu['isa']}; llmc {report['llmc']}, {versions}"
