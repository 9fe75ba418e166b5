"""The main job: every setting of a grid on every task, exactly, with the oracles beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from decal.eval import oracle, results, rows
from decal.eval.exact import Interest, Outcome, Rows, Situation, flows, group, join, outcome
from decal.eval.grid import ORACLE, Setting
from decal.eval.models import LoadedModel
from decal.eval.ranked import scale_after
from decal.eval.task import Question
from decal.samplers.chain import Chain
from decal.samplers.context import Weights
from decal.samplers.errors import DecalError
from decal.samplers.trie import TokenTrie, TrieBuilder
from decal.samplers.views import Views, kinds
from decal.samplers.vocabulary import Vocabulary

FLOORS = (0.5, 0.8, 0.9)
ORACLES = tuple(ORACLE + kind for kind in ("size", "best cutoff", "validity mask", "completion counts"))
LEVEL = 0.95
"""Confidence level of every interval."""


@dataclass(frozen=True)
class Best:
    """The most diverse setting of a family whose mean validity reaches a floor. Intervals are over prompts."""

    floor: float
    setting: str
    validity: float
    diversity: float
    low: float
    high: float


@dataclass
class TaskResult:
    """Everything computed for one task; S settings, D prompts.

    Attributes:
        question: the task.
        prompts: the D prompts, as text.
        nodes: size of the trie on the first prompt.
        family, setting: (S,) what each setting is.
        validity, diversity, slack: (S, D); diversity is NaN where validity is 0.
        bounds: (D, G) diversity that no rank cutoff can exceed at each of `oracle.VALIDITIES`; None if an answer has several
            token sequences.
    """

    question: Question
    prompts: list[str]
    nodes: int
    family: list[str]
    setting: list[str]
    validity: np.ndarray
    diversity: np.ndarray
    slack: np.ndarray
    bounds: np.ndarray | None

    def bound(self, floor: float) -> float:
        """Mean diversity that no rank cutoff with mean validity at least ``floor`` can exceed, at the temperatures of the grid;
        NaN if unknown, or if none reaches the floor."""
        return float("nan") if self.bounds is None else oracle.mean_bound(self.bounds, floor)

    @cached_property
    def mean_validity(self) -> np.ndarray:
        """(S,) averaged over prompts."""
        return self.validity.mean(-1)

    @cached_property
    def mean_diversity(self) -> np.ndarray:
        """(S,) averaged over prompts; NaN unless it is defined on all, lest failing on one be an advantage."""
        return self.diversity.mean(-1)

    def families(self) -> list[str]:
        """Families in the order they were tried."""
        return list(dict.fromkeys(self.family))

    def members(self, family: str) -> np.ndarray:
        """Numbers of the settings of a family."""
        return self._members.get(family, np.zeros(0, dtype=np.int64))

    @cached_property
    def _members(self) -> dict[str, np.ndarray]:
        names = np.asarray(self.family, dtype=object)
        return {family: np.flatnonzero(names == family) for family in self.families()}

    def chosen(self, family: str, floor: float) -> int | None:
        """Number of the most diverse setting of ``family`` with mean validity at least ``floor``, or None."""
        members = self.members(family)
        validity, diversity = self.mean_validity[members], self.mean_diversity[members]
        # A validity of 1 is reached up to rounding only.
        eligible = (validity >= floor - 1e-9) & np.isfinite(diversity)
        return int(members[np.argmax(np.where(eligible, diversity, -1.0))]) if eligible.any() else None

    def best(self, family: str, floor: float) -> Best | None:
        """`chosen`, with what it reaches."""
        chosen = self.chosen(family, floor)
        if chosen is None:
            return None
        low, high = interval(self.diversity[chosen])
        return Best(
            floor,
            self.setting[chosen],
            float(self.mean_validity[chosen]),
            float(self.mean_diversity[chosen]),
            low,
            high,
        )


def interval(sample: np.ndarray, least: float = 0.0, most: float = 1.0) -> tuple[float, float]:
    """Student's interval for the mean of ``sample`` (D,), at `LEVEL`, cut to what is possible; NaN from fewer than two."""
    from scipy import stats

    sample = sample[np.isfinite(sample)]
    if len(sample) < 2:
        return float("nan"), float("nan")
    half = stats.t.ppf((1 + LEVEL) / 2, len(sample) - 1) * sample.std(ddof=1) / np.sqrt(len(sample))
    return float(max(sample.mean() - half, least)), float(min(sample.mean() + half, most))


Report = Callable[[str, int, int], None]
"""Told what is going on, and how many units of it are done of how many."""


Visit = Callable[[str, TokenTrie, Rows], None]
"""Given the text of a prompt, its trie, and the logits of its nodes."""


class Evaluation:
    """Runs tasks on one model.

    Args:
        model: as `decal.eval.models.load` gives it.
        settings: the grid.
        seed: decides the exemplars of few-shot prompts.
        cache: whether logits are kept on disk for the next run.
        report: told about progress.
        smaller: a smaller model with the same tokenizer, for ``contrast(against="smaller")``.
        scales: factors of the logits at which oracles are tried, 0 for uniform; those that the settings end at unless given.

    Raises:
        DecalError: a setting reads a smaller model and there is none, or its tokens are others.
    """

    def __init__(
        self,
        model: LoadedModel,
        settings: Sequence[Setting],
        *,
        seed: int = 0,
        cache: bool = True,
        report: Report = lambda what, done, total: None,
        smaller: LoadedModel | None = None,
        scales: Sequence[float] | None = None,
    ):
        self.model, self.settings, self.seed, self.cache, self.report = model, list(settings), seed, cache, report
        self.chains = [s.chain for s in settings]
        self.groups = group(self.chains)
        self.scales = _oracle_scales(self.chains) if scales is None else list(scales)
        self.weights = Weights.of(model.model) if any("model" in c.needs for c in self.chains) else None
        self.smaller = smaller
        self.reads = {kind for chain in self.chains for kind in kinds(chain)}
        if "smaller" in self.reads:
            self._check_smaller()
        self.builder = TrieBuilder(self._encode, Vocabulary.of(model.tokenizer), end_tokens(model))

    def _check_smaller(self) -> None:
        if self.smaller is None:
            raise DecalError("some setting reads a smaller model: Evaluation(..., smaller=model)")
        if self.smaller.tokenizer.get_vocab() != self.model.tokenizer.get_vocab():
            raise DecalError(f"{self.smaller.name} has other tokens than {self.model.name}, so they can't be contrasted")

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.model.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def check(self, question: Question) -> None:
        """Raise DecalError if a task doesn't fit the model, before anything is computed."""
        self.builder.build(question.valid, question.policy)
        next(iter(question.prompts(self.model.tokenizer, self.seed)))
        if self.reads & {"others", "blank"}:
            question.other_prompts(0, self.model.tokenizer, self.seed)
        if self.reads and not question.policy.one_path_each:
            raise DecalError(f"{question.task.name}: other prompts need tokenisation canonical and case exact")

    def run(self, question: Question, visit: Visit = lambda prompt, trie, rows: None) -> TaskResult:
        """Evaluate every setting and oracle on a task.

        Args:
            visit: called with each prompt's text, its trie and the logits of its nodes.

        Raises:
            DecalError: the task doesn't fit the model.
        """
        prompts = list(question.prompts(self.model.tokenizer, self.seed))
        found = []
        for number, (text, prompt) in enumerate(prompts, 1):
            what = f"{question.task.name} {number}/{len(prompts)}"
            trie, grow = self.builder.build(question.valid, question.policy)
            trie, stored = self._read(question, prompt, trie, grow, f"{what}: reading prefixes")
            others: dict[str, list[Rows]] = {}
            if self.reads & {"others", "blank"}:
                told = question.other_prompts(number - 1, self.model.tokenizer, self.seed)
                said = f"{what}: reading other prompts"
                others = {kind: [self._read(question, one, trie, None, said)[1] for one in told[kind]] for kind in told}
            if self.smaller is not None and "smaller" in self.reads:
                said = f"{what}: reading with {self.smaller.name}"
                others["smaller"] = [self._read(question, prompt, trie, None, said, self.smaller)[1]]
            tick = self._ticker(f"{what}: settings", len(trie))
            found.append(self._results(question, prompt, trie, stored, others, tick))
            visit(text, trie, stored)
        labels = self._labels(question)
        return TaskResult(
            question=question,
            prompts=[text for text, _ in prompts],
            nodes=len(trie),
            family=[family for family, _ in labels],
            setting=[setting for _, setting in labels],
            validity=np.stack([one["validity"] for one in found], -1),
            diversity=np.stack([one["diversity"] for one in found], -1),
            slack=np.stack([one["slack"] for one in found], -1),
            bounds=np.stack([one["bound"] for one in found]) if question.policy.one_path_each else None,
        )

    def _read(
        self,
        question: Question,
        prompt: Sequence[int],
        trie: TokenTrie,
        grow: Any,
        what: str,
        model: LoadedModel | None = None,
    ) -> tuple[TokenTrie, Rows]:
        model = model or self.model
        return rows.load_or_compute(
            model.model,
            model.fingerprint,
            prompt,
            trie,
            question.policy,
            grow,
            cache=self.cache,
            tick=self._ticker(what, len(trie)),
        )

    def _ticker(self, what: str, total: int) -> Callable[[int], None]:
        done = 0

        def tick(amount: int) -> None:
            nonlocal done
            done += amount
            self.report(what, min(done, total), total)

        tick(0)
        return tick

    def _results(
        self,
        question: Question,
        prompt: Sequence[int],
        trie: TokenTrie,
        stored: Rows,
        others: Mapping[str, Sequence[Rows]],
        tick: Callable[[int], None],
    ) -> Mapping[str, np.ndarray]:
        """Validity, diversity and slack of all settings and oracles, and the bound; from disk if they have been computed."""

        def compute() -> Mapping[str, np.ndarray]:
            views = rows.StoredViews(trie, others) if others else None
            outcome_, bound = self._outcome(question, prompt, trie, stored, tick, views)
            return {"validity": outcome_.validity, "diversity": outcome_.diversity, "slack": outcome_.slack, "bound": bound}

        if not isinstance(stored, rows.StoredRows):
            return compute()
        names = [one.folder.name for several in others.values() for one in several if isinstance(one, rows.StoredRows)]
        name = results.key(self.chains, rows=" ".join([stored.folder.name, *names]), scales=self.scales)
        return results.load_or_compute(name, compute)

    def _outcome(
        self,
        question: Question,
        prompt: Sequence[int],
        trie: TokenTrie,
        stored: Rows,
        tick: Callable[[int], None],
        views: Views | None = None,
    ) -> tuple[Outcome, np.ndarray]:
        """All settings, then the oracles, in the order of `_labels`; and the bound on rank cutoffs."""
        ranking = oracle.Ranking(Interest.of(trie), self.scales)
        groups = [*self.groups, oracle.size_group(trie, self.scales, len(self.chains))]
        settings = len(self.chains) + len(self.scales)
        situation = Situation(prompt, self.weights, views)
        flow = flows(trie, stored, groups, settings, ranking, tick, situation, self.scales)
        one_path = question.policy.one_path_each
        cutoffs = [oracle.BestCutoffs(trie, ranking, i) for i in range(len(self.scales))] if one_path else []
        every = [flow, *(c.flow() for c in cutoffs), ranking.mask_flow(trie), oracle.count_flow(trie)]
        bound = np.fmax.reduce([c.bound() for c in cutoffs]) if cutoffs else np.full(len(oracle.VALIDITIES), np.nan)
        return join([outcome(trie, part) for part in every]), bound

    def _labels(self, question: Question) -> list[tuple[str, str]]:
        """(family, setting) of every row of `_outcome`."""
        size, best, mask, count = ORACLES
        labels = [(s.family, str(s.chain)) for s in self.settings]
        shapes = [f"temperature {1 / s:.4g}" if s else "uniform" for s in self.scales]
        labels += [(size, f"the |G| most probable, {shape}") for shape in shapes]
        if question.policy.one_path_each:
            labels += [(best, f"best cutoffs, {shape}, price {p:g}") for shape in shapes for p in oracle.PRICES]
        labels += [(mask, f"the valid tokens, {shape}") for shape in shapes]
        return [*labels, (count, "in proportion to completions")]


def _oracle_scales(chains: Sequence[Chain]) -> list[float]:
    """Scales at which oracles are tried, descending: those that chains of several steps end at, 1, and 0, uniform.

    Of plain temperatures, which may be many, only if there is nothing else.
    """
    several = {scale_after(c.steps) for c in chains if len(c.steps) > 1} - {None}
    found = several or {scale_after(c.steps) for c in chains} - {None}
    return sorted({1.0, 0.0, *found}, reverse=True)  # type: ignore[arg-type]


def end_tokens(model: LoadedModel) -> list[int]:
    """Tokens at which the model stops of itself: those of its generation config and of its tokenizer."""
    declared = model.model.generation_config.eos_token_id
    tokens = declared if isinstance(declared, list) else [declared]
    return sorted({t for t in [*tokens, model.tokenizer.eos_token_id] if t is not None})
