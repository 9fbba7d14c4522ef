"""`core.graph_passes` on a card: passes are CUDA graphs, the host looks one pass ahead, and memory is asked for first.

    step       the rows' canvases are taken out of a pool on the card by slot, and put back, inside the captured pass:
               what it is given are slots, lengths and draws, so a graph serves whatever rows a batch is made of
    capture    once for each of a few batch sizes, lengths and pools of slots; a row's settings are data
    within     of a pass whose tokens are chosen on the host, the part up to that is captured, for 32, 64, 128, …
               classes; the rest is a few launches
    fetch      results are copied to pinned memory behind their pass, and an event says when they are there
    pool       it keeps its addresses while rows join and leave; where it grows, the graphs over the old one are let go

Rows that only fill a batch up have slots of their own, which no row of the pass has: what they lay down there stands
behind the valid entries, whoever has the slot, and nothing of it counts. Their canvases go to a spare place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from ...core import memory, model, sampler
from ...core.config import ModelConfig
from ...core.errors import DgemmaError
from ...core.graph_passes import GraphPasses
from ...core.parts import Array, Cache, Draws, Masses, Model, StepState
from ...core.passes import Starts, StepResult
from ..torch.primitives import TORCH_DTYPES
from .card import CardOps
from .graph import Canvases, Capture, CapturedFunction, on
from .load import Room, bucketed, free_memory, refusal, releasing, working_bytes

LEAST_CONTEXT = 1024
"""Tokens of prompt and answer that a card must have room for, or loading is refused."""

KEPT = 1 << 30
"""Bytes of a pool without rows that are kept in any case; of a larger one where the next row fills half of it."""

LENGTHS = 8
"""Canvas lengths whose states have a pool; more only while rows of more are open."""

LEAST_CLASSES = 32
"""Of a captured pass that looks at classes of tokens; more are the next power of two."""

REMEDY = "take a shorter context, or a smaller recipe (dgemma convert --recipe 4bit)"


class _Rows(NamedTuple):
    """The canvases of a pass's rows."""

    canvases: Canvases
    places: Array  # int32 [B]


class _Results(NamedTuple):
    """What the host reads of a pass; of a `StepState` it has the names."""

    canvas: Array  # int32 [B, L]
    argmax: Array  # int32 [B, L]
    accepted: Array  # bool [B, L]
    entropy: Array  # float32 [B, L]
    stop: Array  # bool [B]


class CardPasses(GraphPasses):
    """One model on a card.

    Args:
        ops: for the card; one on the CPU is for tests.
        weights: as `ops.pack` and `ops.stack` make them.
        capture: what captures and replays passes, where they can be; None runs them as they are.
        joined: whether finished canvases are read in the next one's first pass. Off until a card has shown what it
            gains: `benchmarks/gpu.sh options`.
    """

    ops: CardOps
    chunk = 1024

    def __init__(
        self, ops: CardOps, weights: Model, *, capture: Capture | None = None, joined: bool = False
    ) -> None:  # fmt: skip
        self._capture = capture if ops.can_capture(weights) else None
        self._graphs: list[CapturedFunction] = []
        self._canvases: dict[int, Canvases] = {}  # by length; the one asked for last stands last
        self._on_canvas: dict[int, int] = {}  # of open slots: the length of its canvas
        self._short = False
        super().__init__(ops, weights, joined=joined)
        if self.captures:
            self.lookahead, self.batch_sizes, self.read_sizes = 1, (1, 2, 4, 8, 16, 32), (64, 256, 1024)
        self._step = self.compile(self._stepped)
        self._both = self.compile(self._read_and_stepped)
        self._within = self.compile(self._predicted) if ops.can_capture_classes(weights) else None

    @property
    def captures(self) -> bool:
        """Whether passes run as graphs."""
        return self._capture is not None

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if self._capture is None:
            return function
        self._graphs.append(CapturedFunction(function, self._capture, self.ops.device))
        return self._graphs[-1]

    def captured(self) -> int:
        """Return how many graphs are kept."""
        return sum(map(len, self._graphs))

    # ---- Passes ---------------------------------------------------------------------------------------------------

    def read(self, rows: Sequence[tuple[int, np.ndarray]]) -> None:
        for slots, counts, padded in self._groups(rows):
            index = self._filled(len(slots))
            fresh = np.zeros(len(index), np.int32)  # rows that fill up append nothing
            fresh[: len(slots)] = counts
            cache = self._cache([slots[i] for i in index], padded.shape[1])
            self._encode(cache, self.ops.asarray(padded[index]), self.ops.asarray(fresh))
            for slot, count in zip(slots, counts, strict=True):
                self._lengths[slot] += count
        # The host goes on: what follows on the card waits for it there.

    def read_and_step(
        self, rows: Sequence[tuple[int, np.ndarray]], draws: Draws, starts: Starts
    ) -> Callable[[], StepResult]:
        free = self._slots - len(self._lengths)
        if self.joined and len(self._filled(len(rows))) - len(rows) > free:
            # Here rows that fill up append as well, so that no slot can be lent for them that another row has.
            self.read(rows)
            return self.step([slot for slot, _ in rows], draws, starts)
        return super().read_and_step(rows, draws, starts)

    def _cache(self, slots: Sequence[int], coming: int) -> Cache:
        own = list(dict.fromkeys(slots))
        others = [slot for slot in range(self._slots) if slot not in own]
        others.sort(key=lambda slot: slot in self._lengths)  # those that nobody has come first
        slots = own + others[: len(slots) - len(own)]
        lengths = np.asarray([self._lengths.get(slot, 0) for slot in slots], np.int32)
        # Always with slots, so that the whole pool and a part of it are one graph.
        return Cache(self._pool, self.ops.asarray(lengths), self.ops.asarray(np.asarray(slots, np.int32)))

    def _stepped(self, cache: Cache, rows: _Rows, draws: Draws) -> _Results:
        after = model.step(self.ops, self.model, cache, _taken(rows), draws)
        return _put(rows, after)

    def _read_and_stepped(self, cache: Cache, tokens: Array, rows: _Rows, draws: Draws) -> tuple[Cache, _Results]:
        cache, after = model.encode_and_step(self.ops, self.model, cache, tokens, _taken(rows), draws)
        return cache, _put(rows, after)

    def predicted(
        self, cache: Cache, state: Any, draws: Draws, classes: Array, count: int
    ) -> tuple[Array, Array, Masses]:
        if self._within is None or self._capture is None:
            return super().predicted(cache, state, draws, classes, count)
        # Filled up with classes that no token has, so that few numbers of them are captured.
        size = max(LEAST_CLASSES, 1 << (count - 1).bit_length())
        numbers = torch.zeros(size, dtype=torch.bool, device=classes.device)
        x, soft, masses = self._within(cache, state, draws, classes, numbers)
        return x, soft, Masses(*(one[..., :count] for one in masses))

    def _predicted(
        self, cache: Cache, rows: _Rows, draws: Draws, classes: Array, numbers: Array
    ) -> tuple[Array, Array, Masses]:
        """`predicted` for as many classes as `numbers` [C] has elements, whatever they are."""
        return super().predicted(cache, rows, draws, classes, len(numbers))

    def taken(self, state: _Rows) -> StepState:
        return _taken(state)

    def put(self, state: _Rows, after: StepState) -> _Results:
        return _put(state, after)

    def _state(self, slots: Sequence[int], starts: Starts, index: Sequence[int]) -> Any:
        if starts:
            self._begin(starts)
        canvases = self._canvases[self._on_canvas[slots[0]]]
        spare = len(canvases.stable) - 1
        places = [slots[i] if at < len(slots) else spare for at, i in enumerate(index)]
        return _Rows(canvases, self.ops.asarray(np.asarray(places, np.int32)))

    def _begin(self, starts: Starts) -> None:
        """Put new canvases, all of one length, in their places."""
        noise = np.stack(list(starts.values()))
        length: int = noise.shape[-1]
        states = sampler.start(self.ops, self.ops.asarray(noise), self.config.hidden_size)
        places = self.ops.asarray(np.asarray(list(starts), np.int32)).long()
        for pool, x in zip(self._canvases_of(length), _left(states), strict=True):
            pool.index_copy_(0, places, x)
        for slot in starts:
            self._on_canvas[slot] = length

    def _canvases_of(self, length: int) -> Canvases:
        """Return the pool of canvases of a length, with a place for each slot and a spare one."""
        found, count = self._canvases.pop(length, None), self._slots + 1
        if found is None or len(found.stable) != count:
            unused = [one for one in self._canvases if one not in self._on_canvas.values()]
            for other in unused[: max(0, len(self._canvases) + 1 - LENGTHS)]:
                del self._canvases[other]
            found = self._grown(length, count, found)
        self._canvases[length] = found
        return found

    def _grown(self, length: int, count: int, old: Canvases | None) -> Canvases:
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Array:
            return torch.zeros(count, *shape, dtype=dtype, device=self.ops.device)

        soft = zeros(length, self.config.hidden_size, dtype=TORCH_DTYPES[self.ops.dtype])
        made = Canvases(canvas=zeros(length), soft=soft, argmax=zeros(length), stable=zeros())
        if old is not None:
            kept = min(count, len(old.stable)) - 1
            for x, y in zip(made, old, strict=True):
                x[:kept] = y[:kept]
        return made

    def _keep(self, cache: Cache) -> None:
        """Nothing: the pool was written in place."""

    def soft(self, slot: int) -> np.ndarray:
        return self.fetch(self._canvases[self._on_canvas[slot]].soft[slot])()[0]

    def fetch(self, *arrays: Array) -> Callable[[], list[np.ndarray]]:
        if self.ops.device.type == "cpu":
            kept = [x.clone() for x in arrays]
            return lambda: [self.ops.to_numpy(x) for x in kept]
        hosts = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True) for x in arrays]
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.ops.device))

        def read() -> list[np.ndarray]:
            event.synchronize()
            return [self.ops.to_numpy(x).copy() for x in hosts]  # of their own: pinned memory is scarce

        return read

    def wait(self) -> None:
        if self.ops.device.type == "cuda":
            torch.cuda.synchronize(self.ops.device)

    def home(self) -> AbstractContextManager[None]:
        return on(self.ops.device)

    # ---- Slots and memory -----------------------------------------------------------------------------------------

    def zeros(self, shape: tuple[int, ...]) -> Array:
        return torch.zeros(shape, dtype=TORCH_DTYPES[self.ops.dtype], device=self.ops.device)

    def copied(self, x: Array) -> Array:
        return x.clone(memory_format=torch.contiguous_format)

    def rounded_up(self, tokens: int) -> int:
        # As long where nothing is captured: attention cuts its keys by that, and rounds by how it cuts.
        return bucketed(tokens)

    def close(self, slot: int) -> None:
        self._on_canvas.pop(slot, None)
        super().close(slot)

    def idle(self) -> None:
        """The pool stays, and the graphs with it, unless memory has run out."""
        if self._short:
            self._give_back()

    def _make_room(self, slots: int, tokens: int, scratch: int) -> None:
        before = self._pool
        super()._make_room(slots, tokens, scratch)
        if self._pool is not before:
            for graph in self._graphs:
                graph.clear()
            for length in list(self._canvases):
                if length in self._on_canvas.values():
                    self._canvases_of(length)  # with places for the new slots
                else:
                    del self._canvases[length]

    def _wasteful(self, slots: int, tokens: int) -> bool:
        return self._held() > KEPT and super()._wasteful(slots, bucketed(tokens))

    def _give_back(self) -> None:
        """Let go of all that stands for rows, of which there is none."""
        super().idle()
        self._canvases, self._short = {}, False
        for graph in self._graphs:
            graph.clear()

    def _held(self) -> int:
        return sum(x.nbytes for layer in self._pool for x in layer)

    def fits(self, tokens: int, canvas: int, rows: int = 1) -> bool:
        if self.ops.device.type == "cpu":
            return super().fits(tokens, canvas, rows)
        scratch = max(self._needed_scratch(tokens, canvas), self._scratch)
        free, total = free_memory(self.ops.device)
        free += self._held()
        width = TORCH_DTYPES[self.ops.dtype].itemsize
        alone = Room(config=self.config, weights=0, width=width, scratch=scratch, free=free, total=total)
        if why := refusal(alone, tokens, str(self.ops.device)):
            raise DgemmaError(f"the request does not fit: {why}")
        count = len(self._lengths) + rows
        slots = max(self._slots, 1 << (count - 1).bit_length())
        most = bucketed(max(tokens, self._capacity))
        cache = memory.cache_bytes(self.config, most, width, slots=slots, scratch=scratch)
        if cache > self._held():
            cache += self._held() // len(self.config.layers)  # one layer is there twice while the pool grows
        return cache + working_bytes(self.config, width, rows=max(scratch, count * canvas)) <= free

    def spare(self) -> int:
        if self.ops.device.type == "cpu":
            return super().spare()
        free, total = free_memory(self.ops.device)
        return min(total // 32, free // 4)

    def peak(self) -> int | None:
        """Return the most bytes that torch has held of the card: what graphs keep for themselves counts."""
        return torch.cuda.max_memory_reserved(self.ops.device) if self.ops.device.type == "cuda" else None

    @contextmanager
    def guarded(self, doing: str) -> Iterator[None]:
        with releasing(self.ops.device, doing, REMEDY):
            try:
                yield
            except torch.OutOfMemoryError:
                self._short = True  # and the pool ends with the last row that is open
                if not self._lengths:
                    self._give_back()
                raise


def _taken(rows: _Rows) -> StepState:
    """Take the rows' canvases out of the pool; what is None a pass writes and does not read."""
    canvas, soft, argmax, stable = (x.index_select(0, rows.places) for x in rows.canvases)
    return StepState(
        canvas=canvas, soft=soft, argmax=argmax, stable=stable, accepted=None, entropy=None, stop=None
    )  # fmt: skip


def _put(rows: _Rows, state: StepState) -> _Results:
    """Put the rows' canvases back into the pool, and return what the host wants of the pass."""
    places = rows.places.long()
    for pool, x in zip(rows.canvases, _left(state), strict=True):
        pool.index_copy_(0, places, x)
    return _Results(state.canvas, state.argmax, state.accepted, state.entropy, state.stop)


def _left(state: StepState) -> Canvases:
    return Canvases(canvas=state.canvas, soft=state.soft, argmax=state.argmax, stable=state.stable)


def admit(config: ModelConfig, weights: int, ops: CardOps) -> None:
    """Refuse a model whose weights take so many bytes where a short context would not fit beside them.

    Raises:
        DgemmaError: with the numbers.
    """
    free, total = free_memory(ops.device)
    room = Room(
        config=config, weights=weights, width=TORCH_DTYPES[ops.dtype].itemsize,
        scratch=max(CardPasses.chunk, config.canvas_length), free=free, total=total,
    )  # fmt: skip
    if why := refusal(room, min(LEAST_CONTEXT, config.max_positions), str(ops.device)):
        raise DgemmaError(f"the model does not fit: {why}")
