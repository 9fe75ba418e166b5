"""Which implementation runs a program, and why, for `Chain.explain`.

On a CPU it is `decal.kernels.cpu`, on a GPU `decal.kernels.gpu`; where what they are written in is missing, and for what can't
be written as a program, it is plain torch, `decal.kernels.reference`. All keep the same tokens; a GPU has to show that once in
each process.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple


class Backend(NamedTuple):
    """An implementation that has ``transform`` and ``sample``, or none, and why it was chosen."""

    name: str
    module: ModuleType | None
    reason: str


ASKED_FOR = Backend("reference", None, "plain torch, as asked for")


def _known(name: str) -> str:
    if name not in ("auto", "reference"):
        raise ValueError(f"the backend (DECAL_BACKEND) is auto or reference, got {name!r}")
    return name


asked = [_known(os.environ.get("DECAL_BACKEND", "auto"))]
"""What was asked for, last."""


@contextmanager
def use(name: str) -> Iterator[None]:
    """Within this context ``reference`` runs everything in plain torch; ``auto`` is as usual.

    The environment variable ``DECAL_BACKEND`` does the same for a process.
    """
    asked.append(_known(name))
    try:
        yield
    finally:
        asked.pop()


def choose(device: str = "cpu") -> Backend:
    """The backend for tensors on that type of device."""
    return ASKED_FOR if asked[-1] == "reference" else _best(device)


@cache
def _best(device: str) -> Backend:
    if device == "cpu":
        return _compiled("cpu", "numba", "decal.kernels.cpu", "compiled by numba, kept on disk")
    if device == "cuda":
        return _compiled("triton", "triton", "decal.kernels.gpu", "Triton kernels")
    return Backend("reference", None, f"plain torch: there is no compiled path for {device}")


def _compiled(name: str, package: str, module: str, reason: str) -> Backend:
    if find_spec(package) is None:
        why = f"{package} is not installed"
    else:
        try:
            found = import_module(module)
            if name == "triton":
                found.check("cuda")
            return Backend(name, found, reason)
        except Exception as error:  # a package that is there may be unfit for this Python, this numpy or this machine
            why = f"{package} could not be used: {error}"
    warnings.warn(f"decal: chains run in plain torch, which is many times slower, because {why}", RuntimeWarning, stacklevel=4)
    return Backend("reference", None, f"plain torch: {why}")
