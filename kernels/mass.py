"""Probability mass as integers: the same on every device, and summed in any order without rounding.

A token that lies ``d <= 0`` below the largest logit weighs ``round(exp(d) * 2**42)``. The exponential is made of IEEE float64
multiplications and additions alone, in a fixed order and without fused ones, so whoever computes it gets the same bits:
`decal.kernels.cpu` and `decal.kernels.gpu` repeat the formula below. Sums of up to 2**21 tokens fit into 63 bits, so a mass
depends neither on the order of summation nor on how a row is split among threads.

A weight below 2**-43, 29.8 nats under the largest, is 0.
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
    0.69314718055995,
    0.24022650695910097,
    0.05550410866444772,
    0.009618129107606888,
    0.0013333558230164974,
    0.0001540353044173605,
    1.5252657260200837e-05,
    1.321544258792169e-06,
    1.0208690299958306e-07,
    7.072585949269223e-09,
)
"""Of the polynomial of degree 10 that is nearest to 2**f on [-1/2, 1/2], lowest first; its relative error is 2.2e-16."""

ROUND = 1.5 * 2.0**52
"""Adding it to a float64 rounds that to an integer, which stands in the lowest bits."""
LOWEST = -1000.0
"""Exponents of two below it count as it, so that no weight is subnormal."""
UNIT = 2.0**-42
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


def needed(share: Tensor, total: Tensor) -> Tensor:
    """The smallest integer mass that is at least ``share`` of ``total``, and at least 1."""
    return torch.minimum((share * total.double()).ceil().clamp(min=1), total.double()).long().minimum(total).clamp(min=1)
