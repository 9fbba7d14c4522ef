"""The seam between the engine and a backend: what the engine asks for, and how a backend that walks the graph does it.

    engine ──▶ Passes ──▶ model ──▶ ops

A backend is opened once and gives a `Passes`: a pool of slots, each the cache and the canvas of one row, and passes
over any of them. `GraphPasses` is one for every backend that walks through `model.py`; a runtime of its own, such as
ONNX Runtime, brings its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from . import memory
from .canvas import Chosen, Classes
from .config import ModelConfig
from .errors import DgemmaError
from .parts import Draws, Masses
from .primitives import DType

Starts = Mapping[int, np.ndarray]
"""By slot, the noise int32 [L] of canvases that begin with this pass."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StepResult:
    """What a denoising pass came to, on the host."""

    canvas: np.ndarray  # int32 [B, L]: what the next pass reads
    argmax: np.ndarray  # int32 [B, L]
    accepted: np.ndarray  # bool [B, L]
    entropy: np.ndarray  # [B, L], nats
    stop: np.ndarray  # bool [B]


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshot:
    """A copy of one slot's cache, from which other slots may go on."""

    length: int
    """Tokens read."""
    nbytes: int
    data: Any
    """The backend's own."""


class Scores(NamedTuple):
    """What a pass says at some positions, at temperature 1, on the host. Natural logs of shares of the vocabulary."""

    log_p: np.ndarray  # float32 [R, K]: of the tokens that were asked for
    entropy: np.ndarray  # float32 [R]: nats, of the whole distribution
    token: np.ndarray  # int32 [R]: the likeliest token of all
    top: np.ndarray  # float32 [R]: the log of its probability


class Passes(ABC):
    """One model on one backend. One thread at a time; `core.owner` sees to it."""

    name: ClassVar[str]
    config: ModelConfig
    device: str
    dtype: DType
    chunk: int = 512
    """Most tokens of one row that a pass reads: bounds what attention scores take, and how long others wait."""
    lookahead: int = 0
    """Denoising passes that may be started before the results of the one before are read."""
    joined: bool = False
    """Whether `read_and_step` costs less than its two halves, so that the engine should use it."""
    workers: ClassVar[str] = ""
    """The name of worker threads that belong to the thread which called them first. Models that name the same ones have
    one thread together, and it is inside of `among_workers`, not of `home`."""
    survives_fork: ClassVar[bool] = False
    """Whether a forked child can go on with a model that its parent loaded: not where the runtime keeps threads."""
    anywhere: ClassVar[bool] = True
    """Whether passes may run in another thread than `home`'s, which ends as the process exits."""

    checks: tuple[Callable[[], None], ...] = ()
    """Called before each request: they refuse weights from files that were written to since they were mapped."""

    @abstractmethod
    def fits(self, tokens: int, canvas: int, rows: int = 1) -> bool:
        """Whether so many more rows with room for `tokens` and a canvas can be opened now, beside those that are.

        Raises:
            DgemmaError: one alone could never be, with the numbers.
        """

    @abstractmethod
    def open(self, tokens: int, canvas: int, after: Snapshot | None = None) -> int:
        """Take a slot with room for so many tokens and a canvas of `canvas`; it begins empty, or after a snapshot."""

    def open_behind(self, prompt: Sequence[int], canvas: int) -> int:
        """Take a slot with room for a canvas of `canvas` behind a prompt, and read that into it.

        Raises:
            DgemmaError: as `fits`.
        """
        self.fits(len(prompt), canvas)
        slot = self.open(len(prompt), canvas)
        try:
            for at in range(0, len(prompt), self.chunk):
                self.read([(slot, np.asarray(prompt[at : at + self.chunk], np.int32))])
        except BaseException:
            self.close(slot)
            raise
        return slot

    @abstractmethod
    def close(self, slot: int) -> None:
        """Give a slot back."""

    @abstractmethod
    def read(self, rows: Sequence[tuple[int, np.ndarray]]) -> None:
        """Append tokens, int32 [C], to slots' caches; each row its own number, at most `chunk` or a canvas."""

    @abstractmethod
    def step(self, slots: Sequence[int], draws: Draws, starts: Starts) -> Callable[[], StepResult]:
        """Run a denoising pass over the canvases of some slots, all of one length; draws are NumPy arrays.

        What comes back waits for the results and returns them as they are now; later passes may be started before.
        """

    @abstractmethod
    def read_and_step(
        self, rows: Sequence[tuple[int, np.ndarray]], draws: Draws, starts: Starts
    ) -> Callable[[], StepResult]:
        """`read`, and behind what was read a first `step`, in one pass where the backend can: tokens int32 [C], all of
        one length."""

    @abstractmethod
    def step_within(
        self, slots: Sequence[int], draws: Draws, starts: Starts, classes: Classes, choose: Callable[[Masses], Chosen]
    ) -> StepResult:
        """Run a denoising pass whose tokens are chosen on the host: `step`, finished when it returns.

        `choose` gets the pass's masses, float32 [B, L, C], and returns a `Chosen` of [B, L].
        """

    def scores(
        self, slots: Sequence[int], canvases: np.ndarray, at: Sequence[tuple[int, int]], tokens: np.ndarray
    ) -> Scores:
        """Run one pass over a canvas behind each slot's cache, as `logits`, and say how likely tokens are.

        slots: different ones; canvases int32 [B, L]; at: R pairs of a row and its position; tokens int32 [K].
        """
        logits = [self.logits(slot, canvas) for slot, canvas in zip(slots, canvases, strict=True)]
        found = np.stack([logits[row][position] for row, position in at]).astype(np.float64)
        logs = found - found.max(-1, keepdims=True)
        logs -= np.log(np.exp(logs).sum(-1, keepdims=True))
        token = logs.argmax(-1)
        entropy, top = -(np.exp(logs) * logs).sum(-1), np.take_along_axis(logs, token[:, None], 1)[:, 0]
        log_p, entropy, top = (one.astype(np.float32) for one in (logs[:, tokens], entropy, top))
        return Scores(log_p, entropy, token.astype(np.int32), top)

    @abstractmethod
    def soft(self, slot: int) -> np.ndarray:
        """Return the mean embedding [L, D] that a slot's last pass left for the next one."""

    @abstractmethod
    def logits(self, slot: int, canvas: np.ndarray, previous: np.ndarray | None = None) -> np.ndarray:
        """Run one denoising pass behind a slot's cache: canvas int32 [L] → float32 [L, V], soft-capped.

        `previous` are the processed logits [L, V] of the pass before.
        """

    @abstractmethod
    def states(self, slot: int, canvas: np.ndarray, previous: np.ndarray | None = None) -> np.ndarray:
        """Return what such a pass ends with before its head, float32 [L, D]; arguments as `logits`."""

    @abstractmethod
    def head(self) -> Callable[[np.ndarray], np.ndarray]:
        """Return what makes logits, float32 [L, V], of states, float32 [L, D].

        It keeps the embedding table, and nothing else of the model.
        """

    @abstractmethod
    def embed(self, tokens: np.ndarray) -> np.ndarray:
        """Return rows of the embedding table, unscaled: tokens int32 [C] → [C, D]."""

    @abstractmethod
    def save(self, slot: int) -> Snapshot:
        """Copy a slot's cache."""

    @abstractmethod
    def saved_bytes(self, slot: int) -> int:
        """Return what such a copy takes."""

    def spare(self) -> int:
        """Return the bytes that snapshots may take where nobody says."""
        return memory.total() // 32

    def wait(self) -> None:  # noqa: B027 - an eager backend has nothing to wait for
        """Wait until all that was started is computed."""

    def peak(self) -> int | None:
        """Return the peak bytes held on the accelerator, or None where the process's own peak says it."""
        return None

    @staticmethod
    def among_workers() -> AbstractContextManager[None]:
        """What the thread of `workers` is inside of; it holds no model."""
        return nullcontext()

    def home(self) -> AbstractContextManager[None]:
        """What the thread that runs passes is inside of."""
        return nullcontext()

    @contextmanager
    def guarded(self, doing: str) -> Iterator[None]:
        """Within, running out of memory releases what was taken and is a DgemmaError that says what would fit."""
        try:
            yield
        except MemoryError:
            raise DgemmaError(f"out of memory while {doing}; take a shorter context or a smaller model") from None
