"""Parts of an answer that are left to the model: which bytes may follow in them, and which tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from decal.samplers.errors import DecalError
from decal.samplers.vocabulary import Vocabulary

STAYS = -1
"""The cluster of tokens with which a free text goes on; see `Options`."""


class Place(NamedTuple):
    """Where in a free text one is: a state of its pattern, bytes of a character that isn't complete, and characters so far."""

    state: int
    pending: bytes = b""
    size: int = 0


class FreeText:
    """Text of which the form alone is known.

    Args:
        fsm: the automaton of a pattern, as `decal.samplers.valid_set.automaton_of` gives it. Where ``low`` or ``high`` are
            given, a character leads from one of its final states to another, in several steps if it is written in several.
        low, high: characters at least, and at most, or None.
    """

    def __init__(self, fsm: Any, low: int = 0, high: int | None = None):
        from interegular.fsm import anything_else

        self.low, self.high, self._finals = low, high, frozenset(fsm.finals)
        self.start = Place(fsm.initial)
        symbols = fsm.alphabet.by_transition
        # Next states by character; None stands for all that the pattern doesn't name.
        self._targets: dict[int, dict[str | None, int]] = {
            state: {
                None if symbol is anything_else else symbol: target
                for transition, target in further.items()
                if fsm.islive(target)
                for symbol in symbols[transition]
                if symbol is anything_else or not "\ud800" <= symbol <= "\udfff"  # half of a pair, which is no text
            }
            for state, further in fsm.map.items()
        }
        self._begun: dict[int, dict[bytes, frozenset[int]]] = {}
        self._others: dict[bytes, bool] = {}
        self.named = {symbol for group in symbols.values() for symbol in group if symbol is not anything_else}

    def character(self, place: Place, character: str) -> Place | None:
        """The place behind a character, or None if it can't stand there."""
        targets = self._targets.get(place.state, {})
        target = targets.get(character if character in self.named else None)
        return None if target is None else Place(target, b"", place.size + (target in self._finals))

    def after(self, place: Place | None, text: bytes) -> Place | None:
        """The place behind some bytes, or None if they can't stand there; how many characters there may be isn't looked at."""
        for byte in text:
            if place is None:
                return None
            place = self._byte(place, byte)
        return place

    def _byte(self, place: Place, byte: int) -> Place | None:
        if byte < 128:
            return None if place.pending else self.character(place, chr(byte))
        written = place.pending + bytes([byte])
        try:
            return self.character(place._replace(pending=b""), written.decode())
        except UnicodeDecodeError as error:
            begun = error.reason == "unexpected end of data" and self.begun(place.state, written)
            return place._replace(pending=written) if begun else None

    def whole(self, place: Place) -> bool:
        """Whether the form is complete, but for how many characters there are."""
        return not place.pending and place.state in self._finals

    def final(self, place: Place) -> bool:
        """Whether the text may end."""
        return self.whole(place) and self.low <= place.size and (self.high is None or place.size <= self.high)

    def begun(self, state: int, written: bytes) -> frozenset[int]:
        """Where characters may lead to that begin with these bytes, the first of several."""
        if state not in self._begun:
            self._begun[state] = self._by_beginning(state)
        targets = self._begun[state].get(written, frozenset())
        other = self._targets.get(state, {}).get(None)
        return targets if other is None or not self._unnamed(written) else targets | {other}

    def _by_beginning(self, state: int) -> dict[bytes, frozenset[int]]:
        """Where the characters that the pattern names lead to, by their first bytes; at once, as they may be very many."""
        found: dict[bytes, set[int]] = {}
        for character, target in self._targets.get(state, {}).items():
            whole = b"" if character is None else character.encode()
            for size in range(1, len(whole)):
                found.setdefault(whole[:size], set()).add(target)
        return {written: frozenset(targets) for written, targets in found.items()}

    def _unnamed(self, written: bytes) -> bool:
        """Whether a character that the pattern doesn't name begins with these bytes."""
        if written not in self._others:
            self._others[written] = any(chr(code) not in self.named for code in _beginning_with(written))
        return self._others[written]

    def edges(self, state: int) -> dict[str | None, int]:
        """Next states by character; None stands for all that the pattern doesn't name."""
        return self._targets.get(state, {})

    @property
    def states(self) -> list[int]:
        """All there are."""
        return list({*self._targets, *(target for further in self._targets.values() for target in further.values())})

    @cached_property
    def example(self) -> str:
        """One of the shortest."""
        other = next(c for c in map(chr, (*range(ord("x"), 127), *range(33, 0x10FFFF))) if c not in self.named)
        open_, seen = [(self.start, "")], {self.start}
        for place, text in open_:  # which grows on the way
            if self.final(place):
                return text
            for character in (*sorted(filter(None, self.edges(place.state))), other):
                target = self.character(place, character)
                if target is not None and target not in seen:
                    seen.add(target)
                    open_.append((target, text + character))
        raise DecalError("a free text that can't end")


def _beginning_with(written: bytes) -> Iterator[int]:
    """Code points of characters whose UTF-8 begins with these bytes, the first of several."""
    size = 2 if written[0] < 0xE0 else 3 if written[0] < 0xF0 else 4
    value = written[0] & (0x7F >> size)
    for byte in written[1:]:
        value = value << 6 | byte & 0x3F
    rest = 6 * (size - len(written))
    least = {2: 0x80, 3: 0x800, 4: 0x10000}[size]  # shorter ones are written in fewer bytes
    for code in range(max(value << rest, least), min((value + 1) << rest, 0x110000)):
        if not 0xD800 <= code <= 0xDFFF:
            yield code


class Options(NamedTuple):
    """What may be written next.

    Attributes:
        tokens: (M,) token ids.
        behind: (M,) answers behind each, float64; what is free counts as one.
        cluster: (M,) 0 where answers part; `STAYS` where a free text goes on; else a number for tokens that end it, each with
            the same end of the text in it, and with all answers between them.
    """

    tokens: Tensor
    behind: Tensor
    cluster: Tensor


@dataclass(frozen=True)
class _Stays:
    tokens: Tensor
    size: Tensor
    whole: Tensor
    least: Tensor


class FreeTokens:
    """A free text in the tokens of a vocabulary."""

    def __init__(self, text: FreeText, vocabulary: Vocabulary):
        self.text, self.vocabulary = text, vocabulary
        self._stays: dict[Place, _Stays] = {}
        self._least = self._least_tokens()

    def stays(self, place: Place) -> _Stays:
        """Tokens that stay within the text: how many characters each completes, whether it leaves none incomplete, and how
        many tokens it takes at least from there to where the pattern is complete."""
        place = place._replace(size=0)
        if place not in self._stays:
            tokens, states, sizes = self._whole_tokens(place.state) if not place.pending else ([], [], [])
            known = {state: (self.text.whole(Place(state)), self._form(Place(state))) for state in set(states)}
            found = [(t, size, *known[state]) for t, state, size in zip(tokens, states, sizes, strict=True)]
            for token in self.vocabulary.letters.broken:
                target = self.text.after(place, self.vocabulary.bytes_of[token])
                if target is not None:
                    found.append((token, target.size, self.text.whole(target), self._form(target)))
            found.sort()
            columns = list(zip(*found, strict=True)) or [()] * 4
            kinds = (torch.long, torch.long, torch.bool, torch.float64)
            self._stays[place] = _Stays(*(torch.tensor(c, dtype=kind) for c, kind in zip(columns, kinds, strict=True)))
        return self._stays[place]

    def _whole_tokens(self, state: int) -> tuple[list[int], list[int], list[int]]:
        """Tokens of whole characters that stay within the text from a state on: ids, states behind, characters completed."""
        letters, (table, kind, final) = self.vocabulary.letters, self._table
        here = np.arange(len(letters.tokens))
        states, sizes = np.full(len(here), state), np.zeros(len(here), dtype=np.int64)
        done = []
        for place in range(int(letters.length.max(initial=0))):
            here = here[states[here] >= 0]
            done.append(here[letters.length[here] == place])
            here = here[letters.length[here] > place]
            states[here] = table[states[here], kind[letters.flat[letters.start[here] + place]]]
            sizes[here] += final[states[here]]
        done.append(here[states[here] >= 0])
        alive = np.concatenate(done)
        return letters.tokens[alive].tolist(), states[alive].tolist(), sizes[alive].tolist()

    @cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Next states by state and kind of character, -1 where there is none; the kind of each of the vocabulary's characters;
        and which states are final."""
        text = self.text
        kind_of = {c: number for number, c in enumerate(sorted(text.named), 1)}
        table = np.full((max(text.states) + 2, len(kind_of) + 1), -1)
        for state in text.states:
            for character, target in text.edges(state).items():
                table[state, 0 if character is None else kind_of[character]] = target
        kind = np.array([kind_of.get(c, 0) for c in self.vocabulary.letters.characters])
        final = np.array([text.whole(Place(state)) for state in range(len(table))])
        final[-1] = False  # where there is no state
        return table, kind, final

    def may_hold(self, token: int) -> bool:
        """Whether a token may stand within the text."""
        written = self.vocabulary.bytes_of.get(token)
        return written is not None and any(self.text.after(Place(state), written) for state in self.text.states)

    @property
    def shortest(self) -> float:
        """Tokens it takes at least, with the one that ends it."""
        return self._form(self.text.start) + max(0, self.text.low - (not self.text.whole(self.text.start))) + 1

    def fits(self, place: Place, left: int) -> bool:
        """Whether so many tokens are enough to end the text from a place on, the one that ends it among them."""
        size = place.size + (not self.text.whole(place))  # a character that has begun will be one
        short = self.text.high is None or size <= self.text.high
        return short and self._form(place) + max(0, self.text.low - size) + 1 <= left

    def allowed(self, place: Place, left: int) -> Tensor:
        """Tokens that stay within the text, and behind which it `fits`; with so many left before them."""
        stays = self.stays(place)
        size = place.size + stays.size + ~stays.whole
        fits = stays.least + (self.text.low - size).clamp(min=0) + 1 <= left - 1
        if self.text.high is not None:
            fits &= size <= self.text.high
        return stays.tokens[fits]

    def _form(self, place: Place) -> float:
        """Tokens to where the pattern is complete."""
        if not place.pending:
            return self._least.get(place.state, float("inf"))
        lead = place.pending[0]
        rest = (2 if lead < 0xE0 else 3 if lead < 0xF0 else 4) - len(place.pending)
        return rest + min(self._least.get(target, float("inf")) for target in self.text.begun(place.state, place.pending))

    def _least_tokens(self) -> dict[int, float]:
        """Of each state, with a token for every character, or for each of its bytes; at most, as tokens may hold several."""
        known = set(self.vocabulary.bytes_of.values())

        def price(character: str) -> float:
            written = character.encode()
            if written in known:
                return 1
            return len(written) if all(bytes([byte]) in known for byte in written) else float("inf")

        named = {c for state in self.text.states for c in self.text.edges(state) if c is not None}
        prices: dict[str | None, float] = {c: price(c) for c in named}
        letters = self.vocabulary.letters
        alone = (letters.characters[letters.flat[start]] for start in letters.start[letters.length == 1])
        bytewise = 4 if all(bytes([byte]) in known for byte in range(0x80, 0xF5) if byte not in (0xC0, 0xC1)) else float("inf")
        prices[None] = 1 if any(character not in self.text.named for character in alone) else bytewise
        least = {state: 0.0 for state in self.text.states if self.text.whole(Place(state))}
        changed = True
        while changed:
            changed = False
            for state in self.text.states:
                for character, target in self.text.edges(state).items():
                    cost = prices[character] + least.get(target, float("inf"))
                    if cost < least.get(state, float("inf")):
                        least[state], changed = cost, True
        return least


@dataclass(frozen=True)
class Passage:
    """A free text on the way through a graph of answers.

    Attributes:
        free: the text.
        limit: tokens it may take, with the one that ends it.
        ends: tokens that end the answer with it; none if the answer goes on.
        behind: answers behind the text.
        exits: tokens that end the text and spell on, each with the node behind it; by the end of the text in them.
        source: for messages.
    """

    free: FreeTokens
    limit: int
    ends: tuple[int, ...]
    behind: int
    exits: dict[bytes, dict[int, int]]
    source: str

    def settle(self, count: Sequence[int]) -> int:
        """Leave out exits that lead to no answer, or, all together, not to every one; answers behind the text."""
        for rest, exits in list(self.exits.items()):
            self.exits[rest] = {token: child for token, child in exits.items() if count[child]}
            reached = sum(count[child] for child in self.exits[rest].values()) + bool(self.ends and not rest)
            if reached != self.behind:
                del self.exits[rest]
        if b"" not in self.exits:
            raise DecalError(f"{self.source}: neighbouring tokens don't decide how what follows a free text is written")
        return self.behind

    def options(self, place: Place, used: int, count: Sequence[int]) -> Options:
        """What may be written next, behind ``used`` tokens of the text; ``count`` are answers behind nodes."""
        stays = self.free.allowed(place, self.limit - used)
        tokens, behind = [stays], [torch.full(stays.shape, float(self.behind), dtype=torch.float64)]
        cluster = [torch.full_like(stays, STAYS)]
        number = 0
        for rest, exits in self.exits.items():
            target = self.free.text.after(place, rest)
            if target is None or not self.free.text.final(target):
                continue
            number += 1
            ends = () if rest else self.ends
            tokens.append(torch.tensor([*exits, *ends], dtype=torch.long))
            shares = [float(count[child]) for child in exits.values()] + [1 / len(ends) for _ in ends]
            behind.append(torch.tensor(shares, dtype=torch.float64))
            cluster.append(torch.full_like(tokens[-1], number))
        return Options(torch.cat(tokens), torch.cat(behind), torch.cat(cluster))

    def follow(self, place: Place, used: int, token: int) -> Place | int | None:
        """Where a token leads to: a place of the text, a node behind it, or nowhere."""
        text = self.free.text
        for rest, exits in self.exits.items():
            if token in exits:
                target = text.after(place, rest)
                if target is not None and text.final(target):
                    return exits[token]
        target = text.after(place, self.free.vocabulary.bytes_of.get(token, b"\xff"))
        return target if target is not None and self.free.fits(target, self.limit - used - 1) else None
