"""Which canvases a text with holes is filled on, and what each of them holds.

    prompt: all that is left of the hole  |  canvas: hole, text, hole, text …

A canvas begins at a hole: what is left of it is read as prompt, causally and once, as the model reads whatever it goes
on from. Behind the hole the text that follows is held, with every further hole that has room on the canvas together
with some of the text behind it. What is right of the last of these fills the rest. The next canvas begins at the next
hole, and what has been filled by then is prompt, without filler. A hole that is longer than a canvas goes on in the
next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.canvas import FREE
from .language import Room

BEHIND = 4
"""A further hole shares a canvas if behind it the canvas has room for its text, or a quarter of the canvas of it."""


@dataclass(frozen=True, kw_only=True)
class Laid:
    """A template in tokens: pieces, one more than holes, and the room of each hole."""

    pieces: tuple[tuple[int, ...], ...]
    rooms: tuple[int, ...]
    open: tuple[bool, ...]
    whole: bool
    """Whether all of it stands on one canvas, with what is left of the first hole."""
    length: int
    """Positions of a canvas."""

    @property
    def tokens(self) -> int:
        return sum(map(len, self.pieces)) + sum(self.rooms)


@dataclass(frozen=True, kw_only=True)
class Window:
    """One canvas: what it holds, its holes, and where the text goes on."""

    held: tuple[int, ...]
    """By position; `FREE` in holes."""
    rooms: tuple[Room, ...]
    holes: tuple[int, ...]
    """Of each room, which hole of the template it is."""
    shown: int
    """How many tokens of the piece behind its last hole it holds."""


def window_at(laid: Laid, hole: int, done: int = 0) -> Window:
    """Return the canvas that begins with a hole, of which so many tokens are done."""
    held: list[int] = list(laid.pieces[0]) if laid.whole else []
    rooms, holes = [], []
    take = min(laid.rooms[hole] - done, laid.length)
    while True:
        rooms.append(Room(start=len(held), length=take, open=laid.open[hole]))
        holes.append(hole)
        held += [FREE] * take
        piece, left = laid.pieces[hole + 1], laid.length - len(held)
        if hole + 1 < len(laid.rooms):
            behind = min(len(laid.pieces[hole + 2]), laid.length // BEHIND)
            if len(piece) + laid.rooms[hole + 1] + behind <= left:
                held += piece
                hole += 1
                take = laid.rooms[hole]
                continue
        # What remains of a hole that goes on stands between it and its text.
        shown = 0 if done + take < laid.rooms[hole] else min(len(piece), left)
        held += piece[:shown]
        return Window(held=tuple(held), rooms=tuple(rooms), holes=tuple(holes), shown=shown)


def next_start(laid: Laid, window: Window, done: int, ended: bool) -> tuple[int, int] | None:
    """Return the hole that the next canvas begins with, and how many of its tokens are done; None after the last.

    `done` tokens of the window's first hole were done before it; `ended` says whether its last hole came back short.
    """
    last, room = window.holes[-1], window.rooms[-1]
    total = room.length + (done if len(window.holes) == 1 else 0)
    if total < laid.rooms[last] and not ended:
        return last, total
    return (last + 1, 0) if last + 1 < len(laid.rooms) else None


def fits_whole(pieces: Sequence[Sequence[int]], rooms: Sequence[int], length: int) -> bool:
    """Whether a template has room on one canvas."""
    return sum(map(len, pieces)) + sum(rooms) <= length
