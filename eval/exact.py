"""Exact validity and diversity of any chain, from the logits at every prefix of the valid answers; no sampling.

Legend: S settings, n nodes of the trie, A answers. Definition 3.1 of arXiv 2605.11128: ``validity = p(Y in V)``,
``diversity = exp(H(Y | Y in V)) / |V|`` with the entropy H in nats.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decal.eval.forward import needed
from decal.eval.ranked import RankedBlock, RankedRow, moments_of, plain, scales_of
from decal.eval.trie import TokenTrie
from decal.samplers.chain import Chain
from decal.samplers.errors import DecalError
from decal.samplers.rule import Rule, Step

Rows = Iterable[tuple[Sequence[int], Tensor]]
"""Blocks of nodes with their next-token logits, (nodes, V)."""

MEMORY = 600_000_000
"""Bytes of running sums held at a time."""


@dataclass(frozen=True)
class Group:
    """Chains of the same rules in the same order, evaluated together.

    Attributes:
        rules: the rules, in order.
        values: for each rule ``{parameter: (S, 1), or (S, n) where every node has its own}``.
        members: which settings of the whole grid these are.
        scales: every factor by which a row's logits are multiplied on the way.
    """

    rules: tuple[Rule, ...]
    values: tuple[Mapping[str, Tensor], ...]
    members: tuple[int, ...]
    scales: frozenset[float]


def group(chains: Sequence[Chain]) -> tuple[list[Group], list[int]]:
    """Arrange chains into groups, and list the ones that don't fit: those that scale each row by a factor of its own.

    Raises:
        DecalError: a chain has per-row parameters.
    """
    by_rules: dict[tuple[Rule, ...], list[int]] = defaultdict(list)
    scales: dict[int, list[float]] = {}
    misfits: list[int] = []
    for number, chain in enumerate(chains):
        if chain.per_row is not None:
            raise DecalError(f"the evaluator needs one value per parameter, got per-row values in {chain}")
        found = scales_of(chain.steps)
        if found is None:
            misfits.append(number)
        else:
            scales[number] = found
            by_rules[tuple(step.rule for step in chain.steps)].append(number)
    return [_stack(chains, rules, members, scales) for rules, members in by_rules.items()], misfits


def _stack(chains: Sequence[Chain], rules: tuple[Rule, ...], members: list[int], scales: Mapping[int, list[float]]) -> Group:
    values = tuple(
        {
            name: torch.tensor([[chains[m].steps[place].values[name]] for m in members], dtype=torch.float64)
            for name in rule.params
        }
        for place, rule in enumerate(rules)
    )
    return Group(rules, values, tuple(members), frozenset(s for m in members for s in scales[m]))


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


def flows(
    trie: TokenTrie,
    rows: Rows,
    groups: Sequence[Group],
    settings: int,
    observe: Callable[[RankedBlock, Interest, Tensor, Tensor], None] | None = None,
    tick: Callable[[int], None] | None = None,
) -> Flow:
    """Send every setting of ``groups`` through every node.

    Args:
        rows: logits of the nodes something depends on, in any order.
        settings: how many settings there are in all.
        observe: called on each block with its interesting tokens, the row of each and its position in the ranking.
        tick: called with the number of nodes just done.
    """
    scales = sorted({1.0}.union(*(g.scales for g in groups)))
    moments = moments_of(rule for g in groups for rule in g.rules)
    interest = Interest.of(trie)
    flow = Flow.empty(settings, trie)
    for nodes, logits in _every_needed_once(trie, rows):
        tables = len(moments) * len(scales) + 3
        size = max(1, MEMORY // (8 * logits.shape[1] * tables))
        for start in range(0, len(nodes), size):
            part = list(nodes[start : start + size])
            block = RankedBlock(logits[start : start + size], scales, moments)
            _flow_block(block, part, logits[start : start + size], interest, groups, flow, observe)
            if tick:
                tick(len(part))
    return flow


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
    interest: Interest,
    groups: Sequence[Group],
    flow: Flow,
    observe: Callable[[RankedBlock, Interest, Tensor, Tensor], None] | None,
) -> None:
    here, place = interest.within(nodes)
    row = torch.from_numpy(place)
    values = plain(logits)
    level = values[row, torch.from_numpy(here.token)].double() - values.amax(-1).double()[row]
    position = torch.where(level.isfinite(), block.position(row, level), block.width)
    if observe:
        observe(block, here, row, position)
    for g in groups:
        final = _run(block, nodes, g)
        total = final.mass(final.lo, final.hi)
        # (S, tokens of interest): each setting's row that the token follows.
        which = torch.arange(len(g.members))[:, None] * block.rows + row
        kept = (position >= final.lo[which]) & (position < final.hi[which])
        logit = block.scales[final.scale[which]] * torch.where(kept, level, 0.0) - final.reference[which]
        share = torch.where(kept, logit.exp() / total[which], 0.0)
        _deposit(flow, torch.tensor(g.members), here, share)


def _run(block: RankedBlock, nodes: list[int], g: Group) -> RankedRow:
    settings, rows = len(g.members), block.rows
    row = torch.arange(rows).repeat(settings)
    unit = int(torch.searchsorted(block.scales, torch.tensor(1.0, dtype=torch.float64)))
    state = RankedRow(block, row, torch.full_like(row, unit), torch.zeros_like(row), block.alive[row])
    for rule, values in zip(g.rules, g.values, strict=True):
        spread = {name: (v[:, nodes] if v.shape[1] > 1 else v.expand(-1, rows)).reshape(-1, 1) for name, v in values.items()}
        state = state.after(Step(rule, spread))
    return state


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


def evaluate(trie: TokenTrie, rows: Rows, chains: Sequence[Chain]) -> Outcome:
    """Validity, diversity and answer probabilities of each chain, exactly.

    Args:
        rows: logits of the nodes of ``trie``; read more than once.
    """
    return outcome(trie, chain_flow(trie, rows, chains, *group(chains)))


def chain_flow(
    trie: TokenTrie, rows: Rows, chains: Sequence[Chain], groups: Sequence[Group], misfits: Sequence[int], **kwargs: Any
) -> Flow:
    """`flows` of the chains in ``groups`` (and further groups, numbered from ``len(chains)``), `dense_flow` of ``misfits``."""
    settings = max([len(chains) - 1, *(m for g in groups for m in g.members)]) + 1
    flow = flows(trie, rows, groups, settings, **kwargs)
    if misfits:
        dense = dense_flow(trie, rows, [chains[m] for m in misfits])
        for part in ("arrive", "end", "stray"):
            getattr(flow, part)[list(misfits)] = getattr(dense, part)
    return flow
