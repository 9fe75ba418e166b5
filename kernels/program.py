"""What is done to a row of logits, as a short list of instructions that compiled code runs without being compiled again.

A rule is a formula over a few numbers of a row (its largest logit, its entropy, its k-th largest logit), and what it answers
is a band of logits to keep or an affine map of them. `Builder` records such formulas: it hands out `Number` objects, on which
arithmetic and the functions of torch write instructions instead of computing. The result, a `Program`, is data: the CPU path
and the Triton kernels each hold one interpreter for all programs.

A program works on registers, float64 numbers of one row. It begins with the constants and per-row parameters in place, and with
the row whole: every logit that is a finite number is *kept*, the *value* of a token is its logit. Instructions are

- arithmetic on registers (`Op.ADD` and so on; true is 1 and false 0),
- readings of the kept values (`Op.PEAK` to `Op.CURVATURE`),
- `Op.AFFINE`, which maps all values, and `Op.BAND`, which drops those outside of a band,
- `Op.LONGEST` and `Op.BEST`, which run the instructions behind them once for each top set.

Each instruction is seven integers: ``op, dst, a, b, c, d, e``, registers except where `Op` says otherwise.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

FIELDS = 7
"""Integers in an instruction."""

MOMENT_NAMES = ("n", "s", "t", "q", "h", "a", "b")
"""Names in `decal.kernels.statistics.MOMENTS`, in the order in which registers hold them."""


class Op(enum.IntEnum):
    """Instructions. Comparisons with NaN are false but `NE`; `MIN` and `MAX` are NaN where an operand is."""

    END = 0
    ADD = 1  # dst = a + b
    SUB = 2
    MUL = 3
    DIV = 4
    POW = 5
    MIN = 6
    MAX = 7
    LT = 8
    LE = 9
    EQ = 10
    NE = 11
    AND = 12
    OR = 13
    NEG = 14  # dst = -a
    LOG = 15
    EXP = 16
    SQRT = 17
    LOG1P = 18
    EXPM1 = 19
    FLOOR = 20
    ROUND = 21  # half to even
    ABS = 22
    NOT = 23
    WHERE = 24  # dst = b if a else c

    PEAK = 32  # dst = the largest value
    MOMENTS = (
        33  # dst, dst + 1, ... = moments relative to the largest value; a = bits, 1 << place in MOMENT_NAMES, of the wanted
    )
    COUNT_UPPER = 34  # dst = the a-th largest value; a is clamped to the number of kept tokens
    MASS_UPPER = 35  # dst = value of the last token of the smallest top set of the share a of the mass
    NEAREST = 36  # dst, dst + 1 = lowest, highest of the values nearest to a that hold the share b of the mass
    SMALLEST = 37  # dst = the smallest value that is at least a; inf if there is none
    CURVATURE = 38  # dst = sum of |second differences| of exp(value - peak) by rank
    AFFINE = 40  # value = a * value + b; see `decal.kernels.reference.affine`
    BAND = 41  # keep the values in [a, b]; where there are none, all
    LONGEST = 42  # dst = size of the longest run of top sets; see below
    BEST = 43  # dst = size of the top set of the largest score
    SCORE = 44  # ends the instructions that belong to LONGEST and BEST; a = the score


# LONGEST: a = the bound, b = 1 or -1 (an integer): no top set up to the answer has b * score < b * bound; what is known of its
# top set is left in its registers, zeros if there is none. BEST: the smallest of several; a NaN is no score; where b = 1, a = a
# bound on the scores of all larger top sets, reckoned with each score. Both: c = the first of TOP_SET registers that hold what
# is known of a top set, d = number of instructions that belong to it, e = bits of the moments that they read.
TOP_SET_MOMENTS = 3
"""Where the moments begin among the registers of a top set."""
TOP_SET = TOP_SET_MOMENTS + len(MOMENT_NAMES)
"""Registers of a top set: the value of its last token; the next value, or -inf; the running sum of the absolute second
differences of exp(value - peak) up to the one centred on its last token; its moments, relative to the largest value."""

READS = frozenset({Op.MOMENTS, Op.COUNT_UPPER, Op.MASS_UPPER, Op.NEAREST, Op.SMALLEST, Op.CURVATURE, Op.LONGEST, Op.BEST})
"""Instructions that look at all kept values."""


class Untraceable(Exception):
    """A formula uses what programs don't have."""


@dataclass(frozen=True)
class Program:
    """Instructions, and what the registers hold in the beginning.

    Attributes:
        code: instructions of `FIELDS` integers; the last one is `Op.END`.
        registers: how many there are.
        constants: values by register.
        columns: which register each column of the per-row parameters goes to.
    """

    code: tuple[tuple[int, ...], ...]
    registers: int
    constants: tuple[tuple[int, float], ...]
    columns: tuple[int, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        # Addresses are those of this object.
        return Program, (self.code, self.registers, self.constants, self.columns)

    @cached_property
    def code_array(self) -> np.ndarray:
        """(instructions, `FIELDS`) int32."""
        return np.array(self.code, dtype=np.int32).reshape(-1, FIELDS)

    @cached_property
    def initial(self) -> np.ndarray:
        """(registers,) float64: constants in place, zeros elsewhere."""
        values = np.zeros(self.registers)
        for register, value in self.constants:
            values[register] = value
        return values

    @cached_property
    def addresses(self) -> tuple[int, int]:
        """Of `code_array` and `initial`."""
        return self.code_array.ctypes.data, self.initial.ctypes.data

    def registers_of(self, parameters: Tensor, rows: int) -> np.ndarray:
        """(rows, registers) float64: what the registers hold in the beginning; ``parameters`` are (rows, columns)."""
        values = np.repeat(self.initial[None], rows, 0)
        values[:, list(self.columns)] = parameters.detach().double().cpu().numpy()
        return values

    @cached_property
    def affines(self) -> int:
        """How many maps there are."""
        return sum(one[0] == Op.AFFINE for one in self.code)

    @cached_property
    def is_mask(self) -> bool:
        """Whether it only drops tokens."""
        return not self.affines

    def __str__(self) -> str:
        return "\n".join(f"{Op(one[0]).name} {' '.join(map(str, one[1:]))}" for one in self.code)


class Number:
    """A number of each row: a constant, or a register. Arithmetic writes instructions; constants are folded, by torch, so they
    have the bits that torch gives them."""

    __array_priority__ = 1000

    def __init__(self, builder: Builder, register: int | None, constant: Tensor | None = None):
        self.builder, self._register, self.constant = builder, register, constant

    dtype = torch.float64
    device = torch.device("cpu")
    shape = torch.Size((1, 1))

    @property
    def register(self) -> int:
        """The register that holds it; constants get theirs here."""
        if self._register is None:
            assert self.constant is not None
            self._register = self.builder.register_of(float(self.constant))
        return self._register

    def __bool__(self) -> NoReturn:
        raise Untraceable("it decides by the numbers of a row in Python")

    def __float__(self) -> NoReturn:
        raise Untraceable("it needs the numbers of a row in Python")

    __int__ = __index__ = __iter__ = __len__ = __getitem__ = __float__

    def __getattr__(self, name: str) -> Any:
        raise Untraceable(f"it uses Tensor.{name}")

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise Untraceable("it uses numpy")

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        if func not in FUNCTIONS:
            raise Untraceable(f"it uses torch.{name}")
        return FUNCTIONS[func](*args, **(kwargs or {}))

    def _of(self, op: Op, fold: Callable[..., Tensor], *others: Any) -> Number:
        """An instruction, or what it gives if all operands are constants."""
        operands = [self.builder.number(x) for x in (self, *others)]
        constants = [x.constant for x in operands]
        if all(c is not None for c in constants):
            return Number(self.builder, None, fold(*constants).to(torch.float64))
        return self.builder.emit(op, *operands)

    def __add__(self, other: Any) -> Number:
        return self._of(Op.ADD, torch.add, other)

    def __radd__(self, other: Any) -> Number:
        return self.builder.number(other) + self

    def __sub__(self, other: Any) -> Number:
        return self._of(Op.SUB, torch.sub, other)

    def __rsub__(self, other: Any) -> Number:
        return self.builder.number(other) - self

    def __mul__(self, other: Any) -> Number:
        return self._of(Op.MUL, torch.mul, other)

    def __rmul__(self, other: Any) -> Number:
        return self.builder.number(other) * self

    def __truediv__(self, other: Any) -> Number:
        return self._of(Op.DIV, torch.div, other)

    def __rtruediv__(self, other: Any) -> Number:
        return self.builder.number(other) / self

    def __pow__(self, other: Any) -> Number:
        if other == 2:
            return self * self
        return self.sqrt() if other == 0.5 else self._of(Op.POW, torch.pow, other)

    def __neg__(self) -> Number:
        return self._of(Op.NEG, torch.neg)

    def __lt__(self, other: Any) -> Number:
        return self._of(Op.LT, torch.lt, other)

    def __le__(self, other: Any) -> Number:
        return self._of(Op.LE, torch.le, other)

    def __gt__(self, other: Any) -> Number:
        return self.builder.number(other) < self

    def __ge__(self, other: Any) -> Number:
        return self.builder.number(other) <= self

    def __eq__(self, other: object) -> Number:  # type: ignore[override]
        return self._of(Op.EQ, torch.eq, other)

    def __ne__(self, other: object) -> Number:  # type: ignore[override]
        return self._of(Op.NE, torch.ne, other)

    __hash__ = None  # type: ignore[assignment]

    def __and__(self, other: Any) -> Number:
        return self._of(Op.AND, torch.logical_and, other)

    def __or__(self, other: Any) -> Number:
        return self._of(Op.OR, torch.logical_or, other)

    __rand__, __ror__ = __and__, __or__

    def __invert__(self) -> Number:
        return self._of(Op.NOT, torch.logical_not)

    def __abs__(self) -> Number:
        return self._of(Op.ABS, torch.abs)

    abs = __abs__

    def log(self) -> Number:
        return self._of(Op.LOG, torch.log)

    def exp(self) -> Number:
        return self._of(Op.EXP, torch.exp)

    def sqrt(self) -> Number:
        return self._of(Op.SQRT, torch.sqrt)

    def log1p(self) -> Number:
        return self._of(Op.LOG1P, torch.log1p)

    def expm1(self) -> Number:
        return self._of(Op.EXPM1, torch.expm1)

    def floor(self) -> Number:
        return self._of(Op.FLOOR, torch.floor)

    def round(self) -> Number:
        return self._of(Op.ROUND, torch.round)

    def minimum(self, other: Any) -> Number:
        return self._of(Op.MIN, torch.minimum, other)

    def maximum(self, other: Any) -> Number:
        return self._of(Op.MAX, torch.maximum, other)

    def clamp(self, min: Any = None, max: Any = None) -> Number:
        found = self if min is None else self.maximum(min)
        return found if max is None else found.minimum(max)

    def isnan(self) -> Number:
        return self != self

    def isinf(self) -> Number:
        return abs(self) == math.inf

    def isfinite(self) -> Number:
        return abs(self) < math.inf

    def nan_to_num(self, nan: float = 0.0, posinf: float | None = None, neginf: float | None = None) -> Number:
        top = torch.finfo(torch.float64).max
        found = where(self == math.inf, top if posinf is None else posinf, self)
        found = where(self == -math.inf, -top if neginf is None else neginf, found)
        return where(self.isnan(), nan, found)

    def to(self, *_: Any, **__: Any) -> Number:
        return self

    def double(self) -> Number:
        return self


def _builder_of(*values: Any) -> Builder:
    return next(v.builder for v in values if isinstance(v, Number))


def where(condition: Any, yes: Any, no: Any) -> Number:
    """``yes`` where ``condition`` is true, else ``no``."""
    builder = _builder_of(condition, yes, no)
    condition, yes, no = (builder.number(v) for v in (condition, yes, no))
    if condition.constant is not None:
        return yes if bool(condition.constant) else no
    return builder.emit(Op.WHERE, condition, yes, no)


def _binary(name: str) -> Callable[..., Number]:
    return lambda a, b: getattr(_builder_of(a, b).number(a), name)(b)


FUNCTIONS: dict[Any, Callable[..., Any]] = {
    torch.where: where,
    torch.minimum: _binary("minimum"),
    torch.maximum: _binary("maximum"),
    torch.logical_and: _binary("__and__"),
    torch.logical_or: _binary("__or__"),
    torch.logical_not: lambda a: ~a,
    torch.pow: _binary("__pow__"),
    torch.Tensor.pow: _binary("__pow__"),
    torch.clamp: lambda a, min=None, max=None: a.clamp(min, max),
    torch.full_like: lambda a, fill_value, **_: a.builder.number(fill_value),
    torch.zeros_like: lambda a, **_: a.builder.number(0.0),
    torch.ones_like: lambda a, **_: a.builder.number(1.0),
}
"""Functions of torch that take a `Number`."""

for _name in ("log", "exp", "sqrt", "log1p", "expm1", "floor", "round", "abs", "isnan", "isinf", "isfinite", "nan_to_num"):
    FUNCTIONS[getattr(torch, _name)] = lambda a, *args, _name=_name, **kwargs: getattr(a, _name)(*args, **kwargs)
for _op in ("add", "sub", "mul", "truediv", "lt", "le", "gt", "ge", "eq", "ne", "and", "or"):
    for _prefix in ("", "r"):
        _method = f"__{_prefix}{_op}__"
        if hasattr(Number, _method) and hasattr(torch.Tensor, _method):
            FUNCTIONS[getattr(torch.Tensor, _method)] = _binary(_method)


class Builder:
    """Writes a program. Arithmetic is written by the numbers that it hands out."""

    def __init__(self) -> None:
        self._code: list[tuple[int, ...]] = []
        self._registers = 0
        self._constants: dict[str, tuple[int, float]] = {}
        self._columns: list[int] = []

    def program(self) -> Program:
        """What was written."""
        code = (*self._code, (int(Op.END), *(0,) * (FIELDS - 1)))
        return Program(code, self._registers, tuple(self._constants.values()), tuple(self._columns))

    def number(self, value: Any) -> Number:
        """``value`` as a number: one already, or a Python number."""
        if isinstance(value, Number):
            return value
        if isinstance(value, Tensor):
            # Who knows what it depends on: it would be the same in every run.
            raise Untraceable("it brings a tensor of its own")
        return Number(self, None, torch.as_tensor(value, dtype=torch.float64).reshape(()))

    def parameter(self) -> Number:
        """The next per-row parameter."""
        self._columns.append(self._take(1))
        return Number(self, self._columns[-1])

    def register_of(self, constant: float) -> int:
        """The register of a constant."""
        key = constant.hex()  # tells -0 from 0, and makes NaN equal to itself
        if key not in self._constants:
            self._constants[key] = (self._take(1), constant)
        return self._constants[key][0]

    def emit(self, op: Op, *operands: Number) -> Number:
        """Write an instruction with one result."""
        sources = [x.register for x in operands]
        return self._write(op, self._take(1), *sources)

    def peak(self) -> Number:
        """The largest value."""
        return self.emit(Op.PEAK)

    def moments(self, names: Sequence[str]) -> dict[str, Number]:
        """Moments of the kept values, by name."""
        start = self._take(len(MOMENT_NAMES))
        self._write(Op.MOMENTS, start, bits_of(names))
        return {name: Number(self, start + MOMENT_NAMES.index(name)) for name in names}

    def nearest(self, center: Number, mass: Number) -> tuple[Number, Number]:
        """Lowest and highest of the values nearest to ``center`` that hold ``mass``."""
        sources = center.register, mass.register
        start = self._take(2)
        self._write(Op.NEAREST, start, *sources)
        return Number(self, start), Number(self, start + 1)

    def count_upper(self, count: Any) -> Number:
        """The logit at a rank."""
        return self.emit(Op.COUNT_UPPER, self.number(count))

    def mass_upper(self, mass: Any) -> Number:
        """The logit at a share of the mass."""
        return self.emit(Op.MASS_UPPER, self.number(mass))

    def smallest(self, level: Any) -> Number:
        """The smallest value that is at least ``level``."""
        return self.emit(Op.SMALLEST, self.number(level))

    def curvature(self) -> Number:
        """Sum of the absolute second differences of exp(value - peak), by rank."""
        return self.emit(Op.CURVATURE)

    def affine(self, scale: Number, shift: Number) -> None:
        """Map all values."""
        self._write(Op.AFFINE, 0, scale.register, shift.register)

    def band(self, low: Number, high: Number) -> None:
        """Drop the values outside."""
        self._write(Op.BAND, 0, low.register, high.register)

    def search(
        self,
        score: Callable[[int], tuple[Number, Sequence[str]]],
        bound: Number | None = None,
        sense: int = 1,
        later: Callable[[int], tuple[Number, Sequence[str]]] | None = None,
    ) -> Number:
        """`Op.LONGEST`, or `Op.BEST` without a ``bound``.

        ``score`` is given the first register of a top set; it writes the score and says which moments it read. So is ``later``,
        which writes a bound on the scores of all larger ones.
        """
        base, dst = self._take(TOP_SET), self._take(1)
        limit = 0 if bound is None else bound.register
        place = len(self._code)
        self._code.append(())
        value, read = score(base)
        moments = set(read)
        if later is not None:
            rest, more = later(base)
            limit, sense, moments = rest.register, 1, moments | set(more)
        elif bound is None:
            sense = 0
        self._write(Op.SCORE, 0, value.register)
        inner = self._code[place + 1 :]
        # What the score asks of the whole row is the same for every top set.
        constants = {register for register, _ in self._constants.values()}
        asked = [
            one
            for one in inner
            if one[0] in (Op.PEAK, Op.MOMENTS, Op.CURVATURE) or (one[0] == Op.SMALLEST and one[2] in constants)
        ]
        inner = [one for one in inner if one not in asked]
        if any(one[0] in READS or one[0] in (Op.AFFINE, Op.BAND) for one in inner):
            raise Untraceable("its score reads more of the row than statistics")
        self._code[place:] = [*asked, (), *inner]
        place += len(asked)
        op = Op.BEST if bound is None else Op.LONGEST
        self._code[place] = (int(op), dst, limit, sense, base, len(inner), bits_of(moments))
        return Number(self, dst)

    def _take(self, count: int) -> int:
        self._registers += count
        return self._registers - count

    def _write(self, op: Op, dst: int, *fields: int) -> Number:
        self._code.append((int(op), dst, *fields, *(0,) * (FIELDS - 2 - len(fields))))
        return Number(self, dst)


def bits_of(names: Iterable[str]) -> int:
    """Names of moments as bits."""
    return sum(1 << MOMENT_NAMES.index(name) for name in set(names))
