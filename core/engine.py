"""The host loop: prompt in, events out. It knows the graph's functions and no backend.

read the prompt ──▶ denoise a canvas ──▶ commit its argmax ──▶ encode it ──▶ next canvas …
                      (≤ steps passes)       (cut, decode)       (never the last)

Joined, a canvas is encoded in the pass that takes the next one's first step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..text.tokens import Decoder, Tokenizer, split_at_end
from . import reference
from . import sampler as sampling
from .config import SamplerConfig
from .errors import DgemmaError
from .events import Commit, Done, Draft, Event, FinishReason, Prefill, Stats
from .finite import check_results
from .memory import check_room, peak_memory
from .model import Cache, Model, encode, encode_and_step, new_cache, step
from .ops import NUMPY_DTYPES, Array, Ops
from .random import step_noise
from .turns import Stream, Turns


@dataclass(frozen=True, kw_only=True)
class Request:
    """One generation, checked and with every default filled in."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    seed: int
    sampler: SamplerConfig
    eos_token_ids: tuple[int, ...]
    stop: tuple[str, ...] = ()


@dataclass(kw_only=True)
class _Clock:
    """Counters of one generation."""

    began: float = field(default_factory=time.perf_counter)
    away: float = 0.0
    """Seconds between the turns: the reader of the events had them, or another generation the model."""
    prefill: float = 0.0
    first_draft: float | None = None
    first_text: float | None = None
    steps: int = 0
    canvases: int = 0
    encodes: int = 0

    def now(self) -> float:
        return time.perf_counter() - self.began - self.away


class Engine:
    """Generates with one model on one backend: any number of generations, whose passes take turns (`core.turns`)."""

    def __init__(self, ops: Ops, model: Model, tokenizer: Tokenizer | None) -> None:
        self.ops = ops
        self.model = model
        self.tokenizer = tokenizer
        self.turns = Turns(ops)
        self._passes: dict[Callable[..., Any], Callable[..., Any]] = {}
        self._encoder: Callable[..., Cache] | None = None

    def check(self, request: Request) -> None:
        """Refuse a request that cannot be run.

        Raises:
            DgemmaError: the prompt is empty, longer than the model's context, or holds an id that does not exist.
        """
        config = self.model.config
        check_tokens(request.prompt, config.vocab_size, config.image_token_ids)
        if len(request.prompt) >= config.max_positions:
            raise DgemmaError(
                f"the prompt has {len(request.prompt):,} tokens and the model's context is {config.max_positions:,}; "
                "shorten the prompt"
            )

    def generate(self, request: Request) -> Stream:
        """Return the events of a checked request until `Done`; closing or dropping them early leaves nothing behind."""
        clock = _Clock()
        return Stream(self.turns, self._write(request, clock), self._absent(clock))

    def _absent(self, clock: _Clock) -> Callable[[float], None]:
        def count(seconds: float) -> None:
            if not self.ops.lookahead:  # where passes run on beside the reader, its time is theirs too
                clock.away += seconds

        return count

    def _write(self, request: Request, clock: _Clock) -> Iterator[Event]:
        config = self.model.config
        budget = min(request.max_new_tokens, config.max_positions - len(request.prompt))
        canvases = -(-budget // config.canvas_length)
        decoder = Decoder(self.tokenizer, request.stop, request.prompt)
        # The last canvas is never encoded, so the cache has no room for it.
        kept = len(request.prompt) + (canvases - 1) * config.canvas_length
        cache = yield from self._prefill(request.prompt, kept, clock, config.canvas_length)
        reason: FinishReason = "length"
        begun: sampling.StepState | None = None  # the canvas after its first pass, where that has read the one before
        for index in range(canvases):
            argmax = yield from self._denoise(cache, request, index, clock, begun)
            tokens, ended = split_at_end(argmax.tolist(), request.eos_token_ids)
            left = budget - index * config.canvas_length
            ended = ended and len(tokens) <= left
            last = ended or left <= config.canvas_length
            if self.ops.lookahead and not last:  # on its way before the text is looked at, and in vain if that ends it
                cache, begun = self._commit(cache, request, index, argmax[None])
            piece = decoder.push(tokens[:left], last=last)
            if clock.first_text is None and (piece.text or piece.thinking):
                clock.first_text = clock.now()
            yield Commit(canvas=index, tokens=piece.tokens, text=piece.text, thinking=piece.thinking)
            if ended or piece.stopped:
                reason = "stop"
            if last or piece.stopped:
                break
            if not self.ops.lookahead:
                cache, begun = self._commit(cache, request, index, argmax[None])
            clock.encodes += 1
        yield Done(finish_reason=reason, stats=self._stats(request, decoder, clock))

    def prefill(self, prompt: Sequence[int], canvas_length: int) -> Cache:
        """Read a prompt into a new cache with room for one canvas to be denoised."""
        reading = self._prefill(prompt, len(prompt), _Clock(), canvas_length)
        while True:
            try:
                next(reading)
            except StopIteration as end:
                return end.value

    def mean_embedding(self, scores: Array) -> Array:
        """Return what self-conditioning reads of the step before: processed logits wide [B, L, V] → [B, L, D]."""
        return self.ops.mean_embedding(reference.softmax(self.ops, scores), self.model.embed_tokens)

    def _prefill(
        self, prompt: Sequence[int], capacity: int, clock: _Clock, canvas_length: int
    ) -> Generator[Event, None, Cache]:
        ops = self.ops
        if ops.encode_sizes:  # a shorter rest is padded to one of them
            chunk = ops.encode_sizes[-1]
            scratch = max(canvas_length, chunk)
        else:
            chunk = max(ops.prefill_chunk, canvas_length)
            scratch = max(canvas_length, min(chunk, len(prompt)))
        if ops.joined:
            scratch = max(scratch, 2 * canvas_length)
        if ops.reserves_cache:
            check_room(self.model.config, capacity, scratch, np.dtype(NUMPY_DTYPES[ops.dtype]).itemsize)
        cache = new_cache(ops, self.model.config, batch=1, capacity=capacity, chunk=scratch)
        ids = np.asarray(prompt, np.int32)[None]
        yield Prefill(done=0, total=len(prompt))
        for at in range(0, len(prompt), chunk):
            cache = self._encode(cache, ids[:, at : at + chunk])
            ops.synchronize(*(array for layer in cache.layers for array in layer))
            clock.encodes += 1
            clock.prefill = clock.now()
            yield Prefill(done=min(at + chunk, len(prompt)), total=len(prompt))
        return cache

    def _encode(self, cache: Cache, tokens: np.ndarray) -> Cache:
        """Read tokens int32 [1, L], compiled where the backend asks for it."""
        ops, length = self.ops, tokens.shape[1]
        size = next((size for size in ops.encode_sizes if size >= length), None)
        if size is None:
            return encode(ops, self.model, cache, ops.asarray(tokens, "int32"))
        if self._encoder is None:

            def run(cache: Cache, tokens: Array, fresh: Array) -> Cache:
                return encode(ops, self.model, cache, tokens, fresh)

            self._encoder = ops.compile(run)
        padded = np.zeros((1, size), np.int32)
        padded[:, :length] = tokens
        before = int(cache.length)
        after = self._encoder(Cache(cache.layers, ops.extent(before)), ops.asarray(padded), ops.extent(length))
        return Cache(after.layers, before + length)

    def _commit(
        self, cache: Cache, request: Request, index: int, tokens: np.ndarray
    ) -> tuple[Cache, sampling.StepState | None]:
        """Read a finished canvas, int32 [1, L]; joined, also return the next one's state after its first pass."""
        ops = self.ops
        if not ops.joined:
            return self._encode(cache, tokens), None
        before = int(cache.length)
        given = ops.asarray(tokens, "int32"), self._start(request, index + 1), *self._draws(request, index + 1, 0)
        if ops.encode_sizes:  # compiled where encode passes are
            rules = ops.thresholds(request.sampler)
            after, state = self._compiled(encode_and_step)(rules, Cache(cache.layers, ops.extent(before)), *given)
        else:
            after, state = encode_and_step(ops, self.model, request.sampler, cache, *given)
        return Cache(after.layers, before + tokens.shape[1]), self._settled(request, state, given[-1])

    def _denoise(
        self, cache: Cache, request: Request, index: int, clock: _Clock, opened: sampling.StepState | None = None
    ) -> Generator[Event, None, np.ndarray]:
        """Yield a `Draft` for each pass over one canvas; return the argmax canvas, int32 [L].

        `opened` is the state after the first pass, where that has run already.
        """
        ops, sampler = self.ops, request.sampler
        run, rules = self._compiled(step), ops.thresholds(sampler)
        cache = Cache(cache.layers, ops.extent(int(cache.length)))
        state = opened or self._start(request, index)
        reads: deque[Callable[[], list[np.ndarray]]] = deque()
        argmax = np.zeros(0, np.int32)
        clock.canvases += 1
        begun = 0
        for begun in range(sampler.steps + ops.lookahead):
            if begun < sampler.steps:
                if begun or opened is None:
                    draws = self._draws(request, index, begun)
                    state = self._settled(request, run(rules, cache, state, *draws), draws[-1])
                reads.append(ops.fetch(state.argmax, state.accepted, state.entropy, state.stop))
            if begun < ops.lookahead:
                continue
            argmax, accepted, entropy, stop = (x[0] for x in reads.popleft()())
            check_results(entropy, ops.dtype)
            clock.steps += 1
            clock.first_draft = clock.first_draft or clock.now()
            yield Draft(
                canvas=index,
                step=begun - ops.lookahead,
                steps=sampler.steps,
                tokens=argmax,
                accepted=accepted,
                entropy=entropy.astype(np.float32),
            )
            if stop:  # what has begun since is never read
                break
        if begun == ops.lookahead:  # no second pass has shown what an infinite row of the table does, capped in logits
            check_results(ops.to_numpy(state.soft), ops.dtype)
        return argmax

    def _start(self, request: Request, index: int) -> sampling.StepState:
        return sampling.start(self.ops, self._noise(request.seed, index, 0)[1], self.model.config.hidden_size)

    def _draws(self, request: Request, index: int, begun: int) -> tuple[Array, Array, Array]:
        """Return what a pass is given besides the canvas: temperature, uniforms, noise."""
        temperature = np.full((1, 1), request.sampler.temperature(begun), np.float32)
        return self.ops.asarray(temperature), *self._noise(request.seed, index, begun + 1)

    def _settled(self, request: Request, state: sampling.StepState, noise: Array) -> sampling.StepState:
        """Return the state after a pass with this noise as the next one is to read it."""
        return sampling.settle(self.ops, state, noise) if request.sampler.greedy else state

    def _noise(self, seed: int, canvas: int, index: int) -> tuple[Array, Array]:
        config = self.model.config
        uniforms, tokens = step_noise(
            seed=seed, canvas=canvas, step=index, length=config.canvas_length, vocab_size=config.vocab_size
        )
        return self.ops.asarray(uniforms[None]), self.ops.asarray(tokens[None])

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `step` or `encode_and_step`, compiled, as a function of what comes behind ops and model."""
        if function not in self._passes:

            def run(*arguments: Any) -> Any:
                return function(self.ops, self.model, *arguments)

            self._passes[function] = self.ops.compile(run)
        return self._passes[function]

    def _stats(self, request: Request, decoder: Decoder, clock: _Clock) -> Stats:
        return Stats(
            prompt_tokens=len(request.prompt),
            emitted_tokens=decoder.released,
            canvases=clock.canvases,
            steps=clock.steps,
            encode_passes=clock.encodes,
            seconds=clock.now(),
            prefill_seconds=clock.prefill,
            first_draft_seconds=clock.first_draft,
            first_text_seconds=clock.first_text,
            peak_memory_bytes=self.ops.memory() or peak_memory(),
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
