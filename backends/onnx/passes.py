"""ONNX Runtime on the CPU and on CUDA: whole passes as sessions over the graphs that `dgemma.export` writes.

A folder that holds exported graphs runs those; for any other they are written in memory, in a second at most, and no
file is made. Either way the weights stay in the checkpoint's files, which the sessions map. The cache and the mean
embedding are values of the runtime's own device and go from pass to pass without the host; what comes back of each pass
are the few hundred numbers that `Draft` shows.

A graph takes a cache in which every entry is valid, so rows of different lengths cannot share a pass: here each row is
a run of its own. Its cache is what its last run of `encode` returned, and a value that was returned is never written to
again, so that a snapshot is the values themselves.
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
from ...core import memory, reference
from ...core.config import ModelConfig
from ...core.parts import Draws
from ...core.passes import Passes, Snapshot, Starts, StepResult
from ...core.primitives import DType
from ..numpy import NumpyOps
from .session import Session, Weights, open_session

WIDTHS = {"float32": np.float32, "float16": np.float16}
"""What the graphs compute in."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Canvas:
    """What a row's last pass left for its next one."""

    tokens: np.ndarray  # int32 [1, L]
    soft: Any  # [1, L, D], a NumPy array or a value of the runtime
    argmax: np.ndarray  # int32 [1, L]
    stable: int


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
        """Return a graph's session: `encode` and `denoise`, and when something asks for them `states` and `logits`."""
        if name not in self._sessions:
            self._sessions[name] = open_session(
                name, self._checkpoint, self._graphs.get(name), self._host.dtype, self.device, self._weights
            )
        return self._sessions[name]

    def home(self) -> AbstractContextManager[None]:
        return np.errstate(all="ignore")  # what is not finite at the end of a pass is an error then

    # ---- Slots ------------------------------------------------------------------------------------------------

    def fits(self, tokens: int, canvas: int, rows: int = 1) -> bool:
        """See `Passes.fits`. A run holds the cache that it reads beside the one that it returns."""
        width = np.dtype(self._width).itemsize
        memory.check_room(self.config, tokens, max(min(self.chunk, tokens), canvas), width)
        asked = [slot.asked for slot in self._slots.values()] + [tokens] * rows
        needed = sum(memory.cache_bytes(self.config, one, width) for one in (*asked, max(asked)))
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
            feeds = {"input_ids": tokens[None].astype(np.int64), **self._context(one, len(tokens))}
            wanted = {name.replace("past_key_values", "present"): name for name in one.cache}
            made = session.run(feeds, dict.fromkeys(wanted, session.device))
            one.cache = {wanted[name]: value for name, value in made.items()}
            one.length += len(tokens)

    def step(self, slots: Sequence[int], draws: Draws, starts: Starts) -> Callable[[], StepResult]:
        rows = [
            self._step(self._slots[slot], Draws(*(x[i : i + 1] for x in draws)), starts.get(slot))
            for i, slot in enumerate(slots)
        ]
        names = ("canvas", "argmax", "accepted", "entropy", "stop")
        result = StepResult(**{name: np.concatenate([getattr(row, name) for row in rows]) for name in names})
        return lambda: result

    def _step(self, slot: _Slot, draws: Draws, noise: np.ndarray | None) -> StepResult:
        """Run a row's pass."""
        canvas = slot.canvas if noise is None else self._start(noise)
        assert canvas is not None, "a canvas begins with its noise"
        session = self._session("denoise")
        feeds = {
            "input_ids": canvas.tokens.astype(np.int64), "soft_embedding": canvas.soft,
            "temperature": draws.temperature, "uniform": draws.uniforms, "noise": draws.noise.astype(np.int64),
            "entropy_bound": draws.entropy_bound[0].astype(np.float32),
            **self._context(slot, draws.noise.shape[1]),
        }  # fmt: skip
        places: dict[str, Any] = dict.fromkeys(("argmax", "entropy", "accepted", "next_canvas"), session.host())
        made = session.run(feeds, places | {"next_soft_embedding": session.device})
        argmax, entropy, accepted, tokens = (made[name].numpy() for name in places)
        argmax = argmax.astype(np.int32)
        stable = (canvas.stable + 1) * bool((argmax == canvas.argmax).all())
        # The graphs know the draw only: where greedy, what it chose gives way to the likeliest.
        tokens = np.where(draws.greedy & accepted, argmax, tokens).astype(np.int32)
        slot.canvas = _Canvas(tokens=tokens, soft=made["next_soft_embedding"], argmax=argmax, stable=stable)
        stop = (entropy.mean(-1) < draws.confidence.astype(np.float32)) & (stable >= draws.stability)
        return StepResult(canvas=tokens, argmax=argmax, accepted=accepted, entropy=entropy, stop=stop)

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

    def _context(self, slot: _Slot, length: int) -> dict[str, Any]:
        """Return a slot's cache, and the positions of so many tokens behind it."""
        positions = np.arange(slot.length, slot.length + length, dtype=np.int64)
        return {"position_ids": positions[None], **slot.cache}

    # ---- One pass by itself -----------------------------------------------------------------------------------

    def soft(self, slot: int) -> np.ndarray:
        canvas = self._slots[slot].canvas
        assert canvas is not None, "a pass comes before"
        return (canvas.soft if isinstance(canvas.soft, np.ndarray) else canvas.soft.numpy())[0]

    def logits(self, slot: int, canvas: np.ndarray, previous: np.ndarray | None = None) -> np.ndarray:
        return _logits(self._session("logits"), self._states(slot, canvas, previous))

    def states(self, slot: int, canvas: np.ndarray, previous: np.ndarray | None = None) -> np.ndarray:
        return self._states(slot, canvas, previous).numpy()[0].astype(np.float32)

    def head(self) -> Callable[[np.ndarray], np.ndarray]:
        session = open_session(
            "logits", self._checkpoint, self._graphs.get("logits"), self._host.dtype, self.device, Weights()
        )  # one of its own, which was lent the table alone
        width = self._width
        return lambda states: _logits(session, states[None].astype(width))

    def _states(self, slot: int, canvas: np.ndarray, previous: np.ndarray | None) -> ort.OrtValue:
        host = self._host
        if previous is None:
            soft = np.zeros((1, len(canvas), self.config.hidden_size), self._width)
        else:
            probabilities = reference.softmax(host, previous[None].astype(np.float32))
            soft = host.mean_embedding(probabilities, host.pack(self._table))
        session, one = self._session("states"), self._slots[slot]
        feeds = {"input_ids": canvas[None].astype(np.int64), "soft_embedding": soft, **self._context(one, len(canvas))}
        return session.run(feeds, {"states": session.device})["states"]

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        return dense(self._table[tokens], self._host.dtype).astype(self._width)

    @property
    def _table(self) -> Any:
        """The embedding table as it is stored, [V, D]."""
        return self._checkpoint.tensor(f"{DECODER}.embed_tokens.weight")


def _logits(session: Session, states: Any) -> np.ndarray:
    """States [1, L, D] → float32 [L, V]."""
    return session.run({"states": states}, {"logits": session.host()})["logits"].numpy()[0]
