"""Watching a stream from Python: in a notebook as a page does it, on a terminal as the commands do."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from ..canvas.candidate import Candidate, Filled
from ..canvas.edit import Edited, Editor
from ..core.events import Draft, Event, Generation
from ..diffusion import collected
from .asked import Asked, known
from .recording import Recording

FRAME_SECONDS = 0.1
"""A notebook keeps up with so many drawings a second, and no more."""


def watch(events: Iterable[Event] | Recording) -> Generation | Filled | Edited | None:
    """Draw a canvas while it is denoised.

        dgemma.watch(model.stream("…"))
        dgemma.watch(dgemma.replay("run.jsonl"))

    In a notebook the canvas is drawn in the cell's output, with a slider over all passes when it is done; on a terminal
    as `dgemma generate` draws it. Elsewhere nothing is drawn.

    Args:
        events: what `model.stream`, `stream_fill` or `stream_edit` returns, or a recording (of several turns one behind
            the other).

    Returns:
        What was generated, filled or edited, last if there are several turns; None where a recording ends before the
        answer does.

    Raises:
        DgemmaError: an iterator that does not say what it answers; while events are read, as `stream`.
    """
    turns = events.turns if isinstance(events, Recording) else (events,)
    result = None
    for turn in turns:
        result = _watched(turn, known(turn, "watch"))
    return result


def _watched(events: Iterable[Event], asked: Asked) -> Generation | Filled | Edited | None:
    drawn = _in_notebook if _notebook() else _on_terminal
    # Passes are many, and what is generated is in the other events.
    kept = [event for event in drawn(events, asked) if not isinstance(event, Draft)]
    if isinstance(events, Candidate | Editor):
        return events.finished()
    with suppress(AssertionError):
        return collected(iter(kept))
    return None


def _notebook() -> bool:
    """Whether a notebook shows what is displayed; IPython on a terminal has no kernel."""
    if "IPython" not in sys.modules:
        return False
    from IPython.core.getipython import get_ipython

    shell: Any = get_ipython()
    return shell is not None and getattr(shell, "kernel", None) is not None


def _in_notebook(events: Iterable[Event], asked: Asked) -> Iterator[Event]:
    from IPython.display import HTML, DisplayHandle

    from .html import Drawing, part

    drawing, handle = Drawing(asked), DisplayHandle()
    shown = False
    last = 0.0

    def show(*, live: bool) -> None:
        nonlocal shown, last
        (handle.update if shown else handle.display)(HTML(part(drawing, live=live)))
        shown, last = True, time.monotonic()

    try:
        for event in events:
            drawing.add(event)
            if isinstance(event, Draft) and time.monotonic() - last >= FRAME_SECONDS:
                show(live=True)
            yield event
    finally:  # interrupted too: what came by then can be gone through
        show(live=False)


def _on_terminal(events: Iterable[Event], asked: Asked) -> Iterator[Event]:
    from rich.console import Console

    from .frame import printable
    from .scene import Scene
    from .terminal import CanvasLive

    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal or console.is_dumb_terminal:
        yield from events
        return
    scene = Scene(asked, console.encoding)
    with CanvasLive(scene, console, redirect_stderr=True) as live:
        for event in events:
            scene.feed(event)
            live.draw(now=isinstance(event, Draft) and event.step == 0)
            yield event
    console.print(printable(scene.text).rstrip("\n"), markup=False, emoji=False, soft_wrap=True)
