"""Rows of several requests with chains of their own, processed together.

Requests whose chains have the same rules are one group, whatever their parameters: the group's chain has a value for each row.
What a chain remembers is kept by request and length of the text, so that drafts of speculative decoding that are rejected, a
request that is paused, and several rows of a request in one step are all right.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from decal.samplers.chain import Chain, Seen, State, parse
from decal.samplers.context import History
from decal.samplers.rule import Parameter, Step
from decal.serving.request import Request, fresh_number

log = logging.getLogger(__name__)

KEPT = 2**30
"""Bytes of what requests that have left the batch remember that are kept, in case they come back."""


class Place(NamedTuple):
    """What a request's chain knew at a length of its text: a digest of the text, and one row of state and of what rules saw."""

    text: bytes
    state: State
    seen: Seen

    @property
    def bytes(self) -> int:
        """Size of the rows."""
        return sum(z.nbytes for z in self.seen.rows.values())


M = TypeVar("M", bound="Member")


@dataclass(eq=False)
class Member:
    """A request in an engine's batch.

    Attributes:
        request: what it asks for.
        number: tells its random choices apart from those of other requests.
        places: the last steps of its generation by length of the text, for chains that remember.
    """

    request: Request
    number: int
    places: dict[int, Place] = field(default_factory=dict)

    @classmethod
    def of(cls: type[M], request: Request, seed: int | None = None) -> M:
        """For a request that has entered the batch. ``seed`` is the engine's own, if it has one."""
        number = next((n for n in (request.seed, seed) if n is not None), None)
        # An engine's seed may be larger than what a tensor holds.
        return cls(request, fresh_number() if number is None else (number + 2**63) % 2**64 - 2**63)

    @property
    def reads_text(self) -> bool:
        """Whether its chain wants to know the tokens so far."""
        return reads_text(self.request.chain)


def reads_text(chain: Chain) -> bool:
    """Whether a chain wants to know the tokens so far."""
    return bool(chain.needs)


class Rested:
    """Memories of requests that have left a batch, the last ones, up to `KEPT` bytes, by chain and text.

    Args:
        members: requests that may have left without a word, by anything.
    """

    def __init__(self, members: Mapping[Any, Member] | None = None) -> None:
        self._members: Mapping[Any, Member] = {} if members is None else members
        self._places: OrderedDict[bytes, Place] = OrderedDict()
        self._bytes = 0

    def keep(self, member: Member) -> None:
        """Of a member that leaves."""
        for place in member.places.values():
            self._forget(self._places.pop(place.text, None))
            self._places[place.text] = place
            self._bytes += place.bytes
        while self._bytes > KEPT:
            self._forget(self._places.popitem(last=False)[1])

    def _forget(self, place: Place | None) -> None:
        self._bytes -= place.bytes if place else 0

    def find(self, text: bytes) -> Place | None:
        """What a chain knew behind that text, with whichever request."""
        if text in self._places:
            return self._places[text]
        return next((place for m in self._members.values() for place in m.places.values() if place.text == text), None)


class Group:
    """Rows of a batch whose chains have the same rules.

    Args:
        rows: their places in the batch, ascending.
        members: the request of each; the same several times where a request has several rows.
        rested: where to look for memories of requests that come back.
    """

    def __init__(self, rows: Sequence[int], members: Sequence[Member], rested: Rested | None = None):
        self.rows, self.members = torch.tensor(rows, dtype=torch.long), list(members)
        self.chain = joined([m.request.chain for m in members])
        self.number = torch.tensor([m.number for m in members], dtype=torch.long)[:, None]
        self.draws = members[0].request.seed is not None
        self.rested = rested or Rested()
        self._index: dict[torch.device, Tensor] = {}

    @property
    def reads_text(self) -> bool:
        return reads_text(self.chain)

    def index(self, device: torch.device) -> Tensor:
        """(R,) the rows."""
        if device not in self._index:
            self._index[device] = self.rows.to(device)
        return self._index[device]

    def __call__(self, logits: Tensor, length: Tensor | None = None, history: History | None = None) -> Tensor:
        """What the chain makes of its rows (R, V).

        Args:
            length: (R, 1) tokens of each row's text, if the group draws.
            history: of the rows, if it `reads_text`.
        """
        if history is None or "state" not in self.chain.needs:
            return self._step(self.chain, logits, length, history, None)[0]
        lengths = history.length[:, 0].tolist()
        texts = _digests(history, self.members)
        rounds = _rounds(self.members, lengths)
        for row in rounds[0]:
            member = self.members[row]
            member.places = {length: place for length, place in member.places.items() if length >= lengths[row] - 1}
        out = torch.empty_like(logits)
        for rows in rounds:
            index = torch.tensor(rows, device=logits.device)
            own = history.rows(index.to(history.tokens.device))
            members = [self.members[row] for row in rows]
            chain = self.chain if len(rows) == len(lengths) else joined([m.request.chain for m in members])
            state = self._advance(chain, members, own, [texts[row][0] for row in rows])
            out[index], left = self._step(chain, logits[index], None if length is None else length[index], own, state, rows)
            for place, (row, member) in enumerate(zip(rows, members, strict=True)):
                member.places[lengths[row]] = Place(texts[row][1], _row_of_state(state, place), _row_of_seen(left, place))
        return out

    def _step(
        self,
        chain: Chain,
        logits: Tensor,
        length: Tensor | None,
        history: History | None,
        state: State | None,
        rows: Sequence[int] | None = None,
    ) -> tuple[Tensor, Seen]:
        if not self.draws:
            return chain.apply(logits, state, history=history, check=False)
        assert length is not None
        number = self.number if rows is None else self.number[list(rows)]
        tokens, seen = chain.draw(logits, number.to(logits.device)[:, 0], length[:, 0], state, history=history, check=False)
        return torch.full_like(logits, -torch.inf).scatter_(1, tokens[:, None], 0.0), seen

    def _advance(self, chain: Chain, members: Sequence[Member], history: History, before: Sequence[bytes]) -> State:
        """The state of each row: what its chain knew a token ago, told of that token; the initial one where a text begins."""
        lengths, prompts = history.length[:, 0].tolist(), history.prompt[:, 0].tolist()
        found = [
            None if n <= p else self._find(member, n - 1, text)
            for n, p, member, text in zip(lengths, prompts, members, before, strict=True)
        ]
        lost = sum(place is None and n > p for place, n, p in zip(found, lengths, prompts, strict=True))
        if lost:
            log.warning("decal: %d requests go on without what %s remembered of their texts", lost, chain)
        device = history.tokens.device
        fresh = chain.init(len(members), device=device)
        known = [place for place in found if place is not None]
        if not known:
            return fresh
        places = [place or known[0] for place in found]
        begins = torch.tensor([[place is None] for place in found], device=device)
        seen = Seen({n: torch.cat([p.seen.rows[n] for p in places]) for n in known[0].seen.rows})
        state = tuple(
            old and {name: torch.cat([(p.state[step] or {})[name] for p in places]) for name in old}
            for step, old in enumerate(fresh)
        )
        # A draft that isn't known yet is no token; what comes of its row is thrown away.
        tokens = history.tokens[:, -1].masked_fill(begins[:, 0], 0).clamp(min=0)
        advanced = chain.observe(state, seen, tokens)
        return tuple(
            new and old and {name: torch.where(begins.to(new[name].device), old[name].to(new[name]), new[name]) for name in old}
            for new, old in zip(advanced, fresh, strict=True)
        )

    def _find(self, member: Member, length: int, text: bytes) -> Place | None:
        own = member.places.get(length)
        # The text tells a draft that was rejected from the token that took its place.
        return own if own is not None and own.text == text else self.rested.find(text)


def _rounds(members: Sequence[Member], lengths: Sequence[int]) -> list[list[int]]:
    """Rows that can be done at once: the shortest text of each request, then the next, as they build on one another."""
    rounds: list[list[int]] = []
    done: dict[int, int] = {}
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        number = done.get(id(members[row]), 0)
        done[id(members[row])] = number + 1
        if number == len(rounds):
            rounds.append([])
        rounds[number].append(row)
    return [sorted(rows) for rows in rounds]


def grouped(members: Mapping[int, Member] | Sequence[Member | None], rested: Rested | None = None) -> list[Group]:
    """The members of a batch, by their places in it, as groups."""
    places = members.items() if isinstance(members, Mapping) else enumerate(members)
    found: dict[Hashable, tuple[list[int], list[Member]]] = {}
    for row, member in sorted((row, m) for row, m in places if m is not None):
        rows, those = found.setdefault(shape(member.request), ([], []))
        rows.append(row)
        those.append(member)
    return [Group(rows, those, rested) for rows, those in found.values()]


def process(
    logits: Tensor, groups: Sequence[Group], length: Callable[[Group], Tensor], history: Callable[[Group], History]
) -> Tensor:
    """The batch's logits (B, V) with every group's chain applied to its rows, changed in place or not.

    Args:
        length: gives a group's (R, 1) lengths of texts; asked of groups that draw.
        history: gives a group's history; asked of groups that read it.
    """
    for group in groups:
        sizes = length(group).to(logits.device) if group.draws else None
        # Where the logits are, so that tables over the vocabulary are made there.
        texts = history(group).to(logits.device) if group.reads_text else None
        if len(group.rows) == len(logits):
            return group(logits, sizes, texts)
        index = group.index(logits.device)
        logits[index] = group(logits[index], sizes, texts)
    return logits


def histories(group: Group, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> History:
    """Of the group's rows, from the prompt and the generated tokens of each."""
    lengths = [len(prompt) + len(output) for prompt, output in texts]
    tokens = np.full((len(texts), max(lengths)), -1)
    for row, (prompt, output) in zip(tokens, texts, strict=True):
        row[len(row) - len(output) - len(prompt) : len(row) - len(output)] = prompt
        row[len(row) - len(output) :] = output
    prompts = torch.tensor([[len(prompt)] for prompt, _ in texts])
    return History(torch.from_numpy(tokens), torch.tensor(lengths)[:, None], prompts, group.number)


def warm_up(device: torch.device | str = "cpu") -> None:
    """Compile what chains run on, if this machine has not yet: when an engine starts, not when its first request waits."""
    chain = parse("top_k(2) | top_p(0.5) | min_p(0.1)")
    logits = torch.arange(8.0, device=device)[None]
    chain(logits, check=False)
    chain(logits.double(), check=False)  # between steps that only torch can do
    chain.sample(logits, 0, 0, check=False)


def shape(request: Request) -> Hashable:
    """What requests of one group have in common: rules, their words and tables, answers, embeddings, ends, who draws."""
    chain = request.chain
    steps = tuple((s.rule.name, *(v for name, v in s.values.items() if not _varies(s, name))) for s in chain.steps)
    return steps, id(chain.guide), id(chain.weights), chain.ends, request.seed is None


def joined(chains: Sequence[Chain]) -> Chain:
    """One chain for rows with chains of the same `shape`: with a parameter for each row where they differ."""
    first = chains[0]
    if all(chain is first for chain in chains):
        return first
    steps = tuple(_joined([chain.steps[place] for chain in chains]) for place in range(len(first.steps)))
    return replace(first, steps=steps)


def _joined(steps: Sequence[Step]) -> Step:
    first = steps[0]
    values: dict[str, Any] = dict(first.values)
    for name in values:
        column = [step.values[name] for step in steps]
        if any(value != column[0] for value in column):
            values[name] = torch.tensor(column, dtype=torch.float64)[:, None]
    return replace(first, values=values)


def _varies(step: Step, name: str) -> bool:
    """Whether a parameter may differ from row to row."""
    param = step.rule.params[name]
    return isinstance(param, Parameter) and not param.static


def _digests(history: History, members: Sequence[Member]) -> list[tuple[bytes, bytes]]:
    """Of each row, of what its request asks for with all its tokens but the last, and with all."""
    found = []
    for row, length, member in zip(history.tokens.cpu().numpy(), history.length[:, 0].tolist(), members, strict=True):
        real = np.ascontiguousarray(row[len(row) - length :], dtype=np.int64)
        request = member.request
        digest = blake2b(f"{request.chain} {request.seed} {request.answers}".encode(), digest_size=16)
        digest.update(real[:-1].tobytes())
        before = digest.digest()
        digest.update(real[-1:].tobytes())
        found.append((before, digest.digest()))
    return found


def _row_of_state(state: State, row: int) -> State:
    return tuple(one and {name: value[row : row + 1] for name, value in one.items()} for one in state)


def _row_of_seen(seen: Seen, row: int) -> Seen:
    return Seen({number: z[row : row + 1].clone() for number, z in seen.rows.items()})
