"""`llmc inspect`: facts of an artifact, a GGUF file or a model folder, read from headers alone."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..ir.errors import InputError
from .output import emit, facts, json_option, rope_text, size, table, tool_calls_text
from .quality import verdict_facts

if TYPE_CHECKING:
    from ..codegen.artifact import Artifact


@click.command("inspect", short_help="Show the facts of an artifact, GGUF file or model folder.")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="List every tensor too.")
@click.option(
    "--no-verify", is_flag=True, help="Check only the sizes of an artifact's files, not their hashes."
)
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write a report with pictures too, one page that needs nothing else.",
)
@json_option
def command(path: Path, tensors: bool, no_verify: bool, html: Path | None, as_json: bool) -> None:
    """Show the facts of PATH: an artifact (NAME.llmc), a GGUF file, or a Hugging Face model folder.

    An artifact's files are compared with the hashes in its manifest; a damaged one is an error (exit 2).
    """
    if not path.exists():
        raise InputError(f"{path} does not exist", remedy="give an artifact, a GGUF file or a model folder")
    if path.is_file():
        report = _gguf(path)
    elif (path / "config.json").is_file() and not (path / "manifest.json").is_file():
        report = _folder(path)
    else:
        report = _artifact(path, verify="size" if no_verify else "full")
    rows = report.pop("tensors")
    if html is not None:
        _write_html(html, report)
    if tensors:
        report["tensors"] = rows
    emit(report, as_json=as_json, text=_text(report, rows if tensors else []))


def _write_html(file: Path, report: dict[str, Any]) -> None:
    """Write the page; it takes its name when it is complete. Raises OSError where it cannot be written."""
    from .report import page

    partial = file.with_name(file.name + ".partial")
    try:
        partial.write_text(
            page(report, report.get("quality"), report.get("layers") or []), encoding="utf-8", newline="\n"
        )
        partial.replace(file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _layers(artifact: Artifact) -> list[dict[str, Any]]:
    from .report import quantized_layers

    return quantized_layers(artifact.read_text("ir.txt")) if "ir.txt" in artifact.manifest["files"] else []


def _artifact(path: Path, *, verify: Any) -> dict[str, Any]:
    from ..codegen.artifact import Artifact

    artifact = Artifact.open(path, verify=verify)
    manifest = artifact.manifest
    targets = {
        name: {
            "isas": [kernel["isa"] for kernel in artifact.target(name).get("kernels", [])],
            "options": artifact.target(name).get("options", {}),
            "weight_bytes": sum(array.nbytes for array in artifact.weights(name).values()),
        }
        for name in artifact.targets
    }
    rows = [
        {
            "name": name,
            "shape": list(array.shape),
            "type": str(array.dtype),
            "bytes": array.nbytes,
            "target": target,
        }
        for target in artifact.targets
        for name, array in artifact.weights(target).items()
    ]
    return {
        "kind": "artifact",
        "path": str(path),
        "schema": manifest["schema"],
        "llmc": manifest.get("llmc"),
        "artifact_kind": artifact.kind,
        "model": artifact.model,
        "quantization": manifest.get("quantization"),
        "quality": artifact.quality,
        "layers": _layers(artifact),
        "tool_calls": (manifest.get("tokenizer") or {}).get("tool_calls"),
        "kv_dtype": manifest.get("kv_dtype"),
        "page_size": manifest.get("page_size"),
        "kv_bytes_per_token": _kv_bytes_per_token(manifest),
        "kv_window_bytes_per_token": _window_bytes_per_token(manifest),
        "targets": targets,
        "files": {name: entry["size"] for name, entry in sorted(manifest["files"].items())},
        "bytes": sum(entry["size"] for entry in manifest["files"].values()),
        "verified": verify,
        "command": manifest.get("command"),
        "tensors": rows,
    }


def _kv_bytes_per_token(manifest: dict[str, Any]) -> int:
    from ..ir.dtypes import kv_bytes

    layers = manifest["model"].get("kv") or []
    dtype = manifest.get("kv_dtype") or "float32"
    return sum(2 * layer["heads"] * kv_bytes(dtype, layer["head_dim"]) for layer in layers)


def _window_bytes_per_token(manifest: dict[str, Any]) -> dict[str, int]:
    """Of these bytes, by window in tokens, those of layers that keep a window only."""
    from ..ir.dtypes import kv_bytes

    dtype = manifest.get("kv_dtype") or "float32"
    names = {entry["name"] for entry in manifest.get("inputs", [])}
    found: Counter[str] = Counter()
    for layer in manifest["model"].get("kv") or []:
        if f"block_table.{layer.get('window')}" in names:
            found[str(layer["window"])] += 2 * layer["heads"] * kv_bytes(dtype, layer["head_dim"])
    return dict(found)


def _gguf(path: Path) -> dict[str, Any]:
    from ..frontend.gguf_split import read_gguf_model

    file = read_gguf_model(path)
    rows = [
        {"name": info.name, "shape": list(info.shape), "type": info.ggml_type, "bytes": info.nbytes}
        for info in file.tensors.values()
    ]
    architecture = file.architecture
    scalars = {
        key: value for key, value in file.metadata.items() if isinstance(value, int | float | str | bool)
    }
    return {
        "kind": "gguf",
        "path": str(path),
        "bytes": file.size,
        "model": {
            "name": scalars.get("general.name"),
            "architecture": architecture,
            "num_layers": scalars.get(f"{architecture}.block_count"),
            "hidden_size": scalars.get(f"{architecture}.embedding_length"),
            "context_length": scalars.get(f"{architecture}.context_length"),
        },
        **_weights(rows),
        "metadata": {key: value for key, value in scalars.items() if len(str(value)) <= 200},
        "tensors": rows,
    }


def _folder(path: Path) -> dict[str, Any]:
    from ..frontend.safetensors import open_safetensors

    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path / 'config.json'} is not JSON: {error}", remedy="download the folder again"
        ) from None
    if not isinstance(config, dict):
        raise InputError(f"{path / 'config.json'} is not a JSON object", remedy="download the folder again")
    rows: list[dict[str, Any]] = []
    for file in sorted(path.glob("*.safetensors")):
        for name, tensor in open_safetensors(file).items():
            count = _count(tensor.shape)
            rows.append({"name": name, "shape": list(tensor.shape), "type": tensor.dtype, "bytes": count})
    from ..ir.dtypes import itemsize

    for row in rows:
        row["bytes"] *= itemsize(row["type"])
    text: dict[str, Any] = config.get("text_config") or config
    return {
        "kind": "folder",
        "path": str(path),
        "bytes": sum(file.stat().st_size for file in path.glob("*.safetensors")),
        "model": {
            "name": path.name,
            "architecture": (config.get("architectures") or [config.get("model_type")])[0],
            "num_layers": text.get("num_hidden_layers") or text.get("n_layer"),
            "hidden_size": text.get("hidden_size") or text.get("n_embd"),
            "context_length": text.get("max_position_embeddings") or text.get("n_positions"),
        },
        **_weights(rows),
        "files": {file.name: file.stat().st_size for file in sorted(path.iterdir()) if file.is_file()},
        "tensors": rows,
    }


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count


def _weights(rows: list[dict[str, Any]]) -> dict[str, Any]:
    parameters = sum(_count(tuple(row["shape"])) for row in rows)
    weight_bytes = sum(row["bytes"] for row in rows)
    return {
        "parameters": parameters,
        "weight_bytes": weight_bytes,
        "bits_per_weight": round(8 * weight_bytes / parameters, 3) if parameters else None,
        "types": dict(Counter(row["type"] for row in rows).most_common()),
    }


def _text(report: dict[str, Any], tensors: list[dict[str, Any]]) -> str:
    model, quantization = report["model"], report.get("quantization") or {}
    lines = facts(
        [
            ("path", report["path"]),
            (
                "kind",
                f"{report['kind']} ({report['artifact_kind']})"
                if "artifact_kind" in report
                else report["kind"],
            ),
            ("name", model.get("name")),
            ("architecture", model.get("architecture")),
            ("layers", model.get("num_layers")),
            ("hidden size", model.get("hidden_size")),
            ("vocabulary", model.get("vocab_size")),
            ("context", model.get("context_length")),
            ("rope scaling", rope_text(model.get("rope_scaling"))),
            ("parameters", f"{report['parameters'] / 1e6:.1f} M" if "parameters" in report else None),
            ("size", size(report["bytes"])),
            ("bits a weight", report.get("bits_per_weight") or quantization.get("bits_per_weight")),
            ("quantization", quantization.get("scheme")),
            ("tool calls", tool_calls_text(report.get("tool_calls"))),
            *verdict_facts(report.get("quality")),
            (
                "tensor types",
                ", ".join(f"{n} × {name}" for name, n in report.get("types", {}).items()) or None,
            ),
            (
                "cache a token",
                f"{size(report['kv_bytes_per_token'])}, {report.get('kv_dtype') or 'float32'}"
                + "".join(
                    f"; {size(part)} of it for the last {window} tokens only"
                    for window, part in report.get("kv_window_bytes_per_token", {}).items()
                )
                if report.get("kv_bytes_per_token")
                else None,
            ),
            (
                "files",
                {"full": "every hash as in the manifest", "size": "sizes as in the manifest"}.get(
                    report.get("verified", "")
                ),
            ),
            *((f"target {name}", _target_text(entry)) for name, entry in report.get("targets", {}).items()),
            ("made by", " ".join(report["command"]) if report.get("command") else None),
        ]
    )
    if not tensors:
        return lines
    rows = (
        (row["name"], "×".join(map(str, row["shape"])), row["type"], size(row["bytes"])) for row in tensors
    )
    return f"{lines}\n\n{table(('tensor', 'shape', 'type', 'size'), rows)}"


def _target_text(entry: dict[str, Any]) -> str:
    isas = f"kernels for {', '.join(entry['isas'])}; " if entry["isas"] else ""
    return f"{isas}weights {size(entry['weight_bytes'])}"
