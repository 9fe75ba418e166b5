"""Rules on sorted rows: after one sort, any setting costs a few look-ups per row instead of a pass over the vocabulary.

A cut keeps a contiguous range of a ranking, and a temperature doesn't change the ranking. So a row that has gone through any
number of steps is a scale and a range ``[lo, hi)`` of positions, its moments are differences of running sums, and the rules'
own bodies run on it unchanged. Positions and sums are exact, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from decal.kernels import reference
from decal.kernels.dispatch import choose
from decal.kernels.statistics import MOMENTS, STATISTICS
from decal.samplers.chain import transform
from decal.samplers.context import Context
from decal.samplers.errors import DecalError
from decal.samplers.row import Affine, Band, BaseRow, DenseRow, Map, Ranking
from decal.samplers.rule import Rule, Step

POWER = {"n": 0, "a": 1, "b": 2}
"""Moments that are powers of the scale times those at scale 1."""


def constant_scale(step: Step) -> float | None:
    """The factor by which a reshaping step multiplies any row's logits, or None if that depends on the row."""
    if step.rule.tokenwise or step.rule.needs:
        return None
    probes = torch.tensor([[0.0, -1.0], [0.0, -1.0]], dtype=torch.float64)
    answer = step.answer(DenseRow(probes, reference), probes)
    # What is computed from the parameters alone has one row, what is computed from the rows has as many as they.
    return float(answer.scale) if isinstance(answer, Affine) and answer.scale.shape[0] == 1 else None


def scale_after(steps: Sequence[Step]) -> float | None:
    """By how much any row is multiplied in ``steps``, or None if that depends on the row or is beyond floats."""
    scales = table_scales(steps, last=True)
    return None if scales is None else scales[-1]


def table_scales(steps: Sequence[Step], last: bool = False) -> list[float] | None:
    """Scales at which some step reads whole rows, and with ``last`` the one rows end at; see `RankedBlock`.

    None with ``last``, if that depends on the row or is beyond floats.
    """
    scale: float | None = 1.0
    found, whole = [1.0], True
    for step in steps:
        if step.is_off:
            continue
        if step.rule.kind == "reshaping":
            factor = constant_scale(step)
            # An infinite scale leaves the modes, at whatever scale.
            if scale is not None and factor != np.inf:
                scale = None if factor is None or not np.isfinite(scale * factor) else scale * factor
            whole = whole and factor is not None and np.isfinite(factor)
        elif whole and scale is not None:
            found.append(scale)
            whole = False
    if not last:
        return found
    return None if scale is None else [*found, scale]


def moments_of(rules: Iterable[Rule]) -> set[str]:
    """Moments that have to be summed for ``rules``; ``s``, the mass, always."""
    return {"s"}.union(
        *(
            STATISTICS[name].moments
            for rule in rules
            if rule.prunes or not rule.tokenwise
            for name in rule.reads
            if name in STATISTICS
        )
    )


def first(true_from: Callable[[Tensor], Tensor], lo: Tensor, hi: Tensor) -> Tensor:
    """Smallest i in [lo, hi) where ``true_from(i)`` holds, else hi; it must hold for all larger ones too. Elementwise."""
    lo, hi = lo.clone(), hi.clone()
    for _ in range(int((hi - lo).max().clamp(min=0)).bit_length() if len(lo) else 0):
        middle = (lo + hi) // 2
        open_ = lo < hi
        holds = true_from(middle)
        hi = torch.where(open_ & holds, middle, hi)
        lo = torch.where(open_ & ~holds, middle + 1, lo)
    return lo


def plain(logits: Tensor) -> Tensor:
    """``logits`` on the CPU, as float64 if they are that and else as float32, which holds every smaller type exactly."""
    return logits.cpu() if logits.dtype == torch.float64 else logits.float().cpu()


class RankedBlock:
    """A block of R rows in decreasing order, with running sums of every needed moment at every needed scale.

    Args:
        logits: (R, V), any floating type, -inf where a token doesn't exist.
        scales: all scales that will occur.
        moments: all moments that will be needed.
        named: whether anything asks which token stands at a position.
    """

    def __init__(self, logits: Tensor, scales: Sequence[float], moments: set[str], named: bool = False):
        values = plain(logits).numpy()
        # numpy's sort of float32 is several times faster than torch's, and than any that gives the order.
        self.order = torch.from_numpy(np.argsort(-values, axis=-1, kind="stable")) if named else None
        ranked = -np.sort(-values, axis=-1)
        level = torch.from_numpy(ranked).double()
        if not bool(level[:, 0].isfinite().all()):
            raise DecalError("the model gave a row of logits with NaN, +inf or nothing finite")
        self.top = level[:, :1].clone()
        level -= self.top
        self.rows, self.width = level.shape
        self.alive = level.isfinite().sum(-1)
        self.scales = torch.tensor(sorted(set(scales)), dtype=torch.float64)
        self.level = level.flatten()
        kernels = choose("cpu").module or reference
        level = level.masked_fill(level.isneginf(), 0.0)
        size = self.rows, self.width + 1
        self._tables = {
            name: torch.empty((1 if name in POWER else len(self.scales), *size), dtype=torch.float64) for name in moments
        }
        for table in self._tables.values():
            table[..., 0] = 0.0
        for name in moments & set(POWER):
            torch.cumsum(MOMENTS[name](level, level), -1, out=self._tables[name][0, :, 1:])
        for index, scale in enumerate(self.scales):
            tables = {name: self._tables[name][index] for name in moments - set(POWER)}
            kernels.running_sums(self.level.view(size[0], -1), self.alive, float(scale), tables)
        self._tables = {name: table.flatten() for name, table in self._tables.items()}

    def has(self, scale: Tensor) -> bool:
        """Whether there are tables for every one of these scales."""
        return bool(torch.isclose(self.scales[self._nearest(scale)], scale, rtol=1e-9, atol=0).all())

    def scale_index(self, scale: Tensor) -> Tensor:
        """Where each scale stands in ``scales``."""
        index = self._nearest(scale)
        if not torch.allclose(self.scales[index], scale, rtol=1e-9, atol=0):
            raise ValueError("a row came to a scale that the block was not made for")
        return index

    def _nearest(self, scale: Tensor) -> Tensor:
        index = torch.searchsorted(self.scales, scale)
        near = self.scales[index.clamp(max=len(self.scales) - 1)]
        below = self.scales[(index - 1).clamp(min=0)]
        return torch.where((near - scale).abs() <= (below - scale).abs(), index, index - 1).clamp(0, len(self.scales) - 1)

    def at(self, row: Tensor, position: Tensor) -> Tensor:
        """Logit below the row's largest, at scale 1."""
        return self.level[row * self.width + position.clamp(0, self.width - 1)]

    def running(self, name: str, scale: Tensor, row: Tensor, position: Tensor) -> Tensor:
        """Sum of a moment over the first ``position`` tokens, at scale number ``scale``."""
        width = self.width + 1
        if name in POWER:
            return self._tables[name][row * width + position] * self.scales[scale] ** POWER[name]
        return self._tables[name][(scale * self.rows + row) * width + position]

    def position(self, row: Tensor, level: Tensor) -> Tensor:
        """Position of the first token as low as ``level``."""
        return first(lambda i: self.at(row, i) <= level, torch.zeros_like(row), self.alive[row])


class RankedRow(BaseRow):
    """B rows as the rules see them: row ``row`` of a block at scale number ``scale``, positions [lo, hi); all of shape (B,)."""

    ISOLATED = 1e-3
    """A range with less than this share of the mass ranked above it would lose digits as a difference of running sums."""

    def __init__(
        self,
        block: RankedBlock,
        row: Tensor,
        scale: Tensor,
        lo: Tensor,
        hi: Tensor,
        context: Context | None = None,
        state: Mapping[str, Tensor] | None = None,
    ):
        super().__init__(context, state)
        self.block, self.row, self.scale, self.lo, self.hi = block, row, scale, lo, hi
        self.place = row
        above = block.running("s", scale, row, lo)
        within = block.running("s", scale, row, hi) - above
        self._apart = (within < self.ISOLATED * above).nonzero()[:, 0]
        self._own: dict[str, Tensor] = {}
        self.reference = torch.zeros(len(row), dtype=torch.float64)
        self.reference[self._apart] = self.value(lo)[self._apart]

    def value(self, position: Tensor) -> Tensor:
        """Logit at a position."""
        return self.block.scales[self.scale] * self.block.at(self.row, position)

    def mass(self, lo: Tensor, hi: Tensor) -> Tensor:
        """Probability of positions [lo, hi) times a constant of the row, which exp(value - reference) has too."""
        return self._running("s", hi) - self._running("s", lo)

    def _running(self, name: str, position: Tensor) -> Tensor:
        sums = self.block.running(name, self.scale, self.row, position)
        if len(self._apart):
            apart = self._apart
            inside = (position - self.lo)[apart].clamp(min=0)
            table = self._own_table(name)
            sums[apart] = table.gather(1, inside.clamp(max=table.shape[1] - 1)[:, None])[:, 0]
        return sums

    def _own_table(self, name: str) -> Tensor:
        """Running sums of the isolated ranges from their own start, relative to their own largest logit."""
        if name not in self._own:
            apart = self._apart
            length = (self.hi - self.lo)[apart, None]
            step = torch.arange(int(length.max()))
            position = torch.minimum(self.lo[apart, None] + step, self.hi[apart, None] - 1)
            level = self.block.at(self.row[apart, None], position)
            d = self.block.scales[self.scale[apart, None]] * (level - level[:, :1])
            summand = torch.where(step < length, MOMENTS[name](d, d.exp()), 0.0)
            self._own[name] = torch.nn.functional.pad(summand.cumsum(-1), (1, 0))
        return self._own[name]

    def _moments(self, names: list[str]) -> Mapping[str, Tensor]:
        return {name: (self._running(name, self.hi) - self._running(name, self.lo))[:, None] for name in names}

    def _reference(self) -> Tensor:
        return self.reference[:, None]

    @property
    def max(self) -> Tensor:
        return self.value(self.lo)[:, None]

    def upper(self, *, count: Tensor | None = None, mass: Tensor | None = None) -> Tensor:
        if count is not None:
            # Counts may be too large for an integer.
            last = torch.minimum(self.lo + count[:, 0].clamp(max=self.block.width).long(), self.hi) - 1
        else:
            assert mass is not None
            target = mass[:, 0] * self.mass(self.lo, self.hi)
            last = first(lambda i: self.mass(self.lo, i + 1) >= target, self.lo, self.hi - 1)
        return self.value(torch.maximum(last, self.lo))[:, None]

    @property
    def min(self) -> Tensor:
        return self.value(self.hi - 1)[:, None]

    @property
    def tokens(self) -> Tensor | None:
        return None  # rules that ask for single tokens are run on `CompactRow`

    def smallest_from(self, level: Tensor) -> Tensor:
        below = first(lambda i: self.value(i) < level[:, 0], self.lo, self.hi)
        return torch.where(below > self.lo, self.value(below - 1), torch.inf)[:, None]

    def head(self, size: int) -> RankedRow:
        return RankedRow(self.block, self.row, self.scale, self.lo, torch.minimum(self.hi, self.lo + size))

    def ranked(self, size: int) -> Tensor:
        return self.levels(torch.arange(len(self.row)), 0, min(size, int((self.hi - self.lo).max())))

    def levels(self, some: Tensor, start: int, stop: int) -> Tensor:
        """Logits of some of the rows at places [start, stop) of their range; -inf behind its end."""
        row, scale = self.row[some], self.block.scales[self.scale[some, None]]
        stop = min(stop, self.block.width)
        if bool((self.lo == 0).all()):
            level = self.block.level.view(-1, self.block.width)[row, start:stop]
        else:
            level = self.block.at(row[:, None], self.lo[some, None] + torch.arange(start, stop))
        size = self.hi - self.lo
        inside = torch.arange(start, stop) < size[some, None]
        # 0 times -inf is none.
        level = level.masked_fill(~inside, 0.0).mul_(scale)
        return level.masked_fill_(~inside, -torch.inf)

    def _ranking(self) -> Ranking:
        # Settings that have come to the same range of the same row at the same scale share the work.
        states = torch.stack([self.row, self.scale, self.lo, self.hi], -1)
        unique, state = torch.unique(states, dim=0, return_inverse=True)
        shared = RankedRow(self.block, *unique.T)
        return Ranking(shared.levels, int((shared.hi - shared.lo).max()), unique[:, 0], state)

    def nearest(self, center: Tensor, mass: Tensor) -> Band:
        c = center[:, 0]
        target = mass[:, 0] * self.mass(self.lo, self.hi)
        middle = first(lambda i: self.value(i) <= c, self.lo, self.hi)

        def extent(radius: Tensor) -> tuple[Tensor, Tensor]:
            start = first(lambda i: self.value(i) - c <= radius, self.lo, middle)
            return start, first(lambda i: c - self.value(i) > radius, middle, self.hi)

        def enough(radius: Tensor) -> Tensor:
            return self.mass(*extent(radius)) >= target

        below = first(lambda i: enough(c - self.value(i)), middle, self.hi)
        above = first(lambda i: ~enough(self.value(i) - c), self.lo, middle) - 1
        radius = torch.minimum(
            torch.where(below < self.hi, c - self.value(below), torch.inf),
            torch.where(above >= self.lo, self.value(above) - c, torch.inf),
        )
        # Rounding may leave the whole range a hair short of a mass of one.
        start, end = extent(radius)
        return Band(self.value(end - 1)[:, None], self.value(start)[:, None])

    def after(self, step: Step) -> RankedRow | None:
        """The rows after ``step``, whose parameters are per row; None if what it does is no range and scale of a table."""
        if step.rule.tokenwise:
            return None
        answer = step.answer(self, torch.zeros((), dtype=torch.float64))
        if isinstance(answer, Affine):
            factor = answer.scale[:, 0].expand(len(self.row))
            greedy = factor.isinf()
            scale = self.block.scales[self.scale] * torch.where(greedy, 1.0, factor)
            if not self.block.has(scale):
                return None
            top = self.value(self.lo)
            modes = first(lambda i: self.value(i) < top, self.lo, self.hi)
            return self._with(self.block.scale_index(scale), self.lo, torch.where(greedy, modes, self.hi))
        if isinstance(answer, Band) and not answer.spared:
            return self.between(answer.low, answer.high)
        return None

    def between(self, low: Tensor, high: Tensor) -> RankedRow:
        """The rows cut to the logits in [low, high], each (B, 1)."""
        lo = first(lambda i: self.value(i) <= high[:, 0], self.lo, self.hi)
        hi = first(lambda i: self.value(i) < low[:, 0], self.lo, self.hi)
        # A band with nothing inside leaves the row alone.
        lo, hi = torch.where(lo < hi, lo, self.lo), torch.where(lo < hi, hi, self.hi)
        return self._with(self.scale, lo, hi)

    def _with(self, scale: Tensor, lo: Tensor, hi: Tensor) -> RankedRow:
        return RankedRow(self.block, self.row, scale, lo, hi, self._context)

    def some(self, which: Tensor) -> RankedRow:
        """The rows of these numbers."""
        scale, lo, hi = self.scale[which], self.lo[which], self.hi[which]
        return RankedRow(self.block, self.row[which], scale, lo, hi, self._context)

    def remembering(self, state: Mapping[str, Tensor]) -> RankedRow:
        """The same rows, with what a rule remembers."""
        return RankedRow(self.block, self.row, self.scale, self.lo, self.hi, self._context, state)

    def tossing(self, coin: bool) -> RankedRow:
        """The same rows, with the outcome of the next coin."""
        context = replace(self._context, coin=coin)
        return RankedRow(self.block, self.row, self.scale, self.lo, self.hi, context, self._state)

    @property
    def coin(self) -> bool | None:
        return self._context.coin

    def log_probability(self, which: Tensor, position: Tensor) -> Tensor:
        """Of the token at ``position`` of row number ``which``, each (S, J); -inf for one that is dropped."""
        kept = (position >= self.lo[which]) & (position < self.hi[which])
        level = torch.where(kept, self.block.at(self.row[which], position), 0.0)
        value = self.block.scales[self.scale[which]] * level - self.reference[which]
        return torch.where(kept, value - self.mass(self.lo, self.hi).log()[which], -torch.inf)


class CompactRow:
    """Rows written out: the logits of the tokens still kept, in the order of the ranking, for rules that need more than that.

    Attributes:
        z: (B, W) logits in wide floats, -inf behind the last.
        lo: (B,) position of the first column in the ranking.
    """

    def __init__(self, z: Tensor, lo: Tensor, place: Tensor, tokens: Tensor | None, context: Context | None):
        self.z, self.lo, self._place, self._tokens, self._context = z, lo, place, tokens, context
        self.chances: list[Tensor] = []

    @classmethod
    def of(cls, rows: RankedRow, absolute: bool = False) -> CompactRow:
        """Rows, written out; at the model's own level if ``absolute``, for rows that no step has changed."""
        width = int((rows.hi - rows.lo).max())
        tokens = None
        if rows.block.order is not None:
            position = (rows.lo[:, None] + torch.arange(width)).clamp(max=rows.block.width - 1)
            tokens = rows.block.order[rows.row[:, None], position]
        z = rows.levels(torch.arange(len(rows.row)), 0, width)
        return cls(z + rows.block.top[rows.row] if absolute else z, rows.lo, rows.row, tokens, rows._context)

    @classmethod
    def pruned(cls, rows: RankedRow, step: Step) -> CompactRow:
        """The rows after a step that tells below which logit it drops everything: only the others are written out."""
        answer = step.answer(rows, torch.zeros((), dtype=torch.float64))
        assert isinstance(answer, Map)
        assert answer.low is not None
        compact = cls.of(rows.between(answer.low, torch.full_like(answer.low, torch.inf)))
        return cls(transform(compact.z, answer), compact.lo, compact._place, compact._tokens, compact._context)

    def tossing(self, coin: bool) -> CompactRow:
        """The same rows, with the outcome of the next coin."""
        assert self._context is not None
        return CompactRow(self.z, self.lo, self._place, self._tokens, replace(self._context, coin=coin))

    @property
    def coin(self) -> bool | None:
        return None if self._context is None else self._context.coin

    def dense(self, state: Mapping[str, Tensor] | None = None) -> DenseRow:
        """The rows as a rule sees them."""
        return DenseRow(self.z, reference, self._context, state, self._tokens, self._place)

    def after(self, step: Step, state: Mapping[str, Tensor] | None) -> CompactRow:
        """The rows after ``step``, whose parameters and ``state`` are per row."""
        row = self.dense(state)
        z = transform(self.z, step.answer(row, self.z), row)
        changed = CompactRow(z, self.lo, self._place, self._tokens, self._context)
        changed.chances = row.chances
        return changed

    def log_probability(self, which: Tensor, position: Tensor) -> Tensor:
        """Of the token at ``position`` of the ranking in row number ``which``, each (S, J); -inf for one that is dropped."""
        column = position - self.lo[which]
        inside = (column >= 0) & (column < self.z.shape[1])
        value = self.z[which, column.clamp(0, self.z.shape[1] - 1)] - self.z.logsumexp(-1)[which]
        return torch.where(inside, value, -torch.inf)
