"""Readers of the engine's events: to a terminal, to a pipe, as JSON lines; and what is said on stderr beside them."""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.segment import Segment, Segments
from rich.style import Style
from rich.text import Text

from ..core.events import Commit, Done, Draft, Event, Prefill
from .live import FAINT, CanvasLive, CanvasView, Pieces, printable

if TYPE_CHECKING:
    from ..core.runtime import DiffusionGemma

PATIENCE = 0.4
"""Seconds that work may last before its progress is shown."""


class Wait(AbstractContextManager["Wait"]):
    """A progress bar on stderr that appears only on a terminal, and only if what it stands for lasts."""

    def __init__(self, console: Console, what: str) -> None:
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(bar_width=24),
            TextColumn("{task.fields[figure]}"), console=console, transient=True, redirect_stdout=False,
        )  # fmt: skip
        self._task = self._progress.add_task(printable(what), total=None, figure="")
        self._lock = threading.Lock()
        self._over = not console.is_terminal or console.is_dumb_terminal
        self._timer = threading.Timer(PATIENCE, self._begin)
        self._timer.daemon = True
        if not self._over:
            self._timer.start()

    def _begin(self) -> None:
        with self._lock:
            if not self._over:
                self._progress.start()

    def update(self, done: int, total: int, figure: str = "") -> None:
        self._progress.update(self._task, completed=done, total=total, figure=figure)

    def close(self) -> None:
        self._timer.cancel()
        with self._lock:
            if not self._over:
                self._over = True
                self._progress.stop()

    def __exit__(self, *exc: object) -> None:
        self.close()


def load_model(console: Console, name: str, *, backend: str, device: str, dtype: str) -> DiffusionGemma:
    """Load a model with its progress on stderr."""
    import dgemma
    from dgemma import backends
    from dgemma.core.checkpoint import resolve

    backends.choose(backend)  # before a download of many gigabytes
    path = resolve(name)  # which draws bars of its own
    with Wait(console, f"loading {name}") as wait:

        def progress(done: int, total: int) -> None:
            wait.update(done, total, f"{size(done)} of {size(total)}")

        return dgemma.load(path, backend=backend, device=device, dtype=dtype, progress=progress)


class Sink(AbstractContextManager["Sink"]):
    """Takes one generation's events in order. On leaving, the terminal is as it was and the text is complete."""

    def __init__(self, errors: Console) -> None:
        self.errors = errors
        self.answer = ""
        self._wait: Wait | None = None

    def feed(self, event: Event) -> None:
        match event:
            case Prefill():
                self.prefill(event)
            case Draft():
                self.draft(event)
            case Commit():
                self.answer += event.text
                self.commit(event)
            case Done():
                self.done(event)

    def prefill(self, event: Prefill) -> None:
        if self._wait is None:
            self._wait = Wait(self.errors, "reading the prompt")
        self._wait.update(event.done, event.total, f"{event.done:,} of {event.total:,} tokens")
        if event.done == event.total:
            self.calm()
            self._wait = Wait(self.errors, "denoising")

    def draft(self, event: Draft) -> None:
        self.calm()

    def commit(self, event: Commit) -> None: ...

    def done(self, event: Done) -> None: ...

    def calm(self) -> None:
        """Take the progress bar away."""
        if self._wait is not None:
            self._wait.close()
            self._wait = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.calm()


class PlainSink(Sink):
    """Writes text as it becomes final.

    To a pipe it goes exactly as it is, and the thinking channel to stderr; on a terminal control characters are made
    visible, and thinking is dim.
    """

    def __init__(self, out: Console, errors: Console) -> None:
        super().__init__(errors)
        self.out = out
        self._kind = ""
        self._last = "\n"  # the last character written to stdout

    def draft(self, event: Draft) -> None:
        if self.out.is_terminal:
            return
        if self._wait is None:
            self._wait = Wait(self.errors, "denoising")
        self._wait.update(event.step + 1, event.steps, f"step {event.step + 1}/{event.steps}")

    def prefill(self, event: Prefill) -> None:
        super().prefill(event)
        if event.done == event.total and self.out.is_terminal:  # --no-live asks for a terminal on which nothing moves
            self.calm()

    def commit(self, event: Commit) -> None:
        self.calm()
        self._say("thinking", event.thinking)
        self._say("answer", event.text)

    def _say(self, kind: str, text: str) -> None:
        if not text:
            return
        if self.out.is_terminal:
            heading = _heading(self._kind, kind, self._last)
            put(self.out, heading, FAINT)
            put(self.out, printable(text), FAINT if kind == "thinking" else None)
            self._last = text[-1]
        elif kind == "thinking":
            if self._kind != kind:
                put(self.errors, "thinking:\n", FAINT)
            put(self.errors, printable(text) if self.errors.is_terminal else text, FAINT)
        else:
            if self._kind == "thinking":
                put(self.errors, "\n")
            sys.stdout.write(text)
            sys.stdout.flush()
            self._last = text[-1]
        self._kind = kind

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if self._kind == "thinking" and not self.out.is_terminal:
            put(self.errors, "\n")
        if self._last != "\n":
            self._last = "\n"
            sys.stdout.write("\n")
            sys.stdout.flush()


class LiveSink(Sink):
    """Draws the canvas on a terminal; complete lines move up above the drawing, as plain text that stays."""

    def __init__(self, out: Console, errors: Console, view: CanvasView) -> None:
        super().__init__(errors)
        self.out = out
        self._view = view
        self._live = CanvasLive(view, out, redirect_stderr=errors.is_terminal)
        self._kind = self._tail = ""

    def draft(self, event: Draft) -> None:
        super().draft(event)
        self._view.update(event)
        if not self._live.is_started:
            self._live.start()
        self._live.draw(now=event.step == 0)

    def commit(self, event: Commit) -> None:
        self._say("thinking", event.thinking)
        self._say("answer", event.text)
        self._view.commit(len(event.tokens), self._tail)
        self._live.draw(now=True)

    def _say(self, kind: str, text: str) -> None:
        if not text:
            return
        if kind != self._kind:
            put(self.out, printable(self._tail) + _heading(self._kind, kind, self._tail[-1:]), FAINT)
            self._kind, self._tail = kind, ""
        lines, end, self._tail = (self._tail + text).rpartition("\n")
        self._print(lines + end)

    def _print(self, text: str) -> None:
        put(self.out, printable(text), FAINT if self._kind == "thinking" else None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._live.stop()
        if self._tail:
            self._print(self._tail + "\n")
            self._tail = ""


class JsonSink(Sink):
    """One JSON object a line, as it happens; ASCII only, no NaN."""

    def __init__(self, errors: Console, tokenizer: Any) -> None:
        super().__init__(errors)
        self._tokenizer = tokenizer

    def feed(self, event: Event) -> None:
        match event:
            case Draft():
                tokens = event.tokens.tolist()
                record = {
                    "canvas": event.canvas, "step": event.step, "steps": event.steps, "tokens": tokens,
                    "text": self._tokenizer.decode(tokens, special=True), "accepted": event.accepted.tolist(),
                    "entropy": [round(x, 6) if math.isfinite(x) else None for x in event.entropy.tolist()],
                }  # fmt: skip
            case Done():
                record = {"finish_reason": event.finish_reason, "stats": event.stats.to_dict()}
            case _:
                record = asdict(event)
        line = json.dumps({"event": type(event).__name__.lower()} | record, allow_nan=False)
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def consoles() -> tuple[Console, Console]:
    """What is written to stdout and to stderr; made late, so that redirected streams are found."""
    return Console(file=sys.stdout, highlight=False), Console(file=sys.stderr, highlight=False)


def open_sink(
    out: Console, errors: Console, model: DiffusionGemma, *, live: bool, as_json: bool = False, budget: int
) -> Sink:
    """Choose the reader that fits the terminal."""
    if as_json:
        return JsonSink(errors, model.tokenizer)
    if not live or not out.is_terminal or out.is_dumb_terminal:
        return PlainSink(out, errors)
    ends = model.generation.eos_token_ids or model.config.eos_token_ids
    return LiveSink(out, errors, CanvasView(Pieces(model.tokenizer), ends, budget, out.encoding))


def follow(events: Iterator[Event], sink: Sink) -> Done:
    """Feed a sink until the end. Whatever ends it early, what was committed stays, and the terminal is in order."""
    last = None
    with sink:
        for last in events:
            sink.feed(last)
    assert isinstance(last, Done)
    return last


def put(console: Console, text: str, style: Style | None = None) -> None:
    """Write text as it stands: no wrapping, no markup."""
    if text:
        console.print(Segments([Segment(text, style)]), crop=False, soft_wrap=True)
        console.file.flush()


def _heading(before: str, kind: str, last: str) -> str:
    """What stands between the thinking channel and the answer."""
    if before == kind or (not before and kind == "answer"):
        return ""
    return ("" if last in ("", "\n") else "\n") + ("thinking:\n" if kind == "thinking" else "\nanswer:\n")


def footer(console: Console, done: Done) -> None:
    """Say the figures of one generation, in one line as far as the terminal is wide enough."""
    put_words(console, figures(done))


def put_words(console: Console, text: str) -> None:
    """Write a remark: wrapped between words on a terminal, on one line elsewhere."""
    console.print(Text(printable(text), FAINT), soft_wrap=not console.is_terminal)


def figures(done: Done) -> str:
    stats = done.stats
    parts = [
        f"prompt {stats.prompt_tokens:,} tokens{_rate(stats.prefill_tokens_per_second)}",
        f"wrote {stats.emitted_tokens:,}{_rate(stats.tokens_per_second)}",
        _figure(stats.steps_per_canvas, "steps/canvas"),
        _figure(stats.tokens_per_forward, "tokens/forward"),
        "" if stats.first_draft_seconds is None else f"first draft {significant(stats.first_draft_seconds)} s",
        f"peak {size(stats.peak_memory_bytes)}",
        "" if done.finish_reason == "stop" else "cut at the token budget",
    ]
    return ", ".join(part for part in parts if part)


def _rate(value: float | None) -> str:
    return "" if value is None else f" at {significant(value)}/s"


def _figure(value: float | None, unit: str) -> str:
    return "" if value is None else f"{significant(value)} {unit}"


def significant(value: float) -> str:
    """Three significant digits, and no exponent."""
    if not math.isfinite(value):
        return "?"
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{round(value, digits):,.{max(0, min(digits, 6))}f}"


def size(count: float) -> str:
    """Bytes in the unit that memory is sold in: 1.5 GiB."""
    unit = "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.{0 if unit == 'B' or (unit != 'GiB' and count >= 10) else 1}f} {unit}"
