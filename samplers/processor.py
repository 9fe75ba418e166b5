"""A chain as a ``LogitsProcessor`` of transformers, and what it remembers between the steps of a generation."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from decal.kernels import random
from decal.samplers.chain import Chain, Seen, State
from decal.samplers.context import History
from decal.samplers.errors import DecalError


class Rows(NamedTuple):
    """What a number of rows means to a processor.

    Attributes:
        chain: with parameters for so many rows.
        request: (B, 1) request numbers, for random choices.
        group: of each row, those that ``generate`` may swap with one another.
        origin: of each row, what besides the tokens its text depends on: its parameters and request.
        seed: (B,) seeds of its draws, if the processor draws.
    """

    chain: Chain
    request: Tensor
    group: list[int]
    origin: list[bytes]
    seed: Tensor | None


class ChainProcessor(LogitsProcessor):
    """Applies a chain to the scores of each step.

    Chains of rules that read nothing but logits have no memory, hash nothing and wait for no device. Others need to know where
    the prompt ended and what was drawn. For them the processor keeps, by the exact tokens of a row, the length of the prompt,
    the chain's state and the logits that rules with feedback saw. A call looks up each row without its last token, advances the
    state found by that token, one step late, and stores the result. So what is remembered is a function of the text: beams that
    change places, drafts of an assistant that are rejected, and a text that the same processor takes up again are all right.

    A row whose tokens but the last aren't known begins afresh: all of it is prompt, and the state is the initial one. So does a
    text that another processor began, and one forgotten: kept are the last 256 rows (4096 if no rule has feedback), and at
    least the last 4 calls. Conversely a prompt that is one token longer than a text the processor knows counts as its
    continuation; take a new processor for unrelated texts. Rows without a finite score come back as they are; see `Chain.mask`.

    Per-row parameters are one per request: with beams or several sequences per request they are repeated, which assumes that
    the rows of a request stand next to each other, as ``generate`` puts them.

    Args:
        chain: what to apply.
        pad_token_id: a run of this token on the left is padding, which is no part of the text. Without it padding is.
        requests: request numbers, one per request, which keep the random choices of texts apart and make them reproducible
            whatever else is in the batch. Further sequences of a request get numbers of their own. By default the places in the
            batch.
        beams: how many beams a request has; they share its random choices.
        seeds: one per request. The processor then draws: scores are 0 for the token drawn and -inf for the others. Further
            sequences of a request get seeds of their own. They are the request numbers too, unless those are given.
    """

    def __init__(
        self,
        chain: Chain,
        pad_token_id: int | None = None,
        requests: Tensor | Sequence[int] | None = None,
        beams: int = 1,
        seeds: Tensor | Sequence[int] | None = None,
    ):
        for given in chain.missing.values():
            raise DecalError(f"the chain {chain} {given.missing}")
        self.seeds = None if seeds is None else _numbers("seeds", seeds)
        self.requests = self.seeds if requests is None else _numbers("requests", requests)
        if self.seeds is not None and self.requests is not None and len(self.seeds) != len(self.requests):
            raise DecalError(f"there are {len(self.requests)} requests, and seeds for {len(self.seeds)}")
        self.chain, self.pad_token_id, self.beams = chain, pad_token_id, beams
        self.remembers = bool(chain.needs - {"model", "ends"})
        # There a processor sees the current token alone, and rows come and go.
        self.supports_continuous_batching = chain.per_row is None and not self.remembers and seeds is None
        self.memory = Memory()
        self._spread: dict[int, Rows] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = self.rows(len(scores))
        if not self.remembers:
            if rows.seed is None:
                return rows.chain(scores, check=False)
            real = input_ids.shape[1] - padding(input_ids, self.pad_token_id)
            return self.apply(rows, input_ids, scores, real, real, ())[0]
        length, before, after = _keys(input_ids, self.pad_token_id, rows.origin)
        # Where no token is real there is no last one, so that generation can only be at its start.
        found = [self.memory.find(g, key) if n else None for n, g, key in zip(length, rows.group, before, strict=True)]
        prompt = [n if past is None else past[0].prompt[past[1]] for n, past in zip(length, found, strict=True)]
        state = _advance(rows.chain, found, input_ids, scores.device)
        scores, seen = self.apply(rows, input_ids, scores, _column(length, input_ids), _column(prompt, input_ids), state)
        self.memory.keep(Taken(prompt, state, seen), rows.group, after)
        return scores

    def apply(
        self, rows: Rows, input_ids: Tensor, scores: Tensor, length: Tensor, prompt: Tensor, state: State
    ) -> tuple[Tensor, Seen]:
        """The processed scores, and what `Chain.observe` wants to know of the step."""
        history = History(input_ids, length, prompt, rows.request.to(input_ids.device))
        given = state or None  # a chain without memory has none
        if rows.seed is None:
            scores, seen = rows.chain.apply(scores, given, history=history, check=False)
        else:
            tokens, seen = rows.chain.draw(scores, rows.seed, length[:, 0], given, history=history, check=False)
            scores = torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)
        return scores, Seen({number: z_BV.detach() for number, z_BV in seen.rows.items()})

    def rows(self, count: int) -> Rows:
        """What ``count`` rows mean."""
        if count not in self._spread:
            self._spread[count] = self._rows(count)
        return self._spread[count]

    def _rows(self, count: int) -> Rows:
        chain, place = self.chain, torch.arange(count)
        if chain.per_row is not None:
            if count % chain.per_row:
                raise DecalError(f"the chain has parameters for {chain.per_row} rows, the logits have {count}")
            chain = _repeat(chain, count // chain.per_row)
        request = group = place // self.beams
        seed = None
        apart = [v.double().cpu() for step in chain.steps for v in step.values.values() if isinstance(v, Tensor)]
        if self.requests is not None:
            if count % len(self.requests):
                raise DecalError(f"the processor has numbers of {len(self.requests)} requests, the scores have {count} rows")
            copies = count // len(self.requests)
            number = self.requests.repeat_interleave(copies)
            copy = place % copies // self.beams
            # No two texts share a number as long as the given ones are below 2**32.
            request = number + (copy << 32)
            apart.append(number)
            if self.seeds is not None:
                own = self.seeds.repeat_interleave(copies)
                seed = torch.where(copy == 0, own, random.hashed(own, copy))
                apart.append(own)
        origin = [b"".join(values[row].numpy().tobytes() for values in apart) for row in range(count)]
        return Rows(chain, request[:, None], group.tolist(), origin, seed)

    def __repr__(self) -> str:
        return f"ChainProcessor({self.chain})"


class Taken(NamedTuple):
    """A step of generation: of each row the length of the prompt, the state before the step's token, and what rules saw."""

    prompt: list[int]
    state: State
    seen: Seen


Place = tuple[Taken, int]
"""A row of a step."""


class Memory:
    """The last steps taken, by the tokens before them."""

    CALLS, ROWS, ROWS_WITHOUT_LOGITS = 4, 256, 4096

    def __init__(self) -> None:
        self._places: dict[Hashable, Place] = {}
        self._calls: deque[tuple[Taken, list[Hashable]]] = deque()
        self._rows = 0

    def __len__(self) -> int:
        """How many rows are kept."""
        return self._rows

    def find(self, group: int, key: bytes) -> Place | None:
        """The last step taken after those tokens, in that group if there was one.

        The group matters where a text depends on more than its tokens, as on an encoder's input or an image.
        """
        return self._places.get((group, key)) or self._places.get(key)

    def keep(self, taken: Taken, groups: list[int], keys: list[bytes]) -> None:
        """Remember a step, and forget the oldest ones."""
        names: list[Hashable] = [*keys, *zip(groups, keys, strict=True)]
        for number, name in enumerate(names):
            self._places[name] = (taken, number % len(keys))
        self._calls.append((taken, names))
        self._rows += len(keys)
        limit = self.ROWS if taken.seen.rows else self.ROWS_WITHOUT_LOGITS
        while self._rows > limit and len(self._calls) > self.CALLS:
            old, names = self._calls.popleft()
            self._rows -= len(old.prompt)
            for name in names:
                if name in self._places and self._places[name][0] is old:
                    del self._places[name]


def _keys(input_ids: Tensor, pad: int | None, origin: list[bytes]) -> tuple[list[int], list[bytes], list[bytes]]:
    """Of each row the number of real tokens, and digests of all of them but the last and of all."""
    ids = np.ascontiguousarray(input_ids.cpu().numpy())
    length, before, after = [], [], []
    for row, start in zip(ids, origin, strict=True):
        real = row if pad is None else row[int(np.argmax(row != pad)) if (row != pad).any() else len(row) :]
        digest = blake2b(start, digest_size=16)
        digest.update(real[:-1].tobytes())
        before.append(digest.digest())
        digest.update(real[-1:].tobytes())
        after.append(digest.digest())
        length.append(len(real))
    return length, before, after


def _advance(chain: Chain, found: list[Place | None], input_ids: Tensor, device: torch.device) -> State:
    """The state of each row: that of the step found, after the last token; the initial one where none was found."""
    fresh = chain.init(len(found), device=device)
    known = [place for place in found if place is not None]
    if not known or "state" not in chain.needs:
        return fresh
    # Rows that begin borrow a place, so that all are advanced at once.
    places = [place or known[0] for place in found]
    begins = torch.tensor([[place is None] for place in found], device=device)
    seen = {number: _gather(places, [t.seen.rows[number] for t, _ in places], device) for number in known[0][0].seen.rows}
    state = tuple(
        old
        and {
            name: _gather(places, [cast(Mapping[str, Tensor], t.state[number])[name] for t, _ in places], device)
            for name in old
        }
        for number, old in enumerate(fresh)
    )
    tokens = input_ids[:, -1].to(device).masked_fill(begins[:, 0], 0)
    advanced = chain.observe(state, Seen(seen), tokens)
    return tuple(
        new and old and {name: torch.where(begins, old[name], new[name]) for name in old}
        for new, old in zip(advanced, fresh, strict=True)
    )


def _gather(places: list[Place], parts: list[Tensor], device: torch.device) -> Tensor:
    """The row of each place out of its part, which is a tensor of the step taken there."""
    rows = [row for _, row in places]
    if any(part is not parts[0] for part in parts):
        return torch.cat([part[row, None].to(device) for part, row in zip(parts, rows, strict=True)])
    return (parts[0] if rows == list(range(len(parts[0]))) else parts[0][rows]).to(device)


def _numbers(name: str, given: Tensor | Sequence[int]) -> Tensor:
    """``given`` as (requests,) int64. Raises DecalError."""
    try:
        numbers = torch.as_tensor(given).cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise DecalError(f"{name} must be a list of whole numbers below 2**63, one per request, got {given!r}") from None
    kind = numbers.dtype
    if numbers.dim() != 1 or not len(numbers) or kind.is_floating_point or kind.is_complex or kind == torch.bool:
        raise DecalError(f"{name} must be a list of whole numbers, one per request, got {given!r}")
    return numbers.long()


def leading(real: Tensor) -> Tensor:
    """(B, 1) how many places stand before the first that is ``real``."""
    return (real.cumsum(-1) == 0).sum(-1, keepdim=True)


def padding(input_ids: Tensor, pad: int | None) -> Tensor:
    """(B, 1) how many tokens of padding stand at the left."""
    return leading(torch.ones_like(input_ids, dtype=torch.bool) if pad is None else input_ids != pad)


def _column(numbers: list[int], like: Tensor) -> Tensor:
    return torch.tensor(numbers, device=like.device)[:, None]


def _repeat(chain: Chain, times: int) -> Chain:
    return replace(
        chain,
        steps=tuple(
            replace(
                step,
                values={
                    name: v.repeat_interleave(times, 0) if isinstance(v, torch.Tensor) else v for name, v in step.values.items()
                },
            )
            for step in chain.steps
        ),
    )
