"""Rows that have broken kernels elsewhere, or ought to."""

from __future__ import annotations

import math

import torch
from torch import Tensor

INF = math.inf


def ordinary(rows: int, width: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    """Normally distributed logits with a head."""
    z = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * scale
    z[:, ::37] += 4
    return z


def adversarial(width: int = 400) -> dict[str, Tensor]:
    """One row of each kind."""
    z = ordinary(1, width, 1)[0]
    token = torch.arange(width)
    kinds = {
        "ordinary": z,
        "ties": (z * 2).round() / 2,
        "few values": (z > 0).float(),
        "flat": torch.full_like(z, 1.25),
        "flat at zero": torch.zeros_like(z),
        "both zeros": torch.where(token % 2 == 0, 0.0, -0.0),
        "dropped": torch.where(token % 3 == 0, z, -INF),
        "one alive": torch.where(token == width // 2, z, -INF),
        "nan": torch.where(token % 5 == 0, math.nan, z),
        "infinite": torch.where(token % 50 == 3, INF, z),
        "one hot": torch.where(token == 7 % width, 80.0, z),
        "certain": torch.where(token == 7 % width, 400.0, z),
        "denormal": z * 1e-40,
        "tiny": z * 1e-20,
        "hot": z * 40,
        "huge": z * 1e37,
        "spread": torch.sign(z) * 10.0 ** (z * 4).clamp(-38, 38),
        "deep": torch.where(token == 1 % width, -1e30, z),
        "high": z + 1e4,
        "negative": z - 300,
        "nothing": torch.full_like(z, -INF),
        "only nan": torch.full_like(z, math.nan),
    }
    return {name: row.clone()[None] for name, row in kinds.items()}
