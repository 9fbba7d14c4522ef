"""The canvas as it is denoised, drawn on a terminal.

    ░░░░   changing   (dim)
    guess  guess      (dim, italic)
    word   accepted   (underlined)
    word   settled    (bold)
    word   held       (plain)

What the states mean is told in `frame.py`; colours say it once more.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderResult
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType, Segment
from rich.style import Style
from rich.text import Text

from ..core.events import Draft
from .frame import CHANGING, HELD, SETTLED, STATES, Frame, Frames, Pieces, printable

STYLES = (
    Style(dim=True, color="blue"),
    Style(dim=True, italic=True, color="yellow"),
    Style(underline=True, color="green"),
    Style(bold=True),
    Style(color="magenta"),
)
"""By state."""
FAINT = Style(dim=True)
FRAME_SECONDS = 1 / 20
"""A small model makes hundreds of passes a second; drawing each would slow it down for pictures nobody sees."""

_WIDEST = 8  # cells of shade for one changing token: some vocabularies have tokens of a hundred spaces


class CanvasView:
    """A rich renderable of the newest draft, never taller or wider than the console it is drawn on.

    Args:
        pieces: text of tokens.
        ends: end-of-sequence token ids; nothing is shown behind one that is accepted.
        budget: tokens that may still be written; nothing beyond is shown.
        encoding: of the terminal; without Unicode the drawing keeps to ASCII.
    """

    def __init__(self, pieces: Pieces, ends: Sequence[int], budget: int, encoding: str = "utf-8") -> None:
        self._frames = Frames(pieces, ends, budget)
        unicode = encoding.lower().startswith("utf")
        self._shade, self._end, self._fill = ("░", "∎", "·") if unicode else ("~", "$", ".")
        self._bars = "▁▂▃▄▅▆▇█" if unicode else "#"
        self._separator = " · " if unicode else " | "
        self._frame: Frame | None = None
        self._open = False  # whether the newest frame is of a canvas that is not committed yet
        self._tallest = 0
        self.tail = ""  # committed text whose line is not complete yet: the canvas goes on behind it
        self.widths: list[int] = []

    def update(self, draft: Draft) -> None:
        if self._frame is None or self._frame.draft.canvas != draft.canvas:
            self._tallest = 0
        self._frame = self._frames.add(draft)
        self._open = True

    def commit(self, tokens: int, tail: str) -> None:
        """Take a canvas out of the drawing: its tokens are written, but for the `tail` of their last line."""
        self._frames.commit(tokens)
        self.tail = printable(tail, grid=True)
        self._open = False
        self._tallest = 0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = self.lines(console, options.max_width, options.size.height)
        self.widths = [line.cell_len for line in lines]
        yield Text("\n", end="").join(lines)

    def lines(self, console: Console, width: int, height: int) -> list[Text]:
        """Return at most `height - 1` lines: the cursor needs the last one of a terminal."""
        below = [self._status(width), *self._legend(width)] if height >= 8 else [self._status(width)][: height - 2]
        room = max(1, height - 1 - len(below))
        rows = list(self._body(width * height).wrap(console, width, overflow="fold", tab_size=8))
        for row in rows:
            row.rstrip()
        # The status line must not jump about while the text above it grows and shrinks.
        self._tallest = max(self._tallest, min(len(rows), room))
        rows += [Text()] * (self._tallest - len(rows))
        return _window(rows, room, width) + below

    def _body(self, most: int) -> Text:
        """The canvas, no more than about `most` characters of what stands before it."""
        text = Text(self.tail[-most:])
        frame = self._frame
        if frame is None or not self._open:
            return text
        for span in frame.spans:
            piece = span.text
            if span.state == CHANGING:
                piece = self._shade * min(max(cell_len(piece), 1), _WIDEST)
            text.append(piece, STYLES[span.state])
        if frame.end is not None:
            text.append(self._end, STYLES[frame.states[frame.end]])
        text.append(self._fill * frame.blank, FAINT)
        return text

    def _status(self, width: int) -> Text:
        frame = self._frame
        if frame is None:
            return Text()
        draft = frame.draft
        parts = [
            f"step {draft.step + 1}/{draft.steps}",
            *([f"canvas {draft.canvas + 1}"] if draft.canvas else []),
            f"accepted {frame.accepted}/{int(frame.free.sum())}",
            f"entropy {frame.uncertainty:.3f} nats",
        ]
        if draft.log_accept is not None:  # where the track below has room beside it
            more = [*parts, f"log accept {draft.log_accept:.3f}"]
            parts = more if len(self._separator.join(more)) + 14 <= width else parts
        while len(parts) > 1 and len(self._separator.join(parts)) > width:
            parts.pop()
        line = Text(self._separator.join(parts), style=FAINT, no_wrap=True)
        room = min(width - line.cell_len - 2, 48)
        if room >= 12:
            line = Text.assemble(self._track(draft, room), "  ", line)
        line.truncate(width)
        return line

    def _track(self, draft: Draft, room: int) -> Text:
        """One column a pass up to the cap, its height the mean entropy: how far, and how sure."""
        cells = min(room, draft.steps)
        edges = np.linspace(0, draft.steps, cells + 1).round().astype(int)
        means = self._frames.uncertainty
        highest = max(*means, 1e-9)
        track = ""
        for low, high in pairwise(edges):
            passes = means[low:high]
            if passes:
                track += self._bars[min(int(passes[-1] / highest * len(self._bars)), len(self._bars) - 1)]
        return Text.assemble((track, Style(color="cyan")), (self._fill * (cells - len(track)), FAINT))

    def _legend(self, width: int) -> list[Text]:
        lines: list[Text] = []
        held = self._frame is not None and not self._frame.free.all()
        for state, name in enumerate(STATES if held else STATES[:HELD]):
            entry = Text(f"{self._shade} {name}" if state == CHANGING else name, STYLES[state])
            if lines and lines[-1].cell_len + 2 + entry.cell_len <= width:
                lines[-1] = Text.assemble(lines[-1], "  ", entry)
            else:
                lines.append(entry)
        for line in lines:
            line.truncate(width)
        return lines


def _window(rows: list[Text], room: int, width: int) -> list[Text]:
    """Return what fits, from about the first row that is still open; what is hidden is counted."""
    if len(rows) <= room:
        return rows
    first = next((i for i, row in enumerate(rows) if any(span.style in STYLES[:SETTLED] for span in row.spans)), 0)
    top = max(0, min(first - 1, len(rows) - room))
    shown = rows[top : top + room]
    above, below = top, len(rows) - room - top
    if above and room > 2:
        shown[0] = _hidden(above + 1, width)
    if below and room > 1:
        shown[-1] = _hidden(below + 1, width)
    return shown


def _hidden(count: int, width: int) -> Text:
    mark = Text(f"... {count} more lines", FAINT)
    mark.truncate(width)
    return mark


class _Wrapping(Control):
    """Whether the terminal goes on in the next row where a line is full (DECAWM)."""

    def __init__(self, *, on: bool) -> None:
        super().__init__()
        self.segment = Segment(f"\x1b[?7{'h' if on else 'l'}", None, [(ControlType.CARRIAGE_RETURN,)])


class Drawing(ConsoleRenderable, Protocol):
    """What is drawn over and over."""

    widths: list[int]
    """Cells of each line drawn last."""


class CanvasLive(Live):
    """A rich `Live` that also survives a terminal being made narrower, and draws no more often than eyes can follow."""

    def __init__(self, view: Drawing, console: Console, *, redirect_stderr: bool) -> None:
        super().__init__(
            console=console, auto_refresh=False, transient=True, redirect_stdout=False,
            redirect_stderr=redirect_stderr, get_renderable=lambda: view,
        )  # fmt: skip
        self._view = view
        self._drawn = 0.0

    def draw(self, *, now: bool = False) -> None:
        if now or time.monotonic() - self._drawn >= FRAME_SECONDS:
            self.refresh()
            self._drawn = time.monotonic()

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        # A terminal that became narrower has wrapped the old drawing onto more rows than rich drew; without climbing
        # over these too they would stay behind.
        width = max(self.console.width, 1)
        extra = sum((cells - 1) // width for cells in self._view.widths if cells > width)
        result = super().process_renderables(renderables)
        if extra and result:
            result.insert(1, Control(*((ControlType.CURSOR_UP, 1), (ControlType.ERASE_IN_LINE, 2)) * extra))
        # A terminal may be narrower for a while before it says so. What is drawn then must not wrap too, or every frame
        # would leave rows behind; clipped, it takes the rows that are counted.
        return [*result[:-1], _Wrapping(on=False), result[-1], _Wrapping(on=True)] if result else result


def heading(before: str, kind: str, last: str) -> str:
    """Return what stands between the thinking channel and the answer, behind a text that ends in `last`."""
    if before == kind or (not before and kind == "answer"):
        return ""
    return ("" if last in ("", "\n") else "\n") + ("thinking:\n" if kind == "thinking" else "\nanswer:\n")
