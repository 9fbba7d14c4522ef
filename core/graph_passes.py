"""`Passes` for every backend that walks the graph: the pool of slots, batches, padding to sizes, compiling.

    pool       one `KV` for each layer, [N, K, S, A]; it grows, N by doubling, when rows come that it has no room for
    rows       a pass gets the slots of its rows as int32 [B] and each one's length as data
    states     the canvases' states stay on the device as the batch that the last pass left; a batch of other rows is
               put together of those
    sizes      where passes are compiled, a batch is filled up to one of a few sizes with its last row again, and what
               is read to one of a few lengths

What a backend does otherwise it overrides: the methods without an underscore and those under "What backends change".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from . import memory, model, reference, sampler, within
from .canvas import Chosen, Classes
from .config import ModelConfig
from .ops import Ops
from .parts import KV, Array, Cache, Draws, Masses, Model, StepState
from .passes import Passes, Scores, Snapshot, Starts, StepResult
from .primitives import NUMPY_DTYPES

ALIKE = 0.75
"""Rows are read in one pass, padded to the longest, where each has at least this share of its length."""


class GraphPasses(Passes):
    """One model on one backend's ops."""

    batch_sizes: tuple[int, ...] = ()
    """Rows, ascending, that passes are compiled for; none: they run as they are."""
    read_sizes: tuple[int, ...] = ()
    """The same of the length of what is read."""

    def __init__(self, ops: Ops, weights: Model, *, joined: bool = False) -> None:
        """With `joined`, `read_and_step` is one pass, `model.encode_and_step`."""
        self.ops, self.model, self.joined = ops, weights, joined
        self.config: ModelConfig = weights.config
        self.name, self.device, self.dtype = ops.name, str(ops.device), ops.dtype  # type: ignore[misc]
        self._width = np.dtype(NUMPY_DTYPES[ops.dtype]).itemsize  # bytes of a cache's element
        self._pool: tuple[KV, ...] = ()
        self._slots = self._capacity = self._scratch = 0
        self._lengths: dict[int, int] = {}  # of open slots: tokens read
        self._asked: dict[int, int] = {}  # of open slots: room
        self._states: dict[int, tuple[StepState, int]] = {}  # slot → a batch, and its row there
        self._spoilt: set[int] = set()  # slots in whose entries NaN or infinity may stand: nobody has seen otherwise
        self._batch: tuple[int, ...] = ()  # slots of the batch that the last pass left
        self._classes: dict[str, Array] = {}  # by key
        self._step = self.compile(partial(model.step, ops, weights))
        self._encode = self.compile(partial(model.encode, ops, weights))
        self._both = self.compile(partial(model.encode_and_step, ops, weights))
        self._look = self.compile(partial(model.denoise, ops, weights))

    # ---- Slots ------------------------------------------------------------------------------------------------

    def fits(self, tokens: int, canvas: int, rows: int = 1) -> bool:
        memory.check_room(self.config, tokens, self._needed_scratch(tokens, canvas), self._width)
        return self._room(tokens, canvas, rows)

    def open(self, tokens: int, canvas: int, after: Snapshot | None = None) -> int:
        slot = next((i for i in range(self._slots) if i not in self._lengths), self._slots)
        self._make_room(slot + 1, tokens, self._needed_scratch(tokens, canvas))
        self._lengths[slot], self._asked[slot] = 0, tokens
        try:
            if slot in self._spoilt:  # where what a row does not see is masked, it is still multiplied: by zero
                self._clean(slot)
            if after is not None:
                self._load(slot, after)
        except BaseException:  # memory that runs out, and nobody else would close it
            self.close(slot)
            raise
        return slot

    def _clean(self, slot: int) -> None:
        self._pool = tuple(
            KV(*(self.placed(x, self.zeros((1, *x.shape[1:])), slot) for x in layer)) for layer in self._pool
        )
        self._spoilt.remove(slot)

    def close(self, slot: int) -> None:
        self._lengths.pop(slot)
        self._asked.pop(slot)
        self._states.pop(slot, None)
        if not self._lengths:
            self._batch, self._states = (), {}
            self.idle()

    def saved_bytes(self, slot: int) -> int:
        return memory.cache_bytes(self.config, self._lengths[slot], self._width)

    def save(self, slot: int) -> Snapshot:
        length, copies = self._lengths[slot], []
        for layer, one in zip(self._pool, self.config.layers, strict=True):
            held = length if one.window is None else min(length, one.window - 1)
            copies.append(KV(*(self.copied(x[slot : slot + 1, :, :held]) for x in layer)))
        return Snapshot(length=length, nbytes=self.saved_bytes(slot), data=tuple(copies))

    def _load(self, slot: int, snapshot: Snapshot) -> None:
        self._pool = tuple(
            KV(*(self.placed(x, y, slot) for x, y in zip(layer, kept, strict=True)))
            for layer, kept in zip(self._pool, snapshot.data, strict=True)
        )
        self._lengths[slot] = snapshot.length

    def _needed_scratch(self, tokens: int, canvas: int) -> int:
        return max(min(self.chunk, tokens), canvas * (2 if self.joined else 1), *self.read_sizes)

    def _make_room(self, slots: int, tokens: int, scratch: int) -> None:
        """Let the pool have so many slots of so many tokens, at least; what is in it stays."""
        if not self._lengths and self._wasteful(slots, tokens):
            self._pool, self._slots, self._capacity, self._scratch = (), 0, 0, 0
        if slots <= self._slots and tokens <= self._capacity and scratch <= self._scratch:
            return
        count = self._slots or 1
        while count < slots:
            count *= 2
        scratch, capacity = max(scratch, self._scratch), self.rounded_up(max(tokens, self._capacity))
        pool, self._pool, kept = list(self._pool), (), self._slots
        entries = [layer.keys.shape[2] for layer in pool]
        try:
            for i, one in enumerate(self.config.layers):
                rows = capacity if one.window is None else min(capacity, one.window - 1)
                shape = (count, one.kv_heads, rows + scratch, one.head_dim)
                fresh = KV(self.zeros(shape), self.zeros(shape))
                if kept:  # one layer at a time is there twice
                    pool[i] = KV(*(self.placed(x, y, 0) for x, y in zip(fresh, pool[i], strict=True)))
                else:
                    pool.append(fresh)
        except BaseException:  # memory that runs out: whoever is in the pool has what was theirs
            held = zip(pool, entries, strict=True) if kept else ()
            self._pool = tuple(KV(*(x[:kept, :, :count] for x in layer)) for layer, count in held)
            raise
        self._pool, self._slots, self._capacity, self._scratch = tuple(pool), count, capacity, scratch
        self._spoilt = {slot for slot in self._spoilt if slot < kept}

    def _wasteful(self, slots: int, tokens: int) -> bool:
        return (self._slots > 1 and self._slots >= 2 * slots) or self._capacity > 2 * tokens

    # ---- Passes -----------------------------------------------------------------------------------------------

    def read(self, rows: Sequence[tuple[int, np.ndarray]]) -> None:
        for slots, counts, padded in self._groups(rows):
            index, length = self._filled(len(slots)), padded.shape[1]
            cache = self._cache([slots[i] for i in index], length)
            given = [self.ops.asarray(padded[index])]
            if self.read_sizes or min(counts) < length:
                given.append(self.ops.asarray(np.asarray(counts, np.int32)[index]))
            self._spoilt |= set(slots)
            self._keep(self._encode(cache, *given))
            for slot, count in zip(slots, counts, strict=True):
                self._lengths[slot] += count
        self.wait()

    def _groups(self, rows: Sequence[tuple[int, np.ndarray]]) -> Iterator[tuple[list[int], list[int], np.ndarray]]:
        """Sort what is to be read into passes: slots, how many tokens each, and these, padded, int32 [B, L]."""
        rest = sorted(rows, key=lambda row: -len(row[1]))
        while rest:
            longest = len(rest[0][1])
            group = [row for row in rest if len(row[1]) >= ALIKE * longest]
            rest = rest[len(group) :]
            padded = np.zeros((len(group), next((n for n in self.read_sizes if n >= longest), longest)), np.int32)
            for row, (_, tokens) in zip(padded, group, strict=True):
                row[: len(tokens)] = tokens
            yield [slot for slot, _ in group], [len(tokens) for _, tokens in group], padded

    def step(self, slots: Sequence[int], draws: Draws, starts: Starts) -> Callable[[], StepResult]:
        index = self._filled(len(slots))
        state = self._state(slots, starts, index)
        cache = self._cache([slots[i] for i in index], draws.noise.shape[1])
        return self._done(slots, self._step(cache, state, self._given(draws, index)))

    def read_and_step(
        self, rows: Sequence[tuple[int, np.ndarray]], draws: Draws, starts: Starts
    ) -> Callable[[], StepResult]:
        slots = [slot for slot, _ in rows]
        if not self.joined:
            self.read(rows)
            return self.step(slots, draws, starts)
        index = self._filled(len(slots))
        tokens = np.stack([tokens for _, tokens in rows])[index]
        state = self._state(slots, starts, index)
        cache = self._cache([slots[i] for i in index], tokens.shape[1] + draws.noise.shape[1])
        after, state = self._both(cache, self.ops.asarray(tokens), state, self._given(draws, index))
        self._keep(after)
        for slot, read in rows:
            self._lengths[slot] += len(read)
        return self._done(slots, state)

    def step_within(
        self, slots: Sequence[int], draws: Draws, starts: Starts, classes: Classes, choose: Callable[[Masses], Chosen]
    ) -> StepResult:
        ops, index = self.ops, self._filled(len(slots))
        state = self._state(slots, starts, index)
        cache, given = self._cache([slots[i] for i in index], draws.noise.shape[1]), self._given(draws, index)
        x, soft, masses = self.predicted(cache, state, given, self._of(classes), classes.count)
        chosen = choose(Masses(*(one[: len(slots)] for one in self.fetch(*masses)())))
        token = chosen.token.copy()
        if (open_ := token < 0).any():
            found = within.drawn(ops, self._logits_at, x, draws.temperature, self._of(classes), chosen)
            token[open_] = np.concatenate(self.fetch(*found)())
        before, chosen, token = self.taken(state), chosen.rows(index), token[index]
        if chosen.factors is not None:
            mean, heat = partial(ops.mean_embedding, table=self.model.embed_tokens), draws.temperature[index]
            soft = within.fed_back(ops, self._logits_at, mean, x, heat, classes, chosen.factors)
        entropy = ops.cast(ops.asarray(chosen.entropy.astype(np.float32)), ops.wide)
        argmax = ops.asarray(chosen.argmax.astype(np.int32))
        after = ops.advance(given, before, ops.asarray(token), argmax, entropy, soft)
        return self._done(slots, self.put(state, after))()

    def _done(self, slots: Sequence[int], state: StepState) -> Callable[[], StepResult]:
        self._batch = tuple(slots)
        self._states |= {slot: (state, row) for row, slot in enumerate(slots)}
        count = len(slots)
        read = self.fetch(state.canvas, state.argmax, state.accepted, state.entropy, state.stop)

        def results() -> StepResult:
            canvas, argmax, accepted, entropy, stop = (x[:count] for x in read())
            finite = {slot for slot, row in zip(slots, entropy, strict=True) if np.isfinite(row).all()}
            self._spoilt = (self._spoilt | set(slots)) - finite
            return StepResult(canvas=canvas, argmax=argmax, accepted=accepted, entropy=entropy, stop=stop)

        return results

    def _filled(self, count: int) -> list[int]:
        """Return which rows a batch of so many is made of: itself, and its last row again up to a compiled size."""
        size = next((size for size in self.batch_sizes if size >= count), count)
        return [min(i, count - 1) for i in range(size)]

    def _cache(self, slots: Sequence[int], coming: int) -> Cache:
        """Return the cache as a pass over slots sees it that lays down so many entries behind the valid ones."""
        lengths = np.asarray([self._lengths[slot] for slot in slots], np.int32)
        whole = list(slots) == list(range(self._slots))
        numbers = None if whole else self.ops.asarray(np.asarray(slots, np.int32))
        return Cache(self.context(int(lengths.max()) + coming), self.ops.asarray(lengths), numbers)

    def _given(self, draws: Draws, index: Sequence[int]) -> Draws:
        wide = NUMPY_DTYPES[self.ops.wide]
        rows = draws if len(index) == len(draws.noise) else Draws(*(x[index] for x in draws))
        bounds = rows.entropy_bound.astype(wide), rows.confidence.astype(wide)
        return Draws(*map(self.ops.asarray, rows._replace(entropy_bound=bounds[0], confidence=bounds[1])))

    def _state(self, slots: Sequence[int], starts: Starts, index: Sequence[int]) -> StepState:
        """Return the states of some slots' canvases as one batch of the rows `index`."""
        if self._batch == tuple(slots) and not starts:
            return self._states[slots[0]][0]
        if len(starts) == len(slots):
            noise = np.stack([starts[slots[i]] for i in index])
            return sampler.start(self.ops, self.ops.asarray(noise), self.config.hidden_size)
        rows = []
        for i in index:
            if (noise := starts.get(slots[i])) is not None:
                rows.append(sampler.start(self.ops, self.ops.asarray(noise[None]), self.config.hidden_size))
            else:
                batch, row = self._states[slots[i]]
                rows.append(StepState(*(x[row : row + 1] for x in batch)))
        if len(rows) == 1:
            return rows[0]
        return StepState(*(self.ops.concat(column, 0) for column in zip(*rows, strict=True)))

    # ---- One pass by itself -----------------------------------------------------------------------------------

    def soft(self, slot: int) -> np.ndarray:
        batch, row = self._states[slot]
        return self.ops.to_numpy(batch.soft[row : row + 1])[0]

    def logits(self, slot: int, canvas: np.ndarray, previous: np.ndarray | None = None) -> np.ndarray:
        x = self._states_of(slot, canvas, previous)
        return self.ops.to_numpy(self.ops.logits(x, self.model.embed_tokens, self.config.softcap))[0].astype(np.float32)

    def _logits_at(self, x: Array, places: Array) -> Array:
        return self.ops.logits_at(x, places, self.model.embed_tokens, self.config.softcap)

    def states(self, slot: int, canvas: np.ndarray, previous: np.ndarray | None = None) -> np.ndarray:
        return self.ops.to_numpy(self._states_of(slot, canvas, previous))[0].astype(np.float32)

    def scores(
        self, slots: Sequence[int], canvases: np.ndarray, at: Sequence[tuple[int, int]], tokens: np.ndarray
    ) -> Scores:
        ops, length, index = self.ops, canvases.shape[1], self._filled(len(slots))
        soft = ops.asarray(np.zeros((len(index), length, self.config.hidden_size), np.float32), ops.dtype)
        cache = self._cache([slots[i] for i in index], length)
        x = self._look(cache, ops.asarray(canvases[index].astype(np.int32)), soft)
        rows = ops.asarray(np.asarray([row * length + position for row, position in at], np.int32))
        x = ops.take(ops.reshape(x, (1, -1, x.shape[-1])), rows, 1)  # [1, R, D]: of the others nobody asks
        found = self.fetch(*within.scored(ops, self._logits_at, x, ops.asarray(tokens.astype(np.int32))))()
        kinds = (np.float32, np.float32, np.int32, np.float32)
        return Scores(*(np.concatenate(found[i::4]).astype(kind) for i, kind in enumerate(kinds)))

    def _of(self, classes: Classes) -> Array:
        """Return classes on the device: those used last stay there."""
        if classes.key not in self._classes:
            self._classes = dict([*self._classes.items()][1 - within.KEPT :])
            self._classes[classes.key] = self.ops.asarray(classes.of)
        return self._classes[classes.key]

    def head(self) -> Callable[[np.ndarray], np.ndarray]:
        ops, table, softcap = self.ops, self.model.embed_tokens, self.config.softcap

        def logits(states: np.ndarray) -> np.ndarray:
            x = ops.asarray(states[None], ops.dtype)
            return ops.to_numpy(ops.logits(x, table, softcap))[0].astype(np.float32)

        return logits

    def _states_of(self, slot: int, canvas: np.ndarray, previous: np.ndarray | None) -> Array:
        ops = self.ops
        if previous is None:
            soft = ops.asarray(np.zeros((1, len(canvas), self.config.hidden_size), np.float32), ops.dtype)
        else:
            scores = ops.asarray(previous[None].astype(NUMPY_DTYPES[ops.wide]))
            soft = ops.mean_embedding(reference.softmax(ops, scores), self.model.embed_tokens)
        return model.denoise(ops, self.model, self._cache([slot], len(canvas)), ops.asarray(canvas[None]), soft)

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        rows = self.ops.embed(self.model.embed_tokens, self.ops.asarray(tokens[None].astype(np.int32)), 1.0)
        return self.ops.to_numpy(rows)[0]

    # ---- What backends change ---------------------------------------------------------------------------------

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile a pure function of arrays and tuples of them; the default runs it as it is.

        A backend may let the next call of the function overwrite what it returned, caches aside.
        """
        return function

    def predicted(
        self, cache: Cache, state: Any, draws: Draws, classes: Array, count: int
    ) -> tuple[Array, Array, Masses]:
        """Run a pass up to its choice; what comes back is good until the next one."""
        return within.predict(self.ops, self.model, cache, self.taken(state), draws, classes, count)

    def taken(self, state: Any) -> StepState:
        """Return rows' canvases as `_state` left them as one batch."""
        return state

    def put(self, state: Any, after: StepState) -> Any:
        """Keep what a pass made of the rows' canvases, and return what `_done` reads."""
        return after

    def fetch(self, *arrays: Array) -> Callable[[], list[np.ndarray]]:
        """Ask for arrays on the host; what comes back waits for them and returns them as they are now."""
        return lambda: [self.ops.to_numpy(x) for x in arrays]

    def zeros(self, shape: tuple[int, ...]) -> Array:
        """Return a part of the pool."""
        return self.ops.asarray(np.zeros(shape, NUMPY_DTYPES[self.ops.dtype]))

    def placed(self, pool: Array, part: Array, slot: int) -> Array:
        """Return a part of the pool with other slots' entries [n, K, s, A] from a slot on in front of its own; in place
        where arrays are mutable."""
        pool[slot : slot + part.shape[0], :, : part.shape[2]] = part
        return pool

    def copied(self, x: Array) -> Array:
        """Return a copy that later passes leave alone."""
        return self.ops.asarray(np.array(self.ops.to_numpy(x)), self.ops.dtype)

    def context(self, needed: int) -> tuple[KV, ...]:
        """Return the pool as a pass sees it that needs so many entries of a slot: by default all of it."""
        return self._pool

    def _keep(self, cache: Cache) -> None:
        """Take what a reading pass has made of the pool: by default it is the pool, whether written in place or new.

        A backend whose `context` gives parts of the pool, which its ops write in place, has nothing to take.
        """
        self._pool = cache.layers

    def rounded_up(self, tokens: int) -> int:
        """Return the capacity that a pool for so many tokens has."""
        return tokens

    def idle(self) -> None:
        """No slot is open: by default the pool is given back."""
        self._pool, self._slots, self._capacity, self._scratch = (), 0, 0, 0

    def _room(self, tokens: int, canvas: int, rows: int) -> bool:
        """Whether rows beside those that are open leave the machine half of the memory that is free now."""
        count = len(self._lengths) + rows
        most = max([tokens, *self._asked.values()])
        needed = memory.cache_bytes(
            self.config, most, self._width, slots=count, scratch=self._needed_scratch(most, canvas)
        )
        have = memory.cache_bytes(self.config, self._capacity, self._width, slots=self._slots, scratch=self._scratch)
        return needed <= have + memory.available() // 2
