"""Order: whether a model ranks valid next tokens above invalid ones, prefix by prefix (arXiv 2605.11128, Definition 4.1).

A *step* is a valid thing to do after a prefix: write a token that some answer continues with, or end the answer. Ending is one
step, whatever tokens end it; it stands where the most probable of them does, and the others count for nothing. A step's
completions are the answers it leads to, N of Definition 3.2. Tokens of equal probability are kept or dropped together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch

from decal.eval.exact import Interest, Rows, flows
from decal.eval.oracle import leads_somewhere
from decal.eval.ranked import RankedBlock, first
from decal.eval.theory import Kept
from decal.samplers.trie import TokenTrie

Weighting = Literal["counts", "unit"]
"""How much a valid step counts in recall: as many answers as it leads to, as in the paper, or as much as any other."""

RECALLS = np.linspace(0.0, 1.0, 101)
"""Recalls at which precision-recall curves are averaged."""


@dataclass(frozen=True)
class Prefix:
    """The v valid steps after one prefix, most probable first, among ``tokens`` that the model gives any probability.

    Attributes:
        node, depth: where in the trie.
        to: (v,) the node each leads to, -1 for the end.
        count: (v,) completions of each.
        above: (v,) number of tokens more probable than it.
        upto: (v,) number of tokens at least as probable, itself included.
        share: (v,) its probability at temperature 1.
        head: (v,) probability of the tokens at least as probable.
        tokens: size of the ranking.
    """

    node: int
    depth: int
    to: np.ndarray
    count: np.ndarray
    above: np.ndarray
    upto: np.ndarray
    share: np.ndarray
    head: np.ndarray
    tokens: int

    @cached_property
    def valid_upto(self) -> np.ndarray:
        """(v,) number of valid steps at least as probable as each."""
        return np.searchsorted(self.upto, self.upto, side="right")

    @cached_property
    def precision(self) -> np.ndarray:
        """(v,) share of valid steps among what is kept by the cutoff just behind each."""
        return self.valid_upto / self.upto

    def weight(self, weighting: Weighting) -> np.ndarray:
        """(v,) weight of each step in recall, summing to 1."""
        weight = self.count if weighting == "counts" else np.ones(len(self.count))
        return weight / weight.sum()

    def recall(self, weighting: Weighting = "counts") -> np.ndarray:
        """(v,) weight of the valid steps that are kept by the cutoff just behind each."""
        return np.cumsum(self.weight(weighting))[self.valid_upto - 1]

    def average_precision(self, weighting: Weighting = "counts") -> float:
        """Precision at the cutoff behind each valid step, averaged over them; 1 if and only if order is perfect."""
        return float((self.weight(weighting) * self.precision).sum())

    def recall_at(self, precision: float, weighting: Weighting = "counts") -> float:
        """Largest recall of a cutoff with at least that precision; 0 if no cutoff has it."""
        return float(self.recall(weighting)[self.precision >= precision - 1e-12].max(initial=0.0))

    @property
    def r_precision(self) -> float:
        """Share of valid steps among as many tokens as there are valid steps, from the top; ties kept only together."""
        return float((self.upto <= len(self.upto)).mean())

    @property
    def inversions(self) -> float:
        """Number of pairs of a valid step and an invalid token of which the invalid one is more probable; half for equals."""
        valid_above = np.searchsorted(self.upto, self.above, side="right")
        invalid_above = self.above - valid_above
        equal = self.upto - self.above - (self.valid_upto - valid_above)
        return float((invalid_above + 0.5 * equal).sum())

    @property
    def auroc(self) -> float:
        """Probability that a valid step is more probable than an invalid token. Close to 1 whatever the model, as almost all of
        a vocabulary is invalid: no headline. NaN if nothing is invalid."""
        pairs = len(self.upto) * (self.tokens - len(self.upto))
        return 1 - self.inversions / pairs if pairs else float("nan")

    def swept(self, ranks: int) -> Prefix | None:
        """The same, had only the first ``ranks`` tokens been looked at; None if no valid step is among them."""
        seen = self.upto <= ranks
        if not seen.any():
            return None
        arrays = {name: getattr(self, name)[seen] for name in ("to", "count", "above", "upto", "share", "head")}
        return replace(self, **arrays, tokens=min(ranks, self.tokens))

    def best_precision(self, weighting: Weighting = "counts") -> np.ndarray:
        """(101,) largest precision of a cutoff with at least each of `RECALLS`."""
        # From the back, as what has more recall has at least as much.
        from_here = np.maximum.accumulate(self.precision[::-1])[::-1]
        reached = np.searchsorted(self.recall(weighting), RECALLS - 1e-9)
        return from_here[np.minimum(reached, len(from_here) - 1)]

    def size_at(self, recall: float, weighting: Weighting = "counts") -> int:
        """Size of the smallest cutoff with at least that recall."""
        return int(self.upto[min(int(np.searchsorted(self.recall(weighting), recall - 1e-9)), len(self.upto) - 1)])

    def size_with(self, precision: float) -> int:
        """Size of the largest cutoff that ends behind a valid step and has at least that precision, or 1 if there is none."""
        valid = np.flatnonzero(self.precision >= precision - 1e-12)
        if not len(valid):
            return 1
        last = valid[-1]
        # Invalid tokens behind the last valid one may be kept too, but buy nothing.
        return int(self.upto[last])


@dataclass
class _Places:
    """Collects, while rows pass by, where every interesting token stands; an observer of `flows`."""

    interest: Interest
    nodes: int
    above: np.ndarray = field(init=False)
    upto: np.ndarray = field(init=False)
    share: np.ndarray = field(init=False)
    head: np.ndarray = field(init=False)
    alive: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        size = len(self.interest.node)
        self.above, self.upto = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
        self.share, self.head = np.zeros(size), np.zeros(size)
        self.alive = np.zeros(self.nodes, dtype=np.int64)

    def __call__(self, block: RankedBlock, here: Interest, row: torch.Tensor, position: torch.Tensor) -> None:
        exists = position < block.alive[row]
        level = block.at(row, position)
        last = first(lambda i: block.at(row, i) < level, position.clamp(max=block.width - 1), block.alive[row])
        unit = block.scale_index(torch.ones(1, dtype=torch.float64))
        total = block.running("s", unit, row, block.alive[row])
        self.above[here.index] = position.numpy()
        # What has no probability at all stands behind everything.
        self.upto[here.index] = torch.where(exists, last, block.width).numpy()
        self.share[here.index] = torch.where(exists, level.exp() / total, 0.0).numpy()
        self.head[here.index] = torch.where(exists, block.running("s", unit, row, last) / total, 1.0).numpy()
        self.alive[here.node] = block.alive[row].numpy()


def prefixes(trie: TokenTrie, rows: Rows) -> list[Prefix]:
    """Every prefix of an answer, with its valid steps as the model ranks them.

    Args:
        trie: with one token sequence for each answer.
        rows: logits of its nodes.
    """
    interest = Interest.of(trie)
    places = _Places(interest, len(trie))
    flows(trie, rows, [], 0, places)
    live = leads_somewhere(trie)
    order = np.argsort(interest.node, kind="stable")
    bounds = np.searchsorted(interest.node[order], np.arange(len(trie) + 1))
    count = np.asarray(trie.count)
    found = []
    for node in range(len(trie)):
        here = order[bounds[node] : bounds[node + 1]]
        steps = here[(interest.kind[here] == 0) & live[interest.to[here]]]
        ends = here[interest.kind[here] == 1]
        if not len(steps) + len(ends):
            continue
        ending = count[node] - sum(count[child] for child in trie.children[node].values())
        found.append(_prefix(trie, node, places, steps, ends, count[interest.to[steps]], ending))
    return found


def _prefix(
    trie: TokenTrie, node: int, places: _Places, steps: np.ndarray, ends: np.ndarray, counts: np.ndarray, ending: int
) -> Prefix:
    above, upto, head = places.above[steps], places.upto[steps], places.head[steps]
    share, to = places.share[steps], places.interest.to[steps]
    tokens = int(max(places.alive[node], 1))
    if len(ends):
        best = ends[np.argmin(places.upto[ends])]
        rest = places.upto[ends[ends != best]]
        others = np.sort(rest[rest <= places.alive[node]])
        to, counts = np.append(to, -1), np.append(counts, ending)
        share = np.append(share, places.share[ends].sum())
        above, upto = np.append(above, places.above[best]), np.append(upto, places.upto[best])
        # Who keeps the end keeps all of it.
        lower = places.share[ends] * (places.upto[ends] > upto[:, None])
        head = np.append(head, places.head[best]) + np.where(upto >= places.upto[best], lower.sum(-1), 0.0)
        above, upto = above - np.searchsorted(others, above, "right"), upto - np.searchsorted(others, upto, "right")
        tokens -= len(others)
    ranked = np.lexsort((above, upto))
    to, counts, above, upto, share, head = (part[ranked] for part in (to, counts, above, upto, share, head))
    return Prefix(node, trie.depth[node], to, counts, above, upto, share, head, max(tokens, int(upto.max())))


def kept(trie: TokenTrie, found: Sequence[Prefix], sizes: Sequence[int]) -> Kept:
    """What a cutoff keeps that has that many tokens at each of the prefixes, for `decal.eval.theory.compounding`."""
    n = len(trie)
    size, step, ends = np.ones(n, dtype=np.int64), np.zeros(n, dtype=bool), np.zeros(n, dtype=np.int64)
    step[0] = True
    for prefix, k in zip(found, sizes, strict=True):
        inside = prefix.upto <= k
        size[prefix.node] = k
        step[prefix.to[inside & (prefix.to >= 0)]] = True
        ends[prefix.node] = int((inside & (prefix.to < 0)).any())
    return Kept(size, step, ends)


@dataclass(frozen=True)
class Level:
    """The prefixes of one length together, means over them: weighted by completions, that is as a uniformly drawn answer meets
    them, or each alike.

    Attributes:
        depth: tokens written before.
        reach: share of the answers that are so long.
        prefixes, steps: how many prefixes there are, and the mean number of valid steps.
        average_precision, recall_at_08, r_precision, inversions, auroc: see `Prefix`.
        curve: (101,) mean of `Prefix.best_precision`.
    """

    depth: int
    reach: float
    prefixes: int
    steps: float
    average_precision: float
    recall_at_08: float
    r_precision: float
    inversions: float
    auroc: float
    curve: np.ndarray

    @property
    def area(self) -> float:
        """Under the curve, in [0, 1]."""
        return float((self.curve[1:] + self.curve[:-1]).mean() / 2)


def level(some: Sequence[Prefix], answers: int, weighting: Weighting = "counts", swept: int | None = None) -> Level:
    """The means over some prefixes, which are all of one depth.

    Args:
        answers: |V|.
        weighting: of prefixes and, in recall, of steps.
        swept: look at so many tokens of a ranking only, and at prefixes that have a valid step there.
    """
    seen = [one for prefix in some if (one := prefix if swept is None else prefix.swept(swept)) is not None]
    reach = float(sum(p.count.sum() for p in some)) / answers
    if not seen:
        nothing = (float("nan"),) * 6
        return Level(some[0].depth, reach, 0, *nothing, np.full(len(RECALLS), np.nan))
    weight = np.asarray([float(p.count.sum()) if weighting == "counts" else 1.0 for p in seen])
    weight /= weight.sum()

    def mean(values: Sequence[float]) -> float:
        return float((weight * np.asarray(values)).sum())

    return Level(
        depth=some[0].depth,
        reach=reach,
        prefixes=len(seen),
        steps=mean([len(p.upto) for p in seen]),
        average_precision=mean([p.average_precision(weighting) for p in seen]),
        recall_at_08=mean([p.recall_at(0.8, weighting) for p in seen]),
        r_precision=mean([p.r_precision for p in seen]),
        inversions=mean([p.inversions for p in seen]),
        auroc=mean([p.auroc for p in seen]),
        curve=weight @ np.stack([p.best_precision(weighting) for p in seen]),
    )


def levels(found: Sequence[Prefix], weighting: Weighting = "counts", swept: int | None = None) -> list[Level]:
    """`level` for each depth, the root first; ``found`` are all prefixes of a trie."""
    answers = int(found[0].count.sum())
    return [level(some, answers, weighting, swept) for some in by_depth(found)]


def by_depth(found: Sequence[Prefix]) -> list[list[Prefix]]:
    """The prefixes of each depth, the root first."""
    depths = sorted({p.depth for p in found})
    return [[p for p in found if p.depth == depth] for depth in depths]
