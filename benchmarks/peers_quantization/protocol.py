"""What every peer's program shares; runs in the peer's environment, so nothing of llmc is imported.

    PYTHON run_<tool>.py ORDER.json

The order names a model folder (float32 safetensors), calibration token ids, a scheme and an output folder.
The program leaves there `weights.safetensors`, float32 values of every parameter but the embedding and the
head by the names that transformers gives them, and `stats.json`.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

STAND_ALONE = ("embed_tokens.", "lm_head.")
"""Parameters that stay float for every tool."""


@dataclass(frozen=True)
class Order:
    """One quantization to do.

    Attributes:
        model: Hugging Face folder. calibration: .npy file, int64 [sequences, tokens]. output: folder.
        method: "gptq", "awq", "rtn" (whatever the tool does by itself) or a GGML type's name.
        bits, group, symmetric: of the linear layers; 0, 0, False where the method says it all.
        options: of the tool, such as iters.
    """

    model: str
    calibration: str
    output: str
    method: str
    bits: int
    group: int
    symmetric: bool
    threads: int
    options: Mapping[str, Any]

    def sequences(self) -> Any:
        import numpy as np

        return np.load(self.calibration)


@dataclass(frozen=True)
class Done:
    """What a tool made: `weights` by transformers' names (more than are wanted do not harm); `bits` a weight
    of the linear layers, everything stored counted; `note` what the reader of the table must know.
    """

    weights: Mapping[str, Any]
    bits: float
    note: str = ""


def grid_bits(order: Order) -> float:
    """Bits a weight of an integer grid: codes, a float16 scale a group, and a zero point of as many bits as a
    code.
    """
    return order.bits + (16 + (0 if order.symmetric else order.bits)) / order.group


def is_linear(name: str, value: Any) -> bool:
    """Whether a parameter is the weight of a linear layer other than the head."""
    return value.ndim == 2 and name.endswith(".weight") and not any(s in name for s in STAND_ALONE)


def load_model(order: Order, dtype: str = "float32") -> Any:
    """The transformers model of the order's folder."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(order.model, dtype=getattr(torch, dtype)).eval()


def load_tokenizer(order: Order) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(order.model)


def main(quantize: Callable[[Order], Done], packages: tuple[str, ...]) -> None:
    """Carry out the order on the command line. Offline: a hub must not decide what is measured."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    order = Order(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(order.threads)
    torch.manual_seed(0)
    began, cpu = time.perf_counter(), _cpu_seconds()
    done = quantize(order)
    stats: dict[str, Any] = {
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(_cpu_seconds() - cpu, 1),
        "peak_bytes": max(peak_bytes(), _largest_child()),
        "bits": done.bits,
        "note": done.note,
        "versions": {name: _version(name) for name in (*packages, "torch", "transformers")},
    }
    folder = Path(order.output)
    folder.mkdir(parents=True, exist_ok=True)
    kept = {
        name: value.detach().to(torch.float32).contiguous().clone()
        for name, value in done.weights.items()
        if not any(s in name for s in STAND_ALONE)
    }
    save_file(kept, folder / "weights.safetensors")
    (folder / "stats.json").write_text(json.dumps(stats, indent=1) + "\n", encoding="utf-8")


def _cpu_seconds() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def forget_peak() -> None:
    """Let `peak_bytes` begin anew, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes() -> int:
    """The largest memory of this process.

    Linux's VmHWM begins with the program; ru_maxrss begins with what the process had that started it, so that
    a small program started by a large one seems large. It counts in KiB there, in bytes on macOS.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return (1 if sys.platform == "darwin" else 1024) * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _largest_child() -> int:
    """Bytes; what a child began with is part of this process's own peak."""
    return (1 if sys.platform == "darwin" else 1024) * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
