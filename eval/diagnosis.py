"""Which fault limits a model on a task: order, shape, or neither (arXiv 2605.11128, in numbers).

All of it is about the model as it is, at temperature 1, and exact up to the rounding of its forward pass, except for what is
called an estimate. Gaps compare what samplers and oracles reach on a grid of settings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from decal.eval import order, shape
from decal.eval.frontier import ORACLES, TaskResult, interval
from decal.eval.grid import is_oracle
from decal.eval.order import Level, Prefix
from decal.eval.ranking import Estimate, held_out
from decal.eval.theory import Compounding, compounding
from decal.samplers.errors import DecalError
from decal.samplers.trie import TokenTrie

RECALL_TARGETS = (0.5, 0.8, 0.9, 0.95, 0.99, 1.0)
PRECISION_TARGETS = (1.0, 0.95, 0.9, 0.8, 0.5)
"""What cutoffs are asked for at every prefix; their sequence precision and recall make the measured curve."""

AS_MANY = "as many as are valid"
"""The cutoff of the size oracle."""

ETAS = np.geomspace(1e-3, 4, 40)
"""Bounds on -log of local precision at which hardness is estimated."""

SMALL = 0.05
"""A gap in diversity below this is none worth a headline."""


@dataclass(frozen=True)
class Sequences:
    """A cutoff at every prefix, and what comes of it step by step."""

    name: str
    steps: Compounding


@dataclass(frozen=True)
class Choice:
    """The choices of one depth, in nats, as a uniformly drawn answer meets them.

    Attributes:
        depth, reach: as `decal.eval.order.Level`.
        entropy: of the model's choice, given that it is valid.
        ideal: of the choice in proportion to completions.
        uniform: ln of the number of valid steps.
        divergence: what the depth contributes to KL(uniform on V || p).
    """

    depth: int
    reach: float
    entropy: float
    ideal: float
    uniform: float
    divergence: shape.Divergence


@dataclass(frozen=True)
class Hardness:
    """How hard the steps are in the sense of Theorem 4.2: an estimate, for which prefixes are weighted as a uniformly drawn
    answer meets them. A cutoff's own law meets them otherwise, so what follows may be exceeded.

    Attributes:
        eta: (E,) bounds on -log of local precision.
        rho: (steps, E) what -log of local recall is at least, for cutoffs within the bound; infinite if there are none.
    """

    eta: np.ndarray
    rho: np.ndarray

    def bound(self, precision: float) -> float:
        """What Theorem 4.2 says of the sequence recall at that sequence precision, for steps as hard as estimated."""
        best = 1.0
        for eta, rho in zip(self.eta, self.rho.T, strict=True):
            # The m hardest steps are all at least as hard as the m-th.
            for m, least in enumerate(np.sort(rho)[::-1], 1):
                excess = m + math.log(precision) / eta
                if excess > 0:
                    best = min(best, math.exp(-least * excess))
        return best


@dataclass(frozen=True)
class Diagnosis:
    """Of a model on one prompt.

    Attributes:
        answers: |V|.
        levels: order at each depth, prefixes and steps weighted by completions.
        unit_levels: the same with every prefix and every step alike.
        choices: shape at each depth.
        given_valid: diversity of the model's law if only valid tokens were kept (the validity mask, at temperature 1).
        sequences: cutoffs, and how their errors compound; empty if Theorem E.1 doesn't apply.
        hardness: None then.
    """

    answers: int
    levels: list[Level]
    unit_levels: list[Level]
    choices: list[Choice]
    given_valid: float
    sequences: list[Sequences]
    hardness: Hardness | None

    @property
    def divergence(self) -> shape.Divergence:
        """KL(uniform on V || p) in parts; see `decal.eval.shape`."""
        return shape.Divergence(
            *(sum(getattr(c.divergence, part) for c in self.choices) for part in ("order", "tail", "shape"))
        )

    def mean(self, name: str) -> float:
        """Mean of a number of `Level` over the steps of a uniformly drawn answer."""
        reach = np.asarray([one.reach for one in self.levels])
        return float((reach * [getattr(one, name) for one in self.levels]).sum() / reach.sum())


def diagnose(trie: TokenTrie, found: Sequence[Prefix], swept: int | None = None) -> Diagnosis:
    """What a model's logits say of its order and shape.

    Args:
        trie: the answers, one token sequence each.
        found: its prefixes, of `decal.eval.order.prefixes`.
        swept: see `decal.eval.order.level`.

    Raises:
        DecalError: an answer has several token sequences: then completions of a prefix aren't defined.
    """
    if sum(a >= 0 for a in trie.answer) != trie.size or not all(trie.count):
        raise DecalError("order and shape need answers with one token sequence each: tokenisation canonical, case exact")
    applies = bool(trie.ends)
    return Diagnosis(
        answers=trie.size,
        levels=order.levels(found, "counts", swept),
        unit_levels=order.levels(found, "unit", swept),
        choices=[_choice(some, trie.size) for some in order.by_depth(found)],
        given_valid=_given_valid(trie, found),
        sequences=list(_sequences(trie, found)) if applies else [],
        hardness=_hardness(found) if applies else None,
    )


def _choice(some: Sequence[Prefix], answers: int) -> Choice:
    reach = np.asarray([p.count.sum() / answers for p in some])

    def mean(values: Sequence[float]) -> float:
        return float((reach * np.asarray(values)).sum() / reach.sum())

    return Choice(
        depth=some[0].depth,
        reach=float(reach.sum()),
        entropy=mean([shape.entropy(p.share) for p in some]),
        ideal=mean([shape.entropy(p.count) for p in some]),
        uniform=mean([math.log(len(p.count)) for p in some]),
        divergence=shape.total_divergence(some, answers),
    )


def _given_valid(trie: TokenTrie, found: Sequence[Prefix]) -> float:
    """The entropy of a law is that of its choices, each weighted with the probability of coming to it; NaN if the model rules
    out all that is valid at a prefix it comes to."""
    come = np.zeros(len(trie))
    come[0] = 1.0
    entropy = 0.0
    for p in found:  # parents come before their children
        if come[p.node] and not p.share.any():
            return math.nan
        entropy += come[p.node] * shape.entropy(p.share)
        inner = p.to >= 0
        come[p.to[inner]] = come[p.node] * p.share[inner] / max(p.share.sum(), 1e-300)
    return math.exp(entropy) / trie.size


def _sequences(trie: TokenTrie, found: Sequence[Prefix]) -> Any:
    """Cutoffs that know the answers, from those that keep every valid step to those that keep nothing else."""
    for r in reversed(RECALL_TARGETS):
        yield _follow(f"local recall {r:g}", trie, found, [p.size_at(r) for p in found])
    for target in reversed(PRECISION_TARGETS):
        yield _follow(f"local precision {target:g}", trie, found, [p.size_with(target) for p in found])
    yield _follow(AS_MANY, trie, found, [len(p.count) for p in found])


def _follow(name: str, trie: TokenTrie, found: Sequence[Prefix], sizes: Sequence[int]) -> Sequences:
    return Sequences(name, compounding(trie, order.kept(trie, found, sizes)))


PRICES = np.concatenate([[0.0], np.geomspace(1e-4, 1e4, 121)])
"""Recall that a unit of precision is worth, at which the best trade between the two is looked for."""


def _hardness(found: Sequence[Prefix]) -> Hardness:
    answers = float(found[0].count.sum())
    rho = [-np.log(_most_recall(some, answers)) for some in order.by_depth(found)]
    return Hardness(ETAS, np.asarray(rho))


def _most_recall(some: Sequence[Prefix], answers: float) -> np.ndarray:
    """(E,) mean local recall at a depth that no cutoffs with mean local precision at least exp(-`ETAS`) exceed, 1e-300 where
    there are none. By duality: at every price the best trade bounds them all. An answer that has ended stays right."""
    weight = np.asarray([p.count.sum() for p in some], dtype=float) / answers
    best = (1 - weight.sum()) * (1 + PRICES)
    for share, p in zip(weight, some, strict=True):
        best = best + share * (p.recall() + PRICES[:, None] * p.precision).max(-1)
    most = (best[:, None] - PRICES[:, None] * np.exp(-ETAS)).min(0)
    return np.clip(most, 1e-300, 1.0)


# ---- gaps


@dataclass(frozen=True)
class Gaps:
    """What keeps a task from a diversity of 1 at a validity floor; differences of diversities, with intervals over prompts.

    Every diversity is that of the best setting whose mean validity reaches the floor, 0 where none does.

    Attributes:
        size, cut, mask: of three oracles: as many tokens as are valid, from the top; the best cutoff of every ranking; just the
            valid tokens. Each at the best temperature of the grid, or uniform.
        order: mask less the better of the two others: what no cutoff repairs. It may be negative, since to drop valid tokens
            too can even out the law over answers.
        shape: 1 less the mask at temperature 1: how unevenly the model shares between valid steps. Whatever the floor.
        rest: 1 less mask.
        cutoff: for every family of samplers, the better of size and cut less the family; negative where it does better.
        setting: for every family that reaches the floor, the setting that does best.
        held: for every family of samplers, the diversity of the settings that do best on half of the prompts, on the others;
            empty for one prompt.
        held_best: the same for all samplers together, `held_validity` their validity there; None if none was chosen.

    What lacks a setting that reaches the floor counts as 0, and its gaps have no intervals.
    """

    floor: float
    size: float
    cut: float
    mask: float
    order: Estimate
    shape: Estimate
    rest: Estimate
    cutoff: Mapping[str, Estimate]
    setting: Mapping[str, str]
    held: Mapping[str, Estimate]
    held_best: Estimate | None
    held_validity: float | None

    @property
    def reached(self) -> tuple[str, float]:
        """The best family of samplers, and its diversity."""
        family = min(self.cutoff, key=lambda f: self.cutoff[f].value)
        return family, max(self.size, self.cut) - self.cutoff[family].value


def gaps(result: TaskResult, floor: float, given_valid: np.ndarray) -> Gaps:
    """The gaps of a task; ``given_valid`` (D,) is `Diagnosis.given_valid` of every prompt."""

    def reached(family: str) -> np.ndarray:
        chosen = result.chosen(family, floor)
        return np.zeros(len(result.prompts)) if chosen is None else result.diversity[chosen]

    def gap(high: np.ndarray, low: np.ndarray) -> Estimate:
        found = estimate(high - low, -1.0)
        return found if high.any() and low.any() else Estimate(found.value)

    size, cut, mask = (reached(oracle) for oracle in ORACLES[:3])
    ceiling = max(size, cut, key=np.mean)
    samplers = [f for f in result.families() if not is_oracle(f)]
    held, validity = _held(result, samplers, floor)
    return Gaps(
        floor=floor,
        size=float(size.mean()),
        cut=float(cut.mean()),
        mask=float(mask.mean()),
        order=gap(mask, ceiling),
        shape=estimate(1 - given_valid),
        rest=estimate(1 - mask),
        cutoff={f: gap(ceiling, reached(f)) for f in samplers},
        setting={f: best.setting for f in samplers if (best := result.best(f, floor))},
        held=dict(zip(samplers, held, strict=False)),
        held_best=held[-1] if held else None,
        held_validity=validity,
    )


def _held(result: TaskResult, samplers: Sequence[str], floor: float) -> tuple[list[Estimate], float | None]:
    """Held-out diversity of every family and of all together, and validity of the latter."""
    if len(result.prompts) < 2:
        return [], None
    members = [result.members(f) for f in samplers]
    everything = [*members, np.concatenate(members)]
    diversity, validity = held_out(result, everything, floor, np.random.default_rng(0))
    chosen = np.isfinite(validity[-1])
    return [estimate(d) for d in diversity], float(validity[-1][chosen].mean()) if chosen.any() else None


def estimate(sample: Sequence[float] | np.ndarray, least: float = 0.0, most: float = 1.0) -> Estimate:
    """The mean over prompts with its interval; none if there are fewer than two, or one is infinite."""
    values = np.asarray(sample, dtype=float)
    if len(values) < 2 or not np.isfinite(values).all():
        return Estimate(float(values.mean()))
    return Estimate(float(values.mean()), *interval(values, least, most))


def headline(found: Gaps) -> str:
    """What limits a task, in a sentence or two."""
    family, diversity = found.reached
    where = f"at validity ≥ {found.floor:g}"
    setting = found.setting.get(family)
    best = f"The best sampler, {setting}, reaches {diversity:.2f}." if setting else "No sampler is that valid."
    size, cut = (f"reaches diversity {v:.2f}" if v else "never is that valid" for v in (found.size, found.cut))
    cuts = f"keeping as many tokens as are valid {size}, the best cutoff {cut}, keeping just the valid ones {found.mask:.2f}"
    flat = (
        f"among the valid tokens the model reaches {1 - found.shape.value:.2f} at temperature 1, {found.mask:.2f} at the best"
    )
    parts = {"order": (found.order, cuts), "shape": (found.shape, flat)}
    first, second = sorted(parts, key=lambda part: -parts[part][0].value)
    if parts[first][0].value < SMALL or diversity > 1 - SMALL:
        return f"Neither order nor shape limits this {where}. {best}"
    much = parts[second][0].value >= max(SMALL, parts[first][0].value / 3)
    also = f"; {second} does too: {parts[second][1]}" if much else ""
    low = parts[first][0].low
    unsure = " Prompts differ so much that this is not sure." if low is not None and low < SMALL else ""
    return f"{first.capitalize()} limits this {where}: {parts[first][1]}{also}. {best}{unsure}"
