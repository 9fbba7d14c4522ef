"""What the engine yields while it writes, and what it returns when it has written."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

FinishReason = Literal["stop", "length"]
"""`stop`: an end-of-sequence token or a stop string. `length`: the token budget or the model's context ran out."""


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Honest figures of one generation; rates are per second of wall time, None where nothing was measured.

    Time counts from when the request has a slot; what the reader of its events does meanwhile is beside it.
    """

    prompt_tokens: int
    cached_tokens: int = 0
    """Tokens of the prompt that were in the cache of an earlier request and were not read again."""
    emitted_tokens: int
    """Tokens in the result: what was cut, end-of-sequence included, does not count."""
    canvases: int
    steps: int
    """Denoising passes."""
    encode_passes: int
    """Passes that read the prompt or a finished canvas into the cache."""
    seconds: float
    prefill_seconds: float
    first_draft_seconds: float | None
    first_text_seconds: float | None
    log_accept: float | None = None
    """With a constraint: the log of the probability that each canvas's last pass gave to its language, summed."""
    peak_memory_bytes: int
    """On an accelerator what the framework held there at most; otherwise the process's own peak."""

    @property
    def steps_per_canvas(self) -> float | None:
        return self.steps / self.canvases if self.canvases else None

    @property
    def tokens_per_forward(self) -> float | None:
        """Emitted tokens per denoising pass."""
        return self.emitted_tokens / self.steps if self.steps else None

    @property
    def tokens_per_second(self) -> float | None:
        """Emitted tokens per second after the prefill."""
        rest = self.seconds - self.prefill_seconds
        return self.emitted_tokens / rest if rest > 0 else None

    @property
    def prefill_tokens_per_second(self) -> float | None:
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds > 0 else None

    def to_dict(self) -> dict[str, Any]:
        derived = ("steps_per_canvas", "tokens_per_forward", "tokens_per_second", "prefill_tokens_per_second")
        return asdict(self) | {name: getattr(self, name) for name in derived}


@dataclass(frozen=True, kw_only=True)
class Prefill:
    """Prompt tokens read so far."""

    done: int
    total: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Draft:
    """The canvas after one denoising pass."""

    canvas: int
    """Index of the canvas, from 0."""
    step: int
    """Index of the pass in this canvas, from 0."""
    steps: int
    """The cap on passes; the canvas may stop earlier."""
    tokens: np.ndarray
    """int32 [L], the argmax canvas: what would be committed now."""
    accepted: np.ndarray
    """bool [L], positions within the entropy bound; the others start the next pass as noise."""
    entropy: np.ndarray
    """float32 [L], nats."""
    following: np.ndarray | None = None
    """int32 [L], what the next pass reads: accepted tokens as they were drawn, noise everywhere else."""
    held: np.ndarray | None = None
    """bool [L], positions that keep a token which was given; None where there are none."""
    log_accept: float | None = None
    """With a constraint: the log of the probability that this pass gave to its language."""


@dataclass(frozen=True, kw_only=True)
class Commit:
    """Tokens that are final now, end-of-sequence and everything beyond the cut left out."""

    canvas: int
    tokens: tuple[int, ...]
    text: str
    """What they add to the answer. Text that may still turn out to be a stop string comes with a later commit."""
    thinking: str
    """What they add to the thinking channel."""


@dataclass(frozen=True, kw_only=True)
class Done:
    finish_reason: FinishReason
    stats: Stats


Event = Prefill | Draft | Commit | Done


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A finished text."""

    text: str
    """The answer, without special tokens and without the thinking channel."""
    thinking: str
    """The thinking channel, empty where there was none."""
    token_ids: tuple[int, ...]
    """Everything emitted, thinking included; without the end-of-sequence token, never more than asked for.

    An empty answer that ended by itself has no tokens and `stop`: the model had nothing to say.
    """
    finish_reason: FinishReason
    stats: Stats
    parsed: Any = None
    """With a schema: what the text says, an object of the class that was given as one."""

    def __repr__(self) -> str:
        head = self.text if len(self.text) <= 60 else f"{self.text[:57]}..."
        thought = f", thinking {len(self.thinking):,} characters" if self.thinking else ""
        return f"<Generation {head!r}: {len(self.token_ids):,} tokens, {self.finish_reason}{thought}>"
