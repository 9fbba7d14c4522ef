"""Exported graphs against their source: the same inputs to both, and the error of every output.

The source runs in float32 on torch, or where that is not installed on NumPy; the graphs in onnxruntime on the CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .. import backends, runtime
from ..core import model as definition
from ..core import sampler
from ..core.config import read_json
from ..core.errors import DgemmaError, quoted
from . import manifest

SEED = 20


def verify(folder: Path, source: Path) -> dict[str, float]:
    """Return each output's largest error over prompts of one token, a window and its neighbours, and two windows.

    Floats, the cache and the logits among them: ‖got − want‖² / ‖want‖², and of the entropy, which may be all but zero,
    the largest difference in nats. Integers and masks: the share of positions that differ.

    Raises:
        DgemmaError: onnxruntime is not installed, or does not take the graphs.
    """
    name = "torch" if backends.available()["torch"] is None else "numpy"
    model = runtime.load(source, backend=name, device="cpu", dtype="float32")
    graphs = Graphs(folder)
    windows = [layer.window for layer in model.config.layers if layer.window is not None]
    window = max(windows, default=64)
    errors: dict[str, float] = {}
    for length in (1, window - 1, window, window + 1, 2 * window + 3):
        if length + 2 * model.config.canvas_length <= model.config.max_positions:
            for key, figure in _compare(graphs, model, length).items():
                errors[key] = max(errors.get(key, 0.0), figure)
    return errors


class Graphs:
    """The graphs of an exported folder, two or a unified one, in plain onnxruntime."""

    def __init__(self, folder: Path, options: Any = None) -> None:
        try:
            import onnxruntime as ort
        except ImportError:
            raise DgemmaError("running ONNX graphs needs onnxruntime: pip install 'dgemma[onnx]'") from None
        self.about = read_json(folder / manifest.NAME)
        if options is None:
            options = ort.SessionOptions()
            options.log_severity_level = 3
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the source's threads want to run
        self._sessions: dict[str, Any] = {}
        for name, file in self.about["graphs"].items():
            try:
                self._sessions[name] = ort.InferenceSession(folder / file, options, providers=["CPUExecutionProvider"])
            except Exception as error:  # the runtime's own exceptions have no common base but this
                said = quoted(str(error).strip().partition("\n")[0], 200)
                raise DgemmaError(f"onnxruntime {ort.__version__} does not take {file}: {said}") from None
        self.dtype = np.dtype(self.about["dtype"])

    def empty(self, batch: int) -> dict[str, np.ndarray]:
        """Return an empty cache."""
        return {
            name: np.zeros((batch, layer["kv_heads"], 0, layer["head_dim"]), self.dtype)
            for layer in self.about["layers"]
            for name in layer["past"]
        }

    def encode(self, cache: dict[str, np.ndarray], tokens: np.ndarray, at: int) -> dict[str, np.ndarray]:
        """Read tokens [B, L] from position `at` on; return the next cache."""
        wanted = {
            new: old for one in self.about["layers"] for old, new in zip(one["past"], one["present"], strict=True)
        }
        made = self._run("encode", list(wanted), cache | _tokens(tokens, at))
        return {wanted[name]: value for name, value in made.items()}

    def denoise(
        self, cache: dict[str, np.ndarray], canvas: np.ndarray, at: int, **step: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Run one step on a canvas [B, L]; `step` are the graph's other inputs."""
        wanted = self.about["outputs"].get("denoise") or {
            name: one for name, one in self.about["outputs"]["unified"].items() if not name.startswith("present.")
        }
        return self._run("denoise", list(wanted), cache | _tokens(canvas, at) | step)

    def _run(self, name: str, wanted: list[str], feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        session = self._sessions.get(name) or self._sessions["unified"]
        if name not in self._sessions and name == "encode":  # told from a step by what is empty
            batch, width = len(feeds["input_ids"]), self.about["hidden_size"]
            feeds |= {
                "soft_embedding": np.zeros((batch, 0, width), self.dtype), "uniform": np.zeros((batch, 0), np.float32),
                "temperature": np.ones((batch, 1), np.float32), "noise": np.zeros((batch, 0), np.int64),
                "entropy_bound": np.ones(1, np.float32),
            }  # fmt: skip
        return dict(zip(wanted, session.run(wanted, feeds), strict=True))


def _tokens(ids: np.ndarray, at: int) -> dict[str, np.ndarray]:
    positions = np.broadcast_to(np.arange(at, at + ids.shape[1]), ids.shape)
    return {"input_ids": ids.astype(np.int64), "position_ids": positions.astype(np.int64)}


def _compare(graphs: Graphs, model: runtime.DiffusionGemma, length: int) -> dict[str, float]:
    """Compare every output, behind a prompt of a length and behind a canvas that follows it."""
    ops, weights, config = model.ops, model.engine.model, model.config
    draw = np.random.default_rng([SEED, length])
    canvas_length, vocab = config.canvas_length, config.vocab_size
    errors: dict[str, float] = {}

    def note(found: dict[str, float]) -> None:
        for name, figure in found.items():
            # Whatever is no number is the worst there is, and stays so.
            errors[name] = max(errors.get(name, 0.0), figure if np.isfinite(figure) else np.inf)

    cache, at = graphs.empty(1), 0
    theirs = definition.new_cache(
        ops, config, batch=1, capacity=length + canvas_length, chunk=max(length, canvas_length)
    )
    for size in (length, canvas_length):  # the prompt, and a canvas behind it
        tokens = draw.integers(0, vocab, (1, size))
        cache, theirs = (
            graphs.encode(cache, tokens, at),
            definition.encode(ops, weights, theirs, ops.asarray(tokens, "int32")),
        )
        at += size
        note(_cache_errors(graphs, cache, model, theirs, at))
        canvas = ops.asarray(draw.integers(0, vocab, (1, canvas_length)), "int32")
        soft = sampler.start(ops, canvas, config.hidden_size).soft
        for _ in range(2):  # without and with a mean embedding
            given = {
                "temperature": np.full((1, 1), 0.7, np.float32),
                "uniform": draw.random((1, canvas_length)).astype(np.float32),
                "noise": draw.integers(0, vocab, (1, canvas_length)), "entropy_bound": np.asarray([0.1], np.float32),
            }  # fmt: skip
            got = graphs.denoise(
                cache, ops.to_numpy(canvas), at, soft_embedding=ops.to_numpy(soft).astype(graphs.dtype), **given
            )
            want = _step(model, theirs, canvas, soft, given, logits="logits" in got)
            note({name: _error(name, got[name], ops.to_numpy(array)) for name, array in want.items()})
            canvas, soft = want["next_canvas"], want["next_soft_embedding"]
    return errors


def _step(
    model: runtime.DiffusionGemma, cache: definition.Cache, canvas: Any, soft: Any, given: dict[str, np.ndarray],
    *, logits: bool,
) -> dict[str, Any]:  # fmt: skip
    """A step's outputs by the graph's names, from the source."""
    ops, weights = model.ops, model.engine.model
    heat, uniform = (ops.asarray(given[name]) for name in ("temperature", "uniform"))
    x = definition.denoise(ops, weights, cache, canvas, soft)
    token, argmax, entropy, mean = ops.vocab_head(
        x, weights.embed_tokens, model.config.softcap, ops.cast(heat, ops.wide), uniform
    )
    accepted = sampler.accept(ops, entropy, float(given["entropy_bound"][0]))
    made = {
        "token": token, "argmax": argmax, "entropy": entropy, "accepted": accepted,
        "next_canvas": ops.where(accepted, token, ops.asarray(given["noise"], "int32")), "next_soft_embedding": mean,
    }  # fmt: skip
    return made | ({"logits": ops.logits(x, weights.embed_tokens, model.config.softcap)} if logits else {})


def _cache_errors(
    graphs: Graphs, cache: dict[str, np.ndarray], model: runtime.DiffusionGemma, theirs: definition.Cache, at: int
) -> dict[str, float]:
    found = {}
    for one, config, kept in zip(graphs.about["layers"], model.config.layers, theirs.layers, strict=True):
        rows = at if config.window is None else min(at, config.window - 1)
        for past, present, array in zip(one["past"], one["present"], kept, strict=True):
            found[present] = _error(present, cache[past], model.ops.to_numpy(array)[:, :, :rows])
    return found


def _error(name: str, got: np.ndarray, want: np.ndarray) -> float:
    if got.shape != want.shape:
        return np.inf
    if want.dtype.kind in "iub":
        return float((got != want).mean())
    mine, other = got.astype(np.float64), want.astype(np.float64)
    if name == "entropy":
        return float(np.abs(mine - other).max())
    return float(np.square(mine - other).sum() / max(np.square(other).sum(), np.finfo(np.float64).tiny))
