"""Rules that read the model's embeddings: tokens are kept for what they mean, not for their rank alone."""

from __future__ import annotations

import torch
from torch import Tensor

from decal.samplers.errors import DecalError
from decal.samplers.row import Keep, Row
from decal.samplers.rule import Param, rule

PRECISION = 1e-5
"""Probability below which the solver, exact to 1e-7, can't tell whether a token is needed: it is dropped."""


def _columns(row: Row, index: Tensor) -> Tensor:
    """Token ids of the columns ``index`` (B, m)."""
    return index if row.tokens is None else row.tokens.gather(-1, index)


@rule(paper="arXiv:2602.10346", slow="it compares the embeddings of its pool with each other in every row")
def top_w(
    row: Row,
    beta: Tensor = Param(2.8, low=0, sweep=(2.3, 2.5, 2.8, 3.2, 4.0, 6.0)),
    lam: Tensor = Param(2.2, low=0),
    geometry: Tensor = Param(0.6, low=0),
    pool: int = Param(1200, low=1, integer=True, static=True),
    rounds: int = Param(9, low=1, integer=True, static=True),
) -> Keep:
    """Keep a set of tokens that is probable, low in entropy, and near in meaning to what it leaves out.

    Kept: S that locally minimises geometry W1(p, p_S) + lam H(p_S) - beta log p(S) over the ``pool`` most probable tokens,
    found in ``rounds`` rounds: phi_i = lam log p_i - geometry d(i, S), S = the prefix of the order by phi that maximises sum_S
    p phi / p(S) + (beta - lam) log p(S). d is the least cosine distance to a token of S between input embeddings, standardised
    over the vocabulary. It begins with the tokens of 0.999 of the mass. Top-W, 2026.

    Differs: the authors' code breaks ties at the end of the pool and of the set at random; here the order of the vocabulary
    does. As published, the search begins where every likely token is in S, at distance 0, so that the geometry seldom matters.
    """
    weights = row.weights

    def keep(z: Tensor) -> Tensor:
        log_z, index = (ranked[:, : int(pool)] for ranked in z.sort(dim=-1, descending=True, stable=True))
        alive = log_z.isfinite()
        log_p = torch.where(alive, log_z - row.logz, -torch.inf)
        p = log_p.exp()
        x = weights.standardised[_columns(row, index).to(weights.embedding.device)].to(z)
        near = (x @ x.transpose(1, 2)).clamp(-1, 1)
        mass = p.cumsum(-1)
        chosen = (mass - p < 0.999 * mass[:, -1:]) & alive
        for _ in range(int(rounds)):
            distance = 1 - near.masked_fill(~chosen[:, None], -torch.inf).amax(-1)
            phi = lam * log_p.clamp(min=-27.631021115928547) - geometry * distance  # log 1e-12, as published
            order = phi.masked_fill(~alive, -torch.inf).argsort(dim=-1, descending=True, stable=True)
            held = p.gather(-1, order).cumsum(-1).clamp(min=1e-12)
            score = (p * phi).gather(-1, order).cumsum(-1) / held + (beta - lam) * held.log()
            best = score.masked_fill(~alive.gather(-1, order), -torch.inf).argmax(-1, keepdim=True)
            rank = torch.arange(order.shape[1], device=z.device).expand_as(order)
            again = torch.zeros_like(chosen).scatter(-1, order, rank <= best)
            if torch.equal(again, chosen):
                break
            chosen = again
        return torch.zeros_like(z, dtype=torch.bool).scatter(-1, index, chosen)

    return Keep(keep)


@rule(paper="arXiv:2310.01693", side="before", slow="it solves a linear program for every token it tests")
def basis_aware(
    row: Row,
    eps: Tensor = Param(2e-3, low=0, high=1, off=0.0, sweep=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
    rank: int = Param(20, low=1, integer=True, static=True),
    tries: int = Param(10, low=0, integer=True, static=True),
) -> Keep:
    """Keep tokens above the threshold of ``eta``, and those below it that the output layer's errors can't explain away.

    Kept: p_i >= t = min(eps, sqrt(eps) exp(-H)); and of the next ``tries`` tokens those for which no law q with q_i = 0 and 0
    <= q <= p / (1 - t) has the same projection as p on the ``rank`` first singular directions of the output embeddings. Needs
    scipy; a token of probability below 1e-5 is beyond its solver's precision and dropped. Closing the Curious Case of Neural
    Text Degeneration, Finlayson et al. 2023.

    Differs: the authors' code draws tokens and tests those it draws, at most ten; testing the most probable ones makes the kept
    set a function of the row. It leaves out q >= 0, which a law satisfies.
    """
    weights = row.weights
    threshold = torch.minimum(eps, eps.sqrt() * torch.exp(-row.entropy))

    def keep(z: Tensor) -> Tensor:
        p = z.softmax(-1)
        kept = (p >= threshold) | (z == row.max)
        below = p.masked_fill(kept, 0.0)
        ranked = (t[:, : int(tries)] for t in below.sort(dim=-1, descending=True, stable=True))
        for place, (values, index) in enumerate(zip(*ranked, strict=True)):
            basis = weights.directions(int(rank)).to(z)
            ids = torch.arange(z.shape[1], device=z.device) if row.tokens is None else row.tokens[place]
            limit = float(threshold.expand(len(z), 1)[place])
            for value, column in zip(values.tolist(), index.tolist(), strict=True):
                if value > PRECISION:
                    kept[place, column] = not _explained(p[place], basis[ids], column, limit)
        return kept

    return Keep(keep)


def _explained(p: Tensor, basis: Tensor, column: int, threshold: float) -> bool:
    """Whether a law without token ``column`` could have been seen as ``p`` through the basis (V, c)."""
    try:
        from scipy.optimize import linprog
    except ImportError:
        raise DecalError("basis_aware needs scipy: pip install scipy") from None
    import numpy as np

    alive = (p > 0).cpu().numpy()
    alive[column] = False
    law, directions = p.double().cpu().numpy(), basis.double().cpu().numpy()
    # In units of the token's own probability the change of the others must make up for it; the solver's tolerance is absolute.
    share = law[alive] / law[column]
    table = np.vstack([directions[alive].T * share, share])
    bounds = (-1.0, threshold / max(1 - threshold, 1e-10))
    missing = np.append(directions[column], 1.0)
    return int(linprog(np.zeros(len(share)), A_eq=table, b_eq=missing, bounds=bounds, method="highs").status) != 2
