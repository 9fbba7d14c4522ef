"""What a kernel's programs may do to memory, checked access by access; and launches whose tensors have no memory.

On a card the programs of a launch run in any order and at once, and so do the threads of a program. Results cannot
depend on that where, within a launch,

    every address lies in one of the tensors that were given,
    no element is both read and written,
    no element is written twice with different values.

All kernels here keep to this, none has atomics or barriers of its own, and `Memory` holds them to it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Forbidden(AssertionError):
    """An access that a kernel must not make."""


@dataclass(kw_only=True)
class Span:
    """Memory that belongs to one tensor, or to several that are views of the same."""

    name: str
    start: int
    stop: int
    size: int
    """Bytes of an element."""
    read: np.ndarray
    written: np.ndarray
    value: np.ndarray
    """Bits of what was written last."""
    furthest: int = -1
    """Last element that was touched."""


class Memory:
    """The tensors of one launch, by argument.

    Args:
        tensors: by name. Those of the device "meta" have addresses of their own, far apart, and nothing behind them.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.addresses: dict[str, int] = {}
        found = []
        for i, (name, x) in enumerate(tensors.items()):
            size = x.element_size()
            start = (i + 1) << 44 if x.device.type == "meta" else x.data_ptr()
            self.addresses[name] = start
            if x.numel():
                last = sum((length - 1) * stride for length, stride in zip(x.shape, x.stride(), strict=True))
                found.append((start, start + (last + 1) * size, size, name, x.device.type != "meta"))
        self._spans: list[Span] = []
        for start, stop, size, name, real in sorted(found):
            if self._spans and start < self._spans[-1].stop:
                span = self._spans[-1]
                assert span.size == size, f"{span.name} and {name} overlap, with elements of different widths"
                span.name, span.stop = f"{span.name}, {name}", max(stop, span.stop)
            else:
                nothing = np.zeros(0, bool)
                span = Span(name=name, start=start, stop=stop, size=size, read=nothing, written=nothing, value=nothing)
                self._spans.append(span)
            if real:
                count = (span.stop - span.start) // size
                span.read, span.written = np.zeros(count, bool), np.zeros(count, bool)
                span.value = np.zeros(count, _BITS[size])
        self._starts = [span.start for span in self._spans]

    def touched(self, name: str) -> int:
        """Return the last element of a tensor that was read or written, −1 for none."""
        return next(span.furthest for span in self._spans if name in span.name.split(", "))

    def read(self, pointers: Any, mask: Any, program: Sequence[int]) -> tuple[Span, np.ndarray] | None:
        """Note a load; return where it goes, and the elements there. None where all of it is masked."""
        place = self._place(pointers, mask, program, "reads")
        if place is not None and len(place[0].read):
            span, cells = place
            if span.written[cells].any():
                at = int(cells[span.written[cells]][0])
                raise Forbidden(f"program {program} reads {span.name} at {at}, which this launch has written")
            span.read[cells] = True
        return place

    def write(self, pointers: Any, value: Any, mask: Any, program: Sequence[int]) -> None:
        """Note a store."""
        place = self._place(pointers, mask, program, "writes")
        if place is None or not len(place[0].read):
            return
        span, cells = place
        bits = np.broadcast_to(value.data, pointers.data.shape)[mask.data].view(_BITS[span.size])
        if span.read[cells].any():
            at = int(cells[span.read[cells]][0])
            raise Forbidden(f"program {program} writes {span.name} at {at}, which this launch has read")
        differs = span.written[cells] & (span.value[cells] != bits)
        span.value[cells], span.written[cells] = bits, True
        differs |= span.value[cells] != bits  # twice in this very store
        if differs.any():
            at = int(cells[differs][0])
            raise Forbidden(f"program {program} writes {span.name} at {at} a second time, and another value")

    def _place(self, pointers: Any, mask: Any, program: Sequence[int], does: str) -> tuple[Span, np.ndarray] | None:
        addresses = pointers.data[mask.data]
        if not addresses.size:
            return None
        low, high = int(addresses.min()), int(addresses.max())
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        at = bisect_right(self._starts, low) - 1
        span = self._spans[max(0, at)]
        if at < 0 or high + size > span.stop:
            where = f"elements {(low - span.start) // size} to {(high - span.start) // size} counted from {span.name}"
            raise Forbidden(f"program {program} {does} outside of its tensors: {where}")
        cells = (addresses - np.uint64(span.start)).astype(np.int64) // size
        span.furthest = max(span.furthest, (high - span.start) // size)
        return span, cells
