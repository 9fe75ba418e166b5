"""What a rule sees: one batch of rows, as the few numbers it may ask for."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import NamedTuple, Protocol

from torch import Tensor

from decal.kernels.statistics import STATISTICS


class Band(NamedTuple):
    """Answer of a rule that keeps the logits in [low, high], each (B, 1)."""

    low: Tensor
    high: Tensor


class Affine(NamedTuple):
    """Answer of a rule that maps every kept logit ``z`` to ``scale * z + shift``, each (B, 1).

    A scale of ``inf`` is the limit: only the modes stay.
    """

    scale: Tensor
    shift: Tensor


class Row(Protocol):
    """Statistics of a batch of rows over their kept tokens, each (B, 1), in logit units or nats.

    Besides ``max`` a row has what `decal.kernels.statistics.STATISTICS` lists, and two order statistics.
    """

    @property
    def max(self) -> Tensor:
        """The largest logit."""

    @property
    def logz(self) -> Tensor:
        """log of the sum of exp(logits)."""

    @property
    def entropy(self) -> Tensor:
        """Shannon entropy, in nats."""

    @property
    def collision(self) -> Tensor:
        """Collision probability, the sum of p^2."""

    @property
    def std(self) -> Tensor:
        """Population standard deviation of the logits."""

    @property
    def count(self) -> Tensor:
        """Number of kept tokens."""

    def upper(self, *, count: Tensor | None = None, mass: Tensor | None = None) -> Tensor:
        """Logit of the last token of the smallest top set with that many tokens, or that much probability."""

    def nearest(self, center: Tensor, mass: Tensor) -> Band:
        """The tokens nearest to the logit ``center`` that together hold ``mass`` of the probability."""


class BaseRow:
    """Statistics from moments, remembered, and the names that were asked for.

    A subclass says how moments are summed (`_moments`) and gives ``max``, ``upper`` and ``nearest``.
    """

    def __init__(self) -> None:
        self.reads: set[str] = set()
        self._sums: dict[str, Tensor] = {}

    def _moments(self, names: list[str]) -> Mapping[str, Tensor]:
        raise NotImplementedError

    def _reference(self) -> Tensor:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Tensor:
        if name not in STATISTICS:
            raise AttributeError(f"a row has no statistic {name!r}; it has max, {', '.join(STATISTICS)}")
        self.reads.add(name)
        statistic = STATISTICS[name]
        missing = [moment for moment in statistic.moments if moment not in self._sums]
        self._sums.update(self._moments(missing))
        return statistic.finish(self._reference(), self._sums)


class DenseRow(BaseRow):
    """A row over logits ``z_BV`` (-inf where dropped), computed by ``backend``."""

    def __init__(self, z_BV: Tensor, backend: ModuleType):
        super().__init__()
        self._z, self._backend = z_BV, backend
        self.kth: Tensor | None = None  # the last k-th largest asked for

    def _moments(self, names: list[str]) -> Mapping[str, Tensor]:
        return self._backend.moments(self._z, names)

    def _reference(self) -> Tensor:
        return self._z.amax(-1, keepdim=True)

    @property
    def max(self) -> Tensor:
        self.reads.add("max")
        return self._reference()

    def upper(self, *, count: Tensor | None = None, mass: Tensor | None = None) -> Tensor:
        self.reads.add("upper(mass)" if count is None else "upper(count)")
        answer = self._backend.upper(self._z, count=count, mass=mass)
        if count is not None:
            self.kth = answer
        return answer

    def nearest(self, center: Tensor, mass: Tensor) -> Band:
        self.reads.add("nearest")
        return Band(*self._backend.nearest(self._z, center, mass))
