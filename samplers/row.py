"""What a rule sees: one batch of rows, as the few numbers it may ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from decal.kernels import mass as integer
from decal.kernels import random
from decal.kernels.statistics import INEXACT, SCALED, STATISTICS, exp, term
from decal.samplers.context import GIVEN, Context, History, Weights
from decal.samplers.errors import DecalError

if TYPE_CHECKING:
    from decal.samplers.guided import Guide
    from decal.samplers.views import Views


class Band(NamedTuple):
    """Answer of a rule that keeps the logits in [low, high], each (B, 1), and the tokens ``spared`` wherever they are."""

    low: Tensor
    high: Tensor
    spared: tuple[int, ...] = ()


class Affine(NamedTuple):
    """Answer of a rule that maps every kept logit ``z`` to ``scale * z + shift``, each (B, 1).

    A scale of ``inf`` is the limit: only the modes stay.
    """

    scale: Tensor
    shift: Tensor


class Map(NamedTuple):
    """Answer of a rule that maps the kept logits in any other way.

    Attributes:
        fn: from logits (B, V), -inf where dropped, to new ones. Tokens of equal logit must fare alike, unless the rule looks at
            the tokens so far.
        drops: whether it may drop tokens.
        monotone: whether it leaves the order of the kept tokens as it is.
        low: (B, 1) a logit below which it drops everything, if there is one, so that ``fn`` need not be given those tokens.
    """

    fn: Callable[[Tensor], Tensor]
    drops: bool = False
    monotone: bool = True
    low: Tensor | None = None


class Keep(NamedTuple):
    """Answer of a rule that says of every token whether it is kept: ``fn`` maps logits (B, V) to booleans."""

    fn: Callable[[Tensor], Tensor]


Answer = Tensor | Band | Affine | Map | Keep


class Row(Protocol):
    """Statistics of a batch of rows over their kept tokens, each (B, 1), in logit units or nats.

    Besides ``max`` a row has what `decal.kernels.statistics.STATISTICS` lists, and order statistics.
    """

    @property
    def max(self) -> Tensor:
        """The largest logit."""

    @property
    def min(self) -> Tensor:
        """The smallest kept logit."""

    @property
    def logz(self) -> Tensor:
        """log of the sum of exp(logits)."""

    @property
    def entropy(self) -> Tensor:
        """Shannon entropy, in nats."""

    @property
    def log_half(self) -> Tensor:
        """log of the sum of exp(logits / 2)."""

    @property
    def collision(self) -> Tensor:
        """Collision probability, the sum of p^2."""

    @property
    def mean(self) -> Tensor:
        """Mean of the logits."""

    @property
    def std(self) -> Tensor:
        """Population standard deviation of the logits."""

    @property
    def count(self) -> Tensor:
        """Number of kept tokens."""

    def upper(self, *, count: Tensor | None = None, mass: Tensor | None = None) -> Tensor:
        """Logit of the last token of the smallest top set with that many tokens, or that much probability."""

    def nearest(self, center: Tensor, mass: Tensor) -> Band:
        """The tokens nearest to the logit ``center`` that together hold ``mass`` of the probability."""

    def smallest_from(self, level: Tensor) -> Tensor:
        """The smallest kept logit that is at least ``level``; inf if there is none."""

    def longest(
        self, score: Callable[[TopSets], Tensor], *, at_least: Tensor | None = None, at_most: Tensor | None = None
    ) -> Tensor:
        """Size of the largest top set such that the score of it and of every smaller one is within the bound given.

        ``score`` must depend on nothing but the `TopSets`; a score that is NaN counts as within.
        """

    def best(self, score: Callable[[TopSets], Tensor], *, later: Callable[[TopSets], Tensor] | None = None) -> Tensor:
        """Size of the top set of largest score, the smallest of several.

        Where all larger top sets are known to score at most ``later``, they need not be looked at.
        """

    def head(self, size: int) -> Row:
        """The rows cut to their ``size`` most probable tokens, without regard to ties."""

    def ranked(self, size: int) -> Tensor:
        """(B, m) the ``size`` largest logits in decreasing order, or all if there are fewer; -inf behind the last."""

    @property
    def history(self) -> History:
        """The tokens so far."""

    @property
    def state(self) -> Mapping[str, Tensor]:
        """What the rule remembers; see `decal.samplers.rule.Feedback`."""

    @property
    def weights(self) -> Weights:
        """The model's embeddings."""

    @property
    def guide(self) -> Guide:
        """The valid answers."""

    @property
    def views(self) -> Views:
        """Logits behind other prompts."""

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end a text."""

    @property
    def tokens(self) -> Tensor | None:
        """(B, W) which tokens the columns are, or None if column i is token i."""

    def per_token(self, table: Callable[[History, int], Tensor]) -> Tensor:
        """What ``table(history, vocabulary)``, (B, V), says of the tokens of the logits that a `Map` or `Keep` is given."""

    def is_one_of(self, tokens: tuple[int, ...]) -> Tensor:
        """Which of the logits a `Map` or `Keep` is given belong to ``tokens``."""

    def chance(self, probability: Tensor, seed: Tensor) -> Tensor:
        """(B, 1) whether something of that probability happens: a function of seed, request and position."""


class BaseRow:
    """Statistics from moments, remembered, and the names that were asked for.

    A subclass says how moments are summed (`_moments`), at which level (`_reference`), and gives the order statistics. Where
    several rows share a history, ``place`` (B,) says which one each has.
    """

    place: Tensor | None = None

    def __init__(self, context: Context | None = None, state: Mapping[str, Tensor] | None = None) -> None:
        self.reads: set[str] = set()
        self._sums: dict[str, Tensor] = {}
        self._context, self._state = context or Context(), state
        self.chances: list[Tensor] = []  # probabilities of the coins that were asked for

    def _moments(self, names: list[str]) -> Mapping[str, Tensor]:
        raise NotImplementedError

    def _reference(self) -> Tensor:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Tensor:
        if name not in STATISTICS:
            raise AttributeError(f"a row has no statistic {name!r}; it has max, min, {', '.join(STATISTICS)}")
        self.reads.add(name)
        statistic = STATISTICS[name]
        missing = [moment for moment in statistic.moments if moment not in self._sums]
        self._sums.update(self._moments(missing))
        return statistic.finish(self._reference(), self._sums)

    @property
    def max(self) -> Tensor:
        raise NotImplementedError

    # ---- what isn't in the logits

    @property
    def history(self) -> History:
        self.reads.add("history")
        history = self._history()
        return history if self.place is None else history.rows(self.place)

    def _history(self) -> History:
        if self._context.history is None:
            raise DecalError("this chain reads the tokens so far: call it with history=decal.History.of(input_ids)")
        return self._context.history

    @property
    def state(self) -> Mapping[str, Tensor]:
        self.reads.add("state")
        if self._state is None:
            raise DecalError(
                "this chain remembers what was drawn: use chain.init, chain.apply and chain.observe, or a processor"
            )
        return self._state

    @property
    def weights(self) -> Weights:
        return cast(Weights, self._given("model"))

    @property
    def guide(self) -> Guide:
        return cast("Guide", self._given("answers"))

    @property
    def views(self) -> Views:
        return cast("Views", self._given("prompts"))

    @property
    def ends(self) -> tuple[int, ...]:
        return cast("tuple[int, ...]", self._given("ends"))

    def _given(self, need: str) -> Any:
        self.reads.add(need)
        found = getattr(self._context, GIVEN[need].name)
        if found is None:
            raise DecalError(f"this chain {GIVEN[need].missing}")
        return found

    def chance(self, probability: Tensor, seed: Tensor) -> Tensor:
        self.reads.add("chance")
        self.chances.append(probability)
        if self._context.coin is not None:
            return torch.full_like(probability, self._context.coin, dtype=torch.bool)
        history = self.history
        request, length = history.request.to(seed.device), history.length.to(seed.device)
        return random.uniform(seed, request, length, torch.tensor(self._context.toss, device=seed.device)) < probability

    # ---- order statistics by looking at top sets of every size

    def _ranking(self) -> Ranking:
        raise NotImplementedError

    def longest(
        self, score: Callable[[TopSets], Tensor], *, at_least: Tensor | None = None, at_most: Tensor | None = None
    ) -> Tensor:
        self.reads.add("top sets")
        bound = at_least if at_least is not None else at_most
        assert bound is not None
        ranking = self._ranking()
        sign = 1.0 if at_least is not None else -1.0
        return ranking.longest(lambda top: sign * score(top), (sign * bound)[:, 0].expand(len(ranking.state)))[:, None]

    def best(self, score: Callable[[TopSets], Tensor], *, later: Callable[[TopSets], Tensor] | None = None) -> Tensor:
        self.reads.add("top sets")
        return self._ranking().best(score, later)[:, None]


class DenseRow(BaseRow):
    """A row over logits ``z_BV`` (-inf where dropped), computed by ``backend``.

    Args:
        tokens: (B, W) which tokens the columns are, if they aren't all in order.
        place: (B,) which row of the history each row belongs to, if they aren't one to one.
    """

    def __init__(
        self,
        z_BV: Tensor,
        backend: ModuleType,
        context: Context | None = None,
        state: Mapping[str, Tensor] | None = None,
        tokens: Tensor | None = None,
        place: Tensor | None = None,
    ):
        super().__init__(context, state)
        self._z, self._backend, self.tokens, self.place = z_BV, backend, tokens, place
        self.kth: Tensor | None = None  # the last k-th largest asked for
        self._ranked: Ranking | None = None

    def _moments(self, names: list[str]) -> Mapping[str, Tensor]:
        return self._backend.moments(self._z, names)

    def _reference(self) -> Tensor:
        return self._z.amax(-1, keepdim=True)

    @property
    def max(self) -> Tensor:
        self.reads.add("max")
        return self._reference()

    @property
    def min(self) -> Tensor:
        self.reads.add("min")
        return self.smallest_from(torch.full_like(self._reference(), -torch.finfo(self._z.dtype).max))

    def upper(self, *, count: Tensor | None = None, mass: Tensor | None = None) -> Tensor:
        self.reads.add("upper(mass)" if count is None else "upper(count)")
        answer = self._backend.upper(self._z, count=count, mass=mass)
        if count is not None:
            self.kth = answer
        return answer

    def nearest(self, center: Tensor, mass: Tensor) -> Band:
        self.reads.add("nearest")
        return Band(*self._backend.nearest(self._z, center, mass))

    def smallest_from(self, level: Tensor) -> Tensor:
        self.reads.add("nearest")
        return self._backend.smallest_from(self._z, level)

    def per_token(self, table: Callable[[History, int], Tensor]) -> Tensor:
        self.reads.add("history")
        history = self._history()
        vocabulary = self._z.shape[1] if self.tokens is None else int(self.tokens.max()) + 1
        found = table(history, vocabulary).to(self._z.device)
        place = torch.arange(len(self._z), device=found.device) if self.place is None else self.place
        if self.tokens is None:
            return found[place]
        return found[place[:, None].expand_as(self.tokens), self.tokens]

    def is_one_of(self, tokens: tuple[int, ...]) -> Tensor:
        """Which of the columns are one of ``tokens``; (1, V), or (B, W) where columns aren't all tokens in order."""
        columns = torch.arange(self._z.shape[1], device=self._z.device)[None] if self.tokens is None else self.tokens
        return torch.isin(columns, torch.tensor(tokens, dtype=torch.long, device=self._z.device))

    def head(self, size: int) -> DenseRow:
        self.reads.add("top sets")
        return DenseRow(self.ranked(size), self._backend)

    def ranked(self, size: int) -> Tensor:
        self.reads.add("top sets")
        return self._z.topk(min(size, self._z.shape[1]), -1).values

    def _ranking(self) -> Ranking:
        if self._ranked is None:
            ranked = self._z.sort(-1, descending=True).values
            rows = torch.arange(len(ranked), device=ranked.device)
            self._ranked = Ranking(lambda some, start, stop: ranked[some, start:stop], ranked.shape[1], rows, rows)
        return self._ranked


Carry = dict[str, list[Tensor]]
"""Running sums by name: two limbs, see `decal.kernels.mass.limbs`, or one float."""


class TopSets(BaseRow):
    """The sets of the k most probable tokens of some rows, for every k of a range at once; everything (B, m).

    They have the statistics of a row, each of the row cut to that set, and besides ``mass``, their probability; ``value``, the
    logit of their last token; ``below``, the logit of the next one (-inf behind the last); ``least``, the smallest kept logit
    of the row; and ``curvature``, the running sum of the absolute second differences of the ranked probabilities, up to the one
    centred on the set's last token, as a share of all of them (NaN where there are none).
    """

    def __init__(self, ranking: Ranking, some: Tensor, start: int, stop: int, carry: Carry):
        super().__init__()
        self._ranking_, self._some, self._start = ranking, some, start
        wide = ranking.values(some, max(start - 1, 0), stop + 1)
        pad = (int(start == 0), stop + 1 - min(stop + 1, ranking.width))
        wide = torch.nn.functional.pad(wide, pad, value=-torch.inf)
        self._before, self.value, self.below = wide[:, :-2], wide[:, 1:-1], wide[:, 2:]
        self._top = ranking.top[some]
        self._carry, self._last = carry, dict[str, list[Tensor]]()
        self.alive = self.value.isfinite()

    def _reference(self) -> Tensor:
        return self._top

    def _moments(self, names: list[str]) -> Mapping[str, Tensor]:
        d = torch.where(self.alive, self.value - self._top, 0.0)
        e = exp(d)
        return {name: self._running(name, torch.where(self.alive, term(name, d, e), 0.0)) for name in names}

    def _running(self, name: str, summand: Tensor) -> Tensor:
        plain = name in (*SCALED, INEXACT) or summand.dtype != torch.float64
        parts = (summand,) if plain else integer.limbs(summand)
        sums = [part.cumsum(-1) for part in parts]
        if name in self._carry:
            sums = [total + carried[self._some] for total, carried in zip(sums, self._carry[name], strict=True)]
        self._last[name] = [total[:, -1:] for total in sums]
        return sums[0] if len(sums) == 1 else integer.joined(*sums)

    def last(self) -> dict[str, list[Tensor]]:
        """Running sums at the end of the range, to carry on from."""
        return self._last

    @property
    def mass(self) -> Tensor:
        return (self.logz - self._ranking_.logz[self._some]).exp()

    @property
    def least(self) -> Tensor:
        return self._ranking_.least[self._some]

    @property
    def curvature(self) -> Tensor:
        return self.bent / self._ranking_.curvature[self._some]

    @property
    def bent(self) -> Tensor:
        """Running sum of the absolute second differences of exp(logit - max)."""
        inner = self._before.isfinite() & self.below.isfinite()
        p, q, r = (exp(torch.where(inner, z - self._top, 0.0)) for z in (self._before, self.value, self.below))
        return self._running("curvature", torch.where(inner, (p - 2 * q + r).abs(), 0.0))


class Ranking:
    """The kept logits of U rows in decreasing order, read piece by piece, and N questions about them.

    Args:
        values: ``values(rows, start, stop)`` are the logits (U', m) at ranks [start, stop) of some rows, -inf behind the last.
        width: the largest number of ranks.
        unique: (U,) the rows.
        state: (N,) which of the rows each question is about.
    """

    FIRST, GROWTH = 256, 16

    def __init__(self, values: Callable[[Tensor, int, int], Tensor], width: int, unique: Tensor, state: Tensor):
        self.values, self.width, self.state = values, width, state
        self.rows = torch.arange(len(unique), device=unique.device)
        self.top = values(self.rows, 0, 1)
        self._whole: dict[str, Tensor] = {}

    @property
    def logz(self) -> Tensor:
        """(U, 1)"""
        if "logz" not in self._whole:
            self._whole["logz"] = TopSets(self, self.rows, 0, self.width, {}).logz[:, -1:]
        return self._whole["logz"]

    @property
    def least(self) -> Tensor:
        """(U, 1) smallest kept logit, inf if there is none."""
        if "least" not in self._whole:
            values = self.values(self.rows, 0, self.width)
            self._whole["least"] = values.masked_fill(values.isneginf(), torch.inf).amin(-1, keepdim=True)
        return self._whole["least"]

    @property
    def curvature(self) -> Tensor:
        """(U, 1) sum of the absolute second differences of exp(logit - max), by rank."""
        if "curvature" not in self._whole:
            self._whole["curvature"] = TopSets(self, self.rows, 0, self.width, {}).bent[:, -1:]
        return self._whole["curvature"]

    def _pieces(self) -> Any:
        start, size = 0, self.FIRST
        while start < self.width:
            yield start, min(start + size, self.width)
            start, size = start + size, size * self.GROWTH

    def longest(self, score: Callable[[TopSets], Tensor], at_least: Tensor) -> Tensor:
        """(N,) sizes, as floats."""
        answer = torch.zeros(len(self.state), dtype=self.top.dtype, device=self.top.device)
        open_ = torch.arange(len(self.state), device=self.top.device)
        carry: Carry = {}
        low = torch.full((len(self.rows), 1), torch.inf, dtype=self.top.dtype, device=self.top.device)
        for start, stop in self._pieces():
            # Rows that nobody asks about any more are not read on.
            some, index = self.state[open_].unique(return_inverse=True)
            top = TopSets(self, some, start, stop, carry)
            given = score(top)
            # The worst score so far answers every question about a row at once; behind the last token nothing is within.
            worst = torch.where(given.isnan(), torch.inf, given).masked_fill(~top.alive, -torch.inf)
            worst = torch.cat([low[some], worst], 1).cummin(-1).values
            size = _first_below(worst[:, 1:], index, at_least[open_])
            answer[open_] += size
            for name, sums in top.last().items():
                kept = carry.setdefault(name, [torch.zeros(len(self.rows), 1, dtype=s.dtype, device=s.device) for s in sums])
                for old, new in zip(kept, sums, strict=True):
                    old[some] = new
            low[some] = worst[:, -1:]
            open_ = open_[size == stop - start]
            if not len(open_):
                break
        return answer

    def best(self, score: Callable[[TopSets], Tensor], later: Callable[[TopSets], Tensor] | None = None) -> Tensor:
        """(N,) sizes, as floats."""
        some = self.rows
        carry: Carry = {}
        most = torch.full_like(self.top, -torch.inf)
        size = torch.ones_like(self.top)
        for start, stop in self._pieces():
            top = TopSets(self, some, start, stop, carry)
            given = score(top)
            given = torch.where(given.isnan() | ~top.alive, -torch.inf, given)
            found, where = given.max(-1, keepdim=True)
            size = torch.where(found > most, (start + where + 1).to(size), size)
            most = most.maximum(found)
            if later is not None and bool((most >= later(top)[:, -1:]).all()):
                break
            carry = top.last()
        return size[self.state, 0]


def _first_below(worst: Tensor, index: Tensor, level: Tensor) -> Tensor:
    """(N,) first place in row ``index`` of the decreasing ``worst`` (U, m) that is below ``level``; m if none is."""
    lo = torch.zeros_like(index)
    hi = torch.full_like(index, worst.shape[1])
    for _ in range(worst.shape[1].bit_length()):
        middle = (lo + hi) // 2
        open_ = lo < hi
        below = worst[index, middle.clamp(max=worst.shape[1] - 1)] < level
        hi = torch.where(open_ & below, middle, hi)
        lo = torch.where(open_ & ~below, middle + 1, lo)
    return lo
