"""Shape: how a model shares probability between valid steps (arXiv 2605.11128, Definition D.1 and Appendices F and I).

The ideal law gives each step in proportion to its completions, q(v) = N(v) / N: then every answer is as likely as any other.
How far a model p is from it splits exactly over prefixes, and at a prefix into three:

    KL(uniform on V || p) = sum over prefixes of N / |V| times (order + tail + shape), where

    order = ln p(top) / p(valid)     top: the smallest cutoff that keeps every valid step, with all it keeps;
    tail  = -ln p(top)               what a cutoff could have dropped at no cost;
    shape = KL(q || p given valid)

None is negative. Order is 0 where every valid step is above every invalid token, shape where p is in proportion to q.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from decal.eval.order import Prefix

INF = float("inf")


@dataclass(frozen=True)
class Divergence:
    """The parts of a KL divergence from the uniform law on V, in nats; infinite where a valid step has no probability."""

    order: float
    tail: float
    shape: float

    @property
    def total(self) -> float:
        """Their sum."""
        return self.order + self.tail + self.shape


def divergence(prefix: Prefix) -> Divergence:
    """KL(q || p) at a prefix, in parts."""
    q = prefix.count / prefix.count.sum()
    # Steps that lead to no canonical answer are valid, but nobody has to go there.
    wanted = q > 0
    if (prefix.share[wanted] == 0).any():
        return Divergence(0.0, 0.0, INF)
    valid = prefix.share.sum()
    top = max(prefix.head[wanted].max(), valid)
    given = prefix.share[wanted] / valid
    # Rounding may leave a hair below 0.
    shape = max(float((q[wanted] * np.log(q[wanted] / given)).sum()), 0.0)
    return Divergence(float(np.log(top / valid)), max(float(-np.log(min(top, 1.0))), 0.0), shape)


def total_divergence(found: Sequence[Prefix], answers: int) -> Divergence:
    """KL(uniform on V || p), in parts: the sum of `divergence` over prefixes, each weighted with its share of the answers.

    Args:
        found: the prefixes of one depth, for its contribution, or all of them.
        answers: |V|.
    """
    parts = [(p.count.sum() / answers, divergence(p)) for p in found if p.count.sum()]
    return Divergence(*(sum(w * getattr(d, name) for w, d in parts) for name in ("order", "tail", "shape")))


def entropy(share: np.ndarray) -> float:
    """Entropy in nats of nonnegative numbers, taken as proportions; 0 of nothing."""
    total = share.sum()
    p = share[share > 0] / total if total > 0 else np.ones(1)
    return max(0.0, float(-(p * np.log(p)).sum()))


# ---- the geometric model


def geometric_gap(valid: float, decay: float | np.ndarray) -> np.ndarray:
    """Delta_v(a) = ln v - H_v(a), H_v the entropy in nats of p(i) ~ exp(-a i / v) for i < v; a fractional v is interpolated."""
    below, above = _gap(int(np.floor(valid)), decay), _gap(int(np.ceil(valid)), decay)
    return below + (valid - np.floor(valid)) * (above - below)


def _gap(v: int, decay: float | np.ndarray) -> np.ndarray:
    a = np.asarray(decay, dtype=float)[..., None]
    exponent = -a * np.arange(v) / v
    log_total = np.log(np.exp(exponent).sum(-1, keepdims=True))
    p = np.exp(exponent - log_total)
    return np.log(v) + (p * (exponent - log_total)).sum(-1)


DECAYS = np.geomspace(1e-3, 60, 400)


def geometric_curve(valid: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Validity and diversity in the geometric model, at each of `DECAYS`: the same decay at every step, ``valid`` steps of so
    many valid tokens each, all ranked on top."""
    validity = (1 - np.exp(-DECAYS)) ** len(valid)
    gaps = sum((geometric_gap(v, DECAYS) for v in valid), np.zeros(len(DECAYS)))
    return validity, np.exp(-gaps)


def geometric_bound(valid: Sequence[float], validity: np.ndarray) -> np.ndarray:
    """Diversity that the geometric model can't exceed at each validity (Theorem F.4 of arXiv 2605.11128): loose beyond one
    step, and meant for vocabularies much larger than the number of valid tokens."""
    decay = -np.log(np.clip(1 - np.asarray(validity, dtype=float), 1e-300, 1.0))
    return np.exp(-sum((geometric_gap(v, decay) for v in valid), np.zeros(len(decay))))


# ---- the sorted logits

FITTED = 400
"""Ranks, evenly in logarithm, at which sorted logits are fitted."""


@dataclass(frozen=True)
class LogitFit:
    """Sorted logits as a line and then a logarithm (Appendix I): ``slope * k + start`` up to rank ``split``, and from there on
    ``level + fall * ln(k + shift)``, k from 1.

    Attributes:
        mse, r2: mean squared error and share of the variance explained, at the fitted ranks.
    """

    slope: float
    start: float
    split: int
    level: float
    fall: float
    shift: float
    mse: float
    r2: float

    def __call__(self, rank: np.ndarray) -> np.ndarray:
        """Fitted logits."""
        head = self.slope * rank + self.start
        return np.where(rank <= self.split, head, self.level + self.fall * np.log(np.maximum(rank + self.shift, 1e-9)))


def fitted_ranks(tokens: int) -> np.ndarray:
    """Ranks at which `fit_logits` looks, from 1."""
    return np.unique(np.geomspace(1, tokens, FITTED).round().astype(np.int64))


def fit_logits(ranks: np.ndarray, logits: np.ndarray) -> LogitFit:
    """The best fit to sorted logits at some ranks, all equally important, over splits that leave at least three ranks to the
    line and five to the logarithm, and 37 shifts from -300 to 3000.

    Raises:
        ValueError: fewer than eight ranks.
    """
    if len(ranks) < 8:
        raise ValueError(f"a fit needs at least eight ranks, got {len(ranks)}")
    k, z = ranks.astype(float), logits.astype(float)
    shifts = np.concatenate([[0.0], np.geomspace(0.5, 3000, 24), -np.geomspace(0.5, 300, 12)])
    best: tuple[float, tuple[float, ...]] | None = None
    for split in range(3, len(k) - 4):
        (slope, start), head = _line(k[:split], z[:split])
        for shift in shifts:
            if k[split] + shift < 0.5:
                continue
            (fall, level), tail = _line(np.log(k[split:] + shift), z[split:])
            if best is None or head + tail < best[0]:
                best = head + tail, (slope, start, float(ranks[split - 1]), level, fall, float(shift))
    assert best is not None
    error, (slope, start, split_rank, level, fall, shift) = best
    spread = float(((z - z.mean()) ** 2).sum())
    return LogitFit(slope, start, int(split_rank), level, fall, shift, error / len(k), 1 - error / spread if spread else 1.0)


def _line(x: np.ndarray, y: np.ndarray) -> tuple[tuple[float, float], float]:
    """Slope and intercept of the least squares line, and the sum of squared errors."""
    dx, dy = x - x.mean(), y - y.mean()
    over = float(dx @ dx)
    slope = float(dx @ dy) / over if over else 0.0
    rest = dy - slope * dx
    return (slope, float(y.mean() - slope * x.mean())), float(rest @ rest)
