"""Functions that run inside the Triton kernels of `decal.kernels.gpu`.

Legend: ``z`` a logit as it is stored, in float32; ``key`` its bits as an int32 that orders like it; ``u = sign * key``, which
orders like the token's value, whatever maps were executed (``sign`` is -1 behind an odd number of negative scales). What is
kept of a row is always an interval ``low <= u <= high``, so a row's state is a few integers.
"""

from __future__ import annotations

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl

from decal.kernels import mass, random
from decal.kernels.program import MOMENT_NAMES, TOP_SET, Op

ARRIVED = tl.constexpr(0)  # programs of a row that have finished their part
LOW = tl.constexpr(1)
HIGH = tl.constexpr(2)
SIGN = tl.constexpr(3)
PEAK = tl.constexpr(4)  # u of the largest kept value
LEAST = tl.constexpr(5)  # a u below which the row never had anything
NEAR = tl.constexpr(6)  # u of the highest value that the last Op.NEAREST answered, NOWHERE if none
SUMS = tl.constexpr(8)  # 13 accumulators; 0 between readings
SECOND = tl.constexpr(21)  # u of the largest value below the largest, for moments; 0 if there is none
FIRST = tl.constexpr(24)  # bins in which the last token of a selection may be
LAST = tl.constexpr(25)
TARGET = tl.constexpr(26)
SLOTS = 32
"""Integers in the state of a row."""

NOWHERE = tl.constexpr(-(2**40))
KEY_MIN, KEY_MAX = tl.constexpr(-(2**31)), tl.constexpr(2**31 - 1)
LONG_MIN = tl.constexpr(-(2**63))
LONG_MAX = tl.constexpr(2**63 - 1)
LOWEST_DOUBLE = tl.constexpr(-1.7976931348623157e308)
INF = tl.constexpr(float("inf"))
LANES = tl.constexpr(128)
PIVOTS = tl.constexpr(8)
SUB = tl.constexpr(256)
OTHERS = tl.constexpr(16)
FIELDS = tl.constexpr(7)

COUNT_UPPER = tl.constexpr(int(Op.COUNT_UPPER))
MASS_UPPER = tl.constexpr(int(Op.MASS_UPPER))
NEAREST = tl.constexpr(int(Op.NEAREST))
LONGEST = tl.constexpr(int(Op.LONGEST))
BEST = tl.constexpr(int(Op.BEST))
READ_FROM = tl.constexpr(int(Op.MOMENTS))
READ_TO = tl.constexpr(int(Op.CURVATURE))
OP_PEAK = tl.constexpr(int(Op.PEAK))
OP_AFFINE = tl.constexpr(int(Op.AFFINE))
OP_BAND = tl.constexpr(int(Op.BAND))
MOMENTS = tl.constexpr(len(MOMENT_NAMES))
TOPS = tl.constexpr(TOP_SET)

LOG2E = tl.constexpr(mass.LOG2E)
C0, C1, C2, C3, C4, C5, C6, C7, C8 = (tl.constexpr(c) for c in mass.COEFFICIENTS)
ROUND = tl.constexpr(mass.ROUND)
LOWEST = tl.constexpr(mass.LOWEST)
UNIT = tl.constexpr(mass.UNIT)
FIXED = tl.constexpr(mass.FIXED)
FIXED_BITS = tl.constexpr(mass.FIXED_BITS)
FINER = tl.constexpr(mass.FINER)
FINEST = tl.constexpr(mass.UNIT / mass.FINER)
GOLDEN = tl.constexpr(random.GOLDEN)
MULTIPLY_1, MULTIPLY_2 = (tl.constexpr(m) for m in random.MULTIPLIERS)


# ---- numbers


@triton.jit
def weight(d):
    """exp(d) of float64 d <= 0, the same bits as `decal.kernels.mass.weight`; NaN counts as -inf."""
    y = d * LOG2E
    y = tl.where(y > LOWEST, y, LOWEST)
    t = y + ROUND
    f = y - (t - ROUND)
    p = f * C8 + C7
    p = p * f + C6
    p = p * f + C5
    p = p * f + C4
    p = p * f + C3
    p = p * f + C2
    p = p * f + C1
    p = p * f + C0
    bits = p.to(tl.int64, bitcast=True) + (t.to(tl.int64, bitcast=True) << 52)
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def fixed(x):
    """`decal.kernels.mass.fixed`."""
    return (x + FIXED).to(tl.int64, bitcast=True) - FIXED_BITS


@triton.jit
def limbs(x, kept):
    """`decal.kernels.mass.limbs` of what is kept; nothing of the rest."""
    moved = x + FIXED
    high = moved.to(tl.int64, bitcast=True) - FIXED_BITS
    low = fixed((x - (moved - FIXED)) * FINER)
    return tl.where(kept, high, 0), tl.where(kept, low, 0)


@triton.jit
def joined(high, low):
    """`decal.kernels.mass.joined`."""
    return high.to(tl.float64) * UNIT + low.to(tl.float64) * FINEST


@triton.jit
def to_key(z):
    """Both zeros have the key 0."""
    bits = z.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


@triton.jit
def from_key(key):
    """The float32 that has a key."""
    return tl.where(key < 0, (-key) | -2147483648, key).to(tl.float32, bitcast=True)


@triton.jit
def to_long(x):
    """An int64 that orders like a float64."""
    bits = x.to(tl.int64, bitcast=True)
    return tl.where(bits < 0, -(bits & 0x7FFFFFFFFFFFFFFF), bits)


@triton.jit
def from_long(key):
    """The float64 that has such an int64."""
    return tl.where(key < 0, (-key) | LONG_MIN, key).to(tl.float64, bitcast=True)


@triton.jit
def mix(x):
    """`decal.kernels.random.mix`."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * MULTIPLY_1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * MULTIPLY_2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def exponential(state):
    """Exponentially distributed number from a hash, as `decal.kernels.random.exponential`.

    1 - u is exact there, and log has a small relative error also next to 1, so log1p isn't needed.
    """
    u = (((state >> 12) & 0xFFFFFFFFFFFFF).to(tl.float64) + 0.5) * 2.220446049250313e-16
    return -tl.log(1.0 - u)


@triton.jit
def needed(share, total):
    """`decal.kernels.mass.needed`."""
    whole = total.to(tl.float64)
    wanted = tl.ceil(share * whole)
    wanted = tl.where(wanted >= 1.0, wanted, 1.0)
    wanted = tl.where(wanted < whole, wanted, whole)
    return tl.maximum(tl.minimum(wanted.to(tl.int64), total), 1)


@triton.jit
def power_of_two_above(reach):
    """Exponent of a power of two above a float64 ``reach >= 0``."""
    exponent = ((reach.to(tl.int64, bitcast=True) >> 52) & 0x7FF) - 1022
    return tl.minimum(tl.maximum(exponent, -1000), 1000)


@triton.jit
def two_to(exponent):
    """2 to a small integer, as float64."""
    return ((exponent + 1023) << 52).to(tl.float64, bitcast=True)


# ---- the row


@triton.jit
def load_logits(x_ptr, offsets, end, TOP: tl.constexpr, CACHE: tl.constexpr = ""):
    """Logits in float32, -inf behind the end; what is infinite becomes finite, so that the keys of finite numbers are all."""
    z = tl.load(x_ptr + offsets, mask=offsets < end, other=float("-inf"), cache_modifier=CACHE).to(tl.float32)
    return tl.where(z == INF, TOP, z)


@triton.jit
def first_map(maps_ptr, maps):
    """Scale, origin and shift of the first map, or those that change nothing."""
    some = maps > 0
    return (
        tl.load(maps_ptr, mask=some, other=1.0),
        tl.load(maps_ptr + 1, mask=some, other=0.0),
        tl.load(maps_ptr + 2, mask=some, other=0.0),
    )


@triton.jit
def value_of(z, scale, origin, shift, maps_ptr, maps):
    """Value in float64 behind ``maps`` maps, of which the first is given."""
    v = scale * (z.to(tl.float64) - origin) + shift
    v = tl.where(v < LOWEST_DOUBLE, LOWEST_DOUBLE, v)
    for i in range(1, maps):
        at = maps_ptr + 3 * i
        v = tl.load(at) * (v - tl.load(at + 1)) + tl.load(at + 2)
        v = tl.where(v < LOWEST_DOUBLE, LOWEST_DOUBLE, v)
    return v


@triton.jit
def value_at(u, sign, maps_ptr, maps):
    """Value of the token that stands at ``u``."""
    scale, origin, shift = first_map(maps_ptr, maps)
    return value_of(from_key((u * sign).to(tl.int32)), scale, origin, shift, maps_ptr, maps)


@triton.jit
def first_from(bound, STRICT: tl.constexpr, low, high, sign, maps_ptr, maps):
    """The smallest u in [low, high] whose value is at least (or above) ``bound``, high + 1 if there is none."""
    lane = tl.arange(0, LANES).to(tl.int64)
    start, stop = low, high + 1
    while start < stop:
        width = (stop - start + LANES - 1) // LANES
        u = start + lane * width
        v = value_at(tl.minimum(u, high), sign, maps_ptr, maps)
        short = (v <= bound) if STRICT else (v < bound)
        n = tl.sum(((u < stop) & short).to(tl.int64), 0)
        stop = tl.minimum(stop, start + n * width)
        start = tl.where(n > 0, start + (n - 1) * width + 1, start)
    return start


@triton.jit
def interval_of(state_ptr):
    """Where the kept u begin and end, and the sign, as int32, which is enough for a u."""
    low, high, sign = tl.load(state_ptr + LOW), tl.load(state_ptr + HIGH), tl.load(state_ptr + SIGN)
    return low.to(tl.int32), high.to(tl.int32), sign.to(tl.int32)


@triton.jit
def largest_within(x_ptr, V, low, high, sign, TOP: tl.constexpr, BLOCK: tl.constexpr):
    """The largest u of the row in [low, high], NOWHERE if there is none. One program reads the whole row: for rare cases."""
    best = tl.full([BLOCK], NOWHERE, tl.int64)
    for i in range(0, V, BLOCK):
        u = to_key(load_logits(x_ptr, i + tl.arange(0, BLOCK), V, TOP)).to(tl.int64) * sign
        best = tl.maximum(best, tl.where((u >= low) & (u <= high), u, NOWHERE))
    return tl.max(best, 0)


# ---- instructions between readings


@triton.jit
def arithmetic(op, x, y, z):
    """Result of an instruction on registers, which may be tensors."""
    r = tl.where(op == 2, x - y, x + y)
    r = tl.where(op == 3, x * y, r)
    nan = (x != x) | (y != y)
    r = tl.where(op == 6, tl.where(nan, x + y, tl.where(x < y, x, y)), r)
    r = tl.where(op == 7, tl.where(nan, x + y, tl.where(x > y, x, y)), r)
    r = tl.where(op == 8, (x < y).to(tl.float64), r)
    r = tl.where(op == 9, (x <= y).to(tl.float64), r)
    r = tl.where(op == 10, (x == y).to(tl.float64), r)
    r = tl.where(op == 11, (x != y).to(tl.float64), r)
    r = tl.where(op == 12, ((x != 0) & (y != 0)).to(tl.float64), r)
    r = tl.where(op == 13, ((x != 0) | (y != 0)).to(tl.float64), r)
    r = tl.where(op == 14, -x, r)
    r = tl.where(op == 22, tl.abs(x), r)
    r = tl.where(op == 23, (x == 0).to(tl.float64), r)
    r = tl.where(op == 24, tl.where(x != 0, y, z), r)
    if op == 4:
        r = x / y
    if (op >= 15) & (op <= 21):
        r = function(op, x)
    if op == 5:
        r = power(x, y)
    return r


@triton.jit
def function(op, x):
    """Functions of one number."""
    r = x
    if op == 15:
        r = tl.log(x)
    if op == 16:
        r = tl.exp(x)
    if op == 17:
        r = tl.sqrt(x)
    if op == 18:  # the error of 1 + x drops out (Kahan)
        near = 1.0 + x
        whole = (near == 1.0) | (near == INF)
        r = tl.where(whole, x, tl.log(near) * (x / tl.where(whole, 1.0, near - 1.0)))
    if op == 19:
        e = tl.exp(x)
        small = tl.abs(x) < 0.5
        safe = tl.where(small & (e != 1.0), e, 2.0)
        r = tl.where(small, tl.where(e == 1.0, x, (safe - 1.0) * (x / tl.log(safe))), e - 1.0)
    if op == 20:
        r = tl.floor(x)
    if op == 21:
        t = x + ROUND
        r = tl.where(tl.abs(x) < 2251799813685248.0, t - ROUND, x)
    return r


@triton.jit
def power(x, y):
    """x to the power y, to about 1e-14."""
    whole = tl.floor(y) == y
    odd = whole & (tl.floor(y * 0.5) * 2.0 != y)
    size = tl.exp(y * tl.log(tl.abs(x)))
    r = tl.where((x < 0.0) & odd, -size, size)
    r = tl.where((x < 0.0) & ~whole & (x > -INF), float("nan"), r)
    return tl.where((y == 0.0) | (x == 1.0), 1.0, r)


@triton.jit
def reshape(scale, shift, low, high, sign, peak, least, maps_ptr, maps, x_ptr, V, TOP: tl.constexpr, BLOCK: tl.constexpr):
    """Append a map as in `decal.kernels.reference.affine`; an infinite scale keeps the modes. The new interval and so on."""
    top = value_at(peak, sign, maps_ptr, maps)
    limit = tl.abs(scale) == INF
    if limit:
        low = first_from(top, False, low, high, sign, maps_ptr, maps)
    fits = tl.abs(scale * top + shift) < INF
    tl.store(maps_ptr + 3 * maps, tl.where(limit, 1.0, scale))
    tl.store(maps_ptr + 3 * maps + 1, tl.where(fits | limit, 0.0, top))
    tl.store(maps_ptr + 3 * maps + 2, tl.where(fits & (limit == 0), shift, 0.0))
    if (scale < 0) & (limit == 0):
        sign, least = -sign, -peak
        low, high = -high, -low
        peak = largest_within(x_ptr, V, low, high, sign, TOP, BLOCK)
        peak = tl.where(peak == NOWHERE, 0, peak)
    return low, high, sign, peak, least


@triton.jit
def cut(bottom, ceiling, low, high, sign, peak, near, maps_ptr, maps, x_ptr, V, TOP: tl.constexpr, BLOCK: tl.constexpr):
    """The interval, and its largest u, of what is kept of the values in [bottom, ceiling], or all where there are none.

    The largest is usually known: it stays, or the last `Op.NEAREST` has seen it.
    """
    begin, end = low, high
    if bottom == bottom:
        begin = first_from(bottom, False, low, high, sign, maps_ptr, maps)
    if ceiling < INF:
        end = first_from(ceiling, True, low, high, sign, maps_ptr, maps) - 1
    top = peak
    if peak > end:
        known = (near >= begin) & (near <= end) & (value_at(near, sign, maps_ptr, maps) == ceiling)
        top = near
        if known == 0:
            top = largest_within(x_ptr, V, begin, end, sign, TOP, BLOCK)
    inside = (top >= begin) & (top <= end)
    return tl.where(inside, begin, low), tl.where(inside, end, high), tl.where(inside, top, peak)


@triton.jit
def run(pc, code_ptr, regs_ptr, maps_ptr, maps, state_ptr, x_ptr, V, TOP: tl.constexpr, BLOCK: tl.constexpr):
    """Execute instructions from ``pc`` to the next that reads the row.

    Scalars are stored by one thread and loaded by all, hence the barriers.
    """
    low, high = tl.load(state_ptr + LOW), tl.load(state_ptr + HIGH)
    sign, peak = tl.load(state_ptr + SIGN), tl.load(state_ptr + PEAK)
    least, near = tl.load(state_ptr + LEAST), tl.load(state_ptr + NEAR)
    op = tl.load(code_ptr + pc * FIELDS)
    while (op != 0) & ((op < READ_FROM) | (op == OP_AFFINE) | (op == OP_BAND)):
        at = code_ptr + pc * FIELDS
        a, b = tl.load(regs_ptr + tl.load(at + 2)), tl.load(regs_ptr + tl.load(at + 3))
        if op == OP_PEAK:
            tl.store(regs_ptr + tl.load(at + 1), value_at(peak, sign, maps_ptr, maps))
        elif op < OP_PEAK:
            tl.store(regs_ptr + tl.load(at + 1), arithmetic(op, a, b, tl.load(regs_ptr + tl.load(at + 4))))
        elif op == OP_AFFINE:
            low, high, sign, peak, least = reshape(a, b, low, high, sign, peak, least, maps_ptr, maps, x_ptr, V, TOP, BLOCK)
            maps += 1
            near = 0 * near + NOWHERE
        else:
            low, high, peak = cut(a, b, low, high, sign, peak, near, maps_ptr, maps, x_ptr, V, TOP, BLOCK)
        tl.debug_barrier()
        pc += 1
        op = tl.load(code_ptr + pc * FIELDS)
    tl.store(state_ptr + LOW, low)
    tl.store(state_ptr + HIGH, high)
    tl.store(state_ptr + SIGN, sign)
    tl.store(state_ptr + PEAK, peak)
    tl.store(state_ptr + LEAST, least)
    tl.store(state_ptr + NEAR, near)


@triton.jit
def is_last(state_ptr, G):
    """Publish what this program has written, and say whether it is the last of its row to do so.

    The barrier makes the writes of all threads part of what the atomic releases. Whoever is last reads past the first cache.
    """
    tl.debug_barrier()
    last = tl.atomic_add(state_ptr + ARRIVED, 1, sem="acq_rel") == G - 1
    if last:
        tl.store(state_ptr + ARRIVED, 0)
    return last


@triton.jit
def take(ptr):
    """The number that the programs of a row have accumulated; 0 is left."""
    found = tl.load(ptr, cache_modifier=".cg")
    tl.debug_barrier()
    tl.store(ptr, tl.zeros_like(found))
    return found


# ---- selection


@triton.jit
def cost_of(v, center, KIND: tl.constexpr):
    """What a selection takes the tokens in increasing order of."""
    return tl.abs(v - center) if KIND == NEAREST else -v


@triton.jit
def worth_of(v, top, KIND: tl.constexpr):
    """What a token adds to a selection."""
    if KIND == COUNT_UPPER:
        return tl.full(v.shape, 1, tl.int32)  # in half of the registers that masses take
    else:  # noqa: RET505 - Triton compiles what stands behind a return, too
        return fixed(weight(v - top))


@triton.jit
def bin_scale(share, center, top, V, NB: tl.constexpr, KIND: tl.constexpr):
    """Bins per unit of cost. Tokens so unlikely that all of them together can't matter fall behind the last bin."""
    rest = tl.maximum(1.0 - share, 1e-13)
    reach = tl.minimum(tl.log(tl.full((), V, tl.float64)) - tl.log(rest) + 0.01, 30.0)
    reach = tl.maximum(reach, 0.01)
    if KIND == NEAREST:
        reach = tl.maximum(tl.abs(top - center), tl.abs(center - top + reach))
    return NB / reach


@triton.jit
def bin_of(v, center, top, scale, NB: tl.constexpr, KIND: tl.constexpr):
    """Bin of a value by its cost, NB behind the last; bins of counts get wider with distance, and the last has no end."""
    if KIND == COUNT_UPPER:
        x = tl.minimum(top - v, 1e30).to(tl.float32) * 16.0 + 1.0
        SHIFT: tl.constexpr = 31 - NB.bit_length()  # 16 octaves
        return tl.minimum((x.to(tl.int32, bitcast=True) >> SHIFT) - (127 << (23 - SHIFT)), NB - 1)
    far = tl.abs(v - center) if KIND == NEAREST else top - v
    return tl.minimum(far * scale, NB * 1.0).to(tl.int32)


@triton.jit
def bracket(down, up, count, target, total, gap, scale, V, NB: tl.constexpr, KIND: tl.constexpr):
    """First and last bin in which the mass may reach ``target``, from the counts of the bins below and above the center.

    The mass up to a bin is bounded by what its tokens can weigh, and by the whole less what the tokens behind it can.
    """
    bins = tl.arange(0, NB)
    near, far = bins.to(tl.float64) / scale, (bins + 1).to(tl.float64) / scale
    most = down * tl.exp(tl.minimum(gap - near, 0.0))
    fewest = down * tl.exp(tl.minimum(gap - far, 0.0))
    if KIND == NEAREST:
        most += up * tl.exp(tl.minimum(gap + far, 0.0))
        fewest += up * tl.exp(tl.minimum(gap + near, 0.0))
    # Rounding of the bins, of the exponentials and of the masses themselves.
    slack = tl.full((), V, tl.float64) * UNIT + 1e-12
    upper, lower = tl.cumsum(most, 0) * (1 + 1e-9) + slack, tl.cumsum(fewest, 0) * (1 - 1e-9) - slack
    behind = (count - tl.sum((down + up).to(tl.int64), 0)).to(tl.float64) * tl.exp(tl.minimum(gap - NB / scale, 0.0))
    whole = total.to(tl.float64) * UNIT
    rest_most = tl.sum(most, 0) * (1 + 1e-9) + behind + slack - tl.cumsum(most, 0) * (1 - 1e-9)
    rest_fewest = tl.sum(fewest, 0) * (1 - 1e-9) - slack - tl.cumsum(fewest, 0) * (1 + 1e-9)
    upper = tl.minimum(upper, whole - rest_fewest)
    lower = tl.maximum(lower, whole - rest_most)
    wanted = target.to(tl.float64) * UNIT
    first = tl.min(tl.where(upper >= wanted, bins, NB - 1), 0)
    last = tl.min(tl.where(lower >= wanted, bins, NB - 1), 0)
    return first, last


@triton.jit
def candidate(source_ptr, i, n, low, high, sign, scale, origin, shift, maps_ptr, maps, center, TOP: tl.constexpr,
              KIND: tl.constexpr):  # fmt: skip
    """Order, value and u of some tokens of a row or a list, and which of them are kept."""
    z = load_logits(source_ptr, i + tl.arange(0, SUB), n, TOP, ".cg")
    u = to_key(z) * sign
    kept = (u >= low) & (u <= high)
    v = value_of(tl.where(kept, z, 0.0), scale, origin, shift, maps_ptr, maps)
    return to_long(cost_of(v, center, KIND)), v, u, kept


@triton.jit
def pick(source_ptr, n, target, first, last, low, high, sign, top, center, maps_ptr, maps, TOP: tl.constexpr,
         KIND: tl.constexpr):  # fmt: skip
    """The order of the token at which the sum of what tokens are worth reaches ``target``; it is in [first, last].

    Every round splits the range of orders evenly, and goes on with the part that holds the token, cut to what is there. No
    round leaves the range as it was: the first pivot is the smallest order.
    """
    scale, origin, shift = first_map(maps_ptr, maps)
    split = tl.arange(0, PIVOTS).to(tl.int64)
    first, last = 0 * target + first, 0 * target + last
    while first < last:
        width = (last >> 3) - (first >> 3) + 1
        pivot = tl.minimum(first + split * width, last)
        sums = tl.zeros([SUB, PIVOTS], tl.int64)
        for i in range(0, n, SUB):
            order, v, _u, kept = candidate(source_ptr, i, n, low, high, sign, scale, origin, shift, maps_ptr, maps, center,
                                           TOP, KIND)  # fmt: skip
            worth = tl.where(kept & (order >= first), worth_of(v, top, KIND), 0)
            sums += tl.where(order[:, None] <= pivot[None, :], worth[:, None], 0)
        reached = tl.sum(sums, 0)
        short = reached < target
        done = tl.sum(short.to(tl.int64), 0)
        target -= tl.max(tl.where(short, reached, 0), 0)
        begin = tl.where(done > 0, first + (done - 1) * width + 1, first)
        end = tl.where(done < PIVOTS, tl.minimum(first + done * width, last), last)
        first, last = tl.full((), LONG_MAX, tl.int64), tl.full((), LONG_MIN, tl.int64)
        for i in range(0, n, SUB):
            order, v, _u, kept = candidate(source_ptr, i, n, low, high, sign, scale, origin, shift, maps_ptr, maps, center,
                                           TOP, KIND)  # fmt: skip
            inside = kept & (order >= begin) & (order <= end)
            first = tl.minimum(first, tl.min(tl.where(inside, order, LONG_MAX), 0))
            last = tl.maximum(last, tl.max(tl.where(inside, order, LONG_MIN), 0))
    return first


@triton.jit
def ends(source_ptr, n, order_max, low, high, sign, center, maps_ptr, maps, TOP: tl.constexpr, KIND: tl.constexpr):
    """Smallest and largest u of the tokens of order up to ``order_max``."""
    scale, origin, shift = first_map(maps_ptr, maps)
    smallest, largest = 0 * low + KEY_MAX, 0 * low + KEY_MIN
    for i in range(0, n, SUB):
        order, _v, u, kept = candidate(source_ptr, i, n, low, high, sign, scale, origin, shift, maps_ptr, maps, center, TOP,
                                       KIND)  # fmt: skip
        inside = kept & (order <= order_max)
        smallest = tl.minimum(smallest, tl.min(tl.where(inside, u, KEY_MAX), 0))
        largest = tl.maximum(largest, tl.max(tl.where(inside, u, KEY_MIN), 0))
    return smallest, largest
