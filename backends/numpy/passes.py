"""The oracle as a backend: `core.graph_passes` over NumPy."""

from __future__ import annotations

from contextlib import AbstractContextManager

import numpy as np

from ...core.graph_passes import GraphPasses
from ...core.parts import KV, Cache


class NumpyPasses(GraphPasses):
    survives_fork = True

    def context(self, needed: int) -> tuple[KV, ...]:
        return tuple(KV(keys[:, :, :needed], values[:, :, :needed]) for keys, values in self._pool)

    def _keep(self, cache: Cache) -> None:
        """Nothing: the parts were written in place."""

    def home(self) -> AbstractContextManager[None]:
        return np.errstate(all="ignore")  # what is not finite at the end of a pass is an error then
