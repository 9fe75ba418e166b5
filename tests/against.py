"""What the comparisons with other libraries share."""

from __future__ import annotations

import torch
from torch import Tensor


def fresh_rows(seed: int, *, count: int = 60, size: int = 2000) -> Tensor:
    """Rows as a model gives them, peaked to flat, half of them with tokens at -inf."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.tensor([0.5, 1.5, 3.0, 6.0, 12.0], dtype=torch.float64).repeat(count // 5)[:, None]
    z = torch.randn(count, size, generator=g, dtype=torch.float64) * scale + 5
    dead = torch.rand(count, size, generator=g) < 0.3
    dead[::2] = False
    return z.masked_fill(dead, -torch.inf)


def fresh_texts(seed: int, *, count: int = 60, length: int = 40, size: int = 2000, most: int = 30) -> Tensor:
    """(count, length) token ids that repeat: most are of a few tokens, ``most`` of them in the first row and 2 in the last."""
    g = torch.Generator().manual_seed(seed)
    few = torch.linspace(most, 2, count).ceil()[:, None]
    common = (torch.rand(count, length, generator=g) * few).long()
    rare = torch.randint(size, (count, length), generator=g)
    return torch.where(torch.rand(count, length, generator=g) < 0.1, rare, common)


def alive(z: Tensor) -> Tensor:
    """Which tokens are kept."""
    return z > -torch.inf


def check_between(ours: Tensor, theirs: Tensor, one: Tensor, other: Tensor) -> None:
    """That a library working in float32 keeps what lies between ``one`` and ``other``, our kept sets for the parameter moved
    either way by more than rounding, and nearly always what we keep."""
    assert not (theirs & ~(one | other)).any()
    assert not (one & other & ~theirs).any()
    assert (ours != theirs).sum() <= 1e-4 * ours.numel()
