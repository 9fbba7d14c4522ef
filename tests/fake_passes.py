"""A backend without a model: slots that are counted, and canvases that follow from what their slot has read.

What the engine does with rows shows in its log and its books; a token that comes to another row, a draw too many or a
cache that was not whole shows in the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dgemma.core.config import ModelConfig, SamplerConfig
from dgemma.core.engine import Engine
from dgemma.core.errors import DgemmaError
from dgemma.core.events import Commit, Done, Draft
from dgemma.core.handle import Handle
from dgemma.core.parts import Draws
from dgemma.core.passes import Passes, Snapshot, Starts, StepResult
from dgemma.core.row import Request

CHUNK = 32
"""What a pass reads at most, in tests of who waits for whom."""


class FakePasses(Passes):
    """Reads, steps and snapshots that are written down in `log`; `room` slots at most."""

    name, device, dtype = "fake", "cpu", "float32"

    def __init__(
        self, config: ModelConfig, *, script: Sequence[np.ndarray] | None = None, steps: int = 3, room: int = 1 << 30,
        chunk: int = 512, lookahead: int = 0, joined: bool = False,
    ) -> None:  # fmt: skip
        """With a `script`, every row's canvases are these, int32 [L], each after `steps` passes."""
        self.config, self.script, self.steps, self.room = config, script, steps, room
        self.chunk, self.lookahead, self.joined = chunk, lookahead, joined
        self.log: list[tuple[str, Any]] = []
        self.held: dict[int, list[int]] = {}  # open slots: what they have read
        self.canvas: dict[int, tuple[int, int, int]] = {}  # of a slot: canvases, passes of the last, and what it is
        self.spoilt: set[int] = set()  # slots whose results are NaN
        self.kept = 0  # bytes of snapshots that were taken

    def fits(self, tokens: int, canvas: int, rows: int = 1) -> bool:
        if tokens > 1 << 20:
            raise DgemmaError("a cache larger than the machine")
        return len(self.held) + rows <= self.room

    def open(self, tokens: int, canvas: int, after: Snapshot | None = None) -> int:
        slot = next(i for i in range(len(self.held) + 1) if i not in self.held)
        self.held[slot] = list(after.data) if after else []
        self.canvas[slot] = (-1, 0, 0)
        self.log.append(("open", slot))
        return slot

    def close(self, slot: int) -> None:
        del self.held[slot], self.canvas[slot]
        self.spoilt.discard(slot)
        self.log.append(("close", slot))

    def read(self, rows: Sequence[tuple[int, np.ndarray]]) -> None:
        assert len({slot for slot, _ in rows}) == len(rows)
        for slot, tokens in rows:
            assert 0 < len(tokens) <= max(self.chunk, self.config.canvas_length)
            self.held[slot] += tokens.tolist()
        self.log.append(("read", {slot: len(tokens) for slot, tokens in rows}))

    def step(self, slots: Sequence[int], draws: Draws, starts: Starts) -> Callable[[], StepResult]:
        assert draws.noise.shape[0] == len(slots) == len(set(slots))
        self.log.append(("step", list(slots)))
        result = self._result(slots, draws, starts)
        return lambda: result

    def read_and_step(
        self, rows: Sequence[tuple[int, np.ndarray]], draws: Draws, starts: Starts
    ) -> Callable[[], StepResult]:
        assert len({len(tokens) for _, tokens in rows}) == 1
        self.read(rows)
        return self.step([slot for slot, _ in rows], draws, starts)

    def _result(self, slots: Sequence[int], draws: Draws, starts: Mapping[int, np.ndarray]) -> StepResult:
        """A canvas is a number that every pass mixes with what it is given: with all that was read, in order."""
        length, argmax, stop = draws.noise.shape[1], [], []
        for row, slot in enumerate(slots):
            index, step, value = self.canvas[slot]
            if slot in starts:
                assert len(starts[slot]) == length
                index, step, value = index + 1, 0, mixed(starts[slot])
            value = mixed([value, *self.held[slot], *draws.noise[row].tolist(), int(1e6 * draws.temperature[row, 0])])
            self.canvas[slot] = index, step + 1, value
            if self.script is not None:
                argmax.append(self.script[index])
                stop.append(step + 1 == self.steps)
            else:
                argmax.append(np.random.default_rng(value).integers(6, self.config.vocab_size, length, np.int32))
                stop.append(value % 3 == 0)
        entropy = np.array([np.full(length, np.nan if slot in self.spoilt else 1.0, np.float32) for slot in slots])
        return StepResult(
            canvas=np.stack(argmax), argmax=np.stack(argmax), accepted=np.ones((len(slots), length), bool),
            entropy=entropy, stop=np.array(stop),
        )  # fmt: skip

    def save(self, slot: int) -> Snapshot:
        self.kept += self.saved_bytes(slot)
        return Snapshot(length=len(self.held[slot]), nbytes=self.saved_bytes(slot), data=tuple(self.held[slot]))

    def saved_bytes(self, slot: int) -> int:
        return 8 * len(self.held[slot])

    def spare(self) -> int:
        return 0

    def soft(self, slot: int) -> np.ndarray:
        return np.zeros((self.config.canvas_length, self.config.hidden_size), np.float32)

    def logits(self, slot: int, canvas: np.ndarray, previous: np.ndarray | None = None) -> np.ndarray:
        raise NotImplementedError

    states = step_within = logits

    def head(self) -> Callable[[np.ndarray], np.ndarray]:
        raise NotImplementedError

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        raise NotImplementedError


def mixed(numbers: Any) -> int:
    """One number of many; Python's hash of integers is the same in every process."""
    return hash(tuple(int(x) for x in numbers)) % (1 << 62)


# ---- Requests ---------------------------------------------------------------------------------------------------


def request(prompt: int | tuple[int, ...] = 5, tokens: int = 40, *, seed: int = 0, **options: Any) -> Request:
    """A request of a prompt, or of one of so many tokens that no other seed has."""
    if isinstance(prompt, int):
        prompt = tuple(np.random.default_rng([seed, prompt]).integers(20, 200, prompt).tolist())
    sampler = SamplerConfig(**({"steps": 4, "schedule_steps": 4, "confidence": 0.0} | options.pop("sampler", {})))
    given: dict[str, Any] = dict(eos_token_ids=()) | options
    return Request(prompt=prompt, max_new_tokens=tokens, seed=seed, sampler=sampler, **given)


def answer(handle: Handle) -> tuple[list[int], list[int], Any]:
    """Tokens, the steps of each canvas, and why it ended."""
    tokens, steps = [], []
    for event in handle.events():
        if isinstance(event, Draft):
            steps.append(event.step)
        elif isinstance(event, Commit):
            tokens += event.tokens
        elif isinstance(event, Done):
            return tokens, steps, event.finish_reason
    return tokens, steps, None


def finish(engine: Engine) -> None:
    """Run all rounds, here."""
    while engine.step():
        pass


def alone(config: ModelConfig, one: Request) -> Any:
    return answer(Engine(FakePasses(config, chunk=CHUNK), None).add(one))


def reads(passes: FakePasses) -> list[dict[int, int]]:
    return [value for what, value in passes.log if what == "read"]
