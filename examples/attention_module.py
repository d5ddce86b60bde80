"""A module of one's own, compiled without any model file around it.

    python -m examples.attention_module            compiles for tvm-cpu and onnx-cpu, compares with torch

Multi-head self-attention, batch first, with separate query, key, value and output projections; it returns the
output and the attention weights: [2, 5, 64] → [2, 5, 64] and [2, 8, 5, 5].
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import llmc
import numpy as np
import torch
from torch import nn


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention over `num_heads` heads (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, embed_dim: int = 64, num_heads: int = 8) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.query = nn.Linear(embed_dim, embed_dim)
        self.key = nn.Linear(embed_dim, embed_dim)
        self.value = nn.Linear(embed_dim, embed_dim)
        self.output = nn.Linear(embed_dim, embed_dim)

    def _split(self, hidden: torch.Tensor) -> torch.Tensor:
        """[batch, length, embed_dim] → [batch, heads, length, head_dim]."""
        batch, length, _ = hidden.shape
        return hidden.view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[batch, length, embed_dim] float32 → output of that shape, weights [batch, heads, length,
        length].
        """
        batch, length, embed_dim = hidden.shape
        query, key, value = (self._split(layer(hidden)) for layer in (self.query, self.key, self.value))
        weights = torch.softmax(query @ key.transpose(-2, -1) / self.head_dim**0.5, dim=-1)
        mixed = (weights @ value).transpose(1, 2).reshape(batch, length, embed_dim)
        return self.output(mixed), weights


def example() -> tuple[MultiHeadAttention, torch.Tensor]:
    """The module with seeded weights, and an input [2, 5, 64]."""
    torch.manual_seed(0)
    return MultiHeadAttention().eval(), torch.randn(2, 5, 64)


def differences(folder: Path, target: str) -> tuple[float, float]:
    """Compiles for a target into `folder`; returns the largest differences from torch (output, weights)."""
    module, hidden = example()
    path = folder / f"attention-{target}.llmc"
    llmc.compile(module, path, targets=[target], example_inputs={"hidden": hidden})
    results = list(llmc.load(path).run(hidden=hidden.numpy()).values())
    with torch.no_grad():
        expected = [tensor.numpy() for tensor in module(hidden)]
    output, weights = (float(np.abs(a - b).max()) for a, b in zip(results, expected, strict=True))
    return output, weights


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for target in ("tvm-cpu", "onnx-cpu"):
            output, weights = differences(Path(folder), target)
            print(f"{target}: largest difference from torch {output:.1e} (output), {weights:.1e} (weights)")


if __name__ == "__main__":
    main()
