"""Declare a rule: one function of row statistics, with its parameters; everything else is derived from it.

    @rule(paper="arXiv:2407.01082")
    def min_p(row, p=Param(0.1, low=0, high=1, off=0.0)):
        "Keep tokens at least ``p`` times as probable as the most probable one."
        return row.max + torch.log(p)

The body sees a `Row` and its parameters as (B, 1) or (1, 1) tensors. What it returns says what kind of rule it is: a tensor
is the lowest logit kept (*truncation*), a `Band` the lowest and highest one (*band*), an `Affine` a map (*reshaping*).
"""

from __future__ import annotations

import difflib
import inspect
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from decal.kernels import reference
from decal.samplers.errors import DecalError
from decal.samplers.row import Affine, Band, BaseRow, DenseRow

if TYPE_CHECKING:
    from decal.samplers.chain import Chain

Value = float | int | Tensor
Answer = Tensor | Band | Affine


@dataclass(frozen=True)
class Parameter:
    """Declaration of one parameter: allowed are [low, high] and ``off``, the value at which the rule does nothing."""

    default: float
    low: float
    high: float
    off: float
    integer: bool
    sweep: tuple[float, ...]

    @property
    def allowed(self) -> str:
        end = f"{self.high:g}]" if math.isfinite(self.high) else "inf)"
        inside = self.low <= self.off <= self.high and math.isfinite(self.off)
        return f"{'an integer ' if self.integer else ''}in [{self.low:g}, {end}" + (
            f" ({self.off:g} = off)" if inside else f" (or {self.off:g} = off)"
        )

    def check(self, where: str, value: Any) -> Value:
        """``value`` as a float, an int or a (B, 1) tensor. Raises DecalError naming ``where`` if it isn't allowed."""
        if isinstance(value, Tensor):
            return self._check_tensor(where, value)
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise DecalError(f"{where} must be a number {self.allowed} or a (B, 1) tensor of them, got {value!r}")
        try:
            admitted = self._admits(float(value))
        except OverflowError:
            admitted = False
        if not admitted:
            raise DecalError(f"{where} must be {self.allowed}, got {value!r}")
        return int(float(value)) if self.integer else float(value)

    def _admits(self, value: float) -> bool:
        inside = math.isfinite(value) and self.low <= value <= self.high
        return value == self.off or (inside and (not self.integer or value == math.floor(value)))

    def _check_tensor(self, where: str, value: Tensor) -> Tensor:
        if value.dim() != 2 or value.shape[1] != 1 or value.shape[0] == 0:
            raise DecalError(f"{where} as a tensor must have shape (B, 1), one value per row, got {tuple(value.shape)}")
        if value.is_complex() or value.dtype == torch.bool:
            raise DecalError(f"{where} as a tensor must hold numbers, got {value.dtype}")
        for row, number in enumerate(value[:, 0].tolist()):
            if not self._admits(float(number)):
                raise DecalError(f"{where} must be {self.allowed}, got {number!r} in row {row}")
        return value.detach()


def Param(
    default: float, *, low: float, off: float, high: float = math.inf, integer: bool = False, sweep: tuple[float, ...] = ()
) -> Any:
    """Default value of a rule's argument that declares it.

    Args:
        default: the literature's value.
        low, high: the allowed closed interval.
        off: the value at which the rule changes nothing; allowed even outside the interval.
        integer: whole numbers only.
        sweep: values worth comparing; the evaluator's default grid.
    """
    return Parameter(float(default), low, high, off, integer, sweep)


@dataclass(frozen=True, eq=False)
class Rule:
    """A decoding rule. Calling it with parameter values gives a `Chain` of one step.

    Attributes:
        name: the literature's name; also its name in text form.
        body: the formula.
        params: parameters by name, in order.
        paper: where it was published.
    """

    name: str
    body: Callable[..., Answer]
    params: Mapping[str, Parameter]
    paper: str

    def __post_init__(self) -> None:
        allowed = "\n".join(f"    {name}: {p.allowed}; default {p.default:g}" for name, p in self.params.items())
        object.__setattr__(
            self, "__doc__", f"{inspect.getdoc(self.body)}\n\nParameters:\n{allowed or '    none'}\n\nPaper: {self.paper}"
        )
        object.__setattr__(self, "__name__", self.name)
        shown = [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=p.default)
            for name, p in self.params.items()
        ]
        object.__setattr__(self, "__signature__", inspect.Signature(shown))

    def __call__(self, /, *args: Any, **kwargs: Any) -> Chain:
        from decal.samplers.chain import Chain

        return Chain((self.step(*args, **kwargs),))

    def __reduce__(self) -> tuple[Any, ...]:
        return find, (self.name,)

    def __repr__(self) -> str:
        return f"<rule {self.name}({', '.join(f'{k}={v.default:g}' for k, v in self.params.items())}), {self.paper}>"

    @property
    def summary(self) -> str:
        """First line of the docstring: the kept set in words."""
        return (inspect.getdoc(self.body) or "").split("\n")[0]

    def step(self, /, *args: Any, **kwargs: Any) -> Step:
        """Bind and check parameter values. Raises DecalError."""
        names = list(self.params)
        if len(args) > len(names):
            raise DecalError(f"{self.name} takes at most {len(names)} parameters ({', '.join(names)}), got {len(args)}")
        given = dict(zip(names, args, strict=False))
        for name, value in kwargs.items():
            if name not in self.params:
                raise DecalError(f"{self.name} has no parameter {name!r}; it has {', '.join(names) or 'none'}")
            if name in given:
                raise DecalError(f"{self.name}: {name} was given twice")
            given[name] = value
        values = {
            name: param.check(f"{self.name}: {name}", given.get(name, param.default)) for name, param in self.params.items()
        }
        return Step(self, values)

    @cached_property
    def _trace(self) -> tuple[Answer, frozenset[str]]:
        row = DenseRow(torch.tensor([[0.0, -1.0]], dtype=torch.float64), reference)
        values = {name: torch.tensor([[p.default]], dtype=torch.float64) for name, p in self.params.items()}
        answer = self.body(row, **values)
        # Unlike what is computed from it, the k-th largest as the threshold itself survives earlier cuts.
        reads = row.reads - {"upper(count)"} | {"k-th largest"} if answer is row.kth else row.reads
        return answer, frozenset(reads)

    @property
    def reads(self) -> frozenset[str]:
        """Names of the row statistics the body asks for."""
        return self._trace[1]

    @property
    def kind(self) -> str:
        """``truncation``, ``band`` or ``reshaping``."""
        answer = self._trace[0]
        return "band" if isinstance(answer, Band) else "reshaping" if isinstance(answer, Affine) else "truncation"


@dataclass(frozen=True, eq=False)
class Step:
    """A rule with its parameter values: floats, or (B, 1) tensors with one value per row."""

    rule: Rule
    values: Mapping[str, Value]

    @property
    def per_row(self) -> int | None:
        """Number of rows the parameters are given for, or None if they are the same for every row."""
        sizes = {len(v) for v in self.values.values() if isinstance(v, Tensor)}
        if len(sizes) > 1:
            raise DecalError(f"{self.rule.name}: parameters are given for different numbers of rows: {sorted(sizes)}")
        return next(iter(sizes), None)

    @property
    def is_off(self) -> bool:
        """Whether the values switch the rule off in every row."""
        return bool(self.values) and all(
            bool((v == p.off).all()) if isinstance(v, Tensor) else v == p.off
            for v, p in zip(self.values.values(), self.rule.params.values(), strict=True)
        )

    def answer(self, row: BaseRow, like: Tensor) -> Band | Affine:
        """The body's answer for ``row``, never dropping what must stay: rows switched off are left alone, and a truncation
        keeps the most probable token. ``like`` gives device and dtype."""
        values = {
            name: v.to(like) if isinstance(v, Tensor) else torch.full((1, 1), float(v), dtype=like.dtype, device=like.device)
            for name, v in self.values.items()
        }
        answer = self.rule.body(row, **values)
        off = reduce(
            torch.logical_and,
            (values[name] == param.off for name, param in self.rule.params.items()),
            torch.tensor(bool(values), device=like.device),
        )
        if isinstance(answer, Affine):
            return Affine(torch.where(off, 1.0, answer.scale), torch.where(off, 0.0, answer.shift))
        low, high = answer if isinstance(answer, Band) else (answer.minimum(row.max), torch.full_like(answer, torch.inf))
        return Band(torch.where(off, -torch.inf, low), torch.where(off, torch.inf, high))

    def __str__(self) -> str:
        return f"{self.rule.name}({', '.join(_text(v, self.rule.params[n].integer) for n, v in self.values.items())})"


def _text(value: Value, integer: bool) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return repr([int(v) if integer and math.isfinite(v) else float(v) for v in value[:, 0].tolist()])


RULES: dict[str, Rule] = {}
"""Every declared rule by name."""


def rule(*, paper: str) -> Callable[[Callable[..., Answer]], Rule]:
    """Declare the decorated function as a rule named after it. Raises DecalError if the name is taken."""

    def declare(body: Callable[..., Answer]) -> Rule:
        arguments = list(inspect.signature(body).parameters.values())[1:]
        for argument in arguments:
            if not isinstance(argument.default, Parameter):
                raise DecalError(f"rule {body.__name__}: argument {argument.name!r} needs a Param(...) as its default")
        if body.__name__ in RULES:
            raise DecalError(f"rule {body.__name__} is declared already, in {RULES[body.__name__].body.__module__}")
        declared = Rule(body.__name__, body, {a.name: a.default for a in arguments}, paper)
        for name, param in declared.params.items():
            for value in (param.default, *param.sweep):
                param.check(f"rule {declared.name}: default and sweep of {name}", value)
        # A body that fails does so here, not in the middle of generation.
        answer = declared._trace[0]
        if not isinstance(answer, (Tensor, Band, Affine)):
            raise DecalError(f"rule {declared.name} must return a tensor, a Band or an Affine, got {type(answer).__name__}")
        RULES[declared.name] = declared
        return declared

    return declare


def find(name: str) -> Rule:
    """The rule called ``name``. Raises DecalError that names near misses."""
    if isinstance(name, str) and name in RULES:
        return RULES[name]
    near = difflib.get_close_matches(str(name), RULES, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise DecalError(f"unknown sampler {name!r}{hint} (known: {', '.join(sorted(RULES))})")
