"""Everything decal computes over the vocabulary, the obvious way, in plain torch: the oracle of every test.

Legend: ``z_BV`` logits of B rows over V tokens, -inf where a token is dropped; ``(B, 1)`` one number per row. Arithmetic is
float64 (float32 on devices without it), so that no kept set hangs on rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from decal.kernels import mass as integer
from decal.kernels import random
from decal.kernels.mass import wide
from decal.kernels.statistics import INEXACT, SCALED, exp, term


def clean(z_BV: Tensor) -> Tensor:
    """``z_BV`` in wide floats; NaN becomes -inf (a dropped token), +inf the largest finite value of its type."""
    top = torch.finfo(z_BV.dtype).max
    return z_BV.to(wide(z_BV.device)).nan_to_num(nan=-torch.inf, posinf=top, neginf=-torch.inf)


def moments(z_BV: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
    """Sums over the kept tokens, relative to the largest logit; each (B, 1).

    All but `INEXACT` are exact; see `decal.kernels.mass.limbs`.
    """
    kept = z_BV.isfinite()
    d = torch.where(kept, z_BV - z_BV.amax(-1, keepdim=True), 0.0)
    if d.dtype != torch.float64:
        return {name: torch.where(kept, term(name, d, d.exp()), 0.0).sum(-1, keepdim=True) for name in names}
    e = exp(d)
    return {name: _sum(name, d, e, kept) for name in names}


def _sum(name: str, d: Tensor, e: Tensor, kept: Tensor) -> Tensor:
    # Terms that may be large are scaled by a power of two.
    power = SCALED.get(name, 0)
    exponent = power * torch.frexp(d.amin(-1, keepdim=True))[1]
    if power:
        d = torch.ldexp(d, -exponent // power)
    if name == INEXACT:
        return torch.where(kept, term(name, d, e), 0.0).sum(-1, keepdim=True)
    high, low = integer.limbs(torch.where(kept, term(name, d, e), 0.0))
    return torch.ldexp(integer.joined(high.sum(-1, keepdim=True), low.sum(-1, keepdim=True)), exponent)


def running_sums(level: Tensor, alive: Tensor, scale: float, out: Mapping[str, Tensor]) -> None:
    """Running sums of moments over rows in decreasing order: into ``out``, by name, (R, V + 1) each, the first column being 0.

    Args:
        level: (R, V) logits less the largest of the row.
        alive: (R,) how many of a row's, from the first, count.
        scale: what the levels are multiplied with.
    """
    dead = torch.arange(level.shape[1], device=level.device) >= alive[:, None]
    d = scale * level.masked_fill(dead, 0.0)
    e = exp(d).masked_fill_(dead, 0.0)
    for name, sums in out.items():
        sums[:, 0] = 0.0
        torch.cumsum(term(name, d, e).masked_fill_(dead, 0.0), -1, out=sums[:, 1:])


def masses(z_BV: Tensor) -> Tensor:
    """(B, V) integer masses; see `decal.kernels.mass`. Dropped tokens have none."""
    d = z_BV - z_BV.amax(-1, keepdim=True)
    if wide(z_BV.device) != torch.float64:
        return integer.mass(d.cpu().double()).to(z_BV.device)
    return integer.mass(d)


def _crossing(reached: Tensor, share: Tensor) -> Tensor:
    """(B, 1) first place where the running mass (B, V) reaches a share of the whole."""
    target = integer.needed(share.to(wide(share.device)), reached[:, -1:])
    return (reached < target).sum(-1, keepdim=True)


def upper(z_BV: Tensor, *, count: Tensor | None = None, mass: Tensor | None = None) -> Tensor:
    """Logit of the last token of the smallest top set that holds ``count`` tokens, or ``mass`` of the probability; (B, 1)."""
    last = (z_BV.isfinite().sum(-1, keepdim=True) - 1).clamp(min=0)
    if count is not None:
        index = count.clamp(1, z_BV.shape[-1]).long().expand_as(last) - 1
        ranked = z_BV.topk(int(index.max()) + 1, -1).values
    else:
        assert mass is not None
        ranked = z_BV.sort(-1, descending=True).values
        index = _crossing(masses(ranked).cumsum(-1), mass)
    return ranked.gather(-1, index.minimum(last))


def nearest(z_BV: Tensor, center: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest logit of the tokens nearest to the logit ``center`` that together hold ``mass``; each (B, 1).

    Tokens as far from ``center`` as the last one needed belong to the set too.
    """
    distance = torch.where(z_BV.isfinite(), (z_BV - center).abs(), torch.inf)
    ranked, order = distance.sort(-1)
    last = (ranked.isfinite().sum(-1, keepdim=True) - 1).clamp(min=0)
    index = _crossing(masses(z_BV).gather(-1, order).cumsum(-1), mass).minimum(last)
    inside = distance <= ranked.gather(-1, index)
    low = torch.where(inside, z_BV, torch.inf).amin(-1, keepdim=True)
    high = torch.where(inside, z_BV, -torch.inf).amax(-1, keepdim=True)
    return low, high


def smallest_from(z_BV: Tensor, level: Tensor) -> Tensor:
    """The smallest kept logit that is at least ``level``; inf if there is none; (B, 1)."""
    return torch.where((z_BV >= level) & z_BV.isfinite(), z_BV, torch.inf).amin(-1, keepdim=True)


def keep(z_BV: Tensor, kept: Tensor) -> Tensor:
    """``z_BV`` with every logit that isn't ``kept`` at -inf; a row with nothing kept is left alone."""
    return z_BV.masked_fill(~kept & (kept & z_BV.isfinite()).any(-1, keepdim=True), -torch.inf)


def keep_between(z_BV: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``z_BV`` with every logit outside [low, high] at -inf; a row with nothing inside is left alone."""
    outside = (z_BV < low) | (z_BV > high)
    return z_BV.masked_fill(outside & (~outside & z_BV.isfinite()).any(-1, keepdim=True), -torch.inf)


def affine(z_BV: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``scale * z + shift`` of the kept tokens; an infinite scale is the limit, where only the modes stay."""
    peak = z_BV.amax(-1, keepdim=True)
    modes = torch.where(z_BV == peak, z_BV, -torch.inf)
    finite = torch.where(scale.isinf(), 1.0, scale)
    # Only differences matter, so a row that would overflow is moved to have its largest at 0.
    fits = (finite * peak + shift).isfinite()
    mapped = finite * (z_BV - torch.where(fits, 0.0, peak)) + torch.where(fits, shift, 0.0)
    mapped = mapped.clamp(min=torch.finfo(z_BV.dtype).min)
    return torch.where(scale.isinf(), modes, torch.where(z_BV.isfinite(), mapped, -torch.inf))


def remap(z_BV: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """``fn`` of the logits; what was dropped stays so, and a row that would be emptied is left alone."""
    mapped = torch.where(z_BV.isfinite(), fn(z_BV), -torch.inf)
    empty = ~(mapped > -torch.inf).any(-1, keepdim=True)
    return torch.where(empty, z_BV, mapped)


def narrow(z_BV: Tensor, dtype: torch.dtype) -> Tensor:
    """Back to ``dtype`` without a kept token leaving its finite range.

    Only differences of logits matter, so a row too high or too low for ``dtype`` is moved to have its largest at 0.
    """
    top = torch.finfo(dtype).max
    peak = z_BV.amax(-1, keepdim=True)
    moved = torch.where(peak.isfinite() & (peak.abs() > top / 2), z_BV - peak, z_BV)
    return torch.where(z_BV.isneginf(), -torch.inf, moved.clamp(min=-top)).to(dtype)


def draw(z_BV: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """(B,) tokens drawn from softmax(z), a function of the logits, ``seed`` and ``position``, (B, 1) each.

    A race of exponentials: the token of the largest exp(z) / E wins, E exponentially distributed and a function of seed,
    position and token id; the first of equals.
    """
    d = z_BV - z_BV.amax(-1, keepdim=True)
    token = torch.arange(z_BV.shape[1], device=z_BV.device)
    score = torch.where(z_BV.isfinite(), exp(d), 0.0) / random.exponential(seed, position, token)
    return (score == score.amax(-1, keepdim=True)).byte().argmax(-1)
