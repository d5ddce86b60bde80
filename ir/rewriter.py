"""Pattern rewriting: a rule is `pattern`, `check`, `rewrite`; a check that refuses says why.

    class FoldDoubleNeg(Rule):
        '''neg(neg(x)) → x'''
        pattern = P(Neg, P(Neg, Any("x")))

        def rewrite(self, found, rw):
            return [found["x"]]

Patterns match from the last op backwards through producers. `P` matches an op and its operands by field order
(trailing ones may be left out), `Any` any value, `Const` a rank-0 constant, `Weight` a weight. A name binds;
the same name twice must be the same value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any as Anything
from typing import ClassVar

from .core import Graph, Op, Value
from .ops.math import Add, Cast, LogicalAnd, LogicalOr, Maximum, Minimum, Mul
from .ops.shape import Full

COMMUTATIVE: tuple[type[Op], ...] = (Add, Mul, Maximum, Minimum, LogicalAnd, LogicalOr)


class Match(dict[str, Anything]):
    """Bindings of one match: values by name, and `root`, the op at which the pattern ended."""

    root: Op

    def value(self, name: str) -> Value:
        return self[name]

    def op(self, name: str) -> Op:
        return self[name]

    def number(self, name: str) -> float:
        return float(self[name])


class Pattern:
    def match(self, value: Value, m: Match) -> bool:
        """Try to match; on failure bindings made meanwhile may remain, the caller passes a copy."""
        raise NotImplementedError("abstract: Pattern.match")


def _bind(m: Match, name: str, what: Anything) -> bool:
    if not name:
        return True
    if name in m:
        return m[name] is what or (isinstance(what, float) and m[name] == what)
    m[name] = what
    return True


class Any(Pattern):
    """Any value."""

    def __init__(self, name: str = "") -> None:
        self.name = name

    def match(self, value: Value, m: Match) -> bool:
        return _bind(m, self.name, value)


class Weight(Any):
    """A weight of the graph."""

    def match(self, value: Value, m: Match) -> bool:
        return value.is_weight and super().match(value, m)


class Const(Pattern):
    """A `full` of any shape; binds its number. `equals` asks for one number."""

    def __init__(self, name: str = "", equals: float | None = None) -> None:
        self.name, self.equals = name, equals

    def match(self, value: Value, m: Match) -> bool:
        number = constant(value)
        return (
            number is not None
            and (self.equals is None or number == self.equals)
            and _bind(m, self.name, number)
        )


class P(Pattern):
    """An op of one of the given classes; attributes given as keywords must be equal; `name` binds the op
    itself.

    `through` lists op classes (casts that change nothing) that may stand between this op and its user.
    """

    def __init__(
        self,
        kind: type[Op] | tuple[type[Op], ...],
        *operands: Pattern,
        name: str = "",
        **attributes: Anything,
    ) -> None:
        self.kind, self.operands, self.name, self.attributes = kind, operands, name, attributes

    def match(self, value: Value, m: Match) -> bool:
        op = value.producer
        while (
            op is not None
            and isinstance(op, Cast)
            and not isinstance(op, self.kind)
            and op.x.dtype == op.dtype
        ):
            op = op.x.producer
        return op is not None and self.match_op(op, m)

    def match_op(self, op: Op, m: Match) -> bool:
        if not isinstance(op, self.kind) or any(getattr(op, k) != v for k, v in self.attributes.items()):
            return False
        orders: list[Sequence[Pattern]] = [self.operands]
        if isinstance(op, COMMUTATIVE) and len(self.operands) == 2:
            orders.append(self.operands[::-1])
        fields = op.grouped(op.operands)
        for order in orders:
            trial = Match(m)
            if all(
                v is not None and not isinstance(v, list) and p.match(v, trial)
                for p, v in zip(order, fields, strict=False)
            ) and _bind(trial, self.name, op):
                m.update(trial)
                return True
        return False


class Or(Pattern):
    """The first alternative that matches."""

    def __init__(self, *alternatives: Pattern) -> None:
        self.alternatives = alternatives

    def match(self, value: Value, m: Match) -> bool:
        for p in self.alternatives:
            trial = Match(m)
            if p.match(value, trial):
                m.update(trial)
                return True
        return False


def constant(value: Value) -> float | None:
    """The number of a `full` (through casts and expands), else None."""
    op = value.producer
    casts: list[str] = []
    while op is not None and op.opname in ("cast", "expand", "reshape"):
        casts += [op.dtype] if isinstance(op, Cast) else []
        op = op.operands[0].producer
    if not isinstance(op, Full):
        return None
    number = float(op.value)
    for dtype in reversed(casts):  # 0.5 as an integer is 0
        if dtype == "bool":
            number = float(bool(number))
        elif not dtype.startswith(("float", "bfloat")):
            number = float(int(number)) if math.isfinite(number) else math.nan
    return number


class Rewriter:
    """What `rewrite` uses to make new ops: they go right before the matched root and inherit its location."""

    def __init__(self, graph: Graph, root: Op) -> None:
        self.graph, self.root = graph, root

    def insert(self, op: Op) -> Value:
        """Insert a one-result op before the root; its result."""
        op.loc = op.loc or self.root.loc
        self.graph.insert(op, before=self.root)
        return op.result

    def scalar(self, value: float, dtype: str = "float32") -> Value:
        return self.insert(Full(value=value, dtype=dtype))


class Rule:
    """Base of rewrite rules. The docstring shows before → after."""

    pattern: ClassVar[P]

    def check(self, found: Match) -> str | None:
        """None when the rewrite is right, else the sentence that says why it is refused."""
        return None

    def rewrite(self, found: Match, rw: Rewriter) -> Sequence[Value] | None:
        """Values that replace the root's results; None when the rule changed nothing after all."""
        raise NotImplementedError("abstract: Rule.rewrite")

    @property
    def name(self) -> str:
        return type(self).__name__


def single_use(graph: Graph, *values: Value) -> bool:
    """Whether each value has exactly one use and is no graph output."""
    return all(len(v.uses) == 1 and not graph.output_uses(v) for v in values)


def apply_rules(graph: Graph, rules: Sequence[Rule], *, limit: int = 64) -> tuple[int, list[str]]:
    """Sweep the rules over the graph until nothing changes.

    Returns: how many rewrites were made, and the sentences of checks that refused in the last sweep
    (deduplicated, in order).
    """
    total = 0
    notes: dict[str, None] = {}
    for _ in range(limit):
        changed = 0
        notes.clear()
        for op in graph.ops:
            if op.graph is None:
                continue
            for rule in rules:
                m = Match()
                m.root = op
                if not rule.pattern.match_op(op, m):
                    continue
                refusal = rule.check(m)
                if refusal is not None:
                    notes[f"{rule.name}: {refusal}" + (f" ({op.loc})" if op.loc else "")] = None
                    continue
                values = rule.rewrite(m, Rewriter(graph, op))
                if values is not None:
                    graph.replace(op, values)
                    changed += 1
                    break
        graph.drop_dead()
        total += changed
        if not changed:
            return total, list(notes)
    return total, [*notes, f"stopped after {limit} sweeps"]
