"""ONNX Runtime on the CPU and on CUDA: whole passes as sessions over the graphs that `dgemma.export` writes.

A folder that holds exported graphs runs those; for any other they are written in memory, in a second at most, and no
file is made. Either way the weights stay in the checkpoint's files, which the sessions map. The cache and the mean
embedding are values of the runtime's own device and go from pass to pass without the host; what comes back of each pass
are the few hundred numbers that `Draft` shows.

A graph takes a cache in which every entry is valid, and one entropy bound. So on a CPU those rows share a denoising run
that are equally long and have the same bound, such as samples of one prompt; see docs/onnx.md for what it brings. All
others are runs of their own, and so is what a row reads. A row's cache is what its last run of `encode` returned, and a
value that was returned is never written to again, so that a snapshot is the values themselves.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ...checkpoints.checkpoint import Checkpoint
from ...checkpoints.loading import dense
from ...checkpoints.weights import DECODER
from ...core import memory, reference, sampler, within
from ...core.canvas import FREE, Chosen, Classes
from ...core.config import ModelConfig
from ...core.parts import Draws, Masses, StepState
from ...core.passes import Passes, Scores, Snapshot, Starts, StepResult
from ...core.primitives import DType
from ..numpy import NumpyOps
from .session import Session, Weights, open_session

WIDTHS = {"float32": np.float32, "float16": np.float16}
"""What the graphs compute in."""
HEAD = 256 << 20
"""Bytes that a batch may hold of what is as large as the vocabulary for each position: more rows are another run."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Canvas:
    """What a row's last pass left for its next one."""

    tokens: np.ndarray  # int32 [1, L]
    soft: Any  # [1, L, D], a NumPy array or a value of the runtime
    argmax: np.ndarray  # int32 [1, L]
    stable: int
    """Passes in a row that left the argmax as it was."""


@dataclass(kw_only=True, eq=False)
class _Slot:
    asked: int
    """Tokens that it has to have room for."""
    length: int
    """Tokens read."""
    cache: dict[str, Any]
    """By the graphs' names of inputs, [1, K, S, A] each."""
    canvas: _Canvas | None = None


class OrtPasses(Passes):
    """Each pass of a row is a run of a session, begun and finished before the next."""

    name = "onnx"
    survives_fork = False  # a session's threads stay with the parent

    def __init__(self, checkpoint: Checkpoint, device: str, dtype: DType) -> None:
        """Get the graphs of a checkpoint ready; `device` is `cpu` or `cuda:N`.

        Raises:
            DgemmaError: there are none, and none can be made, or the runtime does not take them.
        """
        from ...export.manifest import NAME, read

        self.config: ModelConfig = checkpoint.config
        self.device, self.dtype = device, dtype
        self._checkpoint = checkpoint
        self._width = WIDTHS[dtype]
        self._host = NumpyOps(dtype)
        self._weights = Weights()
        self._sessions: dict[str, Session] = {}
        self._slots: dict[int, _Slot] = {}
        where = checkpoint.path / NAME
        self._graphs: dict[str, Path] = read(where, checkpoint, dtype) if os.path.lexists(where) else {}
        for name in ("encode", "denoise"):
            self._session(name)

    def _session(self, name: str) -> Session:
        """Return a graph's session: `encode` and `denoise`, and once something asks for them parts of a pass."""
        if name not in self._sessions:
            self._sessions[name] = open_session(
                name, self._checkpoint, self._graphs.get(name), self.dtype, self.device, self._weights
            )
        return self._sessions[name]

    def home(self) -> AbstractContextManager[None]:
        return np.errstate(all="ignore")  # what is not finite at the end of a pass is an error then

    # ---- Slots ------------------------------------------------------------------------------------------------

    def fits(self, tokens: int, canvas: int, rows: int = 1) -> bool:
        """See `Passes.fits`. A run holds the caches that it reads beside those that it returns, or beside the rows'."""
        width = np.dtype(self._width).itemsize
        memory.check_room(self.config, tokens, max(min(self.chunk, tokens), canvas), width)
        asked = [slot.asked for slot in self._slots.values()] + [tokens] * rows
        needed = 2 * sum(memory.cache_bytes(self.config, one, width) for one in asked)
        have = sum(memory.cache_bytes(self.config, slot.length, width) for slot in self._slots.values())
        return needed <= have + memory.available() // 2

    def open(self, tokens: int, canvas: int, after: Snapshot | None = None) -> int:
        number = next(i for i in range(len(self._slots) + 1) if i not in self._slots)
        if after is not None:
            cache, length = dict(after.data), after.length
        else:
            cache, length = self._empty(), 0
        self._slots[number] = _Slot(asked=tokens, length=length, cache=cache)
        return number

    def _empty(self) -> dict[str, np.ndarray]:
        return {
            f"past_key_values.{i}.{part}": np.empty((1, layer.kv_heads, 0, layer.head_dim), self._width)
            for i, layer in enumerate(self.config.layers)
            for part in ("key", "value")
        }

    def close(self, slot: int) -> None:
        self._slots.pop(slot)

    def save(self, slot: int) -> Snapshot:
        """Return the slot's cache itself: nothing writes to its values."""
        one = self._slots[slot]
        return Snapshot(length=one.length, nbytes=self.saved_bytes(slot), data=dict(one.cache))

    def saved_bytes(self, slot: int) -> int:
        return memory.cache_bytes(self.config, self._slots[slot].length, np.dtype(self._width).itemsize)

    # ---- Passes -----------------------------------------------------------------------------------------------

    def read(self, rows: Sequence[tuple[int, np.ndarray]]) -> None:
        session = self._session("encode")
        for slot, tokens in rows:
            one = self._slots[slot]
            ids = tokens[None].astype(np.int64)
            feeds = {"input_ids": ids, "position_ids": self._positions(one, ids.shape), **one.cache}
            wanted = {name.replace("past_key_values", "present"): name for name in one.cache}
            made = session.run(feeds, dict.fromkeys(wanted, session.device))
            one.cache = {wanted[name]: value for name, value in made.items()}
            one.length += len(tokens)

    def step(self, slots: Sequence[int], draws: Draws, starts: Starts) -> Callable[[], StepResult]:
        self._begin(slots, starts)
        groups = self._groups(slots, draws)
        parts = [self._step([self._slots[slots[i]] for i in one], Draws(*(x[one] for x in draws))) for one in groups]
        result = _together(groups, parts)
        return lambda: result

    def _begin(self, slots: Sequence[int], starts: Starts) -> None:
        """Begin those canvases of some slots that begin with this pass."""
        for slot in slots:
            if (noise := starts.get(slot)) is not None:
                self._slots[slot].canvas = self._start(noise)

    def _groups(self, slots: Sequence[int], draws: Draws) -> list[list[int]]:
        """Return which rows share a run; on a card, where caches would have to come to the host for it, none do."""
        if self.device != "cpu":
            return [[i] for i in range(len(slots))]
        most = max(1, HEAD // (4 * draws.noise.shape[1] * self.config.vocab_size))
        alike: dict[tuple[int, float], list[int]] = {}
        for i, slot in enumerate(slots):
            alike.setdefault((self._slots[slot].length, float(draws.entropy_bound[i, 0])), []).append(i)
        return [rows[at : at + most] for rows in alike.values() for at in range(0, len(rows), most)]

    def _step(self, rows: Sequence[_Slot], draws: Draws) -> StepResult:
        """Run a pass of rows that are equally long and have one entropy bound."""
        canvases, session = _canvases(rows), self._session("denoise")
        feeds = {
            **self._seen(rows), "temperature": draws.temperature, "uniform": draws.uniforms,
            "noise": draws.noise.astype(np.int64),
            "entropy_bound": draws.entropy_bound[0].astype(np.float32), "held": draws.held.astype(np.int64),
        }  # fmt: skip
        places: dict[str, Any] = dict.fromkeys(("argmax", "entropy", "accepted", "next_canvas"), session.host())
        made = session.run(feeds, places | {"next_soft_embedding": session.device})
        argmax, entropy, accepted, tokens = (made[name].numpy() for name in places)
        argmax, soft = argmax.astype(np.int32), made["next_soft_embedding"]
        # The graphs know the draw only: where greedy, what it chose gives way to the likeliest.
        tokens = np.where(draws.greedy & accepted, argmax, tokens).astype(np.int32)
        same = [(one == before.argmax[0]).all() for one, before in zip(argmax, canvases, strict=True)]
        stable = np.asarray([before.stable + 1 for before in canvases]) * same
        _keep(rows, tokens, argmax, stable, soft)
        sure = sampler.confident(self._host, draws.held, entropy, draws.confidence.astype(np.float32))
        stop = sure & (stable >= draws.stability)
        return StepResult(canvas=tokens, argmax=argmax, accepted=accepted, entropy=entropy, stop=stop)

    def _seen(self, rows: Sequence[_Slot]) -> dict[str, Any]:
        """Return what a pass over rows that are equally long sees: their canvases and their caches."""
        canvases, first = _canvases(rows), rows[0]
        ids = np.concatenate([canvas.tokens for canvas in canvases]).astype(np.int64)
        return {
            "input_ids": ids, "position_ids": self._positions(first, ids.shape),
            "soft_embedding": _joined([canvas.soft for canvas in canvases]),
            **{name: _joined([row.cache[name] for row in rows]) for name in first.cache},
        }  # fmt: skip

    def _start(self, noise: np.ndarray) -> _Canvas:
        return _Canvas(
            tokens=noise[None],
            soft=np.zeros((1, len(noise), self.config.hidden_size), self._width),
            argmax=np.full((1, len(noise)), -1, np.int32),  # equals no canvas, so the first pass is never stable
            stable=0,
        )

    def read_and_step(
        self, rows: Sequence[tuple[int, np.ndarray]], draws: Draws, starts: Starts
    ) -> Callable[[], StepResult]:
        self.read(rows)
        return self.step([slot for slot, _ in rows], draws, starts)

    def step_within(
        self, slots: Sequence[int], draws: Draws, starts: Starts, classes: Classes, choose: Callable[[Masses], Chosen]
    ) -> StepResult:
        self._begin(slots, starts)
        groups, session = self._groups(slots, draws), self._session("states")
        runs = []
        for group in groups:
            seen = self._seen([self._slots[slots[i]] for i in group])
            seen["held"] = draws.held[group].astype(np.int64)
            x = session.run(seen, {"states": session.device})["states"]
            runs.append((x, *self._classes(x, draws.temperature[group], classes)))
        place = np.argsort(np.concatenate(groups))
        chosen = choose(Masses(*(np.concatenate(one)[place] for one in zip(*(run[2] for run in runs), strict=True))))
        parts = []
        for group, (x, soft, _) in zip(groups, runs, strict=True):
            rows = [self._slots[slots[i]] for i in group]
            given = Draws(*(one[group] for one in draws))
            parts.append(self._chosen(rows, given, classes, chosen.rows(group), x, soft))
        return _together(groups, parts)

    def _classes(self, x: ort.OrtValue, temperature: np.ndarray, classes: Classes) -> tuple[ort.OrtValue, Masses]:
        """Return what states [B, L, D] make of classes: the mean embedding, on the device, and the masses."""
        session = self._session("classes")
        feeds = {
            "states": x, "temperature": temperature, "classes": classes.of.astype(np.int64),
            "count": np.asarray([classes.count], np.int64),
        }  # fmt: skip
        made = session.run(feeds, {"soft": session.device} | dict.fromkeys(Masses._fields, session.host()))
        mass, best, score, moment = (made[name].numpy() for name in Masses._fields)
        return made["soft"], Masses(mass, best.astype(np.int32), score, moment)

    def _chosen(
        self, rows: Sequence[_Slot], draws: Draws, classes: Classes, chosen: Chosen, x: ort.OrtValue, soft: Any
    ) -> StepResult:
        """End a pass of rows as `_step` does, with what was chosen of its states x [B, L, D]."""
        host, canvases, states = self._host, _canvases(rows), x.numpy()
        token = chosen.token.copy()
        if (open_ := token < 0).any():
            found = within.drawn(host, self._logits_at, states, draws.temperature, classes.of, chosen)
            token[open_] = np.concatenate(found)
        if chosen.factors is not None:
            soft = within.fed_back(
                host, self._logits_at, self._mean, states, draws.temperature, classes, chosen.factors
            )  # fmt: skip
        before = StepState(
            canvas=np.concatenate([one.tokens for one in canvases]), soft=None,
            argmax=np.concatenate([one.argmax for one in canvases]),
            stable=np.asarray([one.stable for one in canvases], np.int32), accepted=None, entropy=None, stop=None,
        )  # fmt: skip
        bounds = draws.entropy_bound.astype(np.float32), draws.confidence.astype(np.float32)
        given = draws._replace(entropy_bound=bounds[0], confidence=bounds[1])
        after = host.advance(given, before, token, chosen.argmax, chosen.entropy.astype(np.float32), soft)
        _keep(rows, after.canvas, after.argmax, after.stable, after.soft)
        return StepResult(
            canvas=after.canvas, argmax=after.argmax, accepted=after.accepted, entropy=after.entropy, stop=after.stop
        )

    def scores(
        self, slots: Sequence[int], canvases: np.ndarray, at: Sequence[tuple[int, int]], tokens: np.ndarray
    ) -> Scores:
        states = [self._states(slot, canvas, None).numpy() for slot, canvas in zip(slots, canvases, strict=True)]
        x = np.stack([states[row][0, position] for row, position in at])[None]
        found = within.scored(self._host, self._logits_at, x, tokens)
        log_p, entropy, token, top = (np.concatenate(found[i::4]) for i in range(4))
        return Scores(log_p=log_p, entropy=entropy, token=token, top=top)

    def _positions(self, slot: _Slot, shape: tuple[int, ...]) -> np.ndarray:
        """Return the positions of tokens [B, L] behind a slot's cache."""
        return np.broadcast_to(np.arange(slot.length, slot.length + shape[1], dtype=np.int64), shape)

    # ---- One pass by itself -----------------------------------------------------------------------------------

    def soft(self, slot: int) -> np.ndarray:
        canvas = self._slots[slot].canvas
        assert canvas is not None, "a pass comes before"
        return _array(canvas.soft)[0]

    def logits(self, slot: int, canvas: np.ndarray, previous: np.ndarray | None = None) -> np.ndarray:
        return self._logits(self._states(slot, canvas, previous))[0]

    def _logits(self, states: Any) -> np.ndarray:
        """States [B, L, D] → float32 [B, L, V]."""
        return _logits(self._session("logits"), states)

    def _logits_at(self, states: np.ndarray, places: np.ndarray) -> np.ndarray:
        """States [B, L, D], places int32 [R] among all their positions → float32 [1, R, V]."""
        return self._logits(states.reshape(1, -1, states.shape[-1])[:, places])

    def _mean(self, probabilities: np.ndarray) -> np.ndarray:
        """Distributions, float32 [B, L, V] → mean embeddings [B, L, D]."""
        session = self._session("embedding")
        return session.run({"probabilities": probabilities}, {"soft": session.host()})["soft"].numpy()

    def states(self, slot: int, canvas: np.ndarray, previous: np.ndarray | None = None) -> np.ndarray:
        return self._states(slot, canvas, previous).numpy()[0].astype(np.float32)

    def head(self) -> Callable[[np.ndarray], np.ndarray]:
        session = open_session(
            "logits", self._checkpoint, self._graphs.get("logits"), self.dtype, self.device, Weights()
        )  # one of its own, which was lent the table alone
        width = self._width
        return lambda states: _logits(session, states[None].astype(width))[0]

    def _states(self, slot: int, canvas: np.ndarray, previous: np.ndarray | None) -> ort.OrtValue:
        if previous is None:
            soft = np.zeros((1, len(canvas), self.config.hidden_size), self._width)
        else:
            soft = self._mean(reference.softmax(self._host, previous[None].astype(np.float32)))
        session, one = self._session("states"), self._slots[slot]
        ids = canvas[None].astype(np.int64)
        positions = self._positions(one, ids.shape)
        feeds = {
            "input_ids": ids,
            "position_ids": positions,
            "soft_embedding": soft,
            "held": np.full_like(ids, FREE),
            **one.cache,
        }
        return session.run(feeds, {"states": session.device})["states"]

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        return dense(self._table[tokens], self._host.dtype).astype(self._width)

    @property
    def _table(self) -> Any:
        """The embedding table as it is stored, [V, D]."""
        return self._checkpoint.tensor(f"{DECODER}.embed_tokens.weight")


def _canvases(rows: Sequence[_Slot]) -> list[_Canvas]:
    canvases = [row.canvas for row in rows if row.canvas is not None]
    assert len(canvases) == len(rows), "a canvas begins with its noise"
    return canvases


def _keep(rows: Sequence[_Slot], tokens: np.ndarray, argmax: np.ndarray, stable: np.ndarray, soft: Any) -> None:
    """Leave what a pass came to for the rows' next one; `soft` [B, L, D] stays on its device where it is one row's."""
    softs = [soft] if len(rows) == 1 else np.split(_array(soft), len(rows))
    for i, row in enumerate(rows):
        row.canvas = _Canvas(
            tokens=tokens[i : i + 1], soft=softs[i], argmax=argmax[i : i + 1], stable=int(stable[i])
        )  # fmt: skip


def _together(groups: Sequence[Sequence[int]], parts: Sequence[StepResult]) -> StepResult:
    """Return groups' results as one, in the order of the rows."""
    place = np.argsort(np.concatenate(groups))  # of each row among the groups'
    names = ("canvas", "argmax", "accepted", "entropy", "stop")
    return StepResult(**{name: np.concatenate([getattr(part, name) for part in parts])[place] for name in names})


def _logits(session: Session, states: Any) -> np.ndarray:
    """States [B, L, D] → float32 [B, L, V]."""
    return session.run({"states": states}, {"logits": session.host()})["logits"].numpy()


def _joined(values: Sequence[Any]) -> Any:
    """Return rows [1, …] as one batch; one alone stays where it is."""
    return values[0] if len(values) == 1 else np.concatenate([_array(x) for x in values])


def _array(x: Any) -> np.ndarray:
    return x if isinstance(x, np.ndarray) else x.numpy()
