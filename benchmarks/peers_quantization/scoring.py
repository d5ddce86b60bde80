"""Distance of a quantized model from its float model, window by window.

The float model's last hidden states are kept on disk instead of its logits: the head is float for every tool,
so logits come back by one product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .models import Array, Shared

ROWS = 128  # predictions whose logits are held at once


@dataclass(frozen=True)
class WindowScore:
    """Means over one window's predictions, in nats: negative log-likelihood of the float and of the quantized
    model, KL(float || quantized); and the share of predictions whose most likely token is the same.
    """

    float_nll: float
    nll: float
    kl: float
    top1: float

    def record(self) -> dict[str, float]:
        return asdict(self)


def compare(float_logits: Any, logits: Any, targets: Any) -> WindowScore:
    """Logits [rows, vocab] of both models for rows that predict `targets` [rows]; torch tensors.

    Log-probabilities in float32, sums in float64.
    """
    p, q = float_logits.float().log_softmax(-1), logits.float().log_softmax(-1)
    picked = targets[:, None]
    return WindowScore(
        -float(p.gather(1, picked).double().mean()),
        -float(q.gather(1, picked).double().mean()),
        float((p.exp() * (p - q)).sum(-1).double().mean()),
        float((p.argmax(-1) == q.argmax(-1)).double().mean()),
    )


def joined(parts: Sequence[tuple[int, WindowScore]]) -> WindowScore:
    """Means of (rows, score) pairs, weighted by rows."""
    count = sum(rows for rows, _ in parts)
    names = ("float_nll", "nll", "kl", "top1")
    return WindowScore(*(sum(rows * getattr(one, name) for rows, one in parts) / count for name in names))


@dataclass(frozen=True)
class Summary:
    """Of all windows. `ppl_increase` in percent; `_se` are standard errors over windows, of the paired
    differences where two models are compared.
    """

    windows: int
    float_ppl: float
    ppl: float
    ppl_increase: float
    ppl_increase_se: float
    kl: float
    kl_se: float
    top1: float


def summarize(scores: Sequence[WindowScore]) -> Summary:
    """Perplexity's increase is exp of the mean difference of log-likelihoods; its standard error follows from
    theirs by the derivative.
    """
    differences = np.array([one.nll - one.float_nll for one in scores])
    kl = np.array([one.kl for one in scores])
    ratio = math.exp(float(differences.mean()))
    return Summary(
        len(scores),
        math.exp(float(np.mean([one.float_nll for one in scores]))),
        math.exp(float(np.mean([one.nll for one in scores]))),
        100 * (ratio - 1),
        100 * ratio * standard_error(differences),
        float(kl.mean()),
        standard_error(kl),
        float(np.mean([one.top1 for one in scores])),
    )


def standard_error(values: Array) -> float:
    """Of the mean; NaN for a single value."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


Forward = Callable[[Any], Any]
"""Token ids [1, T] → last hidden states [T, D], or logits [T, V]."""


class Reference:
    """The float model: hidden states of each window, computed once and kept in `folder`."""

    def __init__(self, model: Shared, folder: Path) -> None:
        self._model, self._folder = model, folder
        self._transformers: Any = None
        self._head: Any = None
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def transformers(self) -> Any:
        """The float32 transformers model, loaded on first use."""
        if self._transformers is None:
            self._transformers = load(self._model)
        return self._transformers

    def head(self, hidden: Any) -> Any:
        """Logits [rows, V] of hidden states [rows, D]."""
        import torch

        if self._head is None:
            self._head = self.transformers.get_output_embeddings().weight.detach()
        return torch.nn.functional.linear(hidden, self._head)

    def hidden(self, number: int, ids: Array) -> Any:
        """Last hidden states [T, D] of window `number`."""
        import torch

        path = self._folder / f"{number:03d}.npy"
        if not path.is_file():
            found = hidden_states(self.transformers)(torch.from_numpy(ids)[None])
            if number == 0:
                self._check(ids, found)
            partial = path.with_suffix(".partial")
            with partial.open("wb") as file:
                np.save(file, found.numpy())
            partial.rename(path)
        return torch.from_numpy(np.load(path))

    def _check(self, ids: Array, hidden: Any) -> None:
        """A model whose logits are more than its head's product would be scored wrongly."""
        import torch

        with torch.inference_mode():
            logits = self.transformers(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0, -8:]
            if not torch.allclose(logits, self.head(hidden[-8:]), rtol=1e-4, atol=1e-3):
                raise ValueError(f"{self._model.name}: the head does more than multiply")

    def score(self, number: int, ids: Array, found: Any) -> WindowScore:
        """Score hidden states [T, D] or logits [T, V] of window `number`."""
        import torch

        exact, targets = self.hidden(number, ids), torch.from_numpy(ids)[1:]
        parts: list[tuple[int, WindowScore]] = []
        with torch.inference_mode():
            for start in range(0, len(targets), ROWS):
                rows = slice(start, min(start + ROWS, len(targets)))
                other = found[rows] if found.shape[-1] != exact.shape[-1] else self.head(found[rows])
                part = compare(self.head(exact[rows]), other, targets[rows])
                parts.append((rows.stop - rows.start, part))
        return joined(parts)


def load(model: Shared, weights: dict[str, Any] | None = None) -> Any:
    """The float32 transformers model, with some of its parameters replaced."""
    import torch
    from transformers import AutoModelForCausalLM

    made: Any = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32).eval()
    if weights:
        mistaken = made.load_state_dict(weights, strict=False).unexpected_keys
        if mistaken:
            raise ValueError(f"{model.name} has no parameter {mistaken[0]}")
    return made


def hidden_states(transformers_model: Any) -> Forward:
    """Last hidden states (after the final norm) by transformers."""
    import torch

    def forward(ids: Any) -> Any:
        with torch.inference_mode():
            return transformers_model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]

    return forward


def logits_of(graph: Any) -> Forward:
    """Logits by llmc's interpreter; weights stay in memory between calls."""
    from llmc.ir.interpreter import run

    kept: dict[str, Any] = {}

    def forward(ids: Any) -> Any:
        return run(graph, {"input_ids": ids}, keep_weights=kept)[0][0]

    return forward


def relative_error(exact: Mapping[str, Any], weights: Mapping[str, Any]) -> tuple[float, float, float]:
    """(root mean square error of linear weights relative to their own, share of them left as they were, share
    that is zero).

    "As they were" is within a thousandth of the row's root mean square: about 1 % of weights are so by chance
    at 4 bits, many more where the scheme's grid is close to the one that the source was rounded to. Zero is
    on every grid, and some models have many zeros.
    """
    error = total = 0.0
    same = zero = count = 0
    for name, was in exact.items():
        difference = (weights[name] - was).double()
        error, total = error + float(difference.square().sum()), total + float(was.double().square().sum())
        step = 1e-3 * was.double().square().mean(-1, keepdim=True).sqrt()
        same, zero = same + int((difference.abs() <= step).sum()), zero + int((was.abs() <= step).sum())
        count += was.numel()
    return math.sqrt(error / max(total, 1e-300)), same / max(count, 1), zero / max(count, 1)
