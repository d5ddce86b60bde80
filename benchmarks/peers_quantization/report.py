"""Rows of the benchmark as a Markdown table and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..commands import write_between
from .scoring import WindowScore, summarize

BEGIN, END = "<!-- results -->", "<!-- end of results -->"
UNCHANGED = 0.05  # share of weights, zeros aside, that may stay as they were by chance; about 1 % is usual
Record = dict[str, Any]

HEAD = (
    "| tool | scheme | bits | calibrated on | perplexity | KL | top-1 | CPU s | peak MB | |\n"
    "|---|---|---|---|---|---|---|---|---|---|\n"
)


def summary(row: Record) -> Record:
    """A row's JSON with its windows' means in place of the windows; what has them already stays as it is."""
    if isinstance(row["windows"], int):
        return row
    scores = [WindowScore(**one) for one in row["windows"]]
    return {**row, "windows": len(scores), **vars(summarize(scores))}


def merged(rows: Sequence[Record], earlier: Sequence[Record]) -> list[Record]:
    """The rows, and those of an earlier record that are none of theirs."""
    facts = ("model", "tool", "scheme", "calibration", "calibration_tokens", "note")
    known = {tuple(row[fact] for fact in facts) for row in rows}
    return [*rows, *(row for row in earlier if tuple(row[fact] for fact in facts) not in known)]


def table(rows: Sequence[Record], machines: Sequence[str] = ()) -> str:
    """One model's rows, in the order of bits and then of KL; with the number of each one's machine where
    there are several.
    """
    found = sorted((summary(row) for row in rows), key=lambda r: (round(r["bits"], 2), r["kl"]))
    return HEAD + "".join(_line(row, machines) for row in found)


def _line(row: Record, machines: Sequence[str]) -> str:
    tool = f"**{row['tool']}**" if row["tool"] == "llmc" else row["tool"]
    machine = f"machine {machines.index(row['machine']) + 1}" if len(machines) > 1 else ""
    cells = [
        tool,
        f"`{row['scheme']}`",
        f"{row['bits']:.3f}",
        f"{row['calibration']}, {row['calibration_tokens'] / 1024:.0f} K",
        f"{row['ppl_increase']:+.1f} ±{row['ppl_increase_se']:.1f}%",
        f"{row['kl']:.4f} ±{row['kl_se']:.4f}",
        f"{row['top1']:.3f}",
        f"{row['cpu_seconds']:.0f}",
        f"{row['peak_bytes'] / 1e6:,.0f}" if "peak_bytes" in row else "",
        "; ".join(part for part in (flattered(row), row.get("note"), machine) if part),
    ]
    return "| " + " | ".join(cells) + " |\n"


def flattered(row: Record) -> str:
    """A warning where the scheme's grid is close to the one that the source's weights lie on."""
    same = row.get("weights_unchanged", 0.0) - row.get("weights_zero", 0.0)
    return f"⚠ {same:.0%} of the weights lay on this grid before" if same > UNCHANGED else ""


def by_model(rows: Sequence[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for row in rows:
        found.setdefault(row["model"], []).append(row)
    return found


def tables(rows: Sequence[Record]) -> str:
    """A heading, the float model's perplexity and a table for each model."""
    parts: list[str] = []
    machines = sorted({row["machine"] for row in rows})
    for model, found in by_model(rows).items():
        float_ppl = {row["windows"]: row["float_ppl"] for row in map(summary, found)}
        windows, values = zip(*sorted(float_ppl.items()), strict=True)
        parts.append(
            f"### {model}\n\nFloat perplexity {'/'.join(f'{value:.2f}' for value in values)}; "
            f"{'/'.join(map(str, windows))} windows of 1,024 tokens.\n\n{table(found, machines)}"
        )
    numbers = [f" {n}" for n in range(1, len(machines) + 1)] if len(machines) > 1 else [""]
    return "\n".join([*parts, *(f"Machine{n}: {one}.\n" for n, one in zip(numbers, machines, strict=True))])


def write(text: str, path: Path) -> None:
    """Write the tables; into a file that there is, between its two marks."""
    write_between(text, path, BEGIN, END)


def plot(rows: Sequence[Record], path: Path) -> None:
    """Bits a weight of the linear layers against KL, one panel a model; the format is the file's suffix."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    models = by_model(rows)
    with mpl.rc_context({"svg.hashsalt": "llmc"}):  # the same rows, the same file
        figure = Figure(figsize=(6.4 * len(models), 4.8), layout="tight")
        panels = figure.subplots(1, len(models), squeeze=False)
        for axes, (model, found) in zip(panels[0], models.items(), strict=True):
            _panel(axes, model, [summary(row) for row in found])
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _panel(axes: Any, model: str, rows: Sequence[Record]) -> None:
    for tool in sorted({row["tool"] for row in rows}, key=lambda name: (name != "llmc", name)):
        mine = [row for row in rows if row["tool"] == tool]
        axes.errorbar(
            [row["bits"] for row in mine],
            [row["kl"] for row in mine],
            yerr=[row["kl_se"] for row in mine],
            fmt="*" if tool == "llmc" else "o",
            markersize=11 if tool == "llmc" else 6,
            label=tool,
        )
        for row in mine:
            axes.annotate(
                row["scheme"],
                (row["bits"], row["kl"]),
                textcoords="offset points",
                xytext=(7, 3),
                fontsize=7,
            )
    axes.set_yscale("log")
    axes.set_xlabel("bits a weight of the linear layers")
    axes.set_ylabel("KL(float ‖ quantized), nats")
    axes.set_title(model, fontsize=9)
    axes.margins(x=0.18)
    axes.legend(fontsize=8)
