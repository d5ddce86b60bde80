"""The text that stands before the kernels of a model: `device.cuh`, and the templates."""

from __future__ import annotations

from pathlib import Path

HEADERS = ("common.cuh", "rows.cuh", "linear.cuh", "experts.cuh", "attention.cuh", "state.cuh", "lora.cuh")


def headers(device: str | None = None) -> str:
    """The text before the kernels. `device`: in the place of device.cuh, for machines that are no GPU."""
    here = Path(__file__).parent
    parts = [(here / "device.cuh").read_text(encoding="utf-8") if device is None else device]
    return "\n".join([*parts, *((here / name).read_text(encoding="utf-8") for name in HEADERS)])
