"""What a rule may ask about a row, each asked of a few sums.

Every statistic is a closed form of a few *moments*: sums over the kept tokens of simple functions of ``d = z - r`` and
``e = exp(d)``, where ``r`` is any reference level (the largest logit, in practice). Sums are what every backend can do: a
block-wise kernel adds partial sums, a sorted row differences its running sums. A statistic written here once is therefore
right everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from decal.kernels.mass import weight

Moments = Mapping[str, Tensor]

MOMENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "n": lambda d, e: torch.ones_like(d),
    "s": lambda d, e: e,
    "t": lambda d, e: d * e,
    "q": lambda d, e: e * e,
    "h": lambda d, e: (0.5 * d).exp(),
    "a": lambda d, e: d,
    "b": lambda d, e: d * d,
}
"""Summand of each moment, as a function of ``d = z - r`` and ``e = exp(d)`` of one kept token."""

SCALED = {"a": 1, "b": 2}
"""Moments whose terms have no bound, and the power of ``d`` that they are."""
INEXACT = "t"
"""The moment whose terms are summed as floats: all have one sign, and it matters how small they are together. Where one token
has nearly all of the probability, it is the entropy."""


FARTHEST = -700.0
"""Nothing weighs anything below this ``d``, but what has no weight, times a ``d`` without bound, might."""


def exp(d: Tensor) -> Tensor:
    """exp(d) of ``d <= 0`` as masses have it, or as the device does where it lacks float64."""
    return weight(d) if d.dtype == torch.float64 else d.exp()


def term(name: str, d: Tensor, e: Tensor) -> Tensor:
    """Summand of a moment of tokens that lie ``d <= 0`` below the reference level, ``e = exp(d)``."""
    if name == "h":
        return exp(0.5 * d)
    return MOMENTS[name](d.clamp(min=FARTHEST) if name == "t" else d, e)


@dataclass(frozen=True)
class Statistic:
    """A closed form over moments.

    Attributes:
        moments: names in `MOMENTS` it needs.
        finish: ``(r, moments) -> value``, all of shape (B, 1); ``r`` is the reference level the moments were taken at.
        doc: what it is, in words.
    """

    moments: tuple[str, ...]
    finish: Callable[[Tensor, Moments], Tensor]
    doc: str


def _std(r: Tensor, m: Moments) -> Tensor:
    mean = m["a"] / m["n"]
    return (m["b"] / m["n"] - mean * mean).clamp(min=0).sqrt()


STATISTICS: dict[str, Statistic] = {
    "logz": Statistic(("s",), lambda r, m: r + m["s"].log(), "log of the sum of exp(logits)"),
    "entropy": Statistic(("s", "t"), lambda r, m: m["s"].log() - m["t"] / m["s"], "Shannon entropy, in nats"),
    "log_half": Statistic(("h",), lambda r, m: 0.5 * r + m["h"].log(), "log of the sum of exp(logits / 2)"),
    "collision": Statistic(("s", "q"), lambda r, m: m["q"] / m["s"] ** 2, "collision probability, the sum of p^2"),
    "mean": Statistic(("n", "a"), lambda r, m: r + m["a"] / m["n"], "mean of the logits"),
    "std": Statistic(("n", "a", "b"), _std, "population standard deviation of the logits"),
    "count": Statistic(("n",), lambda r, m: m["n"], "number of kept tokens"),
}
"""Statistics by name; with ``max`` (the largest logit) they are everything a rule may read besides order statistics."""
