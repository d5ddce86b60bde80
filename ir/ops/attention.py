"""Attention, as traced (`sdpa`, head-major) and as fused (`attention`, token-major)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core import Op
from ..define import Operand, OptionalOperand, op
from ..errors import CompileError, VerifyError
from ..types import Dim, TensorType, divide

Dims = Mapping[str, int]
VECTOR = 16
"""Elements at each end of a row of `distances` that are alike."""


@op("sdpa")
class Sdpa(Op):
    """torch's scaled_dot_product_attention: q [..., H, T, D], k [..., Hkv, S, D], v [..., Hkv, S, Dv], mask
    additive or bool [..., T, S].

    Hkv is H, or divides it with `enable_gqa`.
    """

    q: Operand
    k: Operand
    v: Operand
    mask: OptionalOperand
    scale: float
    causal: bool = False
    enable_gqa: bool = False

    def infer(self) -> list[TensorType]:
        if self.q.shape[-1] != self.k.shape[-1] or self.k.shape[-2] != self.v.shape[-2]:
            raise CompileError(
                f"sdpa: q {self.q.type}, k {self.k.type}, v {self.v.type} ({self.loc})",
                remedy="D and S must agree",
            )
        return [self.q.type.with_shape((*self.q.shape[:-1], self.v.shape[-1]))]

    def reference(self, dims: Dims, *args: Any) -> Any:
        import torch

        q, k, v, mask = args
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=self.scale, is_causal=self.causal, enable_gqa=self.enable_gqa
        )


def heads_ratio(q: TensorType, k: TensorType) -> Dim | None:
    """Query heads per key/value head (axis -2 of token-major tensors)."""
    return divide(q.shape[-2], k.shape[-2])


def masked_softmax(scores: Any, visible: Any, sinks: Any) -> Any:
    """softmax over the last axis of scores [..., H, T, S] where `visible`; `sinks` [H] are logits that take
    weight and give nothing.
    """
    import torch

    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is None:
        return scores.softmax(-1).nan_to_num(0.0)
    column = sinks.float().view(-1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat((scores, column), -1).softmax(-1)[..., :-1]


def attend(
    q: Any,
    k: Any,
    v: Any,
    sinks: Any,
    positions: tuple[Any, Any],
    *,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    slopes: Any = None,
    distances: Any = None,
) -> Any:
    """Token-major attention of one sequence in float32: q [T, H, D], k [S, Hkv, D], v [S, Hkv, Dv]; positions
    of queries and keys; slopes [H]; distances [H, W].
    """
    import torch

    group = q.shape[-2] // k.shape[-2]
    k, v = k.float().repeat_interleave(group, -2), v.float().repeat_interleave(group, -2)
    distance = positions[0][:, None] - positions[1][None, :]
    visible = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        visible &= distance >= 0
    if window is not None:
        visible &= (distance < window) & (distance > -window)
    if all(one is None for one in (sinks, softcap, slopes, distances)):
        # The same in a fraction of the time: calibration runs thousands of tokens through this.
        q, k, v = (x.float().transpose(0, 1)[None] for x in (q, k, v))
        fused = torch.nn.functional.scaled_dot_product_attention
        if torch.equal(visible, torch.ones_like(visible).tril()):  # it skips what lies above the diagonal
            return fused(q, k, v, is_causal=True, scale=scale)[0].transpose(0, 1)
        out = fused(q, k, v, attn_mask=visible, scale=scale)[0].transpose(0, 1)
        return out.where(visible.any(-1)[:, None, None], 0.0)
    scores = torch.einsum("thd,shd->hts", q.float(), k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        scores = scores - slopes.float()[:, None, None] * distance
    if distances is not None:
        width = distances.shape[-1]
        scores = scores + distances.float()[:, (width // 2 - distance).clamp(0, width - 1)]
    return torch.einsum("hts,shd->thd", masked_softmax(scores, visible, sinks), v)


def check_per_head(op: Any) -> None:
    """Sinks, slopes and distances of `attention` and `paged_attention`: one of them at most."""
    for name, value in (("sinks", op.sinks), ("slopes", op.slopes)):
        if value is not None and value.shape != op.q.shape[-2:-1]:
            raise VerifyError(
                f"{op.opname}: {name} {value.type} for q {op.q.type} ({op.loc})", remedy="one number a head"
            )
    if op.distances is not None:
        shape, most = op.distances.shape, VECTOR
        fits = len(shape) == 2 and shape[:1] == op.q.shape[-2:-1] and isinstance(shape[1], int)
        if not fits or shape[1] % (2 * most) or op.distances.dtype != "float32":
            raise VerifyError(
                f"{op.opname}: distances {op.distances.type} for q {op.q.type} ({op.loc})",
                remedy=f"float32 [heads, a multiple of {2 * most}]",
            )
    given = [name for name in ("sinks", "slopes", "distances") if getattr(op, name) is not None]
    if len(given) > 1:
        # A target may add to all scores of a query what it likes, but not to those beside a sink.
        raise VerifyError(
            f"{op.opname}: {' and '.join(given)} at once ({op.loc})", remedy="no kernel does both"
        )


@op("attention")
class Attention(Op):
    """Self-attention of whole sequences: q [B, T, H, D], k [B, T, Hkv, D], v [B, T, Hkv, Dv] → [B, T, H, Dv].

    causal: key j is seen by query i when j ≤ i. window w: |i - j| < w as well (Mistral's sliding window
    counts the token itself). softcap c: scores become c · tanh(score / c) before the mask (Gemma 2). sinks
    [H]: one extra logit a head (StreamingLLM / gpt-oss). slopes [H] float32: slope · (j - i) is added to a
    score then (ALiBi, Press et al. 2022). distances [H, W] float32: instead of that the element at
    clip(W / 2 + j - i, 0, W - 1) of the head's row is added (relative position biases, Raffel et al. 2020,
    section 2.1). The first `VECTOR` elements of a row are alike, and so are the last: kernels take that many
    at once.
    """

    q: Operand
    k: Operand
    v: Operand
    sinks: OptionalOperand
    slopes: OptionalOperand
    distances: OptionalOperand
    scale: float
    causal: bool = True
    window: int | None = None
    softcap: float | None = None

    def verify(self) -> None:
        check_per_head(self)

    def infer(self) -> list[TensorType]:
        if (
            self.q.shape[-1] != self.k.shape[-1]
            or self.k.shape[-2] != self.v.shape[-2]
            or heads_ratio(self.q.type, self.k.type) is None
        ):
            raise CompileError(
                f"attention: q {self.q.type}, k {self.k.type}, v {self.v.type} ({self.loc})",
                remedy="heads and D must agree",
            )
        return [self.q.type.with_shape((*self.q.shape[:-1], self.v.shape[-1]))]

    def reference(self, dims: Dims, *args: Any) -> Any:
        import torch

        q, k, v, sinks, slopes, distances = args
        steps = torch.arange(q.shape[-3])
        out = [
            attend(
                a,
                b,
                c,
                sinks,
                (steps, steps),
                scale=self.scale,
                causal=self.causal,
                window=self.window,
                softcap=self.softcap,
                slopes=slopes,
                distances=distances,
            )
            for a, b, c in zip(q.flatten(0, -4), k.flatten(0, -4), v.flatten(0, -4), strict=True)
        ]
        return torch.stack(out).view(*q.shape[:-1], v.shape[-1]).to(q.dtype)
