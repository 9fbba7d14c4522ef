"""ONNX Runtime on the CPU and on CUDA: whole passes as sessions over the graphs that `dgemma.export` writes.

A folder that holds exported graphs runs those; for any other they are written in memory, in a second at most, and no
file is made. Either way the weights stay in the checkpoint's files, which the sessions map. The cache, the canvas and
the mean embedding are values of the runtime's own device and go from pass to pass without the host; what comes back of
each pass are the few hundred numbers that `Draft` shows.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from ...checkpoints.checkpoint import Checkpoint
from ...core.config import ModelConfig
from ...core.errors import DgemmaError
from ...core.model import Cache
from ...core.ops import KV, Array, DType, Passes, dense
from ...core.sampler import Sampling, StepState
from ..numpy import NumpyOps
from .session import Session, Weights, open_session, provider_of

_WIDTHS = {"float32": np.float32, "float16": np.float16}


def ort_backend(device: str, dtype: DType) -> OrtOps:
    """Return ONNX Runtime's ops on a device: `auto` is CUDA where the installed package has it, else the CPU.

    Raises:
        DgemmaError: no such device here, or a width that the graphs do not have.
    """
    if not re.fullmatch("auto|cpu|cuda(:[0-9]{1,4})?", device):
        raise DgemmaError(f"device {device!r} is not one that onnx has; choose from auto, cpu, cuda, cuda:N")
    if dtype not in _WIDTHS:
        raise DgemmaError(f"backend 'onnx' computes in float32 or float16, not in {dtype}")
    return OrtOps(dtype, provider_of(device))


class OrtOps(NumpyOps, Passes):
    """Passes run as sessions; what is around them, 512 numbers a step, is NumPy's."""

    name = "onnx"
    survives_fork = False  # a session's threads stay with the parent

    def __init__(self, dtype: DType, device: str) -> None:
        super().__init__(dtype)
        self.device = device
        self._weights = Weights()
        self._sessions: dict[str, Session] = {}
        self._checkpoint: Checkpoint | None = None
        self._graphs: dict[str, Path] = {}

    # ---- Graphs -----------------------------------------------------------------------------------------------

    def open(self, checkpoint: Checkpoint) -> None:
        from ...export.manifest import NAME, read

        self._checkpoint = checkpoint
        where = checkpoint.path / NAME
        if os.path.lexists(where):
            self._graphs = read(where, checkpoint, self.dtype)
        for name in ("encode", "denoise"):
            self._session(name)

    @property
    def config(self) -> ModelConfig:
        assert self._checkpoint is not None, "open() comes before anything runs"
        return self._checkpoint.config

    def _session(self, name: str) -> Session:
        """Return a graph's session: `encode` and `denoise`, and when something asks for them `states` and `logits`."""
        if name not in self._sessions:
            assert self._checkpoint is not None, "open() comes before anything runs"
            self._sessions[name] = open_session(
                name, self._checkpoint, self._graphs.get(name), self.dtype, str(self.device), self._weights
            )
        return self._sessions[name]

    # ---- Weights ----------------------------------------------------------------------------------------------

    def pack(self, weight: Any) -> Any:
        """Leave a stored weight where it is; the sessions have their own view of it."""
        return weight

    def mean_embedding(self, probabilities: Array, table: Any) -> Array:
        return self.matmul(self.cast(probabilities, self.dtype), dense(table, self.dtype).astype(_WIDTHS[self.dtype]))

    def logits(self, x: Array, table: Any, softcap: float) -> Array:
        session = self._session("logits")
        return session.run({"states": x}, {"logits": session.host()})["logits"].numpy()

    # ---- Passes -----------------------------------------------------------------------------------------------

    def to_numpy(self, x: Any) -> np.ndarray:
        return x if isinstance(x, np.ndarray) else x.numpy()

    def new_cache(self, batch: int, kv_heads: int, head_dim: int, capacity: int) -> KV:
        empty = np.empty((batch, kv_heads, 0, head_dim), _WIDTHS[self.dtype])
        return KV(empty, empty)

    def encode(self, cache: Cache, tokens: Array) -> Cache:
        session = self._session("encode")
        feeds = {"input_ids": tokens.astype(np.int64), **self._context(cache, tokens.shape)}
        names = [f"present.{i}.{part}" for i in range(len(cache.layers)) for part in ("key", "value")]
        made = session.run(feeds, dict.fromkeys(names, session.device))
        layers = [KV(made[f"present.{i}.key"], made[f"present.{i}.value"]) for i in range(len(cache.layers))]
        return Cache(tuple(layers), int(cache.length) + tokens.shape[1])

    def denoise(self, cache: Cache, canvas: Array, soft: Array) -> Array:
        session = self._session("states")
        feeds = {
            "input_ids": self.to_numpy(canvas).astype(np.int64), "soft_embedding": self.to_numpy(soft),
            **self._context(cache, canvas.shape),
        }  # fmt: skip
        return session.run(feeds, {"states": session.host()})["states"].numpy()

    def step(
        self, sampler: Sampling, cache: Cache, state: StepState, temperature: Array, uniforms: Array, noise: Array
    ) -> StepState:
        session = self._session("denoise")
        shape = noise.shape
        canvas = state.canvas.astype(np.int64) if isinstance(state.canvas, np.ndarray) else state.canvas
        feeds = {
            "input_ids": canvas, "soft_embedding": state.soft, "uniform": uniforms,
            "temperature": np.broadcast_to(temperature, (shape[0], 1)), "noise": noise.astype(np.int64),
            "entropy_bound": np.asarray([sampler.entropy_bound], np.float32), **self._context(cache, shape),
        }  # fmt: skip
        places: dict[str, Any] = {name: session.host() for name in ("argmax", "entropy", "accepted")}
        # New ones for every pass: kept ones would be where two generations meet.
        places |= {name: session.device for name in ("next_canvas", "next_soft_embedding")}
        made = session.run(feeds, places)
        argmax, entropy, accepted = (made[name].numpy() for name in ("argmax", "entropy", "accepted"))
        argmax = argmax.astype(np.int32)
        stable = (state.stable + 1) * (argmax == state.argmax).all(-1)
        return StepState(
            canvas=made["next_canvas"],
            soft=made["next_soft_embedding"],
            argmax=argmax,
            stable=stable.astype(np.int32),
            accepted=accepted,
            entropy=entropy,
            stop=(entropy.mean(-1) < sampler.confidence) & (stable >= sampler.stability),
        )

    def _context(self, cache: Cache, shape: tuple[int, ...]) -> dict[str, Any]:
        batch, length = shape
        start = int(cache.length)
        feeds: dict[str, Any] = {
            "position_ids": np.broadcast_to(np.arange(start, start + length), (batch, length)).astype(np.int64)
        }
        for i, layer in enumerate(cache.layers):
            feeds |= {f"past_key_values.{i}.key": layer.keys, f"past_key_values.{i}.value": layer.values}
        return feeds
