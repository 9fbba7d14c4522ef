"""`dgemma replay`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import Command, option

if TYPE_CHECKING:
    from rich.console import Console

    from ..show.recording import Recording

QUICK = 1.0
"""Seconds of a replay in which nobody saw much."""

_path = click.Path(path_type=Path)


@click.command(cls=Command, short_help="Draw a recording again.")
@click.argument("record", type=_path, metavar="FILE")
@option(
    "--speed", type=click.FloatRange(min=0, min_open=True), metavar="X", group="On the terminal",
    help="So many times as fast as it was recorded.  [default: 1]",
)  # fmt: skip
@option(
    "--pace", type=click.FloatRange(min=0), metavar="SECONDS", group="On the terminal",
    help="Show every pass so long, instead.",
)  # fmt: skip
@option(
    "--step", is_flag=True, group="On the terminal",
    help="Go from pass to pass by keys: space or → on, ← back, q leaves.",
)  # fmt: skip
@option("--quiet", "-q", is_flag=True, group="On the terminal", help="Say nothing on stderr but errors.")
def replay(record: Path, speed: float | None, pace: float | None, step: bool, quiet: bool) -> None:
    """Draw FILE, which --record made, as if the model wrote it once more; the model is not needed.

    Off a terminal the text alone is written, as dgemma generate does.

    \b
    dgemma generate '.3.1 .2.. .... ...4' --record run.jsonl
    dgemma replay run.jsonl --step
    """
    if sum([speed is not None, pace is not None, step]) > 1:
        raise click.UsageError("--speed, --pace and --step are three ways to go through it: give one")
    from ..show.recording import replay as read
    from .output import consoles, note

    recording = read(record)
    out, errors = consoles(quiet=quiet)
    moves = out.is_terminal and not out.is_dumb_terminal
    if step:
        if not moves or sys.stdin is None or not sys.stdin.isatty():
            raise click.UsageError("--step draws on a terminal and reads keys from it: stdin or stdout is none")
        from .steps import walk

        walk(recording, out)
    else:
        lasted = _play(recording, out, errors, speed=speed, pace=pace)
        if moves and speed is None and pace is None and lasted < QUICK:
            note(errors, f"that was {lasted:.2f} s, as it was recorded; --pace 0.3, or --step, shows every pass")
    if recording.cut is not None:
        note(errors, recording.cut)


def _play(
    recording: Recording, out: Console, errors: Console, *, speed: float | None, pace: float | None
) -> float:  # fmt: skip
    """Show every turn → how long that was to take, in seconds."""
    from ..show.frame import printable
    from ..show.pacing import delays
    from ..show.terminal import FAINT
    from .output import put
    from .sinks import choose_sink

    lasted = 0.0
    for turn in recording.turns:
        if out.is_terminal and turn.asked.title:
            put(out, f"{printable(turn.asked.title)}\n", FAINT)
        with choose_sink(out, errors, turn.asked, live=True) as sink:
            for event, seconds in delays(turn, speed=speed or 1.0, pace=pace):
                if out.is_terminal:
                    sink.wait(seconds)
                    lasted += seconds
                sink.feed(event)
    return lasted
