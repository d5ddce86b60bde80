"""Tables and plots of what `benchmarks/speed.py` measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ..commands import write_between

Record = dict[str, Any]
BEGIN, END = "<!-- speed: begin -->", "<!-- speed: end -->"


def spread(values: Sequence[float]) -> str:
    """Median, and half the distance between the quartiles in percent of it."""
    middle, ordered = median(values), sorted(values)
    quartile = len(ordered) // 4
    half = (ordered[-1 - quartile] - ordered[quartile]) / 2
    return f"{_number(middle)} ± {100 * half / middle:.0f} %"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def table(record: Record) -> str:
    """Tokens a second of each system and measure, and each of ours as a multiple of each peer."""
    systems: Mapping[str, Record] = record["systems"]
    names = [measure["name"] for measure in record["measures"]]
    ours = [name for name, system in systems.items() if system["ours"]]
    lines = ["| | bits a weight | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for name, system in systems.items():
        bits = f"{system['bits']:.2f}" if system["bits"] else "–"
        cells = [spread(system["rates"][measure]) if measure in system["rates"] else "–" for measure in names]
        lines.append(f"| {name} | {bits} | " + " | ".join(cells) + " |")
    for name, system in systems.items():
        if system["ours"]:
            continue
        for our in ours:
            cells = [_ratio(systems[our]["rates"], system["rates"], measure) for measure in names]
            lines.append(f"| {our} / {name} | | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ratio(ours: Mapping[str, Sequence[float]], theirs: Mapping[str, Sequence[float]], measure: str) -> str:
    if measure not in ours or measure not in theirs:
        return "–"
    return f"{median(ours[measure]) / median(theirs[measure]):.2f} ×"


def text(records: Sequence[Record]) -> str:
    """All tables, each below what it is of."""
    parts: list[str] = []
    for record in records:
        versions = "; ".join(
            f"{name}: " + ", ".join(f"{p} {v}" for p, v in system["versions"].items() if v)
            for name, system in record["systems"].items()
            if not system["ours"]
        )
        parts.append(f"### {record['model']}\n")
        parts.append(
            f"Tokens a second, median ± half the distance between quartiles of {record['repeat']} rounds in "
            f"which all were measured in turns. {record['machine']}. {versions}. The limit of reading in the "
            f"same minutes: {median(record['read_gb_s']):.1f} GB/s with {record['threads']} threads"
            f"{_weights(record)}. Other processes took {record['others_cpu']:.0%} of the processors.\n"
        )
        parts.append(table(record) + "\n")
    return "\n".join(parts)


def _weights(record: Record) -> str:
    """How fast decoding reads weights."""
    shares: list[str] = []
    for name, system in record["systems"].items():
        if "weight_bytes_per_token" in system and "decode" in system["rates"]:
            speed = system["weight_bytes_per_token"] * median(system["rates"]["decode"]) / 1e9
            shares.append(f"{name} reads weights at {speed:.1f}")
    return f"; decoding one stream, {', '.join(shares)} GB/s" if shares else ""


def write(text: str, path: Path) -> None:
    """Write the tables; into a file that there is, between its two marks."""
    write_between(f"\n{text}\n", path, BEGIN, END)


def plot(records: Sequence[Record], path: Path) -> None:
    """Curves over context and over streams, a row of two panels for each model."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "llmc"
    import matplotlib.pyplot as plt

    curves = (
        ("decode", "prompt", "tokens of context", "tokens/s, one stream"),
        ("answers", "streams", "streams of 128 + 64", "output tokens/s"),
    )
    systems = list(dict.fromkeys(name for record in records for name in record["systems"]))
    figure, panels = plt.subplots(len(records), 2, figsize=(9, 3.4 * len(records)), squeeze=False)
    for record, row in zip(records, panels, strict=True):
        for (what, over, label, unit), axes in zip(curves, row, strict=True):
            chosen = [measure for measure in record["measures"] if measure["what"] == what]
            for name, system in record["systems"].items():
                if system["alone"]:
                    continue
                points = sorted((m[over], median(system["rates"][m["name"]])) for m in chosen)
                marker, color = "o" if system["ours"] else "s", f"C{systems.index(name)}"
                axes.plot(*zip(*points, strict=True), marker=marker, color=color, label=name)
            axes.set_xscale("log", base=2)
            axes.set_ylim(bottom=0)
            axes.set_xlabel(label)
            axes.set_ylabel(unit)
            axes.set_title(record["model"], fontsize=9)
            axes.grid(alpha=0.3)
        row[1].legend(fontsize=7, loc="upper left")  # where every curve begins low
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
