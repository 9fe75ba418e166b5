"""The truncation rules: each returns the lowest logit it keeps.

Every token equal to that logit is kept, the most probable one always. Formulas are in logits: ``log p_i = z_i - row.logz``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from decal.samplers.row import Band, Row
from decal.samplers.rule import Param, rule


@rule(paper="arXiv:1805.04833")
def top_k(row: Row, k: Tensor = Param(50, low=1, off=0, integer=True, sweep=(2, 5, 10, 20, 50, 100))) -> Tensor:
    """Keep the ``k`` most probable tokens.

    Kept: z_i >= the k-th largest logit. Hierarchical Neural Story Generation, Fan et al. 2018.
    """
    return row.upper(count=k)


@rule(paper="arXiv:1904.09751")
def top_p(row: Row, p: Tensor = Param(0.9, low=0, high=1, off=1.0, sweep=(0.1, 0.3, 0.5, 0.7, 0.9, 0.95))) -> Tensor:
    """Keep the smallest set of most probable tokens whose mass reaches ``p``.

    Kept: i with sum_{j: p_j > p_i} p_j < p. The Curious Case of Neural Text Degeneration, Holtzman et al. 2020.
    """
    return row.upper(mass=p)


@rule(paper="arXiv:2407.01082")
def min_p(row: Row, p: Tensor = Param(0.1, low=0, high=1, off=0.0, sweep=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5))) -> Tensor:
    """Keep tokens at least ``p`` times as probable as the most probable one.

    Kept: p_i >= p max_j p_j. Turning Up the Heat, Nguyen et al. 2024. After ``temperature(t)`` it keeps what
    ``min_p(p ** t)`` keeps before.
    """
    return row.max + torch.log(p)


@rule(paper="arXiv:2411.07641")
def top_n_sigma(row: Row, n: Tensor = Param(1.0, low=0, off=math.inf, sweep=(0.3, 0.5, 0.7, 1.0, 1.5, 2.0))) -> Tensor:
    """Keep logits within ``n`` standard deviations of the largest.

    Kept: z_i >= max_j z_j - n sd(z), sd the population standard deviation over the logits still alive. The same set before
    and after a temperature. Top-nsigma: Not All Logits Are You Need, Tang et al. 2024.
    """
    return row.max - n * row.std


@rule(paper="arXiv:2210.15191")
def epsilon(row: Row, eps: Tensor = Param(9e-4, low=0, high=1, off=0.0, sweep=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1))) -> Tensor:
    """Keep tokens of probability at least ``eps``.

    Kept: p_i >= eps. Truncation Sampling as Language Model Desmoothing, Hewitt et al. 2022.
    """
    return row.logz + torch.log(eps)


@rule(paper="arXiv:2210.15191")
def eta(row: Row, eps: Tensor = Param(2e-3, low=0, high=1, off=0.0, sweep=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1))) -> Tensor:
    """Keep tokens of probability at least ``eps``, or less where the entropy is high.

    Kept: p_i >= min(eps, sqrt(eps) exp(-H)). Truncation Sampling as Language Model Desmoothing, Hewitt et al. 2022.
    """
    return row.logz + torch.log(torch.minimum(eps, eps.sqrt() * torch.exp(-row.entropy)))


@rule(paper="github.com/BlinkDL/RWKV-LM")
def top_a(row: Row, a: Tensor = Param(0.2, low=0, high=1, off=0.0, sweep=(0.02, 0.05, 0.1, 0.2, 0.5, 1.0))) -> Tensor:
    """Keep tokens at least ``a`` times as probable as the square of the largest probability.

    Kept: p_i >= a (max_j p_j)^2. Bo Peng's rule.
    """
    return 2 * row.max - row.logz + torch.log(a)


@rule(paper="arXiv:2202.00666")
def typical(row: Row, p: Tensor = Param(0.9, low=0, high=1, off=1.0, sweep=(0.1, 0.3, 0.5, 0.7, 0.9, 0.95))) -> Band:
    """Keep the tokens whose surprise is nearest the entropy, until their mass reaches ``p``.

    Kept: the smallest set of smallest ``|-log p_i - H|`` with mass at least p. It is a band of the ranking and may leave out
    the most probable token: the paper means it to. Locally Typical Sampling, Meister et al. 2022.
    """
    return row.nearest(row.logz - row.entropy, mass=p)


@rule(paper="arXiv:2509.23234")
def p_less(row: Row, k: Tensor = Param(1.0, low=0, high=1, off=0.0, sweep=(0.05, 0.1, 0.2, 0.5, 0.8, 1.0))) -> Tensor:
    """Keep tokens at least ``k`` times as probable as two draws are to agree.

    Kept: p_i >= k sum_j p_j^2. The paper's rule has no parameter and is k = 1. p-less Sampling, 2025.
    """
    return row.logz + torch.log(k * row.collision)
