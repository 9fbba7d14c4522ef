"""Exported graphs against their source: the same inputs to both, and the error of every output.

The source runs in float32 on torch, or where that is not installed on NumPy; the graphs in onnxruntime on the CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .. import backends
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.files import read_json
from ..core.errors import DgemmaError, quoted
from ..core.parts import Draws
from ..core.passes import Passes, Snapshot
from ..export import manifest

SEED = 20
TEMPERATURE, BOUND, HELD = 0.7, 0.1, 0.4


def verify(folder: Path, source: Path) -> dict[str, float]:
    """Return each output's largest error over prompts of one token, a window and its neighbours, and two windows.

    Floats, the cache and the logits among them: ‖got − want‖² / ‖want‖², and of the entropy, which may be all but zero,
    the largest difference in nats. Integers and masks: the share of positions that differ.

    Raises:
        DgemmaError: onnxruntime is not installed, or does not take the graphs.
    """
    name = "torch" if backends.available()["torch"] is None else "numpy"
    passes = backends.open(name, Checkpoint.open(source), device="cpu", dtype="float32")
    graphs, config = Exported(folder), passes.config
    windows = [layer.window for layer in config.layers if layer.window is not None]
    window = max(windows, default=64)
    errors: dict[str, float] = {}
    with passes.home(), passes.guarded("verifying"):
        for length in (1, window - 1, window, window + 1, 2 * window + 3):
            if length + 2 * config.canvas_length <= config.max_positions:
                for key, figure in _compare(graphs, passes, length).items():
                    errors[key] = max(errors.get(key, 0.0), figure)
    return errors


class Exported:
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
                "entropy_bound": np.ones(1, np.float32), "held": np.zeros((batch, 0), np.int64),
            }  # fmt: skip
        return dict(zip(wanted, session.run(wanted, feeds), strict=True))


def _tokens(ids: np.ndarray, at: int) -> dict[str, np.ndarray]:
    positions = np.broadcast_to(np.arange(at, at + ids.shape[1]), ids.shape)
    return {"input_ids": ids.astype(np.int64), "position_ids": positions.astype(np.int64)}


def _compare(graphs: Exported, passes: Passes, length: int) -> dict[str, float]:
    """Compare every output, behind a prompt of a length and behind a canvas that follows it."""
    config, draw = passes.config, np.random.default_rng([SEED, length])
    canvas_length, vocab = config.canvas_length, config.vocab_size
    errors: dict[str, float] = {}

    def note(found: dict[str, float]) -> None:
        for name, figure in found.items():
            # Whatever is no number is the worst there is, and stays so.
            errors[name] = max(errors.get(name, 0.0), figure if np.isfinite(figure) else np.inf)

    cache, at = graphs.empty(1), 0
    slot = passes.open(length + canvas_length, canvas_length)
    for size in (length, canvas_length):  # the prompt, and a canvas behind it
        tokens = draw.integers(0, vocab, size).astype(np.int32)
        for start in range(0, size, passes.chunk):
            passes.read([(slot, tokens[start : start + passes.chunk])])
        cache, at = graphs.encode(cache, tokens[None], at), at + size
        note(_cache_errors(graphs, cache, passes.save(slot)))
        canvas = draw.integers(0, vocab, canvas_length).astype(np.int32)
        soft, logits = np.zeros((canvas_length, config.hidden_size), np.float32), None
        # Without a mean embedding, with one; some held; all accepted.
        for step, (bound, share) in enumerate(((BOUND, 0.0), (BOUND, 0.0), (BOUND, HELD), (np.inf, 0.0))):
            given = _draws(draw, canvas_length, vocab, bound, share)
            got = graphs.denoise(
                cache, canvas[None], at, soft_embedding=soft[None].astype(graphs.dtype), temperature=given.temperature,
                uniform=given.uniforms, noise=given.noise.astype(np.int64),
                entropy_bound=np.asarray([bound], np.float32), held=given.held.astype(np.int64),
            )  # fmt: skip
            want: dict[str, np.ndarray] = {}
            if "logits" in got:
                before = None if logits is None else logits / given.temperature
                logits = passes.logits(slot, canvas, before)
                want["logits"] = logits[None]
            result = passes.step([slot], given, {} if step else {slot: canvas})()
            canvas, soft = result.canvas[0], passes.soft(slot)
            want |= {
                "token": np.where(result.accepted, result.canvas, got["token"]), "argmax": result.argmax,
                "entropy": result.entropy, "accepted": result.accepted, "next_canvas": result.canvas,
                "next_soft_embedding": soft[None],
            }  # fmt: skip
            note({name: _error(name, got[name], array) for name, array in want.items()})
    passes.close(slot)
    return errors


def _draws(draw: np.random.Generator, length: int, vocab: int, bound: float, share: float) -> Draws:
    """Return a pass's draws, in which about a share of the positions is held."""
    tokens = draw.integers(0, vocab, (1, length)).astype(np.int32)
    return Draws(
        temperature=np.full((1, 1), TEMPERATURE, np.float32),
        uniforms=draw.random((1, length)).astype(np.float32),
        noise=draw.integers(0, vocab, (1, length)).astype(np.int32),
        entropy_bound=np.full((1, 1), bound),
        confidence=np.zeros(1),
        stability=np.zeros(1, np.int32),
        greedy=np.zeros((1, 1), bool),
        held=np.where(draw.random((1, length)) < share, tokens, -1).astype(np.int32),
    )


def _cache_errors(graphs: Exported, cache: dict[str, np.ndarray], snapshot: Snapshot) -> dict[str, float]:
    """Compare the caches: of the source's, a snapshot has the valid entries of each layer."""
    found = {}
    for one, kept in zip(graphs.about["layers"], snapshot.data, strict=True):
        for past, present, array in zip(one["past"], one["present"], kept, strict=True):
            found[present] = _error(present, cache[past], np.asarray(array))
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
