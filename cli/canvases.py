"""Readers of events whose text is told when all is done: the canvases are drawn, or progress is, and nothing else."""

from __future__ import annotations

from rich.console import Console

from ..core.events import Commit, Draft
from ..show.asked import Asked
from ..show.frame import Pieces
from ..show.terminal import CanvasView
from .output import Wait
from .sinks import LiveSink, Sink


class CanvasSink(LiveSink):
    """Draws each canvas on a terminal, and takes it away."""

    def commit(self, event: Commit) -> None:
        self._view.commit(len(event.tokens), "")
        self._live.draw(now=True)


class ProgressSink(Sink):
    """Says on stderr how far a canvas is."""

    def draft(self, event: Draft) -> None:
        if self._wait is None:
            self._wait = Wait(self.errors, "denoising")
        self._wait.update(
            event.step + 1, event.steps, f"canvas {event.canvas + 1}, step {event.step + 1}/{event.steps}"
        )


def canvas_sink(out: Console, errors: Console, asked: Asked, *, live: bool) -> Sink:
    """Choose the reader that fits the terminal."""
    if live and out.is_terminal and not out.is_dumb_terminal:
        view = CanvasView(Pieces(asked.tokenizer), asked.ends, asked.budget, out.encoding)
        sink: Sink = CanvasSink(out, errors, view)
    else:
        sink = ProgressSink(errors)
    sink.asked = asked
    return sink
