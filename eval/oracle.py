"""What could be reached by someone who knew the valid answers: four oracles, kept apart.

========== ======================================= =====================================================================
oracle     knows                                   what falls short of (1, 1) there
========== ======================================= =====================================================================
size       how many next tokens are valid          keeps that many from the top: still a rank cutoff
best       which are valid, but may only cut       hardly more can be had by cutting: what is missing is order
mask       which are valid, and keeps just those   the model's shape within the valid tokens
count      how many answers each leads to          nothing: validity and diversity are 1 (Doob transform of the uniform law)
========== ======================================= =====================================================================

All but ``count`` are tried at every scale (1 / temperature, 0 for uniform) that a setting of the grid ends at. The end of an
answer counts as one valid next token, however many tokens end it. ``best`` are actual cutoffs; what no cutoff at these scales
can exceed is `BestCutoffs.bound`. Letting go of some valid tokens can even out the law over answers, so ``best`` may be more
diverse than ``mask``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from decal.eval.exact import Flow, Group, Interest
from decal.eval.ranked import RankedBlock, first
from decal.samplers.rule import find
from decal.samplers.trie import TokenTrie

PRICES = (-6.0, -4.0, -3.0, -2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 24.0, 40.0)
"""Prices of validity, in nats of entropy, at which the best cutoffs are computed."""

VALIDITIES = np.concatenate([[1e-9], np.arange(1, 199) / 200, 1 - np.array([3e-3, 2e-3, 1e-3, 5e-4, 2e-4, 1e-4, 0.0])])
"""(G,) ascending validities at which the bound on rank cutoffs is computed."""


def valid_next(trie: TokenTrie) -> np.ndarray:
    """(n,) number of valid next tokens, |G|, of each node; the end counts once."""
    live = leads_somewhere(trie)
    ends = np.asarray(trie.answer) >= 0 if trie.ends else np.zeros(len(trie), dtype=bool)
    return np.asarray([sum(live[c] for c in children.values()) for children in trie.children]) + ends


def leads_somewhere(trie: TokenTrie) -> np.ndarray:
    """(n,) whether an answer ends at a node or below it; not so where a spelling was followed and then given up."""
    live = np.asarray(trie.answer) >= 0
    for node in range(len(trie) - 1, 0, -1):
        live[trie.parent[node]] |= live[node]
    return live


def mean_bound(bounds: np.ndarray, floor: float) -> float:
    """Mean diversity over D prompts that no rank cutoffs with mean validity at least ``floor`` can exceed; NaN if none has it.

    Args:
        bounds: (D, G) what `BestCutoffs.bound` gives for each prompt.

    By duality again: for every exchange rate of diversity for validity, each prompt may choose its own validity.
    """
    if len(bounds) == 1:
        return float(bounds[0, max(0, np.searchsorted(VALIDITIES, floor + 1e-9) - 1)])
    most = np.append(VALIDITIES[1:], 1.0)
    rates = np.concatenate([[0.0], np.geomspace(1e-3, 1e4, 300)])
    gain = np.where(np.isfinite(bounds), bounds, -np.inf) + rates[:, None, None] * (most - floor)
    best = float(gain.max(-1).mean(-1).min())
    return best if best > 0 else float("nan")


def size_group(trie: TokenTrie, scales: Sequence[float], offset: int) -> Group:
    """The size oracle at each scale, as a chain whose k differs by node; settings are numbered from ``offset``."""
    k = torch.from_numpy(np.maximum(valid_next(trie), 1)).double().expand(len(scales), -1)
    t = 1 / torch.tensor(scales, dtype=torch.float64)[:, None]  # infinite at scale 0, and its inverse 0 again
    rules, values = (find("top_k"), find("temperature")), ({"k": k}, {"t": t})
    return Group(rules, values, tuple(range(offset, offset + len(scales))), frozenset(scales))


def count_flow(trie: TokenTrie) -> Flow:
    """The law that is uniform on the answers: each step in proportion to N, the answers it leads to."""
    flow = Flow.empty(1, trie)
    count = np.asarray(trie.count, dtype=float)
    ending = count.copy()
    for node in range(1, len(trie)):
        flow.arrive[0, node] = count[node] / max(count[trie.parent[node]], 1)
        ending[trie.parent[node]] -= count[node]
    flow.end[0] = torch.from_numpy(np.where(np.asarray(trie.answer) >= 0, ending / np.maximum(count, 1), 0.0))
    return flow


@dataclass
class Ranking:
    """Collects, while rows pass by, the probability and place in the ranking of every valid token; an observer of `flows`.

    Attributes:
        share: (K, J) probability of each of the J interesting tokens at each of the K scales.
        head: (K, J) probability of everything ranked no lower.
        place: (J,) position in the ranking of the last token of equal probability.
    """

    interest: Interest
    scales: Sequence[float]
    share: np.ndarray = field(init=False)
    head: np.ndarray = field(init=False)
    place: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        shape = len(self.scales), len(self.interest.node)
        self.share, self.head, self.place = np.zeros(shape), np.ones(shape), np.zeros(shape[1], dtype=np.int64)

    def __call__(self, block: RankedBlock, here: Interest, row: torch.Tensor, position: torch.Tensor) -> None:
        exists = position < block.alive[row]
        level = block.at(row, position)
        last = first(lambda i: block.at(row, i) < level, position.clamp(max=block.width - 1), block.alive[row])
        scales = block.scale_index(torch.tensor(self.scales, dtype=torch.float64))
        for number, scale in enumerate(scales):
            total = block.running("s", scale, row, block.alive[row])
            weight = torch.where(exists, (block.scales[scale] * level).exp(), 0.0)
            self.share[number, here.index] = (weight / total).numpy()
            self.head[number, here.index] = (block.running("s", scale, row, last) / total).numpy()
        self.place[here.index] = last.numpy()

    def mask_flow(self, trie: TokenTrie) -> Flow:
        """The validity-mask oracle at each scale."""
        flow = Flow.empty(len(self.scales), trie)
        on_trie = (self.interest.kind < 2) & leads_somewhere(trie)[self.interest.to]
        total = np.zeros((len(self.scales), len(trie)))
        np.add.at(total.T, self.interest.node[on_trie], self.share[:, on_trie].T)
        share = np.where(on_trie, self.share, 0.0) / np.where(total > 0, total, 1.0)[:, self.interest.node]
        step, end = self.interest.kind == 0, self.interest.kind == 1
        flow.arrive[:, self.interest.to[step]] = torch.from_numpy(share[:, step])
        flow.end.index_add_(1, torch.from_numpy(self.interest.to[end]), torch.from_numpy(share[:, end]))
        return flow


class BestCutoffs:
    """The rank cutoffs that buy the most entropy for their validity, at one scale.

    Among all choices of one cutoff per node it maximises ``-sum_y p(y) ln p(y) + price * sum_y p(y)`` over valid answers y.
    The maximum is a dynamic programme: below a node reached with probability r it is the same problem at ``price - ln r``, so
    each node has a value function of the price, kept on a grid and interpolated; the cutoffs found are then evaluated exactly.

    A cutoff behind an invalid token dilutes what stands before it, which costs validity but can even out the law over answers.
    So behind each valid token cutoffs are tried at several amounts of invalid probability, as if it came in any amount; finite
    steps are the only approximation. It changes the maximum at the rate ``entropy + (price - 1) * validity`` of what stands
    there, so from a price of 1 on there is no approximation, and actual cutoffs come out.

    It needs one path per answer; see `Policy.one_path_each`.
    """

    STEP = 0.25
    GRID = np.arange(-10.0, 50.0, STEP)

    def __init__(self, trie: TokenTrie, ranking: Ranking, scale: int):
        self.trie = trie
        self.tables: list[_Cuts | None] = [None] * len(trie)
        self.value = np.tile(self.GRID, (len(trie), 1))
        order = np.argsort(ranking.interest.node, kind="stable")
        bounds = np.searchsorted(ranking.interest.node[order], np.arange(len(trie) + 1))
        for node in range(len(trie) - 1, -1, -1):
            members = order[bounds[node] : bounds[node + 1]]
            members = members[ranking.interest.kind[members] < 2]
            if len(members):
                table = self.tables[node] = _Cuts.of(ranking, scale, members)
                self.value[node] = self._values(table, self.GRID[:, None]).max(-1)

    def _values(self, table: _Cuts, price: np.ndarray) -> np.ndarray:
        """Value of each cut at each price (P, 1); (P, cuts)."""
        worth = table.end * price - _xlogx(table.end)
        for child, share in zip(table.child, table.share, strict=True):
            kept = share > 0
            below = self._interpolate(child, price - np.log(np.where(kept, share, 1.0)))
            worth = worth + np.where(kept, share * below, 0.0)
        return worth

    def _interpolate(self, node: int, price: np.ndarray) -> np.ndarray:
        """Linear between grid points and beyond the last, where the value function has become a line."""
        place = (price - self.GRID[0]) / self.STEP
        left = np.clip(place.astype(np.int64), 0, len(self.GRID) - 2)
        value = self.value[node]
        return value[left] + (place - left) * (value[left + 1] - value[left])

    def bound(self) -> np.ndarray:
        """(G,) diversity that no rank cutoff with at least each of `VALIDITIES` can exceed; NaN where none has that much.

        Where the price of validity is below 1 it holds up to the steps in dilution: within a hundredth in brute force.

        By duality: with validity v the entropy sum is at most ``maximum(price) - price * v`` for every price. As a bound on
        ``ln(diversity * |V|)`` that falls and then rises with v, so between two points it is largest at one of them.
        """
        v = VALIDITIES[:, None]
        at = (self.value[0] - self.GRID * v) / v + np.log(v)
        entropy = np.maximum(at, [*at[1:], at[-1]]).min(-1)
        # An answer alone has entropy 0; a bound below that says that the validity is out of reach.
        held = np.where(entropy > -1e-6, np.exp(np.minimum(entropy - np.log(self.trie.size), 0.0)), np.nan)
        return np.fmax.accumulate(held[::-1])[::-1]

    def flow(self, prices: Sequence[float] = PRICES) -> Flow:
        """Follow the best cutoff of every node, one setting for each price."""
        flow = Flow.empty(len(prices), self.trie)
        price = np.zeros((len(prices), len(self.trie)))
        price[:, 0] = prices
        every = np.arange(len(prices))
        for node, table in enumerate(self.tables):
            if table is None:
                continue
            cut = self._values(table, price[:, node][:, None]).argmax(-1)
            flow.end[:, node] = torch.from_numpy(np.broadcast_to(table.end, (len(prices), table.end.shape[-1]))[every, cut])
            for child, share in zip(table.child, table.share, strict=True):
                flow.arrive[:, child] = torch.from_numpy(share[cut])
                price[:, child] = price[:, node] - np.log(np.where(share[cut] > 0, share[cut], 1.0))
        return flow


@dataclass(frozen=True)
class _Cuts:
    """The cutoffs worth considering at a node: what each gives the valid next steps.

    Attributes:
        end: (cuts,) probability of ending.
        child: nodes stepped to.
        share: for each of them (cuts,) the probability of the step.
    """

    end: np.ndarray
    child: list[int]
    share: list[np.ndarray]

    DILUTION = 1.25
    """Ratio between amounts of probability kept that are tried behind the same valid token."""

    @classmethod
    def of(cls, ranking: Ranking, scale: int, members: np.ndarray) -> _Cuts:
        place = ranking.place[members]
        behind, where = np.unique(place, return_index=True)
        head = ranking.head[scale, members][where]
        kept, which = cls._amounts(np.maximum(head, 1e-300), np.append(head[1:], 1.0))
        share = ranking.share[scale, members][:, None] * (place[:, None] <= behind[which]) / kept
        # The last cutoff stands before any valid token; it pays where validity costs.
        share = np.pad(share, ((0, 0), (0, 1)))
        is_end = ranking.interest.kind[members] == 1
        children = ranking.interest.to[members[~is_end]].tolist()
        return cls(share[is_end].sum(0), children, list(share[~is_end]))

    @classmethod
    def _amounts(cls, least: np.ndarray, most: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities kept by cutoffs behind each valid token and before the next: the least, the most, between; and which
        token each belongs to."""
        ratio = np.maximum(most / least, 1.0)
        steps = np.minimum(np.ceil(np.log(ratio) / np.log(cls.DILUTION)), 40).astype(np.int64)
        which = np.repeat(np.arange(len(least)), steps + 1)
        number = np.arange(len(which)) - np.repeat(np.cumsum(steps + 1) - steps - 1, steps + 1)
        return least[which] * ratio[which] ** (number / np.maximum(steps[which], 1)), which


def _xlogx(x: np.ndarray) -> np.ndarray:
    return x * np.log(np.where(x > 0, x, 1.0))
