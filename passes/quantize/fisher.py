"""How the likelihood of tokens that a model draws itself depends on its head: gradients for Fisher's
information (`sensitivity.py`), over logits that never are in memory as a whole.

    logits [T, V], a piece of the vocabulary at a time → files
    the files, some tokens at a time                   → y ~ softmax(logits), lse = log Σ exp
    logits again, a piece at a time                    → g = softmax(logits) − onehot(y), and what follows
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .head import Cache, Head

if TYPE_CHECKING:
    import torch

DRAWN = 1 << 22  # logits that are in memory while tokens are drawn: 16 MB, a few times


@dataclass(frozen=True)
class HeadGradient:
    """Of Σ −log p(y) over tokens: with respect to the hidden states [T, D], and the squares of that with
    respect to the linear layer's results, summed over tokens [V]; float32.
    """

    hidden: torch.Tensor
    squares: torch.Tensor


def head_gradient(
    head: Head,
    hidden: torch.Tensor,
    dims: Mapping[str, int],
    generator: torch.Generator,
    cache: Cache,
    folder: Path,
) -> HeadGradient:
    """Draw a token after each of the hidden states [T, D], and derive.

    Args:
        cache: keeps the head's rows.
        folder: for the logits, 4 · T · V bytes, which are deleted again.
    """
    import torch

    with torch.no_grad():
        drawn, lse = _draw(head.logits(hidden, dims, cache), generator, folder)
    leaf = hidden.detach().requires_grad_()
    gradient, squares, start = torch.zeros_like(hidden), list[torch.Tensor](), 0
    with torch.enable_grad():
        for made, logits in head.pieces(leaf, dims, cache):
            g = torch.sub(logits.detach(), lse[:, None]).exp_()
            here = ((drawn >= start) & (drawn < start + g.shape[1])).nonzero()[:, 0]
            g[here, drawn[here] - start] -= 1
            of_made, of_hidden = torch.autograd.grad(logits, [made, leaf], g)
            squares.append(of_made.square_().sum(0))
            gradient += of_hidden
            start += g.shape[1]
    return HeadGradient(gradient, torch.cat(squares))


def _draw(
    pieces: Iterable[torch.Tensor], generator: torch.Generator, folder: Path
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens int64 [T] by the probabilities of logits [T, rows] of the vocabulary's pieces, and the logits'
    log Σ exp, float32 [T].
    """
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    files: list[tuple[Path, int]] = []
    tokens = 0
    for logits in pieces:
        tokens, rows = logits.shape
        files.append((folder / f"logits.{len(files)}", rows))
        logits.contiguous().numpy().tofile(files[-1][0])
    drawn: list[torch.Tensor] = []
    lse: list[torch.Tensor] = []
    step = max(1, DRAWN // sum(rows for _, rows in files))
    for start in range(0, tokens, step):
        count = min(step, tokens - start)
        logits = torch.cat([_read(file, start, count, width) for file, width in files], 1)
        lse.append(logits.logsumexp(1))
        drawn.append(torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0])
    for file, _ in files:
        file.unlink()
    return torch.cat(drawn), torch.cat(lse)


def _read(file: Path, start: int, count: int, width: int) -> torch.Tensor:
    """Rows of float32 [..., width] in a file."""
    import torch

    found = np.fromfile(file, np.float32, count * width, offset=4 * start * width)
    return torch.from_numpy(found.reshape(count, width))
