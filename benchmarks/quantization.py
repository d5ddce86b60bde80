"""What quantization loses: our schemes and the peers', on the same models, tokens and windows.

    python -m benchmarks.quantization --models smollm2,qwen --windows 40 --cache DIR

Every tool quantizes the linear layers of the same float32 model (a GGUF file, dequantized), calibrated on the
same token ids; embeddings, head and everything else stay float. Each result is scored in float32 on the
windows of WikiText-2's test part: perplexity, KL(float || quantized) in nats, and agreement of the most
likely token. `±` is the standard error over windows, of paired differences for perplexity.

A peer runs in an environment of its own (`--peer-python NAME=PATH`, or a venv made in the cache from
requirements-quantization.txt) and hands back dequantized weights. Schemes of ours are those of
`llmc compile --quant`. A peer's scheme is TOOL:METHOD:

    llm-compressor:gptq-int4-g32[-sym]   llm-compressor:awq-int4-g32[-sym]   llm-compressor:rtn-int4-g32[-sym]
    autoround:int4-g32[-sym]             gptqmodel:gptq-int4-g32[-sym]       hqq:int4-g64
    llama.cpp:iq4_xs                     (GGML types; `-plain` behind: no importance matrix)

Whatever was measured is kept in the cache, one JSON file for each row, and not measured again: a run that was
stopped goes on, and one with more --windows adds those that are missing.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from llmc.ir.errors import LlmcError

from .commands import SCRATCH, machine
from .environments import QUANTIZATION
from .peers_quantization import ours, report
from .peers_quantization.models import (
    MODELS,
    CalibrationText,
    Shared,
    calibration,
    parameters,
    scored_windows,
    shared_model,
)
from .peers_quantization.scoring import Reference, WindowScore, hidden_states, load, logits_of, relative_error

SCHEMES = {
    "smollm2": (
        "int4-g32",
        "gptq-int4-g32",
        "awq-int4-g32",
        "best-int4-g32",
        "int4-g64-sym",
        "best-int4-g64-sym",
    ),
    "qwen": ("int4-g128-sym", "gptq-int4-g128-sym", "best-int4-g128-sym"),
    "gemma": ("int4-g128-sym", "gptq-int4-g128-sym", "best-int4-g128-sym"),
}
PEERS = {
    "smollm2": (
        "llm-compressor:gptq-int4-g32",
        "llm-compressor:awq-int4-g32",
        "gptqmodel:gptq-int4-g32",
        "autoround:int4-g32",
        "hqq:int4-g64",
        "llama.cpp:iq4_nl",
        "llama.cpp:q4_0",
        "llm-compressor:gptq-int4-g64-sym",
        "autoround:int4-g64-sym",
    ),
    "qwen": ("llm-compressor:gptq-int4-g128-sym", "autoround:int4-g128-sym", "llama.cpp:iq4_nl"),
    "gemma": ("llm-compressor:gptq-int4-g128-sym", "autoround:int4-g128-sym", "llama.cpp:iq4_nl"),
}


class Bench:
    """One run: the folders and options that every row shares."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.cache: Path = options.cache.resolve()
        self.pythons = dict(QUANTIZATION.named(text) for text in options.peer_python)
        self.machine = machine()

    def cached(self, name: str) -> list[dict[str, Any]]:
        """A model's rows that were measured on as many windows as are asked for, or as any of them was."""
        files = sorted((self.cache / name / "rows").glob("*.json"))
        found = [json.loads(path.read_text(encoding="utf-8")) for path in files]
        count = min(self.options.windows, max((len(r["windows"]) for r in found), default=0))
        return [{**r, "windows": r["windows"][:count]} for r in found if len(r["windows"]) >= count]

    def rows(self, name: str) -> list[dict[str, Any]]:
        """All rows of a model, measured or taken from the cache; one that fails is named and left out."""
        model = shared_model(name, self.cache)
        windows = scored_windows(model, self.options.windows)
        reference = Reference(model, self.cache / name / "reference")
        schemes = _chosen(self.options.schemes, SCHEMES[name])
        peers = _chosen(self.options.peers, PEERS[name])
        rows: list[dict[str, Any]] = []
        for text in self.options.calib.split(","):
            calib = calibration(model, text, self.options.calib_sequences, self.cache)
            for tool, scheme in [("llmc", s) for s in schemes] + [_peer(p) for p in peers]:
                row = Row(self, model, tool, scheme, calib)
                try:
                    row.measure(windows, reference)
                except (subprocess.CalledProcessError, ValueError, RuntimeError, LlmcError) as error:
                    print(f"error: {row.path.stem}: {error}", file=sys.stderr, flush=True)
                    continue
                rows.append(row.record)
                print(report.table([row.record]), file=sys.stderr, flush=True)
        return rows


class Row:
    """A model quantized by one tool and scheme: `record` is what its JSON file in the cache holds."""

    def __init__(self, bench: Bench, model: Shared, tool: str, scheme: str, calib: CalibrationText) -> None:
        self.bench, self.model, self.calib = bench, model, calib
        self.tool, self.scheme = tool, scheme
        name = f"{tool}--{scheme}--{calib.path.stem.removeprefix('calibration-')}"
        name += f"--{bench.options.autoround_iters}" if tool == "autoround" else ""
        self.path = bench.cache / model.name / "rows" / f"{name}.json"
        self.folder = bench.cache / model.name / "weights" / name
        self.record: dict[str, Any] = {
            "model": model.gguf.name,
            "tool": tool,
            "scheme": scheme,
            "calibration": calib.name,
            "calibration_tokens": int(calib.ids.size),
            "machine": bench.machine,
            "windows": [],
        }
        if self.path.is_file() and not (tool == "llmc" and bench.options.again):
            self.record = json.loads(self.path.read_text(encoding="utf-8"))

    def measure(self, windows: np.ndarray[Any, Any], reference: Reference) -> None:
        """Quantizes where that was not done, and scores the windows that are missing."""
        import torch

        scores = [WindowScore(**one) for one in self.record["windows"]]
        if len(scores) >= len(windows):
            self.record = {**self.record, "windows": self.record["windows"][: len(windows)]}
            return
        forward = self._ours() if self.tool == "llmc" else self._peers()
        for number in range(len(scores), len(windows)):
            ids = windows[number]
            scores.append(reference.score(number, ids, forward(torch.from_numpy(ids)[None])))
            self.record["windows"] = [one.record() for one in scores]
            self._write()

    def _ours(self) -> Any:
        found, stats = ours.quantize(self.model, self.scheme, self.calib)
        self._keep(stats, found.weights)
        return logits_of(found.graph)

    def _peers(self) -> Any:
        from safetensors.torch import load_file

        weights = self.folder / "weights.safetensors"
        if not weights.is_file():
            self._run_peer()
        state = load_file(weights)
        stats = json.loads((self.folder / "stats.json").read_text(encoding="utf-8"))
        self._keep(stats, state)
        return hidden_states(load(self.model, state))

    def _run_peer(self) -> None:
        order = {
            "model": str(self.model.folder),
            "calibration": str(self.calib.path),
            "output": str(self.folder),
            "threads": self.bench.options.threads,
            "options": {"iters": self.bench.options.autoround_iters},
            **method(self.scheme),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "order.json"
        path.write_text(json.dumps(order, indent=1) + "\n", encoding="utf-8")
        python = QUANTIZATION.python_of(self.tool, self.bench.pythons, self.bench.cache)
        print(f"$ {python} {QUANTIZATION.program(self.tool).name} {path}", file=sys.stderr, flush=True)
        with (self.folder / "log.txt").open("w", encoding="utf-8") as log:
            command = [str(python), str(QUANTIZATION.program(self.tool)), str(path)]
            # In its folder: some leave files of their own where they stand.
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=self.folder, check=False)
        if done.returncode:
            last = (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip()[-400:]
            raise RuntimeError(f"{self.tool} ended with {done.returncode}: …{last}")

    def _keep(self, stats: dict[str, Any], weights: dict[str, Any]) -> None:
        """What was measured while quantizing, and how far the linear weights moved."""
        exact = {n: w for n, w in parameters(self.model, weights).items() if w.ndim == 2}
        self.record |= stats
        if exact:
            error, same, zero = relative_error(exact, weights)
            self.record |= {"weight_error": error, "weights_unchanged": same, "weights_zero": zero}
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)


def method(scheme: str) -> dict[str, Any]:
    """A peer's scheme as fields of `protocol.Order`: "gptq-int4-g32-sym", "int4-g64", "iq4_nl"."""
    found = re.fullmatch(r"(?:(gptq|awq|rtn)-)?int(\d)-g(\d+)(-sym)?", scheme)
    if found is None:
        return {"method": scheme, "bits": 0, "group": 0, "symmetric": False}
    return {
        "method": found[1] or "rtn",
        "bits": int(found[2]),
        "group": int(found[3]),
        "symmetric": found[4] is not None,
    }


def _chosen(text: str | None, default: tuple[str, ...]) -> tuple[str, ...]:
    return default if text is None else tuple(part for part in text.split(",") if part)


def _peer(text: str) -> tuple[str, str]:
    tool, _, scheme = text.partition(":")
    if tool not in QUANTIZATION.programs or not scheme:
        sys.exit(f"error: --peers {text}: use TOOL:METHOD with a tool of {', '.join(QUANTIZATION.programs)}")
    return tool, scheme


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", default="smollm2", help=f"of {', '.join(MODELS)}, with commas  [default: %(default)s]")
    add("--schemes", help='ours, with commas; "" for none  [default: those of the model]')
    add("--peers", help='TOOL:METHOD, with commas; "" for none  [default: those of the model]')
    add("--windows", type=int, default=40, help="of 1,024 tokens  [default: %(default)s]")
    add("--calib", default="wikitext", help="wikitext, c4 or text files, with commas  [default: %(default)s]")
    add("--calib-sequences", type=int, default=32, help="of 512 tokens  [default: %(default)s]")
    add("--autoround-iters", type=int, default=200, help="steps a block  [default: its own, %(default)s]")
    add("--threads", type=int, default=2, help="of every tool  [default: %(default)s]")
    add("--cache", type=Path, default=SCRATCH / "quantization", help="folder  [default: %(default)s]")
    QUANTIZATION.add_option(parser)
    add("--cached", action="store_true", help="measure nothing: report every row that the cache has")
    add("--merge", type=Path, help="an earlier -o: report its rows too, where no row of ours is the same")
    add("--again", action="store_true", help="measure our rows anew")
    add("--markdown", type=Path, help="write the table there; between its marks where there are some")
    add("--plot", type=Path, help="write the plot there (.svg or .png; needs matplotlib)")
    add("-o", "--output", type=Path, help="write all rows as JSON")
    options = parser.parse_args()
    for name in options.models.split(","):
        if name not in MODELS:
            parser.error(f"--models {name}: use {', '.join(MODELS)}")
    return options


def main() -> None:
    options = _arguments()
    import torch

    torch.set_num_threads(options.threads)
    bench = Bench(options)
    measured = bench.cached if options.cached else bench.rows
    rows = [row for name in options.models.split(",") for row in measured(name)]
    if options.merge:
        rows = report.merged(rows, json.loads(options.merge.read_text(encoding="utf-8"))["rows"])
    table = report.tables(rows)
    print(table)
    if options.markdown:
        report.write(table, options.markdown)
    if options.plot and rows:
        report.plot(rows, options.plot)
    if options.output:
        text = json.dumps({"machine": bench.machine, "rows": [report.summary(r) for r in rows]}, indent=1)
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
