"""CUDA graphs for the graph's own functions: captured once for each set of shapes, then replayed as one launch.

    first call      copy the arguments into buffers of their own, run the function on those, capture it (nothing runs)
    every other     copy the arguments in, replay

A denoising pass of the 26B model is some hundreds of kernels of a few microseconds. Started one by one from Python they
take longer than they run; in a graph the host starts them all at once and is free until their results are read.

What a captured function may rely on, and what it must not do:
    a `KV`      is read and written where it lies: its address is part of what is captured, and a function may return it
                only as it came. `new_cache` therefore hands out the same buffers again (`Buffers`).
    all else    is copied in: arrays, and integers, which become int32 [1], so that a new length is not a new graph.
    results     stand in buffers that the next call overwrites: read them (`CudaOps.fetch`), or hand them on, before it.
                A result of the same type as an argument (the state of a canvas) is written into that argument's
                buffers, and handing it to the next call then copies nothing.
    inside      nothing may be read back to the host, and shapes may not depend on values.

Capturing and replaying are one object, so that tests on a CPU can put "run it again" in their place.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ...core.ops import KV
from .. import trees

Tensor = torch.Tensor
Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Takes what is to be captured and returns what replays it."""

KEPT = 8
"""Graphs of one function that are kept; the one unused for longest goes first."""


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Within, a thread launches on this card: Triton takes the thread's current one, wherever its arguments are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class CudaCapture:
    """Captures on a device. All graphs share one pool of memory: only one of them runs at a time.

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
    places: tuple[Tensor, ...]  # of the results
    shape: Any  # of the results
    order: tuple[int, ...]  # which of the arguments' cache arrays each one of the results' is
    replay: Callable[[], None]


class Graphs:
    """A function of trees (arrays, integers, tuples and named tuples of them) that runs as captured graphs."""

    def __init__(self, function: Callable[..., Any], capture: Capture, device: torch.device) -> None:
        self._function = function
        self._capture = capture
        self._device = device
        self._kept: OrderedDict[Any, _Graph] = OrderedDict()

    def __call__(self, *arguments: Any) -> Any:
        given: list[Tensor | int] = []
        caches: list[Tensor] = []
        pattern = _flatten(arguments, given, caches)
        key = (pattern, *(_kind(x) for x in given), *((x.data_ptr(), _kind(x)) for x in caches))
        with on(self._device):
            graph = self._kept.get(key)
            if graph is None:
                graph = self._kept[key] = self._make(pattern, given, caches)
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            else:
                self._kept.move_to_end(key)
                _copy_in(graph.inputs, given)
                graph.replay()
        return _rebuild(graph.shape, graph.places, [caches[i] for i in graph.order])

    def __len__(self) -> int:
        return len(self._kept)

    def _make(self, pattern: Any, given: Sequence[Tensor | int], caches: Sequence[Tensor]) -> _Graph:
        """Run the function once as it is, so that kernels are compiled and workspaces exist; then capture it."""
        inputs = tuple(
            torch.empty_like(x, memory_format=torch.contiguous_format)
            if isinstance(x, Tensor)
            else torch.empty(1, dtype=torch.int32, device=self._device)
            for x in given
        )
        _copy_in(inputs, given)
        # Aliases: the graph needs the caches' addresses, and must not keep them lent.
        arguments = _rebuild(pattern, inputs, [_alias(x) for x in caches])
        addresses = [x.data_ptr() for x in caches]
        shape: Any = None
        places: tuple[Tensor, ...] = ()
        order: tuple[int, ...] = ()

        def run() -> None:
            nonlocal shape, places, order
            out = self._function(*arguments)
            leaves: list[Tensor] = []
            written: list[Tensor] = []
            new = _flatten(out, leaves, written)
            if shape is None:
                if any(x.data_ptr() not in addresses for x in written):
                    raise TypeError("a captured function returned a cache that is not its argument's")
                shape, order = new, tuple(addresses.index(x.data_ptr()) for x in written)
                places = _places(out, arguments, leaves)
            _write(places, leaves, inputs)

        run()
        return _Graph(inputs=inputs, places=places, shape=shape, order=order, replay=self._capture(run))


class Buffers:
    """Cache buffers that are handed out again at the same address once nothing uses them.

    Each is lent as an alias, and is free when that is gone. The lowest free one goes first, so that a cache that
    follows another of its size has the same layers at the same addresses, and the graphs captured there serve it.
    """

    def __init__(self) -> None:
        self._all: dict[
            tuple[Any, ...], list[list[Any]]
        ] = {}  # shape and dtype → [buffer, weak reference to its alias]

    def lend(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a buffer; its contents are whatever was there, and finite."""
        slots = self._all.setdefault((shape, dtype), [])
        slot = next((one for one in slots if one[1]() is None), None)
        if slot is None:
            self._drop_others(shape)
            slot = [torch.zeros(shape, dtype=dtype, device=device), None]
            slots.append(slot)
        lent = _alias(slot[0])
        slot[1] = weakref.ref(lent)
        return lent

    def _drop_others(self, shape: tuple[int, ...]) -> None:
        """Give back the free buffers of other lengths, or every length once asked for would stay for good."""
        for (known, _), slots in self._all.items():
            if known != shape and (known[:2], known[3:]) == (shape[:2], shape[3:]):
                slots[:] = [one for one in slots if one[1]() is not None]

    def release(self) -> None:
        """Give back all that is free."""
        for slots in self._all.values():
            slots[:] = [one for one in slots if one[1]() is not None]


def _alias(x: Tensor) -> Tensor:
    """Return the same memory as another tensor object; a view would keep the first one alive."""
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.size(), x.stride())


def _flatten(tree: Any, leaves: list[Any], caches: list[Tensor]) -> Any:
    """Append a tree's arrays and integers to `leaves`, its caches to `caches`; return the pattern of the rest."""

    def take(x: Any) -> str | None:
        if isinstance(x, KV):
            caches.extend(x)
            return "kv"
        if isinstance(x, Tensor) or (isinstance(x, int) and not isinstance(x, bool)):
            leaves.append(x)
            return "array"
        return None

    return trees.flatten(tree, take)


def _rebuild(pattern: Any, leaves: Sequence[Any], caches: Sequence[Tensor]) -> Any:
    """Undo `_flatten`."""
    kept = iter(caches)
    return trees.rebuild(pattern, {"array": iter(leaves), "kv": map(KV, kept, kept)})


def _kind(x: Tensor | int) -> tuple[Any, ...]:
    return (tuple(x.shape), x.dtype) if isinstance(x, Tensor) else ((1,), torch.int32)


def _copy_in(inputs: Sequence[Tensor], given: Sequence[Tensor | int]) -> None:
    for buffer, x in zip(inputs, given, strict=True):
        if isinstance(x, int):
            buffer.fill_(x)
        elif buffer.data_ptr() != x.data_ptr():
            buffer.copy_(x, non_blocking=True)


def _places(out: Any, arguments: tuple[Any, ...], leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Where results go: into the argument of the same type, where there is one and it fits, or memory of their own."""
    for argument in arguments:
        if type(argument) is type(out) and not isinstance(out, Tensor) and type(out) is not tuple:
            own: list[Tensor] = []
            _flatten(argument, own, [])
            if [_kind(x) for x in own] == [_kind(x) for x in leaves]:
                return tuple(own)
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in leaves)


def _write(places: Sequence[Tensor], leaves: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    starts = {x.untyped_storage().data_ptr() for x in inputs}
    # A result that is a view of an argument must not change while its neighbours are written over that argument.
    fresh = [
        x.clone() if x.data_ptr() != place.data_ptr() and x.untyped_storage().data_ptr() in starts else x
        for place, x in zip(places, leaves, strict=True)
    ]
    for place, x in zip(places, fresh, strict=True):
        if place.data_ptr() != x.data_ptr():
            place.copy_(x)
