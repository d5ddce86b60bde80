"""The content of quality.json as a person reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def worst_layers(quality: Mapping[str, Any]) -> list[tuple[str, float]]:
    """(name, relative output error) of the layers that were compared, the largest errors first."""
    found: list[tuple[str, float]] = []
    rows = quality.get("layers")
    for row in rows if isinstance(rows, list) else []:
        error = row.get("error") if isinstance(row, dict) else None
        if isinstance(error, int | float):
            found.append((str(row.get("name")), float(error)))
    return sorted(found, key=lambda one: -one[1])


def verdict_facts(quality: Mapping[str, Any] | None) -> list[tuple[str, str | None]]:
    """Rows for `output.facts`; none where nothing was measured."""
    if quality is None:
        return []

    def number(key: str) -> float | None:
        value = quality.get(key)
        return float(value) if isinstance(value, int | float) else None

    ppl, source, increase = number("ppl"), number("ppl_source"), number("ppl_increase_percent")
    kl, agreement, output = number("kl"), number("top1_agreement"), number("output_error")
    known = None not in (ppl, source, increase)
    layers = worst_layers(quality)
    errors = number("ppl_increase_percent_stderr"), number("kl_stderr")
    widths = ["" if error is None else f" ± {error:.2g}" for error in errors]
    return [
        ("perplexity", f"{increase:+.2f}{widths[0]} % ({source:.3f} → {ppl:.3f})" if known else None),
        ("KL from source", None if kl is None else f"{kl:.4f}{widths[1]} nats a token"),
        ("top-1 agreement", None if agreement is None else f"{agreement:.2%}"),
        ("output error", None if output is None else f"{output:.2%}"),
        ("worst layer", f"{layers[0][0]}, error {layers[0][1]:.2%}" if layers else None),
        ("quality", f"not measured: {quality['reason']}" if output is None and "reason" in quality else None),
    ]
