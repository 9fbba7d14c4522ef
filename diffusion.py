"""A loaded model: what prompts and options become requests of the engine, and its events texts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar, Unpack, cast, overload

import numpy as np

from .canvas.instruments import Instruments
from .canvas.model import Prompt, has_messages
from .canvas.reader import Reader
from .checkpoints import weights
from .constraints.asked import constraint_of
from .constraints.typed import parsed
from .core import finite
from .core.config import GenerationConfig, ModelConfig
from .core.engine import Engine
from .core.errors import DgemmaError, quoted
from .core.events import Commit, Done, Event, Generation
from .core.given import figure, held_of, ids_of, integer
from .core.handle import Handle
from .core.memory import check_canvas
from .core.options import GenerateOptions, Options, spread
from .core.row import Request, Share, check_tokens
from .core.sampler import settings
from .text.tokens import Message, Tokenizer

Value = TypeVar("Value")
Each = Value | list[Value] | tuple[Value, ...]
"""One for all prompts, or one for each."""


class DiffusionGemma(Instruments):
    """A loaded model; `load` makes one.

    Any number of threads may call it at once. One thread of the engine's own runs all passes, over the rows of all
    generations that are under way (`core/engine.py`); who calls waits for events, holds nothing meanwhile, and gets the
    tokens that the same call gives alone. A row that is cancelled or dropped makes room for the next one that waits.
    """

    def __init__(self, engine: Engine, generation: GenerationConfig, path: Path) -> None:
        self.engine = engine
        self.reader = Reader(engine)
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

    @overload
    def generate(  # pyright: ignore[reportOverlappingOverload] - a str is a sequence of str
        self, prompt: Prompt, max_new_tokens: int | None = ..., seed: int = ..., steps: int | None = ..., *,
        n: None = ..., **options: Unpack[Options],
    ) -> Generation: ...  # fmt: skip

    @overload
    def generate(
        self, prompt: Prompt | Sequence[Prompt], max_new_tokens: Each[int | None] = ..., seed: Each[int] = ...,
        steps: Each[int | None] = ..., *, n: int | None = ..., **options: Any,
    ) -> list[Any]: ...  # fmt: skip

    def generate(
        self, prompt: Prompt | Sequence[Prompt], max_new_tokens: Each[int | None] = None, seed: Each[int] = 0,
        steps: Each[int | None] = None, *, n: int | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        """Write until an end-of-sequence token, a stop string or the token budget.

        Args:
            prompt: as `stream`; or a list of prompts, which are answered side by side: a list whose items are texts, or
                lists (of ids, or of messages). A list of messages is one chat, and a list of integers is one prompt.
            n: so many samples of each prompt, of seeds that count up from its own; a prompt is read once for all.
            seed: as every other option, those of `stream`: of a list of prompts each has its own where a list or tuple
                of as many values is given. (`stop` and `eos`: a list of lists, for one list of strings or ids is for
                all.)

        Returns:
            A `Generation`; of several prompts a list of them, in order, and with `n` a list in place of each one.

        Raises:
            DgemmaError: as `stream`; of several prompts, by its number.
        """
        given = {"max_new_tokens": max_new_tokens, "seed": seed, "steps": steps, **options}
        if n is not None:
            integer("n", n, 1, 1 << 20)
        prompts = _several(prompt)
        if prompts is None:
            asked = [GenerateOptions(**given)]
            requests = [self.request(cast("Prompt", prompt), asked[0])]
        else:
            requests, asked = [], spread(given, len(prompts))
            for i, (one, own) in enumerate(zip(prompts, asked, strict=True), 1):
                try:
                    requests.append(self.request(one, own))
                    self.engine.check(requests[-1])  # all of them before the first is added, which checks it again
                except DgemmaError as error:
                    raise DgemmaError(f"prompt {i}: {error}") from None
        named = [f"prompt {i}: " if prompts is not None else "" for i in range(1, len(requests) + 1)]
        results = self._written(requests, [one.schema for one in asked], named, n)
        return results if prompts is not None else results[0]

    def _written(
        self, requests: Sequence[Request], schemas: Sequence[Any], named: Sequence[str], n: int | None
    ) -> list[Any]:  # fmt: skip
        """Return what is generated for each request, or, with `n`, lists of it; `schemas` are those that it obeys, and
        a request that cannot be run is `named`."""
        handles: list[list[Handle]] = []
        try:
            for request, name in zip(requests, named, strict=True):
                share, samples = (Share() if n else None), []
                handles.append(samples)
                for i in range(n or 1):
                    one = replace(request, seed=(request.seed + i) % (1 << 64), drafts=False)
                    try:
                        samples.append(self.engine.add(one, share))
                    except DgemmaError as error:
                        raise DgemmaError(f"{name}{error}") from None
            results = [
                [collected(handle.events(), schema) for handle in samples]
                for samples, schema in zip(handles, schemas, strict=True)
            ]
        except BaseException:
            for handle in chain(*handles):
                handle.cancel()
            raise
        return [made if n else made[0] for made in results]

    def stream(
        self, prompt: Prompt, max_new_tokens: int | None = None, seed: int = 0, steps: int | None = None,
        **options: Unpack[Options],
    ) -> Iterator[Event]:  # fmt: skip
        """Check the options, then yield `Prefill`, `Draft`, `Commit` and, last, `Done`.

        What is None comes from the checkpoint's `generation_config.json`.

        Streams of one model may be open side by side, in one thread or in many, and each gives what it gives alone.
        Closing a stream (`close`, from any thread) or dropping it frees all that it held.

        Args:
            prompt: text (one user message; where `tokenizer.has_template` is False it goes in as it stands), chat
                messages, or token ids. Line ends stay what they are; the command line makes them all newlines.
            max_new_tokens: at most so many tokens are emitted; by default `max_new_tokens` of the checkpoint's
                generation_config.json, or what its `max_length` leaves behind the prompt, or 256.
            seed: the same seed gives the same tokens, run to run and, in float32, backend to backend.
            steps: cap on denoising passes per canvas.
            canvas_length: positions that are denoised at once, from 1 to the model's context; a pass costs what they
                cost. Another length is another text. `"fit"`: the checkpoint's, but the last canvas of a budget has
                the smallest of 16, 32, 64, 128 and 256 positions that hold what is left of it.
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
            thinking_budget: tokens after which that channel is closed, by holding its end mark there; a model that
                closes it earlier is left alone.
            raw: take text as it stands, without the chat template; all of it is yours, so special tokens spelled out in
                it are those tokens.
            specials: special tokens spelled out in messages, or in text, are those tokens too. Otherwise they are the
                text that they look like: nobody can type a control token.
            regex: what the answer has to match, all of it, as by `re.fullmatch`. Of `regex`, `schema`, `choices` and
                `dfa` one may be given; thinking before the answer stays free. See docs/canvas.md.
            schema: a JSON schema (a dict, or JSON as text), or a pydantic model or dataclass, which `Generation.parsed`
                is then an object of.
            choices: texts of which the answer is one.
            dfa: an automaton over characters, `dgemma.constraints.from_states`.
            feedback: how much of what a constraint makes of a pass self-conditioning gets: 0, the default, is the
                model's own distribution, 1 is that given the constraint.
            init: a draft of the answer, text or token ids, that canvases start from instead of noise.
            strength: how much of a draft is lost to noise, token by token: 0 keeps all of it, 1 is as without one.
            held: tokens that positions of the answer keep: a mapping from position to token id, or a sequence of ids
                from the first position on, −1 where one is free.

        Raises:
            DgemmaError: a prompt or an option that cannot be, in one line; raised here, before the first event. While
                events are read: a pass that comes to NaN or infinity (damaged weights, or float16 overflows), with the
                dtype and what to try; and whatever the device refuses.
        """
        given = GenerateOptions(max_new_tokens=max_new_tokens, seed=seed, steps=steps, **options)
        return self.engine.add(self.request(prompt, given)).events()

    def request(self, prompt: Prompt, options: GenerateOptions) -> Request:
        """Return what the engine is asked for, with every default filled in."""
        sampler = settings(self.generation.sampler, **options.sampling)
        if options.stops and self.engine.tokenizer is None:
            raise DgemmaError("stop: the checkpoint has no tokenizer, so there is no text to search")
        wanted = options.canvas_length
        length = None if wanted is None or wanted == "fit" else int(wanted)
        if length is not None:
            check_canvas(self.config, length)
        how = dict(thinking=options.thinking, raw=options.raw, specials=options.specials)
        ids = tuple(self.prompt_ids(prompt, closed=options.language is not None and not options.thinking, **how))
        budget, ends = int(options.max_new_tokens or self.generation.budget(len(ids))), self._ends(options.eos)
        room = min(budget, self.config.max_positions - len(ids))
        if options.thinking_budget is not None and 0 < room <= options.thinking_budget:
            what = f"max_new_tokens {budget}" if room == budget else f"the context leaves room for {room} tokens"
            raise DgemmaError(f"thinking_budget is {options.thinking_budget} and {what}: no answer has room")
        return Request(
            prompt=ids,
            max_new_tokens=budget,
            seed=int(options.seed),  # one of NumPy's does not count up to 2^64
            sampler=sampler,
            eos_token_ids=ends,
            stop=options.stops,
            canvas_length=length,
            fit=wanted == "fit",
            held=held_of(options.held, self.config.vocab_size, room),
            init=self._draft(options.init),
            strength=1.0 if options.init is None else 0.5 if options.strength is None else float(options.strength),
            thinking_budget=options.thinking_budget,
            constraint=constraint_of(
                options, cast("Tokenizer | None", self.engine.tokenizer), prompt=ids, ends=ends,
                pad=self.config.pad_token_id,
            ),
        )  # fmt: skip

    def _draft(self, init: str | Sequence[int] | None) -> tuple[int, ...]:
        if init is None:
            return ()
        tokens = self.tokenizer.encode(init) if isinstance(init, str) else ids_of(init, "init")
        if tokens:
            check_tokens(tokens, self.config.vocab_size, what="init")
        return tuple(tokens)

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
            slot = passes.open_behind(prompt, len(canvas))
            try:
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
        self, prompt: Prompt, *, thinking: bool = False, raw: bool = False, specials: bool = False,
        closed: bool = False,
    ) -> list[int]:  # fmt: skip
        """Return a prompt's token ids as the model would read them; arguments as `stream`.

        closed: a thought that is closed stands behind what the chat template lays out, so that the model opens none on
        its canvas.
        """
        if has_messages(prompt) or (isinstance(prompt, str) and not raw and self.tokenizer.has_template):
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            ids = self.tokenizer.render(cast("Sequence[Message]", messages), thinking=thinking, specials=specials)
            thought = self.tokenizer.closed_thought if closed else []
            return ids if thought and ids[-len(thought) :] == thought else ids + thought  # some templates write one
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, bos=True, specials=raw or specials)
        return ids_of(prompt, "the prompt")

    def _ends(self, eos: int | Sequence[int] | None) -> tuple[int, ...]:
        if eos is None:
            return self.generation.eos_token_ids or self.config.eos_token_ids
        ends = tuple(ids_of([eos] if isinstance(eos, int | np.integer) else eos, "eos"))
        if ends:
            check_tokens(ends, self.config.vocab_size, what="eos")
        return ends


def _several(prompt: Any) -> list[Prompt] | None:
    """Return the prompts of a list of them; None where it is one."""
    if not isinstance(prompt, list | tuple) or not prompt:
        return None
    return list(prompt) if all(isinstance(one, str | list | tuple) for one in prompt) else None


def collected(events: Iterator[Event], schema: Any = None) -> Generation:
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
                parsed=None if schema is None else parsed(text, schema),
            )
    raise AssertionError("the engine ended without Done")
