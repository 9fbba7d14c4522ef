"""Going through a recording by keys, pass by pass."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from ..core.events import Commit, Draft
from ..show.frame import printable
from ..show.recording import Recording
from ..show.scene import Scene
from ..show.terminal import FAINT, CanvasLive
from .output import put

_FAR = 1 << 31
_KEYS = {
    " ": 1, "\r": 1, "\n": 1, "l": 1, "n": 1, "\x1b[C": 1, "\x1bOC": 1,
    "h": -1, "b": -1, "p": -1, "\x7f": -1, "\x08": -1, "\x1b[D": -1, "\x1bOD": -1,
    "g": -_FAR, "\x1b[H": -_FAR, "\x1bOH": -_FAR, "\x1b[1~": -_FAR,
    "G": _FAR, "\x1b[F": _FAR, "\x1bOF": _FAR, "\x1b[4~": _FAR,
}  # fmt: skip
"""What a key adds to the number of the pass."""
_KEY = re.compile(r"\x1b[\[O][0-9;]*[~A-Za-z]|.", re.DOTALL)
_LEAVES = ("q", "Q", "\x1b")


class Steps:
    """A recording at one of its passes, with the keys that lead to others."""

    def __init__(self, recording: Recording, encoding: str) -> None:
        self._encoding = encoding
        self._passes = [
            (turn, i + 1) for turn in recording.turns for i, one in enumerate(turn.events) if isinstance(one, Draft)
        ]
        self._at = 0
        self.widths: list[int] = []

    def __len__(self) -> int:
        return len(self._passes)

    def move(self, by: int) -> None:
        self._at = min(max(self._at + by, 0), len(self) - 1)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        turn, stop = self._passes[self._at]
        scene = Scene(turn.asked, self._encoding)
        for event in turn.events[:stop]:
            scene.feed(event)
        keys = "space on, b back, q leaves"
        lines = scene.lines(console, options.max_width, options.size.height - 2)
        lines.append(Text(f"pass {self._at + 1} of {len(self)}: {keys}", FAINT))
        lines[-1].truncate(options.max_width)
        self.widths = [line.cell_len for line in lines]
        yield Text("\n", end="").join(lines)


def walk(recording: Recording, out: Console) -> None:
    """Show a pass at a time until the user leaves; then the text, as it was written."""
    steps = Steps(recording, out.encoding)
    if len(steps):
        with _pressed() as pressed, CanvasLive(steps, out, redirect_stderr=False) as live:
            while True:
                live.draw(now=True)
                try:
                    keys = _KEY.findall(pressed())
                except (KeyboardInterrupt, EOFError):
                    break
                if not keys or any(key in _LEAVES for key in keys):
                    break
                for key in keys:
                    steps.move(_KEYS.get(key, 0))
    for turn in recording.turns:
        text = "".join(one.text for one in turn.events if isinstance(one, Commit))
        put(out, printable(text) + ("" if text.endswith("\n") else "\n"))


@contextmanager
def _pressed() -> Iterator[Callable[[], str]]:
    """Yield what waits for keys, and returns all that were pressed since it was called last."""
    try:
        import termios
        import tty
    except ImportError:  # no Unix
        yield click.getchar
        return
    number = sys.stdin.fileno()
    before = termios.tcgetattr(number)
    # For the whole walk: whoever switches back and forth, as click.getchar does, loses what is typed ahead.
    tty.setcbreak(number, termios.TCSADRAIN)
    try:
        yield lambda: os.read(number, 256).decode(errors="replace")
    finally:
        termios.tcsetattr(number, termios.TCSADRAIN, before)
