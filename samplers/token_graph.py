"""Valid answers as token sequences, for sets too large to list: a graph that knows how many lie behind each node."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from decal.samplers.errors import DecalError
from decal.samplers.valid_set import State, ValidSet
from decal.samplers.vocabulary import Vocabulary

MOST_LOOKS = 1_000_000
"""Tokens that are looked at, each as what may follow another one; so many take a quarter of a minute."""
MOST_COUNTED = 10**300
"""Answers, whose numbers become float64."""
SAMPLES = 100
"""Answers whose tokens are compared with the tokenizer's own."""

Encode = Callable[[list[str]], list[list[int]]]


class TokenGraph:
    """Answers in the tokenizer's own spelling, a node for each token and what may be written behind it.

    What follows a token is taken to be decided by that token alone: two stand side by side if the tokenizer writes their text
    as these two. For byte-pair encoding that is so (Berglund and van der Merwe, arXiv 2309.08715), but for what a tokenizer
    splits a text by before. The number of all answers, and the tokens of some, are compared with the tokenizer's.

    To those who follow answers it looks like `decal.samplers.trie.TokenTrie`. Nodes are numbers, 0 stands before all tokens.

    Attributes:
        size: number of answers.
        ends: tokens that end an answer.
        children: of each node, by token.
        answer: 0 where an answer ends, else -1.
        count: answers behind each node.
        depth: the most tokens that lead to each node.
    """

    def __init__(self, size: int, ends: Sequence[int] = ()):
        self.size, self.ends = size, tuple(ends)
        self.children: list[dict[int, int]] = []
        self.answer: list[int] = []
        self.count: list[int] = []
        self.depth: list[int] = []

    @property
    def token(self) -> set[int]:
        """The tokens of answers."""
        return {token for children in self.children for token in children}

    @classmethod
    def of(
        cls, valid: ValidSet, vocabulary: Vocabulary, encode: Encode, ends: Sequence[int] = (), leading_space: bool = False
    ) -> TokenGraph:
        """The graph of a valid set.

        Args:
            encode: texts to token ids, without special tokens.
            ends: tokens that end an answer; none, if no answer begins with another.
            leading_space: whether a space stands before the answer.

        Raises:
            DecalError: answers can't be told apart by their ends, are too many to follow, or the tokenizer's spelling of them
                isn't decided token by token.
        """
        if valid.size > MOST_COUNTED:
            raise DecalError(f"{valid.source}: more than 1e300 answers, whose numbers are too large for float64")
        graph, steps, pairs = cls(valid.size, ends), _Steps(valid, vocabulary), _Pairs(vocabulary, encode)
        start: State = _Steps.SPACE if leading_space else valid.start
        numbers: dict[tuple[int | None, State], int] = {(None, start): 0}
        looks = 0
        order: list[tuple[int | None, State]] = [(None, start)]
        for last, state in order:  # which grows on the way
            options = steps.tokens(state)
            looks += len(options)
            if looks > MOST_LOOKS:
                raise DecalError(
                    f"{valid.source}: too many tokens may follow each other in its answers ({MOST_LOOKS} were looked at), as in"
                    " free text such as [a-z]{5}; say which values there are, or allow fewer characters"
                )
            children = {}
            for token, target in pairs.following(last, options):
                after = (token, target)
                if after not in numbers:
                    numbers[after] = len(order)
                    order.append(after)
                children[token] = numbers[after]
            graph.children.append(children)
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
            waiting = [child for child in self.children[node].values() if self.count[child] < 0]
            if waiting:
                stack += waiting
                continue
            stack.pop()
            if self.count[node] < 0:
                self.children[node] = {t: child for t, child in self.children[node].items() if self.count[child]}
                behind = sum(self.count[child] for child in self.children[node].values())
                self.count[node] = behind + (self.answer[node] == 0)
                done.append(node)
        for node in reversed(done):
            for child in self.children[node].values():
                self.depth[child] = max(self.depth[child], self.depth[node] + 1)

    def _check(self, valid: ValidSet, vocabulary: Vocabulary, encode: Encode, before: str) -> None:
        chance = random.Random(0)
        for _ in range(SAMPLES):
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
        self._valid, self._root = valid, vocabulary.root
        self._known: dict[State, list[tuple[int, State]]] = {}

    def tokens(self, state: State) -> list[tuple[int, State]]:
        """Each with the state that it leads to. Tokens that end within a character are left out."""
        if state not in self._known:
            found, stack = [], [(self._root, state)]
            while stack:
                (_, further), here = stack.pop()
                edges = {" ": self._valid.start} if here is self.SPACE else self._valid.edges(here)
                for character, target in edges.items():
                    node: tuple[list[int], dict[int, Any]] = ([], further)
                    for byte in character.encode():
                        node = node[1].get(byte, ([], {}))
                    found += [(token, target) for token in node[0]]
                    if node[1]:
                        stack.append((node, target))
            self._known[state] = found
        return self._known[state]


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
