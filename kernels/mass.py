"""Probability mass as integers: the same on every device, and summed in any order without rounding.

A token that lies ``d <= 0`` below the largest logit weighs ``round(exp(d) * 2**42)``. The exponential is made of IEEE float64
multiplications and additions alone, in a fixed order and without fused ones, so whoever computes it gets the same bits:
`decal.kernels.cpu` and `decal.kernels.gpu` repeat the formula below. Sums of up to 2**21 tokens fit into 63 bits, so a mass
depends neither on the order of summation nor on how a row is split among threads.

A weight below 2**-43, 29.8 nats under the largest, is 0, and others are rounded: over V tokens a mass is off by V * 2**-43 of
the largest token's at most (3e-8 for V = 262,144), typically by far less. Closer to 1 than that a share of the mass means
little.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide(device: torch.device) -> torch.dtype:
    """The widest float the device has."""
    return torch.float32 if device.type == "mps" else torch.float64


LOG2E = 1.4426950408889634
COEFFICIENTS = (
    1.0,
    0.6931471805459335,
    0.2402265069581299,
    0.05550410941205933,
    0.009618129159402558,
    0.0013333450568000645,
    0.00015403455852453838,
    1.5310079402249296e-05,
    1.3255224878668817e-06,
)
"""Of the polynomial of degree 8 that is nearest to 2**f on [-1/2, 1/2], lowest first; its relative error is 1.1e-12."""

ROUND = 1.5 * 2.0**52
"""Adding it to a float64 rounds that to an integer, which stands in the lowest bits."""
LOWEST = -1000.0
"""Exponents of two below it count as it, so that no weight is subnormal."""
UNIT = 2.0**-42
MOST_TOKENS = 2**21 - 1
"""For more, sums could overflow."""
FIXED = 1.5 * 2.0**52 * UNIT
"""Adding it to a float64 in (-256, 256) rounds that to a multiple of `UNIT`, which stands in the lowest bits."""
FIXED_BITS = int(torch.tensor(FIXED, dtype=torch.float64).view(torch.int64))


def weight(d: Tensor) -> Tensor:
    """exp(d) of float64 ``d <= 0``, at least 2**-1000; NaN counts as -inf."""
    y = d * LOG2E
    y = torch.where(y > LOWEST, y, LOWEST)
    t = y + ROUND
    f = y - (t - ROUND)
    p = torch.full_like(f, COEFFICIENTS[-1])
    for c in COEFFICIENTS[-2::-1]:
        p = p * f + c
    return (p.view(torch.int64) + (t.view(torch.int64) << 52)).view(torch.float64)


def fixed(x: Tensor) -> Tensor:
    """The multiple of `UNIT` nearest to float64 ``x`` in (-256, 256), in units of it, as int64."""
    return (x + FIXED).view(torch.int64) - FIXED_BITS


def mass(d: Tensor) -> Tensor:
    """Integer mass of tokens that lie ``d <= 0`` below the largest logit."""
    return fixed(weight(d))


FINER = 2.0**43
"""How many of the second limb's units make one of the first's."""


def limbs(x: Tensor) -> tuple[Tensor, Tensor]:
    """float64 ``x`` in (-256, 256) as two int64, in units of `UNIT` and of `UNIT` / `FINER`: exact down to 2**-86.

    Their sums have no rounding either, so a sum of many terms has the same bits in any order.
    """
    high = fixed(x)
    return high, fixed((x - ((x + FIXED) - FIXED)) * FINER)


def joined(high: Tensor, low: Tensor) -> Tensor:
    """The float64 of sums of limbs."""
    return high.double() * UNIT + low.double() * (UNIT / FINER)


def needed(share: Tensor, total: Tensor) -> Tensor:
    """The smallest integer mass that is at least ``share`` of ``total``, and at least 1."""
    return torch.minimum((share * total.double()).ceil().clamp(min=1), total.double()).long().minimum(total).clamp(min=1)
