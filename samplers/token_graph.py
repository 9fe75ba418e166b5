"""Valid answers as token sequences, for sets too large to list: a graph that knows how many lie behind each node."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from decal.samplers.errors import DecalError
from decal.samplers.free_text import FreeTokens, Options, Passage, Place
from decal.samplers.valid_set import State, ValidSet
from decal.samplers.vocabulary import Vocabulary

MOST_LOOKS = 1_000_000
"""Tokens that are looked at, each as what may follow another one; so many take a quarter of a minute."""
MOST_COUNTED = 10**300
"""Answers, whose numbers become float64."""
SAMPLES = 100
"""Answers whose tokens are compared with the tokenizer's own."""

FREE_TOKENS = 64
"""That a free text may take."""

Encode = Callable[[list[str]], list[list[int]]]


class Inside(NamedTuple):
    """Within the free text that begins at a node, behind ``used`` of its tokens."""

    node: int
    place: Place
    used: int


Position = int | Inside
"""A node, or within a free text behind one."""


class TokenGraph:
    """Answers in the tokenizer's own spelling, a node for each token and what may be written behind it.

    What follows a token is taken to be decided by that token alone: two stand side by side if the tokenizer writes their text
    as these two. For byte-pair encoding that is so (Berglund and van der Merwe, arXiv 2309.08715), but for what a tokenizer
    splits a text by before. The number of all answers, and the tokens of some, are compared with the tokenizer's.

    Where the valid set has no more than the form of a text, every spelling of that is followed; it begins with a token of its
    own, and a token that ends it may write what stands behind.

    To those who follow answers it looks like `decal.samplers.trie.TokenTrie`. Nodes are numbers, 0 stands before all tokens.

    Attributes:
        size: number of answers.
        ends: tokens that end an answer.
        children: of each node, by token.
        answer: 0 where an answer ends, else -1.
        count: answers behind each node.
        depth: the most tokens that lead to each node.
        passages: free texts, by the node that they begin at.
    """

    def __init__(self, size: int, ends: Sequence[int] = ()):
        self.size, self.ends = size, tuple(ends)
        self.children: list[dict[int, int]] = []
        self.answer: list[int] = []
        self.count: list[int] = []
        self.depth: list[int] = []
        self.passages: dict[int, Passage] = {}

    @property
    def token(self) -> set[int]:
        """The tokens of answers, but for those within free texts."""
        found = {token for children in self.children for token in children}
        for passage in self.passages.values():
            found |= {token for exits in passage.exits.values() for token in exits}
        return found

    @property
    def deepest(self) -> int:
        """Tokens of the longest answer, without its end."""
        within = (self.depth[node] + passage.limit - 1 for node, passage in self.passages.items() if passage.ends)
        return max((*self.depth, *within))

    @classmethod
    def of(
        cls,
        valid: ValidSet,
        vocabulary: Vocabulary,
        encode: Encode,
        ends: Sequence[int] = (),
        leading_space: bool = False,
        free_tokens: int = FREE_TOKENS,
    ) -> TokenGraph:
        """The graph of a valid set.

        Args:
            encode: texts to token ids, without special tokens.
            ends: tokens that end an answer; none, if no answer begins with another.
            leading_space: whether a space stands before the answer.
            free_tokens: how many tokens a free text may take.

        Raises:
            DecalError: answers can't be told apart by their ends, are too many to follow, or the tokenizer's spelling of them
                isn't decided token by token; or a free text can't be told from what stands beside or behind it.
        """
        if valid.size > MOST_COUNTED:
            raise DecalError(f"{valid.source}: more than 1e300 answers, whose numbers are too large for float64")
        graph, steps, pairs = cls(valid.size, ends), _Steps(valid, vocabulary), _Pairs(vocabulary, encode)
        start: State = _Steps.SPACE if leading_space else valid.start
        numbers: dict[tuple[int | None, State], int] = {(None, start): 0}
        looks = 0
        order: list[tuple[int | None, State]] = [(None, start)]

        def number(token: int, target: State) -> int:
            after = (token, target)
            if after not in numbers:
                numbers[after] = len(order)
                order.append(after)
            return numbers[after]

        passages = _Passages(valid, steps, pairs, graph.ends, free_tokens, number)
        for last, state in order:  # which grows on the way
            options = steps.tokens(state)
            looks += len(options)
            if looks > MOST_LOOKS:
                raise DecalError(
                    f"{valid.source}: too many tokens may follow each other in its answers ({MOST_LOOKS} were looked at), as in"
                    " free text such as [a-z]{5}; say which values there are, allow fewer characters, or leave a string of a"
                    " schema to the model: free=True, and a pattern without an end, such as ^[a-z]+$"
                )
            passage = None if state is _Steps.SPACE else passages.at(state)
            if passage is not None:
                graph.passages[len(graph.children)] = passage
            graph.children.append({token: number(token, target) for token, target in pairs.following(last, options)})
            graph.answer.append(0 if state is not _Steps.SPACE and valid.final(state) else -1)
        graph._count()
        graph._check(valid, vocabulary, encode, " " if leading_space else "")
        return graph

    def _count(self) -> None:
        """Count answers from the last tokens to the first, and leave out what leads to none."""
        self.count, self.depth = [-1] * len(self.children), [0] * len(self.children)
        done: list[int] = []
        stack = [0]
        while stack:
            node = stack[-1]
            waiting = [child for child, _ in self._following(node) if self.count[child] < 0]
            if waiting:
                stack += waiting
                continue
            stack.pop()
            if self.count[node] < 0:
                self.children[node] = {t: child for t, child in self.children[node].items() if self.count[child]}
                behind = sum(self.count[child] for child in self.children[node].values())
                self.count[node] = behind + (self.answer[node] == 0)
                if node in self.passages:
                    self.count[node] += self.passages[node].settle(self.count)
                done.append(node)
        for node in reversed(done):
            for child, tokens in self._following(node):
                self.depth[child] = max(self.depth[child], self.depth[node] + tokens)

    def _following(self, node: int) -> Iterator[tuple[int, int]]:
        """Nodes behind one, and how many tokens lead there at most."""
        yield from ((child, 1) for child in self.children[node].values())
        if node in self.passages:
            passage = self.passages[node]
            yield from ((child, passage.limit) for exits in passage.exits.values() for child in exits.values())

    def follow(self, position: Position, token: int) -> Position | None:
        """Where a token leads to, or None."""
        if isinstance(position, int):
            child = self.children[position].get(token)
            if child is not None or position not in self.passages:
                return child
            position = Inside(position, self.passages[position].free.text.start, 0)
        found = self.passages[position.node].follow(position.place, position.used, token)
        return Inside(position.node, found, position.used + 1) if isinstance(found, Place) else found

    def ended(self, position: Position) -> bool:
        """Whether an answer may end there."""
        if isinstance(position, int):
            return self.answer[position] == 0
        passage = self.passages[position.node]
        return bool(passage.ends) and passage.free.text.final(position.place)

    def free(self, position: Position) -> Options | None:
        """What may be written next in a free text, which may be yet to begin; None if there is none."""
        if isinstance(position, Inside):
            return self.passages[position.node].options(position.place, position.used, self.count)
        if position not in self.passages:
            return None
        return self.passages[position].options(self.passages[position].free.text.start, 0, self.count)

    def _check(self, valid: ValidSet, vocabulary: Vocabulary, encode: Encode, before: str) -> None:
        chance = random.Random(0)
        for _ in range(0 if valid.free else SAMPLES):  # a tokenizer writes the beginning of a free text together with the rest
            text = before + valid.at(chance.randrange(valid.size))
            node: int | None = 0
            for token in encode([text])[0]:
                node = None if node is None else self.children[node].get(token)
            if node is None or self.answer[node]:
                raise DecalError(
                    f"{valid.source}: the tokenizer writes {text!r} in tokens that neighbours don't decide, or that end within"
                    " a character; ask for few enough answers to list them"
                )
        if self.count[0] != valid.size:
            raise DecalError(
                f"{valid.source}: {valid.size} answers have {self.count[0]} spellings, as neighbouring tokens don't decide how"
                " this tokenizer writes them; ask for few enough answers to list them"
            )
        both = self.token & set(self.ends)
        if both:
            end = vocabulary.bytes_of.get(min(both), b"").decode(errors="replace")
            raise DecalError(f"{valid.source}: the token {end!r} ends an answer, but an answer contains it")
        if not self.ends and not valid.prefix_free:
            raise DecalError(
                f"{valid.source}: without an end, an answer that another begins with counts as soon as it is written"
            )


class _Steps:
    """Tokens that spell on from a state of a valid set."""

    SPACE = object()
    """The state before a space that stands before every answer."""

    def __init__(self, valid: ValidSet, vocabulary: Vocabulary):
        self._valid, self.vocabulary = valid, vocabulary
        self._known: dict[State, list[tuple[int, State]]] = {}
        self._spots: dict[int, list[tuple[int, int]]] = {}

    def tokens(self, state: State) -> list[tuple[int, State]]:
        """Each with the state that it leads to. Tokens that end within a character are left out."""
        if state not in self._known:
            found, stack = [], [(self.vocabulary.root, state)]
            while stack:
                (_, further), here = stack.pop()
                edges = {" ": self._valid.start} if here is self.SPACE else self._valid.edges(here)
                for character, target in edges.items():
                    if character in self._valid.free:
                        continue
                    node: tuple[list[int], dict[int, Any]] = ([], further)
                    for byte in character.encode():
                        node = node[1].get(byte, ([], {}))
                    found += [(token, target) for token in node[0]]
                    if node[1]:
                        stack.append((node, target))
            self._known[state] = found
        return self._known[state]

    def ending(self, state: State) -> dict[bytes, list[tuple[int, State]]]:
        """Tokens that spell on from a state behind something else, which is free: by that, each with the state behind it."""
        found: dict[bytes, list[tuple[int, State]]] = {b"": self.tokens(state)}
        for first in {character.encode()[0] for character in self._valid.edges(state)}:
            for token, place in self._places(first):
                written = self.vocabulary.bytes_of[token]
                target = self._walk(state, written[place:]) if _is_text(written) else None
                if target is not None:
                    found.setdefault(written[:place], []).append((token, target))
        return found

    def _places(self, byte: int) -> list[tuple[int, int]]:
        """Where a byte stands in tokens, but for where it is the first."""
        if byte not in self._spots:
            texts = [(token, text) for token, text in self.vocabulary.bytes_of.items() if byte in text[1:]]
            self._spots[byte] = [(token, i) for token, text in texts for i in range(1, len(text)) if text[i] == byte]
        return self._spots[byte]

    def _walk(self, state: State, text: bytes) -> State | None:
        for character in text.decode():
            edges = self._valid.edges(state)
            if character in self._valid.free or character not in edges:
                return None
            state = edges[character]
        return state


def _is_text(written: bytes) -> bool:
    try:
        return bool(written.decode())
    except UnicodeDecodeError:
        return False


class _Passages:
    """The free texts of a valid set; nodes behind them are numbered by token and state."""

    def __init__(
        self,
        valid: ValidSet,
        steps: _Steps,
        pairs: _Pairs,
        ends: tuple[int, ...],
        limit: int,
        number: Callable[[int, State], int],
    ):
        self._valid, self._steps, self._pairs, self._ends, self._limit = valid, steps, pairs, ends, limit
        self._number = number
        self._known: dict[State, Passage | None] = {}
        self._tokens: dict[str, FreeTokens] = {}

    def at(self, state: State) -> Passage | None:
        """The free text that begins at a state, or None."""
        if state not in self._known:
            symbols = [symbol for symbol in self._valid.edges(state) if symbol in self._valid.free]
            self._known[state] = self._of(state, symbols) if symbols else None
        return self._known[state]

    def _of(self, state: State, symbols: Sequence[str]) -> Passage:
        symbol, after = symbols[0], self._valid.edges(state)[symbols[0]]
        if symbol not in self._tokens:
            self._tokens[symbol] = FreeTokens(self._valid.free[symbol], self._steps.vocabulary)
        free = self._tokens[symbol]
        text, beside = free.text, set(self._valid.edges(state)) - {symbol}
        if len(symbols) > 1 or any(text.character(text.start, c) for c in beside) or (beside and text.final(text.start)):
            self._refuse(state, "a free text can't be told from what else may stand there, as both may begin alike")
        behind = self._valid.edges(after)
        ways = [Place(place) for place in text.states if text.whole(Place(place))]
        if behind.keys() & self._valid.free.keys() or any(text.character(place, c) for place in ways for c in behind):
            self._refuse(state, "a free text can't be told from what follows it")
        if free.shortest == float("inf"):
            self._refuse(state, "a free text can't be written in the tokens of this vocabulary")
        if not free.fits(text.start, self._limit):
            self._refuse(state, f"a free text takes {free.shortest:.0f} tokens at least, more than free_tokens={self._limit}")
        ends = self._ends if self._valid.final(after) else ()
        if self._valid.final(after) and not ends:
            self._refuse(state, "an answer that a free text ends needs ends, or it is never done")
        both = [token for token in ends if free.may_hold(token)]
        if both:
            end = self._steps.vocabulary.bytes_of[both[0]].decode(errors="replace")
            self._refuse(state, f"the token {end!r} ends an answer, but a free text may contain it")
        exits = {
            rest: {token: self._number(token, target) for token, target in self._pairs.following(None, found)}
            for rest, found in self._steps.ending(after).items()
        }
        return Passage(free, self._limit, ends, self._valid.count(after), exits, self._valid.source)

    def _refuse(self, state: State, why: str) -> NoReturn:
        """Raise DecalError about a free text, which begins at a state."""
        raise DecalError(f"{self._valid.source}: behind {self._valid.way_to(state)!r} {why}")


class _Pairs:
    """Which tokens may stand side by side."""

    def __init__(self, vocabulary: Vocabulary, encode: Encode):
        self._bytes_of, self._encode = vocabulary.bytes_of, encode
        self._known: dict[int | None, dict[int, bool]] = {}

    def following(self, last: int | None, options: Sequence[tuple[int, State]]) -> list[tuple[int, State]]:
        """Those of some tokens, and the states they lead to, that may follow a token, or begin a text."""
        known = self._known.setdefault(last, {})
        new = list({token for token, _ in options if token not in known})
        if new:
            before = [] if last is None else [last]
            texts = [b"".join(self._bytes_of[t] for t in [*before, token]).decode() for token in new]
            for token, written in zip(new, self._encode(texts), strict=True):
                known[token] = list(written) == [*before, token]
        return [option for option in options if known[option[0]]]
