"""One request on its way through the engine: what it asks for, how far it is, and what it has told its reader."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Literal

import numpy as np

from .canvas import FREE, Channel, Chosen, Constraint, Plan, Walk, part
from .config import ModelConfig, SamplerConfig
from .errors import DgemmaError
from .events import Commit, Done, Draft, Event, FinishReason, Prefill, Stats
from .finite import check_results
from .parts import Draws, Masses
from .passes import Snapshot, StepResult
from .primitives import DType
from .random import step_noise
from .sampler import draws_of
from .tokens import Decoder, Vocabulary, split_at_end

Stage = Literal["waiting", "reading", "denoising", "over"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One generation, checked and with every default filled in."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    seed: int
    sampler: SamplerConfig
    eos_token_ids: tuple[int, ...]
    stop: tuple[str, ...] = ()
    canvas_length: int | None = None
    """Positions that are denoised at once; None is the checkpoint's."""
    fit: bool = False
    """Whether the last canvas shrinks to the smallest of `SHORT` that holds what is left of the budget."""
    drafts: bool = True
    """Whether its reader wants a `Draft` for each pass."""
    held: tuple[int, ...] = ()
    """Tokens that positions of the answer keep, from its first on; `FREE` where one is free, as all beyond the end."""
    init: tuple[int, ...] = ()
    """Tokens of a draft that canvases start from, likewise; `FREE` is noise."""
    strength: float = 1.0
    """How much of the draft is lost: with this probability a token is noise. 0 holds all of it, 1 forgets it."""
    constraint: Constraint | None = None
    thinking_budget: int | None = None
    """Tokens after which the thinking channel is closed."""


SHORT = (16, 32, 64, 128, 256)
"""Lengths that a canvas shrinks to: few, because each is compiled."""


@dataclass(kw_only=True, eq=False)
class Share:
    """What rows of one prompt have together: its cache, once one of them has read it."""

    snapshot: Snapshot | None = None


@dataclass(kw_only=True)
class _Clock:
    """Counters of one generation; seconds since it had a slot."""

    began: float = field(default_factory=time.perf_counter)
    prefill: float = 0.0
    first_draft: float | None = None
    first_text: float | None = None
    steps: int = 0
    canvases: int = 0
    encodes: int = 0
    cached: int = 0

    def now(self) -> float:
        return time.perf_counter() - self.began


class Row:
    """A request's state in the engine. The owner thread alone touches it, but for `events` and `cancelled`."""

    def __init__(
        self, request: Request, config: ModelConfig, tokenizer: Vocabulary | None, peak: Callable[[], int],
        share: Share | None = None,
    ) -> None:  # fmt: skip
        """`peak` tells the bytes of memory held at most; `share` is what rows of one prompt have together."""
        self.request, self.config, self.share = request, config, share
        self._peak = peak
        self.events: SimpleQueue[Event | BaseException | None] = SimpleQueue()
        self.cancelled = self.finished = False
        self.stage: Stage = "waiting"
        self.slot = -1
        self.clock = _Clock()
        self.read = 0
        """Tokens of `tokens` that the cache holds."""
        self.tokens = list(request.prompt)
        """All that the cache is to hold: the prompt, and finished canvases."""
        self.index = self.begun = 0
        """The canvas, and how many of its passes were started."""
        self.served = 0
        """The engine's round since which it waits to read its prompt."""
        self.left = min(request.max_new_tokens, config.max_positions - len(request.prompt))
        self._draft: np.ndarray | None = None
        """The newest argmax canvas that was seen, int32 [L]."""
        self._log_accept: float | None = None
        self.decoder = Decoder(tokenizer, request.stop, request.prompt)
        self._usual = request.canvas_length or config.canvas_length
        self.length = self._next_length()
        self.plan = Plan(request.held, request.init, request.strength, self._channel(), inside=self.decoder.inside)
        self.walk: Walk | None = None
        if request.constraint is not None:
            held = part(self.plan.fixed, 0, self.left)
            begin = partial(request.constraint.begin, budget=self.left, canvas_length=self._usual)
            self.walk, end = begin(held=held), self.plan.end
            closes = end is not None and end.budget < self.left and held[end.budget] == FREE
            if end is not None and closes and request.constraint.classes.of[end.closes] >= 0:
                held[end.budget] = end.closes  # where thinking takes all of its budget, an answer has to fit behind it
                try:
                    begin(held=held)
                except DgemmaError as error:
                    raise DgemmaError(f"thinking_budget is {end.budget}, and with its end there {error}") from None
        # The last canvas is never read, so the cache has no room for it.
        self.capacity = len(request.prompt) + (-(-self.left // self._usual) - 1) * self._usual

    @property
    def coming(self) -> np.ndarray:
        """What is to be read, int32."""
        return np.asarray(self.tokens[self.read :], np.int32)

    @property
    def classes(self) -> str:
        """Which classes of tokens its passes look at."""
        return self.request.constraint.classes.key if self.request.constraint else ""

    @property
    def prompted(self) -> bool:
        """Whether the prompt has been read."""
        return self.read >= len(self.request.prompt)

    # ---- Passes -----------------------------------------------------------------------------------------------

    def opened(self, slot: int, cached: int) -> None:
        """It has a slot, whose cache holds so many tokens already."""
        self.slot, self.read, self.stage = slot, cached, "reading"
        self.clock = _Clock(cached=cached)
        self.tell(Prefill(done=cached, total=len(self.request.prompt)))
        if not len(self.coming):
            self.stage = "denoising"

    def has_read(self, count: int) -> None:
        """A pass has read so many tokens more."""
        prompt = not self.prompted
        self.read += count
        self.clock.encodes += 1
        if prompt:
            self.clock.prefill = self.clock.now()
            self.tell(Prefill(done=self.read, total=len(self.request.prompt)))
        if self.read == len(self.tokens):
            self.stage = "denoising"

    def start(self) -> np.ndarray | None:
        """Return what a canvas that begins with the next pass starts from."""
        if self.begun:
            return None
        uniforms, noise = step_noise(
            seed=self.request.seed, canvas=self.index, step=0, length=self.length, vocab_size=self.config.vocab_size
        )
        return self.plan.canvas(noise, uniforms)

    @property
    def watches(self) -> bool:
        """Whether what its next pass is given depends on what the last one came to, which then has to be seen first."""
        return self.walk is not None or self.plan.watches(self.length)

    def settled(self) -> np.ndarray | None:
        """Return the canvas that has not begun, int32 [L], if it is all held: it is finished without a pass."""
        return None if self.begun else self.plan.settled(self.length, self.left)

    def draws(self) -> Draws:
        """Return what the next pass is given, and count it."""
        self.begun += 1
        sampler = self.request.sampler
        return draws_of(
            sampler, seed=self.request.seed, canvas=self.index, step=self.begun - 1, length=self.length,
            vocab_size=self.config.vocab_size, held=self.plan.hold(self.length, self._draft),
            skipped=self.plan.skipped(sampler.schedule_steps),
        )  # fmt: skip

    def drafted(self, step: int, result: StepResult, row: int, dtype: DType) -> bool:
        """Take a pass's result; return whether the canvas is finished.

        Raises:
            DgemmaError: it came to NaN or infinity.
        """
        check_results(result.entropy[row], dtype)
        clock, steps = self.clock, self.request.sampler.steps
        last, draft = step + 1 == steps, result.argmax[row]
        if last:
            held = self.plan.closed(step, np.full(self.length, FREE, np.int32), draft)
            draft = np.where(held == FREE, draft, held)
        self._draft = draft
        log_accept = self.walk.log_accept if self.walk else None
        clock.steps += 1
        clock.first_draft = clock.first_draft or clock.now()
        if self.request.drafts:
            self.tell(
                Draft(
                    canvas=self.index,
                    step=step,
                    steps=steps,
                    tokens=draft,
                    accepted=result.accepted[row],
                    entropy=result.entropy[row].astype(np.float32),
                    following=result.canvas[row],
                    held=self.plan.held_in(step),
                    log_accept=log_accept,
                )
            )
        stop = bool(result.stop[row]) and self.plan.settles(step, draft)
        if log_accept is not None and (stop or last):
            self._log_accept = (self._log_accept or 0.0) + log_accept
        return stop or last

    def choose(self, masses: Masses, *, uniforms: np.ndarray, held: np.ndarray, bound: float, greedy: bool) -> Chosen:
        """Let its walk choose in the pass that was begun last, masses [L, C] and held int32 [L]; once more, with the
        channel closed, where the last pass of a canvas opens it."""
        assert self.walk is not None
        choose = partial(self.walk.choose, masses, uniforms=uniforms, bound=bound, greedy=greedy)
        chosen = choose(held=held)
        if self.begun < self.request.sampler.steps:
            return chosen
        closed = self.plan.closed(self.begun - 1, held, chosen.argmax)
        return chosen if closed is held else choose(held=closed)

    @property
    def newest(self) -> np.ndarray:
        """The newest draft that was seen, int32 [L]: what is committed if its canvas is finished."""
        assert self._draft is not None
        return self._draft

    # ---- Canvases ---------------------------------------------------------------------------------------------

    def ends_with(self, argmax: np.ndarray) -> bool:
        """Whether nothing follows a finished canvas, as far as its tokens say."""
        tokens, ended = split_at_end(argmax.tolist(), self.request.eos_token_ids)
        return (ended and len(tokens) <= self.left) or self.left <= self.length

    def commit(self, argmax: np.ndarray) -> None:
        """Say what a finished canvas, int32 [L], adds; then the next one's turn has come, or the end."""
        tokens, ended = split_at_end(argmax.tolist(), self.request.eos_token_ids)
        ended = ended and len(tokens) <= self.left
        last = ended or self.left <= self.length
        piece = self.decoder.push(tokens[: self.left], last=last)
        self.clock.canvases += 1
        if self.clock.first_text is None and (piece.text or piece.thinking):
            self.clock.first_text = self.clock.now()
        self.tell(Commit(canvas=self.index, tokens=piece.tokens, text=piece.text, thinking=piece.thinking))
        if last or piece.stopped:
            self.finish("stop" if ended or piece.stopped else "length")
            return
        self.left -= self.length
        self.tokens += argmax.tolist()
        self.plan.commit(argmax)
        self._draft = None
        if self.walk is not None:
            self.walk.commit(argmax)
        self.index, self.begun, self.stage = self.index + 1, 0, "reading"
        self.length = self._next_length()

    def _channel(self) -> Channel | None:
        """Return what closes the thinking channel, where that has a budget.

        Raises:
            DgemmaError: the tokenizer has no such channel.
        """
        budget, marks = self.request.thinking_budget, self.decoder.channel
        if budget is None:
            return None
        if marks is None:
            raise DgemmaError("thinking_budget: the checkpoint's tokenizer has no thinking channel; leave it out")
        return Channel(opens=marks[0], closes=marks[1], budget=budget)

    def _next_length(self) -> int:
        if not self.request.fit:
            return self._usual
        return next((size for size in SHORT if self.left <= size < self._usual), self._usual)

    # ---- Telling ----------------------------------------------------------------------------------------------

    def tell(self, event: Event) -> None:
        self.events.put(event)

    def finish(self, reason: FinishReason) -> None:
        self.stage, self.finished = "over", True
        self.tell(Done(finish_reason=reason, stats=self._stats()))

    def fail(self, error: BaseException) -> None:
        """End it with an error, which its reader gets."""
        self.stage = "over"
        self.events.put(error)

    def _stats(self) -> Stats:
        clock = self.clock
        return Stats(
            prompt_tokens=len(self.request.prompt),
            cached_tokens=clock.cached,
            emitted_tokens=self.decoder.released,
            canvases=clock.canvases,
            steps=clock.steps,
            encode_passes=clock.encodes,
            seconds=clock.now(),
            prefill_seconds=clock.prefill,
            first_draft_seconds=clock.first_draft,
            first_text_seconds=clock.first_text,
            log_accept=self._log_accept,
            peak_memory_bytes=self._peak(),
        )


def check_tokens(ids: Sequence[int], vocab_size: int, images: Sequence[int] = (), *, what: str = "the prompt") -> None:
    """Refuse token ids that the model cannot read.

    Raises:
        DgemmaError: no ids at all, one that is not an integer in [0, vocab_size), or an image's placeholder.
    """
    if not len(ids):
        raise DgemmaError(f"{what} is empty")
    bad = next((i for i in ids if not 0 <= i < vocab_size), None)
    if bad is not None:
        raise DgemmaError(f"{what} holds token id {bad}; the vocabulary has ids from 0 to {vocab_size - 1}")
    if any(i in images for i in ids):
        raise DgemmaError(f"{what} holds an image token; this version reads text only")
