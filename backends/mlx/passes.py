"""`core.graph_passes` over MLX.

Denoising passes are compiled; reading, of which there is one for each canvas, runs as it is, over what is valid of the
rows' caches and nothing beyond. MLX's streams, its default ones included, belong to the thread that made them, and so
does what `mx.compile` keeps: an array that waits to be computed cannot be computed elsewhere, and each thread compiles
anew. All passes run in the engine's one thread, and weights come to it computed (`MlxOps.pack`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from ...core import memory, model, within
from ...core.errors import DgemmaError, quoted
from ...core.graph_passes import GraphPasses
from ...core.parts import Cache, Draws, Masses, Model, StepState
from ...core.passes import Snapshot
from .caches import RowCaches, stepped
from .compiling import compiled
from .ops import MLX_DTYPES, MlxOps

Array = mx.array

BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Rows that passes are compiled for: a batch that is filled up to one of them computes at most a third in vain."""


class MlxPasses(GraphPasses):
    anywhere = False

    def __init__(self, ops: MlxOps, weights: Model) -> None:
        self._compiles = ops.compiles
        if ops.compiles:
            self.batch_sizes = BATCHES
        super().__init__(ops, weights)
        self._denoise = self.compile(partial(model.denoise, ops, weights))
        self._place = mx.default_device()
        self._caches = RowCaches(weights.config, MLX_DTYPES[ops.dtype])

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return compiled(function) if self._compiles else function

    # ---- Slots: arrays of their own, and no pool --------------------------------------------------------------

    def fits(self, tokens: int, canvas: int, rows: int = 1) -> bool:
        """Nothing is reserved, so one row alone is never refused: its cache grows with what it writes."""
        asked = [*self._asked.values(), *[tokens] * rows]
        needed = sum(memory.cache_bytes(self.config, stepped(one), self._width) for one in asked)
        if len(asked) > 1:  # and as a batch
            needed += memory.cache_bytes(self.config, stepped(max(asked)), self._width, slots=len(asked))
        held = sum(array.nbytes for array in self._caches.arrays()) + mx.get_cache_memory()
        return needed <= held + memory.available() // 2

    def close(self, slot: int) -> None:
        super().close(slot)
        self._caches.drop(slot)

    def save(self, slot: int) -> Snapshot:
        """Keep the slot's own arrays: they are values, so nothing is copied."""
        return Snapshot(length=self._lengths[slot], nbytes=self.saved_bytes(slot), data=self._caches[slot])

    def saved_bytes(self, slot: int) -> int:
        return memory.cache_bytes(self.config, stepped(self._lengths[slot]), self._width)

    def _load(self, slot: int, snapshot: Snapshot) -> None:
        self._caches[slot], self._lengths[slot] = snapshot.data, snapshot.length

    def _make_room(self, slots: int, tokens: int, scratch: int) -> None:
        self._slots = max(self._slots, slots)

    # ---- Passes -----------------------------------------------------------------------------------------------

    def read(self, rows: Sequence[tuple[int, np.ndarray]]) -> None:
        for slots, counts, padded in self._groups(rows):
            fresh = None if min(counts) == padded.shape[1] else mx.array(counts, mx.int32)
            lengths = [self._lengths[slot] for slot in slots]
            cache = Cache(self._caches.valid(slots, max(lengths)), mx.array(lengths, mx.int32))
            after = model.encode(self.ops, self.model, cache, mx.array(padded), fresh).layers
            for row, (slot, count) in enumerate(zip(slots, counts, strict=True)):
                self._lengths[slot] += count
                self._caches.put(slot, after, row, self._lengths[slot])
        self.wait()

    def predicted(
        self, cache: Cache, state: StepState, draws: Draws, classes: Array, count: int
    ) -> tuple[Array, Array, Masses]:
        x = self._denoise(cache, state.canvas, state.soft, draws.held)
        # The head is not compiled: it looks into the array of classes.
        return within.reduced(self.ops, self.model, x, draws, classes, count)

    def _cache(self, slots: Sequence[int], coming: int) -> Cache:
        lengths = [self._lengths[slot] for slot in slots]
        return Cache(self._caches.batch(slots, max(lengths)), mx.array(lengths, mx.int32))

    # ---- Running ----------------------------------------------------------------------------------------------

    def fetch(self, *arrays: Array) -> Callable[[], list[np.ndarray]]:
        def results() -> list[np.ndarray]:
            mx.eval(arrays)  # all at once
            return [self.ops.to_numpy(x) for x in arrays]

        return results

    def wait(self) -> None:
        mx.eval(self._caches.arrays())

    def peak(self) -> int | None:
        """Return MLX's peak on the GPU. On the CPU the process's own peak says it."""
        return mx.get_peak_memory() if self._place.type == mx.gpu else None

    @contextmanager
    def home(self) -> Iterator[None]:
        mx.set_default_device(self._place)  # of this thread
        try:
            yield
        finally:
            # A thread that has run a compiled function and ends with its streams aborts the process as that exits
            # ("terminate called without an active exception", in MLX 0.32 five times of eight).
            mx.clear_streams()

    @contextmanager
    def guarded(self, doing: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if type(error) is not RuntimeError:  # Python's own are of kinds of it
                raise
            raise DgemmaError(f"mlx failed while {doing}: {quoted(str(error), 150)}") from None
