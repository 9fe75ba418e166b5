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
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from decal.samplers.errors import DecalError

if TYPE_CHECKING:
    from decal.samplers.chain import Chain

EXTREME = 0.005
"""Validity and diversity nearer to 0 or 1 count as this near: beyond it a few drafts can't tell anything apart."""

UNKNOWN = 0.1
"""Variance of a chain's log odds that the known prompts don't explain."""

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
        DecalError: shapes differ, a number is out of range, or there are less than `LEAST` prompts.
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
        if not all(0 <= number <= 1 for row in (*self.validity, *self.diversity) for number in row):
            raise DecalError("validity and diversity of a profile are in [0, 1]")


@dataclass(frozen=True)
class Chosen:
    """A chain, and what it is thought to give on the prompt.

    Attributes:
        chain: the chain.
        chance: probability that its validity reaches the floor.
        validity: median of its validity.
        interval: in which it lies with probability .95.
        diversity: median of its diversity, as known from other prompts; drafts aren't compared with each other.
    """

    chain: Chain
    chance: float
    validity: float
    interval: tuple[float, float]
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

        if not isinstance(floor, (int, float)) or not 0 < floor < 1:
            raise DecalError(f"the validity to be reached must be a number in (0, 1), got {floor!r}")
        self.floor = floor
        self.chains = tuple(parse(text) for text in profile.chains)
        self._names = [str(chain) for chain in self.chains]
        known = torch.cat([_log_odds(profile.validity), _log_odds(profile.diversity)])
        self._mean = known.mean(-1)
        self._covariance = torch.cov(known) + UNKNOWN * torch.eye(len(known), dtype=known.dtype)
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
        self._valid[at] += valid
        self._drafts[at] += drafts

    def best(self) -> Chosen:
        """The chain of largest expected score, its diversity where it reaches the floor and 0 where it doesn't."""
        mean, deviation = self._posterior()
        at = self._best()
        low, high = (float(torch.sigmoid(mean[at] + sign * 1.96 * deviation[at])) for sign in (-1, 1))
        return Chosen(
            chain=self.chains[at],
            chance=float(self._chances(mean, deviation)[at]),
            validity=float(torch.sigmoid(mean[at])),
            interval=(low, high),
            diversity=float(torch.sigmoid(mean[len(self.chains) + at])),
        )

    def _best(self, optimism: float = 0.0) -> int:
        mean, deviation = self._posterior()
        diversity = torch.sigmoid(mean[len(self.chains) :])
        return int((self._chances(mean, deviation, optimism) * diversity).argmax())

    def _chances(self, mean: Tensor, deviation: Tensor, optimism: float = 0.0) -> Tensor:
        """(S,) that the validity reaches the floor, if it is so many standard deviations larger than thought."""
        above = mean[: len(self.chains)] - math.log(self.floor / (1 - self.floor))
        return torch.special.ndtr(above / deviation[: len(self.chains)] + optimism)

    def _posterior(self) -> tuple[Tensor, Tensor]:
        """(2S,) mean and standard deviation of log odds of validity, then of diversity, given the drafts."""
        tried = self._drafts.nonzero()[:, 0]
        n, share = self._drafts[tried], (self._valid[tried] + 0.5) / (self._drafts[tried] + 1)
        # What a share says about log odds, and how surely: the delta method, with half a draft of either kind in between.
        noise = 1 / (n * share * (1 - share) + 0.25)
        gain = torch.linalg.solve(self._covariance[tried][:, tried] + noise.diag(), self._covariance[tried]).T
        mean = self._mean + gain @ (torch.logit(share) - self._mean[tried])
        variance = self._covariance.diagonal() - (gain * self._covariance[:, tried]).sum(-1)
        return mean, variance.clamp(min=1e-12).sqrt()


def _log_odds(shares: tuple[tuple[float, ...], ...]) -> Tensor:
    return torch.logit(torch.tensor(shares, dtype=torch.float64).clamp(EXTREME, 1 - EXTREME))
