"""Chains of steps: composition in an explicit order, plan, text and JSON form, and what runs.

Steps are applied left to right, each to the survivors of the one before; temperature is a step like any other.
"""

from __future__ import annotations

import ast
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch import Tensor

from decal.kernels.dispatch import choose
from decal.samplers.errors import DecalError
from decal.samplers.row import DenseRow
from decal.samplers.rule import Rule, Step, find

if TYPE_CHECKING:
    from decal.samplers.processor import ChainProcessor

SURVIVES_CUT = frozenset({"max", "k-th largest"})
"""What a truncation leaves unchanged, as far as a later truncation is concerned: the largest logit, and a threshold at the k-th
largest (where fewer than k tokens are left, the earlier cut is the stricter one)."""


@dataclass
class Pass:
    """Steps that share one reading of the rows: maps folded into the read, cuts, and maps folded into the write."""

    read: list[Step] = field(default_factory=list)
    cut: list[Step] = field(default_factory=list)
    write: list[Step] = field(default_factory=list)
    reason: str = "first read of the logits"

    def refuses(self, step: Step) -> str | None:
        """Why ``step`` can't join this pass, or None if it can."""
        reads = step.rule.reads
        if step.rule.kind != "reshaping" and self.write:
            return f"{step.rule.name} cuts what {self.write[-1].rule.name} has reshaped"
        if step.rule.kind == "reshaping" and self.write and reads:
            return f"{step.rule.name} reads what {self.write[-1].rule.name} has reshaped"
        for earlier in self.cut:
            # A truncation may not drop the mode, so it reads the largest logit, which a band may have dropped.
            needed = reads | {"max"} if step.rule.kind == "truncation" else reads
            changed = needed if earlier.rule.kind == "band" else needed - SURVIVES_CUT
            if changed:
                return f"{step.rule.name} reads {', '.join(sorted(changed))}, which {earlier.rule.name} changes"
        return None

    def add(self, step: Step) -> None:
        if step.rule.kind != "reshaping":
            self.cut.append(step)
        elif self.cut or step.rule.reads or self.write:
            self.write.append(step)
        else:
            self.read.append(step)


@dataclass(frozen=True, eq=False)
class Chain:
    """Decoding steps in order. Build one with ``|``: ``temperature(1.4) | min_p(0.1)``.

    Two chains are equal if their text forms are.
    """

    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        if not self.steps:
            raise DecalError("a chain needs at least one step; temperature(1) changes nothing")
        sizes = {str(s): s.per_row for s in self.steps if s.per_row is not None}
        if len(set(sizes.values())) > 1:
            given = ", ".join(f"{step} for {size}" for step, size in sizes.items())
            raise DecalError(f"the steps of a chain are given for different numbers of rows: {given}")

    def __or__(self, other: Chain | Rule) -> Chain:
        if isinstance(other, Rule):
            other = other()
        if not isinstance(other, Chain):
            return NotImplemented
        return Chain(self.steps + other.steps)

    def __str__(self) -> str:
        return " | ".join(map(str, self.steps))

    def __repr__(self) -> str:
        return str(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Chain) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    @property
    def per_row(self) -> int | None:
        """Number of rows its parameters are given for, or None if every row has the same."""
        return next((s.per_row for s in self.steps if s.per_row is not None), None)

    def mask(self, logits: Tensor, *, check: bool = True) -> Tensor:
        """The logits with dropped tokens at -inf and kept ones untouched.

        Args:
            logits: (B, V), any floating type.
            check: raise on rows that no model should produce (NaN, +inf, nothing finite). Without it, which saves a
                synchronisation on GPUs, NaN counts as dropped, +inf as the largest finite value, and a row with nothing
                finite comes back as it is.

        Returns:
            (B, V) in the type of ``logits``.

        Raises:
            DecalError: wrong shape or type, bad values, or per-row parameters for another number of rows.
        """
        return self._masked(logits, self._run(logits, check))

    def __call__(self, logits: Tensor, *, check: bool = True) -> Tensor:
        """The logits with every step applied: dropped tokens at -inf, kept ones reshaped. Arguments as in `mask`."""
        processed = self._run(logits, check)
        if all(s.rule.kind != "reshaping" or s.is_off for s in self.steps):
            return self._masked(logits, processed)
        return choose().module.narrow(processed, logits.dtype)

    @staticmethod
    def _masked(logits: Tensor, processed: Tensor) -> Tensor:
        return logits.masked_fill(processed.isneginf(), -torch.inf)

    def _run(self, logits: Tensor, check: bool) -> Tensor:
        self._admit(logits, check)
        backend = choose().module
        z_BV = backend.clean(logits)
        for one in self.plan:
            for step in one.read:
                z_BV = backend.affine(z_BV, *step.answer(DenseRow(z_BV, backend), z_BV))
            row = DenseRow(z_BV, backend)
            low, high = torch.tensor(-torch.inf).to(z_BV), torch.tensor(torch.inf).to(z_BV)
            for step in one.cut:
                bounds = step.answer(row, z_BV)
                low, high = low.maximum(bounds[0]), high.minimum(bounds[1])
            if one.cut:
                z_BV = backend.keep_between(z_BV, low, high)
            for step in one.write:
                z_BV = backend.affine(z_BV, *step.answer(row, z_BV))
        return z_BV

    def _admit(self, logits: Tensor, check: bool) -> None:
        if not isinstance(logits, Tensor) or logits.dim() != 2 or not logits.is_floating_point() or 0 in logits.shape:
            got = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise DecalError(f"logits must be a floating-point tensor of shape (B, V), got {got}")
        if self.per_row not in (None, len(logits)):
            raise DecalError(f"the chain has parameters for {self.per_row} rows, the logits have {len(logits)}")
        if not check:
            return
        bad = logits.isnan() | logits.isposinf()
        if bad.any():
            row, token = bad.nonzero()[0].tolist()
            raise DecalError(f"logits must be finite or -inf, got {logits[row, token].item()} in row {row} at token {token}")
        empty = ~logits.isfinite().any(-1)
        if empty.any():
            raise DecalError(f"every row of logits needs a finite value, row {int(empty.nonzero()[0])} has none")

    @cached_property
    def plan(self) -> tuple[Pass, ...]:
        """Passes over the vocabulary: a new one begins only where a step reads what an earlier one has changed."""
        passes: list[Pass] = [Pass()]
        for step in self.steps:
            if step.is_off:
                continue
            reason = passes[-1].refuses(step)
            if reason:
                passes.append(Pass(reason=reason))
            passes[-1].add(step)
        return tuple(passes)

    def explain(self, file: TextIO | None = None) -> None:
        """Print what runs, in which order, in how many passes, on which backend, and why."""
        backend = choose()
        lines = [str(self)]
        for number, one in enumerate(self.plan, 1):
            lines.append(f"  pass {number}: {one.reason}")
            for role, steps in (("on reading", one.read), ("cut", one.cut), ("on writing", one.write)):
                for step in steps:
                    reads = ", ".join(sorted(step.rule.reads)) or "nothing"
                    lines.append(f"    {role:<10}  {step!s:<24}  {step.rule.summary}  [reads {reads}]")
        lines += [f"  off: {step}" for step in self.steps if step.is_off]
        lines.append(f"  backend: {backend.name} ({backend.reason})")
        print("\n".join(lines), file=file or sys.stdout)

    def to_json(self) -> str:
        """JSON form; `from_json` reads it back. Per-row parameters are lists, infinity is the string "inf"."""
        steps = [{"rule": s.rule.name, **{name: _plain(value) for name, value in s.values.items()}} for s in self.steps]
        return json.dumps({"chain": steps}, allow_nan=False)

    def processor(self) -> ChainProcessor:
        """The chain as a transformers ``LogitsProcessor``. Needs transformers."""
        from decal.samplers.processor import ChainProcessor

        return ChainProcessor(self)

    def generate_kwargs(self, **kwargs: Any) -> dict[str, Any]:
        """Arguments for ``model.generate`` under which this chain alone decides the distribution.

        They carry the processor and neutralise every built-in warper, penalty, bias and guidance, whatever the model's own
        generation config says; what it bans or demands (``bad_words_ids``, ``min_length``, a watermark) stays. ``kwargs`` are
        added (``max_new_tokens=20``).

        Raises:
            DecalError: a keyword would reshape the distribution beside the chain.
        """
        from decal.samplers.processor import generate_kwargs

        return generate_kwargs(self, kwargs)


def _plain(value: float | int | Tensor) -> Any:
    if isinstance(value, Tensor):
        return [_plain(v) for v in value[:, 0].tolist()]
    return "inf" if value == math.inf else value


def parse(text: str) -> Chain:
    """The chain written as ``"temperature(1.4) | min_p(0.1)"``; ``str(chain)`` gives such a text back.

    Values are numbers, ``inf``, or a list with one number per row. A rule with default values needs no brackets.

    Raises:
        DecalError: not of this form, an unknown rule or parameter, or a value out of range.
    """
    if not isinstance(text, str):
        raise DecalError(f"parse takes a text such as 'min_p(0.1)', got {type(text).__name__}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        steps = tuple(_parse_steps(tree, text))
    except DecalError:
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise DecalError(f"a chain is written rule(value) | rule(value) | ..., got {text!r}") from None
    return Chain(steps)


def _parse_steps(node: ast.expr, text: str) -> list[Step]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _parse_steps(node.left, text) + _parse_steps(node.right, text)
    if isinstance(node, ast.Name):
        return [find(node.id).step()]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords):
            raise DecalError(f"{node.func.id}: * and ** have no meaning in a chain's text, got {text!r}")
        rule = find(node.func.id)
        names = [k.arg for k in node.keywords]
        for name in names:
            if names.count(name) > 1:
                raise DecalError(f"{rule.name}: {name} was given twice")
        args = [_parse_value(a, rule.name) for a in node.args]
        return [rule.step(*args, **{str(k.arg): _parse_value(k.value, rule.name) for k in node.keywords})]
    raise DecalError(f"a chain is written rule(value) | rule(value) | ..., got {ast.unparse(node)!r} in {text!r}")


def _parse_value(node: ast.expr, rule: str) -> Any:
    if isinstance(node, ast.Name) and node.id in ("inf", "nan"):
        return float(node.id)
    if isinstance(node, ast.List):
        return _column([_parse_value(element, rule) for element in node.elts], rule)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        raise DecalError(f"{rule}: a value must be a number, inf, or a list of them, got {ast.unparse(node)}") from None


def _column(values: Iterable[Any], rule: str) -> Tensor:
    column = list(values)
    if not column or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in column):
        raise DecalError(f"{rule}: a list must hold one number per row, got {column!r}")
    return torch.tensor(column, dtype=torch.float64)[:, None]


def from_json(text: str) -> Chain:
    """The chain that `Chain.to_json` wrote.

    Raises:
        DecalError: not of that form, an unknown rule or parameter, or a value out of range.
    """
    try:
        steps = json.loads(text)["chain"]
        named = [(step["rule"], {k: v for k, v in step.items() if k != "rule"}) for step in steps]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise DecalError(f'a chain in JSON is {{"chain": [{{"rule": name, parameter: value}}, ...]}}, got {text!r}') from None
    return Chain(tuple(find(name).step(**{k: _unplain(v, name) for k, v in values.items()}) for name, values in named))


def _unplain(value: Any, rule: str) -> Any:
    if isinstance(value, list):
        return _column([_unplain(v, rule) for v in value], rule)
    return math.inf if value == "inf" else value
