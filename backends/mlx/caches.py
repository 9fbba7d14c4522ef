"""The caches of the rows that are open, and those of a batch as one array.

    row      arrays of its own, [1, K, S, A], S in steps of what it has read: a budget that nobody writes takes nothing
    batch    what a pass of several rows sees: their arrays stacked, [B, K, S, A] in steps of the longest

One row is a batch as it is. Several are stacked once and stay so while the same rows take passes together; of one that
has read meanwhile its own entries are written over, which MLX does in place. So a pass gathers nothing, and what is
compiled for it depends on two sizes, B and S, and on no slot. The price is that rows that share passes are there twice.

Measured on the CPU with 110 M parameters: stacking 8 rows of 1,000 tokens, 100 MB, takes 70 ms of processor time, and a
pass of one row's 256 positions some 4 s. On Metal it should be a copy of the batch, at the memory's speed, whenever a
row joins or leaves; it has not been run there.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ...core.config import ModelConfig
from ...core.parts import KV

Array = mx.array
Layers = tuple[KV, ...]


def stepped(tokens: int) -> int:
    """Return the entries of an array for so many: in steps that grow with it, so that a pass compiled over it is traced
    anew only now and then, and at most a quarter, or 64, of what attention reads is padding."""
    unit = max(64, 1 << max(0, tokens.bit_length() - 3))
    return -(-tokens // unit) * unit


class RowCaches:
    """Keys and values by slot. Arrays are values: what is read of a slot stays as it is when the slot goes on."""

    def __init__(self, config: ModelConfig, dtype: mx.Dtype) -> None:
        self._config, self._dtype = config, dtype
        self._rows: dict[int, Layers] = {}
        self._batches: dict[tuple[int, ...], tuple[tuple[Layers, ...], Layers]] = {}  # with the rows it was made of

    def __getitem__(self, slot: int) -> Layers:
        """Return a row's layers, each [1, K, S, A]; without entries where nothing was read."""
        return self._rows[slot] if slot in self._rows else self._empty(1, 0)

    def __setitem__(self, slot: int, layers: Layers) -> None:
        self._rows[slot] = layers

    def drop(self, slot: int) -> None:
        self._rows.pop(slot, None)
        self._batches = {slots: batch for slots, batch in self._batches.items() if slot not in slots}

    def arrays(self) -> list[Array]:
        """Return every array that is held."""
        held = [*self._rows.values(), *(layers for _, layers in self._batches.values())]
        return [array for layers in held for kv in layers for array in kv]

    def put(self, slot: int, batch: Layers, row: int, tokens: int) -> None:
        """Take one row of a batch, which has so many tokens."""
        index, layers = mx.array([row]), []
        for kv, size in zip(batch, self._sizes(stepped(tokens)), strict=True):
            # Gathered: a slice would keep the batch's memory.
            layers.append(KV(*(x if len(x) == 1 else mx.take(x[:, :, :size], index, 0) for x in kv)))
        self._rows[slot] = tuple(layers)

    def valid(self, slots: Sequence[int], longest: int) -> Layers:
        """Return rows' caches with what the longest of them, of so many tokens, holds, and nothing beyond."""
        if len(slots) > 1:
            return self._stacked([self[slot] for slot in slots], longest)
        sizes = self._sizes(longest)
        return tuple(KV(*(x[:, :, :size] for x in kv)) for kv, size in zip(self[slots[0]], sizes, strict=True))

    def batch(self, slots: Sequence[int], longest: int) -> Layers:
        """Return rows' caches in the steps of the longest of them, of so many tokens; a slot may be there twice."""
        if len(slots) == 1:
            return self[slots[0]]
        key, rows = tuple(slots), tuple(self[slot] for slot in slots)
        size = stepped(longest)
        found = self._batches.pop(key, None)
        others = self._batches.items()
        self._batches = {slots: batch for slots, batch in others if not set(slots) & set(key)}
        if found is None or any(len(x[0, 0]) != n for (x, _), n in zip(found[1], self._sizes(size), strict=True)):
            layers = self._stacked(rows, size)
        else:
            before, layers = found
            for place, (old, new) in enumerate(zip(before, rows, strict=True)):
                if old is not new:
                    _write(layers, place, new)
        self._batches[key] = rows, layers
        return layers

    def _stacked(self, rows: Sequence[Layers], size: int) -> Layers:
        layers = self._empty(len(rows), size)
        for place, row in enumerate(rows):
            _write(layers, place, row)
        return layers

    def _empty(self, rows: int, size: int) -> Layers:
        shapes = [
            (rows, layer.kv_heads, entries, layer.head_dim)
            for layer, entries in zip(self._config.layers, self._sizes(size), strict=True)
        ]
        return tuple(KV(mx.zeros(shape, self._dtype), mx.zeros(shape, self._dtype)) for shape in shapes)

    def _sizes(self, entries: int) -> list[int]:
        """Return how many of so many entries each layer holds."""
        return [entries if one.window is None else min(entries, one.window - 1) for one in self._config.layers]


def _write(layers: Layers, place: int, row: Layers) -> None:
    """Write a row's entries over those in one place of a batch: in place where nothing else holds the array."""
    for whole, part in zip(layers, row, strict=True):
        for to, x in zip(whole, part, strict=True):
            entries = min(to.shape[2], x.shape[2])
            to[place : place + 1, :, :entries] = x[:, :, :entries]
