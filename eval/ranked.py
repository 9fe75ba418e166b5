"""Rules on sorted rows: after one sort, any setting costs a few look-ups per row instead of a pass over the vocabulary.

A cut keeps a contiguous range of a ranking, and a temperature doesn't change the ranking. So a row that has gone through any
number of steps is a scale and a range ``[lo, hi)`` of positions, its moments are differences of running sums, and the rules'
own bodies run on it unchanged. Positions and sums are exact, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from decal.kernels import reference
from decal.kernels.statistics import MOMENTS, STATISTICS
from decal.samplers.errors import DecalError
from decal.samplers.row import Affine, Band, BaseRow, DenseRow
from decal.samplers.rule import Rule, Step

POWER = {"n": 0, "a": 1, "b": 2}
"""Moments that are powers of the scale times those at scale 1."""


def constant_scale(step: Step) -> float | None:
    """The factor by which a reshaping step multiplies any row's logits, or None if that depends on the row."""
    probes = torch.tensor([[0.0, -1.0], [0.0, -1.0]], dtype=torch.float64)
    answer = step.answer(DenseRow(probes, reference), probes)
    if not isinstance(answer, Affine):
        raise TypeError(f"{step} does not reshape")
    # What is computed from the parameters alone has one row, what is computed from the rows has as many as they.
    return float(answer.scale) if answer.scale.shape[0] == 1 else None


def scales_of(steps: Iterable[Step]) -> list[float] | None:
    """Every scale a row has on its way through ``steps``, or None if one depends on the row or is beyond floats."""
    scales = [1.0]
    for step in steps:
        if step.rule.kind == "reshaping":
            scale = constant_scale(step)
            if scale is None:
                return None
            # An infinite scale leaves the modes, at whatever scale.
            scales.append(scales[-1] * scale if np.isfinite(scale) else scales[-1])
    return scales if np.isfinite(scales).all() else None


def moments_of(rules: Iterable[Rule]) -> set[str]:
    """Moments that have to be summed for ``rules``; ``s``, the mass, always."""
    return {"s"}.union(*(STATISTICS[name].moments for rule in rules for name in rule.reads if name in STATISTICS))


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
    """

    def __init__(self, logits: Tensor, scales: Sequence[float], moments: set[str]):
        # numpy's sort of float32 is several times faster than torch's, and no index is needed.
        ranked = -np.sort(-plain(logits).numpy(), axis=-1)
        level = torch.from_numpy(ranked).double()
        if not bool(level[:, 0].isfinite().all()):
            raise DecalError("the model gave a row of logits with NaN, +inf or nothing finite")
        level -= level[:, :1].clone()
        self.rows, self.width = level.shape
        self.alive = level.isfinite().sum(-1)
        self.scales = torch.tensor(sorted(set(scales)), dtype=torch.float64)
        self.level = level.flatten()
        dead = level.isneginf()
        level = level.masked_fill(dead, 0.0)
        size = self.rows, self.width + 1
        self._tables = {
            name: torch.empty((1 if name in POWER else len(self.scales), *size), dtype=torch.float64) for name in moments
        }
        for table in self._tables.values():
            table[..., 0] = 0.0
        for name in moments & set(POWER):
            torch.cumsum(MOMENTS[name](level, level), -1, out=self._tables[name][0, :, 1:])
        for index, scale in enumerate(self.scales):
            d = scale * level
            e = d.exp().masked_fill_(dead, 0.0)
            for name in moments - set(POWER):
                torch.cumsum(MOMENTS[name](d, e), -1, out=self._tables[name][index, :, 1:])
        self._tables = {name: table.flatten() for name, table in self._tables.items()}

    def scale_index(self, scale: Tensor) -> Tensor:
        """Where each scale stands in ``scales``."""
        index = torch.searchsorted(self.scales, scale)
        near = self.scales[index.clamp(max=len(self.scales) - 1)]
        below = self.scales[(index - 1).clamp(min=0)]
        index = torch.where((near - scale).abs() <= (below - scale).abs(), index, index - 1).clamp(0, len(self.scales) - 1)
        if not torch.allclose(self.scales[index], scale, rtol=1e-9, atol=0):
            raise ValueError("a row came to a scale that the block was not made for")
        return index

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

    def __init__(self, block: RankedBlock, row: Tensor, scale: Tensor, lo: Tensor, hi: Tensor):
        super().__init__()
        self.block, self.row, self.scale, self.lo, self.hi = block, row, scale, lo, hi
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
            last = torch.minimum(self.lo + count[:, 0].long(), self.hi) - 1
        else:
            assert mass is not None
            target = mass[:, 0] * self.mass(self.lo, self.hi)
            last = first(lambda i: self.mass(self.lo, i + 1) >= target, self.lo, self.hi - 1)
        return self.value(torch.maximum(last, self.lo))[:, None]

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

    def after(self, step: Step) -> RankedRow:
        """The rows after ``step``, whose parameters are per row."""
        like = torch.zeros((), dtype=torch.float64)
        answer = step.answer(self, like)
        if isinstance(answer, Affine):
            factor = answer.scale[:, 0].expand(len(self.row))
            greedy = factor.isinf()
            top = self.value(self.lo)
            modes = first(lambda i: self.value(i) < top, self.lo, self.hi)
            scale = self.block.scales[self.scale] * torch.where(greedy, 1.0, factor)
            hi = torch.where(greedy, modes, self.hi)
            return RankedRow(self.block, self.row, self.block.scale_index(scale), self.lo, hi)
        low, high = answer.low[:, 0], answer.high[:, 0]
        lo = first(lambda i: self.value(i) <= high, self.lo, self.hi)
        hi = first(lambda i: self.value(i) < low, self.lo, self.hi)
        # A band with nothing inside leaves the row alone.
        lo, hi = torch.where(lo < hi, lo, self.lo), torch.where(lo < hi, hi, self.hi)
        return RankedRow(self.block, self.row, self.scale, lo, hi)
