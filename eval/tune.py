"""Which chain to use on given tasks: the most diverse one at a validity, and what it does on prompts that had no part in it.

Settings are drawn before anything is seen, the same number for every sampler, and each is evaluated exactly on every prompt. So
a choice made without some prompts can be judged on these at no cost, with all samplers and settings in the race each time
(nested validation): ``prompts`` leaves out one prompt of every task at a time, ``tasks`` one task.

Legend: S settings, T tasks, D prompts of each task, U units left out in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from decal.eval.frontier import TaskResult, interval
from decal.eval.grid import is_oracle
from decal.eval.task import Question
from decal.samplers.chain import parse
from decal.samplers.errors import DecalError

LEVEL = 0.95
"""Confidence of the intervals, and of a promise, which is one-sided."""

TARGETS = (0.0, 0.05, 0.1)
"""By how much the validity aimed at may lie above the one asked for, so that it can be promised."""

FEWEST = 3
"""Units left out in turn, below which there are no intervals."""

ENOUGH = 5
"""Units below which nothing is promised."""


@dataclass(frozen=True)
class Held:
    """What choosing gives where it had no part; each (U,).

    Attributes:
        validity: mean validity of what was chosen without the unit, on the unit; NaN where nothing could be chosen.
        diversity: its diversity there; 0 where nothing could be chosen, NaN if there is one unit only.
        entangled: whether units have a part in each other: a chain that reads the other prompts of a task gives all of them
            nearly the same law, so they are one observation and not many.
    """

    validity: np.ndarray
    diversity: np.ndarray
    entangled: bool = False

    @property
    def promise(self) -> float | None:
        """Validity that the mean over further units exceeds with probability `LEVEL`, for all `TARGETS` together (Bonferroni).

        By Student's law, so for validities that differ about normally; where they pile up at 1 it is broken more often, of five
        units in up to 18 % of cases. None if the units are fewer than `ENOUGH`, or entangled.
        """
        from scipy import stats

        n = len(self.validity)
        if n < ENOUGH or self.entangled or not np.isfinite(self.validity).all():
            return None
        half = stats.t.ppf(1 - (1 - LEVEL) / len(TARGETS), n - 1) * self.validity.std(ddof=1) / np.sqrt(n)
        return float(max(self.validity.mean() - half, 0.0))


@dataclass(frozen=True)
class Results:
    """Every setting on every prompt.

    Attributes:
        tasks: names, (T,).
        family, setting: (S,).
        validity, diversity: (S, T, D); a diversity that is undefined is 0.
        prompts: (T, D) as text.
    """

    tasks: tuple[str, ...]
    family: tuple[str, ...]
    setting: tuple[str, ...]
    validity: np.ndarray
    diversity: np.ndarray
    prompts: tuple[tuple[str, ...], ...] = ()

    @classmethod
    def of(cls, results: Sequence[TaskResult]) -> Results:
        """Of a run of `Evaluation`, without its oracles; see `same_number_of_prompts`."""
        first = results[0]
        kept = [i for i, family in enumerate(first.family) if not is_oracle(family)]
        validity = np.stack([r.validity[kept] for r in results], 1)
        diversity = np.stack([np.nan_to_num(r.diversity[kept]) for r in results], 1)
        names = tuple(r.question.task.name for r in results)
        prompts = tuple(tuple(r.prompts) for r in results)
        family, setting = (tuple(names[i] for i in kept) for names in (first.family, first.setting))
        return cls(names, family, setting, validity, diversity, prompts)

    @property
    def families(self) -> list[str]:
        """In the order they were tried."""
        return list(dict.fromkeys(self.family))

    @cached_property
    def mean(self) -> tuple[np.ndarray, np.ndarray]:
        """(S,) validity and diversity over everything."""
        return self.validity.mean((1, 2)), self.diversity.mean((1, 2))

    def choose(self, target: float, family: str | None = None, *, without: tuple[slice, slice] | None = None) -> int | None:
        """The setting of largest mean diversity among those of mean validity at least ``target``; None if there is none.

        Args:
            family: look at its settings only.
            without: tasks and prompts to leave out of the means.
        """
        validity, diversity = self.mean
        if without is not None:
            out = np.zeros(self.validity.shape[1:], dtype=bool)
            out[without] = True
            validity, diversity = self.validity[:, ~out].mean(-1), self.diversity[:, ~out].mean(-1)
        allowed = validity >= target - 1e-9
        if family is not None:
            allowed &= np.asarray(self.family) == family
        return int(np.argmax(np.where(allowed, diversity, -1.0))) if allowed.any() else None

    def held(self, over: str, target: float, family: str | None = None) -> Held:
        """Choose without each unit in turn and look at it there; the units are ``prompts`` or ``tasks``."""
        _, tasks, prompts = self.validity.shape
        every = slice(None)
        units = (
            [(slice(t, t + 1), every) for t in range(tasks)]
            if over == "tasks"
            else [(every, slice(d, d + 1)) for d in range(prompts)]
        )
        if len(units) < 2:
            return Held(np.full(len(units), np.nan), np.full(len(units), np.nan))
        chosen = [self.choose(target, family, without=unit) for unit in units]
        pairs = list(zip(chosen, units, strict=True))
        validity = [np.nan if c is None else self.validity[c][unit].mean() for c, unit in pairs]
        diversity = [0.0 if c is None else self.diversity[c][unit].mean() for c, unit in pairs]
        entangled = over == "prompts" and any(c is not None and "prompts" in parse(self.setting[c]).needs for c in chosen)
        return Held(np.asarray(validity), np.asarray(diversity), entangled)


@dataclass(frozen=True)
class Advice:
    """The chain to use.

    Attributes:
        family, chain: the sampler, and the chain as text.
        target: the mean validity it was chosen at.
        validity, diversity: on what it was chosen on, which flatters it.
        prompts, tasks: where it had no part.
    """

    family: str
    chain: str
    target: float
    validity: float
    diversity: float
    prompts: Held
    tasks: Held


@dataclass(frozen=True)
class Tuning:
    """What tuning found.

    Attributes:
        floor: the validity asked for.
        over: what a promise is about: further ``prompts`` of these tasks, or further ``tasks``.
        best: the most diverse chain at the floor; None if no setting reaches it.
        promised: the most diverse chain for which the data can promise the floor; None if there is none.
        families: the best of every sampler, None where no setting reaches the floor.
    """

    floor: float
    over: str
    best: Advice | None
    promised: Advice | None
    families: dict[str, Advice | None]


def tune(results: Results, floor: float, over: str = "prompts") -> Tuning:
    """The chain to use at a validity floor."""
    return Tuning(
        floor,
        over,
        advise(results, floor),
        _promised(results, floor, over),
        {family: advise(results, floor, family) for family in results.families},
    )


def advise(results: Results, target: float, family: str | None = None) -> Advice | None:
    """The best setting at a mean validity, of a family or of all."""
    chosen = results.choose(target, family)
    if chosen is None:
        return None
    validity, diversity = results.mean
    held = [results.held(over, target, family) for over in ("prompts", "tasks")]
    return Advice(
        results.family[chosen], results.setting[chosen], target, float(validity[chosen]), float(diversity[chosen]), *held
    )


def _promised(results: Results, floor: float, over: str) -> Advice | None:
    """The most diverse of what each target chooses, among those that can be promised."""
    found = []
    for target in sorted({min(floor + more, 1.0) for more in TARGETS}):
        advice = advise(results, target)
        if advice is not None:
            promise = (advice.tasks if over == "tasks" else advice.prompts).promise
            found += [advice] if promise is not None and promise >= floor - 1e-9 else []
    return max(found, key=lambda advice: advice.diversity, default=None)


def same_number_of_prompts(questions: Sequence[Question], tokenizer: Any, seed: int) -> None:
    """Raise DecalError if tasks are put with different numbers of prompts, so that they can't be left out alike."""
    counts = {q.task.name: sum(1 for _ in q.prompts(tokenizer, seed)) for q in questions}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise DecalError(
            f"tasks must be put with the same number of prompts, got {told}; few-shot prompts are as many as --draws, others "
            "as many as a task has phrasings"
        )


def spread(sample: np.ndarray) -> tuple[float, float]:
    """Student's interval of the mean; NaN from fewer than `FEWEST`."""
    known = sample[np.isfinite(sample)]
    return interval(known) if len(known) >= FEWEST else (float("nan"), float("nan"))
