"""Context-free grammars as automata, for texts up to a length."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import takewhile
from typing import Any

from decal.samplers.errors import DecalError
from decal.samplers.valid_set import automaton_of, edges_of

MOST_STATES = 300_000
"""Of a grammar's automaton; so many take half a minute."""
MOST_STACKS = 5_000
"""In a state."""

Symbol = str | tuple[str, int]
"""A rule, a terminal, or a terminal of which a part is written: its name and the state of its pattern."""
Stack = tuple[Symbol, ...]
"""What is still to be written, the next first."""
State = tuple[frozenset[Stack], int]
"""All that may still be written, and how many characters that may be."""


class Grammar:
    """A grammar in Lark's notation (EBNF), whose terminals are written as their patterns say, without a lexer in between.

    A state holds every stack of symbols that a text so far may have left, as a pushdown automaton would that takes all ways at
    once. So a text is one text, however many ways there are to derive it.

    Raises:
        DecalError: no grammar, ``%ignore``, flags of patterns, or a rule that begins with itself by way of others.
    """

    def __init__(self, text: str, start: str, source: str):
        self.source, self.start = source, start
        parsed = _parse(text, start, source)
        self.patterns = {terminal.name: self._pattern(terminal) for terminal in parsed.terminals}
        self._edges = {
            terminal.name: lru_cache(None)(edges_of(self.patterns[terminal.name], terminal.pattern.to_regexp(), source))
            for terminal in parsed.terminals
        }
        self.rules: dict[str, list[tuple[str, ...]]] = {}
        for rule in parsed.rules:
            body = tuple(str(symbol.name) for symbol in rule.expansion)
            bodies = self.rules.setdefault(str(rule.origin.name), [])
            bodies += [body] if body not in bodies else []
        unknown = {s for bodies in self.rules.values() for body in bodies for s in body} - {*self.rules, *self.patterns}
        if unknown:
            raise DecalError(f"{source}: {', '.join(sorted(unknown))} has no pattern")
        self._drop_empty()
        self._break_circles()
        self._drop_unused()
        self._turn_left_recursion()
        self.shortest = self._shortest()
        self._refuse_left_recursion()
        self._factor()
        self._merge()
        self.shortest = self._shortest()
        self._states: dict[State, State] = {}

    def _pattern(self, terminal: Any) -> Any:
        if terminal.pattern.flags:
            flags = "".join(sorted(terminal.pattern.flags))
            pattern = terminal.pattern.to_regexp()
            raise DecalError(f"{self.source}: the flag {flags} of {pattern} isn't followed; write out what it means")
        return automaton_of(terminal.pattern.to_regexp(), self.source)

    def _drop_empty(self) -> None:
        """A rule that may stand for nothing is left out where it does, and stands for something where it doesn't."""
        empty: set[str] = set()
        while more := {name for name, bodies in self.rules.items() if any(empty.issuperset(body) for body in bodies)} - empty:
            empty |= more
        if self.start in empty:
            raise DecalError(f"{self.source}: the empty string can't be an answer")
        for name, bodies in self.rules.items():
            found: dict[tuple[str, ...], None] = {}
            for body in bodies:
                shorter: dict[tuple[str, ...], None] = {(): None}
                for symbol in body:
                    shorter = {
                        (*one, *more): None
                        for one in shorter
                        for more in (((symbol,), ()) if symbol in empty else ((symbol,),))
                    }
                    if len(shorter) > MOST_STACKS:
                        raise DecalError(f"{self.source}: too many parts of {name} may be left out")
                found |= shorter
            self.rules[name] = [body for body in found if body]

    def _break_circles(self) -> None:
        """Rules that are names of each other become what they stand for."""
        for name in self.rules:
            others = {body[0] for body in self.rules[name] if len(body) == 1 and body[0] in self.rules}
            reached, open_ = set(others), list(others)
            while open_:
                new = {body[0] for body in self.rules[open_.pop()] if len(body) == 1 and body[0] in self.rules} - reached
                reached |= new
                open_ += new
            if name in reached:
                self.rules[name] = self._without_units(name)

    def _drop_unused(self) -> None:
        """Rules that no text is derived with don't matter."""
        least = self._shortest()
        alive = {name: [b for b in bodies if sum(least[s] for s in b) < float("inf")] for name, bodies in self.rules.items()}
        reached, open_ = {self.start}, [self.start]
        while open_:
            for body in alive.get(open_.pop(), ()):
                new = set(body) & alive.keys() - reached
                reached |= new
                open_ += new
        self.rules = {name: bodies for name, bodies in alive.items() if name in reached}

    def _turn_left_recursion(self) -> None:
        """``a: a x | y`` becomes ``a: y rest`` and ``rest: | x rest``."""
        for name, bodies in list(self.rules.items()):
            again = [body[1:] for body in bodies if body[:1] == (name,)]
            if again:
                rest = f"{name}'"
                self.rules[name] = [(*body, rest) for body in bodies if body[:1] != (name,)]
                self.rules[rest] = [(), *((*body, rest) for body in again if body)]

    def _factor(self) -> None:
        """``a: x y | x`` becomes ``a: x rest`` and ``rest: y |``, so that what follows x need not be guessed at every x."""
        open_ = list(self.rules)
        while open_:
            name = open_.pop()
            groups: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
            for body in self.rules[name]:
                groups.setdefault(body[:1], []).append(body)
            self.rules[name] = []
            for group in groups.values():
                same = group[0]
                if len(group) > 1:
                    same = tuple(symbol for symbol, *_ in takewhile(_is_one, zip(*group, strict=False)))
                    rest = f"{name}-{len(self.rules)}"
                    self.rules[rest] = [body[len(same) :] for body in group]
                    open_.append(rest)
                    same = (*same, rest)
                self.rules[name].append(same)

    def _merge(self) -> None:
        """Rules with the same bodies, up to rules that are the same, become one: stacks of one meaning are one."""
        self._inline_names()
        kind = dict.fromkeys(self.rules, 0)
        while True:
            shapes = {name: (kind[name], frozenset(_renamed(body, kind) for body in self.rules[name])) for name in self.rules}
            numbers = {shape: number for number, shape in enumerate(dict.fromkeys(shapes.values()))}
            finer = {name: numbers[shapes[name]] for name in self.rules}
            if finer == kind:
                break
            kind = finer
        first = {number: name for name, number in reversed(kind.items())}
        same = {name: first[number] for name, number in kind.items()}
        self.start = same[self.start]
        self.rules = {
            name: list(dict.fromkeys(_renamed(body, same) for body in bodies))
            for name, bodies in self.rules.items()
            if same[name] == name
        }

    def _inline_names(self) -> None:
        """``a: b`` becomes ``a:`` and what b is."""
        self.rules = {name: self._without_units(name) for name in self.rules}

    def _without_units(self, name: str) -> list[tuple[str, ...]]:
        """The bodies of a rule, those that are another rule replaced by its bodies."""
        found: dict[tuple[str, ...], None] = {}
        open_, seen = [name], {name}
        while open_:
            for body in self.rules[open_.pop(0)]:
                if len(body) != 1 or body[0] not in self.rules:
                    found[body] = None
                elif body[0] not in seen:
                    seen.add(body[0])
                    open_.append(body[0])
        return list(found)

    def _shortest(self) -> dict[str, float]:
        """Characters that each symbol takes at least."""
        found = dict.fromkeys(self.rules, float("inf")) | {name: _shortest_text(fsm) for name, fsm in self.patterns.items()}
        changed = True
        while changed:
            changed = False
            for name, bodies in self.rules.items():
                least = min((sum(found[symbol] for symbol in body) for body in bodies), default=float("inf"))
                changed |= least < found[name]
                found[name] = min(found[name], least)
        return found

    def _refuse_left_recursion(self) -> None:
        done: set[str] = set()

        def visit(name: str, path: tuple[str, ...]) -> None:
            if name in path:
                way = " ".join(part.rstrip("'") for part in [*path[path.index(name) :], name])
                raise DecalError(f"{self.source}: a rule begins with itself by way of others: {way}; write it as a repetition")
            if name in done:
                return
            for body in self.rules.get(name, ()):
                for symbol in body:
                    visit(symbol, (*path, name))
                    if self.shortest[symbol]:
                        break
            done.add(name)

        for name in self.rules:
            visit(name, ())

    def begin(self, length: int) -> State:
        """The state before a text of at most so many characters."""
        return self._state(frozenset({(self.start,)}), length)

    def edges(self, state: State) -> dict[str, State]:
        """Next characters, and the states they lead to."""
        stacks, left = state
        found: dict[str, set[Stack]] = {}
        for stack in stacks if left else ():
            for top in stack[:1]:
                assert isinstance(top, tuple)
                for symbol, target in self._edges[top[0]](top[1]).items():
                    found.setdefault(symbol, set()).add(((top[0], target), *stack[1:]))
        return {symbol: self._state(frozenset(after), left - 1) for symbol, after in sorted(found.items())}

    @staticmethod
    def final(state: State) -> bool:
        """Whether a text may end."""
        return () in state[0]

    def _state(self, stacks: frozenset[Stack], left: int) -> State:
        """Rules replaced by what they stand for, until a terminal comes next; what takes too many characters is out."""
        if (stacks, left) in self._states:
            return self._states[stacks, left]
        open_, seen, found = list(stacks), set(stacks), set()
        while open_:
            stack = open_.pop()
            if sum(self._least(symbol) for symbol in stack) > left:
                continue
            if len(seen) > MOST_STACKS:
                raise DecalError(f"{self.source}: a text may be derived in too many ways at once; ask for shorter texts")
            top = stack[0] if stack else ()
            if isinstance(top, str) and top in self.rules:
                more = [(*body, *stack[1:]) for body in self.rules[top]]
            elif isinstance(top, str):
                more = [((top, self.patterns[top].initial), *stack[1:])]
            else:
                if not top or self._edges[top[0]](top[1]):
                    found.add(stack)
                more = [stack[1:]] if top and top[1] in self.patterns[top[0]].finals else []
            open_ += [one for one in more if one not in seen]
            seen.update(more)
        if len(self._states) >= MOST_STATES:
            raise DecalError(f"{self.source}: more than {MOST_STATES} states; ask for shorter texts")
        return self._states.setdefault((stacks, left), (frozenset(found), left))

    def _least(self, symbol: Symbol) -> float:
        return self.shortest[symbol] if isinstance(symbol, str) else 0


def _is_one(symbols: tuple[str, ...]) -> bool:
    return len(set(symbols)) == 1


def _renamed(body: tuple[str, ...], names: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(names.get(symbol, symbol) for symbol in body)


def _shortest_text(fsm: Any) -> float:
    """Characters of the shortest text that a pattern matches."""
    reached, size = {fsm.initial}, 0
    seen = set(reached)
    while reached and not reached & set(fsm.finals):
        reached = {target for state in reached for target in fsm.map.get(state, {}).values()} - seen
        seen |= reached
        size += 1
    return size if reached else float("inf")


def _parse(text: str, start: str, source: str) -> Any:
    try:
        from lark import Lark
    except ImportError:
        raise DecalError("grammars need lark: pip install lark") from None
    if not isinstance(text, str) or not isinstance(start, str):
        raise DecalError(
            f"{source}: a grammar is a text in Lark's notation, and start a name, got {text!r:.80} and {start!r:.80}"
        )
    if re.search(r"^\s*%import\s+(?!common\.)", text, flags=re.MULTILINE):
        raise DecalError(f"{source}: %import takes from Lark's own common, not from files")
    try:
        parsed = Lark(text, parser="earley", lexer="dynamic_complete", start=start, maybe_placeholders=False)
    except Exception as error:  # it passes on whatever its parts raise
        said = (str(error).strip().splitlines() or [""])[0]
        raise DecalError(f"{source}: can't read the grammar: {said or type(error).__name__}") from None
    if parsed.ignore_tokens:
        raise DecalError(f"{source}: %ignore isn't followed; put what it names where it may stand")
    return parsed


def automaton(
    text: str, start: str, length: int, source: str
) -> tuple[State, Callable[[State], Mapping[str, Any]], Callable[[State], bool]]:
    """First state, edges and final states; see `decal.ValidSet.from_grammar`."""
    grammar = Grammar(text, start, source)
    return grammar.begin(length), grammar.edges, grammar.final
