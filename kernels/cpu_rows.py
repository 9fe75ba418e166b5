"""The compiled CPU code: one interpreter that runs any `decal.kernels.program.Program` on rows of logits.

Compiled by numba on first use and kept on disk, so a program costs no compilation. (All of it is in this file, because what is
kept is thrown away when the file changes, and only then.)

How a row is read. Its elements lie in *groups* of 32 with known maxima, so that the few elements above a level are found
without looking at the others. Cuts are kept as an interval of raw logits; the elements inside are gathered when somebody reads
them. Nothing is ever sorted but candidates: a selection by mass looks at the head of the row if that is likely to hold the
answer, and else divides the mass between bins and sorts the one in which the answer lies.

Legend: ``x`` raw logits, ``lo``, ``hi`` the raw interval that is kept, ``maps`` the affine maps so far, (k, 3) scale, level
subtracted before, shift; a *value* is a raw logit after all maps, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic, overload

from decal.kernels import mass as integer
from decal.kernels import random
from decal.kernels.program import FIELDS, MOMENT_NAMES, TOP_SET, Op
from decal.kernels.statistics import FARTHEST

LOG2E, ROUND, LOWEST, FIXED, UNIT = integer.LOG2E, integer.ROUND, integer.LOWEST, integer.FIXED, integer.UNIT
FIXED_BITS, FINER = integer.FIXED_BITS, integer.FINER
C0, C1, C2, C3, C4, C5, C6, C7, C8 = integer.COEFFICIENTS
GOLDEN, MIX_1, MIX_2 = random.GOLDEN, *random.MULTIPLIERS
INF = math.inf
BIG = float(np.finfo(np.float64).max)

BLOCK = 1024
"""Elements that go through a buffer at once; 32 groups of 32."""
SORTED_AT_ONCE = 2048
"""Rows or rests of this size are sorted instead of searched."""
SAMPLE = 512
"""Elements whose masses give the first estimate of a threshold."""
BINS = 1024
"""Bins of equal width between which the mass of a row is divided to see where a share of it is reached."""
LANES = 64
"""Top sets that are scored together."""

# Instructions, as globals that numba sees as constants.
END, ADD, SUB, MUL, DIV, POW = map(int, (Op.END, Op.ADD, Op.SUB, Op.MUL, Op.DIV, Op.POW))
MIN, MAX, LT, LE, EQ, NE, AND, OR = map(int, (Op.MIN, Op.MAX, Op.LT, Op.LE, Op.EQ, Op.NE, Op.AND, Op.OR))
NEG, LOG, EXP, SQRT, LOG1P, EXPM1 = map(int, (Op.NEG, Op.LOG, Op.EXP, Op.SQRT, Op.LOG1P, Op.EXPM1))
FLOOR, NEAREST_INTEGER, ABS, NOT, WHERE = map(int, (Op.FLOOR, Op.ROUND, Op.ABS, Op.NOT, Op.WHERE))
PEAK, MOMENTS, COUNT_UPPER, MASS_UPPER = map(int, (Op.PEAK, Op.MOMENTS, Op.COUNT_UPPER, Op.MASS_UPPER))
NEAREST, SMALLEST, CURVATURE, AFFINE, BAND = map(int, (Op.NEAREST, Op.SMALLEST, Op.CURVATURE, Op.AFFINE, Op.BAND))
LONGEST, BEST, SCORE = map(int, (Op.LONGEST, Op.BEST, Op.SCORE))
N_, S_, T_, Q_, H_, A_, B_ = (1 << i for i in range(len(MOMENT_NAMES)))
MOMENT_COUNT = len(MOMENT_NAMES)

MASK, VALUES, TOKENS = 0, 1, 2
"""What is written: kept logits as they came, values, drawn tokens."""

BAD, EMPTY, UNFIT = 1, 2, 4
"""Flags of a row: it has NaN or +inf; it has nothing finite; a map turns it around, which this code doesn't do."""

_jit = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)


# ---- numbers


@_jit
def _weight(d):
    """See `decal.kernels.mass.weight`."""
    y = d * LOG2E
    y = y if y > LOWEST else LOWEST
    t = y + ROUND
    f = y - (t - ROUND)
    p = C8
    p = p * f + C7
    p = p * f + C6
    p = p * f + C5
    p = p * f + C4
    p = p * f + C3
    p = p * f + C2
    p = p * f + C1
    p = p * f + C0
    return np.int64(np.float64(p).view(np.int64) + (np.float64(t).view(np.int64) << 52)).view(np.float64)


@_jit
def _fixed(x):
    """See `decal.kernels.mass.fixed`."""
    return np.float64(x + FIXED).view(np.int64) - FIXED_BITS


@_jit
def _needed(share, total):
    """See `decal.kernels.mass.needed`."""
    wanted = math.ceil(share * np.float64(total))
    if not wanted > 1.0:
        return np.int64(1)
    return total if wanted >= np.float64(total) else np.int64(wanted)


@_jit
def _mix(x):
    """See `decal.kernels.random.mix`."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * np.int64(MIX_1)
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * np.int64(MIX_2)
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@_jit
def _uniform(bits):
    """52 of 64 random bits as a number at the middle of their interval in (0, 1); see `decal.kernels.random.exponential`."""
    return np.int64(((bits >> 12) & 0xFFFFFFFFFFFFF) | 0x3FF0000000000000).view(np.float64) - 1.0 + 2.0**-53


def _key(x):
    """An integer that grows with the float ``x``."""


@overload(_key)
def _key_of(x):
    if x == types.float32:

        def key(x):
            b = np.float32(x).view(np.int32)
            return np.int64(b if b >= 0 else b ^ 0x7FFFFFFF)
    else:

        def key(x):
            b = np.float64(x).view(np.int64)
            return b if b >= 0 else b ^ 0x7FFFFFFFFFFFFFFF

    return key


def _unkey(key, like):
    """The float of a key, of the type of ``like``."""


@overload(_unkey)
def _unkey_of(key, like):
    if like == types.float32:

        def unkey(key, like):
            b = np.int32(key)
            return np.int32(b if b >= 0 else b ^ np.int32(0x7FFFFFFF)).view(np.float32)
    else:

        def unkey(key, like):
            return np.int64(key if key >= 0 else key ^ 0x7FFFFFFFFFFFFFFF).view(np.float64)

    return unkey


@_jit
def _value(x, maps, k):
    """The value of a raw logit."""
    v = np.float64(x)
    for j in range(k):
        v = maps[j, 0] * (v - maps[j, 1]) + maps[j, 2]
        v = v if v > -BIG else -BIG
    return v


@_jit
def _values(x, start, stop, maps, k, buffer):
    """Values of x[start:stop]."""
    part, values = x[start:stop], buffer[: stop - start]
    if k == 0:
        for i in range(part.shape[0]):
            values[i] = part[i]
        return
    scale, before, shift = maps[0, 0], maps[0, 1], maps[0, 2]
    for i in range(part.shape[0]):
        v = scale * (part[i] - before) + shift
        values[i] = v if v > -BIG else -BIG
    for j in range(1, k):
        scale, before, shift = maps[j, 0], maps[j, 1], maps[j, 2]
        for i in range(values.shape[0]):
            v = scale * (values[i] - before) + shift
            values[i] = v if v > -BIG else -BIG


@_jit
def _first_at_least(level, maps, k, ends):
    """The smallest raw logit, of all finite floats, whose value is at least ``level``; inf if none is."""
    low, high = _key(ends[3]), _key(ends[4])
    if not _value(ends[4], maps, k) >= level:
        return ends[1]
    while low < high:
        middle = (low & high) + ((low ^ high) >> 1)
        if _value(_unkey(middle, ends[0]), maps, k) >= level:
            high = middle
        else:
            low = middle + 1
    return _unkey(low, ends[0])


@_jit
def _last_at_most(level, maps, k, ends):
    """The largest raw logit, of all finite floats, whose value is at most ``level``; -inf if none is."""
    low, high = _key(ends[3]), _key(ends[4])
    if not _value(ends[3], maps, k) <= level:
        return ends[0]
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)
        if _value(_unkey(middle, ends[0]), maps, k) <= level:
            low = middle
        else:
            high = middle - 1
    return _unkey(low, ends[0])


# ---- groups and candidates


@_jit
def _group_maxima(x, n, maxima, ends):
    """Maxima of the groups of x[:n]: element i lies in column i % 32 of block i // 1024. Returns how many; NaN is ignored."""
    whole = n // BLOCK
    for block in range(whole):
        base = block * BLOCK
        for j in range(32):
            m = ends[0]
            for i in range(32):
                v = x[base + i * 32 + j]
                m = v if v > m else m
            maxima[block * 32 + j] = m
    base = whole * BLOCK
    for j in range(min(32, n - base)):
        m = ends[0]
        for i in range(base + j, n, 32):
            v = x[i]
            m = v if v > m else m
        maxima[whole * 32 + j] = m
    return whole * 32 + min(32, n - base)


@_jit
def _largest(x, n, ends):
    # Four at once, as each comparison waits for the one before.
    a = b = c = d = ends[0]
    for i in range(0, n - 3, 4):
        a = x[i] if x[i] > a else a
        b = x[i + 1] if x[i + 1] > b else b
        c = x[i + 2] if x[i + 2] > c else c
        d = x[i + 3] if x[i + 3] > d else d
    for i in range(n - n % 4, n):
        a = x[i] if x[i] > a else a
    return max(max(a, b), max(c, d))


@_jit
def _gather_groups(x, n, maxima, groups, low, found, places, most):
    """Elements of at least ``low``, by groups; stops at more than ``most``."""
    count = 0
    for g in range(groups):
        if maxima[g] >= low:
            start = (g >> 5) * BLOCK + (g & 31)
            for i in range(start, min(start + BLOCK - (g & 31), n), 32):
                if x[i] >= low:
                    found[count] = x[i]
                    places[count] = i
                    count += 1
            if count > most:
                return count
    return count


@_jit
def _gather(x, n, low, high, found, places, marks):
    """Elements in [low, high], in order."""
    part, inside = x[:n], marks[:n]
    for i in range(part.shape[0]):
        inside[i] = np.uint8((part[i] >= low) & (part[i] <= high))
    for i in range(n, (n + 7) & ~7):
        marks[i] = 0
    words = marks[: (n + 7) & ~7].view(np.uint64)
    count = 0
    for w in range(words.shape[0]):
        if words[w] != 0:
            for i in range(w * 8, min(w * 8 + 8, n)):
                found[count] = x[i]
                places[count] = i
                count += marks[i]
    return count


@_jit
def _spread(x, n, low, high, ends):
    """Smallest and largest element in [low, high] that is above -inf; (inf, -inf) if there is none."""
    unreached, dropped = ends[1], ends[0]
    least, most = unreached, dropped
    low = max(low, ends[3])
    part = x[:n]
    for i in range(part.shape[0]):
        v = part[i]
        inside = (v >= low) & (v <= high)
        down = v if inside else unreached
        up = v if inside else dropped
        least = down if down < least else least
        most = up if up > most else most
    return least, most


def _sort_descending(values, n, scratch, keys):
    """Sort values[:n] in decreasing order."""


@overload(_sort_descending)
def _sort_descending_of(values, n, scratch, keys):
    if values.dtype == types.float32:

        def sort(values, n, scratch, keys):
            _sort_32(values, n, scratch, keys)
    else:

        def sort(values, n, scratch, keys):
            values[:n] = -np.sort(-values[:n])

    return sort


@_jit
def _sort_32(values, n, scratch, keys):
    if n <= 48:
        for i in range(1, n):
            v = values[i]
            j = i
            while j > 0 and values[j - 1] < v:
                values[j] = values[j - 1]
                j -= 1
            values[j] = v
        return
    # Least significant digit first, 11 bits at a time, on keys that fall with the value.
    bits = values[:n].view(np.uint32)
    counts = np.zeros((3, 2048), np.int32)
    a, b = keys[:n], scratch[:n]
    for i in range(n):
        u = bits[i]
        u = u if u >> np.uint32(31) else ~u & np.uint32(0x7FFFFFFF)
        a[i] = u
        counts[0, u & np.uint32(2047)] += 1
        counts[1, (u >> np.uint32(11)) & np.uint32(2047)] += 1
        counts[2, u >> np.uint32(22)] += 1
    for digit in range(3):
        shift = np.uint32(11 * digit)
        c = counts[digit]
        if c[(a[0] >> shift) & np.uint32(2047)] == n:
            continue
        total = np.int32(0)
        for d in range(2048):
            here = c[d]
            c[d] = total
            total += here
        for i in range(n):
            d = (a[i] >> shift) & np.uint32(2047)
            b[c[d]] = a[i]
            c[d] += 1
        a, b = b, a
    for i in range(n):
        u = a[i]
        bits[i] = u if u >> np.uint32(31) else ~u & np.uint32(0x7FFFFFFF)


# ---- sums


@_jit
def _mass_of(x, n, maps, k, peak, buffer):
    """Integer mass of x[:n]."""
    total = np.int64(0)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        _values(x, start, stop, maps, k, buffer)
        values = buffer[: stop - start]
        for i in range(values.shape[0]):
            total += _fixed(_weight(values[i] - peak))
    return total


@_jit
def _scatter(places, masses, bins):
    """Add each mass to its bin."""
    # Two tables in turn, so that equal bins one after the other do not wait for each other.
    first, second = bins[0], bins[1]
    half = places.shape[0] >> 1
    for i in range(half):
        first[np.uintp(places[i])] += masses[i]
        second[np.uintp(places[half + i])] += masses[half + i]
    for i in range(2 * half, places.shape[0]):
        first[np.uintp(places[i])] += masses[i]


@_jit
def _crossed(bins, share, total):
    """The bin at which the running mass reaches a share of ``total``, or of what is in the bins if that is -1; the mass before
    it, and the mass to be reached."""
    inside = np.int64(0)
    for b in range(BINS + 1):
        bins[0, b] += bins[1, b]
        inside += bins[0, b]
    target = _needed(share, inside if total < 0 else total)
    b, reached = np.int64(0), np.int64(0)
    while b < BINS and reached + bins[0, b] < target:
        reached += bins[0, b]
        b += 1
    return b, reached, target


@_jit
def _bin_below(x, top, scale):
    """Number of the bin of a raw logit: they have equal width, down from ``top``, and the last one takes the rest."""
    r = (top - x) * scale
    return np.uint32(np.int32(r if r < BINS else BINS))


@_jit
def _upper_bin(x, n, top, lowest, maps, k, peak, share, total, work):
    """The elements, into ``work.found``, among which a share of ``total`` (see `_crossed`) is reached from the top; how many,
    the mass above them, and the mass to be reached. They are likely to be above ``lowest``."""
    # In the type of the logits: all that matters is that a larger logit has no larger number.
    scale = work.ends[5] * BINS / max(top - lowest, work.ends[6])
    work.bins[:] = 0
    places, masses = np.empty(BLOCK, np.uint32), np.empty(BLOCK, np.int64)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        part, place, mass = x[start:stop], places[: stop - start], masses[: stop - start]
        if k == 0:
            for i in range(part.shape[0]):
                mass[i] = _fixed(_weight(np.float64(part[i]) - peak))
        else:
            _values(x, start, stop, maps, k, work.buffer)
            values = work.buffer[: stop - start]
            for i in range(values.shape[0]):
                mass[i] = _fixed(_weight(values[i] - peak))
        for i in range(part.shape[0]):
            place[i] = _bin_below(part[i], top, scale)
        _scatter(place, mass, work.bins)
    b, above, target = _crossed(work.bins, share, total)
    # The raw logits of a bin are an interval.
    low, high = _edge(b + 1, top, scale, work.ends), _edge(b, top, scale, work.ends)
    count = _gather_values(x, n, low, high, work.found, work.marks)
    return count, above, target


@_jit
def _edge(b, top, scale, ends):
    """The largest raw logit up to ``top`` whose bin is at least ``b``; -inf if there is none."""
    if b > BINS:
        return ends[0]
    low, high = _key(ends[3]), _key(top)
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)
        if _bin_below(_unkey(middle, top), top, scale) >= b:
            low = middle
        else:
            high = middle - 1
    return _unkey(low, top)


@_jit
def _gather_values(x, n, low, high, found, marks):
    """Elements in (low, high] that are above -inf, without their places."""
    part, inside = x[:n], marks[:n]
    for i in range(part.shape[0]):
        inside[i] = np.uint8((part[i] > low) & (part[i] <= high))
    marks[n : (n + 7) & ~7] = 0
    words = marks[: (n + 7) & ~7].view(np.uint64)
    count = np.int64(0)
    for w in range(words.shape[0]):
        if words[w] != 0:
            for i in range(w * 8, min(w * 8 + 8, n)):
                found[count] = x[i]
                count += np.int64(marks[i])
    return count


@_jit
def _bin_around(v, center, scale):
    """Number of the bin of a value: they have equal width, in distance from ``center``, and the last one takes the rest."""
    r = abs(v - center) * scale
    return np.uint32(np.int32(r if r < BINS else BINS))


@_jit
def _nearest_bin(x, n, maps, k, peak, center, share, work):
    """The elements, into ``work.found``, among which a share of the mass is reached from ``center`` outwards; how many, the
    mass nearer than they, and the mass to be reached."""
    # Beyond this distance nothing has mass.
    scale = BINS / max(peak - center, 30.0 - (peak - center))
    work.bins[:] = 0
    places, masses = np.empty(BLOCK, np.uint32), np.empty(BLOCK, np.int64)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        _values(x, start, stop, maps, k, work.buffer)
        values, place, mass = work.buffer[: stop - start], places[: stop - start], masses[: stop - start]
        for i in range(values.shape[0]):
            mass[i] = _fixed(_weight(values[i] - peak))
            place[i] = _bin_around(values[i], center, scale)
        _scatter(place, mass, work.bins)
    b, nearer, target = _crossed(work.bins, share, np.int64(-1))
    count = np.int64(0)
    dropped = work.ends[0]
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        size = stop - start
        _values(x, start, stop, maps, k, work.buffer)
        part, values, marks = x[start:stop], work.buffer[:size], work.marks[:size]
        for i in range(values.shape[0]):
            marks[i] = np.uint8((_bin_around(values[i], center, scale) == b) & (part[i] > dropped))
        work.marks[size : (size + 7) & ~7] = 0
        words = work.marks[: (size + 7) & ~7].view(np.uint64)
        for w in range(words.shape[0]):
            if words[w] != 0:
                for i in range(w * 8, min(w * 8 + 8, size)):
                    work.found[count] = part[i]
                    count += np.int64(marks[i])
    return count, nearer, target


@_jit
def _moments(x, n, maps, k, peak, wanted, buffer, out, ends):
    """Moments of the kept x[:n], all of which are inside, relative to ``peak``; see `decal.kernels.statistics.MOMENTS`.

    Returns the integer mass, or -1 if it wasn't asked for.
    """
    exponent = np.int64(0)
    if wanted & (A_ | B_):
        least, _ = _spread(x, n, ends[0], ends[1], ends)
        exponent = np.int64(math.frexp(_value(least, maps, k) - peak)[1])
    unit = math.ldexp(1.0, -max(exponent, -1000))
    sums = np.zeros((MOMENT_COUNT, 2), np.int64)
    dropped = ends[0]
    t = 0.0
    weights, terms = np.empty(BLOCK), np.empty(BLOCK)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        _values(x, start, stop, maps, k, buffer)
        part, d, e, term = x[start:stop], buffer[: stop - start], weights[: stop - start], terms[: stop - start]
        for i in range(d.shape[0]):
            d[i] -= peak
        if wanted & (S_ | T_ | Q_):
            for i in range(d.shape[0]):
                e[i] = _weight(d[i])
            if wanted & S_:
                _add(e, sums[1])
            if wanted & T_:
                for i in range(d.shape[0]):
                    # Nothing weighs anything down there, and -inf times 0 is none.
                    w = (d[i] if d[i] > FARTHEST else FARTHEST) * e[i]
                    term[i] = w if part[i] > dropped else 0.0
                t += _total(term)
            if wanted & Q_:
                for i in range(d.shape[0]):
                    term[i] = e[i] * e[i]
                _add(term, sums[3])
        if wanted & H_:
            for i in range(d.shape[0]):
                term[i] = _weight(0.5 * d[i])
            _add(term, sums[4])
        if wanted & (N_ | A_ | B_):
            count = np.int64(0)
            for i in range(part.shape[0]):
                count += np.int64(part[i] > dropped)
            sums[0, 0] += count
        if wanted & (A_ | B_):
            for i in range(d.shape[0]):
                term[i] = d[i] * unit if part[i] > dropped else 0.0
            _add(term, sums[5])
            for i in range(d.shape[0]):
                term[i] *= term[i]
            _add(term, sums[6])
    out[0] = np.float64(sums[0, 0])
    for m in range(1, MOMENT_COUNT):
        out[m] = _joined(sums[m, 0], sums[m, 1])
    out[2] = t
    out[5] = math.ldexp(out[5], exponent)
    out[6] = math.ldexp(out[6], 2 * exponent)
    return sums[1, 0] if wanted & S_ else np.int64(-1)


@_jit
def _add(terms, sums):
    """Add each of ``terms`` to the two limbs of a sum; see `decal.kernels.mass.limbs`."""
    high, low = np.int64(0), np.int64(0)
    for i in range(terms.shape[0]):
        moved = terms[i] + FIXED
        high += np.float64(moved).view(np.int64) - FIXED_BITS
        low += _fixed((terms[i] - (moved - FIXED)) * FINER)
    sums[0] += high
    sums[1] += low


@_jit
def _total(terms):
    """The sum of ``terms``, which it overwrites, in an order that owes nothing to how wide a processor's registers are."""
    size = terms.shape[0]
    half = BLOCK >> 1
    while half:
        upper = terms[half:size] if half < size else terms[:0]
        for i in range(upper.shape[0]):
            terms[i] += upper[i]
        size = min(size, half)
        half >>= 1
    return terms[0]


@_jit
def _joined(high, low):
    """See `decal.kernels.mass.joined`."""
    return np.float64(high) * UNIT + np.float64(low) * (UNIT / FINER)


# ---- selection


@_jit
def _level_of(maxima, groups, wanted, work):
    """A level that at least ``wanted`` elements reach, near the smallest of them, for at most half as many as there are groups
    of groups, or of groups; -inf for more."""
    wide = groups // 32
    if wanted * 2 <= wide:
        for g in range(wide):
            m = maxima[g * 32]
            for i in range(g * 32 + 1, g * 32 + 32):
                m = maxima[i] if maxima[i] > m else m
            work.found[g] = m
        _sort_descending(work.found, wide, work.scratch, work.keys)
        return work.found[wanted - 1]
    if wanted * 2 <= groups:
        work.found[:groups] = maxima[:groups]
        _sort_descending(work.found, groups, work.scratch, work.keys)
        return work.found[wanted - 1]
    return work.ends[0]


@_jit
def _rank(x, n, maxima, groups, wanted, work):
    """Elements of x[:n] in decreasing order into ``work.found``, at least the first ``wanted``; returns how many, and whether
    these are all."""
    level = work.ends[0]
    if n > SORTED_AT_ONCE:
        level = _level_of(maxima, groups, wanted, work)
    if level > work.ends[0]:
        count = _gather_groups(x, n, maxima, groups, level, work.found, work.places, n)
    else:
        count = np.int64(0)
        for i in range(n):
            work.found[count] = x[i]
            count += np.int64(x[i] > work.ends[0])
    _sort_descending(work.found, count, work.scratch, work.keys)
    return count, level == work.ends[0]


@_jit
def _count_upper(x, n, maxima, groups, count, work):
    """Raw logit of the ``count``-th largest element, or of the last one."""
    wanted = np.int64(min(max(count, 1.0), np.float64(n))) if count == count else np.int64(1)
    known, _ = _rank(x, n, maxima, groups, wanted, work)
    return work.found[max(min(wanted, known) - 1, 0)]


@_jit
def _walk(found, count, reached, target, maps, k, peak):
    """Raw logit at which the running mass of ``found``, on top of ``reached``, comes to ``target``; and whether it does."""
    weights = np.empty(LANES)
    for start in range(0, count, LANES):
        stop = min(start + LANES, count)
        _values(found, start, stop, maps, k, weights)
        some = weights[: stop - start]
        for i in range(some.shape[0]):
            some[i] = _weight(some[i] - peak)
        for i in range(some.shape[0]):
            reached += _fixed(some[i])
            if reached >= target:
                return found[start + i], True
    return found[max(count - 1, 0)], False


@_jit
def _mass_upper(x, n, maxima, groups, maps, k, peak, share, total, work):
    """Raw logit of the last element of the smallest top set of a share of the mass; ``total`` is the mass, or -1."""
    if n <= SORTED_AT_ONCE:
        count, _ = _rank(x, n, maxima, groups, n, work)
        if total < 0:
            total = _mass_of(work.found, count, maps, k, peak, work.buffer)
        return _walk(work.found, count, np.int64(0), _needed(share, total), maps, k, peak)[0]
    heads, enough, level = _head_holds(x, n, maxima, groups, maps, k, peak, share, work)
    if total < 0 and (enough or level > work.ends[0]):
        total = _mass_of(x, n, maps, k, peak, work.buffer)
    if enough:
        _sort_descending(work.found, heads, work.scratch, work.keys)
        answer, reached = _walk(work.found, heads, np.int64(0), _needed(share, total), maps, k, peak)
        if reached:
            return answer
    top = _largest(maxima, groups, work.ends)
    if level > work.ends[0]:
        some = _gather_values(x, n, level, top, work.found, work.marks)
        answer, reached = _upper_among(work.found, some, top, level, maps, k, peak, share, total, work)
        if reached:
            return answer
    # What is below 1 - share of the mass even if every element had as much of it as this one is never needed.
    reach = min(30.0, math.log(np.float64(n) / max(1.0 - share, 1e-9)) + 0.01)
    lowest = max(_first_at_least(peak - reach, maps, k, work.ends), work.ends[3])
    return _upper_among(x, n, top, lowest, maps, k, peak, share, total, work)[0]


@_jit
def _upper_among(x, n, top, lowest, maps, k, peak, share, total, work):
    """Raw logit of the last of the elements x[:n], of which the first ones hold a share of ``total``, and whether they do;
    ``x`` may be ``work.found``."""
    count, above, target = _upper_bin(x, n, top, lowest, maps, k, peak, share, total, work)
    _sort_descending(work.found, count, work.scratch, work.keys)
    return _walk(work.found, count, above, target, maps, k, peak)


@_jit
def _head_holds(x, n, maxima, groups, maps, k, peak, share, work):
    """The largest few elements, into ``work.found``: how many, and whether they are likely to hold a share of the mass; and a
    level above which few elements are likely to hold it, -inf if it takes many."""
    dropped = work.ends[0]
    level = _level_of(maxima, groups, max(1, min(32, groups // 64)), work)
    heads = _gather_groups(x, n, maxima, groups, level, work.found, work.places, np.int64(SAMPLE))
    if heads > SAMPLE:
        return heads, False, dropped
    head = np.float64(_mass_of(work.found, heads, maps, k, peak, work.buffer)) * UNIT
    step, factor = n // SAMPLE, np.float64(n) / SAMPLE
    some = np.empty(SAMPLE, x.dtype)
    for j in range(SAMPLE):
        v = x[j * step + j % step]
        some[j] = v if v < level else dropped
    _sort_descending(some, SAMPLE, work.scratch, work.keys)
    values = work.buffer[:SAMPLE]
    _values(some, 0, SAMPLE, maps, k, values)
    for j in range(SAMPLE):
        values[j] = factor * _weight(values[j] - peak)
    rest, square = 0.0, 0.0
    for j in range(SAMPLE):
        rest += values[j]
        square += values[j] * values[j]
    enough = head >= share * (head + rest + 4.0 * math.sqrt(square))
    # Far enough down that it rarely fails, in which case the whole row is divided.
    wanted = (1.0 - 0.25 * (1.0 - share)) * (head + rest)
    j = 0
    while j < SAMPLE // 16 and head < wanted:
        head += values[j]
        j += 1
    return heads, enough, some[j] if head >= wanted else dropped


@_jit
def _nearest(x, n, maps, k, peak, center, share, work):
    """Largest distance from ``center`` of the nearest elements that together hold a share of the mass."""
    count, inside, target = _nearest_bin(x, n, maps, k, peak, center, share, work)
    _sort_descending(work.found, count, work.scratch, work.keys)
    return _walk_out(work.found, count, inside, target, maps, k, peak, center)[0]


@_jit
def _walk_out(found, count, reached, target, maps, k, peak, center):
    """Distance at which the running mass of ``found``, on top of ``reached`` and from the nearest on, comes to ``target``."""
    right = np.int64(0)  # the first below the center
    while right < count and _value(found[right], maps, k) > center:
        right += 1
    left = right - 1
    radius = 0.0
    while left >= 0 or right < count:
        above = _value(found[left], maps, k) - center if left >= 0 else INF
        below = center - _value(found[right], maps, k) if right < count else INF
        if above < below:
            radius, v = above, _value(found[left], maps, k)
            left -= 1
        else:
            radius, v = below, _value(found[right], maps, k)
            right += 1
        reached += _fixed(_weight(v - peak))
        if reached >= target:
            return radius, True
    return radius, False


# ---- arithmetic


@_jit
def _arithmetic(code, at, registers, lanes):
    """Run instruction ``at`` on the first ``lanes`` columns of the registers."""
    op, dst = code[at, 0], registers[code[at, 1]]
    a, b, c = registers[code[at, 2]], registers[code[at, 3]], registers[code[at, 4]]
    if op == ADD:
        for i in range(lanes):
            dst[i] = a[i] + b[i]
    elif op == SUB:
        for i in range(lanes):
            dst[i] = a[i] - b[i]
    elif op == MUL:
        for i in range(lanes):
            dst[i] = a[i] * b[i]
    elif op == DIV:
        for i in range(lanes):
            dst[i] = a[i] / b[i]
    elif op == POW:
        for i in range(lanes):
            dst[i] = a[i] ** b[i]
    elif op == MIN:
        for i in range(lanes):
            dst[i] = a[i] if (a[i] < b[i]) | (a[i] != a[i]) else b[i]
    elif op == MAX:
        for i in range(lanes):
            dst[i] = a[i] if (a[i] > b[i]) | (a[i] != a[i]) else b[i]
    elif op == LT:
        for i in range(lanes):
            dst[i] = np.float64(a[i] < b[i])
    elif op == LE:
        for i in range(lanes):
            dst[i] = np.float64(a[i] <= b[i])
    elif op == EQ:
        for i in range(lanes):
            dst[i] = np.float64(a[i] == b[i])
    elif op == NE:
        for i in range(lanes):
            dst[i] = np.float64(a[i] != b[i])
    elif op == AND:
        for i in range(lanes):
            dst[i] = np.float64((a[i] != 0.0) & (b[i] != 0.0))
    elif op == OR:
        for i in range(lanes):
            dst[i] = np.float64((a[i] != 0.0) | (b[i] != 0.0))
    elif op == NEG:
        for i in range(lanes):
            dst[i] = -a[i]
    elif op == LOG:
        for i in range(lanes):
            dst[i] = np.log(a[i])
    elif op == EXP:
        for i in range(lanes):
            dst[i] = np.exp(a[i])
    elif op == SQRT:
        for i in range(lanes):
            dst[i] = np.sqrt(a[i])
    elif op == LOG1P:
        for i in range(lanes):
            dst[i] = np.log1p(a[i])
    elif op == EXPM1:
        for i in range(lanes):
            dst[i] = np.expm1(a[i])
    elif op == FLOOR:
        for i in range(lanes):
            dst[i] = np.floor(a[i])
    elif op == NEAREST_INTEGER:
        for i in range(lanes):
            dst[i] = np.rint(a[i])
    elif op == ABS:
        for i in range(lanes):
            dst[i] = abs(a[i])
    elif op == NOT:
        for i in range(lanes):
            dst[i] = np.float64(a[i] == 0.0)
    elif op == WHERE:
        for i in range(lanes):
            dst[i] = b[i] if a[i] != 0.0 else c[i]


@_jit
def _search(code, at, registers, x, n, maxima, groups, maps, k, peak, work):
    """`Op.LONGEST` or `Op.BEST`: the size of the top set, of which the former leaves what is known in its registers."""
    op, sense, base, length, wanted = code[at, 0], code[at, 3], code[at, 4], code[at, 5], code[at, 6]
    bound = registers[code[at, 2], 0]
    # What the score reads of the row is the same in every lane.
    lanes = np.empty((registers.shape[0], LANES))
    for r in range(registers.shape[0]):
        lanes[r, :] = registers[r, 0]
    sums = np.zeros((5, 2), np.int64)
    one = np.empty(1)
    t, a, b = 0.0, 0.0, 0.0
    answer, most = 0, -INF
    if op == BEST:
        answer = 1
    else:
        registers[base : base + TOP_SET, 0] = 0.0
    # Where nothing bounds what is behind, everything is looked at.
    start, size = 0, n if op == BEST and sense == 0 else min(n, 256)
    while True:
        known, complete = _rank(x, n, maxima, groups, size, work)
        # The last one known is only there to be the next of the one before, unless there is no more.
        stop = known if complete else known - 1
        while start < stop:
            some = min(LANES, stop - start)
            for i in range(some):
                v = _value(work.found[start + i], maps, k)
                after = _value(work.found[start + i + 1], maps, k) if start + i + 1 < known else -INF
                d = v - peak
                e = _weight(d)
                if start + i > 0 and after > -INF:
                    before = _weight(_value(work.found[start + i - 1], maps, k) - peak)
                    one[0] = abs(before - 2.0 * e + _weight(after - peak))
                    _add(one, sums[0])
                one[0] = e
                _add(one, sums[1])
                t += (d if d > FARTHEST else FARTHEST) * e
                one[0] = e * e
                _add(one, sums[3])
                if wanted & H_:
                    one[0] = _weight(0.5 * d)
                    _add(one, sums[4])
                a += d
                b += d * d
                lanes[base, i], lanes[base + 1, i] = v, after
                lanes[base + 2, i] = _joined(sums[0, 0], sums[0, 1])
                lanes[base + 3, i] = np.float64(start + i + 1)
                for m in range(1, 5):
                    lanes[base + 3 + m, i] = _joined(sums[m, 0], sums[m, 1])
                lanes[base + 5, i], lanes[base + 8, i], lanes[base + 9, i] = t, a, b
            for inner in range(at + 1, at + length):
                _arithmetic(code, inner, lanes, some)
            score = lanes[code[at + length, 2]]
            for i in range(some):
                if op == BEST:
                    if score[i] > most:
                        most, answer = score[i], start + i + 1
                elif sense * score[i] < sense * bound:
                    if i > 0:
                        registers[base : base + TOP_SET, 0] = lanes[base : base + TOP_SET, i - 1]
                    return start + i
            start += some
            if op == BEST:
                if sense != 0 and most >= lanes[code[at, 2], some - 1]:
                    return answer
            else:
                registers[base : base + TOP_SET, 0] = lanes[base : base + TOP_SET, some - 1]
        if complete:
            return answer if op == BEST else stop
        size = min(n, size * 16)


@_jit
def _curvature(x, n, maxima, groups, maps, k, peak, work):
    known, _ = _rank(x, n, maxima, groups, n, work)
    sums, one = np.zeros(2, np.int64), np.empty(1)
    for i in range(1, known - 1):
        p = _weight(_value(work.found[i - 1], maps, k) - peak)
        q = _weight(_value(work.found[i], maps, k) - peak)
        one[0] = abs(p - 2.0 * q + _weight(_value(work.found[i + 1], maps, k) - peak))
        _add(one, sums)
    return _joined(sums[0], sums[1])


# ---- draws


@_jit
def _draw(x, places, whole, n, maps, k, peak, seed, position, buffer, ends):
    """Token of the largest exp(value) / E; see `decal.kernels.reference.draw`. ``places`` are ids unless it is all of a row."""
    state = _mix(_mix(seed + np.int64(GOLDEN)) + position + np.int64(GOLDEN)) + np.int64(GOLDEN)
    best, token = -1.0, np.int64(0)
    ratios, noises = np.empty(BLOCK), np.empty(BLOCK)
    dropped = ends[0]
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        size = stop - start
        _values(x, start, stop, maps, k, buffer)
        part, weights, ratio, noise = x[start:stop], buffer[:size], ratios[:size], noises[:size]
        if whole:
            for i in range(size):
                noise[i] = _uniform(_mix(state + start + i))
        else:
            for i in range(size):
                noise[i] = _uniform(_mix(state + np.int64(places[start + i])))
        limit = 0.0
        for i in range(weights.shape[0]):
            w = _weight(weights[i] - peak)
            weights[i] = w if part[i] > dropped else 0.0
            # E is at least u, so this bounds the score without a logarithm.
            ratio[i] = weights[i] / noise[i]
        for i in range(ratio.shape[0]):
            limit = ratio[i] if ratio[i] > limit else limit
        if limit < best:
            continue
        for i in range(size):
            if ratio[i] >= best and weights[i] > 0.0:
                score = weights[i] / -np.log1p(-noise[i])
                here = np.int64(start + i) if whole else np.int64(places[start + i])
                if score > best or (score == best and here < token):
                    best, token = score, here
    return token


# ---- rows


@_jit
def _few_groups(groups, low, work):
    """Whether so few groups reach ``low`` that to look at them alone pays."""
    few = 0
    for g in range(groups):
        few += np.int64(work.maxima[g] >= low)
    return few * 4 <= groups


@_jit
def _gather_whole(raw, n, groups, low, high, work):
    """Elements in [low, high] of a whole row into ``work.kept``, their ids into ``work.ids``; returns how many."""
    if high == work.ends[1] and _few_groups(groups, low, work):
        return _gather_groups(raw, n, work.maxima, groups, low, work.kept, work.ids, n)
    return _gather(raw, n, low, high, work.kept, work.ids, work.marks)


@_jit
def _gather_again(n, low, high, work):
    """Of ``work.kept`` the elements in [low, high]; returns how many."""
    count = _gather(work.kept, n, low, high, work.kept, work.places, work.marks)
    for i in range(count):
        work.ids[i] = work.ids[work.places[i]]
    return count


class Work(NamedTuple):
    """Memory of a thread for rows of one width and type: see `_row`, and `WORK` for what each part holds."""

    ends: Any
    maxima: Any
    clean: Any
    kept: Any
    ids: Any
    found: Any
    places: Any
    bins: Any
    scratch: Any
    keys: Any
    marks: Any
    buffer: Any
    maps: Any


WORK: dict[str, tuple[Any, Callable[[int, int], int]]] = {
    "ends": (None, lambda width, maps: 7),
    "maxima": (None, lambda width, maps: width // 32 + 64),
    "clean": (None, lambda width, maps: width + 8),
    "kept": (None, lambda width, maps: width + 8),
    "ids": (np.int32, lambda width, maps: width + 8),
    "found": (None, lambda width, maps: width + 8),
    "places": (np.int32, lambda width, maps: width + 8),
    "bins": (np.int64, lambda width, maps: 2 * (BINS + 1)),
    "scratch": (np.uint32, lambda width, maps: width + 8),
    "keys": (np.uint32, lambda width, maps: width + 8),
    "marks": (np.uint8, lambda width, maps: width + 8),
    "buffer": (np.float64, lambda width, maps: BLOCK),
    "maps": (np.float64, lambda width, maps: 3 * (maps + 1)),
}
"""Types of the parts of a thread's memory, None where it is the type of the logits, and how many elements they have for rows of
a width and programs with so many maps."""


@_jit
def _row(x, registers, code, work, out, kind, top, seed, position, careful):
    """Run a program on a row. Returns the drawn token and the flags of the row.

    Args:
        x: (V,) logits.
        registers: (R, 1).
        out: (V,) where to write.
        kind: what.
        top: the largest finite number of the type that the logits have, and values are to have.
        careful: whether to look for NaN, besides +inf.
    """
    ends, maps = work.ends, work.maps
    width = x.shape[0]
    flags, token = 0, np.int64(0)
    raw, n, whole = x, width, width > 0
    groups = _group_maxima(x, n, work.maxima, ends)
    peak = _largest(work.maxima, groups, ends)
    if careful:
        bad = False
        for i in range(width):
            bad |= x[i] != x[i]
        flags |= BAD if bad else 0
    cleaned = peak == ends[1]
    if cleaned:
        flags |= BAD
        for i in range(width):
            work.clean[i] = x[i] if x[i] < ends[1] else ends[2]
            work.clean[i] = work.clean[i] if x[i] == x[i] else ends[0]
        raw = work.clean[:width]
        groups = _group_maxima(raw, n, work.maxima, ends)
        peak = ends[2]
    if peak == ends[0]:
        if kind != TOKENS:
            out[:] = -INF
        return token, flags | EMPTY
    k, at, total = np.int64(0), np.int64(0), np.int64(-1)
    low, high, pending = ends[0], ends[1], False
    while True:
        op = code[at, 0]
        if op < PEAK:
            if op == END:
                break
            _arithmetic(code, at, registers, np.int64(1))
        elif op == PEAK:
            registers[code[at, 1], 0] = _value(peak, maps, k)
        elif op == AFFINE:
            scale, shift = registers[code[at, 2], 0], registers[code[at, 3], 0]
            value = _value(peak, maps, k)
            if not scale >= 0.0:
                flags |= UNFIT
            if abs(scale) == INF:
                low, pending = _first_at_least(value, maps, k, ends), True
            elif scale != 1.0 or shift != 0.0:
                fits = abs(scale * value + shift) < INF
                maps[k, 0] = scale
                maps[k, 1] = 0.0 if fits else value
                maps[k, 2] = shift if fits else 0.0
                k += 1
                if scale == 0.0 or k > 1:
                    # A dropped token counts as the lowest number there is, which further maps could raise.
                    low, pending = max(low, ends[3]), True
            total = np.int64(-1)
        elif op == BAND:
            below, above = registers[code[at, 2], 0], registers[code[at, 3], 0]
            start, stop = low, high
            if below > -INF:
                start = max(low, _first_at_least(below, maps, k, ends))
            if above < INF:
                stop = min(high, _last_at_most(above, maps, k, ends))
            if start > low or stop < high:
                if start <= peak and peak <= stop:
                    low, high, pending, total = start, stop, True, np.int64(-1)
                else:
                    least, most = _spread(raw, n, start, stop, ends)
                    if least <= most:
                        low, high, pending, total = start, stop, True, np.int64(-1)
                        peak = most
        else:
            if pending:
                # From here on the row is what the cuts have left.
                n = _gather_whole(raw, n, groups, low, high, work) if whole else _gather_again(n, low, high, work)
                raw, whole, pending = work.kept, False, False
                groups = _group_maxima(raw, n, work.maxima, ends)
            value = _value(peak, maps, k)
            dst = code[at, 1]
            if op == MOMENTS:
                sums = np.empty(MOMENT_COUNT)
                total = max(total, _moments(raw, n, maps, k, value, code[at, 2], work.buffer, sums, ends))
                for m in range(MOMENT_COUNT):
                    registers[dst + m, 0] = sums[m]
            elif op == COUNT_UPPER:
                found = _count_upper(raw, n, work.maxima, groups, registers[code[at, 2], 0], work)
                registers[dst, 0] = _value(found, maps, k)
            elif op == MASS_UPPER:
                share = registers[code[at, 2], 0]
                found = _mass_upper(raw, n, work.maxima, groups, maps, k, value, share, total, work)
                registers[dst, 0] = _value(found, maps, k)
            elif op == NEAREST:
                center, share = registers[code[at, 2], 0], registers[code[at, 3], 0]
                radius = _nearest(raw, n, maps, k, value, center, share, work)
                least, most = _within(raw, n, maps, k, center, radius, work.buffer, ends)
                registers[dst, 0], registers[dst + 1, 0] = _value(least, maps, k), _value(most, maps, k)
            elif op == SMALLEST:
                level = registers[code[at, 2], 0]
                least, _ = _spread(raw, n, _first_at_least(level, maps, k, ends), ends[1], ends)
                registers[dst, 0] = _value(least, maps, k) if least < ends[1] else INF
            elif op == CURVATURE:
                registers[dst, 0] = _curvature(raw, n, work.maxima, groups, maps, k, value, work)
            else:
                found_size = _search(code, at, registers, raw, n, work.maxima, groups, maps, k, value, work)
                registers[dst, 0] = np.float64(found_size)
                at += code[at, 5]
        at += 1
    if kind == TOKENS:
        if pending:
            n = _gather_whole(raw, n, groups, low, high, work) if whole else _gather_again(n, low, high, work)
            raw, whole = work.kept, False
        value = _value(peak, maps, k)
        token = _draw(raw, work.ids, whole, n, maps, k, value, seed, position, work.buffer, ends)
    elif kind == MASK:
        if pending and not whole:
            n = _gather_again(n, low, high, work)
        elif pending and high == ends[1] and _few_groups(groups, low, work):
            n = _gather_groups(raw, n, work.maxima, groups, low, work.kept, work.ids, n)
            raw, whole = work.kept, False
        _write_mask(x, raw, n, work.ids, whole, low, high, cleaned, out, ends)
    elif kind == VALUES:
        if pending and not whole:
            n = _gather_again(n, low, high, work)
        value = _value(peak, maps, k)
        _write_values(raw, n, work.ids, whole, low, high, maps, k, value, top, out, work.buffer, ends)
    return token, flags


@_jit
def _within(x, n, maps, k, center, radius, buffer, ends):
    """Smallest and largest element whose value lies within ``radius`` of ``center``."""
    unreached, dropped = ends[1], ends[0]
    least, most = unreached, dropped
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        _values(x, start, stop, maps, k, buffer)
        part, values = x[start:stop], buffer[: stop - start]
        for i in range(part.shape[0]):
            v = part[i]
            inside = (abs(values[i] - center) <= radius) & (v > dropped)
            down = v if inside else unreached
            up = v if inside else dropped
            least = down if down < least else least
            most = up if up > most else most
    return least, most


@_jit
def _write_mask(x, raw, n, ids, whole, low, high, cleaned, out, ends):
    """Kept logits as they came, -inf elsewhere; ``out`` may be ``x``. ``raw`` are the n kept ones, unless it is all of x."""
    dropped, top = ends[0], ends[2]
    if not whole:
        if cleaned:
            for i in range(n):
                raw[i] = x[ids[i]]
        out[:] = dropped
        for i in range(n):
            out[ids[i]] = raw[i]
    elif cleaned:
        for i in range(x.shape[0]):
            v = top if x[i] == ends[1] else x[i]
            out[i] = x[i] if (v >= low) & (v <= high) else dropped
    else:
        for i in range(x.shape[0]):
            v = x[i]
            out[i] = v if (v >= low) & (v <= high) else dropped


@_jit
def _write_values(raw, n, ids, whole, low, high, maps, k, peak, top, out, buffer, ends):
    """Values, -inf elsewhere; see `decal.kernels.reference.narrow`."""
    base = peak if abs(peak) > 0.5 * top and abs(peak) < INF else 0.0
    dropped = ends[0]
    low = max(low, ends[3])
    if not whole:
        out[:] = dropped
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        _values(raw, start, stop, maps, k, buffer)
        part, values = raw[start:stop], buffer[: stop - start]
        for i in range(values.shape[0]):
            v = values[i] - base
            values[i] = v if v > -top else -top
        if whole:
            target = out[start:stop]
            for i in range(part.shape[0]):
                v = part[i]
                target[i] = values[i] if (v >= low) & (v <= high) else dropped
        else:
            for i in range(stop - start):
                out[ids[start + i]] = values[i]


# ---- calls


# fmt: off
CALL = ("logits", "out", "seeds", "positions", "tokens", "initial", "initial_rows", "stride", "width", "rows", "registers",
        "code", "instructions", "work", "size", "parts", "maps", "kind", "top", "careful", "next_row", "next_work", "flags")
# fmt: on
"""What `rows_entry` is told, each in 8 bytes: integers, of which arrays are the address, except for ``top``.

``work`` is memory for threads, ``size`` bytes for each, in which the parts lie at the offsets ``parts``. Threads count up
``next_row`` and ``next_work`` to divide the rows and the memory between them, and gather the rows' flags in ``flags``.
"""
SUMS = ("level", "alive", "scale", "wanted", "width", "rows", "s", "t", "q", "h", "next_row")
"""What `sums_entry` is told, likewise; integers except for ``scale``."""
FLOATS = {"top", "scale"}


def record(names: tuple[str, ...]) -> np.dtype:
    """The layout of `CALL` or `SUMS`."""
    return np.dtype([(name, np.float64 if name in FLOATS else np.int64) for name in names])


CALL_LAYOUT, SUMS_LAYOUT = record(CALL), record(SUMS)
AT, SUMS_AT = ({name: 8 * place for place, name in enumerate(names)} for names in (CALL, SUMS))
"""How many bytes from the start each field lies."""
NEXT_ROW, NEXT_WORK, FLAGS, SUMS_NEXT_ROW = AT["next_row"], AT["next_work"], AT["flags"], SUMS_AT["next_row"]


@intrinsic
def _pointer(context: Any, address: Any) -> Any:
    """An address as a pointer."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


@intrinsic
def _address(context: Any, pointer: Any) -> Any:
    """A pointer as an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ptrtoint(args[0], ir.IntType(64))

    return types.int64(types.voidptr), generate


@intrinsic
def _take(context: Any, address: Any) -> Any:
    """The int64 at that address, which is one more afterwards; no two threads get the same."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _atomically(builder, "add", args[0], ir.Constant(ir.IntType(64), 1))

    return types.int64(types.int64), generate


@intrinsic
def _set_bits(context: Any, address: Any, bits: Any) -> Any:
    """Set bits of the int64 at that address, whatever other threads set; gives what it was."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _atomically(builder, "or", *args)

    return types.int64(types.int64, types.int64), generate


def _atomically(builder: Any, operation: str, address: Any, operand: Any) -> Any:
    pointer = builder.inttoptr(address, ir.IntType(64).as_pointer())
    return builder.atomic_rmw(operation, pointer, operand, "monotonic")


def rows_entry(dtype: type) -> Any:
    """The compiled function, on the address of a `CALL`, that runs a program on rows of that type; compiles it if need be.

    Any number of threads may run it on the same call at once, and share the rows.
    """

    def run_rows(pointer):
        call = carray(pointer, 1, CALL_LAYOUT)[0]
        here = _address(pointer)
        width, stride, kind, maps = call.width, call.stride, call.kind, call.maps
        initial = carray(_pointer(call.initial), (call.initial_rows, call.registers), np.float64)
        code = carray(_pointer(call.code), (call.instructions, FIELDS), np.int32)
        at = carray(_pointer(call.parts), 13, np.int64)
        mine = call.work + call.size * _take(here + NEXT_WORK)
        work = Work(
            carray(_pointer(mine + at[0]), 7, dtype),
            carray(_pointer(mine + at[1]), width // 32 + 64, dtype),
            carray(_pointer(mine + at[2]), width + 8, dtype),
            carray(_pointer(mine + at[3]), width + 8, dtype),
            carray(_pointer(mine + at[4]), width + 8, np.int32),
            carray(_pointer(mine + at[5]), width + 8, dtype),
            carray(_pointer(mine + at[6]), width + 8, np.int32),
            carray(_pointer(mine + at[7]), (2, BINS + 1), np.int64),
            carray(_pointer(mine + at[8]), width + 8, np.uint32),
            carray(_pointer(mine + at[9]), width + 8, np.uint32),
            carray(_pointer(mine + at[10]), width + 8, np.uint8),
            carray(_pointer(mine + at[11]), BLOCK, np.float64),
            carray(_pointer(mine + at[12]), (maps + 1, 3), np.float64),
        )
        work.ends[2] = call.top
        registers = np.empty((call.registers, 1))
        bytes_each = np.int64(work.ends.itemsize)
        while True:
            r = _take(here + NEXT_ROW)
            if r >= call.rows:
                break
            registers[:, 0] = initial[r if call.initial_rows > 1 else 0]
            x = carray(_pointer(call.logits + r * stride * bytes_each), width, dtype)
            if kind == TOKENS:
                seed = carray(_pointer(call.seeds), call.rows, np.int64)[r]
                position = carray(_pointer(call.positions), call.rows, np.int64)[r]
                token, flag = _row(x, registers, code, work, work.kept, kind, call.top, seed, position, call.careful != 0)
                carray(_pointer(call.tokens), call.rows, np.int64)[r] = token
            else:
                out = carray(_pointer(call.out + r * width * bytes_each), width, dtype)
                _, flag = _row(x, registers, code, work, out, kind, call.top, 0, 0, call.careful != 0)
            if flag:
                _set_bits(here + FLAGS, np.int64(flag))

    return cfunc(types.void(types.voidptr), cache=True, error_model="numpy")(run_rows)


def sums_entry() -> Any:
    """The compiled function, on the address of a `SUMS`, that does `decal.kernels.reference.running_sums`; see `rows_entry`."""

    def run_sums(pointer):
        call = carray(pointer, 1, SUMS_LAYOUT)[0]
        here = _address(pointer)
        rows, width, scale, wanted = call.rows, call.width, call.scale, call.wanted
        level = carray(_pointer(call.level), (rows, width), np.float64)
        alive = carray(_pointer(call.alive), rows, np.int64)
        # A moment that isn't wanted has no memory, and is never touched.
        s, t = carray(_pointer(call.s), (rows, width + 1), np.float64), carray(_pointer(call.t), (rows, width + 1), np.float64)
        q, h = carray(_pointer(call.q), (rows, width + 1), np.float64), carray(_pointer(call.h), (rows, width + 1), np.float64)
        weights = np.empty(BLOCK)
        while True:
            r = _take(here + SUMS_NEXT_ROW)
            if r >= rows:
                break
            sums_s, sums_t, sums_q, sums_h = 0.0, 0.0, 0.0, 0.0
            if wanted & S_:
                s[r, 0] = 0.0
            if wanted & T_:
                t[r, 0] = 0.0
            if wanted & Q_:
                q[r, 0] = 0.0
            if wanted & H_:
                h[r, 0] = 0.0
            for start in range(0, width, BLOCK):
                stop = min(start + BLOCK, width)
                part, e = level[r, start:stop], weights[: stop - start]
                for i in range(part.shape[0]):
                    w = _weight(scale * part[i])
                    e[i] = w if start + i < alive[r] else 0.0
                if wanted & S_:
                    for i in range(part.shape[0]):
                        sums_s += e[i]
                        s[r, start + i + 1] = sums_s
                if wanted & T_:
                    for i in range(part.shape[0]):
                        d = scale * part[i]
                        sums_t += (d if d > FARTHEST else FARTHEST) * e[i]
                        t[r, start + i + 1] = sums_t
                if wanted & Q_:
                    for i in range(part.shape[0]):
                        sums_q += e[i] * e[i]
                        q[r, start + i + 1] = sums_q
                if wanted & H_:
                    for i in range(part.shape[0]):
                        sums_h += _weight(0.5 * scale * part[i]) if start + i < alive[r] else 0.0
                        h[r, start + i + 1] = sums_h

    return cfunc(types.void(types.voidptr), cache=True, error_model="numpy")(run_sums)
