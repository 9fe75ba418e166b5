"""A `Program` in plain torch and float64, one row at a time with its whole vocabulary: what the kernels are compared with.

It sorts, keeps a boolean for every token, and shares nothing with the kernels but the integer masses. Sums are taken as the
kernels take them, so that thresholds have the same bits up to functions such as log.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from decal.kernels import mass, reference
from decal.kernels.program import MOMENT_NAMES, TOP_SET, Op, Program

BINARY = {
    Op.ADD: torch.add, Op.SUB: torch.sub, Op.MUL: torch.mul, Op.DIV: torch.div, Op.POW: torch.pow, Op.MIN: torch.minimum,
    Op.MAX: torch.maximum, Op.LT: torch.lt, Op.LE: torch.le, Op.EQ: torch.eq, Op.NE: torch.ne, Op.AND: torch.logical_and,
    Op.OR: torch.logical_or,
}  # fmt: skip
UNARY = {
    Op.NEG: torch.neg, Op.LOG: torch.log, Op.EXP: torch.exp, Op.SQRT: torch.sqrt, Op.LOG1P: torch.log1p,
    Op.EXPM1: torch.expm1, Op.FLOOR: torch.floor, Op.ROUND: torch.round, Op.ABS: torch.abs, Op.NOT: torch.logical_not,
}  # fmt: skip


def values(program: Program, logits: Tensor, parameters: Tensor | None = None) -> Tensor:
    """(B, V) values of what is kept, -inf where dropped."""
    rows = [_row(program, z, None if parameters is None else parameters[i]) for i, z in enumerate(reference.clean(logits))]
    return torch.stack(rows)


def transform(
    program: Program, logits: Tensor, parameters: Tensor | None = None, *, dtype: torch.dtype | None = None
) -> Tensor:
    """What `decal.kernels.gpu.transform` gives."""
    found = values(program, logits, parameters)
    if not program.affines:
        return logits.masked_fill(found.isneginf(), -math.inf).to(dtype or logits.dtype)
    return reference.narrow(found, dtype or logits.dtype)


def sample(program: Program, logits: Tensor, seeds: Tensor, positions: Tensor, parameters: Tensor | None = None) -> Tensor:
    """What `decal.kernels.gpu.sample` gives."""
    return reference.draw(values(program, logits, parameters), seeds[:, None], positions[:, None])


def registers_of(program: Program, parameters: Tensor) -> Tensor:
    """What the registers of a program without readings hold in the end."""
    registers = torch.from_numpy(program.initial.copy())
    registers[list(program.columns)] = parameters.double()
    for code, dst, a, b, c, *_ in program.code[:-1]:
        registers[dst] = _arithmetic(Op(code), registers[a], registers[b], registers[c])
    return registers


def _row(program: Program, z: Tensor, parameters: Tensor | None) -> Tensor:
    if not z.isfinite().any():
        return z
    registers = torch.from_numpy(program.initial.copy())
    if parameters is not None and program.columns:
        registers[list(program.columns)] = parameters.double()
    at = 0
    while program.code[at][0] != Op.END:
        code, dst, a, b, c, count, _bits = program.code[at]
        op = Op(code)
        kept = z.isfinite()
        if op in BINARY or op in UNARY or op == Op.WHERE:
            registers[dst] = _arithmetic(op, registers[a], registers[b], registers[c])
        elif op == Op.PEAK:
            registers[dst] = z.max()
        elif op == Op.MOMENTS:
            for name, value in _moments(z[kept], z.max()).items():
                registers[dst + MOMENT_NAMES.index(name)] = value[-1]
        elif op == Op.COUNT_UPPER:
            registers[dst] = reference.upper(z[None], count=registers[a][None, None])
        elif op == Op.MASS_UPPER:
            registers[dst] = reference.upper(z[None], mass=registers[a][None, None])
        elif op == Op.NEAREST:
            low, high = reference.nearest(z[None], registers[a][None, None], registers[b][None, None])
            registers[dst], registers[dst + 1] = low, high
        elif op == Op.SMALLEST:
            registers[dst] = reference.smallest_from(z[None], registers[a][None, None])
        elif op == Op.CURVATURE:
            registers[dst] = _bends(z[kept].sort(descending=True).values)[-1]
        elif op == Op.AFFINE:
            z = reference.affine(z[None], registers[a][None, None], registers[b][None, None])[0]
        elif op == Op.BAND:
            z = reference.keep_between(z[None], registers[a][None, None], registers[b][None, None])[0]
        elif op in (Op.LONGEST, Op.BEST):
            registers[dst] = _search(program, at, registers, z[kept].sort(descending=True).values, op)
            at += count
        at += 1
    return z


def _arithmetic(op: Op, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    if op == Op.WHERE:
        return torch.where(x != 0, y, z)
    return (BINARY[op](x, y) if op in BINARY else UNARY[op](x)).double()


def _moments(z: Tensor, top: Tensor) -> dict[str, Tensor]:
    """Running sums over the tokens."""
    d = z - top
    e = mass.weight(d)
    exponent = min(max(math.frexp(float(-d.min()))[1], -1000), 1000)
    u = d * 2.0**-exponent

    def total(x: Tensor) -> Tensor:
        high, low = mass.limbs(x)
        return mass.joined(high.cumsum(0), low.cumsum(0))

    return {
        "n": torch.ones_like(d).cumsum(0), "s": total(e), "t": (d.clamp(min=-700) * e).cumsum(0), "q": total(e * e),
        "h": total(mass.weight(0.5 * d)), "a": total(u) * 2.0**exponent, "b": total(u * u) * 2.0**exponent * 2.0**exponent,
    }  # fmt: skip


def _bends(ranked: Tensor) -> Tensor:
    """Running sum of the absolute second differences."""
    p = mass.weight(ranked - ranked[0])
    bends = torch.zeros_like(p)
    bends[1:-1] = (p[:-2] - 2 * p[1:-1] + p[2:]).abs()
    high, low = mass.limbs(bends)
    return mass.joined(high.cumsum(0), low.cumsum(0))


def _search(program: Program, at: int, registers: Tensor, ranked: Tensor, op: Op) -> float:
    """Look at every top set."""
    _, _, limit, sense, base, count, _ = program.code[at]
    many: dict[int, Tensor] = {
        base: ranked, base + 1: torch.cat([ranked[1:], torch.tensor([-math.inf]).double()]), base + 2: _bends(ranked)
    }  # fmt: skip
    many |= {base + 3 + i: m for i, m in enumerate(_moments(ranked, ranked[0]).values())}
    assert 3 + len(MOMENT_NAMES) == TOP_SET
    for one in program.code[at + 1 : at + count]:
        x, y, z = (many.get(r, registers[r].expand(len(ranked))) for r in one[2:5])
        many[one[1]] = _arithmetic(Op(one[0]), x, y, z)
    last = program.code[at + count]
    assert last[0] == Op.SCORE
    score = many.get(last[2], registers[last[2]].expand(len(ranked)))
    if op == Op.BEST:
        return int(torch.where(score.isnan(), -math.inf, score).argmax()) + 1
    fails = sense * score < sense * registers[limit]
    size = int(fails.byte().argmax()) if fails.any() else len(ranked)
    for register in range(base, base + TOP_SET):
        registers[register] = many[register][size - 1] if size else 0.0
    return size
