"""Running compiled code on several threads at once.

The threads are those that torch runs its own operators on, where it has them from GNU's OpenMP, as on Linux: they are awake
after an operator, and two pools would fight for the cores. Elsewhere, and in a process forked from another, they are Python's.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache


@cache
def _team(process: int) -> Callable[..., object] | None:
    """OpenMP's way to run a function on many threads, or None."""
    # Its threads don't outlive a fork, and it waits for them for ever.
    if process != _imported_in:
        return None
    try:
        found = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    found.argtypes, found.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return found


_imported_in = os.getpid()


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "decal")


def run(function: int, argument: int, threads: int) -> None:
    """Call the C function at address ``function`` with ``argument``, on up to ``threads`` threads at the same time.

    It may be called fewer times than asked for, and at least once; so calls have to share out the work themselves.
    """
    process = os.getpid()
    team = _team(process)
    if team is not None:
        team(function, argument, threads, 0)
        return
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)
    others = [_pool(process, threads - 1).submit(call, argument) for _ in range(threads - 1)]
    call(argument)
    for other in others:
        other.result()
