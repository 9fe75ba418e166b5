"""Which sampler is best at matched validity: mean diversity over tasks, with paired bootstrap intervals.

Legend: F families, T tasks, D prompts of a task, R resamples, S settings of a task.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from decal.eval.frontier import LEVEL, ORACLES, TaskResult
from decal.eval.grid import is_oracle

RESAMPLES = 2000
SPLITS = 100
"""Halvings of the prompts over which held-out scores are averaged: all there are, or that many at random."""

PLAIN = "temperature"
"""The family that the others are compared to."""

DIGITS = 12
"""Decimals after which scores count as tied."""


@dataclass(frozen=True)
class Estimate:
    """A number and its interval at `LEVEL`; without ends if there is nothing to resample."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Held:
    """How a family does on prompts that its settings were not chosen on.

    Attributes:
        score: as `Place.score`.
        validity: mean validity of the chosen settings there, over the tasks for which one could be chosen; None if for none.
        lowest: that of the task on which it is lowest.
    """

    score: Estimate
    validity: float | None
    lowest: float | None


@dataclass(frozen=True)
class Place:
    """A family in a ranking.

    Attributes:
        family: its name.
        settings: how many were tried on a task.
        distinct: how many of them gave different results, on the task where most did.
        reached: on how many tasks a setting reaches the floor.
        score: mean over tasks of the diversity of the most diverse setting that reaches the floor; 0 on a task where none does.
        gain: the score less that of plain temperature; None for that itself and for oracles.
        held: on held-out prompts; None if every task has one prompt only.
        rank: 1 for the best, and for its equals; None for oracles. Its interval is that of the rank in the resamples.
        best: share of the resamples in which it is the best, shared among equals; None for oracles or without resamples.
    """

    family: str
    settings: int
    distinct: int
    reached: int
    score: Estimate
    gain: Estimate | None
    held: Held | None
    rank: Estimate | None
    best: float | None


@dataclass(frozen=True)
class Advice:
    """The setting to use where one has to do for all tasks.

    Attributes:
        setting: the chain, as text.
        reached: on how many tasks its mean validity reaches the floor.
        score: mean over tasks of its diversity; 0 on a task where it doesn't.
    """

    setting: str
    reached: int
    score: float


@dataclass(frozen=True)
class Ranking:
    """All families at one validity floor.

    Attributes:
        floor: the validity floor.
        prompts: (T,) how many prompts each task has.
        places: the samplers, best first.
        oracles: those defined on every task; they know the valid answers and are not ranked.
        bound: mean over tasks of the diversity that no rank cutoff can exceed at this floor; None if unknown for a task.
        advice: None if no setting reaches the floor on any task.
    """

    floor: float
    prompts: tuple[int, ...]
    places: tuple[Place, ...]
    oracles: tuple[Place, ...]
    bound: float | None
    advice: Advice | None

    def find(self, family: str) -> Place | None:
        """The place of a family, oracle or not."""
        return next((p for p in (*self.places, *self.oracles) if p.family == family), None)

    @property
    def contenders(self) -> int:
        """How many samplers have rank 1 within the interval of their rank."""
        return sum(p.rank is not None and p.rank.low == 1 for p in self.places)

    @property
    def usual_settings(self) -> int:
        """How many settings most families have that have something to tune beside the temperature."""
        tuned = [p.settings for p in self.places if p.family not in (PLAIN, "greedy")]
        return Counter(tuned or [p.settings for p in self.places]).most_common(1)[0][0]

    @property
    def unusual_settings(self) -> dict[str, int]:
        """The families with another number of settings than most."""
        return {p.family: p.settings for p in self.places if p.settings != self.usual_settings}

    @property
    def basis(self) -> str:
        """What the intervals are over, in a sentence or two."""
        several = max(self.prompts) > 1
        what = f"Intervals are {LEVEL * 100:g} % bootstrap intervals"
        units = len(self.prompts) if len(self.prompts) > 1 else self.prompts[0]
        # Measured on normal data (tests/test_ranking.py): the spread of so few is underestimated.
        few = " Of so few they cover less: of 6 about 85 to 90 %, of 3 about 74 to 82 %." if units < 20 else ""
        if len(self.prompts) > 1:
            over = "tasks are drawn with replacement" + (", then prompts within each" if several else "; each has one prompt")
            return f"{what}: {over}, the same draws for every sampler.{few}"
        if several:
            return f"{what} over the prompts of this one task; they say nothing of other tasks.{few}"
        return "There are no intervals: one task with one prompt leaves nothing to resample."


def rank(tasks: Sequence[TaskResult], floor: float, *, resamples: int = RESAMPLES, seed: int = 0) -> Ranking:
    """Rank every family of samplers at a validity floor.

    Each family is represented on each task by its most diverse setting with mean validity at least ``floor``. It is chosen on
    the prompts it is scored on, which flatters families with many settings; `Held` does without. Resampling doesn't repeat the
    choice.
    """
    families = list(dict.fromkeys(f for task in tasks for f in task.families()))
    members = [[task.members(family) for family in families] for task in tasks]
    prompts = tuple(task.validity.shape[1] for task in tasks)
    rng = np.random.default_rng(seed)
    if max(prompts) == 1 == len(tasks):
        resamples = 0
    chosen = [choose(task, of, floor) for task, of in zip(tasks, members, strict=True)]
    score, scores = _averages([_scores(t, c) for t, c in zip(tasks, chosen, strict=True)], weights(prompts, resamples, rng))
    tested = [i for i, many in enumerate(prompts) if many > 1]
    held = [held_out(tasks[i], members[i], floor, rng) for i in tested]
    if held:
        held_score, held_scores = _averages([s for s, _ in held], weights([prompts[i] for i in tested], resamples, rng))

    samplers = [i for i, family in enumerate(families) if not is_oracle(family)]
    rank_, ranks = _ranks(score[samplers]), _ranks(scores[:, samplers])
    wins = (ranks == 1) / (ranks == 1).sum(-1, keepdims=True)
    plain = families.index(PLAIN) if PLAIN in families else -1

    def place(i: int, j: int) -> Place:
        """Of family i, which is the j-th sampler; -1 for oracles."""
        compared = j >= 0 and plain not in (-1, i)
        return Place(
            family=families[i],
            settings=max(len(of[i]) for of in members),
            distinct=max(distinct(task, of[i]) for task, of in zip(tasks, members, strict=True)),
            reached=sum(int(choice[i] >= 0) for choice in chosen),
            score=_estimate(score[i], scores[:, i]),
            gain=_estimate(score[i] - score[plain], scores[:, i] - scores[:, plain]) if compared else None,
            held=_held(_estimate(held_score[i], held_scores[:, i]), [v[i] for _, v in held]) if held else None,
            rank=_estimate(rank_[j], ranks[:, j]) if j >= 0 else None,
            best=float(wins[:, j].mean()) if j >= 0 and len(wins) else None,
        )

    places = [place(i, j) for j, i in enumerate(samplers)]
    known = [*ORACLES, *(f for f in families if is_oracle(f) and f not in ORACLES)]
    everywhere = [f for f in known if f in families and all(len(of[families.index(f)]) for of in members)]
    bounds = [task.bound(floor) for task in tasks if task.bounds is not None]
    return Ranking(
        floor=floor,
        prompts=prompts,
        places=tuple(places[j] for j in np.argsort(rank_, kind="stable")),
        oracles=tuple(place(families.index(f), -1) for f in everywhere),
        # As for samplers, a floor that isn't reached counts as 0.
        bound=float(np.mean(np.nan_to_num(bounds))) if len(bounds) == len(tasks) else None,
        advice=advise(tasks, floor),
    )


def advise(tasks: Sequence[TaskResult], floor: float) -> Advice | None:
    """The best setting to use on all tasks, chosen on the prompts it is scored on; settings that a task lacks count 0 there."""
    scores: dict[str, list[float]] = {}
    for task in tasks:
        good = (task.mean_validity >= floor - 1e-9) & np.isfinite(task.mean_diversity)
        for number in np.flatnonzero(good):
            if not is_oracle(task.family[number]):
                scores.setdefault(task.setting[number], []).append(float(task.mean_diversity[number]))
    if not scores:
        return None
    best = max(scores, key=lambda setting: sum(scores[setting]))
    return Advice(best, len(scores[best]), sum(scores[best]) / len(tasks))


def distinct(task: TaskResult, members: np.ndarray) -> int:
    """How many of the settings ``members`` differ in what they give, to nine digits."""
    given = np.concatenate([task.validity[members], np.nan_to_num(task.diversity[members], nan=-1.0)], -1)
    return len(np.unique(given.round(9), axis=0))


def weights(prompts: Sequence[int], resamples: int, rng: np.random.Generator) -> list[np.ndarray]:
    """What each prompt counts in a mean over tasks of means over prompts, in resamples: T arrays (R, D).

    Tasks are drawn with replacement, and each time a task is drawn, its prompts are.
    """
    many = len(prompts)
    times = rng.multinomial(many, np.full(many, 1 / many), size=resamples)
    # A task drawn m times has its D prompts drawn m D times in all.
    return [rng.multinomial(times[:, t] * d, np.full(d, 1 / d)) / (many * d) for t, d in enumerate(prompts)]


def choose(
    task: TaskResult, members: Sequence[np.ndarray], floor: float, prompts: np.ndarray | slice = slice(None)
) -> np.ndarray:
    """(F,) number of the setting that `TaskResult.best` would choose from these prompts alone; -1 for none.

    Args:
        members: F arrays, numbers of the settings of each family.
    """
    validity, diversity = task.validity[:, prompts].mean(-1), task.diversity[:, prompts].mean(-1)
    worth = np.where((validity >= floor - 1e-9) & np.isfinite(diversity), diversity, -1.0)
    best = [of[worth[of].argmax()] if len(of) else -1 for of in members]
    return np.array([i if i >= 0 and worth[i] >= 0 else -1 for i in best])


def held_out(
    task: TaskResult, members: Sequence[np.ndarray], floor: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Diversity and validity (F, D) on each prompt of the settings chosen on halves of the prompts without it.

    Means over `SPLITS` halvings, each used both ways. Diversity counts as 0 if no setting reached the floor on the other
    half, or if the chosen one gives no valid answer here; validity is NaN if no setting ever did.
    """
    many = task.validity.shape[1]
    score, validity, counted = (np.zeros((len(members), many)) for _ in range(3))
    orders = _halvings(many, rng)
    for order in orders:
        for here, there in ((order[: many // 2], order[many // 2 :]), (order[many // 2 :], order[: many // 2])):
            choice = choose(task, members, floor, there)
            score[:, here] += _scores(task, choice)[:, here]
            validity[:, here] += np.where(choice[:, None] >= 0, task.validity[choice][:, here], 0.0)
            counted[:, here] += choice[:, None] >= 0
    return score / len(orders), np.divide(validity, counted, out=np.full_like(validity, np.nan), where=counted > 0)


def _halvings(many: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Orders of the prompts whose first half is one half, the rest the other."""
    if math.comb(many, many // 2) > SPLITS:
        return [rng.permutation(many) for _ in range(SPLITS)]
    halves = itertools.combinations(range(many), many // 2)
    return [np.array([*half, *sorted(set(range(many)) - set(half))]) for half in halves]


def _scores(task: TaskResult, choice: np.ndarray) -> np.ndarray:
    """(F, D) diversity of the chosen settings, 0 where none was chosen or none is defined."""
    return np.where(choice[:, None] >= 0, np.nan_to_num(task.diversity[choice]), 0.0)


def _averages(scores: Sequence[np.ndarray], draws: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Means over tasks of means over prompts of T arrays (F, D): as they are, (F,), and in every resample, (R, F)."""
    return np.mean([s.mean(-1) for s in scores], 0), np.sum([w @ s.T for w, s in zip(draws, scores, strict=True)], 0)


def _ranks(scores: np.ndarray) -> np.ndarray:
    """Rank of each of the last axis, 1 the largest; equals share the better rank."""
    from scipy import stats

    ranks: np.ndarray = stats.rankdata(-scores.round(DIGITS), method="min", axis=-1)
    return ranks


def _estimate(value: float, draws: np.ndarray) -> Estimate:
    if not len(draws):
        return Estimate(float(value))
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(value), float(low), float(high))


def _held(score: Estimate, validity: Sequence[np.ndarray]) -> Held:
    by_task = [float(np.nanmean(v)) for v in validity if np.isfinite(v).any()]
    return Held(score, float(np.mean(by_task)) if by_task else None, min(by_task, default=None))
