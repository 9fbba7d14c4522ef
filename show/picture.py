"""A recording as still frames on a grid of characters, for pictures that move: what `svg.py` and `gif.py` draw."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby

from rich.cells import cell_len
from rich.console import Console
from rich.style import Style
from rich.text import Text

from ..core.events import Done, Draft
from .pacing import delays
from .recording import Recording, Turn
from .scene import Scene
from .terminal import STYLES

PACE = 0.45
"""Seconds of a pass, where nothing else is said."""
FIRST, LAST = 2, 6
"""How many paces the first pass and the whole text are shown."""
MOST = 400
"""Shots of a picture; of a longer recording so many are drawn, evenly spread."""

BACKGROUND, INK = (22, 27, 34), (214, 221, 229)
COLOURS = {
    "blue": (88, 166, 255), "yellow": (227, 179, 65), "green": (86, 211, 100), "cyan": (57, 197, 207),
    "magenta": (210, 153, 255),
}  # fmt: skip
"""Of the styles in `terminal.py`, on a dark ground."""
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Look:
    """How characters are drawn."""

    ink: Colour = INK
    bold: bool = False
    italic: bool = False
    underline: bool = False
    ground: Colour | None = None


@dataclass(frozen=True)
class Run:
    """Characters of one look, which stand in so many cells from a column on."""

    column: int
    cells: int
    text: str
    look: Look


Row = tuple[Run, ...]


@dataclass(frozen=True)
class Shot:
    rows: tuple[Row, ...]
    seconds: float


def shots(
    recording: Recording, *, columns: int = 72, rows: int = 40, speed: float | None = None, pace: float | None = None
) -> list[Shot]:
    """Draw every pass, and each whole text at its turn's end.

    Args:
        columns, rows: of the grid; of a text that has more rows, the last are drawn.
        speed: show passes as long as they took, so many times as fast.
        pace: show every pass for so many seconds; by default `PACE`.
    """
    console = Console(file=io.StringIO(), width=columns, height=rows, _environ={})
    found: list[Shot] = []
    for turn in recording.turns:
        drawn = list(_turn(turn, console, columns, rows))
        found += _timed(drawn, turn, speed, PACE if pace is None else pace)
    if len(found) <= MOST:
        return found
    picked = [found[i * (len(found) - 1) // (MOST - 1)] for i in range(MOST)]
    stretch = sum(shot.seconds for shot in found) / max(sum(shot.seconds for shot in picked), 1e-9)
    return [Shot(shot.rows, shot.seconds * stretch) for shot in picked]


def _turn(turn: Turn, console: Console, columns: int, rows: int) -> Iterator[tuple[int, tuple[Row, ...]]]:
    """Yield what is seen from which event on."""
    scene = Scene(turn.asked)
    for i, event in enumerate(turn.events):
        scene.feed(event)
        if isinstance(event, Draft | Done):
            yield i, tuple(_row(line, console) for line in scene.lines(console, columns, rows))


def _timed(drawn: list[tuple[int, tuple[Row, ...]]], turn: Turn, speed: float | None, pace: float) -> list[Shot]:
    if speed is None:
        beats = [pace] * len(drawn)
        beats[:1] = [pace * FIRST] * len(drawn[:1])
        beats[-1:] = [pace * LAST] * len(drawn[-1:])
        return [Shot(rows, beat) for (_, rows), beat in zip(drawn, beats, strict=True)]
    waits = [seconds for _, seconds in delays(turn, speed=speed)]
    starts = [i for i, _ in drawn]
    ends = [*starts[1:], len(waits)]
    result = [Shot(rows, sum(waits[i + 1 : j + 1])) for (i, rows), j in zip(drawn, ends, strict=True)]
    return [*result[:-1], *(Shot(shot.rows, PACE * LAST) for shot in result[-1:])]


def _row(line: Text, console: Console) -> Row:
    line = line.copy()
    line.rstrip()
    base = console.get_style(line.style)  # of the whole line, which its segments leave out
    runs: list[Run] = []
    column = 0
    for segment in line.render(console):
        cells, look = cell_len(segment.text), look_of(base + (segment.style or Style.null()))
        if runs and (look == runs[-1].look or not cells):  # no cells: an accent on what stands before it
            runs[-1] = replace(runs[-1], cells=runs[-1].cells + cells, text=runs[-1].text + segment.text)
        elif cells:
            runs.append(Run(column, cells, segment.text, look))
        column += cells
    return tuple(runs)


def look_of(style: Style) -> Look:
    ink = COLOURS.get(style.color.name, INK) if style.color is not None else INK
    ground = mixed(ink, BACKGROUND, 0.2) if style == STYLES[-1] else None
    if style.dim:
        ink = mixed(ink, BACKGROUND, 0.62)
    return Look(ink, bool(style.bold), bool(style.italic), bool(style.underline), ground)


def mixed(one: Colour, other: Colour, share: float) -> Colour:
    red, green, blue = (round(share * a + (1 - share) * b) for a, b in zip(one, other, strict=True))
    return red, green, blue


def characters(run: Run) -> Iterator[tuple[int, int, str]]:
    """Yield (column, cells, text) of what is placed by itself: shapes, wide characters, and stretches of the rest.

    Shade beside shade is one.
    """
    column = run.column
    for kind, group in groupby(clusters(run.text), key=_kind):
        found = list(group)
        for text in ["".join(found)] if kind in ("rest", SHADE) else found:
            cells = cell_len(text)
            yield column, cells, text
            column += cells


def _kind(character: str) -> str:
    return character if character in SHAPES else "wide" if cell_len(character) > 1 else "rest"


def clusters(text: str) -> list[str]:
    """Characters, those without a width with the one that they belong to."""
    found: list[str] = []
    for character in text:
        if found and cell_len(character) == 0:
            found[-1] += character
        else:
            found.append(character)
    return found


BARS = "▁▂▃▄▅▆▇█"
SHADE, END = "░", "∎"
SHAPES = frozenset(BARS + SHADE + END)
"""Characters that are drawn as shapes: not every font has them, or has them fill their cell."""
