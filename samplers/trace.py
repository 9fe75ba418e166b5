"""A chain as a program of `decal.kernels.program`: the bodies of its rules, run once on a row that writes instructions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from decal.kernels.program import MOMENT_NAMES, TOP_SET_MOMENTS, Builder, Number, Program, Untraceable
from decal.kernels.statistics import STATISTICS
from decal.samplers.row import Affine, Band, BaseRow
from decal.samplers.rule import Step


class Traced(NamedTuple):
    """Steps as a program, and the per-row parameters that it wants as columns: of which step, and by which name."""

    steps: tuple[Step, ...]
    program: Program
    columns: tuple[tuple[Step, str], ...]

    def parameters(self) -> Tensor | None:
        """(B, columns) float64, or None if there are none."""
        columns = [cast(Tensor, step.values[name]).double() for step, name in self.columns]
        return torch.cat(columns, 1) if columns else None


def trace(steps: Sequence[Step]) -> Traced:
    """The program of ``steps``.

    Raises:
        Untraceable: a step does what programs can't, and says what.
    """
    builder = Builder()
    columns: list[tuple[Step, str]] = []
    for step in steps:
        if step.is_off:
            continue
        if step.rule.needs:
            raise Untraceable(f"{step.rule.name} reads {', '.join(sorted(step.rule.needs))}")
        values: dict[str, Any] = {}
        for name, v in step.values.items():
            if isinstance(v, Tensor):
                values[name] = builder.parameter()
                columns.append((step, name))
            else:
                values[name] = v if step.rule.params[name].static else builder.number(v)
        row = SymbolicRow(builder, step.rule.reads)
        try:
            answer = step.settle(cast(BaseRow, row), values)
        except Exception as error:
            # The body has run on tensors when it was declared, so whatever it misses here is what programs don't have.
            raise Untraceable(f"{step.rule.name}: {error}") from None
        if isinstance(answer, Affine):
            builder.affine(builder.number(answer.scale), builder.number(answer.shift))
        elif isinstance(answer, Band) and not answer.spared:
            builder.band(builder.number(answer.low), builder.number(answer.high))
        else:
            raise Untraceable(f"{step.rule.name} looks at single tokens")
    return Traced(tuple(steps), builder.program(), tuple(columns))


class _Symbolic(BaseRow):
    """Statistics whose sums are registers. What isn't in the logits isn't there."""

    def __init__(self, builder: Builder):
        super().__init__()
        self._builder = builder

    def __getattr__(self, name: str) -> Any:
        if name not in STATISTICS:
            raise Untraceable(f"it uses row.{name}")
        return super().__getattr__(name)

    def _reference(self) -> Any:
        return self.max

    @property
    def max(self) -> Any:
        return self._builder.peak()


def _untraceable(name: str) -> Any:
    def refuse(self: Any, *_: Any, **__: Any) -> Any:
        raise Untraceable(f"it uses row.{name}")

    return refuse


class _Searched(_Symbolic):
    """Top sets of every size."""

    def longest(self, score: Callable[[Any], Any], *, at_least: Any = None, at_most: Any = None) -> Any:
        bound, sense = (at_least, 1) if at_most is None else (at_most, -1)
        return self._builder.search(self._scored(score), self._builder.number(bound), sense)

    def _scored(self, score: Callable[[Any], Any]) -> Callable[[int], tuple[Number, Sequence[str]]]:
        def write(base: int) -> tuple[Number, Sequence[str]]:
            top = SymbolicTopSet(self._builder, base, self)
            return self._builder.number(score(top)), sorted(top.read)

        return write


class SymbolicRow(_Searched):
    """A row that writes what is asked of it. ``reads`` are the names of statistics that the rule is known to ask for, which are
    summed at once."""

    def __init__(self, builder: Builder, reads: frozenset[str] = frozenset()):
        super().__init__(builder)
        self._wanted = {m for name in reads if name in STATISTICS for m in STATISTICS[name].moments}

    def _moments(self, names: list[str]) -> Mapping[str, Any]:
        if not names:
            return {}
        return self._builder.moments(sorted({*names, *(self._wanted - set(self._sums))}))

    @property
    def min(self) -> Any:
        return self.smallest_from(cast(Tensor, self._builder.number(-torch.finfo(torch.float64).max)))

    def upper(self, *, count: Any = None, mass: Any = None) -> Any:
        return self._builder.count_upper(count) if mass is None else self._builder.mass_upper(mass)

    def nearest(self, center: Any, mass: Any) -> Band:
        number = self._builder.number
        return Band(*cast(tuple[Tensor, Tensor], self._builder.nearest(number(center), number(mass))))

    def smallest_from(self, level: Tensor) -> Any:
        return self._builder.smallest(level)

    def best(self, score: Callable[[Any], Any], *, later: Callable[[Any], Any] | None = None) -> Any:
        return self._builder.search(self._scored(score), later=self._scored(later) if later else None)

    def head(self, size: int) -> SymbolicHead:
        return SymbolicHead(self._builder, size)

    ranked = per_token = is_one_of = chance = _untraceable("anything of single tokens")
    history = state = weights = guide = views = property(_untraceable("anything but the logits"))


class SymbolicHead(_Searched):
    """The most probable tokens of a row: what a search for the top set of that many leaves in its registers."""

    def __init__(self, builder: Builder, size: int):
        super().__init__(builder)

        def write(base: int) -> tuple[Number, Sequence[str]]:
            self._base = base
            return Number(builder, base + TOP_SET_MOMENTS), MOMENT_NAMES  # the first of them is the count

        builder.search(write, builder.number(size), -1)

    def _moments(self, names: list[str]) -> Mapping[str, Any]:
        return _moments_of(self._builder, self._base, names)

    def longest(self, score: Callable[[Any], Any], *, at_least: Any = None, at_most: Any = None) -> Any:
        return super().longest(score, at_least=at_least, at_most=at_most).minimum(self.count)


def _moments_of(builder: Builder, base: int, names: Sequence[str]) -> dict[str, Number]:
    """Moments of the top set whose registers begin at ``base``."""
    return {name: Number(builder, base + TOP_SET_MOMENTS + MOMENT_NAMES.index(name)) for name in names}


class SymbolicTopSet(_Symbolic):
    """The registers of a top set; see `decal.samplers.row.TopSets`. ``row`` is what it is a part of."""

    def __init__(self, builder: Builder, base: int, row: _Searched):
        super().__init__(builder)
        self._base, self._row, self.read = base, row, set[str]()
        self.value = Number(builder, base)

    def _moments(self, names: list[str]) -> Mapping[str, Any]:
        self.read.update(names)
        return _moments_of(self._builder, self._base, names)

    @property
    def mass(self) -> Any:
        return (self.logz - self._row.logz).exp()

    @property
    def least(self) -> Any:
        return self._whole.min

    @property
    def below(self) -> Any:
        return self._known(1)

    @property
    def curvature(self) -> Any:
        return self._known(2) / self._whole._builder.curvature()

    def _known(self, place: int) -> Number:
        return Number(self._whole._builder, self._base + place)

    @property
    def _whole(self) -> SymbolicRow:
        """What the top sets are of, with all that lies behind them."""
        if not isinstance(self._row, SymbolicRow):
            raise Untraceable("it asks the top sets of a head for what lies behind them")
        return self._row
