"""Valid answers as token sequences: a trie with the number of completions at every node."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from decal.samplers.errors import DecalError
from decal.samplers.valid_set import ValidSet
from decal.samplers.vocabulary import Vocabulary

MOST_ANSWERS = 200_000
"""An exact evaluation costs a forward pass per prefix; beyond this many answers that is a mistake more often than a plan."""


@dataclass
class TokenTrie:
    """Every token sequence that counts as an answer, one node per prefix; node 0 is the empty one.

    Nodes are numbered so that a parent comes before its children.

    Attributes:
        size: number of answers, |V|.
        parent, token, depth: of each node.
        answer: index of the answer that ends at a node, or -1.
        count: number of answers whose canonical tokenisation goes through the node, N of Definition 3.2 (arXiv 2605.11128).
        ends: tokens that end an answer; empty if an answer counts as soon as it is written.
        strays: for each node, tokens that still spell the beginning of an answer but leave the trie.
    """

    size: int
    ends: tuple[int, ...] = ()
    parent: list[int] = field(default_factory=lambda: [-1])
    token: list[int] = field(default_factory=lambda: [-1])
    depth: list[int] = field(default_factory=lambda: [0])
    answer: list[int] = field(default_factory=lambda: [-1])
    count: list[int] = field(default_factory=lambda: [0])
    children: list[dict[int, int]] = field(default_factory=lambda: [{}])
    strays: list[tuple[int, ...]] = field(default_factory=lambda: [()])

    def __len__(self) -> int:
        return len(self.parent)

    def add(self, parent: int, token: int) -> int:
        """The child of ``parent`` by ``token``, made if it isn't there."""
        node = self.children[parent].get(token)
        if node is None:
            node = self.children[parent][token] = len(self)
            self.parent.append(parent)
            self.token.append(token)
            self.depth.append(self.depth[parent] + 1)
            self.answer.append(-1)
            self.count.append(0)
            self.children.append({})
            self.strays.append(())
        return node

    def insert(self, tokens: Sequence[int], answer: int, weight: int = 1) -> None:
        """Add one token sequence of ``answer``; ``weight`` 0 for further spellings of it, which N doesn't count."""
        node = 0
        path = [0]
        for token in tokens:
            node = self.add(node, token)
            path.append(node)
        if self.answer[node] not in (-1, answer):
            raise DecalError(f"answers {self.answer[node]} and {answer} have the same tokens")
        if self.answer[node] == -1:
            self.answer[node] = answer
            for passed in path:
                self.count[passed] += weight

    def follow(self, node: int, token: int) -> int | None:
        """Where a token leads to, or None."""
        return self.children[node].get(token)

    def ended(self, node: int) -> bool:
        """Whether an answer ends there."""
        return self.answer[node] >= 0

    def free(self, node: int) -> None:
        """What may be written in a free text: a trie has none."""

    @property
    def deepest(self) -> int:
        """Tokens of the longest answer, without its end."""
        return max(self.depth)

    def path(self, node: int) -> list[int]:
        """The tokens that lead to ``node``."""
        tokens = []
        while node:
            tokens.append(self.token[node])
            node = self.parent[node]
        return tokens[::-1]

    def levels(self) -> Iterator[np.ndarray]:
        """Node numbers by depth, the root first."""
        depth = np.asarray(self.depth)
        for level in range(int(depth.max()) + 1):
            yield np.flatnonzero(depth == level)


@dataclass(frozen=True)
class Policy:
    """What counts as writing an answer.

    Attributes:
        tokenisation: ``canonical``, each answer as the tokenizer writes it; or ``all``, every way to spell it, followed as
            long as the model gives the spelling at least ``threshold``.
        leading_space: whether a space stands before the answer.
        case: ``exact``, or ``any`` to also accept the answer in lower, upper and capitalised form.
        ends: texts that end an answer when a token begins with one of them, and ``<eos>`` for the model's end tokens. The
            probability of ending counts. Empty: an answer counts as soon as it is written, which needs a set in which no
            answer begins with another.
        threshold: for ``all``: smallest probability of a prefix, at temperature 1, that is followed.
    """

    tokenisation: str = "canonical"
    leading_space: bool = False
    case: str = "exact"
    ends: tuple[str, ...] = ("\n", "<eos>")
    threshold: float = 1e-4

    @property
    def one_path_each(self) -> bool:
        """Whether every answer has exactly one token sequence."""
        return self.tokenisation == "canonical" and self.case == "exact"


def check_size(valid: ValidSet) -> None:
    """Raise DecalError if a valid set has more than `MOST_ANSWERS` answers, or some that it doesn't know all of."""
    if valid.free:
        raise DecalError(f"{valid.source}: its answers leave text to the model, so they can't be listed")
    if valid.size > MOST_ANSWERS:
        raise DecalError(
            f"{valid.source}: {valid.size} answers; exact evaluation follows each, which stops at {MOST_ANSWERS}; see decal"
            " estimate"
        )


class TrieBuilder:
    """Compiles a valid set for one tokenizer.

    Args:
        encode: text to token ids, without special tokens.
        vocabulary: what the tokens write.
        eos: the model's end tokens.
    """

    def __init__(self, encode: Callable[[str], list[int]], vocabulary: Vocabulary, eos: Iterable[int]):
        self.encode, self.vocabulary, self.eos = encode, vocabulary, tuple(eos)

    def build(self, valid: ValidSet, policy: Policy) -> tuple[TokenTrie, Callable[[TokenTrie, int, Any], None] | None]:
        """The trie of the canonical tokenisations, and the function that grows it where the policy asks for all of them.

        The function takes the trie, a node, and the probabilities of its prefix times each next token.

        Raises:
            DecalError: too many answers, an answer that can't be tokenised, or ends that can't tell answers apart.
        """
        check_size(valid)
        spellings = self._spellings(valid, policy)
        trie = TokenTrie(valid.size, self.ends(policy))
        for text, (answer, weight) in spellings.items():
            trie.insert(self.canonical(text, valid.source), answer, weight)
        self._check_ends(trie, trie.token, valid.source)
        if not trie.ends:
            self._check_prefix_free(list(spellings), valid.source)
        closing = [end.encode() for end in policy.ends if end != "<eos>"]
        texts = _ByteTrie({text.encode(): answer for text, (answer, _) in spellings.items()}, closing)
        where: list[int] = [0]
        for node in range(len(trie)):
            if node:
                where.append(texts.follow(where[trie.parent[node]], self.vocabulary.bytes_of[trie.token[node]]))
            strays = [t for t in texts.tokens(where[node], self.vocabulary) if t not in trie.children[node]]
            trie.strays[node] = (*strays, *texts.closing_tokens(where[node], self.vocabulary))
            self._check_ends(trie, strays, valid.source)
        if policy.tokenisation == "canonical":
            return trie, None

        def grow(trie: TokenTrie, node: int, reach: Any) -> None:
            spelling = set(texts.tokens(where[node], self.vocabulary))
            followed = [t for t in trie.strays[node] if t in spelling and reach[t] >= policy.threshold]
            for token in followed:
                state = texts.follow(where[node], self.vocabulary.bytes_of[token])
                child = trie.add(node, token)
                where.append(state)
                trie.answer[child] = texts.answer.get(state, -1)
                strays = texts.tokens(state, self.vocabulary)
                trie.strays[child] = (*strays, *texts.closing_tokens(state, self.vocabulary))
                self._check_ends(trie, strays, valid.source)
            trie.strays[node] = tuple(t for t in trie.strays[node] if t not in set(followed))

        return trie, grow

    @staticmethod
    def _spellings(valid: ValidSet, policy: Policy) -> dict[str, tuple[int, int]]:
        """``{text: (answer, weight)}``: the first spelling of an answer has weight 1, the others 0."""
        space = " " if policy.leading_space else ""
        answers = list(valid)
        spellings = {space + text: (number, 1) for number, text in enumerate(answers)}
        if policy.case == "any":
            for number, text in enumerate(answers):
                for variant in (text.lower(), text.upper(), text.capitalize()):
                    taken, _ = spellings.setdefault(space + variant, (number, 0))
                    if taken != number:
                        raise DecalError(f"{valid.source}: {variant!r} is a case variant of {text!r} and {answers[taken]!r}")
        return spellings

    def ends(self, policy: Policy) -> tuple[int, ...]:
        """The tokens that end an answer. Raises DecalError if some end has none."""
        found: dict[int, None] = {}
        for end in policy.ends:
            tokens = self.eos if end == "<eos>" else tuple(self.vocabulary.starting_with(end))
            if not tokens:
                raise DecalError(f"no token of this model ends an answer with {end!r}")
            found |= dict.fromkeys(tokens)
        return tuple(sorted(found))

    def canonical(self, text: str, source: str) -> list[int]:
        """The tokenizer's own spelling of a text. Raises DecalError, naming ``source``, if it can't write it."""
        tokens = self.encode(text)
        written = b"".join(self.vocabulary.bytes_of.get(t, b"\xff") for t in tokens)
        if written != text.encode():
            raise DecalError(
                f"{source}: the tokenizer can't write {text!r}; its tokens give {written.decode(errors='replace')!r}"
            )
        return tokens

    def _check_ends(self, trie: TokenTrie, tokens: Iterable[int], source: str) -> None:
        """No token may both end an answer and spell on in one."""
        both = set(tokens) & set(trie.ends)
        if both:
            end = self.vocabulary.bytes_of.get(min(both), b"").decode(errors="replace")
            raise DecalError(f"{source}: the token {end!r} ends an answer, but an answer contains it")

    @staticmethod
    def _check_prefix_free(texts: list[str], source: str) -> None:
        for shorter, longer in zip(sorted(texts), sorted(texts)[1:], strict=False):
            if longer.startswith(shorter):
                raise DecalError(
                    f"{source}: without an end, {shorter!r} counts as soon as it is written, but {longer!r} begins with it; "
                    "give the policy an end"
                )


class _ByteTrie:
    """The accepted texts by their bytes, and the texts that end one."""

    def __init__(self, texts: dict[bytes, int], closing: Sequence[bytes] = ()):
        self.closing = closing
        self.next: list[dict[int, int]] = [{}]
        self.answer: dict[int, int] = {}
        for text, answer in texts.items():
            node = 0
            for byte in text:
                if byte not in self.next[node]:
                    self.next[node][byte] = len(self.next)
                    self.next.append({})
                node = self.next[node][byte]
            self.answer[node] = answer

    def follow(self, node: int, text: bytes) -> int:
        for byte in text:
            node = self.next[node][byte]
        return node

    def closing_tokens(self, node: int, vocabulary: Vocabulary) -> list[int]:
        """Tokens that spell the rest of a text and its end in one, such as a full stop with a line break."""
        found: list[int] = []
        stack = [(node, vocabulary.root)]
        while stack:
            here, (_, further) = stack.pop()
            stack += [(after, further[byte]) for byte, after in self.next[here].items() if byte in further]
            if here in self.answer and here != node:
                found += [t for end in self.closing for t in vocabulary.below(further, end)]
        return found

    def tokens(self, node: int, vocabulary: Vocabulary) -> list[int]:
        """Tokens that spell on from ``node`` without leaving the accepted texts."""
        found: list[int] = []
        stack = [(node, vocabulary.root)]
        while stack:
            here, (_, further) = stack.pop()
            for byte, after in self.next[here].items():
                if byte in further:
                    found += further[byte][0]
                    stack.append((after, further[byte]))
        return found
