"""Declare a rule: one function of row statistics, with its parameters; everything else is derived from it.

    @rule(paper="arXiv:2407.01082")
    def min_p(row, p=Param(0.1, low=0, high=1, off=0.0)):
        "Keep tokens at least ``p`` times as probable as the most probable one."
        return row.max + torch.log(p)

The body sees a `Row` and its parameters as (B, 1) or (1, 1) tensors. What it returns says what kind of rule it is:

========== ========================== =======================================================================
answer     kind                       meaning
========== ========================== =======================================================================
a tensor   truncation                 the lowest logit kept
`Band`     band                       the lowest and the highest logit kept
`Keep`     selection                  which tokens are kept, one by one
`Affine`   reshaping                  an affine map of the kept logits
`Map`      reshaping, or projection   any function of them; a projection also drops some
========== ========================== =======================================================================
"""

from __future__ import annotations

import difflib
import inspect
import math
import numbers
import operator
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from importlib import import_module
from importlib.metadata import entry_points
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from decal.kernels import reference
from decal.samplers.context import GIVEN, Context
from decal.samplers.errors import DecalError
from decal.samplers.row import Affine, Answer, Band, BaseRow, DenseRow, Keep, Map

if TYPE_CHECKING:
    from decal.samplers.chain import Chain

Value = float | int | str | tuple[int, ...] | tuple[float, ...] | Tensor
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Parameter:
    """Declaration of a number: allowed are [low, high] and ``off``, the value at which the rule does nothing.

    With ``static`` all rows share one value, which the body sees as a Python number.
    """

    default: float
    low: float
    high: float
    off: float | None
    integer: bool
    sweep: tuple[float, ...]
    static: bool

    @property
    def allowed(self) -> str:
        """The allowed values, in words."""
        high = f"{self.high:.0f}" if self.integer else f"{self.high:g}"
        end = f"{high}]" if math.isfinite(self.high) else "inf)"
        interval = f"{'an integer ' if self.integer else ''}in [{self.low:g}, {end}"
        if self.off is None:
            return interval
        inside = self.low <= self.off <= self.high and math.isfinite(self.off)
        return interval + (f" ({self.off:g} = off)" if inside else f" (or {self.off:g} = off)")

    def check(self, where: str, value: Any) -> Value:
        """``value`` as a float, an int or a (B, 1) tensor. Raises DecalError naming ``where`` if it isn't allowed."""
        if isinstance(value, Tensor):
            if self.static:
                raise DecalError(f"{where} is one number for all rows, {self.allowed}, got a tensor")
            return self._check_tensor(where, value)
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            tensor = "" if self.static else " or a (B, 1) tensor of them"
            number = "" if self.integer else "a number "
            raise DecalError(f"{where} must be {number}{self.allowed}{tensor}, got {value!r}")
        try:
            admitted = self._admits(float(value))
        except OverflowError:
            admitted = False
        if not admitted:
            raise DecalError(f"{where} must be {self.allowed}, got {value!r}")
        return int(float(value)) if self.integer else float(value)

    def _admits(self, value: float) -> bool:
        inside = math.isfinite(value) and self.low <= value <= self.high
        return value == self.off or (inside and (not self.integer or value == math.floor(value)))

    def _check_tensor(self, where: str, value: Tensor) -> Tensor:
        if value.dim() != 2 or value.shape[1] != 1 or value.shape[0] == 0:
            raise DecalError(f"{where} as a tensor must have shape (B, 1), one value per row, got {tuple(value.shape)}")
        if value.is_complex() or value.dtype == torch.bool:
            raise DecalError(f"{where} as a tensor must hold numbers, got {value.dtype}")
        for row, number in enumerate(value[:, 0].tolist()):
            if not self._admits(float(number)):
                raise DecalError(f"{where} must be {self.allowed}, got {number!r} in row {row}")
        return value.detach()

    def text(self, value: Value) -> str:
        """How a chain's text form writes ``value``."""
        if not isinstance(value, Tensor):
            return repr(value)
        return repr([int(v) if self.integer and math.isfinite(v) else float(v) for v in value[:, 0].tolist()])


@dataclass(frozen=True)
class ChoiceParameter:
    """Declaration of a word out of a few."""

    default: str
    options: tuple[str, ...]
    off: None = None
    static: bool = True

    @property
    def sweep(self) -> tuple[str, ...]:
        """Nothing but the default is compared."""
        return (self.default,)

    @property
    def allowed(self) -> str:
        """The allowed values, in words."""
        return "one of " + ", ".join(map(repr, self.options))

    def check(self, where: str, value: Any) -> str:
        """``value``, if it is allowed; a number counts as it is written. Raises DecalError."""
        word = f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else value
        if not isinstance(word, str) or word not in self.options:
            raise DecalError(f"{where} must be {self.allowed}, got {value!r}")
        return word

    def text(self, value: Value) -> str:
        """How a chain's text form writes ``value``."""
        return repr(value)


@dataclass(frozen=True)
class TokensParameter:
    """Declaration of a set of token ids."""

    default: tuple[int, ...] = ()
    off: None = None
    static: bool = True

    @property
    def sweep(self) -> tuple[tuple[int, ...], ...]:
        """Nothing but the default is compared."""
        return (self.default,)

    @property
    def allowed(self) -> str:
        """The allowed values, in words."""
        return "a tuple of token ids"

    def check(self, where: str, value: Any) -> tuple[int, ...]:
        """``value`` as a tuple of ints. Raises DecalError."""
        good = isinstance(value, (tuple, list)) and all(
            isinstance(v, numbers.Integral) and not isinstance(v, bool) and int(v) >= 0 for v in value
        )
        if not good:
            got = value[:, 0].tolist() if isinstance(value, Tensor) and value.dim() == 2 else value
            raise DecalError(f"{where} must be {self.allowed} such as (13, 198), got {got!r}")
        return tuple(int(v) for v in value)

    def text(self, value: Value) -> str:
        """How a chain's text form writes ``value``."""
        return repr(value)


@dataclass(frozen=True)
class NumbersParameter:
    """Declaration of a table: numbers in [low, high], ascending if ``sorted_``."""

    default: tuple[float, ...]
    low: float
    high: float
    sorted_: bool
    off: None = None
    static: bool = True

    @property
    def sweep(self) -> tuple[tuple[float, ...], ...]:
        """Nothing but the default is compared."""
        return (self.default,)

    @property
    def allowed(self) -> str:
        """The allowed values, in words."""
        return f"a tuple of {'ascending ' if self.sorted_ else ''}numbers in [{self.low:g}, {self.high:g}]"

    def check(self, where: str, value: Any) -> tuple[float, ...]:
        """``value`` as a tuple of floats. Raises DecalError."""
        real = isinstance(value, (tuple, list)) and all(
            isinstance(v, numbers.Real) and not isinstance(v, bool) and operator.le(self.low, v) and operator.le(v, self.high)
            for v in value
        )
        if not real or (self.sorted_ and any(a >= b for a, b in pairwise(value))):
            got = value[:, 0].tolist() if isinstance(value, Tensor) and value.dim() == 2 else value
            raise DecalError(f"{where} must be {self.allowed} such as {_example(self.default)}, got {got!r}")
        return tuple(float(v) for v in value)

    def text(self, value: Value) -> str:
        """How a chain's text form writes ``value``."""
        return repr(value)


def _example(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{v:g}" for v in values[:2]) + ")"


AnyParameter = Parameter | ChoiceParameter | TokensParameter | NumbersParameter


def Param(
    default: float,
    *,
    low: float,
    off: float | None = None,
    high: float = math.inf,
    integer: bool = False,
    sweep: tuple[float, ...] = (),
    static: bool = False,
) -> Any:
    """Default value of a rule's argument that declares it as a number.

    Args:
        default: the literature's value.
        low, high: the allowed closed interval.
        off: the value at which the rule changes nothing; allowed even outside the interval. A rule is off where all of its
            parameters that have such a value are at it.
        integer: whole numbers only.
        sweep: values worth comparing; the evaluator's default grid.
        static: one value for all rows, which the body sees as a Python number instead of a tensor.
    """
    return Parameter(float(default), low, high, off, integer, sweep, static)


def Choice(default: str, *others: str) -> Any:
    """Default value of a rule's argument that declares it as one of these words; the body sees the word."""
    return ChoiceParameter(default, (default, *others))


def Numbers(default: tuple[float, ...], *, low: float, high: float, ascending: bool = False) -> Any:
    """Default value of a rule's argument that declares it as a table of numbers, the same for all rows; the body sees a tuple.

    Args:
        low, high: the allowed closed interval.
        ascending: each must be larger than the one before.
    """
    return NumbersParameter(tuple(map(float, default)), low, high, ascending)


def Tokens() -> Any:
    """Default value of a rule's argument that declares it as a set of token ids; the body sees a tuple of ints."""
    return TokensParameter()


class Feedback(NamedTuple):
    """What a rule remembers of the tokens drawn so far: pure functions of its parameters and of what was drawn.

    Attributes:
        init: ``init(**values) -> {name: (B, 1)}``, before the first token; the body reads it as ``row.state``.
        update: ``update(state, logp, **values)``, after a token of log-probability ``logp`` (B, 1), in nats, in the row that
            the rule was given, before it changed anything.
        notes: ``notes(row, **values) -> {name: (B, 1)}``, what update wants to know of that row, as the argument ``notes``; it
            may ask for statistics that the body asks for too.
    """

    init: Callable[..., State]
    update: Callable[..., State]
    notes: Callable[..., Mapping[str, Tensor]] | None = None

    def after(self, state: State, logp: Tensor, notes: Mapping[str, Tensor] | None, values: Mapping[str, Any]) -> State:
        """The state after a token; ``notes`` of the row it was drawn from, if this has such."""
        return self.update(state, logp, **({} if notes is None else {"notes": notes}), **values)


@dataclass(frozen=True, eq=False)
class Rule:
    """A decoding rule. Calling it with parameter values gives a `Chain` of one step.

    Attributes:
        name: the literature's name; also its name in text form.
        body: the formula.
        params: parameters by name, in order.
        paper: where it was published.
        shift: whether adding a constant to the logits changes nothing, or a function of the values that tells.
        scale: whether dividing the logits by a temperature changes no kept set.
        side: where the rule is meant to stand: ``before`` or ``after`` temperature, or ``either``.
        moved: ``moved(t, **values)`` are the values that keep before ``temperature(t)`` what ``values`` keep after it.
        needs: what it reads besides the logits: ``history`` (tokens so far), ``state`` (see `Feedback`), ``chance`` (a coin a
            step), ``model`` (its embeddings), ``answers`` (the valid ones), ``prompts`` (other ones),
            ``ends`` (tokens that end a text).
        feedback: its memory, if it has one.
        check: ``check(**values)`` raises DecalError for values that don't go together.
        slow: why it is left out of default comparisons, if it is.
        wants_cut: whether it was made to stand behind a cut.
    """

    name: str
    body: Callable[..., Any]
    params: Mapping[str, AnyParameter]
    paper: str
    shift: bool | Callable[..., bool] = True
    scale: bool = False
    side: str = "either"
    moved: Callable[..., Mapping[str, float]] | None = None
    feedback: Feedback | None = None
    slow: str = ""
    wants_cut: bool = False
    check: Callable[..., None] | None = None

    def __post_init__(self) -> None:
        allowed = "\n".join(f"    {name}: {p.allowed}; default {_short(p.default)}" for name, p in self.params.items())
        object.__setattr__(
            self,
            "__doc__",
            f"{inspect.getdoc(self.body)}\n\nParameters:\n{allowed or '    none'}\n\nPaper: {self.paper or 'none'}",
        )
        object.__setattr__(self, "__name__", self.name)
        shown = [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=p.default)
            for name, p in self.params.items()
        ]
        object.__setattr__(self, "__signature__", inspect.Signature(shown))

    def __call__(self, /, *args: Any, **kwargs: Any) -> Chain:
        from decal.samplers.chain import Chain

        return Chain((self.step(*args, **kwargs),))

    def __reduce__(self) -> tuple[Any, ...]:
        return find, (self.name,)

    def __repr__(self) -> str:
        return f"<rule {self.name}({', '.join(f'{k}={_short(v.default)}' for k, v in self.params.items())}), {self.paper}>"

    @property
    def summary(self) -> str:
        """First line of the docstring: the kept set in words."""
        return (inspect.getdoc(self.body) or "").split("\n")[0]

    def section(self, name: str) -> str:
        """The paragraph of the docstring that begins with ``name:``, without that; empty if there is none."""
        found = re.search(rf"^{name}: (.+?)(?:\n\n|\Z)", inspect.getdoc(self.body) or "", re.S | re.M)
        return " ".join(found[1].split()) if found else ""

    def step(self, /, *args: Any, **kwargs: Any) -> Step:
        """Bind and check parameter values. Raises DecalError."""
        names = list(self.params)
        if len(args) > len(names):
            raise DecalError(f"{self.name} takes at most {len(names)} parameters ({', '.join(names)}), got {len(args)}")
        given = dict(zip(names, args, strict=False))
        for name, value in kwargs.items():
            if name not in self.params:
                raise DecalError(f"{self.name} has no parameter {name!r}; it has {', '.join(names) or 'none'}")
            if name in given:
                raise DecalError(f"{self.name}: {name} was given twice")
            given[name] = value
        values = {
            name: param.check(f"{self.name}: {name}", given.get(name, param.default)) for name, param in self.params.items()
        }
        if self.check is not None:
            try:
                self.check(**values)
            except DecalError as error:
                raise DecalError(f"{self.name}: {error}") from None
        return Step(self, values)

    @cached_property
    def _trace(self) -> tuple[Answer, frozenset[str]]:
        """The answer at the defaults, and what is read for any choice of words."""
        words = {name: p.options for name, p in self.params.items() if isinstance(p, ChoiceParameter)}
        traces = [self._traced(dict(zip(words, chosen, strict=True))) for chosen in product(*words.values())]
        return traces[0][0], frozenset().union(*(reads for _, reads in traces))

    def _traced(self, words: Mapping[str, str]) -> tuple[Answer, frozenset[str]]:
        step = Step(self, {name: words.get(name, p.default) for name, p in self.params.items()})
        z = torch.tensor([[0.0, -1.0]], dtype=torch.float64)
        context = Context.probe()
        values = step.numbers(z)
        state = self.feedback.init(**values) if self.feedback else None
        row = DenseRow(z, reference, context, state)
        answer = self.body(row, **values)
        # Unlike what is computed from it, the k-th largest as the threshold itself survives earlier cuts.
        reads = row.reads - {"upper(count)"} | {"k-th largest"} if answer is row.kth else row.reads
        return answer, frozenset(reads)

    @property
    def reads(self) -> frozenset[str]:
        """Names of the row statistics the body asks for."""
        return self._trace[1]

    @property
    def needs(self) -> frozenset[str]:
        """What it reads besides the logits: some of ``history``, ``chance``, ``state`` and the names of `GIVEN`."""
        return self.reads & {"history", "chance", "state", *GIVEN}

    @property
    def kind(self) -> str:
        """``truncation``, ``band``, ``selection``, ``reshaping`` or ``projection``."""
        answer = self._trace[0]
        if isinstance(answer, Map):
            return "projection" if answer.drops else "reshaping"
        kinds = {Band: "band", Affine: "reshaping", Keep: "selection"}
        return next((kind for type_, kind in kinds.items() if isinstance(answer, type_)), "truncation")

    @property
    def tokenwise(self) -> bool:
        """Whether it treats tokens one by one, instead of by a cutoff or an affine map."""
        return isinstance(self._trace[0], (Map, Keep))

    @property
    def prunes(self) -> bool:
        """Whether it treats tokens one by one, but only those above a logit that it tells; see `Map`."""
        answer = self._trace[0]
        return isinstance(answer, Map) and answer.low is not None

    @property
    def monotone(self) -> bool:
        """Whether it leaves the order of the kept tokens as it was."""
        answer = self._trace[0]
        return not isinstance(answer, Map) or answer.monotone


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else repr(value)


@dataclass(frozen=True, eq=False)
class Step:
    """A rule with its parameter values: numbers, words, token ids, or (B, 1) tensors with one value per row."""

    rule: Rule
    values: Mapping[str, Value]

    @property
    def per_row(self) -> int | None:
        """Number of rows the parameters are given for, or None if they are the same for every row."""
        sizes = {len(v) for v in self.values.values() if isinstance(v, Tensor)}
        if len(sizes) > 1:
            raise DecalError(f"{self.rule.name}: parameters are given for different numbers of rows: {sorted(sizes)}")
        return next(iter(sizes), None)

    @property
    def ignores_shift(self) -> bool:
        """Whether adding a constant to the logits changes nothing."""
        shift = self.rule.shift
        return shift if isinstance(shift, bool) else shift(**self.values)

    @property
    def is_off(self) -> bool:
        """Whether the values switch the rule off in every row."""
        switches = [(self.values[name], p.off) for name, p in self.rule.params.items() if p.off is not None]
        return bool(switches) and all(bool((v == off).all()) if isinstance(v, Tensor) else v == off for v, off in switches)

    @property
    def needs(self) -> frozenset[str]:
        """What its rule does, but for tokens that it was given as a parameter."""
        given = {name for name, p in self.rule.params.items() if isinstance(p, TokensParameter) and self.values[name]}
        return self.rule.needs - given

    def numbers(self, like: Tensor) -> dict[str, Any]:
        """The values as the body sees them; ``like`` gives device and dtype."""
        seen: dict[str, Any] = {}
        for name, v in self.values.items():
            if isinstance(v, Tensor):
                seen[name] = v.to(like)
            elif self.rule.params[name].static:
                seen[name] = v
            else:
                seen[name] = torch.full((1, 1), float(v), dtype=like.dtype, device=like.device)  # type: ignore[arg-type]
        return seen

    def init(self, like: Tensor) -> State | None:
        """The state before the first token, or None for a rule without memory."""
        return self.rule.feedback.init(**self.numbers(like)) if self.rule.feedback else None

    def answer(self, row: BaseRow, like: Tensor) -> Band | Affine | Map | Keep:
        """The body's answer for ``row``, never dropping what must stay; see `settle`. ``like`` gives device and dtype."""
        return self.settle(row, self.numbers(like))

    def settle(self, row: BaseRow, values: Mapping[str, Any]) -> Band | Affine | Map | Keep:
        """The body's answer for ``row`` and ``values``: rows switched off are left alone, and a truncation keeps the most
        probable token."""
        answer = self.rule.body(row, **values)
        switches = [values[name] == p.off for name, p in self.rule.params.items() if p.off is not None]
        off = reduce(operator.and_, switches) if switches else False

        def unless_off(neutral: float | Tensor, value: Tensor) -> Tensor:
            if isinstance(off, bool):
                return torch.zeros_like(value) + neutral if off else value
            return torch.where(off, neutral, value)

        if isinstance(answer, Affine):
            return Affine(unless_off(1.0, answer.scale), unless_off(0.0, answer.shift))
        if isinstance(answer, Map):
            low = torch.full_like(row.max, -torch.inf) if answer.low is None else answer.low.minimum(row.max)
            return answer._replace(fn=lambda z: unless_off(z, answer.fn(z)), low=unless_off(-torch.inf, low))
        if isinstance(answer, Keep):
            return Keep(lambda z: unless_off(torch.ones_like(z, dtype=torch.bool), answer.fn(z)))
        band = answer if isinstance(answer, Band) else Band(answer.minimum(row.max), torch.full_like(answer, torch.inf))
        return Band(unless_off(-torch.inf, band.low), unless_off(torch.inf, band.high), band.spared)

    def __str__(self) -> str:
        shown = {name: self.rule.params[name].text(v) for name, v in self.values.items()}
        # Words and token ids are seldom given, so they are written by name and only where they aren't the default.
        texts = [
            text if isinstance(self.rule.params[name], Parameter) else f"{name}={text}"
            for name, text in shown.items()
            if isinstance(self.rule.params[name], Parameter) or self.values[name] != self.rule.params[name].default
        ]
        return f"{self.rule.name}({', '.join(texts)})"


RULES: dict[str, Rule] = {}
"""Every declared rule by name."""

SIDES = ("before", "after", "either")


def rule(
    bare: object = None,
    /,
    *,
    paper: str = "",
    shift: bool | Callable[..., bool] = True,
    scale: bool = False,
    side: str = "either",
    moved: Callable[..., Mapping[str, float]] | None = None,
    feedback: Feedback | None = None,
    slow: str = "",
    wants_cut: bool = False,
    check: Callable[..., None] | None = None,
) -> Callable[[Callable[..., Any]], Rule]:
    """Declare the decorated function as a rule named after it: ``@rule()``. Raises DecalError if the name is taken.

    Args:
        paper: where it was published, as ``arXiv:...``, ``doi:...`` or the place of its first code; nothing, if nowhere.
        shift: whether adding a constant to the logits changes nothing.
        scale: whether a temperature before the rule changes no kept set.
        side: where it is meant to stand: ``before`` or ``after`` temperature, or ``either``. `Chain.explain` warns otherwise.
        moved: ``moved(t, **values)`` gives the values that keep before ``temperature(t)`` what ``values`` keep after it.
        feedback: what it remembers of the tokens drawn; see `Feedback`.
        check: ``check(**values)`` raises DecalError for values that are allowed one by one, but not together.
        slow: why it is left out of default comparisons.
        wants_cut: whether it was made to stand behind a cut. `Chain.explain` warns otherwise.
    """

    if bare is not None:
        raise DecalError(f"write @rule(), with brackets, above {getattr(bare, '__name__', bare)}")

    def declare(body: Callable[..., Any]) -> Rule:
        arguments = list(inspect.signature(body).parameters.values())[1:]
        for argument in arguments:
            if not isinstance(argument.default, AnyParameter):
                wanted = "a Param(...), Choice(...), Numbers(...) or Tokens() as its default"
                raise DecalError(f"rule {body.__name__}: argument {argument.name!r} needs {wanted}")
        if body.__name__ in RULES:
            raise DecalError(f"rule {body.__name__} is declared already, in {RULES[body.__name__].body.__module__}")
        if side not in SIDES:
            raise DecalError(f"rule {body.__name__}: side must be one of {', '.join(SIDES)}, got {side!r}")
        params = {a.name: a.default for a in arguments}
        declared = Rule(body.__name__, body, params, paper, shift, scale, side, moved, feedback, slow, wants_cut, check)
        for name, param in declared.params.items():
            for value in (param.default, *param.sweep):
                param.check(f"rule {declared.name}: default and sweep of {name}", value)
        # A body that fails does so here, not in the middle of generation.
        try:
            answer = declared._trace[0]
        except Exception as error:
            raise DecalError(f"rule {declared.name}, line {body.__code__.co_firstlineno}: {error}") from error
        if not isinstance(answer, (Tensor, Band, Affine, Map, Keep)):
            kinds = "a tensor, a Band, an Affine, a Map or a Keep"
            raise DecalError(f"rule {declared.name} must return {kinds}, got {type(answer).__name__}")
        RULES[declared.name] = declared
        return declared

    return declare


def find(name: str) -> Rule:
    """The rule called ``name``. Raises DecalError that names near misses."""
    if isinstance(name, str) and name in RULES:
        return RULES[name]
    near = difflib.get_close_matches(str(name), RULES, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(RULES))}"
    raise DecalError(f"unknown rule {name!r}; {hint}")


GROUP = "decal.rules"
"""Entry points of this group name modules that declare rules; they are imported with decal."""


def load_plugins() -> None:
    """Import the modules that installed packages register under `GROUP`. One that fails is warned of and left out."""
    for point in entry_points(group=GROUP):
        before = set(RULES)
        try:
            import_module(point.module)
        except Exception as error:
            for name in set(RULES) - before:
                del RULES[name]
            where = f"{point.name} = {point.value}"
            warnings.warn(f"decal: the rules of {where} could not be loaded: {error}", RuntimeWarning, stacklevel=3)
