"""Recurrences along the tokens of a sequence, over whole sequences and over a ragged batch with a state
cache.

Each op maps tokens to rows in order, carrying a state of fixed size:

    over a whole sequence     x [1, T, …]; the state begins as zeros and is forgotten
    in the paged step         x [T, …] of several sequences back to back, and `cache` = state [S, …],
                              state_slot [B], query_start [B+1], context_len [B]: sequence b goes on from row
                              state_slot[b] of the state and leaves it there; one whose first token is among
                              the new ones (context_len[b] new tokens) begins with zeros, whatever the row
                              holds

The second result of the paged form is the state after the step. A target may write in place: the state must
not be read after the op but through that result. All is computed in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ..core import Op, Value
from ..define import Operand, Operands, OptionalOperand, op
from ..errors import CompileError, VerifyError
from ..types import Dim, TensorType
from .nn import ACTIVATIONS, activate

Dims = Mapping[str, int]
LARGEST = 1e38
"""Exponents lie between this and its negative (`Wkv`)."""
_BLOCK = 64
"""Tokens whose decays are computed at once: many are faster than one, all of them would not fit."""


class Recurrence(Op):
    """What the ops here share. The first `per_token` operands have a row for each token, `token_rank` axes
    from that of the tokens on for the first of them; the last field is `cache`.
    """

    per_token: ClassVar[int] = 1
    token_rank: ClassVar[int] = 2
    shaped_like: ClassVar[int] = 0
    """Number of the operand whose shape the result has."""

    @property
    def kept(self) -> list[Value]:
        """The operands of `cache`; none over a whole sequence."""
        return self.grouped(self.operands)[-1]

    def state_shape(self) -> tuple[int, ...]:
        """Shape of one sequence's state. Raises CompileError where it is not known."""
        shape = self._state_dims()
        if not all(isinstance(d, int) for d in shape):
            raise CompileError(
                f"{self.opname} in {self.loc}: a state of shape {list(map(str, shape))}",
                remedy="only the number of tokens may be symbolic",
            )
        return tuple(d for d in shape if isinstance(d, int))

    def _state_dims(self) -> tuple[Dim, ...]:
        raise NotImplementedError(f"abstract: {self.opname}._state_dims")

    def scan(self, state: Any, tokens: Sequence[Any], others: Sequence[Any]) -> tuple[Any, Any]:
        """Rows and state after the tokens of one sequence, each [T, …], in float32."""
        raise NotImplementedError(f"abstract: {self.opname}.scan")

    def infer(self) -> list[TensorType]:
        self._check_shapes()
        result = self.operands[self.shaped_like].type
        return [result, *(v.type for v in self.kept[:1])]

    def _check_shapes(self) -> None:
        raise NotImplementedError(f"abstract: {self.opname}._check_shapes")

    def _refuse(self, what: str) -> CompileError:
        listed = ", ".join(str(v.type) for v in self.operands)
        return CompileError(f"{self.opname} of {listed} ({self.loc}): {what}", remedy="see ir/ops/state.py")

    def verify(self) -> None:
        kept = self.kept
        if kept and (len(kept) != 4 or kept[0].shape[1:] != self.state_shape()):
            raise VerifyError(
                f"{self.opname} in {self.loc}: cache of {[str(v.type) for v in kept]}",
                remedy=f"state [S, {', '.join(map(str, self.state_shape()))}], state_slot, query_start, "
                "context_len",
            )

    def reference(self, dims: Dims, *args: Any) -> Any:
        import torch

        *own, cache = args
        tokens, others = own[: self.per_token], own[self.per_token :]
        others = [None if x is None else x.float() for x in others]
        kind = own[self.shaped_like].dtype
        if not cache:
            leading = tokens[0].dim() - self.token_rank
            rows = [x.float().flatten(0, leading) for x in tokens]
            fresh = torch.zeros(self.state_shape(), dtype=torch.float32)
            out = self.scan(fresh, rows, others)[0]
            return out.to(kind).reshape(own[self.shaped_like].shape)
        state, slots, starts, context = cache
        state = state.clone()
        out = torch.zeros_like(own[self.shaped_like])
        for b, slot in enumerate(slots.tolist()):
            first, last = int(starts[b]), int(starts[b + 1])
            if first == last:
                continue
            fresh = int(context[b]) == last - first
            begin = torch.zeros_like(state[slot]) if fresh else state[slot]
            rows = [x[first:last].float() for x in tokens]
            got, state[slot] = self.scan(begin, rows, others)
            out[first:last] = got.to(kind)
        return out, state


def _blocks(length: int) -> list[slice]:
    return [slice(i, min(i + _BLOCK, length)) for i in range(0, length, _BLOCK)]


@op("causal_conv1d")
class CausalConv1d(Recurrence):
    """Each channel's own filter over the last W tokens, and an activation:
    y[t, c] = act(Σ_w weight[w, c] · x[t - (W-1) + w, c] + bias[c]), tokens before the first are zeros.

    x [..., T, C], weight [W, C], bias [C]; the state [W-1, C] holds the last tokens, oldest first.
    """

    x: Operand
    weight: Operand
    bias: OptionalOperand
    cache: Operands
    activation: str | None = None

    def _state_dims(self) -> tuple[Dim, ...]:
        width = self.weight.shape[0]
        return (width - 1, self.x.shape[-1])

    def _check_shapes(self) -> None:
        if self.weight.type.rank != 2 or self.weight.shape[-1] != self.x.shape[-1]:
            raise self._refuse("weight is [W, C] for x [..., T, C]")
        if self.bias is not None and self.bias.shape != self.x.shape[-1:]:
            raise self._refuse("bias is [C]")

    def verify(self) -> None:
        super().verify()
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise VerifyError(
                f"causal_conv1d: no activation is named {self.activation}",
                remedy=f"one of {', '.join(ACTIVATIONS)}",
            )

    def scan(self, state: Any, tokens: Sequence[Any], others: Sequence[Any]) -> tuple[Any, Any]:
        import torch

        weight, bias = others
        count, width = len(tokens[0]), len(weight)
        seen = torch.cat([state, tokens[0]])
        out = sum((seen[w : w + count] * weight[w] for w in range(width)), torch.zeros(()))
        out = out if bias is None else out + bias
        out = out if self.activation is None else activate(self.activation, out)
        return out, seen[len(seen) - (width - 1) :]


@op("selective_scan")
class SelectiveScan(Recurrence):
    """The selective state space of Gu & Dao 2023, section 3: a diagonal recurrence for each channel and
    element of the state, whose step depends on the token.

    h[n, c] = exp(step[c] · a[n, c]) · h[n, c] + step[c] · x[c] · b[n]
    y[c] = Σ_n c[n] · h[n, c] + d[c] · x[c]

    with step = dt + dt_bias, or softplus of that. x, dt [..., T, C], b, c [..., T, N], a [N, C], d [C],
    dt_bias [C]; the state is [N, C].
    """

    per_token: ClassVar[int] = 4

    x: Operand
    dt: Operand
    b: Operand
    c: Operand
    a: Operand
    d: OptionalOperand
    dt_bias: OptionalOperand
    cache: Operands
    softplus: bool = False

    def _state_dims(self) -> tuple[Dim, ...]:
        return self.a.shape

    def _check_shapes(self) -> None:
        channels, elements = self.x.shape[-1], self.b.shape[-1]
        if self.dt.shape != self.x.shape or self.b.shape != self.c.shape:
            raise self._refuse("x and dt, and b and c, have one shape")
        if self.b.shape[:-1] != self.x.shape[:-1] or self.a.shape != (elements, channels):
            raise self._refuse("x is [..., T, C], b [..., T, N], a [N, C]")
        if any(v is not None and v.shape != (channels,) for v in (self.d, self.dt_bias)):
            raise self._refuse("d and dt_bias are [C]")

    def scan(self, state: Any, tokens: Sequence[Any], others: Sequence[Any]) -> tuple[Any, Any]:
        import torch

        x, dt, b, c = tokens
        a, d, dt_bias = others
        dt = dt if dt_bias is None else dt + dt_bias
        dt = torch.nn.functional.softplus(dt) if self.softplus else dt
        rows: list[Any] = []
        for part in _blocks(len(x)):
            decay = torch.exp(dt[part, None, :] * a)
            added = (dt[part] * x[part])[:, None, :] * b[part, :, None]
            for t in range(len(decay)):
                state = decay[t] * state + added[t]
                rows.append(c[part][t] @ state)
        out = torch.stack(rows)
        return (out if d is None else out + d * x), state


@op("ssd_scan")
class SsdScan(Recurrence):
    """The state space with one decay a head of Dao & Gu 2024 ("Transformers are SSMs", section 6).

    For each head h, of group g = h · G / H:
    S[n, p] = exp(dt[h] · a[h]) · S[n, p] + b[g, n] · dt[h] · x[h, p]
    y[h, p] = Σ_n c[g, n] · S[n, p] + d[h] · x[h, p]

    x [..., T, H, P], dt [..., T, H], b, c [..., T, G, N], a [H], d [H]; the state is [H, N, P].
    """

    per_token: ClassVar[int] = 4
    token_rank: ClassVar[int] = 3

    x: Operand
    dt: Operand
    b: Operand
    c: Operand
    a: Operand
    d: OptionalOperand
    cache: Operands

    def _state_dims(self) -> tuple[Dim, ...]:
        return (self.x.shape[-2], self.b.shape[-1], self.x.shape[-1])

    def _check_shapes(self) -> None:
        heads, groups = self.x.shape[-2], self.b.shape[-2]
        if self.dt.shape != self.x.shape[:-1] or self.b.shape != self.c.shape:
            raise self._refuse("x is [..., T, H, P], dt [..., T, H], b and c have one shape")
        if self.b.shape[:-2] != self.x.shape[:-2] or self.a.shape != (heads,):
            raise self._refuse("b is [..., T, G, N], a [H]")
        if self.d is not None and self.d.shape != (heads,):
            raise self._refuse("d is [H]")
        if not isinstance(heads, int) or not isinstance(groups, int) or heads % groups:
            raise self._refuse("G divides H")

    def scan(self, state: Any, tokens: Sequence[Any], others: Sequence[Any]) -> tuple[Any, Any]:
        import torch

        x, dt, b, c = tokens
        a, d = others
        times = x.shape[1] // b.shape[1]
        decay = torch.exp(dt * a)[..., None, None]
        scaled = dt[..., None] * x
        rows: list[Any] = []
        for t in range(len(x)):
            heads = [v[t].repeat_interleave(times, 0) for v in (b, c)]
            state = decay[t] * state + heads[0][:, :, None] * scaled[t][:, None, :]
            rows.append((heads[1][:, None, :] @ state)[:, 0])
        out = torch.stack(rows)
        return (out if d is None else out + d[:, None] * x), state


@op("gated_delta_rule")
class GatedDeltaRule(Recurrence):
    """The gated delta rule of Yang et al. 2024 ("Gated Delta Networks", section 3.1).

    For each head h of values, with the head h · Hk / H of q and k:
    S ← exp(g) · S,  S ← S + k ⊗ beta · (v - kᵀS),  y = scale · qᵀS

    q, k [..., T, Hk, K], v [..., T, H, V], beta [..., T, H], g [..., T, H] (one decay a head) or
    [..., T, H, K] (one for each element of the keys); the state is [H, K, V].
    """

    per_token: ClassVar[int] = 5
    token_rank: ClassVar[int] = 3
    shaped_like: ClassVar[int] = 2

    q: Operand
    k: Operand
    v: Operand
    g: Operand
    beta: Operand
    cache: Operands
    scale: float = 1.0

    def _state_dims(self) -> tuple[Dim, ...]:
        return (self.v.shape[-2], self.k.shape[-1], self.v.shape[-1])

    def _check_shapes(self) -> None:
        heads, of_keys = self.v.shape[-2], self.k.shape[-2]
        if self.q.shape != self.k.shape or self.k.shape[:-2] != self.v.shape[:-2]:
            raise self._refuse("q and k are [..., T, Hk, K], v [..., T, H, V]")
        if self.beta.shape != self.v.shape[:-1]:
            raise self._refuse("beta is [..., T, H]")
        if self.g.shape not in (self.beta.shape, (*self.beta.shape, self.k.shape[-1])):
            raise self._refuse("g is [..., T, H] or [..., T, H, K]")
        if not isinstance(heads, int) or not isinstance(of_keys, int) or heads % of_keys:
            raise self._refuse("Hk divides H")

    @property
    def decays_by_element(self) -> bool:
        """Whether each element of the keys has a decay of its own."""
        return self.g.type.rank == self.v.type.rank

    def scan(self, state: Any, tokens: Sequence[Any], others: Sequence[Any]) -> tuple[Any, Any]:
        import torch

        q, k, v, g, beta = tokens
        times = v.shape[1] // k.shape[1]
        decay = torch.exp(g if self.decays_by_element else g[..., None])[..., None]
        rows: list[Any] = []
        for t in range(len(v)):
            query, key = (x[t].repeat_interleave(times, 0)[:, None, :] for x in (q, k))
            state = decay[t] * state
            new = beta[t][:, None, None] * (v[t][:, None, :] - key @ state)
            state = state + key.transpose(1, 2) * new
            rows.append((query @ state)[:, 0])
        return torch.stack(rows) * self.scale, state


@op("linear_recurrence")
class LinearRecurrence(Recurrence):
    """h[t, c] = a[t, c] · h[t-1, c] + x[t, c]: x, a [..., T, C] → h [..., T, C]; the state is [1, C].

    The recurrence of gated linear units (De et al. 2024, "Griffin", section 2.4), its gates computed before.
    """

    per_token: ClassVar[int] = 2

    x: Operand
    a: Operand
    cache: Operands

    def _state_dims(self) -> tuple[Dim, ...]:
        return (1, self.x.shape[-1])

    def _check_shapes(self) -> None:
        if self.a.shape != self.x.shape:
            raise self._refuse("x and a have one shape")

    def scan(self, state: Any, tokens: Sequence[Any], others: Sequence[Any]) -> tuple[Any, Any]:
        import torch

        x, a = tokens
        rows: list[Any] = []
        for t in range(len(x)):
            state = a[t] * state + x[t]
            rows.append(state[0])
        return torch.stack(rows), state


@op("wkv")
class Wkv(Recurrence):
    """The mean of the values so far, weighted by their keys and how long ago they were, of each channel (Peng
    et al. 2023, "RWKV", section 3.1, the WKV operator):

    y[t] = (Σ_{i<t} exp((t-1-i) · decay + k[i]) · v[i] + exp(first + k[t]) · v[t]) / the same with v = 1

    k, v [..., T, C], decay [C] (not above zero), first [C]; the state [3, C] holds numerator and denominator,
    both divided by exp(m), and m, the largest exponent so far (appendix D of the paper). The denominator of a
    sequence that begins is 0, else at least 1.
    """

    per_token: ClassVar[int] = 2

    k: Operand
    v: Operand
    decay: Operand
    first: Operand
    cache: Operands

    def _state_dims(self) -> tuple[Dim, ...]:
        return (3, self.k.shape[-1])

    def _check_shapes(self) -> None:
        channels = self.k.shape[-1:]
        if self.k.shape != self.v.shape:
            raise self._refuse("k and v have one shape")
        if self.decay.shape != channels or self.first.shape != channels:
            raise self._refuse("decay and first are [C]")

    def scan(self, state: Any, tokens: Sequence[Any], others: Sequence[Any]) -> tuple[Any, Any]:
        import torch

        decay, first = others
        top, below, largest = state
        largest = torch.where(below > 0, largest, -LARGEST)
        rows: list[Any] = []
        for k, v in zip(*tokens, strict=True):
            now = torch.maximum(largest, first + k)
            old, new = torch.exp(largest - now), torch.exp(first + k - now)
            rows.append((old * top + new * v) / (old * below + new))
            after = torch.maximum(largest + decay, k)
            old, new = torch.exp(largest + decay - after), torch.exp(k - after)
            top, below, largest = old * top + new * v, old * below + new, after
        return torch.stack(rows), torch.stack([top, below, largest])
