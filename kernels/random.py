"""Random numbers that are functions of what they are for: the same (seed, request, position) gives the same number, on every
device, whatever else is in the batch.

A counter goes through the finaliser of SplitMix64 (Steele, Lea, Flood 2014), whose output passes the usual test batteries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from decal.kernels.mass import wide

GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64, which torch shifts arithmetically."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """A bijection of 64-bit integers that looks random."""
    x = (x ^ _shift_right(x, 30)) * MULTIPLIERS[0]
    x = (x ^ _shift_right(x, 27)) * MULTIPLIERS[1]
    return x ^ _shift_right(x, 31)


def hashed(*keys: Tensor) -> Tensor:
    """64 random bits as int64, one number for each combination of integer ``keys``, which broadcast."""
    state = torch.zeros((), dtype=torch.int64, device=keys[0].device)
    for key in keys:
        state = mix(state + key.long() + GOLDEN)
    return state


def uniform(*keys: Tensor) -> Tensor:
    """Numbers in [0, 1) with 53 random bits, or 24 on devices without float64, one for each combination of ``keys``."""
    state = hashed(*keys)
    bits = 53 if wide(state.device) == torch.float64 else 24
    return _shift_right(state, 64 - bits).to(wide(state.device)) * 2.0**-bits


def exponential(*keys: Tensor) -> Tensor:
    """Exponentially distributed numbers, one for each combination of ``keys``.

    They come from 52 random bits at the middle of their interval, and are exact in the small: the smallest is 2**-53, so that
    in a race of exponentials also a token of probability 1e-15 can win.
    """
    state = hashed(*keys)
    bits = 52 if wide(state.device) == torch.float64 else 23
    u = (_shift_right(state, 64 - bits).to(wide(state.device)) + 0.5) * 2.0**-bits
    return -torch.log1p(-u)
