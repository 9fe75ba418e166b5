"""The CPU path: programs on torch tensors, run by `decal.kernels.cpu_rows`.

Rows are independent of each other, one thread takes each from its first reading to its last write, and all that is summed is
summed in integers (`decal.kernels.mass`): a row gives the same bits in any batch, on any number of threads. Threads are used
where they pay, and never for a single row.
"""

from __future__ import annotations

import ctypes
import logging
import struct
import threading
import weakref
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from decal.kernels.cpu_rows import AT, CALL, FLOATS, MASK, SUMS, TOKENS, VALUES, WORK, rows_entry, sums_entry
from decal.kernels.cpu_rows import UNFIT as UNFIT
from decal.kernels.program import Program, bits_of
from decal.kernels.threads import run as run_on

_local = threading.local()

NATIVE = {torch.float32: np.float32, torch.float64: np.float64}
TYPES = (*NATIVE, torch.float16, torch.bfloat16)
"""Types of logits it takes."""
TOP = {dtype: torch.finfo(dtype).max for dtype in TYPES}
_CALL, _SUMS = (struct.Struct("=" + "".join("d" if n in FLOATS else "q" for n in names)) for names in (CALL, SUMS))

_POINTERS, _INITIAL = struct.Struct("=5q"), struct.Struct("=2q")
"""What differs from call to call."""

PARALLEL = 1 << 18
"""Logits from which on another thread pays."""


class _Compiled(NamedTuple):
    address: int
    call: Callable[[int], None]


@cache
def _compiled(entry: Callable[..., Any], *arguments: Any) -> _Compiled:
    """Compiled code, by `decal.kernels.cpu_rows.rows_entry` or `sums_entry`."""
    # Code that is kept on disk is there in less.
    telling = threading.Timer(SOON, _tell_of_compiling)
    telling.daemon = True
    telling.start()
    try:
        function = entry(*arguments)
    finally:
        telling.cancel()
    return _Compiled(function.address, ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function.address))


SOON = 3.0
"""Seconds after which compiling is worth a word."""


def _tell_of_compiling() -> None:
    logging.getLogger("decal").warning("decal compiles its CPU code for this machine; that takes a while, but only once")


class _Memory:
    """The memory of the threads that work for this one, on rows of one width and type."""

    def __init__(self, width: int, dtype: type, maps: int, threads: int):
        parts = [np.dtype(of or dtype).itemsize * count(width, maps) for of, count in WORK.values()]
        offsets = np.cumsum([0, *(-(-part // ALIGNED) * ALIGNED for part in parts)])
        self.size = int(offsets[-1])
        self._offsets = offsets[:-1].astype(np.int64)
        self.offsets = self._offsets.ctypes.data
        self._block = np.empty(self.size * threads + ALIGNED, np.uint8)
        self.address = -(-self._block.ctypes.data // ALIGNED) * ALIGNED
        limits = np.finfo(dtype)
        ends: Any = np.array([-np.inf, np.inf, 0.0, limits.min, limits.max, 1.0, limits.tiny], dtype=dtype)
        for thread in range(threads):
            ctypes.memmove(self.address + thread * self.size, ends.ctypes.data, ends.nbytes)

    @classmethod
    def of(cls, *kind: Any) -> _Memory:
        """This thread's, for the same arguments the same."""
        held = _local.__dict__.setdefault("memory", {})
        if kind not in held:
            if len(held) >= 4:
                held.clear()
                _local.plans = {}  # they hold memory too
            held[kind] = cls(*kind)
        return held[kind]


ALIGNED = 64
"""Bytes that parts of the memory are aligned to: a line of the cache."""


def _run(code: _Compiled, call: bytearray, threads: int) -> None:
    address = ctypes.addressof(ctypes.c_char.from_buffer(call))
    if threads > 1:
        run_on(code.address, address, threads)
    else:
        code.call(address)


def _threads(rows: int, cells: int) -> int:
    """How many threads pay."""
    return min(torch.get_num_threads(), rows) if cells >= PARALLEL else 1


def running_sums(level: Tensor, alive: Tensor, scale: float, out: Mapping[str, Tensor]) -> None:
    """See `decal.kernels.reference.running_sums`; moments ``s``, ``t``, ``q`` and ``h``, rows and sums float64."""
    level, alive = level.contiguous(), alive.contiguous()
    rows, width = level.shape
    places = (out[name].data_ptr() if name in out else 0 for name in "stqh")
    call = bytearray(_SUMS.pack(level.data_ptr(), alive.data_ptr(), scale, bits_of(list(out)), width, rows, *places, 0))
    _run(_compiled(sums_entry), call, _threads(rows, level.numel()))


class _Plan(NamedTuple):
    """What calls with one program on logits of one kind have in common."""

    program: Program
    memory: _Memory
    code: _Compiled
    threads: int
    call: bytes


def _plan(
    program: Program, shape: torch.Size, stride: int, dtype: torch.dtype, kind: int, top: float, careful: bool, most: int
) -> _Plan:
    rows, width = shape
    threads = min(most, rows) if rows * width >= PARALLEL else 1
    native = NATIVE[dtype]
    memory = _Memory.of(width, native, program.affines, threads)
    code, initial = program.addresses
    call = _CALL.pack(
        0, 0, 0, 0, 0, initial, 1, stride, width, rows, program.registers, code, len(program.code), memory.address,
        memory.size, memory.offsets, program.affines, kind, top, careful, 0, 0, 0,
    )  # fmt: skip
    return _Plan(program, memory, _compiled(rows_entry, native), threads, call)


def run(
    program: Program,
    logits: Tensor,
    parameters: Tensor | None,
    kind: int,
    *,
    top: float,
    careful: bool,
    out: Tensor | None = None,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    tokens: Tensor | None = None,
) -> int:
    """Run ``program`` on float32 or float64 rows (B, V), any distance apart, and write what ``kind`` says; see `transform`.

    Args:
        top: the largest finite number of the type that the logits came in, and values are to have.

    Returns:
        The flags of all rows together, see `decal.kernels.cpu_rows`.
    """
    stride, along = logits.stride()
    if along != 1:
        logits = logits.contiguous()
        stride = logits.stride(0)
    plans = _local.__dict__.setdefault("plans", {})
    # The plan holds the program, so no other one can come to have its number.
    key = id(program), logits.shape, stride, logits.dtype, kind, top, careful, torch.get_num_threads(), PARALLEL
    plan = plans.get(key)
    if plan is None:
        plan = _plan(program, logits.shape, stride, logits.dtype, kind, top, careful, torch.get_num_threads())
        plans = _local.plans
        if len(plans) >= 64:
            plans.clear()
        plans[key] = plan
    call = bytearray(plan.call)
    if out is not None:
        _POINTERS.pack_into(call, 0, logits.data_ptr(), out.data_ptr(), 0, 0, 0)
    else:
        assert seeds is not None
        assert positions is not None
        assert tokens is not None
        _POINTERS.pack_into(call, 0, logits.data_ptr(), 0, seeds.data_ptr(), positions.data_ptr(), tokens.data_ptr())
    if program.columns:
        assert parameters is not None
        registers = program.registers_of(parameters, len(logits))
        _INITIAL.pack_into(call, AT["initial"], registers.ctypes.data, len(logits))
    _run(plan.code, call, plan.threads)
    return call[AT["flags"]]


def transform(
    program: Program,
    logits: Tensor,
    parameters: Tensor | None = None,
    *,
    mask: bool = False,
    out: Tensor | None = None,
    careful: bool = False,
) -> tuple[Tensor, int]:
    """What a program makes of logits (B, V), in their type, and the flags of all rows, see `decal.kernels.cpu_rows`.

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
    flags = run(program, plain, parameters, kind, top=TOP[dtype], careful=careful, out=target)
    if out is None:
        return target if plain is logits else target.to(dtype), flags
    return target if out is target else out.copy_(target), flags


def sample(
    program: Program, logits: Tensor, seeds: Tensor, positions: Tensor, parameters: Tensor | None = None, careful: bool = False
) -> tuple[Tensor, int]:
    """Tokens (B,) drawn from what a program makes of logits, and flags; ``seeds`` and ``positions`` are (B,) int64."""
    plain = logits if logits.dtype in NATIVE else logits.float()
    tokens = torch.empty(logits.shape[0], dtype=torch.int64)
    seeds, positions = seeds.contiguous(), positions.contiguous()
    top = TOP[logits.dtype]
    flags = run(
        program, plain, parameters, TOKENS, top=top, careful=careful, seeds=seeds, positions=positions, tokens=tokens
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
    size = logits.nbytes
    if size < REUSED:
        return torch.empty_like(logits, memory_format=torch.contiguous_format)
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
