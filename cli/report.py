"""The report of `llmc inspect --html`: one page that asks for nothing outside of it.

Everything that comes from a file is escaped; no script, no font, no request (the page's own policy forbids
them). The picture of the layers' errors has its numbers in a table beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from ..ir.errors import LlmcError
from ..ir.types import TensorType
from .output import size
from .quality import verdict_facts, worst_layers

_WEIGHT = re.compile(r'^weight @"((?:[^"\\]|\\.)*)" : (\S.*)$')
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 64rem; padding: 0 1rem;
       color: #1b1b1b; background: #fff; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } caption { text-align: left; color: #555; }
th, td { padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
tr + tr > * { border-top: 1px solid #e3e3e3; }
.beside { display: flex; flex-wrap: wrap; gap: 2rem; align-items: flex-start; }
svg { max-width: 100%; height: auto; } svg text { font: 13px system-ui, sans-serif; fill: currentColor; }
svg rect { fill: #2f6f9f; }
@media (prefers-color-scheme: dark) {
  body { color: #e8e8e8; background: #161616; } caption { color: #aaa; }
  tr + tr > * { border-color: #3a3a3a; } svg rect { fill: #6fb1e0; }
}
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

Row = Sequence[Any]


def quantized_layers(ir_text: str) -> list[dict[str, Any]]:
    """What the graph's text says of quantized matrices, by layer in order: `name`, `matrices`, `elements`,
    `bits` (mean over elements), and `grids`, "4 bits, groups of 32, zero points" → number of matrices.
    """
    layers: dict[str, dict[str, Any]] = {}
    for line in ir_text.splitlines():
        found = _WEIGHT.match(line)
        if found is None:
            continue
        try:
            kind = TensorType.parse(found.group(2))
        except (LlmcError, ValueError):
            continue  # a form of a newer llmc: what can be read is shown
        if kind.quant is None or not all(isinstance(d, int) for d in kind.shape):
            continue
        elements = 1
        for extent in kind.shape:
            elements *= int(str(extent))
        layer = layers.setdefault(
            _layer(found.group(1)), {"matrices": 0, "elements": 0, "bits": 0.0, "grids": {}}
        )
        layer["matrices"] += 1
        layer["elements"] += elements
        layer["bits"] += elements * kind.quant.bits
        grid = _grid(kind)
        layer["grids"][grid] = layer["grids"].get(grid, 0) + 1
    return [
        {"name": name, **layer, "bits": layer["bits"] / max(1, layer["elements"])}
        for name, layer in layers.items()
    ]


def _layer(weight: str) -> str:
    """The repeated module that a weight belongs to, or its own name."""
    found = re.match(r"(.*?\.\d+)\.", weight)
    return found.group(1) if found else weight.removesuffix(".q")


def _grid(kind: TensorType) -> str:
    quant = kind.quant
    assert quant is not None
    values = quant.codebook or ("symmetric" if quant.symmetric else "zero points")
    return f"{quant.bits} bits, groups of {quant.group_size}, {values}"


# The page ------------------------------------------------------------------------------------------------


def page(report: Mapping[str, Any], quality: Mapping[str, Any] | None, layers: Sequence[Row]) -> str:
    """The page of a report of `llmc inspect`; `layers` as `quantized_layers` gives them."""
    model = report.get("model") or {}
    name = str(model.get("name") or report.get("path"))
    sections = [_facts_section(report), _quality_section(quality), _errors_section(quality)]
    sections += [_layers_section(layers), _types_section(report), _files_section(report)]
    body = "\n".join(section for section in sections if section)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)} – llmc</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{escape(name)}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def _pairs(rows: Iterable[tuple[str, Any]]) -> str:
    """A table of names and values; rows without a value are left out."""
    lines = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(str(value))}</td></tr>\n'
        for name, value in rows
        if value not in (None, "")
    )
    return f"<table>\n{lines}</table>"


def _table(caption: str, header: Sequence[str], rows: Iterable[Row], numbers: Iterable[int] = ()) -> str:
    """A table; `numbers` are the columns that hold numbers, which stand to the right."""
    right = set(numbers)

    def cells(row: Row, tag: str, scope: str) -> str:
        kinds = [scope + (' class="number"' if i in right else "") for i in range(len(row))]
        return "".join(
            f"<{tag}{kind}>{escape(str(cell))}</{tag}>" for kind, cell in zip(kinds, row, strict=True)
        )

    head = "<thead><tr>" + cells(header, "th", ' scope="col"') + "</tr></thead>"
    lines = "".join(f"<tr>{cells(row, 'td', '')}</tr>\n" for row in rows)
    title = f"<caption>{escape(caption)}</caption>\n" if caption else ""
    return f"<table>\n{title}{head}\n<tbody>\n{lines}</tbody>\n</table>"


def _facts_section(report: Mapping[str, Any]) -> str:
    model, quantization = report.get("model") or {}, report.get("quantization") or {}
    kind = report["kind"] + (f" ({report['artifact_kind']})" if "artifact_kind" in report else "")
    cache = report.get("kv_bytes_per_token")
    return _section(
        "Facts",
        _pairs(
            [
                ("kind", kind),
                ("architecture", model.get("architecture")),
                ("layers", model.get("num_layers")),
                ("hidden size", model.get("hidden_size")),
                ("vocabulary", model.get("vocab_size")),
                ("context", model.get("context_length")),
                ("parameters", report.get("parameters")),
                ("size", size(report["bytes"])),
                ("quantization", quantization.get("scheme")),
                ("bits a weight", report.get("bits_per_weight") or quantization.get("bits_per_weight")),
                ("cache a token", f"{size(cache)}, {report.get('kv_dtype') or 'float32'}" if cache else None),
                ("targets", ", ".join(report.get("targets") or {})),
                ("made by", " ".join(map(str, report.get("command") or []))),
            ]
        ),
    )


def _quality_section(quality: Mapping[str, Any] | None) -> str:
    if quality is None:
        return _section("Quality", "<p>No quality was measured when this was made.</p>")
    text = quality.get("text")
    parts = [_pairs(verdict_facts(quality))]
    if isinstance(text, Mapping):
        parts.append(
            f"<p>Measured on {escape(str(text.get('sequences')))} sequences of "
            f"{escape(str(text.get('length')))} tokens of held-out text, {escape(str(text.get('name')))} "
            f"(sha256 {escape(str(text.get('sha256'))[:16])}).</p>"
        )
    parts += [f"<p>{escape(str(quality[key]))}</p>" for key in ("reason", "how") if quality.get(key)]
    return _section("Quality", *parts)


def _errors_section(quality: Mapping[str, Any] | None) -> str:
    errors = worst_layers(quality) if quality is not None else []
    if not errors:
        return ""
    rows = [(name, f"{error:.3%}") for name, error in errors]
    table = _table("Relative error of the output, worst first", ("layer", "error"), rows, (1,))
    return _section("Errors of the layers", f'<div class="beside">\n{_bars(errors)}\n{table}\n</div>')


def _bars(errors: Sequence[tuple[str, float]]) -> str:
    """Horizontal bars, the longest first, as inline SVG."""
    width, left, line = 560, 190, 20
    height = line * len(errors) + 6
    largest = max(error for _, error in errors) or 1.0
    worst = f"{errors[0][0]} has the largest, {errors[0][1]:.2%}"
    parts = [
        f'<svg role="img" aria-labelledby="bars-title bars-desc" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}">',
        '<title id="bars-title">Relative output error of each layer</title>',
        f'<desc id="bars-desc">{escape(f"{len(errors)} bars, worst first: {worst}.")}</desc>',
    ]
    for number, (name, error) in enumerate(errors):
        top = line * number + 3
        length = max(1.0, (width - left - 70) * error / largest)
        parts += [
            f'<text x="{left - 8}" y="{top + 13}" text-anchor="end">{escape(_short(name))}</text>',
            f'<rect x="{left}" y="{top + 2}" width="{length:.1f}" height="{line - 6}"></rect>',
            f'<text x="{left + length + 6:.1f}" y="{top + 13}">{error:.2%}</text>',
        ]
    return "\n".join([*parts, "</svg>"])


def _short(name: str, most: int = 26) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _layers_section(layers: Sequence[Any]) -> str:
    if not layers:
        return ""
    rows = [
        (
            layer["name"],
            layer["matrices"],
            f"{layer['bits']:.2f}",
            "; ".join(f"{count} × {grid}" for grid, count in layer["grids"].items()),
        )
        for layer in layers
    ]
    caption = "Codes of quantized matrices, without scales; everything else is in floating point"
    return _section(
        "Quantization by layer", _table(caption, ("layer", "matrices", "bits", "grids"), rows, (1, 2))
    )


def _types_section(report: Mapping[str, Any]) -> str:
    types = report.get("types")
    if not types:
        return ""
    return _section("Tensor types", _table("", ("type", "tensors"), list(types.items()), (1,)))


def _files_section(report: Mapping[str, Any]) -> str:
    files = report.get("files")
    if not files:
        return ""
    rows = [(name, size(count)) for name, count in files.items()]
    return _section("Files", _table("", ("file", "size"), rows, (1,)))
