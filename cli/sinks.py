"""Readers of one generation's events: on a terminal, in a pipe, as JSON."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ..core.events import Commit, Done, Draft, Event, Prefill
from ..show.asked import Asked
from ..show.frame import Pieces, printable
from ..show.terminal import FAINT, FRAME_SECONDS, CanvasLive, CanvasView, heading
from .keep import kept
from .output import Wait, put

if TYPE_CHECKING:
    from ..runtime import DiffusionGemma

FORMATS = ("text", "result", "events")
"""What goes to stdout: the answer alone; one JSON object when all is done; every event as a line of JSON."""


class Sink(AbstractContextManager["Sink"]):
    """Takes one generation's events in order. On leaving, the terminal is as it was and the text is complete."""

    def __init__(self, errors: Console) -> None:
        self.errors = errors
        self.answer = self.thinking = ""
        self.asked: Asked | None = None
        """What is answered, where events do not say it themselves."""
        self._wait: Wait | None = None

    def feed(self, event: Event) -> None:
        match event:
            case Prefill():
                self.prefill(event)
            case Draft():
                self.draft(event)
            case Commit():
                self.answer += event.text
                self.thinking += event.thinking
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

    def wait(self, seconds: float) -> None:
        """Let time pass, with what is drawn in its place."""
        time.sleep(seconds)

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
            put(self.out, heading(self._kind, kind, self._last), FAINT)
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

    def wait(self, seconds: float) -> None:
        if self._live.is_started and seconds > FRAME_SECONDS:
            self._live.draw(now=True)  # what was too quick to be drawn at once
        super().wait(seconds)

    def commit(self, event: Commit) -> None:
        self._say("thinking", event.thinking)
        self._say("answer", event.text)
        self._view.commit(len(event.tokens), self._tail)
        self._live.draw(now=True)

    def _say(self, kind: str, text: str) -> None:
        if not text:
            return
        if kind != self._kind:
            put(self.out, printable(self._tail) + heading(self._kind, kind, self._tail[-1:]), FAINT)
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


class EventsSink(Sink):
    """One JSON object a line, as it happens; ASCII only, no NaN."""

    def __init__(self, errors: Console, tokenizer: Any) -> None:
        super().__init__(errors)
        self._tokenizer = tokenizer

    def feed(self, event: Event) -> None:
        if isinstance(event, Commit):
            self.answer += event.text
            self.thinking += event.thinking
        match event:
            case Draft():
                tokens = event.tokens.tolist()
                record = {
                    "canvas": event.canvas, "step": event.step, "steps": event.steps, "tokens": tokens,
                    "text": self._tokenizer.decode(tokens, special=True), "accepted": event.accepted.tolist(),
                    "entropy": [round(x, 6) if math.isfinite(x) else None for x in event.entropy.tolist()],
                }  # fmt: skip
                if event.held is not None:
                    record["held"] = event.held.tolist()
                if event.log_accept is not None:
                    record["log_accept"] = round(event.log_accept, 6)
            case Done():
                record = {"finish_reason": event.finish_reason, "stats": event.stats.to_dict()}
            case _:
                record = asdict(event)
        write_line({"event": type(event).__name__.lower()} | record)


class ResultSink(Sink):
    """One record at the end, with the fields of `Generation`; by default a line of JSON on stdout."""

    def __init__(
        self, errors: Console, write: Callable[[dict[str, Any]], None] | None = None, *, what: str = "denoising"
    ) -> None:
        super().__init__(errors)
        self._tokens: list[int] = []
        self._write = write or write_line
        self._what = what

    def draft(self, event: Draft) -> None:
        if self._wait is None or event.step == 0:
            self.calm()
            self._wait = Wait(self.errors, self._what)
        self._wait.update(event.step + 1, event.steps, f"step {event.step + 1}/{event.steps}")

    def commit(self, event: Commit) -> None:
        self._tokens += event.tokens

    def done(self, event: Done) -> None:
        self.calm()
        self._write(self.record(event))

    def record(self, done: Done) -> dict[str, Any]:
        return {
            "text": self.answer, "thinking": self.thinking, "token_ids": self._tokens,
            "finish_reason": done.finish_reason, "stats": done.stats.to_dict(),
        }  # fmt: skip


def write_line(record: dict[str, Any]) -> None:
    """Write a line of JSON to stdout: ASCII, no NaN."""
    sys.stdout.write(json.dumps(record, allow_nan=False) + "\n")
    sys.stdout.flush()


def open_sink(
    out: Console, errors: Console, model: DiffusionGemma, *, live: bool, form: str = "text", budget: int | None
) -> Sink:
    """Choose the reader that fits the terminal, or the form that was asked for."""
    asked = Asked(
        tokenizer=model.tokenizer,
        ends=model.generation.eos_token_ids or model.config.eos_token_ids,
        budget=budget or model.generation.budget(0),  # to draw; the engine counts for itself
    )
    sink = choose_sink(out, errors, asked, live=live, form=form)
    sink.asked = asked
    return sink


def choose_sink(out: Console, errors: Console, asked: Asked, *, live: bool, form: str = "text") -> Sink:
    if form == "events":
        return EventsSink(errors, asked.tokenizer)
    if form == "result":
        return ResultSink(errors)
    if not live or not out.is_terminal or out.is_dumb_terminal:
        return PlainSink(out, errors)
    return LiveSink(out, errors, CanvasView(Pieces(asked.tokenizer), asked.ends, asked.budget, out.encoding))


def follow(events: Iterator[Event], sink: Sink, *, title: str | None = None) -> Done:
    """Feed a sink until the end. Whatever ends it early, what was committed stays, and the terminal is in order.

    Where the command has `--record`, events are kept there; `title` is what drawings of them have above, by default the
    command.
    """
    last = None
    with sink:
        for last in kept(events, sink.asked, title):
            sink.feed(last)
    assert isinstance(last, Done)
    return last
