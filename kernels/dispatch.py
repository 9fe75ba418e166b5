"""Which implementation runs, decided once, with the reason kept for `Chain.explain`."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from decal.kernels import reference


class Backend(NamedTuple):
    """An implementation of the functions of `decal.kernels.reference`, and why it was chosen."""

    name: str
    module: ModuleType
    reason: str


def choose() -> Backend:
    """The backend that runs a chain. There is one so far."""
    return Backend("reference", reference, "plain torch in float64; the compiled CPU and Triton paths are not built yet")
