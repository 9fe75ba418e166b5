"""The rules that reshape what is kept: an affine map of the logits, or another function of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from decal.samplers.row import Affine, Map, Row
from decal.samplers.rule import Choice, Param, Tokens, rule

LN2 = math.log(2)


@rule(paper="doi:10.1207/s15516709cog0901_7")
def temperature(row: Row, t: Tensor = Param(1.0, low=0, high=math.inf, off=1.0)) -> Affine:
    """Divide the logits by ``t``; at ``t`` = 0 only the modes stay.

    Maps z to z / t, so p to p^(1/t), renormalised. A Learning Algorithm for Boltzmann Machines, Ackley et al. 1985.

    Elsewhere: everywhere, as `temperature`, at different places in the order.
    """
    return Affine(1 / t, torch.zeros_like(t))


@rule()
def split_temperature(
    row: Row,
    t: Tensor = Param(1.6, low=1e-3, off=1.0, sweep=(0.5, 1.6, 5.0)),
    end: Tensor = Param(0.5, low=1e-3, off=1.0, sweep=(0.3, 1.2)),
    ends: tuple[int, ...] = Tokens(),
) -> Map:
    """Divide by ``t`` the logits of tokens that go on, and by ``end`` the log odds that the text ends.

    Maps p_i to s(o / end) p_i / P(E) for the tokens E that end a text, and to s(-o / end) p_i^(1/t) / sum_C p^(1/t) for the
    others, C; s(x) = 1 / (1 + exp(-x)), o = log(P(E) / P(C)). So heat changes what is said, not when it is over: a plain
    temperature of 2 has a text that was to end with .8 end with .1, as there are so many ways to go on. The tokens that end a
    text are ``ends``, or given by ``chain.for_ends(tokens)``. Made for decal; `docs/calibration.md` has what it gains.
    """
    ends = ends or row.ends

    def split(z: Tensor) -> Tensor:
        ending = row.is_one_of(ends)
        z = z - row.max
        stop, go = torch.where(ending, z, -torch.inf), torch.where(ending, -torch.inf, z / t)
        stops, goes = stop.logsumexp(-1, keepdim=True), torch.where(ending, -torch.inf, z).logsumexp(-1, keepdim=True)
        odds = (stops - goes) / end
        split = torch.where(ending, stop - stops + logsigmoid(odds), go - go.logsumexp(-1, keepdim=True) + logsigmoid(-odds))
        return torch.where(z.isfinite(), split, z)

    return Map(split, monotone=False)


@rule(paper="arXiv:2605.11128", wants_cut=True)
def flatten(row: Row, strength: Tensor = Param(0.5, low=0, high=1, off=0.0, sweep=(0.1, 0.3, 0.5, 0.7, 0.9, 1.0))) -> Affine:
    """Interpolate the log-probabilities of the kept tokens towards uniform.

    Maps log p_i to (1 - strength) log p_i - strength log n over the n tokens still kept: 0 changes nothing, 1 is uniform on
    them. Within a row it is ``temperature(1 / (1 - strength))`` placed after the cut. It answers the shape fault of the paper
    cited.
    """
    return Affine(1 - strength, strength * (row.logz - torch.log(row.count)))


@rule(paper="github.com/LostRuins/koboldcpp")
def dynamic_temperature(
    row: Row,
    t: Tensor = Param(1.0, low=0, off=1.0),
    spread: Tensor = Param(0.5, low=0, off=0.0, sweep=(0.2, 0.4, 0.6, 0.8, 1.0, 1.5)),
    exponent: Tensor = Param(1.0, low=0),
) -> Affine:
    """Divide the logits by a temperature between ``t`` - ``spread`` and ``t`` + ``spread``, higher where the entropy is.

    Maps z to z / T, T = lo + (hi - lo) (H / log n)^exponent, lo = max(t - spread, 0), hi = t + spread, over the n tokens still
    kept. kalomaze 2023, no paper.

    Elsewhere: llama.cpp `dynatemp_range`, `dynatemp_exponent`, text-generation-webui `dynamic_temperature`, ExLlamaV2,
    KoboldCpp, Aphrodite.

    Differs: at spread 0 it is ``temperature(t)``. ExLlamaV2 raises probabilities to 1 / T, which is the same. llama.cpp counts
    among n tokens that an earlier sampler left in the list with a logit of -inf.
    """
    evenness = row.entropy / row.count.log().clamp(min=torch.finfo(row.entropy.dtype).tiny)
    low = (t - spread).clamp(min=0)
    return Affine(
        1 / (low + (t + spread - low) * torch.exp(exponent * evenness.clamp(torch.finfo(evenness.dtype).tiny, 1).log())),
        torch.zeros_like(t),
    )


@rule(paper="arXiv:2403.14541")
def edt(
    row: Row,
    t: Tensor = Param(1.0, low=0, off=1.0),
    theta: Tensor = Param(1.0, low=0, off=0.0, sweep=(0.1, 0.3, 0.5, 1.0, 1.5, 2.0)),
    n: Tensor = Param(0.8, low=0, high=1),
) -> Affine:
    """Divide the logits by a temperature that falls with certainty: T = ``t`` ``n``^(``theta`` / entropy).

    Maps z to z / T, the entropy H in nats; T tends to ``t`` where H is large and to 0 where H is 0. The paper fixes n = 0.8 and
    tunes the others. EDT: Improving Large Language Models' Generation by Entropy-based Dynamic Temperature Sampling, Zhang et
    al. 2024.
    """
    entropy = row.entropy.clamp(min=torch.finfo(row.entropy.dtype).tiny)
    return Affine(torch.exp(-theta / entropy * torch.log(n)) / t, torch.zeros_like(entropy))


@rule(paper="github.com/oobabooga/text-generation-webui/pull/5403")
def quadratic(
    row: Row,
    factor: Tensor = Param(0.3, low=0, off=0.0, sweep=(0.05, 0.1, 0.2, 0.3, 0.5, 1.0)),
    curve: Tensor = Param(1.0, low=1, high=3),
) -> Map:
    """Replace the distance of each logit to the largest by its square, or by a mixture of square and cube.

    Maps z = max + d to max - k factor d^2 + s factor d^3, k = (3 - curve) / 2, s = (curve - 1) / 2. Smoothing factor and curve,
    kalomaze 2024, no paper.

    Elsewhere: text-generation-webui `smoothing_factor`, `smoothing_curve`, Aphrodite; KoboldCpp and ExLlamaV2 without the
    curve.

    Differs: the largest logit is that of the row; in text-generation-webui it is that of the whole batch. Curves outside [1,
    3], which would lift unlikely tokens above likely ones, are refused.
    """
    top, k, s = row.max, (3 - curve) / 2, (curve - 1) / 2

    def smooth(z: Tensor) -> Tensor:
        d = (z - top).clamp(min=-(torch.finfo(z.dtype).max ** 0.25))  # the cube stays finite
        return top - k * factor * d**2 + s * factor * d**3

    return Map(smooth)


@rule(paper="arXiv:2605.11128", wants_cut=True)
def target_entropy(
    row: Row,
    h: Tensor = Param(0.7, low=0, sweep=(0.2, 0.4, 0.6, 0.8, 0.9, 1.0)),
    unit: str = Choice("fraction", "nats"),
) -> Map:
    """Divide the logits by the temperature at which the entropy is ``h``.

    Maps z to z / T with H(softmax(z / T)) = h log n over the n tokens still kept, or h nats. Where no temperature gives that
    entropy the nearest one does: uniform above log n, and nearly only the m modes below log m. It answers the shape fault of
    the paper cited, with the strength set by the row.
    """
    wanted = h * row.count.log() if unit == "fraction" else h

    def reshape(z: Tensor) -> Tensor:
        d = torch.where(z.isfinite(), z - row.max, 0.0)
        # In units of the row's own spread the solution lies between these scales, or at one of them.
        unit_scale = 1 / d.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        low, high = torch.full_like(unit_scale, -40.0), torch.full_like(unit_scale, 40.0)
        for _ in range(60):
            middle = (low + high) / 2
            too_even = _entropy(torch.where(z.isfinite(), d * unit_scale * torch.exp(LN2 * middle), -torch.inf)) > wanted
            low, high = torch.where(too_even, middle, low), torch.where(too_even, high, middle)
        even = wanted >= row.count.log() * (1 - 1e-12)
        return d * torch.where(even, 0.0, unit_scale * torch.exp(LN2 * (low + high) / 2))

    return Map(reshape)


def _entropy(z: Tensor) -> Tensor:
    log_p = z.log_softmax(-1)
    return -(log_p.exp() * log_p.clamp(min=torch.finfo(z.dtype).min)).sum(-1, keepdim=True)


@rule(paper="github.com/LostRuins/koboldcpp", side="after")
def cap(row: Row, p: Tensor = Param(0.5, low=0, high=1, off=1.0, sweep=(0.05, 0.1, 0.2, 0.3, 0.5, 0.8))) -> Map:
    """Give no token more probability than ``p``, and raise all the others by one factor.

    Maps p_i to min(c p_i, p) with the c at which they sum to 1 (water-filling); uniform where ``p`` is below 1 / n over the n
    tokens still kept. It is the law nearest to the model's in Kullback-Leibler divergence among those with no token above p.
    """
    logz, lowest, enough = row.logz, row.min, p * row.count > 1

    def fill(z: Tensor) -> Tensor:
        ranked = z.sort(-1, descending=True).values - logz
        capped = torch.arange(z.shape[1], device=z.device)
        # c if the first k are capped; right for the smallest k that leaves the next one below the cap.
        rest = ranked.flip(-1).logcumsumexp(-1).flip(-1)
        log_c = torch.log((1 - capped * p).clamp(min=0)) - rest
        fits = (log_c + ranked <= torch.log(p)) | ~ranked.isfinite()
        k = (~fits).cumprod(-1).sum(-1, keepdim=True).clamp(max=z.shape[1] - 1)
        level = logz + torch.log(p) - log_c.gather(-1, k)
        return torch.minimum(z, torch.where(enough & ~level.isnan(), level, lowest))

    return Map(fill)


def towards(z: Tensor, logz: Tensor, target: Tensor) -> Tensor:
    """Logits that fall off from the probability ``target`` with a heavy tail: 5 - 10 u^2 / (1 + u), u = |p - target| / 0.3."""
    u = (torch.exp(z - logz) - target).abs() / 0.3
    return 5 - 10 * u**2 / (1 + u)


@rule(paper="github.com/MrJackSpade/adaptive-p-docs", side="after", wants_cut=True)
def power_law(row: Row, target: Tensor = Param(0.5, low=0, high=1, sweep=(0.1, 0.2, 0.3, 0.4, 0.5, 0.7))) -> Map:
    """Prefer tokens whose probability is near ``target``.

    Maps z_i to 5 - 10 u^2 / (1 + u), u = |p_i - target| / 0.3. Every unlikely token gets about the same logit, so a cut must
    come before. It is ``adaptive_p`` without memory. MrJackSpade 2025, no paper.
    """
    logz = row.logz
    return Map(lambda z: towards(z, logz, target), monotone=False)


@rule(paper="github.com/turboderp-org/exllamav2", side="after")
def skew(row: Row, s: Tensor = Param(0.5, low=-10, high=10, off=0.0, sweep=(-0.5, 0.25, 0.5, 1.0, 1.5, 2.0))) -> Map:
    """Bend the cumulative distribution over the ranking: F becomes F^exp(``s``), so a positive ``s`` favours lower ranks.

    Maps p_i to F(i)^g - F(i - 1)^g, g = exp(s), F(i) the mass of the i most probable tokens; tokens of equal probability share
    alike. It is what a draw u^exp(-s) in place of a uniform u does to inverse-CDF sampling. ExLlamaV2, no paper.

    Elsewhere: ExLlamaV2 `skew`; Aphrodite `skew`.

    Differs: Aphrodite takes F in the order of the vocabulary instead of the ranking.
    """
    logz, g = row.logz, s.exp()

    def bend(z: Tensor) -> Tensor:
        ranked = z.sort(-1, descending=True).values
        falling, ascending = ranked.contiguous(), -ranked.contiguous()
        start = torch.searchsorted(ascending, -z.contiguous())
        end = torch.searchsorted(ascending, -z.contiguous(), right=True)
        log_f = (falling - logz).logcumsumexp(-1)
        log_mass = log_f.gather(-1, (end - 1).clamp(min=0)).clamp(max=0)
        size = (end - start).to(z)
        # The share of the group in its F, in logs: exact also where it is too small for a float.
        log_share = (z - logz + size.log() - log_mass).clamp(max=0)
        share = torch.where(start == 0, 1.0, log_share.exp())  # where rounding would matter
        small = log_share < -600
        log_gain = torch.where(small, g.log() + log_share, torch.log(-torch.expm1(g * torch.log1p(-share))))
        return g * log_mass + log_gain - size.log()

    return Map(bend, monotone=False)
