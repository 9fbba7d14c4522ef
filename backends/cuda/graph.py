"""CUDA graphs for the graph's own functions: captured once for each set of shapes, then replayed as one launch.

    first call      copy the arguments into buffers of their own, run the function on those, capture it (nothing runs)
    every other     copy the arguments in, replay

A denoising pass of the 26B model is some hundreds of kernels of a few microseconds. Started one by one from Python they
take longer than they run; in a graph the host starts them all at once and is free until their results are read.

What a captured function may rely on, and what it must not do:
    pools       a `KV` and a `Canvases` are read and written where they lie: their addresses are part of what is
                captured, and a function may return a `KV` only as it came. A row's place in them is data.
    all else    is copied in.
    results     stand in buffers that the next call overwrites: read them (`CardPasses.fetch`) before it.
    inside      nothing may be read back to the host, and shapes may not depend on values.

Capturing and replaying are one object, so that tests on a CPU can put "run it again" in their place.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch

from ...core.parts import KV
from .. import trees

Tensor = torch.Tensor
Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Takes what is to be captured and returns what replays it."""

KEPT = 32
"""Graphs of one function that are kept, one for each batch size and length; the one unused for longest goes first."""


class Canvases(NamedTuple):
    """What denoising passes leave for the next ones, of canvases of one length: a pool, a place for each slot.

    The last place is written for rows that only fill a batch up, and never read.
    """

    canvas: Tensor  # int32 [N + 1, L]
    soft: Tensor  # [N + 1, L, D]
    argmax: Tensor  # int32 [N + 1, L]
    stable: Tensor  # int32 [N + 1]


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Within, a thread launches on this card: Triton takes the thread's current one, wherever its arguments are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class CudaCapture:
    """Captures on a device. All graphs share one memory pool of torch's: only one of them runs at a time.

    The stream is its own, not torch's for all captures, which belongs to the first card that anybody captured on and
    whose cuBLAS workspace stands in whatever pool was used first. Pool and stream are new once no graph is left that
    used the old ones, and after a capture that failed: torch takes up neither a pool that nobody holds nor one whose
    capture has not ended.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._stream: Any = None
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._endless: list[torch.cuda.CUDAGraph] = []  # torch's allocator goes on asking them whose memory is whose

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        with on(self._device):
            if not self._graphs:
                self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self._device)
            graph = torch.cuda.CUDAGraph()
            self._capture(graph, run)
        self._graphs.add(graph)
        return graph.replay

    def _capture(self, graph: torch.cuda.CUDAGraph, run: Callable[[], None]) -> None:
        failed: Exception | None = None
        try:
            # Around torch's own context, which stays on its stream where the capture cannot be ended.
            with (
                torch.cuda.stream(torch.cuda.current_stream(self._device)),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                try:
                    run()
                except Exception as error:
                    failed = error
                    raise
        except Exception as error:
            self._graphs.clear()
            if error is not failed:
                self._endless.append(graph)
            # What went wrong, and not that the capture could not be ended because of it.
            raise (failed or error) from None


def rerun(run: Callable[[], None]) -> Callable[[], None]:
    """The `Capture` of a machine without CUDA: replaying runs the same code on the same buffers."""
    return run


@dataclass(frozen=True, kw_only=True)
class _Graph:
    inputs: tuple[Tensor, ...]
    results: tuple[Tensor, ...]
    pattern: Any  # of the results
    order: tuple[int, ...]  # which of the arguments' pools each one of the results' is
    replay: Callable[[], None]


class CapturedFunction:
    """A function of trees (arrays, tuples and named tuples of them) that runs as captured graphs."""

    def __init__(self, function: Callable[..., Any], capture: Capture, device: torch.device) -> None:
        self._function = function
        self._capture = capture
        self._device = device
        self._kept: OrderedDict[Any, _Graph] = OrderedDict()

    def __call__(self, *arguments: Any) -> Any:
        given: list[Tensor] = []
        pools: list[Tensor] = []
        pattern = _flatten(arguments, given, pools)
        key = (pattern, *map(_kind, given), *((x.data_ptr(), _kind(x)) for x in pools))
        with on(self._device):
            graph = self._kept.get(key)
            if graph is None:
                graph = self._kept[key] = self._make(pattern, given, pools)
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            else:
                self._kept.move_to_end(key)
                _copy_in(graph.inputs, given)
                graph.replay()
        return _rebuild(graph.pattern, graph.results, [pools[i] for i in graph.order])

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Let all graphs go."""
        self._kept.clear()

    def _make(self, pattern: Any, given: Sequence[Tensor], pools: Sequence[Tensor]) -> _Graph:
        """Run the function once as it is, so that kernels are compiled and workspaces exist; then capture it."""
        inputs = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in given)
        _copy_in(inputs, given)
        arguments = _rebuild(pattern, inputs, pools)
        addresses = [x.data_ptr() for x in pools]
        returned: Any = None
        results: tuple[Tensor, ...] = ()
        order: tuple[int, ...] = ()

        def run() -> None:
            nonlocal returned, results, order
            leaves: list[Tensor] = []
            written: list[Tensor] = []
            new = _flatten(self._function(*arguments), leaves, written)
            if returned is None:
                if any(x.data_ptr() not in addresses for x in written):
                    raise TypeError("a captured function returned a cache that is not its argument's")
                returned, order = new, tuple(addresses.index(x.data_ptr()) for x in written)
                results = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in leaves)
            for place, x in zip(results, leaves, strict=True):
                place.copy_(x)

        run()
        return _Graph(inputs=inputs, results=results, pattern=returned, order=order, replay=self._capture(run))


def _flatten(tree: Any, leaves: list[Tensor], pools: list[Tensor]) -> Any:
    """Append a tree's arrays to `leaves`, those that stay where they are to `pools`; return the pattern of the rest."""

    def take(x: Any) -> str | None:
        if isinstance(x, KV | Canvases):
            pools.extend(x)
            return "kv" if isinstance(x, KV) else "canvases"
        if isinstance(x, Tensor):
            leaves.append(x)
            return "array"
        return None

    return trees.flatten(tree, take)


def _rebuild(pattern: Any, leaves: Sequence[Tensor], pools: Sequence[Tensor]) -> Any:
    """Undo `_flatten`."""
    kept = iter(pools)  # of both kinds, in the order of the tree

    def canvases() -> Any:
        while True:
            yield Canvases(*islice(kept, len(Canvases._fields)))

    return trees.rebuild(pattern, {"array": iter(leaves), "kv": map(KV, kept, kept), "canvases": canvases()})


def _kind(x: Tensor) -> tuple[Any, ...]:
    return tuple(x.shape), x.dtype


def _copy_in(inputs: Sequence[Tensor], given: Sequence[Tensor]) -> None:
    for buffer, x in zip(inputs, given, strict=True):
        buffer.copy_(x, non_blocking=True)
