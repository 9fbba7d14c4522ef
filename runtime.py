"""The public face: load a checkpoint, ask it for text."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from .checkpoints import weights
from .checkpoints.checkpoint import Checkpoint, resolve
from .core import finite
from .core.config import GenerationConfig, ModelConfig
from .core.engine import Engine, Request, check_tokens
from .core.errors import DgemmaError, quoted
from .core.events import Commit, Done, Event, Generation
from .core.given import check_call, check_flags, figure, ids_of, integer
from .core.sampler import settings
from .text.tokens import Message, Tokenizer

if TYPE_CHECKING:
    from .core.ops import DType

Prompt = str | Sequence[Message] | Sequence[int]

FLOAT32_LIMIT = 2 << 30
"""Bytes of weights in float32; see `auto_dtype`."""

NATIVE_LIMIT = 16 << 20
"""The same where it is known what the processor multiplies. On two cores with AVX512_BF16 a pass in bfloat16 takes 1.15
times float32's time with 2 million parameters, 0.85 with 6, 0.67 with 27 and 0.55 with 108."""


def auto_dtype(
    config: ModelConfig, stored: DType, backend: str = "", native: Callable[[], Sequence[DType] | None] = lambda: None
) -> DType:  # fmt: skip
    """Return what `dtype="auto"` computes in: float32 for a small model, the width it is stored in for a larger one.

    `native` is asked for the low precisions that the processor multiplies faster than float32, `backends.native`; in
    any other the model computes in float32, and its weights stay as they are stored. It returns None where that is not
    known. ONNX Runtime multiplies bfloat16 nowhere but on CUDA: there it is float32 again.
    """
    size = 4 * sum(math.prod(shape) for shape in weights.shapes(config).values())
    if backend == "onnx" and stored == "bfloat16":
        return "float32"
    known = native() if size > NATIVE_LIMIT else None
    if known is not None:
        return stored if stored in known else "float32"
    return "float32" if size <= FLOAT32_LIMIT else stored


def load(
    name: str | Path = "nano",
    *,
    backend: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DiffusionGemma:
    """Load a checkpoint.

    The model serves any number of generations, in any threads; they take turns, see `DiffusionGemma.stream`. A forked
    child cannot go on with it, but for the numpy backend, and is told so: it loads its own, or is started by `spawn`.
    Files above 256 MiB stay mapped on torch's CPU, onnx and numpy: leave them as they are while the model is in use
    (replacing one by another of its name is safe). One that was written to is refused by the next generation.

    Args:
        name: `nano` (shipped with the package), a folder, or a Hugging Face hub id.
        backend: `auto`, `mlx`, `torch`, `onnx` or `numpy`; `auto` is mlx on Apple silicon and torch elsewhere.
        device: `auto`, `cpu`, `cuda`, `cuda:N` (torch, onnx) or `gpu` (mlx).
        dtype: `auto`, `float32`, `bfloat16` or `float16`: what weights act as, activations and the cache. `auto` is
            float32 for small models (2 GiB of weights in float32) and the width the checkpoint is stored in for larger
            ones. On torch's CPU it follows the processor: the width that is stored where that is multiplied natively
            and the model is larger than 4 million parameters, else float32. `dgemma doctor` says which.
        revision: branch, tag or commit, of a hub id.
        progress: called with bytes done and in all while weights are brought to the device.

    Raises:
        DgemmaError: anything wrong with the name, the files or the options, in one line.
    """
    from . import backends

    for option, value in {"backend": backend, "device": device, "dtype": dtype}.items():
        if not isinstance(value, str):
            raise DgemmaError(f"{option} is {quoted(value)}, expected a name such as 'auto'")
    check_call(progress)
    chosen = backends.choose(backend)
    checkpoint = Checkpoint.open(resolve(name, revision=revision))
    checkpoint.check()
    if dtype == "auto":
        known = partial(backends.native, chosen, device)
        dtype = auto_dtype(checkpoint.config, checkpoint.stored_dtype, chosen, known)
    passes = backends.open(chosen, checkpoint, device=device, dtype=cast("DType", dtype), progress=progress)
    config = checkpoint.config
    tokenizer = None
    if os.path.lexists(checkpoint.path / "tokenizer.json"):
        tokenizer = Tokenizer(
            checkpoint.path,
            vocab_size=config.vocab_size,
            bos_token_id=config.bos_token_id,
            controls=(*config.image_token_ids, *config.eos_token_ids, config.pad_token_id),
            context=config.max_positions,
        )
    return DiffusionGemma(Engine(passes, tokenizer), checkpoint.generation, checkpoint.path)


class DiffusionGemma:
    """A loaded model; `load` makes one."""

    def __init__(self, engine: Engine, generation: GenerationConfig, path: Path) -> None:
        self.engine = engine
        self.generation = generation
        self.path = path

    def __repr__(self) -> str:
        size = sum(math.prod(shape) for shape in weights.shapes(self.config).values())
        return (
            f"<DiffusionGemma {quoted(self.path.name)}: {figure(size)} parameters, {self.backend} on {self.device}, "
            f"{self.dtype}, context {self.config.max_positions:,}>"
        )

    @property
    def config(self) -> ModelConfig:
        return self.engine.passes.config

    @property
    def backend(self) -> str:
        return self.engine.passes.name

    @property
    def device(self) -> str:
        return self.engine.passes.device

    @property
    def dtype(self) -> str:
        return self.engine.passes.dtype

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer.

        Raises:
            DgemmaError: the checkpoint has none; it then takes and gives token ids only.
        """
        if self.engine.tokenizer is None:
            raise DgemmaError(f"{self.path}: no tokenizer.json; only token ids can be given")
        return cast("Tokenizer", self.engine.tokenizer)

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = None,
        seed: int = 0,
        steps: int | None = None,
        *,
        schedule_steps: int | None = None,
        entropy_bound: float | None = None,
        t_min: float | None = None,
        t_max: float | None = None,
        confidence: float | None = None,
        stability: int | None = None,
        temperature: float | None = None,
        greedy: bool | None = None,
        stop: str | Sequence[str] = (),
        eos: int | Sequence[int] | None = None,
        thinking: bool = False,
        raw: bool = False,
        specials: bool = False,
    ) -> Generation:
        """Write until an end-of-sequence token, a stop string or the token budget. Arguments and errors as `stream`."""
        events = self.stream(
            prompt, max_new_tokens, seed, steps, schedule_steps=schedule_steps, entropy_bound=entropy_bound,
            t_min=t_min, t_max=t_max, confidence=confidence, stability=stability, temperature=temperature,
            greedy=greedy, stop=stop, eos=eos, thinking=thinking, raw=raw, specials=specials,
        )  # fmt: skip
        tokens: list[int] = []
        text = thought = ""
        for event in events:
            if isinstance(event, Commit):
                tokens += event.tokens
                text += event.text
                thought += event.thinking
            elif isinstance(event, Done):
                return Generation(
                    text=text,
                    thinking=thought,
                    token_ids=tuple(tokens),
                    finish_reason=event.finish_reason,
                    stats=event.stats,
                )
        raise AssertionError("the engine ended without Done")

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = None,
        seed: int = 0,
        steps: int | None = None,
        *,
        schedule_steps: int | None = None,
        entropy_bound: float | None = None,
        t_min: float | None = None,
        t_max: float | None = None,
        confidence: float | None = None,
        stability: int | None = None,
        temperature: float | None = None,
        greedy: bool | None = None,
        stop: str | Sequence[str] = (),
        eos: int | Sequence[int] | None = None,
        thinking: bool = False,
        raw: bool = False,
        specials: bool = False,
    ) -> Iterator[Event]:
        """Check the options, then yield `Prefill`, `Draft`, `Commit` and, last, `Done`.

        What is None comes from the checkpoint's `generation_config.json`.

        Streams of one model may be interleaved, in one thread or in many, and each gives what it gives alone. The rule:
        one lock per model is held from one event to the next, by `logits` for its pass too, and never while the reader
        has an event. Closing a stream (`close`, from any thread) or dropping it frees all that it held.

        Args:
            prompt: text (one user message; where `tokenizer.has_template` is False it goes in as it stands), chat
                messages, or token ids. Line ends stay what they are; the command line makes them all newlines.
            max_new_tokens: at most so many tokens are emitted; by default `max_new_tokens` of the checkpoint's
                generation_config.json, or what its `max_length` leaves behind the prompt, or 256.
            seed: the same seed gives the same tokens, run to run and, in float32, backend to backend.
            steps: cap on denoising passes per canvas.
            schedule_steps: length of the temperature schedule, apart from the cap.
            entropy_bound: nats that the accepted tokens of one pass may sum to.
            t_min: temperature that the schedule ends at.
            t_max: temperature that it starts from. Either one alone takes the other with it where they would cross.
            confidence: mean entropy, in nats, below which a stable canvas is finished; 0 always takes every step.
            stability: how many passes in a row must leave the canvas as it was.
            temperature: what `t_min` and `t_max` are multiplied by; 0 is `greedy`.
            greedy: accept the most probable token everywhere, instead of one that is drawn; entropies, and so what is
                accepted in which pass, stay those of the temperature schedule.
            stop: strings that end the answer; neither they nor what follows is given out.
            eos: end-of-sequence token ids; an empty sequence never ends early. By default those of
                generation_config.json, or of config.json where it names none.
            thinking: ask the chat template for a thinking channel.
            raw: take text as it stands, without the chat template; all of it is yours, so special tokens spelled out in
                it are those tokens.
            specials: special tokens spelled out in messages, or in text, are those tokens too. Otherwise they are the
                text that they look like: nobody can type a control token.

        Raises:
            DgemmaError: a prompt or an option that cannot be, in one line; raised here, before the first event. While
                events are read: a pass that comes to NaN or infinity (damaged weights, or float16 overflows), with the
                dtype and what to try; and whatever the device refuses.
        """
        if max_new_tokens is not None:
            integer("max_new_tokens", max_new_tokens, 1, 1 << 31)
        integer("seed", seed, 0, (1 << 64) - 1)
        check_flags(thinking=thinking, raw=raw, specials=specials)
        sampler = settings(
            self.generation.sampler, steps=steps, schedule_steps=schedule_steps, entropy_bound=entropy_bound,
            t_min=t_min, t_max=t_max, confidence=confidence, stability=stability, temperature=temperature,
            greedy=greedy,
        )  # fmt: skip
        many = not isinstance(stop, str) and isinstance(stop, Sequence)
        stops: tuple[Any, ...] = tuple(stop) if many else (stop,)
        if any(not isinstance(one, str) or not one for one in stops):
            raise DgemmaError("stop: expected non-empty strings")
        if stops and self.engine.tokenizer is None:
            raise DgemmaError("stop: the checkpoint has no tokenizer, so there is no text to search")
        ids = tuple(self.prompt_ids(prompt, thinking=thinking, raw=raw, specials=specials))
        request = Request(
            prompt=ids,
            max_new_tokens=max_new_tokens or self.generation.budget(len(ids)),
            seed=seed,
            sampler=sampler,
            eos_token_ids=self._ends(eos),
            stop=stops,
        )
        return self.engine.add(request).events()

    def logits(
        self, prompt_ids: Prompt, canvas_ids: str | Sequence[int], previous_logits: np.ndarray | None = None
    ) -> np.ndarray:
        """Run one denoising pass and return its logits.

        Args:
            prompt_ids: token ids, or text or messages as `stream` takes them.
            canvas_ids: L token ids, or text that is tokenized as it stands.
            previous_logits: [L, V] logits of the pass before, already divided by its temperature; None on the first.
                -inf takes a token out; NaN and +inf are refused.

        Returns:
            float32 [L, V], soft-capped, before any temperature.

        Raises:
            DgemmaError: an id that does not exist, a shape that does not fit, or logits that come to NaN or infinity.
        """
        prompt = self.prompt_ids(prompt_ids)
        check_tokens(prompt, self.config.vocab_size, self.config.image_token_ids)
        canvas = self.tokenizer.encode(canvas_ids) if isinstance(canvas_ids, str) else ids_of(canvas_ids, "the canvas")
        check_tokens(canvas, self.config.vocab_size, what="the canvas")
        if len(prompt) + len(canvas) > self.config.max_positions:
            raise DgemmaError(f"prompt and canvas exceed the model's context of {self.config.max_positions:,} tokens")
        wanted = (len(canvas), self.config.vocab_size)
        previous = None if previous_logits is None else finite.scores(previous_logits, wanted)
        passes = self.engine.passes
        for check in passes.checks:
            check()

        def run() -> np.ndarray:
            slot = passes.open(len(prompt), len(canvas))
            try:
                for at in range(0, len(prompt), passes.chunk):
                    passes.read([(slot, np.asarray(prompt[at : at + passes.chunk], np.int32))])
                logits = passes.logits(slot, np.asarray(canvas, np.int32), previous)
            finally:
                passes.close(slot)
            finite.check_results(logits, passes.dtype)
            capped = np.flatnonzero((np.abs(logits) >= self.config.softcap).any(0)).astype(np.int32)
            if capped.size:  # an infinite row of the table looks like certainty behind the soft cap
                finite.check_results(passes.embed(capped), passes.dtype)
            return logits

        return self.engine.run("computing logits", run)

    def prompt_ids(
        self, prompt: Prompt, *, thinking: bool = False, raw: bool = False, specials: bool = False
    ) -> list[int]:
        """Return a prompt's token ids as the model would read them; arguments as `stream`."""
        if isinstance(prompt, str):
            if raw or not self.tokenizer.has_template:
                return self.tokenizer.encode(prompt, bos=True, specials=raw or specials)
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(prompt, Sequence) and len(prompt) and isinstance(prompt[0], Mapping):
            return self.tokenizer.render(cast("Sequence[Message]", prompt), thinking=thinking, specials=specials)
        return ids_of(prompt, "the prompt")

    def _ends(self, eos: int | Sequence[int] | None) -> tuple[int, ...]:
        if eos is None:
            return self.generation.eos_token_ids or self.config.eos_token_ids
        ends = tuple(ids_of([eos] if isinstance(eos, int) else eos, "eos"))
        if ends:
            check_tokens(ends, self.config.vocab_size, what="eos")
        return ends
