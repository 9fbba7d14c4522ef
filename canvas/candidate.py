"""Text with holes, filled with both sides in view.

    template ──▶ tokens of its pieces ──▶ canvas by canvas: held text, holes in a language ──▶ the caller's text, filled

What comes back is made of the caller's own string: only the tokens of holes are ever decoded, so that everything
outside stands byte for byte. What is read and held are tokens of pieces that each spell their piece exactly.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..core.canvas import FREE
from ..core.engine import Engine
from ..core.errors import DgemmaError
from ..core.events import Commit, Done, Draft, Event, Stats
from ..core.handle import Handle
from ..core.row import Request, Share
from .borders import Speller
from .holes import Template
from .language import Text, language_of
from .lengths import likeliest, spread
from .reader import Look, Reader
from .windows import Laid, Window, next_start, window_at

STRIDE = 0x9E3779B97F4A7C15
"""Between the seeds of one text's canvases: far from those of candidates, which count up."""


@dataclass(frozen=True, kw_only=True)
class Filling:
    """What a hole was filled with."""

    text: str
    start: int
    """Where it stands in the whole text, characters."""
    end: int
    token_ids: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    """Of each token, and, where the hole came back shorter, of the filler behind them; see `Filled.score`."""


@dataclass(frozen=True, kw_only=True)
class Filled:
    """A text whose holes were filled."""

    text: str
    """The whole: outside its holes, the text that was given, byte for byte."""
    holes: tuple[Filling, ...]
    score: float
    """Mean log-probability, nats, of all tokens that stood on a canvas, those of holes and those that were held: each
    given the whole finished canvas, in one pass over that without self-conditioning, at temperature 1. What is held
    says whether a filling fits: one of the wrong length can be sure of itself. No probability of the text."""
    seed: int
    stats: Stats

    def __repr__(self) -> str:
        holes = ", ".join(repr(one.text if len(one.text) <= 40 else f"{one.text[:37]}...") for one in self.holes[:3])
        more = f" and {len(self.holes) - 3} more" if len(self.holes) > 3 else ""
        return f"<Filled {holes}{more}: score {self.score:.3f}>"


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """A text that is to be filled, checked."""

    engine: Engine
    reader: Reader
    speller: Speller
    template: Template
    laid: Laid
    prompt: tuple[int, ...]
    """What comes before the text."""
    end: int | None
    """The token held behind the text, if any."""
    base: Request
    """Its settings."""
    text: Text
    """What holes are made of."""
    filler: np.ndarray
    stop: tuple[str, ...]

    lengths: tuple[int, ...] | None
    """Of open holes, those that are weighed; None: as many as share a pass."""

    def window(self, laid: Laid, hole: int, done: int) -> Window:
        """Return the canvas that begins with a hole, of which so many tokens are done."""
        return window_at(laid, hole, done)

    def behind(self, laid: Laid, hole: int) -> list[int]:
        """Return what is known of the text behind a hole, up to the next open one; `FREE` in holes."""
        found = [*laid.pieces[hole + 1]]
        for i in range(hole + 1, len(laid.rooms)):
            if laid.open[i]:
                return found
            found += [FREE] * laid.rooms[i] + [*laid.pieces[i + 1]]
        return found if self.end is None else [*found, self.end]

    def request(self, window: Window, prompt: Sequence[int], *, seed: int, drafts: bool) -> Request:
        """Return what a canvas asks the engine for."""
        held = window.held
        last = window.holes[-1] + 1 == len(self.template.holes)
        if self.end is not None and last and window.shown == len(self.laid.pieces[-1]) and len(held) < self.laid.length:
            held = (*held, self.end)
        language = language_of(window.rooms, self.text, self.filler)
        return replace(
            self.base, prompt=tuple(prompt), max_new_tokens=len(held), seed=seed, held=held, constraint=language,
            eos_token_ids=(), stop=(), drafts=drafts,
        )  # fmt: skip


class Candidate(Iterator[Event]):
    """One candidate under way: its events, and when they have ended, `result`.

    The events are a generation's: canvases count through, and `Done` comes once. Closing it ends it.
    """

    def __init__(self, job: Job, *, seed: int, drafts: bool = True, scored: bool = True) -> None:
        self.job, self._seed, self._drafts, self._scored = job, seed, drafts, scored
        self._laid = job.laid
        self._prompt = [*job.prompt, *(() if job.laid.whole else job.laid.pieces[0])]
        self._at: tuple[int, int] | None = (0, 0)
        self._canvas, self._window, self._handle = 0, None, None
        self._tokens: list[list[int]] = [[] for _ in job.template.holes]
        self._scores: list[list[float]] = [[] for _ in job.template.holes]
        self._all: list[float] = []
        self._stats: list[Stats] = []
        self._reason: Any = "length"
        self._events = self._run()
        self.result: Filled | None = None

    def __next__(self) -> Event:
        return next(self._events)

    def close(self) -> None:
        """End it; nothing follows."""
        self._at = None
        if self._handle is not None:
            self._handle.cancel()
        self._events.close()

    def finished(self) -> Filled:
        """Run it to its end, and return what it came to."""
        for _ in self:
            pass
        if self.result is None:
            raise DgemmaError("this filling was closed before its end")
        return self.result

    @property
    def over(self) -> bool:
        return self._at is None

    def begin(self, share: Share | None = None) -> None:
        """Add the next canvas to the engine, beside others."""
        if self._at is None or self._handle is not None:
            return
        seed = (self._seed + self._canvas * STRIDE) % (1 << 64)
        self._window = self._next_window(*self._at, seed=seed)
        request = self.job.request(self._window, self._prompt, seed=seed, drafts=self._drafts)
        self._handle = self.job.engine.add(request, share)

    def _next_window(self, hole: int, done: int, *, seed: int) -> Window:
        """Return the next canvas, with the lengths of its open holes found: each in turn, from left to right."""
        job, window, i = self.job, self.job.window(self._laid, hole, done), 0
        while job.lengths != () and not done and i < len(window.rooms):
            room, mine = window.rooms[i], window.holes[i]
            behind = job.behind(self._laid, mine)
            if room.open and room.length == self._laid.rooms[mine] and behind:
                tried = spread(room.length) if job.lengths is None else job.lengths
                before = window.held[: room.start]
                size = self._laid.length
                length = likeliest(job.reader, self._prompt, before, behind, tried, size=size, seed=seed)
                if length is not None:
                    rooms = (*self._laid.rooms[:mine], length, *self._laid.rooms[mine + 1 :])
                    self._laid = replace(self._laid, rooms=rooms)
                    window = job.window(self._laid, hole, done)
            i += 1
        return window

    def advance(self) -> Iterator[Event]:
        """Yield the events of the next canvas; `Done` only of the last one."""
        self.begin()
        handle, window = self._handle, self._window
        assert isinstance(handle, Handle) and window is not None
        tokens: list[int] = []
        for event in handle.events():
            if isinstance(event, Commit):
                tokens += event.tokens
            if isinstance(event, Done):
                self._handle = None
                self._finish(window, tokens, event)
            elif isinstance(event, Draft | Commit):
                yield replace(event, canvas=self._canvas)
            else:
                yield event
        self._canvas += 1
        if self.result is not None:
            yield Done(finish_reason=self._reason, stats=self.result.stats)

    def _run(self) -> Generator[Event, None, None]:
        while not self.over:
            yield from self.advance()

    def _finish(self, window: Window, tokens: list[int], done: Done) -> None:
        """Take a finished canvas: what its holes hold, and what comes before the next one."""
        job, first = self.job, self._at[1] if self._at else 0
        filler, ended, places = set(job.filler.tolist()), False, []
        for hole, room in zip(window.holes, window.rooms, strict=True):
            mine = tokens[room.start : room.end]
            count = next((i for i, token in enumerate(mine) if room.open and token in filler), len(mine))
            self._tokens[hole] += mine[:count]
            ended = count < len(mine)
            places.append(range(room.start, room.start + count + ended))
        if self._scored:
            counted = [i for i, token in enumerate(window.held) if token != FREE]
            counted += [place for some in places for place in some]
            found = log_probabilities(job.reader, self._prompt, tokens, counted)
            self._all += found
            scores = iter(found[len(found) - sum(map(len, places)) :])
            for hole, some in zip(window.holes, places, strict=True):
                self._scores[hole] += [next(scores) for _ in some]
        self._stats.append(done.stats)
        self._at = next_start(self._laid, window, first, ended)
        if self._at is None:
            self.result = self._filled()
            return
        self._prompt = [*job.prompt, *job.laid.pieces[0]]
        for hole in range(self._at[0] + (self._at[1] > 0)):
            self._prompt += self._tokens[hole]
            if (hole, 0) < self._at and hole < self._at[0]:
                self._prompt += job.laid.pieces[hole + 1]

    def _filled(self) -> Filled:
        job = self.job
        texts = [self._text(i) for i in range(len(self._tokens))]
        spans = job.template.spans(texts)
        return Filled(
            text=job.template.assembled(texts),
            holes=tuple(
                Filling(
                    text=text, start=start, end=end, token_ids=tuple(tokens), log_probabilities=tuple(scores)
                )
                for text, (start, end), tokens, scores in zip(texts, spans, self._tokens, self._scores, strict=True)
            ),
            score=float(np.mean(self._all)) if self._all else 0.0,
            seed=self._seed,
            stats=_together(self._stats, sum(map(len, self._tokens))),
        )  # fmt: skip

    def _text(self, hole: int) -> str:
        job = self.job
        first = hole == 0 and not job.template.pieces[0] and job.end is None
        text = job.speller.text(self._tokens[hole], first=first)
        return text[: min((at for stop in job.stop if (at := text.find(stop)) >= 0), default=len(text))]


def ranked(candidates: Sequence[Candidate]) -> list[Filled]:
    """Run candidates of one job side by side to their ends, and return them, those of higher score first."""
    share = Share()  # they begin with one prompt
    try:
        for one in candidates:
            one.begin(share)
        while active := [one for one in candidates if not one.over]:
            for one in active:
                one.begin()
            for one in active:
                for _ in one.advance():
                    pass
    except BaseException:
        for one in candidates:
            one.close()
        raise
    return sorted((one.finished() for one in candidates), key=lambda one: -one.score)


def log_probabilities(
    reader: Reader, prompt: Sequence[int], canvas: Sequence[int], places: Sequence[int]
) -> list[float]:  # fmt: skip
    """Return the log-probability of a canvas's own tokens at some places, nats; see `Filled.score`."""
    if not places:
        return []
    tokens = np.asarray(canvas, np.int32)
    wanted, column = np.unique(tokens[list(places)], return_inverse=True)
    look = Look(prompt=tuple(prompt), canvas=tokens, at=tuple(places))
    found = reader.scores([look], wanted.tolist())[0].log_p
    return found[np.arange(len(places)), column.reshape(-1)].tolist()


def _together(parts: Sequence[Stats], emitted: int) -> Stats:
    """Return the figures of all canvases as one generation's; tokens are those of the holes."""

    def total(name: str) -> Any:
        return sum(getattr(one, name) for one in parts)

    first, accepts = parts[0], [one.log_accept for one in parts if one.log_accept is not None]
    return Stats(
        prompt_tokens=first.prompt_tokens,
        cached_tokens=first.cached_tokens,
        emitted_tokens=emitted,
        canvases=total("canvases"),
        steps=total("steps"),
        encode_passes=total("encode_passes"),
        seconds=total("seconds"),
        prefill_seconds=total("prefill_seconds"),
        first_draft_seconds=first.first_draft_seconds,
        first_text_seconds=first.first_text_seconds,
        log_accept=sum(accepts) if accepts else None,
        peak_memory_bytes=max(one.peak_memory_bytes for one in parts),
    )
