"""Triton kernels that execute a `decal.kernels.program.Program` on an accelerator.

A program is cut at the instructions that read the whole row, and each becomes one or two launches. In a launch every row is
read by G programs; each reads a part and adds what it found to integers of the row, in whatever order; the last one to arrive
finishes the instruction and executes those behind it, up to the next reading, one by one (`decal.kernels.gpu_device.run`). All
decisions fall on integers (keys of logits, counts, masses), so results depend neither on G nor on block sizes nor on the rest
of the batch, and there is nothing to tune for accuracy.

========================  =====================================================================
launch                    what it is for
========================  =====================================================================
clearing                  zeros for accumulators
`extremes`                largest and smallest logit; begins every program; `Op.SMALLEST`
`runner_up`, `moments`    `Op.MOMENTS`, the former where entropies are read
`count_bins`, `choose`    `Op.COUNT_UPPER`, `Op.MASS_UPPER`, `Op.NEAREST`: bins, then exactly
`count_bins`, `list_top`, `Op.LONGEST`, `Op.BEST`: the largest logits are listed, then top sets are
`ranking`                 looked at from the smallest on, as many as it takes; nothing is sorted
`curvature`               `Op.CURVATURE`, which takes all ranks, so torch sorts the row
`write` or `race`         the answer: logits, or a token
========================  =====================================================================

So ``temperature | top_k | top_p | min_p | draw`` takes six kernels and the clearing, see `launches`. One kernel would do if one
program owned its row and looped over all phases, as it may where there are more rows than multiprocessors; with few rows it
needs a barrier across the programs of a row (a cooperative launch or a cluster), which can't be had in Triton's interpreter and
hangs where not all of them are resident.

Nothing here waits for the device, and launches depend on the program alone, so a call may be captured in a CUDA graph, after
one outside of it that moves the program there.
"""

from __future__ import annotations

# mypy: disable-error-code="no-untyped-def"
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from decal.kernels import reference
from decal.kernels.gpu_device import (
    BEST,
    COUNT_UPPER,
    FIELDS,
    FIRST,
    GOLDEN,
    HIGH,
    INF,
    KEY_MAX,
    KEY_MIN,
    LAST,
    LEAST,
    LONG_MAX,
    LONG_MIN,
    LONGEST,
    LOW,
    MOMENTS,
    NEAR,
    NEAREST,
    NOWHERE,
    OTHERS,
    PEAK,
    SECOND,
    SIGN,
    SLOTS,
    SUMS,
    TARGET,
    TOPS,
    arithmetic,
    bin_of,
    bin_scale,
    bracket,
    cost_of,
    ends,
    exponential,
    first_map,
    from_key,
    from_long,
    interval_of,
    is_last,
    joined,
    limbs,
    load_logits,
    mix,
    needed,
    pick,
    power_of_two_above,
    run,
    take,
    to_key,
    to_long,
    two_to,
    value_at,
    value_of,
    weight,
    worth_of,
)
from decal.kernels.program import Builder, Op, Program, bits_of

SUM_OF_BINS = tl.constexpr(7)  # the place among the accumulators of the mass that `count_bins` adds up
STATE = tl.constexpr(SLOTS)
VARYING = ["G", "chunk", "at", "maps", "map_rows", "registers", "state_stride", "columns", "span", "x_stride", "y_stride"]


class Config(NamedTuple):
    """How rows are cut up. It changes times, never results.

    Attributes:
        block: logits that a program reads at a time.
        warps: per program.
        splits: programs per row, at most.
        bins: of a selection.
        room: tokens in the list of candidates of a selection; where there are more, one program reads the row again.
        piece: top sets that are looked at at a time, at least 2.
    """

    block: int = 2048
    warps: int = 8
    splits: int = 16
    bins: int = 1024
    room: int = 8192
    piece: int = 512

    @property
    def narrow(self) -> int:
        """Block of the kernels that keep much for each logit: at most four for each thread."""
        return min(self.block, 128 * self.warps)


TYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Types of logits it takes."""

PROGRAMS = 264
"""Programs that are enough to keep a large accelerator busy: two for each of 132 multiprocessors."""

REGISTERS = {4: 168, 8: 128}
"""Registers of a thread, at most, by warps of its program, on NVIDIA's: three programs of four warps, or two of eight, share a
multiprocessor. Without a bound the compiler saves registers that aren't wanted, by keeping numbers in memory."""
RANKING = (8, 248)
"""Warps and registers of `ranking`, which has one program for each row and many sums to carry on."""

TABLE = ((8192, Config(1024, 4, 8, bins=512)), (2**21, Config(2048, 8, 32)))
"""Configurations by the largest vocabulary they are for."""


def config_of(rows: int, vocabulary: int) -> Config:
    """The configuration for a batch: few rows are cut into many parts."""
    config = next((c for size, c in TABLE if vocabulary <= size), TABLE[-1][1])
    splits = min(config.splits, triton.cdiv(vocabulary, config.block), max(1, PROGRAMS // rows))
    return config._replace(splits=splits)


@triton.jit(do_not_specialize=VARYING)
def extremes(
    x_ptr, x_stride, V, G, chunk, code_ptr, at, regs_ptr, registers, maps_ptr, maps, map_rows, state_ptr, state_stride,
    initial_ptr, columns_ptr, columns, parameters_ptr,
    TOP: tl.constexpr, BLOCK: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """Largest and smallest kept logit; at the start of a program, or the smallest whose value is at least a level."""
    row = (tl.program_id(0) // G).to(tl.int64)
    begin = (tl.program_id(0) % G) * chunk
    end = tl.minimum(begin + chunk, V)
    x_ptr += row * x_stride
    regs_ptr += row * registers
    maps_ptr += row * map_rows * 3
    state_ptr += row * state_stride
    most = tl.full([BLOCK], KEY_MIN, tl.int32)
    least = tl.full([BLOCK], KEY_MIN, tl.int32)
    if START:
        for i in range(begin, end, BLOCK):
            key = to_key(load_logits(x_ptr, i + tl.arange(0, BLOCK), end, TOP))
            kept = (key > -0x7F800000) & (key < 0x7F800000)
            most = tl.maximum(most, tl.where(kept, key, KEY_MIN))
            least = tl.maximum(least, tl.where(kept, -key, KEY_MIN))
        # The accumulators begin at 0, which must lose against every key.
        tl.atomic_max(state_ptr + SUMS, tl.max(most, 0).to(tl.int64) - KEY_MIN, sem="relaxed")
    else:
        low, high, sign = interval_of(state_ptr)
        level = tl.load(regs_ptr + tl.load(code_ptr + at * FIELDS + 2))
        scale, origin, shift = first_map(maps_ptr, maps)
        for i in range(begin, end, BLOCK):
            z = load_logits(x_ptr, i + tl.arange(0, BLOCK), end, TOP)
            u = to_key(z) * sign
            v = value_of(z, scale, origin, shift, maps_ptr, maps)
            least = tl.maximum(least, tl.where((u >= low) & (u <= high) & (v >= level), -u, KEY_MIN))
    tl.atomic_max(state_ptr + SUMS + 1, tl.max(least, 0).to(tl.int64) - KEY_MIN, sem="relaxed")
    if is_last(state_ptr, G):
        smallest = take(state_ptr + SUMS + 1)
        found = smallest > 0
        u = -(smallest + KEY_MIN)
        if START:
            largest = take(state_ptr + SUMS) + KEY_MIN
            # An empty row keeps the interval [1, 0].
            tl.store(state_ptr + LOW, tl.where(found, u, 1))
            tl.store(state_ptr + HIGH, tl.where(found, largest, 0))
            tl.store(state_ptr + SIGN, 1)
            tl.store(state_ptr + PEAK, tl.where(found, largest, 0))
            tl.store(state_ptr + LEAST, tl.where(found, u, 0))
            tl.store(state_ptr + NEAR, NOWHERE)
            lane = tl.arange(0, 128)
            for i in range(0, registers, 128):
                inside = i + lane < registers
                tl.store(regs_ptr + i + lane, tl.load(initial_ptr + i + lane, mask=inside), mask=inside)
            tl.debug_barrier()
            for i in range(columns):
                tl.store(regs_ptr + tl.load(columns_ptr + i), tl.load(parameters_ptr + row * columns + i))
            tl.debug_barrier()
            run(at, code_ptr, regs_ptr, maps_ptr, maps, state_ptr, x_ptr, V, TOP, BLOCK)
        else:
            v = value_at(tl.where(found, u, 0), sign, maps_ptr, maps)
            tl.store(regs_ptr + tl.load(code_ptr + at * FIELDS + 1), tl.where(found, v, INF))
            tl.debug_barrier()
            run(at + 1, code_ptr, regs_ptr, maps_ptr, maps, state_ptr, x_ptr, V, TOP, BLOCK)


@triton.jit
def span_of(state_ptr, sign, peak, maps_ptr, maps):
    """Exponent of a power of two above the range of the kept values, which makes their differences to the largest small."""
    lowest = tl.maximum(tl.load(state_ptr + LEAST), tl.load(state_ptr + LOW))
    lowest = tl.minimum(lowest, tl.load(state_ptr + HIGH))
    return power_of_two_above(peak - value_at(lowest, sign, maps_ptr, maps))


@triton.jit(do_not_specialize=VARYING)
def runner_up(
    x_ptr, x_stride, V, G, chunk, maps_ptr, maps, map_rows, state_ptr, state_stride, TOP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Largest kept value below the largest, for `moments`."""
    row = (tl.program_id(0) // G).to(tl.int64)
    begin = (tl.program_id(0) % G) * chunk
    end = tl.minimum(begin + chunk, V)
    x_ptr += row * x_stride
    maps_ptr += row * map_rows * 3
    state_ptr += row * state_stride
    low, high, sign = interval_of(state_ptr)
    top = value_at(tl.load(state_ptr + PEAK), sign, maps_ptr, maps)
    scale, origin, shift = first_map(maps_ptr, maps)
    most = tl.full([BLOCK], KEY_MIN, tl.int32)
    for i in range(begin, end, BLOCK):
        z = load_logits(x_ptr, i + tl.arange(0, BLOCK), end, TOP)
        u = to_key(z) * sign
        below = value_of(z, scale, origin, shift, maps_ptr, maps) < top
        most = tl.maximum(most, tl.where((u >= low) & (u <= high) & below, u, KEY_MIN))
    tl.atomic_max(state_ptr + SECOND, tl.max(most, 0).to(tl.int64) - KEY_MIN, sem="relaxed")


@triton.jit
def exponent_of_terms(d):
    """Exponent of a power of two above all of |d exp(d)|, where the largest ``d < 0`` makes them very small; else 0.

    Where one token has nearly all of the probability, they are the entropy, and limbs don't reach that far down.
    """
    largest = tl.abs(tl.maximum(d, -700.0) * weight(d))
    return tl.where((largest > 0.0) & (largest < 1e-6), power_of_two_above(largest), 0)


@triton.jit(do_not_specialize=VARYING)
def moments(
    x_ptr, x_stride, V, G, chunk, code_ptr, at, regs_ptr, registers, maps_ptr, maps, map_rows, state_ptr, state_stride,
    TOP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over the kept tokens, as integers."""
    row = (tl.program_id(0) // G).to(tl.int64)
    begin = (tl.program_id(0) % G) * chunk
    end = tl.minimum(begin + chunk, V)
    x_ptr += row * x_stride
    regs_ptr += row * registers
    maps_ptr += row * map_rows * 3
    state_ptr += row * state_stride
    low, high, sign = interval_of(state_ptr)
    bits = tl.load(code_ptr + at * FIELDS + 2)
    top = value_at(tl.load(state_ptr + PEAK), sign, maps_ptr, maps)
    exponent = span_of(state_ptr, sign, top, maps_ptr, maps)
    small = two_to(-exponent)
    second = tl.load(state_ptr + SECOND) + KEY_MIN
    next_value = value_at(tl.where(second > KEY_MIN, second, tl.load(state_ptr + PEAK)), sign, maps_ptr, maps)
    fine = exponent_of_terms(next_value - top)
    raised = two_to(-fine)
    scale, origin, shift = first_map(maps_ptr, maps)
    n = tl.zeros([BLOCK], tl.int32)
    s_high, s_low, t_high, t_low = (tl.zeros([BLOCK], tl.int64),) * 4
    q_high, q_low, h_high, h_low = (tl.zeros([BLOCK], tl.int64),) * 4
    a_high, a_low, b_high, b_low = (tl.zeros([BLOCK], tl.int64),) * 4
    for i in range(begin, end, BLOCK):
        z = load_logits(x_ptr, i + tl.arange(0, BLOCK), end, TOP)
        u = to_key(z) * sign
        kept = (u >= low) & (u <= high)
        d = tl.where(kept, value_of(z, scale, origin, shift, maps_ptr, maps) - top, 0.0)
        n += kept.to(tl.int32)
        if bits & 14:
            e = weight(d)
            s_high, s_low = add_limbs(e, kept, s_high, s_low)
            # Behind -700 the product is nothing, but d may be too large for limbs.
            t_high, t_low = add_limbs(tl.maximum(d, -700.0) * e * raised, kept, t_high, t_low)
            if bits & 8:
                q_high, q_low = add_limbs(e * e, kept, q_high, q_low)
        if bits & 16:
            h_high, h_low = add_limbs(weight(0.5 * d), kept, h_high, h_low)
        if bits & 96:
            d = tl.maximum(d, -1.7976931348623157e308) * small
            a_high, a_low = add_limbs(d, kept, a_high, a_low)
            b_high, b_low = add_limbs(d * d, kept, b_high, b_low)
    tl.atomic_add(state_ptr + SUMS, tl.sum(n.to(tl.int64), 0), sem="relaxed")
    if bits & 14:
        publish_limbs(state_ptr + SUMS + 1, s_high, s_low)
        publish_limbs(state_ptr + SUMS + 3, t_high, t_low)
        publish_limbs(state_ptr + SUMS + 5, q_high, q_low)
    if bits & 16:
        publish_limbs(state_ptr + SUMS + 7, h_high, h_low)
    if bits & 96:
        publish_limbs(state_ptr + SUMS + 9, a_high, a_low)
        publish_limbs(state_ptr + SUMS + 11, b_high, b_low)
    if is_last(state_ptr, G):
        dst = regs_ptr + tl.load(code_ptr + at * FIELDS + 1)
        large = two_to(exponent)
        tl.store(state_ptr + SECOND, 0)
        tl.store(dst, take(state_ptr + SUMS).to(tl.float64))
        for m in range(1, MOMENTS):
            sums = state_ptr + SUMS + 2 * m - 1
            factor = tl.where(m == 5, large, tl.where(m == 6, large * large, tl.where(m == 2, two_to(fine), 1.0)))
            tl.store(dst + m, joined(take(sums), take(sums + 1)) * factor)
        tl.debug_barrier()
        run(at + 1, code_ptr, regs_ptr, maps_ptr, maps, state_ptr, x_ptr, V, TOP, BLOCK)


@triton.jit
def add_limbs(x, kept, high, low):
    """Sums of limbs with ``x`` added."""
    more_high, more_low = limbs(x, kept)
    return high + more_high, low + more_low


@triton.jit
def publish_limbs(ptr, high, low):
    """Add this program's sums to the row's."""
    tl.atomic_add(ptr, tl.sum(high, 0), sem="relaxed")
    tl.atomic_add(ptr + 1, tl.sum(low, 0), sem="relaxed")


@triton.jit
def question(code_ptr, at, regs_ptr, KIND: tl.constexpr):
    """Share or count, and center, that a selection is about."""
    a = tl.load(regs_ptr + tl.load(code_ptr + at * FIELDS + 2))
    if KIND == NEAREST:
        return tl.load(regs_ptr + tl.load(code_ptr + at * FIELDS + 3)), a
    return a, 0.0 * a


@triton.jit(do_not_specialize=VARYING)
def count_bins(
    x_ptr, x_stride, V, G, chunk, code_ptr, at, regs_ptr, registers, maps_ptr, maps, map_rows, state_ptr, state_stride,
    bins_ptr, TOP: tl.constexpr, BLOCK: tl.constexpr, NB: tl.constexpr, KIND: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """First half of a selection: counts of tokens by cost, and from them the bins where the wanted token may be.

    Or, with ``LISTED``, how many bins together hold at most that many tokens.
    """
    row = (tl.program_id(0) // G).to(tl.int64)
    begin = (tl.program_id(0) % G) * chunk
    end = tl.minimum(begin + chunk, V)
    x_ptr += row * x_stride
    regs_ptr += row * registers
    maps_ptr += row * map_rows * 3
    state_ptr += row * state_stride
    bins_ptr += row * 2 * state_stride + 2 * STATE
    low, high, sign = interval_of(state_ptr)
    top = value_at(tl.load(state_ptr + PEAK), sign, maps_ptr, maps)
    share, center = question(code_ptr, at, regs_ptr, KIND)
    per_bin = bin_scale(share, center, top, V, NB, KIND)
    scale, origin, shift = first_map(maps_ptr, maps)
    down = tl.zeros([NB], tl.int32)
    up = tl.zeros([NB], tl.int32)
    count = tl.zeros([BLOCK], tl.int32)
    worth = tl.zeros([BLOCK], tl.int64)
    for i in range(begin, end, BLOCK):
        z = load_logits(x_ptr, i + tl.arange(0, BLOCK), end, TOP)
        u = to_key(z) * sign
        kept = (u >= low) & (u <= high)
        v = value_of(tl.where(kept, z, 0.0), scale, origin, shift, maps_ptr, maps)
        v = tl.where(kept, v, top)
        place = bin_of(v, center, top, per_bin, NB, KIND)
        inside = kept & (place < NB)
        if KIND == NEAREST:
            down += tl.histogram(place, NB, mask=inside & (v <= center))
            up += tl.histogram(place, NB, mask=inside & (v > center))
        else:
            down += tl.histogram(place, NB, mask=inside)
        if KIND != COUNT_UPPER:
            count += kept.to(tl.int32)
            worth += tl.where(kept, worth_of(v, top, KIND), 0)
    lane = tl.arange(0, NB)
    tl.atomic_add(bins_ptr + lane, down, mask=down > 0, sem="relaxed")
    if KIND == NEAREST:
        tl.atomic_add(bins_ptr + NB + lane, up, mask=up > 0, sem="relaxed")
    if KIND != COUNT_UPPER:
        tl.atomic_add(state_ptr + SUMS, tl.sum(count.to(tl.int64), 0), sem="relaxed")
        tl.atomic_add(state_ptr + SUMS + SUM_OF_BINS, tl.sum(worth, 0), sem="relaxed")
    if is_last(state_ptr, G):
        down = take(bins_ptr + lane)
        if KIND == COUNT_UPPER:
            wanted = tl.where(share >= 1.0, share, 1.0)
            target = tl.where(wanted < V, wanted, V).to(tl.int64)
            target = tl.minimum(target, tl.sum(down.to(tl.int64), 0))
            if LISTED > 0:
                target = 0 * target + LISTED + 1
            first = tl.sum((tl.cumsum(down, 0) < target).to(tl.int32), 0)
            last = first
        else:
            if KIND == NEAREST:
                up = take(bins_ptr + NB + lane)
            total = take(state_ptr + SUMS + SUM_OF_BINS)
            target = needed(share, total)
            gap = (center - top) if KIND == NEAREST else 0.0 * top
            first, last = bracket(down, up, take(state_ptr + SUMS), target, total, gap, per_bin, V, NB, KIND)
        tl.store(state_ptr + FIRST, first)
        tl.store(state_ptr + LAST, last)
        tl.store(state_ptr + TARGET, target)
        if LISTED == 0:
            tl.store(state_ptr + SUMS + 3, LONG_MAX)
            tl.store(state_ptr + SUMS + 4, LONG_MIN)
            tl.store(state_ptr + SUMS + 5, KEY_MAX)
            tl.store(state_ptr + SUMS + 6, KEY_MIN)


@triton.jit(do_not_specialize=VARYING)
def choose(
    x_ptr, x_stride, V, G, chunk, code_ptr, at, regs_ptr, registers, maps_ptr, maps, map_rows, state_ptr, state_stride,
    list_ptr, TOP: tl.constexpr, BLOCK: tl.constexpr, NB: tl.constexpr, KIND: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """Second half of a selection: what stands before the bins in question is summed, what is in them listed and searched."""
    row = (tl.program_id(0) // G).to(tl.int64)
    begin = (tl.program_id(0) % G) * chunk
    end = tl.minimum(begin + chunk, V)
    x_ptr += row * x_stride
    regs_ptr += row * registers
    maps_ptr += row * map_rows * 3
    state_ptr += row * state_stride
    list_ptr += row * ROOM
    low, high, sign = interval_of(state_ptr)
    top = value_at(tl.load(state_ptr + PEAK), sign, maps_ptr, maps)
    share, center = question(code_ptr, at, regs_ptr, KIND)
    per_bin = bin_scale(share, center, top, V, NB, KIND)
    first, last = tl.load(state_ptr + FIRST), tl.load(state_ptr + LAST)
    scale, origin, shift = first_map(maps_ptr, maps)
    before = worth_of(tl.zeros([BLOCK], tl.float64) - INF, 0.0, KIND) * 0
    within = before
    order_min, order_max = tl.full([BLOCK], LONG_MAX, tl.int64), tl.full([BLOCK], LONG_MIN, tl.int64)
    u_min, u_max = tl.full([BLOCK], KEY_MAX, tl.int32), tl.full([BLOCK], KEY_MIN, tl.int32)
    for i in range(begin, end, BLOCK):
        z = load_logits(x_ptr, i + tl.arange(0, BLOCK), end, TOP)
        u = to_key(z) * sign
        kept = (u >= low) & (u <= high)
        v = value_of(tl.where(kept, z, 0.0), scale, origin, shift, maps_ptr, maps)
        v = tl.where(kept, v, top)
        place = bin_of(v, center, top, per_bin, NB, KIND)
        sure, open_ = kept & (place < first), kept & (place >= first) & (place <= last)
        n = tl.sum(open_.to(tl.int32), 0)
        if tl.sum(sure.to(tl.int32), 0) + n > 0:
            worth = worth_of(v, top, KIND)
            before += tl.where(sure, worth, 0)
            within += tl.where(open_, worth, 0)
            if KIND == NEAREST:
                u_min = tl.minimum(u_min, tl.where(sure, u, KEY_MAX))
                u_max = tl.maximum(u_max, tl.where(sure, u, KEY_MIN))
        if n > 0:
            order = to_long(cost_of(v, center, KIND))
            order_min = tl.minimum(order_min, tl.where(open_, order, LONG_MAX))
            order_max = tl.maximum(order_max, tl.where(open_, order, LONG_MIN))
            entry = tl.atomic_add(state_ptr + SUMS + 2, n.to(tl.int64), sem="relaxed") + tl.cumsum(open_.to(tl.int32), 0) - 1
            tl.store(list_ptr + entry, z, mask=open_ & (entry < ROOM))
    tl.atomic_add(state_ptr + SUMS, tl.sum(before, 0).to(tl.int64), sem="relaxed")
    tl.atomic_add(state_ptr + SUMS + 1, tl.sum(within, 0).to(tl.int64), sem="relaxed")
    tl.atomic_min(state_ptr + SUMS + 3, tl.min(order_min, 0), sem="relaxed")
    tl.atomic_max(state_ptr + SUMS + 4, tl.max(order_max, 0), sem="relaxed")
    if KIND == NEAREST:
        tl.atomic_min(state_ptr + SUMS + 5, tl.min(u_min, 0).to(tl.int64), sem="relaxed")
        tl.atomic_max(state_ptr + SUMS + 6, tl.max(u_max, 0).to(tl.int64), sem="relaxed")
    if is_last(state_ptr, G):
        target = tl.load(state_ptr + TARGET)
        rest = target - take(state_ptr + SUMS)
        inside = take(state_ptr + SUMS + 1)
        n = take(state_ptr + SUMS + 2)
        begin_order, end_order = take(state_ptr + SUMS + 3), take(state_ptr + SUMS + 4)
        smallest, largest = take(state_ptr + SUMS + 5).to(tl.int32), take(state_ptr + SUMS + 6).to(tl.int32)
        if (n > ROOM) & (begin_order != end_order) | (rest <= 0) | (rest > inside):
            # The list was too short: rare, and exact as well.
            order = pick(x_ptr, V, target, LONG_MIN + 1, LONG_MAX, low, high, sign, top, center, maps_ptr, maps, TOP, KIND)
        else:
            order = pick(list_ptr, n, rest, begin_order, end_order, low, high, sign, top, center, maps_ptr, maps, TOP, KIND)
        if KIND == NEAREST:
            if (n > ROOM) | (rest <= 0) | (rest > inside):
                smallest, largest = ends(x_ptr, V, order, low, high, sign, center, maps_ptr, maps, TOP, KIND)
            else:
                u_1, u_2 = ends(list_ptr, n, order, low, high, sign, center, maps_ptr, maps, TOP, KIND)
                smallest, largest = tl.minimum(smallest, u_1), tl.maximum(largest, u_2)
        dst = regs_ptr + tl.load(code_ptr + at * FIELDS + 1)
        if KIND == NEAREST:
            found = smallest <= largest
            smallest, largest = tl.where(found, smallest, 0), tl.where(found, largest, 0)
            tl.store(dst, value_at(smallest, sign, maps_ptr, maps))
            tl.store(dst + 1, value_at(largest, sign, maps_ptr, maps))
            tl.store(state_ptr + NEAR, largest)
        else:
            tl.store(dst, -from_long(order))
        tl.debug_barrier()
        run(at + 1, code_ptr, regs_ptr, maps_ptr, maps, state_ptr, x_ptr, V, TOP, BLOCK)


@triton.jit(do_not_specialize=VARYING)
def list_top(
    x_ptr, x_stride, V, G, chunk, maps_ptr, maps, map_rows, state_ptr, state_stride, list_ptr,
    TOP: tl.constexpr, BLOCK: tl.constexpr, NB: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """The largest logits, as many bins as there is room for, and the largest value below the largest, for `ranking`."""
    row = (tl.program_id(0) // G).to(tl.int64)
    begin = (tl.program_id(0) % G) * chunk
    end = tl.minimum(begin + chunk, V)
    x_ptr += row * x_stride
    maps_ptr += row * map_rows * 3
    state_ptr += row * state_stride
    list_ptr += row * ROOM
    low, high, sign = interval_of(state_ptr)
    top = value_at(tl.load(state_ptr + PEAK), sign, maps_ptr, maps)
    first = tl.load(state_ptr + FIRST)
    scale, origin, shift = first_map(maps_ptr, maps)
    most = tl.full([BLOCK], KEY_MIN, tl.int32)
    for i in range(begin, end, BLOCK):
        z = load_logits(x_ptr, i + tl.arange(0, BLOCK), end, TOP)
        u = to_key(z) * sign
        kept = (u >= low) & (u <= high)
        v = value_of(tl.where(kept, z, 0.0), scale, origin, shift, maps_ptr, maps)
        v = tl.where(kept, v, top)
        most = tl.maximum(most, tl.where(kept & (v < top), u, KEY_MIN))
        listed = kept & (bin_of(v, top, top, 1.0, NB, COUNT_UPPER) < first)  # bins of counts have no scale
        n = tl.sum(listed.to(tl.int32), 0)
        if n > 0:
            entry = tl.atomic_add(state_ptr + SUMS + 2, n.to(tl.int64), sem="relaxed") + tl.cumsum(listed.to(tl.int32), 0) - 1
            tl.store(list_ptr + entry, z, mask=listed & (entry < ROOM))
    tl.atomic_max(state_ptr + SECOND, tl.max(most, 0).to(tl.int64) - KEY_MIN, sem="relaxed")


@triton.jit
def reach(source_ptr, n, first, last, sign, wanted, TOP: tl.constexpr, BLOCK: tl.constexpr, NB: tl.constexpr):
    """The u from which up to ``last`` there are at most ``wanted`` tokens of a row or a list, but some, and how many.

    Where more than that stand at the largest u, it is that one; where there are none in [first, last], ``first`` and 0.
    """
    begin, found = first, 0 * first
    while (found == 0) & (first <= last):
        shift = 0 * first
        while ((last - first) >> shift) >= NB:
            shift += 1
        bins = tl.zeros([NB], tl.int32)
        for i in range(0, n, BLOCK):
            u = to_key(load_logits(source_ptr, i + tl.arange(0, BLOCK), n, TOP, ".cg")).to(tl.int64) * sign
            inside = (u >= first) & (u <= last)
            bins += tl.histogram(tl.where(inside, (last - u) >> shift, 0).to(tl.int32), NB, mask=inside)
        sums = tl.cumsum(bins, 0).to(tl.int64)
        fitting = tl.sum((sums <= wanted).to(tl.int64), 0)
        found = tl.max(tl.where(sums <= wanted, sums, 0), 0)
        begin = tl.maximum(last + 1 - (fitting << shift), first)
        if found == 0:
            # The first bin that has some has too many, or there are none.
            last -= fitting << shift
            first = tl.maximum(last + 1 - (1 + 0 * first << shift), first)
            if first == last:
                begin = last
                found = tl.min(tl.where(sums > wanted, sums, LONG_MAX), 0)
    return begin, found


@triton.jit
def collect(source_ptr, n, first, last, sign, to_ptr, TOP: tl.constexpr, BLOCK: tl.constexpr):
    """Copy the tokens of a row or a list that stand at [first, last]."""
    count = 0 * n
    for i in range(0, n, BLOCK):
        z = load_logits(source_ptr, i + tl.arange(0, BLOCK), n, TOP, ".cg")
        u = to_key(z).to(tl.int64) * sign
        inside = (u >= first) & (u <= last)
        tl.store(to_ptr + count + tl.cumsum(inside.to(tl.int32), 0) - 1, z, mask=inside)
        count += tl.sum(inside.to(tl.int32), 0)
    tl.debug_barrier()


@triton.jit
def put_in_order(from_ptr, n, sign, to_ptr, PIECE: tl.constexpr):
    """Copy up to ``PIECE`` tokens to where they stand in decreasing order of value: behind as many as are before them."""
    lane = tl.arange(0, PIECE)
    z = tl.load(from_ptr + lane, mask=lane < n, other=0.0)
    u = to_key(z) * sign.to(tl.int32)
    place = tl.zeros([PIECE], tl.int32)
    for i in range(0, n, OTHERS):
        other = i + tl.arange(0, OTHERS)
        w = to_key(tl.load(from_ptr + other, mask=other < n, other=0.0)) * sign.to(tl.int32)
        same = (w[None, :] == u[:, None]) & (other[None, :] < lane[:, None])
        earlier = ((w[None, :] > u[:, None]) | same) & (other[None, :] < n)
        place += tl.sum(earlier.to(tl.int32), 1)
    tl.store(to_ptr + place, z, mask=lane < n)
    tl.debug_barrier()


@triton.jit
def least_of(source_ptr, n, sign, nothing, TOP: tl.constexpr, BLOCK: tl.constexpr):
    """The smallest u of a list, ``nothing`` if it is empty."""
    least = 0 * nothing + LONG_MAX
    for i in range(0, n, BLOCK):
        offsets = i + tl.arange(0, BLOCK)
        u = to_key(load_logits(source_ptr, offsets, n, TOP, ".cg")).to(tl.int64) * sign
        least = tl.minimum(least, tl.min(tl.where(offsets < n, u, LONG_MAX), 0))
    return tl.where(n > 0, least, nothing)


@triton.jit
def bend_of(before, value, below, top):
    """Absolute second difference of exp(value - top) around each value; 0 at the ends."""
    inner = (before > -INF) & (below > -INF)
    p = weight(tl.where(inner, before - top, 0.0))
    q = weight(tl.where(inner, value - top, 0.0))
    r = weight(tl.where(inner, below - top, 0.0))
    return tl.where(inner, tl.abs(p - 2.0 * q + r), 0.0)


@triton.jit
def running(ptr, x, kept, sums_ptr, scale):
    """Store running sums of ``x``, times ``scale``, that go on from those at ``sums_ptr``, which is in memory as registers are
    scarce."""
    high, low = tl.load(sums_ptr), tl.load(sums_ptr + 1)
    more_high, more_low = limbs(x, kept)
    tl.store(ptr, joined(tl.cumsum(more_high, 0) + high, tl.cumsum(more_low, 0) + low) * scale)
    more_high, more_low = tl.sum(more_high, 0), tl.sum(more_low, 0)
    tl.debug_barrier()
    tl.store(sums_ptr, high + more_high)
    tl.store(sums_ptr + 1, low + more_low)


@triton.jit
def score_top_sets(code_ptr, pc, count, regs_ptr, lanes_ptr, base, PIECE: tl.constexpr):
    """Execute the instructions of a score for many top sets at once; the last one says where it is.

    From ``base`` on a register has a number for each of them. The barriers are for loads that are laid out over threads in
    another way than the store.
    """
    lane = tl.arange(0, PIECE)
    for i in range(count - 1):
        at = code_ptr + (pc + i) * FIELDS
        dst, a, b, c = tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)
        x, y = operand(regs_ptr, lanes_ptr, a, base, PIECE), operand(regs_ptr, lanes_ptr, b, base, PIECE)
        result = arithmetic(tl.load(at), x, y, operand(regs_ptr, lanes_ptr, c, base, PIECE))
        tl.debug_barrier()
        tl.store(lanes_ptr + (dst - base) * PIECE + lane, result)
        tl.debug_barrier()
    return operand(regs_ptr, lanes_ptr, tl.load(code_ptr + (pc + count - 1) * FIELDS + 2), base, PIECE)


@triton.jit
def operand(regs_ptr, lanes_ptr, register, base, PIECE: tl.constexpr):
    """A register, for many top sets."""
    lane = tl.arange(0, PIECE)
    many = register >= base
    some = tl.load(lanes_ptr + (register - base) * PIECE + lane, mask=tl.where(many, lane, -1) >= 0, other=0.0)
    return tl.where(many, some, tl.load(regs_ptr + register))


@triton.jit(do_not_specialize=VARYING)
def ranking(
    x_ptr, x_stride, V, code_ptr, at, regs_ptr, registers, maps_ptr, maps, map_rows, state_ptr, state_stride,
    list_ptr, pieces_ptr, lanes_ptr, span,
    TOP: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr, ROOM: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """Look at the top sets of a row by size, a piece of them at a time; one program for each row.

    A piece comes from the list, which holds everything at [edge, ahead], and is then put in order. A list that is used up is
    filled again from the row. Of tokens that stand at one u there may be more than either holds: they are only counted.
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    regs_ptr += row * registers
    maps_ptr += row * map_rows * 3
    state_ptr += row * state_stride
    list_ptr += row * ROOM
    raw_ptr = pieces_ptr + row * 2 * PIECE
    piece_ptr = raw_ptr + PIECE
    lanes_ptr += row * span * PIECE
    low, high, sign = tl.load(state_ptr + LOW), tl.load(state_ptr + HIGH), tl.load(state_ptr + SIGN)
    peak = tl.load(state_ptr + PEAK)
    top = value_at(peak, sign, maps_ptr, maps)
    field = code_ptr + at * FIELDS
    op, dst, limit, sense = tl.load(field), tl.load(field + 1), tl.load(field + 2), tl.load(field + 3)
    base, count, bits = tl.load(field + 4), tl.load(field + 5), tl.load(field + 6)
    bound = tl.load(regs_ptr + limit)
    exponent = span_of(state_ptr, sign, top, maps_ptr, maps)
    small, large = two_to(-exponent), two_to(exponent)
    second = take(state_ptr + SECOND) + KEY_MIN
    fine = exponent_of_terms(value_at(tl.where(second > KEY_MIN, second, peak), sign, maps_ptr, maps) - top)
    raised, lowered = two_to(-fine), two_to(fine)
    scale, origin, shift = first_map(maps_ptr, maps)
    lane = tl.arange(0, PIECE)
    if op == LONGEST:
        for i in range(TOPS):
            tl.store(regs_ptr + base + i, 0.0)
        tl.debug_barrier()
    for i in range(span):
        tl.store(lanes_ptr + i * PIECE + lane, tl.load(regs_ptr + base + i + 0 * lane))
    zero = 0 * low
    answer, best = 0.0 * top, 0.0 * top - INF
    if op == BEST:
        answer += 1.0
    listed = take(state_ptr + SUMS + 2).to(tl.int32)
    tl.debug_barrier()
    sums_ptr = state_ptr + SUMS  # and the slot behind them, `SECOND`
    ahead = high
    edge = least_of(list_ptr, listed, sign, ahead + 1, TOP, BLOCK)
    same, held, start = zero, zero, zero
    above = 0.0 * top - INF
    open_ = low <= high
    while open_:
        # The next of them, behind the one that is held.
        new = zero
        if (same == 0) & (ahead < edge):
            edge, found = reach(x_ptr, V, low, ahead, sign, zero + ROOM, TOP, BLOCK, NB)
            if found > ROOM:
                same, ahead = found, edge
            else:
                listed = found.to(tl.int32)
                collect(x_ptr, V, edge, ahead, sign, list_ptr, TOP, BLOCK)
        if same == 0:
            begin, new = reach(list_ptr, listed, edge, ahead, sign, zero + PIECE - 1, TOP, BLOCK, NB)
            if new > PIECE - 1:
                same, ahead, new = new, begin, zero
            else:
                collect(list_ptr, listed, begin, ahead, sign, raw_ptr, TOP, BLOCK)
                put_in_order(raw_ptr, new.to(tl.int32), sign, piece_ptr + held, PIECE)
                ahead = begin - 1
        if same > 0:
            new = tl.minimum(same, PIECE - 1)
            tl.store(piece_ptr + held + lane, from_key((ahead * sign).to(tl.int32) + 0 * lane), mask=lane < new)
            tl.debug_barrier()
            same -= new
            ahead -= tl.where(same == 0, 1, 0).to(tl.int64)
        ended = (same == 0) & (ahead < low)
        known = held + new
        # The last one known is only there to be the next of the one before, unless there is no more.
        usable = tl.where(ended, known, tl.maximum(known - 1, 0))
        alive = lane < usable
        z = tl.load(piece_ptr + lane, mask=lane < known, other=0.0)
        value = value_of(z, scale, origin, shift, maps_ptr, maps)
        z = tl.load(piece_ptr + lane - 1, mask=alive & (lane > 0), other=0.0)
        before = tl.where(lane > 0, value_of(z, scale, origin, shift, maps_ptr, maps), above)
        z = tl.load(piece_ptr + lane + 1, mask=lane + 1 < known, other=0.0)
        below = tl.where(lane + 1 < known, value_of(z, scale, origin, shift, maps_ptr, maps), -INF)
        bend = tl.where(alive, bend_of(before, value, below, top), 0.0)
        d = tl.where(alive, value - top, 0.0)
        slot = lanes_ptr + lane
        tl.debug_barrier()
        tl.store(slot, value)
        tl.store(slot + PIECE, below)
        running(slot + 2 * PIECE, bend, alive, sums_ptr, 1.0)
        tl.store(slot + 3 * PIECE, (start + lane + 1).to(tl.float64))
        if bits & 14:
            e = weight(d)
            running(slot + 4 * PIECE, e, alive, sums_ptr + 2, 1.0)
            running(slot + 5 * PIECE, tl.maximum(d, -700.0) * e * raised, alive, sums_ptr + 4, lowered)
            running(slot + 6 * PIECE, e * e, alive, sums_ptr + 6, 1.0)
        if bits & 16:
            running(slot + 7 * PIECE, weight(0.5 * d), alive, sums_ptr + 8, 1.0)
        if bits & 96:
            d = tl.maximum(d, -1.7976931348623157e308) * small
            running(slot + 8 * PIECE, d, alive, sums_ptr + 10, large)
            running(slot + 9 * PIECE, d * d, alive, sums_ptr + 12, large * large)
        tl.debug_barrier()
        score = score_top_sets(code_ptr, at + 1, count, regs_ptr, lanes_ptr, base, PIECE)
        if op == BEST:
            score = tl.where(alive & (score == score), score, -INF)
            most = tl.max(score, 0)
            place = tl.min(tl.where(score == most, lane, PIECE), 0)
            better = most > best
            answer = tl.where(better, (start + place + 1).to(tl.float64), answer)
            best = tl.where(better, most, best)
            open_ = ended == 0
            if (sense != 0) & (usable > 0):
                # What is behind scores at most that.
                known_in = tl.where(limit >= base, lanes_ptr + (limit - base) * PIECE + usable - 1, regs_ptr + limit)
                open_ = open_ & ((best >= tl.load(known_in)) == 0)
        else:
            fails = alive & (score * sense < bound * sense)
            place = tl.minimum(tl.min(tl.where(fails, lane, PIECE), 0), usable.to(tl.int32))
            answer += place.to(tl.float64)
            if place > 0:
                for j in range(TOPS):
                    tl.store(regs_ptr + base + j, tl.load(lanes_ptr + j * PIECE + place - 1))
            open_ = (place == usable) & (ended == 0)
        if usable > 0:
            above = tl.load(lanes_ptr + usable - 1)
            last_known = tl.load(piece_ptr + usable, mask=usable < known, other=0.0)
            tl.debug_barrier()
            tl.store(piece_ptr, last_known)
        held = known - usable
        start += usable
        tl.debug_barrier()
    for i in range(14):
        tl.store(sums_ptr + i, zero)
    tl.store(regs_ptr + dst, answer)
    tl.debug_barrier()
    run(at + 1 + count, code_ptr, regs_ptr, maps_ptr, maps, state_ptr, x_ptr, V, TOP, BLOCK)


@triton.jit
def rank_of(ranked_ptr, bound, V, sign, STRICT: tl.constexpr):
    """How many tokens of a row, in decreasing order of value, stand at a u above ``bound`` (or at least there)."""
    lane = tl.arange(0, 128).to(tl.int64)
    start, stop = 0 * bound, V + 0 * bound
    while start < stop:
        width = (stop - start + 127) // 128
        i = start + lane * width
        u = u_at_rank(ranked_ptr, i, V, sign)
        before = (u > bound) if STRICT else (u >= bound)
        n = tl.sum(((i < stop) & before).to(tl.int64), 0)
        stop = tl.minimum(stop, start + n * width)
        start = tl.where(n > 0, start + (n - 1) * width + 1, start)
    return start


@triton.jit
def place_of(i, V, sign):
    """Where the i-th largest value of a row lies among its logits in decreasing order."""
    return tl.where(sign > 0, i, V - 1 - i)


@triton.jit
def u_at_rank(ranked_ptr, i, V, sign):
    """u of the i-th largest value."""
    inside = (i >= 0) & (i < V)
    return to_key(tl.load(ranked_ptr + place_of(i, V, sign), mask=inside, other=0.0)).to(tl.int64) * sign


@triton.jit
def value_at_rank(ranked_ptr, i, first, last, V, sign, maps_ptr, maps):
    """Value of the i-th largest, -inf unless it is kept, which those at [first, last) are."""
    inside = (i >= first) & (i < last)
    z = tl.load(ranked_ptr + place_of(i, V, sign), mask=inside, other=0.0)
    scale, origin, shift = first_map(maps_ptr, maps)
    return tl.where(inside, value_of(z, scale, origin, shift, maps_ptr, maps), -INF)


@triton.jit(do_not_specialize=VARYING)
def curvature(
    x_ptr, x_stride, V, G, chunk, code_ptr, at, regs_ptr, registers, maps_ptr, maps, map_rows, state_ptr, state_stride,
    ranked_ptr, TOP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of the absolute second differences of exp(value - peak), on a row in decreasing order."""
    row = (tl.program_id(0) // G).to(tl.int64)
    begin = (tl.program_id(0) % G) * chunk
    x_ptr += row * x_stride
    regs_ptr += row * registers
    maps_ptr += row * map_rows * 3
    state_ptr += row * state_stride
    ranked_ptr += row * V
    low, high, sign = tl.load(state_ptr + LOW), tl.load(state_ptr + HIGH), tl.load(state_ptr + SIGN)
    top = value_at(tl.load(state_ptr + PEAK), sign, maps_ptr, maps)
    first = rank_of(ranked_ptr, high, V, sign, True)
    last = tl.maximum(rank_of(ranked_ptr, low, V, sign, False), first)
    bent_high, bent_low = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
    for start in range(begin, begin + chunk, BLOCK):
        i = first + start + tl.arange(0, BLOCK)
        value = value_at_rank(ranked_ptr, i, first, last, V, sign, maps_ptr, maps)
        before = value_at_rank(ranked_ptr, i - 1, first, last, V, sign, maps_ptr, maps)
        below = value_at_rank(ranked_ptr, i + 1, first, last, V, sign, maps_ptr, maps)
        bent_high, bent_low = add_limbs(bend_of(before, value, below, top), i < last, bent_high, bent_low)
    publish_limbs(state_ptr + SUMS, bent_high, bent_low)
    if is_last(state_ptr, G):
        tl.store(regs_ptr + tl.load(code_ptr + at * FIELDS + 1), joined(take(state_ptr + SUMS), take(state_ptr + SUMS + 1)))
        tl.debug_barrier()
        run(at + 1, code_ptr, regs_ptr, maps_ptr, maps, state_ptr, x_ptr, V, TOP, BLOCK)


@triton.jit(do_not_specialize=VARYING)
def write(
    x_ptr, x_stride, y_ptr, y_stride, V, maps_ptr, maps, map_rows, state_ptr, state_stride,
    TOP: tl.constexpr, LIMIT: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Kept logits as they are, or their values, moved into the range of the output's type where they aren't."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < V
    maps_ptr += row * map_rows * 3
    state_ptr += row * state_stride
    low, high, sign = interval_of(state_ptr)
    raw = tl.load(x_ptr + row * x_stride + offsets, mask=inside, other=float("-inf"))
    raw = raw.to(tl.float32)
    z = tl.where(raw == INF, TOP, raw)
    u = to_key(z) * sign
    kept = (u >= low) & (u <= high)
    y_ptr += row * y_stride + offsets
    if MASK:
        tl.store(y_ptr, tl.where(kept, raw, -INF).to(y_ptr.dtype.element_ty), mask=inside)
    else:
        top = value_at(tl.load(state_ptr + PEAK), sign, maps_ptr, maps)
        scale, origin, shift = first_map(maps_ptr, maps)
        v = value_of(tl.where(kept, z, 0.0), scale, origin, shift, maps_ptr, maps)
        v = tl.where((tl.abs(top) > LIMIT / 2) & (tl.abs(top) < INF), v - top, v)
        v = tl.where(v < -LIMIT, -LIMIT, v)
        tl.store(y_ptr, tl.where(kept, v, -INF).to(tl.float32).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def race(
    x_ptr, x_stride, V, G, chunk, maps_ptr, maps, map_rows, state_ptr, state_stride,
    seeds_ptr, positions_ptr, scores_ptr, places_ptr, tokens_ptr,
    TOP: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Draw a token: the winner of a race of exponentials, as in `decal.kernels.reference.draw`."""
    row = (tl.program_id(0) // G).to(tl.int64)
    part = tl.program_id(0) % G
    begin = part * chunk
    end = tl.minimum(begin + chunk, V)
    x_ptr += row * x_stride
    maps_ptr += row * map_rows * 3
    state_ptr += row * state_stride
    low, high, sign = interval_of(state_ptr)
    top = value_at(tl.load(state_ptr + PEAK), sign, maps_ptr, maps)
    scale, origin, shift = first_map(maps_ptr, maps)
    key = mix(mix(tl.load(seeds_ptr + row) + GOLDEN) + tl.load(positions_ptr + row) + GOLDEN)
    best, place = -1.0 + 0.0 * top, 0 * end
    for i in range(begin, end, BLOCK):
        token = i + tl.arange(0, BLOCK)
        z = load_logits(x_ptr, token, end, TOP)
        u = to_key(z) * sign
        kept = (u >= low) & (u <= high)
        if tl.sum(kept.to(tl.int32), 0) > 0:
            v = value_of(tl.where(kept, z, 0.0), scale, origin, shift, maps_ptr, maps)
            score = weight(tl.where(kept, v - top, 0.0)) / exponential(mix(key + token.to(tl.int64) + GOLDEN))
            score = tl.where(kept, score, -1.0)
            most = tl.max(score, 0)
            first = tl.min(tl.where(score == most, token, V), 0)
            place = tl.where(most > best, first, place)
            best = tl.maximum(best, most)
    tl.store(scores_ptr + row * G + part, best)
    tl.store(places_ptr + row * G + part, place)
    if is_last(state_ptr, G):
        lane = tl.arange(0, PARTS)
        inside = lane < G
        scores = tl.load(scores_ptr + row * G + lane, mask=inside, other=-2.0, cache_modifier=".cg")
        places = tl.load(places_ptr + row * G + lane, mask=inside, other=0, cache_modifier=".cg")
        most = tl.max(scores, 0)
        # An empty row draws token 0, as its parts all say.
        tl.store(tokens_ptr + row, tl.min(tl.where(scores == most, places, V), 0).to(tl.int64))


# ---- the host's side


class Stage(NamedTuple):
    """A reading of the whole row: where it stands in the program, what it is, and how many maps come before."""

    at: int
    op: int
    maps: int


SEARCHES = frozenset({int(Op.LONGEST), int(Op.BEST)})


@lru_cache(maxsize=512)
def stages(program: Program) -> tuple[Stage, ...]:
    """The readings of a program in order, but for the first, which every program begins with."""
    reads = {int(op) for op in (Op.MOMENTS, Op.COUNT_UPPER, Op.MASS_UPPER, Op.NEAREST, Op.SMALLEST, Op.CURVATURE)}
    found, maps, at = [], 0, 0
    while at < len(program.code):
        op = program.code[at][0]
        if op in reads | SEARCHES:
            found.append(Stage(at, op, maps))
        if op in SEARCHES:
            at += program.code[at][5]
        maps += op == Op.AFFINE
        at += 1
    return tuple(found)


def launches(program: Program) -> int:
    """How many kernels of this module a call takes, besides clearing a few kilobytes and, for `Op.CURVATURE`, torch's sort."""
    halves = {int(Op.COUNT_UPPER), int(Op.MASS_UPPER), int(Op.NEAREST)}
    entropies = sum(stage.op == Op.MOMENTS and reads_t(program.code[stage.at]) for stage in stages(program))
    return 2 + entropies + sum(3 if stage.op in SEARCHES else 2 if stage.op in halves else 1 for stage in stages(program))


def reads_t(moments_: tuple[int, ...]) -> bool:
    """Whether an `Op.MOMENTS` wants the moment ``t``."""
    return bool(moments_[2] & bits_of(["t"]))


class Data(NamedTuple):
    """A program on a device: its instructions, what registers begin with, and which ones the parameters go to."""

    code: Tensor
    initial: Tensor
    columns: Tensor


@lru_cache(maxsize=512)
def data_of(program: Program, on: torch.device) -> Data:
    """A program on a device; copied once."""
    initial = torch.zeros(max(program.registers, 1), dtype=torch.float64)
    initial[: program.registers] = torch.from_numpy(program.initial)
    columns = torch.tensor(program.columns or (0,), dtype=torch.int32)
    return Data(torch.from_numpy(program.code_array).to(on), initial.to(on), columns.to(on))


class Work(NamedTuple):
    """What a call works on: the rows, and what is known of them."""

    program: Program
    logits: Tensor
    config: Config
    data: Data
    registers: Tensor
    maps: Tensor
    state: Tensor
    parameters: Tensor

    @property
    def parts(self) -> tuple[int, int]:
        """Programs per row, and logits for each."""
        config, width = self.config, self.logits.shape[1]
        chunk = triton.cdiv(triton.cdiv(width, config.splits), config.block) * config.block
        return triton.cdiv(width, chunk), chunk

    @property
    def options(self) -> dict[str, Any]:
        """What every kernel is compiled with. Fused operations would round otherwise than the CPU does."""
        return self.options_for(self.config.warps, REGISTERS[self.config.warps])

    def options_for(self, warps: int, registers: int) -> dict[str, Any]:
        """The same for another number of warps, and of registers."""
        top = torch.finfo(self.logits.dtype).max
        bound = {} if torch.version.hip else {"maxnreg": registers}
        return {"TOP": top, "BLOCK": self.config.narrow, "num_warps": warps, "enable_fp_fusion": False, **bound}

    def row(self, maps: int) -> tuple[Any, ...]:
        """Arguments that say where the maps and the state of a row are."""
        return self.maps, maps, self.maps.shape[1], self.state, self.state.shape[1]


def prepare(program: Program, logits: Tensor, parameters: Tensor | None, config: Config | None) -> Work:
    """Check arguments and find room for what is known of the rows."""
    if logits.dtype not in TYPES:
        raise TypeError(f"the kernels take float32, float16 and bfloat16, got {logits.dtype}")
    rows, width = logits.shape
    if not 0 < width < 2**21:
        raise ValueError(f"the kernels take between 1 and {2**21 - 1} logits a row, got {width}")
    config = config or config_of(rows, width)
    logits = logits if logits.stride(1) == 1 or width == 1 else logits.contiguous()
    on, selects = logits.device, any(s.op in {Op.COUNT_UPPER, Op.MASS_UPPER, Op.NEAREST} | SEARCHES for s in stages(program))
    if program.columns:
        assert parameters is not None
        parameters = parameters.to(on, torch.float64).contiguous()
    registers = torch.empty(rows, max(program.registers, 1), dtype=torch.float64, device=on)
    maps = torch.empty(rows, max(program.affines, 1), 3, dtype=torch.float64, device=on)
    state = torch.zeros(rows, SLOTS + (config.bins if selects else 0), dtype=torch.int64, device=on)
    data = data_of(program, on)
    return Work(program, logits, config, data, registers, maps, state, data.initial if parameters is None else parameters)


def read(work: Work) -> None:
    """Launch everything but the answer."""
    logits, config, (parts, chunk), options = work.logits, work.config, work.parts, work.options
    rows, width = logits.shape
    grid = (rows * parts,)
    code, registers = work.data.code, work.registers
    columns = len(work.program.columns)

    def shared(at: int, maps: int) -> tuple[Any, ...]:
        place = (logits, logits.stride(0), width, parts, chunk, code, at, registers, registers.shape[1])
        return (*place, *work.row(maps))

    def launch_extremes(at: int, maps: int, start: bool) -> None:
        last = (work.data.initial, work.data.columns, columns, work.parameters)
        extremes[grid](*shared(at, maps), *last, START=start, **{**options, "BLOCK": config.block})

    launch_extremes(0, 0, True)
    candidates = None
    for at, op, maps in stages(work.program):
        if op == Op.SMALLEST:
            launch_extremes(at, maps, False)
        elif op == Op.MOMENTS:
            if reads_t(work.program.code[at]):
                runner_up[grid](
                    logits, logits.stride(0), width, parts, chunk, *work.row(maps), **{**options, "BLOCK": config.block}
                )
            moments[grid](*shared(at, maps), **{**options, "BLOCK": config.narrow // 2})
        elif op == Op.CURVATURE:
            curvature[grid](*shared(at, maps), ranked_of(logits), **options)
        else:
            if candidates is None:
                candidates = torch.empty(rows, config.room, dtype=torch.float32, device=logits.device)
            bins = work.state.view(torch.int32)
            kind = Op.COUNT_UPPER if op in SEARCHES else op
            listed = config.room if op in SEARCHES else 0
            halved = {**options, "BLOCK": bin_block(config, kind)}
            count_bins[grid](*shared(at, maps), bins, NB=bins_for(config, kind), KIND=kind, LISTED=listed, **halved)
            if op in SEARCHES:
                list_top[grid](
                    logits, logits.stride(0), width, parts, chunk, *work.row(maps), candidates,
                    NB=config.bins, ROOM=config.room, **options,
                )  # fmt: skip
                pieces = torch.empty(rows, 2, config.piece, dtype=torch.float32, device=logits.device)
                ranking[(rows,)](
                    logits, logits.stride(0), width, code, at, registers, registers.shape[1], *work.row(maps),
                    candidates, pieces, *lanes_of(work, at),
                    PIECE=config.piece, ROOM=config.room, NB=config.bins // 2, **work.options_for(*RANKING),
                )  # fmt: skip
            else:
                choose[grid](*shared(at, maps), candidates, NB=bins_for(config, op), KIND=op, ROOM=config.room, **options)


def bins_for(config: Config, op: int) -> int:
    """Bins of a selection; those on two sides of a center share the room."""
    return config.bins // 2 if op == Op.NEAREST else config.bins


def bin_block(config: Config, op: int) -> int:
    """Block of `count_bins`; smaller where it counts on two sides."""
    return config.narrow // 2 if op == Op.NEAREST else config.narrow


def ranked_of(logits: Tensor) -> Tensor:
    """(B, V) logits in decreasing order, made finite as the kernels do."""
    top = torch.finfo(logits.dtype).max
    return (
        logits.float().nan_to_num(nan=-torch.inf, posinf=top, neginf=-torch.inf).sort(-1, descending=True).values.contiguous()
    )


def lanes_of(work: Work, at: int) -> tuple[Tensor, int]:
    """Room for the registers of a piece of top sets, and how many registers from the first of a top set on have it."""
    _op, _dst, limit, _sense, base, count, _bits = work.program.code[at]
    inner = work.program.code[at + 1 : at + 1 + count]
    span = max([base + TOPS.value, limit + 1, *(field + 1 for one in inner for field in one[1:5])]) - base
    rows = len(work.logits)
    return torch.empty(rows, span, work.config.piece, dtype=torch.float64, device=work.logits.device), span


def transform(
    program: Program,
    logits: Tensor,
    parameters: Tensor | None = None,
    *,
    mask: bool = False,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    careful: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, None]:
    """What a program makes of logits (B, V). The second of the pair is in place of flags, which would have to be waited for.

    Args:
        parameters: (B, columns) float64 on the device of the logits, for programs with per-row parameters.
        mask: leave kept logits as they are, whatever the program maps them to; one that maps nothing always does.
        dtype: of the result, by default that of the logits.
        out: where to write; may be ``logits``.
        careful: for the sake of one signature with the CPU path.
        config: in place of what `config_of` chooses.
    """
    work = prepare(program, logits, parameters, config)
    rows, width = logits.shape
    if out is None:
        out = torch.empty(rows, width, dtype=dtype or logits.dtype, device=logits.device)
    if out.shape != logits.shape or (width > 1 and out.stride(1) == 0) or (rows > 1 and out.stride(0) == 0):
        raise ValueError("out must have the shape of the logits, and memory of its own for each of them")
    target = out if out.stride(1) == 1 or width == 1 else torch.empty_like(out, memory_format=torch.contiguous_format)
    read(work)
    limit = torch.finfo(target.dtype).max
    grid = (rows, triton.cdiv(width, work.config.block))
    write[grid](
        work.logits, work.logits.stride(0), target, target.stride(0), width, *work.row(program.affines),
        LIMIT=limit, MASK=mask or not program.affines, **{**work.options, "BLOCK": work.config.block},
    )  # fmt: skip
    return out if target is out else out.copy_(target), None


def check(device: str) -> None:
    """Run on ``device`` what a chain with a temperature, a cut by mass, and a map by what is left does, and compare with torch.

    Raises:
        RuntimeError: they differ.
    """
    builder = Builder()
    share, third = builder.number(0.9), builder.number(1 / 3)
    builder.affine(builder.number(1 / 0.7), builder.number(0.0))
    builder.band(builder.mass_upper(share), builder.number(torch.inf))
    builder.affine(third, builder.moments(["n"])["n"].log())
    program = builder.program()
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)) * 3
    column = torch.ones(3, 1, dtype=torch.float64)
    z_BV = reference.affine(reference.clean(logits), column / 0.7, 0 * column)
    z_BV = reference.keep_between(z_BV, reference.upper(z_BV, mass=0.9 * column), torch.inf * column)
    z_BV = reference.affine(z_BV, column / 3, reference.moments(z_BV, ["n"])["n"].log())
    found = transform(program, logits.to(device))[0].cpu()
    seeds, places = torch.arange(3), torch.arange(3)
    tokens = sample(program, logits.to(device), seeds.to(device), places.to(device))[0].cpu()
    wanted = reference.narrow(z_BV, logits.dtype)
    close = torch.allclose(found.nan_to_num(neginf=-1e30), wanted.nan_to_num(neginf=-1e30), rtol=1e-5)
    if not close or not torch.equal(tokens, reference.draw(z_BV, seeds[:, None], places[:, None])):
        raise RuntimeError(f"the kernels give other results on {device} than plain torch does")


def sample(
    program: Program,
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    parameters: Tensor | None = None,
    careful: bool = False,
    *,
    config: Config | None = None,
) -> tuple[Tensor, None]:
    """Tokens (B,) drawn from what a program makes of logits; ``seeds`` and ``positions`` are (B,) int64. See `transform`."""
    work = prepare(program, logits, parameters, config)
    rows, width = logits.shape
    read(work)
    parts, chunk = work.parts
    scores = torch.empty(rows, parts, dtype=torch.float64, device=logits.device)
    places = torch.empty(rows, parts, dtype=torch.int32, device=logits.device)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    race[(rows * parts,)](
        work.logits, work.logits.stride(0), width, parts, chunk, *work.row(program.affines),
        seeds.contiguous(), positions.contiguous(), scores, places, tokens,
        PARTS=triton.next_power_of_2(parts), **work.options,
    )  # fmt: skip
    return tokens, None
