"""The rules that reshape: each returns the affine map of the kept logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from decal.samplers.row import Affine, Row
from decal.samplers.rule import Param, rule


@rule(paper="doi:10.1207/s15516709cog0901_7")
def temperature(row: Row, t: Tensor = Param(1.0, low=0, high=math.inf, off=1.0)) -> Affine:
    """Divide the logits by ``t``; at ``t`` = 0 only the modes stay.

    Maps z to z / t, so p to p^(1/t), renormalised. A Learning Algorithm for Boltzmann Machines, Ackley et al. 1985.
    """
    return Affine(1 / t, torch.zeros_like(t))


@rule(paper="arXiv:2605.11128")
def flatten(row: Row, strength: Tensor = Param(0.5, low=0, high=1, off=0.0, sweep=(0.1, 0.3, 0.5, 0.7, 0.9, 1.0))) -> Affine:
    """Interpolate the log-probabilities of the kept tokens towards uniform.

    Maps log p_i to (1 - strength) log p_i - strength log n over the n tokens still kept: 0 changes nothing, 1 is uniform on
    them. Within a row it is ``temperature(1 / (1 - strength))`` placed after the cut. It answers the shape fault of the paper
    cited.
    """
    return Affine(1 - strength, strength * (row.logz - torch.log(row.count)))
