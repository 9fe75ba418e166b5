"""The CPU path: programs on torch tensors, run by `decal.kernels.cpu_rows`.

Rows are independent of each other, one thread takes each from its first reading to its last write, and all that is summed is
summed in integers (`decal.kernels.mass`): a row gives the same bits in any batch, on any number of threads. Threads are used
where they pay, and never for a single row.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decal.kernels.cpu_rows import BINS, BLOCK, MASK, TOKENS, VALUES, Work, run_rows, run_sums
from decal.kernels.cpu_rows import UNFIT as UNFIT
from decal.kernels.program import Program, bits_of

_local = threading.local()


def _work(width: int, dtype: np.dtype, top: float, maps: int) -> Work:
    """The memory of this thread for rows of that kind."""
    held = _local.__dict__.setdefault("work", {})
    key = width, dtype, top, maps
    if key not in held:
        if len(held) >= 4:
            held.clear()
        limits = np.finfo(dtype)
        ends = np.array([-np.inf, np.inf, top, limits.min, limits.max, 1.0, limits.tiny], dtype=dtype)
        size = width + 8

        def rows(of: Any) -> np.ndarray:
            return np.empty(size, dtype=of)

        held[key] = Work(
            ends, np.empty(width // 32 + 64, dtype), rows(dtype), rows(dtype), rows(np.int32), rows(dtype), rows(np.int32),
            np.empty((2, BINS + 1), np.int64), rows(np.uint32), rows(np.uint32), rows(np.uint8), np.empty(BLOCK),
            np.empty((maps + 1, 3)),
        )  # fmt: skip
    return held[key]


NO_NUMBERS, NO_ROWS, NO_WIDE_ROWS = np.empty(0, np.int64), np.empty((1, 1), np.float32), np.empty((1, 1))
NATIVE = (torch.float32, torch.float64)
TYPES = (*NATIVE, torch.float16, torch.bfloat16)
"""Types of logits it takes."""
TOP = {dtype: torch.finfo(dtype).max for dtype in TYPES}


@cache
def _tell_of_compiling() -> None:
    """Say so, where the first call will take long."""
    if not any(Path(run_rows.stats.cache_path).glob("cpu_rows.run_rows-*.nbi")):
        logging.getLogger("decal").warning("decal compiles its CPU code for this machine; that takes a while, but only once")


PARALLEL = 1 << 18
"""Logits from which on another thread pays."""


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "decal")


def _divide(rows: int, cells: int, part: Callable[[int, int], None]) -> None:
    """``part(first, last)`` over all rows, on as many threads as torch uses where that pays."""
    threads = min(torch.get_num_threads(), rows) if cells >= PARALLEL else 1
    if threads <= 1:
        part(0, rows)
        return
    bounds = [rows * t // threads for t in range(threads + 1)]
    others = [_pool(os.getpid(), threads - 1).submit(part, *bounds[t : t + 2]) for t in range(1, threads)]
    part(0, bounds[1])
    for other in others:
        other.result()


def running_sums(level: Tensor, alive: Tensor, scale: float, out: Mapping[str, Tensor]) -> None:
    """See `decal.kernels.reference.running_sums`; moments ``s``, ``t``, ``q`` and ``h``."""
    sums = [out[name].numpy() if name in out else NO_WIDE_ROWS for name in "stqh"]
    arrays = level.contiguous().numpy(), alive.numpy()
    wanted = bits_of(list(out))
    _divide(len(level), level.numel(), lambda first, last: run_sums(*arrays, scale, wanted, first, last, *sums))


def _flat(logits: Tensor) -> tuple[np.ndarray, int]:
    """The memory of rows as one array, and how far rows lie apart."""
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        logits = logits.contiguous()
    rows, width = logits.shape
    stride = logits.stride(0) if rows > 1 else width
    if stride == width:
        return logits.as_strided((rows * width,), (1,)).numpy(), width
    return logits.as_strided(((rows - 1) * stride + width,), (1,)).numpy(), stride


def run(
    program: Program,
    logits: Tensor,
    parameters: Tensor | None,
    kind: int,
    *,
    top: float,
    careful: bool,
    out: np.ndarray = NO_ROWS,
    seeds: np.ndarray = NO_NUMBERS,
    positions: np.ndarray = NO_NUMBERS,
    tokens: np.ndarray = NO_NUMBERS,
) -> np.ndarray:
    """Run ``program`` on float32 or float64 rows (B, V), any distance apart, and write what ``kind`` says; see `transform`.

    Args:
        top: the largest finite number of the type that the logits came in, and values are to have.
    """
    _tell_of_compiling()
    rows, width = logits.shape
    flat, stride = _flat(logits)
    initial = program.registers_of(parameters, rows)
    flags = np.zeros(rows, np.uint8)
    code = program.code_array
    target = out if kind != TOKENS else NO_ROWS if flat.itemsize == 4 else NO_WIDE_ROWS

    def part(first: int, last: int) -> None:
        work = _work(width, flat.dtype, top, program.affines)
        run_rows(
            flat, stride, width, first, last, initial, code, work, target, kind, top, seeds, positions, tokens, flags, careful
        )

    _divide(rows, rows * width, part)
    return flags


def transform(
    program: Program,
    logits: Tensor,
    parameters: Tensor | None = None,
    *,
    mask: bool = False,
    out: Tensor | None = None,
    careful: bool = False,
) -> tuple[Tensor, np.ndarray]:
    """What a program makes of logits (B, V), in their type, and flags (B,), see `decal.kernels.cpu_rows`.

    Args:
        parameters: (B, columns) float64, for programs with per-row parameters.
        mask: leave kept logits as they are, whatever the program maps them to; one that maps nothing always does.
        out: where to write; may be ``logits``.
        careful: whether flags are to tell of NaN.
    """
    dtype = logits.dtype
    plain = logits if dtype in NATIVE else logits.float()
    target = out if out is not None and out.dtype == plain.dtype and out.is_contiguous() else empty_like(plain)
    kind = MASK if mask or program.is_mask else VALUES
    flags = run(program, plain, parameters, kind, top=TOP[dtype], careful=careful, out=target.numpy())
    if out is None:
        return target if plain is logits else target.to(dtype), flags
    return target if out is target else out.copy_(target), flags


def sample(
    program: Program, logits: Tensor, seeds: Tensor, positions: Tensor, parameters: Tensor | None = None, careful: bool = False
) -> tuple[Tensor, np.ndarray]:
    """Tokens (B,) drawn from what a program makes of logits, and flags; ``seeds`` and ``positions`` are (B,) int64."""
    plain = logits if logits.dtype in NATIVE else logits.float()
    tokens = torch.empty(len(logits), dtype=torch.int64)
    keys = seeds.contiguous().numpy(), positions.contiguous().numpy()
    flags = run(
        program, plain, parameters, TOKENS, top=TOP[logits.dtype], careful=careful, seeds=keys[0], positions=keys[1],
        tokens=tokens.numpy(),
    )  # fmt: skip
    return tokens, flags


REUSED = 1 << 24
"""Bytes from which on the memory of an output is kept for the next one when nobody uses it any more: the system hands out fresh
pages for blocks this large, and clearing them takes longer than most programs."""
KEPT = 2
"""How many such blocks are kept, of whatever size."""
_kept: dict[int, np.ndarray] = {}


def empty_like(logits: Tensor) -> Tensor:
    """An uninitialised contiguous tensor of that shape and type."""
    size = logits.numel() * logits.element_size()
    if size < REUSED:
        return torch.empty(logits.shape, dtype=logits.dtype)
    # A copy, as collecting garbage at any moment may give blocks back.
    fits = (key for key, block in _kept.copy().items() if block.size == size)
    # Another thread may have been faster.
    found = (_kept.pop(key, None) for key in fits)
    block = next((one for one in found if one is not None), None)
    if block is None:
        block = np.empty(size, np.uint8)
    view = block[:]
    # The tensor holds the view, and whatever shares its memory holds the tensor's.
    weakref.finalize(view, _give_back, block).atexit = False
    return torch.from_numpy(view).view(logits.dtype).view(logits.shape)


def _give_back(block: np.ndarray) -> None:
    _kept[id(block)] = block
    for key in list(_kept)[:-KEPT]:
        _kept.pop(key, None)
