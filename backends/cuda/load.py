"""Weights on their way to a card, and whether they fit.

    page cache ──threads──▶ pinned buffer ──copy engine──▶ card
                            (a ring of four; one is filled while others are on their way, on two streams)

A copy from ordinary memory would stage in the driver's own small buffers, one after the other. The host's part, reading
the mapped file, is what bounds the rate: several threads copy at once, because a page that is touched for the first
time costs a fault. Expected on an H100's host: 10 GB/s and more; docs/cuda.md says what was measured.
"""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, takewhile

import numpy as np
import torch

from ...core.config import ModelConfig
from ...core.errors import DgemmaError
from ...core.memory import cache_bytes

Tensor = torch.Tensor

CHUNK = 32 << 20
"""Bytes of one pinned buffer. Halves of a millisecond on the bus: enough to hide a copy's own cost."""

LANES = 4
THREADS = 4

RESERVE = 512 << 20
"""Bytes left to the libraries' workspaces, graphs and the allocator's rounding."""


# ---- Copying ------------------------------------------------------------------------------------------------------


class _Lane:
    """One pinned buffer and the stream that empties it."""

    def __init__(self, size: int, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=stream is not None)
        self.host = self._buffer.numpy()
        self._stream = stream
        self._event = None if stream is None else torch.cuda.Event()
        self._device = device

    def wait(self) -> None:
        """Until the buffer may be filled again."""
        if self._event is not None:
            self._event.synchronize()

    def send(self, target: Tensor) -> None:
        """Start copying the front of the buffer to a target of as many bytes."""
        source = self._buffer[: len(target)]
        if self._stream is None or self._event is None:
            target.copy_(source)
            return
        # The target's memory may still be in use by what ran before it was freed.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            target.record_stream(self._stream)
            self._event.record(self._stream)


class Stager:
    """Copies host arrays to one device; on the CPU, for tests, by the same path without pinning and streams."""

    def __init__(self, device: torch.device, *, chunk: int = CHUNK, lanes: int = LANES, threads: int = THREADS) -> None:
        on_card = device.type == "cuda"
        self._streams = [torch.cuda.Stream(device) for _ in range(2)] if on_card else []
        self._count = lanes
        self._ring: list[_Lane] = []  # made by the first copy
        self._next: Iterator[_Lane] = iter(())
        self._chunk = chunk
        self._device = device
        self._threads = min(threads, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="dgemma-load")

    def send(self, array: np.ndarray, dtype: torch.dtype) -> Tensor:
        """Return an array's bytes on the device as a tensor of a dtype of the same width; copies may be under way.

        What runs on the device's current stream afterwards waits for them; so does `close`.
        """
        if not self._ring:
            streams = cycle(self._streams or [None])
            self._ring = [_Lane(self._chunk, self._device, next(streams)) for _ in range(self._count)]
            self._next = cycle(self._ring)
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        target = torch.empty(array.shape, dtype=dtype, device=self._device)
        raw = target.view(-1).view(torch.uint8) if array.size else target
        for start in range(0, len(flat), self._chunk):
            part = flat[start : start + self._chunk]
            lane = next(self._next)
            lane.wait()
            self._fill(lane.host, part)
            lane.send(raw[start : start + len(part)])
        for stream in self._streams:
            torch.cuda.current_stream(self._device).wait_stream(stream)
        return target

    def close(self) -> None:
        """Wait for all copies and give the buffers back."""
        for lane in self._ring:
            lane.wait()
        self._ring.clear()
        self._pool.shutdown()

    def _fill(self, buffer: np.ndarray, part: np.ndarray) -> None:
        step = max(-(-len(part) // self._threads), 1 << 20)
        starts = range(0, len(part), step)

        def copy(start: int) -> None:  # NumPy gives up the GIL in it
            buffer[start : min(start + step, len(part))] = part[start : start + step]

        if len(starts) < 2:
            copy(0)
        else:
            list(self._pool.map(copy, starts))


# ---- Room ---------------------------------------------------------------------------------------------------------

BUCKET = 1024
"""Tokens that a slot has room for at least; see `buckets`."""


def buckets() -> Iterator[int]:
    """Yield the capacities of a pool's slots, 2¹⁰, 1½·2¹⁰, 2¹¹, …: few pools, few graphs, a third unused at most."""
    tokens = BUCKET
    while True:
        yield tokens
        yield tokens * 3 // 2
        tokens *= 2


def bucketed(tokens: int) -> int:
    """Return the smallest capacity that holds so many tokens."""
    return next(capacity for capacity in buckets() if capacity >= tokens)


def working_bytes(config: ModelConfig, width: int, *, rows: int) -> int:
    """Return about what a pass over so many positions, of all its rows, works in; `width` is of an activation."""
    masses = min(256, rows) * config.vocab_size * width  # what the vocabulary head keeps between its two products
    pairs = rows * config.experts_per_token * (config.expert_size + config.hidden_size) * width
    widest = max(layer.heads * layer.head_dim for layer in config.layers)
    dense = rows * (8 * config.hidden_size + 3 * widest + 2 * config.intermediate_size) * 4
    return masses + pairs + dense + RESERVE


@dataclass(frozen=True, kw_only=True)
class Room:
    """What one row on a card takes beside the weights, and what is there. Bytes."""

    config: ModelConfig
    weights: int
    """As they are held; 0 where they are on the card already."""
    width: int
    """Of an activation and of the cache's elements."""
    scratch: int
    """Entries of a slot for what a pass lays down."""
    free: int
    total: int

    @property
    def working(self) -> int:
        """About."""
        return working_bytes(self.config, self.width, rows=self.scratch)

    def cache(self, context: int) -> int:
        return cache_bytes(self.config, bucketed(context), self.width, scratch=self.scratch)

    def needed(self, context: int) -> int:
        return self.weights + self.cache(context) + self.working

    @property
    def largest_context(self) -> int:
        """Tokens of prompt and answer that there is room for, 0 where not even the weights fit."""
        most = self.config.max_positions
        lengths = takewhile(lambda tokens: tokens < 2 * max(most, BUCKET), buckets())
        return min(most, max((tokens for tokens in lengths if self.needed(tokens) <= self.free), default=0))


def refusal(found: Room, context: int, device: str) -> str | None:
    """Return why a model with that much context does not fit, with the numbers and what would fit; None if it does."""
    needed = found.needed(context)
    if needed <= found.free:
        return None
    held = f"{_gb(found.weights)} of weights, " if found.weights else ""
    parts = f"{held}{_gb(found.cache(context))} of cache for {context:,} tokens, {_gb(found.working)} to work in"
    if found.largest_context > 0:
        remedy = f"there is room for a context of {found.largest_context:,}"
    else:
        rest = max(0, found.free - (found.needed(0) - found.weights))
        remedy = f"weights of at most {_gb(rest)} would fit: take a smaller recipe (dgemma convert --recipe 4bit)"
    return f"{device} has {_gb(found.free)} of {_gb(found.total)} free and {_gb(needed)} are needed ({parts}); {remedy}"


def free_memory(device: torch.device) -> tuple[int, int]:
    """Return the bytes of a card that this process can still have, its own reserve included, and all of them."""
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total


@contextmanager
def releasing(device: torch.device, doing: str, remedy: str) -> Iterator[None]:
    """Turn the allocator's error into one line, after everything that the failed work held has been given back."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
        traceback.clear_frames(error.__traceback__)  # they hold what was allocated so far
        message = f"{device} ran out of memory while {doing}"
        if asked:
            message += f": {asked[1]} more were asked for"
        if device.type == "cuda":
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info(device)
            message += f", and {_gb(free)} of {_gb(total)} are free now that everything is given back"
        raise DgemmaError(f"{message}; {remedy}") from None


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
