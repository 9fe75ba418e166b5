"""Rules that solve for the next-token law: projections on the simplex, sparse by themselves, and regularised maxima on it."""

from __future__ import annotations

import torch
from torch import Tensor

from decal.samplers.row import Map, Row, TopSets
from decal.samplers.rule import Choice, Param, rule


@rule(paper="arXiv:1602.02068", side="after")
def sparsemax(row: Row, gamma: Tensor = Param(1.0, low=1e-9, sweep=(0.5, 1.0, 2.0, 4.0, 8.0, 16.0))) -> Map:
    """Project the logits on the simplex: subtract a threshold, drop what falls below, keep the rest as probabilities.

    Maps z to q = max(z / gamma - tau, 0), tau such that q sums to 1: the point of the simplex nearest to z / gamma. It keeps
    the longest prefix of the ranking with gamma + k z_k > sum_{i<=k} z_i. From Softmax to Sparsemax, Martins and Astudillo
    2016; gamma as in Niculae and Blondel 2017 (arXiv:1705.07704).
    """
    low = row.upper(count=row.longest(lambda top: top.count * (top.mean - top.value), at_most=gamma))

    def project(z: Tensor) -> Tensor:
        kept = z >= low
        d = torch.where(kept, z - row.max, 0.0)
        tau = (d.sum(-1, keepdim=True) - gamma) / kept.sum(-1, keepdim=True)
        return torch.where(kept, ((d - tau) / gamma).clamp(min=0).log(), -torch.inf)

    return Map(project, drops=True, low=low)


def _entmax_threshold(d: Tensor, power: Tensor, start: Tensor | None = None) -> Tensor:
    """(B, 1) the tau, at least ``start``, at which sum_i max(power d_i - tau, 0)^(1 / power) is 1; d (B, m) has maximum 0."""
    low = torch.full_like(d[:, :1], -1.0) + torch.zeros_like(power) if start is None else start
    high, tau, settled = torch.zeros_like(low), low, torch.zeros_like(low, dtype=torch.bool)
    for _ in range(60):
        rest = (power * d - tau).clamp(min=0)
        share = torch.exp(rest.log() / power)
        excess = share.sum(-1, keepdim=True) - 1
        low = torch.where(~settled & (excess >= 0), tau, low)
        high = torch.where(~settled & (excess < 0), tau, high)
        # Newton's step where it stays inside, else the middle; a row that has settled waits for the others.
        slope = torch.where(rest > 0, share / rest, 0.0).sum(-1, keepdim=True) / power
        newton = tau + excess / slope
        settled = settled | ((newton - tau).abs() <= 1e-15) | (high - low <= 1e-15)
        tau = torch.where(settled, tau, torch.where((newton > low) & (newton < high), newton, (low + high) / 2))
        if settled.all():
            break
    return tau


@rule(paper="arXiv:1905.05702", side="after")
def entmax(row: Row, alpha: Tensor = Param(1.5, low=1.0001, high=2, off=1.0, sweep=(1.1, 1.2, 1.35, 1.5, 1.75, 2.0))) -> Map:
    """Maximise expected logit plus Tsallis entropy: a softmax that drops tokens, softmax at ``alpha`` = 1, sparsemax at 2.

    Maps z to q = max((alpha - 1) z - tau, 0)^(1 / (alpha - 1)), tau such that q sums to 1. Sparse Sequence-to-Sequence Models,
    Peters et al. 2019. A temperature before it sets how sparse it is.
    """
    power = torch.where(alpha > 1, alpha - 1, 1.0)
    # The threshold of the most probable tokens alone is below that of all: what it drops is dropped anyhow.
    start = _entmax_threshold(row.ranked(128) - row.max, power) - 1e-9
    low = row.max + start / power

    def project(z: Tensor) -> Tensor:
        d = torch.where(z >= low, z - row.max, -torch.inf)
        return (power * d - _entmax_threshold(d, power, start)).clamp(min=0).log() / power

    return Map(project, drops=True, low=low)


def _nu(mass: Tensor, roots: Tensor, count: Tensor) -> Tensor:
    """By how much to raise the square roots of ``count`` probabilities, so that their squares sum to 1."""
    missing = (1 - mass).clamp(min=0)
    return missing / (roots + torch.sqrt(roots**2 + count * missing))


def _loss(mass: Tensor, roots: Tensor, count: Tensor) -> Tensor:
    """Divergence, at alpha = 1.5, of the kept tokens' law from their probabilities."""
    nu = _nu(mass, roots, count)
    return 2 * roots * nu**2 + 4 / 3 * count * nu**3


@rule(paper="arXiv:2505.19371", side="after")
def l0_bregman(
    row: Row,
    lam: Tensor = Param(1e-3, low=0, off=0.0, sweep=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    alpha: str = Choice("1.5", "1", "2"),
) -> Map:
    """Keep the law nearest to the model's when every token kept costs ``lam``; it lifts unlikely tokens more, except at "1".

    Minimises D(q, p) + lam |support of q|, D the Bregman divergence of x^alpha / (alpha (alpha - 1)); at alpha "1" the
    Kullback-Leibler divergence. The support is a prefix of the ranking, q_i = (p_i^(alpha - 1) + nu)^(1 / (alpha - 1)) on it,
    nu such that q sums to 1. It keeps the first k whose next token would lower D by less than lam, and tokens equal to the
    k-th. Foundations of Top-k Decoding, Noarov et al. 2025, the primal rule.
    """

    def gain(top: TopSets) -> Tensor:
        """By how much D falls when the next token is kept too."""
        mass, count = top.mass, top.count
        log_p = top.below - (top.logz - mass.log())
        p = torch.where(top.below.isfinite(), log_p.exp(), 0.0)
        if alpha == "1":
            return torch.log1p(p / mass)
        if alpha == "2":
            return (1 - mass + count * p).clamp(min=0) ** 2 / (2 * count * (count + 1))
        roots = (top.log_half - (top.logz - mass.log()) / 2).exp()
        here, there = _loss(mass, roots, count), _loss(mass + p, roots + p.sqrt(), count + 1)
        return here - there + p**1.5 / 1.5

    low = row.upper(count=row.longest(gain, at_least=lam) + 1)

    def project(z: Tensor) -> Tensor:
        kept = z >= low
        log_p = torch.where(kept, z - row.logz, -torch.inf)
        p = log_p.exp()
        mass, count = p.sum(-1, keepdim=True), kept.sum(-1, keepdim=True)
        if alpha == "1":
            return log_p
        if alpha == "2":
            return torch.where(kept, torch.log(p + (1 - mass).clamp(min=0) / count), -torch.inf)
        roots = p.sqrt()
        return torch.where(kept, 2 * torch.log(roots + _nu(mass, roots.sum(-1, keepdim=True), count)), -torch.inf)

    return Map(project, drops=True, low=low)


@rule(paper="arXiv:2609.34992", wants_cut=True)
def best_of_k(
    row: Row,
    samples: Tensor = Param(16, low=1, integer=True, sweep=(2, 4, 8, 16, 32, 64)),
    t: float = Param(0.5, low=1e-6, static=True),
    lam: float = Param(1.0, low=1e-6, static=True),
    kl: float = Param(0.5, low=0, static=True),
    js: float = Param(0.0, low=0, static=True),
    entropy: float = Param(0.0, low=0, static=True),
    coverage: float = Param(0.5, low=0, static=True),
    diversity: float = Param(0.0, low=0, static=True),
    top: int = Param(8, low=1, integer=True, static=True),
    gap: float = Param(1.0, low=1e-6, static=True),
    rate: float = Param(0.1, low=0, static=True),
    steps: int = Param(10, low=1, integer=True, static=True),
) -> Map:
    """Move the law towards higher logits, but near the model's and over several tokens that ``samples`` draws would cover.

    Maximises <q, z / t> - lam (kl KL(q, p) + js JS(q, p) - entropy H(q) - coverage sum_i w_i (1 - (1 - q_i)^samples) -
    diversity (the same with weights v)), by ``steps`` steps of mirror ascent of size ``rate`` from q = p, as published: the
    result depends on both. w is 1 / sqrt(top) on the ``top`` most probable tokens, v_i proportional to d exp(-d / gap), d = max
    z - z_i. With kl and entropy alone the maximum has a closed form, which is returned instead: log q = (z / t / lam + kl log
    p) / (kl + entropy). A cut comes first, in the paper ``top_k(200)``. Best-of-K and composed objectives: arXiv 2609.34992,
    arXiv 2602.18292.

    Differs: the authors' code keeps 1e-8 of probability on every token; the paper and decal don't.
    """

    def ascend(z: Tensor) -> Tensor:
        alive = z.isfinite()
        log_p = z.log_softmax(-1)
        s = torch.where(alive, (z - row.max) / t, 0.0)
        anchored = torch.where(alive, log_p, 0.0)
        if not js and not coverage and not diversity:
            return (s / lam + kl * anchored) / (kl + entropy) if kl + entropy else torch.where(z == row.max, 0.0, -1e30)
        likely = (z >= row.upper(count=torch.full_like(row.max, top))).to(z) / row.count.clamp(max=top) ** 0.5
        d = torch.where(alive, row.max - z, 0.0)
        far = d * torch.exp(-d / gap)
        bonus = coverage * likely + diversity * far / far.sum(-1, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny)
        log_q = log_p
        for _ in range(int(steps)):
            finite = torch.where(alive, log_q, 0.0)
            q = log_q.exp()
            mixed = torch.logaddexp(finite, anchored) - 0.6931471805599453
            slope = kl * (finite - anchored + 1) + js * 0.5 * (finite - mixed) + entropy * (finite + 1)
            g = s - lam * (slope - bonus * samples * torch.exp((samples - 1) * torch.log1p(-q)).nan_to_num(nan=1.0))
            log_q = torch.where(alive, finite + rate * g, -torch.inf).log_softmax(-1)
        return log_q

    return Map(ascend, monotone=False)
