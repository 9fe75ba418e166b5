"""Fit what calibrated rules need, on tasks with known valid answers: weights of the validity estimate, chains, risk levels.

What is said of new tasks comes from tasks left out: on each task settings are tried as fitted on other folds of tasks, and a
chain is chosen without each task in turn. (On the other tasks it was tried as fitted on folds that may hold the task: a few
numbers fitted on many tasks, so little of it gets through, but not nothing.) Risk is controlled on tasks that had no part in
the fit at all.

Legend: S settings, T tasks, D prompts of each task, N tokens, L levels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decal.eval import grid
from decal.eval.exact import Interest, Rows
from decal.eval.forward import needed
from decal.eval.frontier import Evaluation, TaskResult
from decal.eval.grid import Setting
from decal.eval.models import LoadedModel
from decal.eval.task import Question
from decal.eval.tune import Results
from decal.samplers import calibrated
from decal.samplers.calibrated import Advised, Calibration
from decal.samplers.chain import Chain
from decal.samplers.drafts import LEAST, Profile
from decal.samplers.errors import DecalError
from decal.samplers.rule import find
from decal.samplers.trie import TokenTrie

FEATURES = (("gap",), ("gap", "entropy"), ("gap", "peak"), ("gap", "spread"), ("gap", "entropy", "peak", "spread"))
"""What the estimate may read; the set with the least log loss on tasks left out is taken."""

WEIGHTS = ("gap", "entropy", "peak", "spread")
ENTROPIES = (0.5, 1.5, 3.0, 5.0)
"""Edges of the bins of `conformal_nucleus`, in nats."""

CONFIDENCES = (0.1, 0.3, 0.6, 0.9)
"""Edges of the bins of `calibrated_top_k`."""

HEAD = 64
"""Most probable tokens of a row that are looked at one by one, as valid ones are."""

WIDTH = 0.25
"""Further invalid tokens whose distances to the most probable one lie this near, in nats, are looked at together."""

REACH = 10.0
"""Tokens further below the most probable one, in nats, are left out: no cut of use keeps them."""

FOLDS = 5
FLOORS = (0.5, 0.8, 0.9)
EPSILONS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
LEVELS = (*(float(f"{1 / (1 + np.exp(-x)):.4g}") for x in np.linspace(-4, 5, 24)), 1.0)
"""(L,) ascending levels of `min_validity` at which risk is looked at; at 1 only the most probable token stays."""

RISKS = tuple(float(f"{1 - level:.4g}") for level in LEVELS)
"""(L,) descending risks of `risk_budget` likewise."""

MOST_PREFIXES = 150
"""Prefixes of a built-in task that is used without being asked for; with more the evaluation takes long."""

RULES = ("top_k", "top_p", "min_p", "top_n_sigma", "eta", "adapt", "split_temperature", "min_validity", "risk_budget")
"""Rules that chains are chosen among, beside plain temperature."""


PROFILES = {"row": "min_p | split_temperature", "prompts": "ensemble | min_p | split_temperature"}
"""Families among which a chain is searched for by drafts; those that did best at it in benchmarks/calibration."""


@dataclass(frozen=True)
class Sample:
    """Tokens of a prompt's rows, as the estimate sees them.

    Attributes:
        features: (N, 4), in the order of `WEIGHTS`.
        valid: (N,) whether a valid answer goes on, or ends, with the token.
        weight: (N,) sums to 1; every row counts alike.
        head: (R, min(`HEAD`, V)) whether the tokens of a row are valid, by rank.
        above: for each of R rows the mass that is strictly more probable than each valid token.
        entropy, peak: (R,) of the row, in nats, and its largest probability.
    """

    features: np.ndarray
    valid: np.ndarray
    weight: np.ndarray
    head: np.ndarray
    above: Sequence[np.ndarray]
    entropy: np.ndarray
    peak: np.ndarray

    @classmethod
    def of(cls, trie: TokenTrie, rows: Rows) -> Sample:
        """From the logits of a trie's nodes."""
        interest = Interest.of(trie)
        valid_of: dict[int, list[int]] = {}
        for node, token, kind in zip(interest.node.tolist(), interest.token.tolist(), interest.kind.tolist(), strict=True):
            if kind != 2:
                valid_of.setdefault(node, []).append(token)
        features, valid, weight, head, above, shapes = [], [], [], [], [], []
        for nodes, logits in rows:
            for node, row in zip(nodes, logits, strict=True):
                if not needed(trie, node):
                    continue
                log_p = row.double().log_softmax(-1)
                shape = (
                    -(log_p.exp() * log_p.clamp(min=-1e4)).sum(),
                    log_p.max(),
                    row[row.isfinite()].double().std(correction=0),
                )
                good = torch.tensor(valid_of[node])
                ranked = log_p.topk(min(HEAD, len(log_p))).indices
                head.append(torch.isin(ranked, good).numpy())
                above.append(np.asarray([float(log_p[log_p > log_p[token]].exp().sum()) for token in good]))
                shapes.append((float(shape[0]), float(shape[1].exp())))
                gap, is_valid, times = _gathered(log_p - log_p.max(), good)
                features.append(torch.stack([gap, *(v.expand(len(gap)) for v in shape)], -1))
                valid.append(is_valid)
                weight.append(times / times.sum())
        weights = torch.cat(weight).numpy()
        entropy, peak = np.asarray(shapes).T
        valids = torch.cat(valid).numpy()
        return cls(torch.cat(features).numpy(), valids, weights / weights.sum(), np.asarray(head), above, entropy, peak)


def _gathered(gap: Tensor, good: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of a row within `REACH`: distances, which are valid, and how many; beyond the head invalid ones bin by bin."""
    near = torch.nonzero(gap > -REACH)[:, 0]
    is_valid = torch.isin(near, good)
    alone = is_valid | (gap[near] >= gap.topk(min(HEAD, len(gap))).values[-1])
    tail = gap[near[~alone]]
    bins = (-tail / WIDTH).long()
    counts = torch.bincount(bins, minlength=int(REACH / WIDTH) + 1).double()
    sums = torch.zeros_like(counts).index_add(0, bins, tail)
    some = counts > 0
    return (
        torch.cat([gap[near[alone]], sums[some] / counts[some]]),
        torch.cat([is_valid[alone], torch.zeros(int(some.sum()), dtype=torch.bool)]),
        torch.cat([torch.ones(int(alone.sum()), dtype=torch.float64), counts[some]]),
    )


def fit(samples: Sequence[Sample], features: Sequence[str] = WEIGHTS) -> dict[str, float]:
    """Weights of `decal.samplers.calibrated.min_validity`: a logistic regression, every prompt counting alike.

    Raises:
        DecalError: the odds don't fall with the distance to the most probable token, so there is nothing to cut at.
    """
    from sklearn.linear_model import LogisticRegression

    columns = [WEIGHTS.index(name) for name in features]
    x = np.concatenate([s.features[:, columns] for s in samples])
    valid = np.concatenate([s.valid for s in samples])
    weight = np.concatenate([s.weight for s in samples])
    if valid.all() or not valid.any():
        raise DecalError("to fit a validity estimate takes tokens that are valid and some that aren't")
    centre, scale = x.mean(0), np.where(x.std(0) > 1e-9, x.std(0), 1.0)
    model = LogisticRegression(C=100.0, max_iter=2000, tol=1e-8)
    model.fit((x - centre) / scale, valid, weight * len(valid) / weight.sum())
    slopes = model.coef_[0] / scale
    found = dict.fromkeys(WEIGHTS, 0.0) | dict(zip(features, slopes.tolist(), strict=True))
    if found["gap"] < 1e-3:
        raise DecalError("on these tasks tokens are not likelier to be valid the more probable they are: nothing to cut at")
    return {name: float(f"{v:.6g}") for name, v in {"offset": float(model.intercept_[0] - slopes @ centre), **found}.items()}


def nucleus(samples: Sequence[Sample], alpha: float) -> tuple[float, ...]:
    """Table of `conformal_nucleus` for the bins of `ENTROPIES`: a valid token, any of a row's alike, is missed with ``alpha``.

    The split-conformal quantile over the rows of a bin, which stand for (1 + 1 / rows) of themselves; bins without rows get
    that of all.
    """
    every = [(h, above) for s in samples for h, above in zip(s.entropy, s.above, strict=True)]
    bins = np.digitize([h for h, _ in every], ENTROPIES)

    def quantile(rows: Sequence[np.ndarray]) -> float:
        score = np.concatenate(rows)
        weight = np.concatenate([np.full(len(r), 1 / len(r)) for r in rows]) / len(rows)
        order = np.argsort(score)
        reached = np.searchsorted(weight[order].cumsum(), (1 - alpha) * (1 + 1 / len(rows)) - 1e-12)
        # A token is kept if less than p lies above it.
        return float(np.nextafter(np.float64(score[order][reached]), 2)) if reached < len(score) else 1.0

    whole = quantile([above for _, above in every])
    inside = [[above for (_, above), b in zip(every, bins, strict=True) if b == i] for i in range(len(ENTROPIES) + 1)]
    return tuple(min(quantile(rows), 1.0) if rows else whole for rows in inside)


def sizes(samples: Sequence[Sample], level: float) -> tuple[float, ...]:
    """Table of `calibrated_top_k` for the bins of `CONFIDENCES`: the last rank at which tokens are valid with ``level``.

    Frequencies by rank are made to fall with it (isotonic regression); a bin without rows keeps one token.
    """
    from sklearn.isotonic import IsotonicRegression

    head = np.concatenate([s.head for s in samples])
    weight = np.concatenate([np.full(len(s.peak), 1 / len(s.peak)) for s in samples])
    bins = np.digitize(np.concatenate([s.peak for s in samples]), CONFIDENCES)
    ranks = np.arange(1, head.shape[1] + 1)
    found = []
    for i in range(len(CONFIDENCES) + 1):
        rows = bins == i
        if not rows.any():
            found.append(1.0)
            continue
        share = np.average(head[rows], axis=0, weights=weight[rows])
        falling = IsotonicRegression(increasing=False).fit_transform(ranks, share)
        found.append(float(max(1, (falling >= level).sum())))
    return tuple(found)


def log_loss(weights: Mapping[str, float], sample: Sample) -> float:
    """Mean over tokens of a prompt of -log of the estimated probability of what is true, in nats."""
    odds = weights["offset"] + sample.features @ np.asarray([weights[name] for name in WEIGHTS])
    return float((np.logaddexp(0, np.where(sample.valid, -odds, odds)) * sample.weight).sum())


def folds(count: int, number: int = FOLDS, seed: int = 0) -> np.ndarray:
    """(count,) the fold of each task, of nearly equal sizes, at random."""
    return np.random.default_rng(seed).permutation(np.arange(count) % min(number, count))


def by_folds(samples: Sequence[Sequence[Sample]], fold: np.ndarray, features: Sequence[str]) -> list[dict[str, float]]:
    """For each task, weights fitted on the tasks of other folds."""
    return _without(samples, fold, lambda others: fit(others, features))


def _without(samples: Sequence[Sequence[Sample]], fold: np.ndarray, make: Callable[[list[Sample]], Any]) -> list[Any]:
    """For each task, what is made of the tasks of other folds."""
    made = {k: make([s for t, task in enumerate(samples) if fold[t] != k for s in task]) for k in set(fold.tolist())}
    return [made[k] for k in fold.tolist()]


def settings(samples: Sequence[Sample], weights: Mapping[str, float], budget: int, seed: int, prompts: bool) -> list[Setting]:
    """The settings that chains are chosen among, those of calibrated rules as fitted; ``budget`` of every sampler."""
    drawn = grid.drawn(budget, seed, prompts=prompts, rules=RULES)
    return [replace(s, chain=with_weights(s.chain, weights)) for s in drawn] + tabled(samples, budget, seed)


def tabled(samples: Sequence[Sample], budget: int, seed: int) -> list[Setting]:
    """``budget`` settings of each cut that reads a fitted table, before a temperature."""
    found = []
    for alpha, t in grid.points((0.02, 0.5), grid.RANGE, count=budget, seed=seed):
        cut = calibrated.conformal_nucleus(nucleus(samples, alpha), ENTROPIES)
        found.append(Setting("conformal_nucleus", cut | find("temperature")(t)))
    for level, t in grid.points((0.05, 0.8), grid.RANGE, count=budget, seed=seed):
        cut = calibrated.calibrated_top_k(sizes(samples, level), CONFIDENCES)
        found.append(Setting("calibrated_top_k", cut | find("temperature")(t)))
    return found


def choose_features(samples: Sequence[Sequence[Sample]], fold: np.ndarray) -> dict[str, float]:
    """Log loss on tasks left out of every set of `FEATURES` that can be fitted, and that of the best constant, by name.

    Raises:
        DecalError: none can.
    """
    every = [(s, t) for t, task in enumerate(samples) for s in task]
    share = float(np.mean([s.weight[s.valid].sum() for s, _ in every]))
    losses = {"constant": float(-(share * np.log(share) + (1 - share) * np.log(1 - share)))}
    for features in FEATURES:
        try:
            weights = by_folds(samples, fold, features)
        except DecalError:
            continue  # what can't be fitted everywhere is no candidate
        losses[" ".join(features)] = float(np.mean([log_loss(weights[t], s) for s, t in every]))
    if len(losses) == 1:
        raise DecalError("on these tasks tokens are not likelier to be valid the more probable they are: nothing to cut at")
    return losses


def best(losses: Mapping[str, float]) -> list[str]:
    """The features of least log loss."""
    return min((name for name in losses if name != "constant"), key=lambda name: losses[name]).split()


def with_weights(chain: Chain, weights: Mapping[str, float]) -> Chain:
    """A chain with these weights of the estimate in every step that reads it."""
    steps = [s.rule.step(**{**s.values, **weights}) if set(WEIGHTS) <= set(s.rule.params) else s for s in chain.steps]
    return replace(chain, steps=tuple(steps))


def score(results: Results, floor: float) -> np.ndarray:
    """(S, T) mean over prompts of the diversity where the validity reaches the floor, and of 0 where it doesn't."""
    return np.where(results.validity >= floor - 1e-9, results.diversity, 0.0).mean(-1)


def left_out(scores: np.ndarray, groups: Sequence[Sequence[int]] | None = None) -> np.ndarray:
    """(T,) the setting of largest mean score over other tasks, for each task; ``groups`` of tasks are left out together."""
    tasks = scores.shape[1]
    found = np.zeros(tasks, dtype=np.int64)
    for group in groups or [[t] for t in range(tasks)]:
        others = np.setdiff1d(np.arange(tasks), group)
        found[list(group)] = scores[:, others].mean(-1).argmax()
    return found


def advise(results: Results, floor: float) -> Advised | None:
    """The setting of largest score, and what such a choice gives on tasks left out; None if nothing reaches the floor."""
    scores = score(results, floor)
    if not scores.any():
        return None
    held = left_out(scores)
    tasks = np.arange(scores.shape[1])
    validity, diversity = results.validity[held, tasks], results.diversity[held, tasks]
    return Advised(
        chain=results.setting[int(scores.mean(-1).argmax())],
        score=float(scores[held, tasks].mean()),
        reached=float((validity >= floor - 1e-9).mean()),
        validity=float(validity.mean()),
        diversity=float(diversity.mean()),
    )


def profiles(results: Results) -> dict[str, Profile]:
    """By name what chains of each of `PROFILES` gave on every prompt: of families that were tried, on enough prompts."""
    settings, tasks, draws = results.validity.shape
    found = {}
    for name, family in PROFILES.items():
        own = [i for i in range(settings) if results.family[i] == family]
        if own and tasks * draws >= LEAST:
            validity, diversity = (
                tuple(tuple(row) for row in given[own].reshape(len(own), -1).clip(0, 1).round(4).tolist())
                for given in (results.validity, results.diversity)
            )
            found[name] = Profile(tuple(results.setting[i] for i in own), validity, diversity)
    return found


def conformal(loss: np.ndarray, epsilon: float) -> int | None:
    """The first of L ascending levels at which the expected loss on an exchangeable task is at most ``epsilon``; None if none.

    Conformal risk control (Angelopoulos et al., arXiv 2208.02814): the smallest level with (sum of losses + 1) / (T + 1) <=
    epsilon, losses made monotone by the largest at higher levels.

    Args:
        loss: (T, L) in [0, 1].
    """
    worst = np.maximum.accumulate(loss[:, ::-1], -1)[:, ::-1]
    bound = (worst.sum(0) + 1) / (len(loss) + 1)
    allowed = np.flatnonzero(bound <= epsilon + 1e-12)
    return int(allowed[0]) if len(allowed) else None


def affordable(question: Question) -> bool:
    """Whether a task may be used without being asked for, as far as can be told without a model."""
    return question.policy.one_path_each and question.valid.size <= 2 * MOST_PREFIXES


@dataclass
class Fitting:
    """Runs a calibration on a model.

    Args:
        model: as `decal.eval.models.load` gives it.
        budget: settings of every sampler.
        prompts: whether chains may read other prompts.
        seed: decides exemplars, folds and settings.
        report: told about progress.
    """

    model: LoadedModel
    budget: int
    prompts: bool = False
    seed: int = 0
    cache: bool = True
    report: Callable[[str, int, int], None] = lambda what, done, total: None

    def evaluation(self, settings: Sequence[Setting]) -> Evaluation:
        """Of some settings on this model."""
        return Evaluation(self.model, settings, seed=self.seed, cache=self.cache, report=self.report)

    def samples(self, questions: Sequence[Question], done: Callable[[], None]) -> list[list[Sample]]:
        """Of every prompt of every task."""
        plain = self.evaluation([Setting("temperature", find("temperature")(1.0))])
        found: list[list[Sample]] = []
        for question in questions:
            here: list[Sample] = []

            def visit(text: str, trie: TokenTrie, rows: Rows, here: list[Sample] = here) -> None:
                here.append(Sample.of(trie, rows))

            plain.run(question, visit)
            found.append(here)
            done()
        return found

    def results(self, questions: Sequence[Question], tried: Sequence[Sequence[Setting]], done: Callable[[], None]) -> Results:
        """The settings of each task on it."""
        found: list[TaskResult] = []
        for question, own in zip(questions, tried, strict=True):
            found.append(self.evaluation(own).run(question))
            done()
        return Results.of(found)

    def losses(self, questions: Sequence[Question], chains: Sequence[Chain], done: Callable[[], None]) -> np.ndarray:
        """(T, L) expected invalidity of a text under each chain, averaged over prompts."""
        job = self.evaluation([Setting("f", chain) for chain in chains])
        found = []
        for question in questions:
            found.append(1 - job.run(question).validity[: len(chains)].mean(-1))
            done()
        return np.asarray(found)


def calibrate(
    fitting: Fitting, questions: Sequence[Question], about: Mapping[str, Any], done: Callable[[], None]
) -> Calibration:
    """Fit everything.

    Args:
        about: what the file says of itself.
        done: called three times for each task at the most.

    Raises:
        DecalError: fewer than four tasks, or nothing to fit.
    """
    if len(questions) < 4:
        raise DecalError(f"a calibration needs at least 4 tasks, to judge it on tasks left out, got {len(questions)}")
    samples = fitting.samples(questions, done)
    fold = folds(len(questions), seed=fitting.seed)
    losses = choose_features(samples, fold)
    features = best(losses)
    # Risk is controlled on tasks that had no part in the estimate whose levels are tried on them.
    half = folds(len(questions), 2, fitting.seed)
    first = [task for t, task in enumerate(samples) if half[t] == 0]
    own = fit([s for task in first for s in task], best(choose_features(first, folds(len(first), seed=fitting.seed))))
    every = [s for task in samples for s in task]
    weights = fit(every, features)

    def tried(some: list[Sample]) -> list[Setting]:
        return settings(some, fit(some, features), fitting.budget, fitting.seed, fitting.prompts)

    # On each task settings as fitted on others, so many of each kind; what is advised is fitted on all.
    chosen_among = tried(every)
    results = fitting.results(questions, _without(samples, fold, tried), done)
    results = replace(results, setting=tuple(str(s.chain) for s in chosen_among))
    advised = {f"{floor:g}": advise(results, floor) for floor in FLOORS}

    careful = {
        "min_validity": [calibrated.min_validity(level, **own) for level in LEVELS],
        "risk_budget": [calibrated.risk_budget(risk, **own) for risk in RISKS],
    }
    control = [q for t, q in enumerate(questions) if half[t] == 1]
    loss = fitting.losses(control, [chain for chains in careful.values() for chain in chains], done)
    risk = {rule: _controlled(chains, loss[:, i * len(LEVELS) :]) for i, (rule, chains) in enumerate(careful.items())}
    return Calibration(
        about={**about, "fingerprint": calibrated.fingerprint(fitting.model.model, fitting.model.tokenizer)},
        validity=weights,
        advised={floor: one for floor, one in advised.items() if one is not None},
        risk=risk,
        profiles=profiles(results),
        report={
            "log_loss_on_tasks_left_out": losses,
            "features": features,
            "settings": len(chosen_among),
            "floors_never_reached": [floor for floor, one in advised.items() if one is None],
            "risk_fitted_on": [q.task.name for t, q in enumerate(questions) if half[t] == 0],
            "risk_controlled_on": [q.task.name for t, q in enumerate(questions) if half[t] == 1],
        },
    )


def _controlled(chains: Sequence[Chain], loss: np.ndarray) -> dict[str, str | None]:
    """By epsilon the first of ever more careful chains whose risk is controlled, as text."""
    found = {f"{epsilon:g}": conformal(loss[:, : len(chains)], epsilon) for epsilon in EPSILONS}
    return {epsilon: None if at is None else str(chains[at]) for epsilon, at in found.items()}


def written(calibration: Calibration) -> str:
    """The file, which `decal.calibrated.load` reads."""
    return json.dumps({"format": calibrated.FORMAT, **asdict(calibration)}, indent=1, allow_nan=False)


def print_report(found: Calibration, console: Any) -> None:
    """Print what was fitted, and how it does on tasks left out."""
    from rich.table import Table
    from rich.text import Text

    losses = found.report["log_loss_on_tasks_left_out"]
    console.print(f"{found.about['model']}, {len(found.about['tasks'])} tasks\n", highlight=False)
    read = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    said = f"Log loss of the validity estimate on tasks left out, by what it reads: {read}."
    console.print(said, highlight=False, soft_wrap=True)
    console.print(f"min_validity: {', '.join(f'{k}={v:g}' for k, v in found.validity.items())}\n", highlight=False)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("floor", "chain to use", "score", "floor reached", "validity", "diversity"):
        table.add_column(heading, justify="left" if heading == "chain to use" else "right")
    for floor, one in found.advised.items():
        numbers = (f"{one.score:.3f}", f"{one.reached:.0%}", f"{one.validity:.3f}", f"{one.diversity:.3f}")
        table.add_row(floor, Text(one.chain), *numbers)
    console.print(table)
    never = found.report["floors_never_reached"]
    console.print(f"No setting reaches {' or '.join(never)} anywhere." if never else "", highlight=False)
    low = [floor for floor, one in found.advised.items() if one.validity < float(floor)]
    said = "Numbers are means over tasks left out; score: diversity where the floor is reached, else 0."
    said += f" The mean validity is below {' and '.join(low)} there: try a chain on tasks of yours first." if low else ""
    console.print(said, highlight=False, soft_wrap=True)
    if not found.profiles:
        console.print(
            f"With fewer than {LEAST} prompts there is nothing that decal tune-prompt could begin with.", highlight=False
        )
    tasks = len(found.report["risk_controlled_on"])
    for rule, chains in found.risk.items():
        kept, lost = (", ".join(e for e, chain in chains.items() if (chain is None) == none) for none in (False, True))
        refused = f"; these tasks can't promise {lost}" if lost else ""
        console.print(
            f"Invalidity of {rule} controlled on {tasks} tasks: at most {kept or 'nothing'}{refused}.", highlight=False
        )
