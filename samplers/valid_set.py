"""The valid answers of a task: a finite set of strings, held as an automaton that can count.

Counting is dynamic programming over states, so a set far too large to list still has an exact size.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from decal.samplers.errors import DecalError

if TYPE_CHECKING:
    from decal.samplers.free_text import FreeText, Place

State = Hashable


class ValidSet:
    """A finite set of non-empty strings: an acyclic automaton over characters.

    Args:
        start: the first state.
        edges: ``state -> {character: next state}``.
        final: whether a string that leads to the state is in the set.
        source: what it came from, for messages.
        free: characters that stand for texts of which the form alone is known, each of which counts as one.

    Raises:
        DecalError: the set is empty, infinite, or holds the empty string.
    """

    def __init__(
        self,
        start: State,
        edges: Callable[[Any], Mapping[str, Any]],
        final: Callable[[Any], bool],
        source: str = "valid set",
        free: Mapping[str, FreeText] | None = None,
    ):
        self.start, self.source, self.free = start, source, dict(free or {})
        self._edges_of, self._final = edges, final
        self._edges: dict[State, Mapping[str, State]] = {}
        self._counts: dict[State, int] = {}
        self._count_from(start)
        if not self.size:
            raise DecalError(f"{source}: the valid set is empty")
        if final(start):
            raise DecalError(f"{source}: the empty string can't be an answer")
        if any("\ud800" <= character <= "\udfff" for character in self.characters):
            raise DecalError(f"{source}: an answer holds half of a surrogate pair, which is no text")

    @classmethod
    def from_list(cls, answers: Sequence[str], source: str = "answers") -> ValidSet:
        """The set of the given answers. Raises DecalError on none, duplicates, or entries that aren't non-empty strings."""
        if isinstance(answers, str):
            raise DecalError(f"{source}: answers are a list of strings, got the string {answers!r}")
        children: list[dict[str, int]] = [{}]
        last: dict[int, int] = {}
        for number, answer in enumerate(answers, 1):
            if not isinstance(answer, str) or not answer:
                raise DecalError(f"{source}: answer {number} must be a non-empty string, got {answer!r}")
            if any("\ud800" <= character <= "\udfff" for character in answer):
                raise DecalError(f"{source}: answer {number} holds half of a surrogate pair, which is no text: {answer!r}")
            node = 0
            for character in answer:
                if character not in children[node]:
                    children[node][character] = len(children)
                    children.append({})
                node = children[node][character]
            if node in last:
                raise DecalError(f"{source}: {answer!r} is given twice, as answers {last[node]} and {number}")
            last[node] = number
        return cls(0, children.__getitem__, last.__contains__, source)

    @classmethod
    def from_regex(cls, pattern: str, source: str = "regex", *, max_length: int | None = None) -> ValidSet:
        """The strings that match ``pattern`` in full.

        Args:
            max_length: characters of the longest; without it the pattern may not match infinitely many.

        Raises:
            DecalError: it doesn't parse, or matches infinitely many, or nothing, or the empty string.
        """
        if max_length is not None:
            _check_length(max_length, source)
        automaton = automaton_of(pattern, source)
        edges = edges_of(automaton, pattern, source)
        if max_length is None:
            return cls(automaton.initial, edges, automaton.finals.__contains__, source)

        # A state is one of the pattern's, and how many characters may follow.
        def bounded(state: tuple[int, int]) -> dict[str, tuple[int, int]]:
            at, left = state
            return {symbol: (target, left - 1) for symbol, target in edges(at).items()} if left else {}

        within = f"{source}, at most {max_length} characters"
        return cls((automaton.initial, max_length), bounded, lambda state: state[0] in automaton.finals, within)

    @classmethod
    def from_json_schema(
        cls,
        schema: Any,
        *,
        separators: tuple[str, str] = (", ", ": "),
        alphabet: str = "",
        free: bool = False,
        source: str = "JSON schema",
    ) -> ValidSet:
        """The texts that are valid for a JSON schema, written as ``json.dumps`` writes them.

        Objects have their members in the order of ``properties`` and no others, arrays no items beyond those described; a
        schema with ``properties`` and no ``type`` is one of objects. Whatever has no end must be bounded: integers by
        ``minimum`` and ``maximum``, strings by ``pattern`` or ``maxLength``, arrays by ``maxItems``. Followed are ``type``,
        ``enum``, ``const``, ``anyOf``, ``oneOf``, ``$ref`` within the schema, and for each type the keywords in
        `decal.samplers.json_schema.KEYWORDS`; others are refused, but for those that only describe.

        Args:
            schema: a mapping, as `json.loads` gives it, or a model of pydantic.
            separators: between members, and between a name and its value, as in `json.dumps`; a comma and a colon, with spaces.
            alphabet: the characters of strings that have a ``maxLength`` and no ``pattern``.
            free: leave to the model what has no end, or too many values to count: numbers; integers without a minimum or a
                maximum; strings without a ``pattern``, and without an ``alphabet`` to write them in; and strings with one, if
                it matches more than 10,000 texts of more than 16 characters, or there is a ``minLength`` or ``maxLength``
                beside it. Patterns that negate ``\\w`` or ``\\d`` are then written in ASCII, those with ``\\s`` or ``\\S``
                without spaces beyond it, as readers differ there; exponents have at most two digits, and control characters
                other than ``\\b \\f \\n \\r \\t`` aren't written. In counts such a text is one.

        Raises:
            DecalError: a keyword that isn't followed, or infinitely many texts; it says where in the schema.
        """
        from decal.samplers.json_schema import automaton

        if callable(getattr(schema, "model_json_schema", None)):
            schema = schema.model_json_schema()
        start, edges, final, texts = automaton(schema, separators, alphabet, source, free)
        return cls(start, edges, final, source, texts)

    @classmethod
    def from_grammar(cls, grammar: str, *, max_length: int, start: str = "start", source: str = "grammar") -> ValidSet:
        """The texts of at most ``max_length`` characters that a context-free grammar derives, each once.

        Args:
            grammar: in Lark's notation, such as ``start: "a" | "(" start ")" start``. Terminals match as their patterns say;
                there is no lexer that prefers longer ones.
            start: the rule of a whole text.

        Raises:
            DecalError: no grammar; ``%ignore`` or flags of patterns; a rule that begins with itself by way of others; no text,
                or the empty one; or too many states.
        """
        from decal.samplers.grammar import automaton

        _check_length(max_length, source)
        return cls(*automaton(grammar, start, max_length, source), f"{source}, at most {max_length} characters")

    @classmethod
    def digits(cls, n: int, *, sum_eq: int | None = None, sum_le: int | None = None, source: str = "digits") -> ValidSet:
        """``n`` digits separated by commas, whose sum equals ``sum_eq`` or is at most ``sum_le`` (or is free)."""
        if n < 1 or (sum_eq is not None and sum_le is not None):
            raise DecalError(f"{source}: digits needs n >= 1 and at most one of sum_eq and sum_le, got n={n}")
        most = 9 * n if sum_eq is None and sum_le is None else sum_eq if sum_eq is not None else sum_le
        assert most is not None

        # A state is (digits written, their sum, whether a comma comes next).
        def edges(state: tuple[int, int, bool]) -> dict[str, tuple[int, int, bool]]:
            written, total, comma = state
            if written == n:
                return {}
            if comma:
                return {",": (written, total, False)}
            return {str(d): (written + 1, total + d, True) for d in range(10) if total + d <= most}

        def final(state: tuple[int, int, bool]) -> bool:
            return state[0] == n and (sum_eq is None or state[1] == sum_eq)

        return cls((0, 0, False), edges, final, source)

    @classmethod
    def dyck(cls, pairs: int, source: str = "dyck") -> ValidSet:
        """Balanced strings of ``pairs`` pairs of round brackets, Dyck words. There are Catalan(``pairs``) of them.

        Raises:
            DecalError: less than one pair.
        """
        if pairs < 1:
            raise DecalError(f"{source}: dyck needs at least one pair of brackets, got {pairs}")

        # A state is (brackets opened, brackets closed).
        def edges(state: tuple[int, int]) -> dict[str, tuple[int, int]]:
            opened, closed = state
            following = {}
            if opened < pairs:
                following["("] = (opened + 1, closed)
            if closed < opened:
                following[")"] = (opened, closed + 1)
            return following

        return cls((0, 0), edges, (pairs, pairs).__eq__, source)

    @property
    def size(self) -> int:
        """Number of answers, |V|; those that differ only in free texts are one."""
        return self._counts[self.start]

    def count(self, state: State) -> int:
        """Number of ways to complete a string that has led to ``state``, N of Definition 3.2 in arXiv 2605.11128."""
        return self._counts[state]

    def edges(self, state: State) -> Mapping[str, State]:
        """``{character: next state}`` for the characters that some answer continues with."""
        return self._edges[state]

    @property
    def characters(self) -> set[str]:
        """All that occur in an answer."""
        return {character for edges in self._edges.values() for character in edges}

    @property
    def prefix_free(self) -> bool:
        """Whether no answer begins with another."""
        return not any(edges and self._final(state) for state, edges in self._edges.items())

    def may_contain(self, text: str) -> bool:
        """Whether some answer has ``text`` in it."""
        for start in self._edges if self.characters.issuperset(text) else ():
            state: State | None = start
            for character in text:
                state = None if state is None else self._edges[state].get(character)
            if state is not None:
                return True
        return False

    def final(self, state: State) -> bool:
        """Whether a string that has led to ``state`` is an answer."""
        return self._final(state)

    def at(self, number: int) -> str:
        """The answer of that number, from 0, in the order of iteration; by counting, without listing the others.

        In the place of free texts stands an example of each.
        """
        if not 0 <= number < self.size:
            raise DecalError(f"{self.source}: answers are numbered from 0 to {self.size - 1}, got {number}")
        state, text = self.start, ""
        while True:
            if self._final(state):
                if not number:
                    return text
                number -= 1
            for character, after in self._edges[state].items():
                if number < self._counts[after]:
                    state, text = after, text + self._written(character)
                    break
                number -= self._counts[after]

    def way_to(self, state: State) -> str:
        """One of the shortest texts that lead to a state, with free texts as in `at`."""
        ways = {self.start: ""}
        for here in (open_ := [self.start]):
            for character, after in self._edges[here].items():
                if after not in ways:
                    ways[after] = ways[here] + self._written(character)
                    open_.append(after)
        return ways[state]

    def _written(self, character: str) -> str:
        return self.free[character].example if character in self.free else character

    def __contains__(self, text: object) -> bool:
        if not isinstance(text, str):
            return False
        states: set[State] = {self.start}
        within: set[tuple[str, Place, State]] = set()  # a free text, where in it, and the state behind
        for character in text:
            begun = {(c, after) for state in states for c, after in self._edges[state].items() if c in self.free}
            within |= {(c, self.free[c].start, after) for c, after in begun}
            states |= {after for c, place, after in within if self.free[c].final(place)}
            further = ((c, self.free[c].character(place, character), after) for c, place, after in within)
            within = {(c, place, after) for c, place, after in further if place is not None}
            known = () if character in self.free else states
            states = {self._edges[state][character] for state in known if character in self._edges[state]}
        states |= {after for c, place, after in within if self.free[c].final(place)}
        return any(map(self._final, states))

    def __iter__(self) -> Iterator[str]:
        """The answers, shorter prefixes first, characters in order of declaration; free texts as in `at`."""
        stack: list[tuple[State, str]] = [(self.start, "")]
        while stack:
            state, text = stack.pop()
            if self._final(state):
                yield text
            stack += [(after, text + self._written(c)) for c, after in reversed(list(self._edges[state].items()))]

    def __repr__(self) -> str:
        size = self.size if self.size < 10**18 else f"about 1e{int((self.size.bit_length() - 1) * math.log10(2))}"
        return f"<ValidSet of {size} answers from {self.source}>"

    def _count_from(self, start: State) -> None:
        """Depth-first with an own stack: answers may be longer than Python's recursion goes deep."""
        path: set[State] = set()
        stack: list[tuple[State, bool]] = [(start, False)]
        while stack:
            state, done = stack.pop()
            if done:
                path.remove(state)
                live = {c: after for c, after in self._edges[state].items() if self._counts[after]}
                self._edges[state] = live
                self._counts[state] = int(self._final(state)) + sum(self._counts[after] for after in live.values())
            elif state not in self._counts:
                path.add(state)
                self._edges[state] = dict(self._edges_of(state))
                stack.append((state, True))
                for after in self._edges[state].values():
                    if after in path:
                        raise DecalError(f"{self.source}: the valid set is infinite; bound what repeats, as {{1,9}} does")
                    if after not in self._counts:
                        stack.append((after, False))


def refuse_schema(answers: Any) -> None:
    """Raise DecalError if answers are a JSON schema, whose keys would pass for texts."""
    if isinstance(answers, Mapping) or hasattr(answers, "model_json_schema"):
        raise DecalError("answers are a list of texts or a ValidSet; of a JSON schema ValidSet.from_json_schema(...) makes one")


def bare(pattern: str) -> str:
    """A regular expression with an ``x`` for every escape and every class of characters."""
    return re.sub(r"\\.|\[\^?\]?(\\.|[^\]\\])*\]", "x", pattern, flags=re.DOTALL)


def automaton_of(pattern: str, source: str) -> Any:
    """The automaton of the texts that a regular expression matches in full. Raises DecalError if it can't be read."""
    if importlib.util.find_spec("interegular") is None:
        raise DecalError("regular expressions need interegular: pip install interegular")
    if not isinstance(pattern, str):
        raise DecalError(f"{source}: a regular expression is a text, got {pattern!r}")
    classes = re.findall(r"\[\^?\]?[^\]]*\]?", re.sub(r"\\.", "x", pattern, flags=re.DOTALL))
    if any(one.startswith(("[]", "[^]")) for one in classes):
        raise DecalError(f"{source}: {pattern!r} has a ] first in brackets, which is read in two ways; write \\]")
    # Their end is taken for the end of the group that they are in, which is right only where that is all there is.
    if re.search(r"\(\?(=|!|<=|<!)", re.sub(r"^(\(\?[=!][^()]*\))*", "", bare(pattern))):
        raise DecalError(f"{source}: {pattern!r} looks ahead or back, which is followed at its beginning only")
    try:
        re.compile(pattern)
        return _compiled(pattern)
    except Exception as error:  # the parser raises many types, none of them documented
        hint = "; it matches in full without ^ and $" if pattern.startswith("^") or pattern.endswith("$") else ""
        raise DecalError(f"{source}: can't read the regular expression {pattern!r} ({type(error).__name__}){hint}") from None


@lru_cache(maxsize=4)
def _compiled(pattern: str) -> Any:
    """Kept, as a schema asks for the same few several times, and a large class of characters takes seconds."""
    import interegular

    return interegular.parse_pattern(pattern).to_fsm().reduce()


def edges_of(automaton: Any, pattern: str, source: str) -> Callable[[int], dict[str, int]]:
    """Next characters of a state of such an automaton, and the states they lead to."""
    from interegular.fsm import anything_else

    symbols = automaton.alphabet.by_transition

    def edges(state: int) -> dict[str, int]:
        found = {}
        for transition, target in automaton.map.get(state, {}).items():
            for symbol in symbols[transition] if automaton.islive(target) else ():
                if symbol is anything_else:
                    raise DecalError(f"{source}: {pattern!r} accepts every character somewhere; write out which ones")
                found[symbol] = target
        return dict(sorted(found.items()))

    return edges


def _check_length(length: Any, source: str) -> None:
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise DecalError(f"{source}: max_length is a whole number of at least 1, got {length!r}")
