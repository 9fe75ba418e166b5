"""Exact validity and diversity of any chain, from the logits at every prefix of the valid answers; no sampling.

Legend: S settings, n nodes of the trie, A answers. Definition 3.1 of arXiv 2605.11128: ``validity = p(Y in V)``,
``diversity = exp(H(Y | Y in V)) / |V|`` with the entropy H in nats.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decal.eval.forward import needed
from decal.eval.ranked import CompactRow, RankedBlock, RankedRow, moments_of, plain, table_scales
from decal.kernels import reference
from decal.samplers.chain import Chain, transform
from decal.samplers.context import Context, History, Weights
from decal.samplers.errors import DecalError
from decal.samplers.guided import Guide
from decal.samplers.row import DenseRow
from decal.samplers.rule import Rule, Step, TokensParameter
from decal.samplers.trie import TokenTrie
from decal.samplers.views import Views

Rows = Iterable[tuple[Sequence[int], Tensor]]
"""Blocks of nodes with their next-token logits, (nodes, V)."""

MEMORY = 600_000_000
"""Bytes of running sums held at a time."""


CELLS = 4_000_000
"""Logits written out at a time, for rules that need more than a range of the ranking."""


@dataclass(frozen=True)
class Group:
    """Chains of the same rules in the same order, evaluated together.

    Attributes:
        rules: the rules, in order.
        values: for each rule ``{parameter: (S, 1), or (S, n) where every node has its own}``; what all settings share is not a
            tensor.
        members: which settings of the whole grid these are.
        scales: factors of a row's logits for which running sums are worth while.
        lead: a step before all of ``rules``, the same for all settings, that rewrites rows: once for all of them.
    """

    rules: tuple[Rule, ...]
    values: tuple[Mapping[str, Any], ...]
    members: tuple[int, ...]
    scales: frozenset[float]
    lead: Step | None = None

    @property
    def needs(self) -> frozenset[str]:
        """What the rules read besides the logits; see `Chain.needs`."""
        return frozenset().union(*(rule.needs for rule in self.rules))

    @property
    def named(self) -> bool:
        """Whether it matters which token is which."""
        pairs = (
            (p, values[name]) for rule, values in zip(self.rules, self.values, strict=True) for name, p in rule.params.items()
        )
        spared = any(isinstance(p, TokensParameter) and v for p, v in pairs)
        return spared or any(rule.tokenwise and rule.needs & {"history", "model", "ends"} for rule in self.rules)

    @property
    def absolute(self) -> bool:
        """Whether it matters what constant the logits have."""
        steps = (Step(rule, values) for rule, values in zip(self.rules, self.values, strict=True))
        return not all(step.ignores_shift for step in steps)


def group(chains: Sequence[Chain]) -> list[Group]:
    """Arrange chains into groups.

    Raises:
        DecalError: a chain has per-row parameters, or a memory of what depends on a coin.
    """
    by_rules: dict[Any, list[int]] = defaultdict(list)
    for number, chain in enumerate(chains):
        if chain.per_row is not None:
            raise DecalError(f"the evaluator needs one value per parameter, got per-row values in {chain}")
        _refuse_memory_of_coins(chain)
        lead, rest = _lead(chain)
        shared = tuple((s.rule, *(v for name, v in s.values.items() if s.rule.params[name].static)) for s in rest)
        by_rules[lead and str(lead), shared].append(number)
    return [_stack(chains, members) for members in by_rules.values()]


def _lead(chain: Chain) -> tuple[Step | None, Sequence[Step]]:
    """A first step that reads other prompts, and the other steps: it treats every token anew, the others may not."""
    first = chain.steps[0]
    leads = first.rule.needs <= {"prompts", "history"} and "prompts" in first.rule.needs and not first.is_off
    return (first, chain.steps[1:]) if leads else (None, chain.steps)


def _refuse_memory_of_coins(chain: Chain) -> None:
    """What a rule remembers must be a function of the text, or there would be as many memories as ways for coins to fall."""
    tossed = None
    for step in chain.steps:
        if step.is_off:
            continue
        if "chance" in step.rule.needs:
            tossed = step
        elif tossed and step.rule.feedback:
            raise DecalError(f"the evaluator can't be exact on {chain}: what {step} remembers depends on the coins of {tossed}")


def _stack(chains: Sequence[Chain], members: list[int]) -> Group:
    lead, steps = _lead(chains[members[0]])
    every = [_lead(chains[m])[1] for m in members]
    values = tuple(
        {
            name: step.values[name]
            if p.static
            else torch.tensor([[rest[place].values[name]] for rest in every], dtype=torch.float64)
            for name, p in step.rule.params.items()
        }
        for place, step in enumerate(steps)
    )
    scales = frozenset(s for rest in every for s in table_scales(rest) or ())
    return Group(tuple(step.rule for step in steps), values, tuple(members), scales, lead)


@dataclass
class Flow:
    """Where probability goes at each node, per setting; all (S, n) in float64.

    Attributes:
        arrive: probability of stepping to a node from its parent; 1 at the root.
        end: probability, at a node where an answer ends, of ending there.
        stray: probability of a token that spells on towards an answer but leaves the trie.
    """

    arrive: Tensor
    end: Tensor
    stray: Tensor

    @classmethod
    def empty(cls, settings: int, trie: TokenTrie) -> Flow:
        n = len(trie)
        flow = cls(*(torch.zeros((settings, n), dtype=torch.float64) for _ in range(3)))
        flow.arrive[:, 0] = 1.0
        if not trie.ends:
            flow.end[:, torch.tensor(trie.answer) >= 0] = 1.0
        return flow


@dataclass
class Outcome:
    """Exact results of S settings.

    Attributes:
        answers: (S, A) probability of each answer.
        validity: (S,) in [0, 1].
        diversity: (S,) in [1/|V|, 1]; NaN where validity is 0.
        slack: (S,) at most this much probability went to other tokenisations of valid answers and is missing from validity.
    """

    answers: np.ndarray
    validity: np.ndarray
    diversity: np.ndarray
    slack: np.ndarray


def outcome(trie: TokenTrie, flow: Flow) -> Outcome:
    """Multiply a flow along the paths of the trie."""
    mass = flow.arrive.numpy().copy()
    parent = np.asarray(trie.parent)
    for level in list(trie.levels())[1:]:
        mass[:, level] *= mass[:, parent[level]]
    leaf = np.flatnonzero(np.asarray(trie.answer) >= 0)
    answers = np.zeros((len(mass), trie.size))
    # Transposed, so that the index is the plain first one.
    np.add.at(answers.T, np.asarray(trie.answer)[leaf], (mass * flow.end.numpy())[:, leaf].T)
    validity = answers.sum(-1)
    return Outcome(answers, validity, diversity(answers), (mass * flow.stray.numpy()).sum(-1))


def join(outcomes: Sequence[Outcome]) -> Outcome:
    """Outcomes of the same task, one after another."""
    names = ("answers", "validity", "diversity", "slack")
    return Outcome(*(np.concatenate([getattr(o, name) for o in outcomes]) for name in names))


def diversity(answers: np.ndarray) -> np.ndarray:
    """``exp(H) / A`` of each row of unnormalised answer probabilities (S, A), in [1/A, 1]; NaN for rows of zeros."""
    total = answers.sum(-1, keepdims=True)
    share = np.divide(answers, total, out=np.zeros_like(answers), where=total > 0)
    entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum(-1)
    # Rounding may lift the exponential a hair above the number of answers.
    return np.where(total[:, 0] > 0, np.minimum(np.exp(entropy) / answers.shape[1], 1.0), np.nan)


@dataclass
class Interest:
    """The tokens whose probability matters: of each, the node it follows and what it leads to.

    ``kind`` is 0 for a step to the node ``to``, 1 for an end, 2 for a stray; ``index`` numbers them within a trie.
    """

    index: np.ndarray
    node: np.ndarray
    token: np.ndarray
    kind: np.ndarray
    to: np.ndarray

    @classmethod
    def of(cls, trie: TokenTrie) -> Interest:
        entries: list[tuple[int, int, int, int]] = []
        for node, children in enumerate(trie.children):
            entries += [(node, token, 0, child) for token, child in children.items()]
            if trie.answer[node] >= 0:
                entries += [(node, token, 1, node) for token in trie.ends]
            entries += [(node, token, 2, node) for token in trie.strays[node]]
        table = np.asarray(entries, dtype=np.int64).reshape(-1, 4)
        return cls(np.arange(len(table)), *table.T)

    def within(self, nodes: Sequence[int]) -> tuple[Interest, np.ndarray]:
        """The part that follows ``nodes``, and where in ``nodes`` each entry's node stands."""
        place = {node: i for i, node in enumerate(nodes)}
        chosen = np.flatnonzero(np.isin(self.node, np.asarray(nodes)))  # entries of a trie: index = place
        part = Interest(chosen, self.node[chosen], self.token[chosen], self.kind[chosen], self.to[chosen])
        return part, np.asarray([place[n] for n in part.node], dtype=np.int64)


@dataclass(frozen=True)
class Situation:
    """What rules may want to know besides the logits.

    Attributes:
        prompt: token ids before the answers.
        weights: the model's embeddings.
        views: logits behind other prompts.
    """

    prompt: Sequence[int] = ()
    weights: Weights | None = None
    views: Views | None = None

    def context(self, trie: TokenTrie, nodes: Sequence[int]) -> Context:
        """Of a block of nodes."""
        texts = [[*self.prompt, *trie.path(node)] for node in nodes]
        return Context(History.of(texts, prompt=len(self.prompt)), self.weights, Guide(trie), self.views, tuple(trie.ends))


def flows(
    trie: TokenTrie,
    rows: Rows,
    groups: Sequence[Group],
    settings: int,
    observe: Callable[[RankedBlock, Interest, Tensor, Tensor], None] | None = None,
    tick: Callable[[int], None] | None = None,
    situation: Situation | None = None,
    scales: Iterable[float] = (),
) -> Flow:
    """Send every setting of ``groups`` through every node.

    Args:
        rows: logits of the nodes something depends on, in any order; parents first, if a rule remembers what was drawn.
        settings: how many settings there are in all.
        observe: called on each block with its interesting tokens, the row of each and its position in the ranking.
        tick: called with the number of nodes just done.
        situation: the prompt, and what else rules may read.
        scales: further scales that ``observe`` wants.
    """
    work = _Work(trie, Interest.of(trie), Flow.empty(settings, trie), situation or Situation())
    alike = _Alike.of(groups, scales)
    for nodes, logits in _every_needed_once(trie, rows):
        size = max(1, MEMORY // (8 * logits.shape[1] * max(one.tables for one in alike)))
        for part in _families_apart(trie, nodes, size) if any("state" in g.needs for g in groups) else _pieces(nodes, size):
            chosen = [nodes[i] for i in part]
            for one in alike:
                values = logits[part] if one.lead is None else _rewritten(one.lead, logits[part], work, chosen)
                block = RankedBlock(values, one.scales, one.moments, one.named)
                _flow_block(block, chosen, values, work, one.groups, observe if one.lead is None else None)
            if tick:
                tick(len(part))
    return work.flow


@dataclass(frozen=True)
class _Alike:
    """Groups, by number, that begin with the same rows, and what is needed of these."""

    lead: Step | None
    groups: Mapping[int, Group]
    scales: Sequence[float]
    moments: set[str]
    named: bool

    @classmethod
    def of(cls, groups: Sequence[Group], scales: Iterable[float]) -> list[_Alike]:
        by_lead: dict[str, dict[int, Group]] = {"": {}}
        for number, g in enumerate(groups):
            by_lead.setdefault(str(g.lead) if g.lead else "", {})[number] = g
        found = []
        for some in by_lead.values():
            own = some.values()
            lead = next(iter(own)).lead if own else None
            wanted = {1.0, *scales} if lead is None else {1.0}
            moments = moments_of(rule for g in own for rule in g.rules)
            found.append(cls(lead, some, sorted(wanted.union(*(g.scales for g in own))), moments, any(g.named for g in own)))
        return found

    @property
    def tables(self) -> int:
        """How many numbers are held for each token."""
        return len(self.moments) * len(self.scales) + 3


def _rewritten(lead: Step, logits: Tensor, work: _Work, nodes: Sequence[int]) -> Tensor:
    """The rows of ``nodes`` after a first step."""
    z = reference.clean(logits)
    context = work.situation.context(work.trie, nodes)
    return transform(z, lead.answer(DenseRow(z, reference, context), z))


def _pieces(nodes: Sequence[int], size: int) -> Iterable[list[int]]:
    return (list(range(start, min(start + size, len(nodes)))) for start in range(0, len(nodes), size))


def _families_apart(trie: TokenTrie, nodes: Sequence[int], size: int) -> Iterable[list[int]]:
    """Pieces of at most ``size`` places in ``nodes`` such that no node comes in the piece of its parent."""
    piece: list[int] = []
    for place, node in enumerate(nodes):
        if len(piece) == size or trie.parent[node] in {nodes[i] for i in piece}:
            yield piece
            piece = []
        piece.append(place)
    yield piece


@dataclass
class _Work:
    """What is known and filled in while rows pass by.

    Attributes:
        memory: by group and step, what the step remembers at each node, ``{name: (S, n)}``, and whether it is known there.
    """

    trie: TokenTrie
    interest: Interest
    flow: Flow
    situation: Situation
    memory: dict[tuple[int, int], tuple[dict[str, Tensor], np.ndarray]] = field(default_factory=dict)


def _every_needed_once(trie: TokenTrie, rows: Rows) -> Rows:
    """``rows``, checked: a missing row would pass for a validity of 0, a repeated one would count twice."""
    missing = {node for node in range(len(trie)) if needed(trie, node)}
    seen: set[int] = set()
    for nodes, logits in rows:
        again = seen & set(nodes)
        if again:
            raise DecalError(f"rows: node {min(again)} is given twice")
        seen |= set(nodes)
        yield nodes, logits
    if missing - seen:
        raise DecalError(f"rows: {len(missing - seen)} of {len(missing)} nodes are missing, such as {min(missing - seen)}")


def _flow_block(
    block: RankedBlock,
    nodes: list[int],
    logits: Tensor,
    work: _Work,
    groups: Mapping[int, Group],
    observe: Callable[[RankedBlock, Interest, Tensor, Tensor], None] | None,
) -> None:
    here, place = work.interest.within(nodes)
    row = torch.from_numpy(place)
    values = plain(logits)
    token = torch.from_numpy(here.token)
    level = values[row, token].double() - values.amax(-1).double()[row]
    position = torch.where(level.isfinite(), block.position(row, level), block.width)
    if observe:
        observe(block, here, row, position)
    if block.order is not None:
        # Tokens of equal logit are not alike for every rule, so each has a place of its own.
        places = torch.empty_like(block.order).scatter_(1, block.order, torch.arange(block.width).expand_as(block.order))
        position = torch.where(level.isfinite(), places[row, token], block.width)
    for number, g in groups.items():
        for start in range(0, len(g.members), _settings_at_once(block, g)):
            part = slice(start, start + _settings_at_once(block, g))
            share = _Run(block, nodes, here, row, position, work, number, g, part).share()
            _deposit(work.flow, torch.tensor(g.members[part]), here, share)


def _settings_at_once(block: RankedBlock, g: Group) -> int:
    """Few, if rules look at every token of a row."""
    wide = any(rule.tokenwise for rule in g.rules)
    return max(1, CELLS * 8 // (block.rows * block.width)) if wide else len(g.members)


class _Run:
    """Some settings of a group on a block: the probability that each setting gives each interesting token."""

    def __init__(
        self,
        block: RankedBlock,
        nodes: list[int],
        here: Interest,
        row: Tensor,
        position: Tensor,
        work: _Work,
        number: int,
        g: Group,
        part: slice,
    ):
        self.block, self.nodes, self.here, self.row, self.position = block, nodes, here, row, position
        self.work, self.number, self.g, self.part = work, number, g, part
        self.settings = len(g.members[part])
        # (S, tokens of interest): each setting's row that the token follows.
        self.which = torch.arange(self.settings)[:, None] * block.rows + row
        self.column = position.expand_as(self.which)

    def share(self) -> Tensor:
        """(S, J), the average over every way the coins of its rules can fall."""
        coins = sum("chance" in rule.needs for rule in self.g.rules)
        total = torch.zeros(self.which.shape, dtype=torch.float64)
        for falls in itertools.product((True, False), repeat=coins):
            total += self._share(list(falls))
        return total

    def _share(self, falls: list[bool]) -> Tensor:
        rows = self._start()
        odds = torch.ones(self.settings * self.block.rows, dtype=torch.float64)
        if self.g.absolute:
            return self._compact(rows, 0, falls, odds)
        for step in range(len(self.g.rules)):
            one = self._step(step)
            if one.is_off and "chance" not in one.rule.needs:
                continue
            state = self._state(step)
            given = rows if state is None else rows.remembering(state)
            if "chance" in one.rule.needs:
                given = given.tossing(falls.pop(0))
            after = given.after(one)
            if after is None:
                return self._compact(given, step, falls, odds)
            odds = odds * _odds(given.chances, given.coin)
            self._remember(step, given, one)
            rows = after
        return rows.log_probability(self.which, self.column).exp() * odds[self.which]

    def _compact(self, rows: RankedRow, start: int, falls: list[bool], odds: Tensor) -> Tensor:
        """The rest of the chain, from step ``start``, on rows written out, some settings at a time."""
        share = torch.zeros(self.which.shape, dtype=torch.float64)
        width = int((rows.hi - rows.lo).max())
        size = max(1, CELLS // (self.block.rows * width))
        every = torch.arange(self.settings * self.block.rows).reshape(self.settings, -1)
        for first_ in range(0, self.settings, size):
            chosen = every[first_ : first_ + size]
            some = chosen.flatten()
            prunes = self.g.rules[start].prunes and not self.g.absolute and not self.g.rules[start].feedback
            few = rows.some(some)
            compact = CompactRow.pruned(few, self._step(start, some)) if prunes else CompactRow.of(few, self.g.absolute)
            which = self.which[first_ : first_ + size] - first_ * self.block.rows
            column = self.column[first_ : first_ + size]
            chance = odds[some]
            left = list(falls)
            for step in range(start + prunes, len(self.g.rules)):
                one = self._step(step, some)
                if one.is_off and "chance" not in one.rule.needs:
                    continue
                state = self._state(step)
                if "chance" in one.rule.needs and (step > start or compact.coin is None):
                    compact = compact.tossing(left.pop(0))
                self._remember(step, compact, one, which, column, slice(first_, first_ + size))
                compact = compact.after(one, state and {name: v[some] for name, v in state.items()})
                chance = chance * _odds(compact.chances, compact.coin)
            share[first_ : first_ + size] = compact.log_probability(which, column).exp() * chance[which]
        return share

    def _start(self) -> RankedRow:
        row = torch.arange(self.block.rows).repeat(self.settings)
        unit = int(torch.searchsorted(self.block.scales, torch.tensor(1.0, dtype=torch.float64)))
        context = self.work.situation.context(self.work.trie, self.nodes) if self.g.needs else None
        zero = torch.zeros_like(row)
        return RankedRow(self.block, row, zero + unit, zero, self.block.alive[row], context)

    def _step(self, step: int, some: Tensor | None = None) -> Step:
        spread: dict[str, Any] = {}
        for name, v in self.g.values[step].items():
            if isinstance(v, Tensor):
                own = v[self.part]
                v = (own[:, self.nodes] if own.shape[1] > 1 else own.expand(-1, self.block.rows)).reshape(-1, 1)
                v = v if some is None else v[some]
            spread[name] = v
        return Step(self.g.rules[step], spread)

    # ---- memory

    def _table(self, step: int) -> tuple[dict[str, Tensor], np.ndarray]:
        key = self.number, step
        if key not in self.work.memory:
            feedback = self.g.rules[step].feedback
            assert feedback is not None
            settings, n = len(self.g.members), len(self.work.trie)
            initial = feedback.init(**self.g.values[step])
            table = {name: v.expand(settings, 1).repeat(1, n) for name, v in initial.items()}
            self.work.memory[key] = table, np.arange(n) == 0
        return self.work.memory[key]

    def _state(self, step: int) -> dict[str, Tensor] | None:
        if not self.g.rules[step].feedback:
            return None
        table, known = self._table(step)
        if not known[self.nodes].all():
            unknown = next(node for node in self.nodes if not known[node])
            raise DecalError(f"rows: node {unknown} came before its parent, which {self.g.rules[step].name} has to see first")
        return {name: v[self.part][:, self.nodes].reshape(-1, 1) for name, v in table.items()}

    def _remember(
        self,
        step: int,
        rows: RankedRow | CompactRow,
        one: Step,
        which: Tensor | None = None,
        column: Tensor | None = None,
        settings: slice | None = None,
    ) -> None:
        """Tell the children of these nodes what the step will know there."""
        feedback = self.g.rules[step].feedback
        if feedback is None:
            return
        table, known = self._table(step)
        which, column = (self.which, self.column) if which is None or column is None else (which, column)
        inner = torch.arange(len(self.g.members))[self.part][settings or slice(None)]
        onward = np.flatnonzero(self.here.kind == 0)
        child, parent = self.here.to[onward], self.here.node[onward]
        logp = rows.log_probability(which, column)[:, onward]
        values = {name: v[inner] if isinstance(v, Tensor) else v for name, v in self.g.values[step].items()}
        values = {n: v[:, parent] if isinstance(v, Tensor) and v.shape[1] > 1 else v for n, v in values.items()}
        old = {name: v[inner][:, parent] for name, v in table.items()}
        row = rows if isinstance(rows, RankedRow) else rows.dense()
        notes = feedback.notes and {name: v[which[:, onward], 0] for name, v in feedback.notes(row, **one.values).items()}
        new = feedback.after(old, logp, notes, values)
        for name in table:
            table[name][inner[:, None], torch.from_numpy(child)] = torch.where(logp.isfinite(), new[name], old[name])
        known[child] = True


def _odds(chances: Sequence[Tensor], coin: bool | None) -> Tensor:
    """(B,) probability that the coins that were asked for fall as they did."""
    odds = torch.ones((), dtype=torch.float64)
    for probability in chances:
        odds = odds * (probability if coin else 1 - probability)[:, 0]
    return odds


def _deposit(flow: Flow, members: Tensor, here: Interest, share: Tensor) -> None:
    step = torch.from_numpy(np.flatnonzero(here.kind == 0))
    flow.arrive[members[:, None], torch.from_numpy(here.to)[step]] = share[:, step]
    for kind, target in ((1, flow.end), (2, flow.stray)):
        chosen = torch.from_numpy(np.flatnonzero(here.kind == kind))
        into = torch.from_numpy(here.to)[chosen]
        gathered = torch.zeros((len(members), target.shape[1]), dtype=torch.float64)
        gathered.index_add_(1, into, share[:, chosen])
        target[members] += gathered


def dense_flow(trie: TokenTrie, rows: Rows, processors: Sequence[Callable[[Tensor], Tensor]]) -> Flow:
    """What `flows` gives, for any functions from logits (B, V) to logits, by a full pass for each.

    Slower; needed for what isn't a chain, and an independent check of what is.
    """
    interest = Interest.of(trie)
    flow = Flow.empty(len(processors), trie)
    for nodes, logits in _every_needed_once(trie, rows):
        here, place = interest.within(list(nodes))
        index = torch.from_numpy(place), torch.from_numpy(here.token)
        for number, processor in enumerate(processors):
            share = processor(logits.double()).softmax(-1)[index]
            _deposit(flow, torch.tensor([number]), here, share[None])
    return flow


def evaluate(trie: TokenTrie, rows: Rows, chains: Sequence[Chain], situation: Situation | None = None) -> Outcome:
    """Validity, diversity and answer probabilities of each chain, exactly.

    Args:
        rows: logits of the nodes of ``trie``; parents first, if a chain remembers what was drawn.
        situation: the prompt and the embeddings, for chains that read them.
    """
    return outcome(trie, flows(trie, rows, group(chains), len(chains), situation=situation))
