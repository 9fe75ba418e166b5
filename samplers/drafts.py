"""Choose a chain for one prompt by judging a few of its drafts, with what chains gave on other prompts as prior knowledge.

What settings give differs more between prompts than between samplers, and can't be told without trying. But settings go
together: a prompt on which one is more valid than elsewhere is one on which its neighbours are. So the log odds of validity and
diversity of all chains on a new prompt are taken to be normal, with mean and covariance of those on known prompts, as in Wang
et al., "Pre-trained Gaussian Processes for Bayesian Optimization" (arXiv:2109.08215), and a few drafts of some chains say what
all of them give. Which to try next is optimistic, as in Srinivas et al. (arXiv:0912.3995).

Legend: S chains, P prompts.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from decal.samplers.errors import DecalError

if TYPE_CHECKING:
    from decal.samplers.chain import Chain

EXTREME = 0.005
"""Validity and diversity nearer to 0 or 1 count as this near: beyond it a few drafts can't tell anything apart."""

UNKNOWN = 0.1
"""Variance of a chain's log odds that the known prompts don't explain, of each chain by itself."""

UNLIKE = 1.0
"""Variance of log odds of validity of all chains together: a prompt may be harder or easier than any known one."""

OPTIMISM = 1.0
"""How many standard deviations above its mean a chain's log odds of validity may be hoped to be, when it is worth trying."""

LEAST = 8
"""Fewer prompts say too little about how chains go together."""


@dataclass(frozen=True)
class Profile:
    """What some chains gave on prompts whose valid answers are known.

    Attributes:
        chains: (S,) as text.
        validity, diversity: (S, P) in [0, 1]. Diversity is the effective number of valid answers divided by their number.

    Raises:
        DecalError: shapes differ, a number is out of range, a chain is there twice, or there are less than `LEAST` prompts.
    """

    chains: tuple[str, ...]
    validity: tuple[tuple[float, ...], ...]
    diversity: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        prompts = {len(row) for row in (*self.validity, *self.diversity)}
        if not len(self.chains) == len(self.validity) == len(self.diversity) or len(prompts) != 1:
            raise DecalError(
                f"a profile has validity and diversity of each of its {len(self.chains)} chains on the same prompts, got"
                f" {len(self.validity)} and {len(self.diversity)} rows of {sorted(prompts)} numbers"
            )
        if min(prompts) < LEAST:
            raise DecalError(f"a profile needs at least {LEAST} prompts, got {min(prompts)}")
        if len(set(self.chains)) < len(self.chains):
            raise DecalError("the chains of a profile differ, and one is there twice")
        if not all(0 <= number <= 1 for row in (*self.validity, *self.diversity) for number in row):
            raise DecalError("validity and diversity of a profile are in [0, 1]")


@dataclass(frozen=True)
class Chosen:
    """A chain, and what it is thought to give on the prompt.

    Attributes:
        chain: the chain.
        chance: probability that its validity reaches the floor.
        validity: median of its validity.
        diversity: median of its diversity, going by how it goes with validity elsewhere; drafts aren't compared.
    """

    chain: Chain
    chance: float
    validity: float
    diversity: float


class Search:
    """Which chain to use on a prompt: ask for one to draft with, tell how many drafts were valid, again and again.

    ::

        search = decal.calibrated.load("smollm2.json", model, tokenizer).search(0.8)
        for _ in range(10):
            texts = draft(prompt, search.ask(), 5)
            search.tell(valid=sum(map(is_valid, texts)), drafts=5)
        search.best()

    The same answers give the same questions. Chances are those of the model above: `docs/calibration.md` has how often what it
    calls likely comes true.

    Args:
        profile: what the chains gave on other prompts of the same model.
        floor: validity in (0, 1) to be reached.

    Raises:
        DecalError: floor out of range.
    """

    def __init__(self, profile: Profile, floor: float):
        from decal.samplers.chain import parse

        if not isinstance(profile, Profile):
            raise DecalError(f"a search takes a Profile, got {profile!r}")
        self.floor = _share(floor)
        self.chains = tuple(parse(text) for text in profile.chains)
        self._names = [str(chain) for chain in self.chains]
        known = torch.cat([_log_odds(profile.validity), _log_odds(profile.diversity)])
        self._mean = known.mean(-1)
        self._covariance = torch.cov(known) + UNKNOWN * torch.eye(len(known), dtype=known.dtype)
        self._covariance[: len(self.chains), : len(self.chains)] += UNLIKE
        self._valid = torch.zeros(len(self.chains), dtype=torch.float64)
        self._drafts = torch.zeros(len(self.chains), dtype=torch.float64)

    @property
    def drafts(self) -> int:
        """How many drafts it was told of."""
        return int(self._drafts.sum())

    def ask(self) -> Chain:
        """The chain that the next drafts tell most about: the best one, hoping for the best where little is known."""
        return self.chains[self._best(OPTIMISM if self.drafts else 0.0)]

    def tell(self, valid: int, drafts: int, chain: Chain | None = None) -> None:
        """How many of some drafts are valid, of a chain of the search, or of the one that `ask` gives.

        Raises:
            DecalError: not 0 <= valid <= drafts with at least one draft, or a chain that isn't of the search.
        """
        whole = isinstance(valid, numbers.Integral) and isinstance(drafts, numbers.Integral)
        if not (whole and 0 <= valid <= drafts and drafts >= 1):
            raise DecalError(f"of at least 1 draft none to all are valid, in whole numbers, got {valid!r} of {drafts!r}")
        chain = self.ask() if chain is None else chain
        if str(chain) not in self._names:
            raise DecalError(f"the search has no chain {chain}; it has {len(self.chains)}, from {self.chains[0]} on")
        at = self._names.index(str(chain))
        self._valid[at] += float(valid)
        self._drafts[at] += float(drafts)

    def best(self) -> Chosen:
        """The chain of largest expected score, its diversity where it reaches the floor and 0 where it doesn't."""
        mean, deviation = self._posterior()
        at = self._best()
        return Chosen(
            chain=self.chains[at],
            chance=float(self._log_chances(mean, deviation)[at].exp()),
            validity=float(torch.sigmoid(mean[at])),
            diversity=float(torch.sigmoid(mean[len(self.chains) + at])),
        )

    def _best(self, optimism: float = 0.0) -> int:
        mean, deviation = self._posterior()
        diversity = torch.nn.functional.logsigmoid(mean[len(self.chains) :])
        return int((self._log_chances(mean, deviation, optimism) + diversity).argmax())

    def _log_chances(self, mean: Tensor, deviation: Tensor, optimism: float = 0.0) -> Tensor:
        """(S,) of the validity to reach the floor, if it is so many standard deviations larger than thought."""
        above = mean[: len(self.chains)] - math.log(self.floor / (1 - self.floor))
        return torch.special.log_ndtr(above / deviation[: len(self.chains)] + optimism)

    def _posterior(self) -> tuple[Tensor, Tensor]:
        """(2S,) mean and standard deviation of log odds of validity, then of diversity, given the drafts.

        Laplace's approximation, as in Rasmussen and Williams, Gaussian Processes for Machine Learning, section 3.4.
        """
        tried = self._drafts.nonzero()[:, 0]
        across = self._covariance[:, tried]
        weight, information = _mode(self._mean[tried], across[tried], self._valid[tried], self._drafts[tried])
        gain = torch.linalg.solve(across[tried] + (1 / information).diag(), across.T).T
        variance = self._covariance.diagonal() - (gain * across).sum(-1)
        return self._mean + across @ weight, variance.clamp(min=1e-12).sqrt()


def _mode(mean: Tensor, covariance: Tensor, valid: Tensor, drafts: Tensor) -> tuple[Tensor, Tensor]:
    """Where normal log odds are likeliest given how many drafts are valid: covariance^-1 (mode - mean), and the information
    drafts(1 - share) share there, (n,) each. Newton's method, with shorter steps where a whole one overshoots."""

    def fit(weight: Tensor) -> Tensor:
        z = mean + covariance @ weight
        likely = valid * torch.nn.functional.logsigmoid(z) + (drafts - valid) * torch.nn.functional.logsigmoid(-z)
        return likely.sum() - weight @ (z - mean) / 2

    weight = torch.zeros_like(mean)
    for _ in range(100):
        z = mean + covariance @ weight
        information = (drafts * torch.sigmoid(z) * torch.sigmoid(-z)).clamp(min=1e-12)
        pull = information * (z - mean) + valid - drafts * torch.sigmoid(z)
        step = torch.linalg.solve(torch.eye(len(z), dtype=z.dtype) + information[:, None] * covariance, pull) - weight
        size, before = 1.0, fit(weight)
        while size > 1e-6 and fit(weight + size * step) < before:
            size /= 2
        weight = weight + size * step
        if not len(step) or float((size * (covariance @ step)).abs().max()) < 1e-10:
            break
    z = mean + covariance @ weight
    return weight, (drafts * torch.sigmoid(z) * torch.sigmoid(-z)).clamp(min=1e-12)


def _share(floor: Any) -> float:
    if not isinstance(floor, numbers.Real) or isinstance(floor, bool) or not 0 < float(floor) < 1:
        raise DecalError(f"the validity to be reached must be a number in (0, 1), got {floor!r}")
    return float(floor)


def _log_odds(shares: tuple[tuple[float, ...], ...]) -> Tensor:
    return torch.logit(torch.tensor(shares, dtype=torch.float64).clamp(EXTREME, 1 - EXTREME))
