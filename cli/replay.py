"""`dgemma replay`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from ..core.errors import DgemmaError, shown
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
    "--speed", type=click.FloatRange(min=0, min_open=True), metavar="X", group="Pace",
    help="So many times as fast as it was recorded. By default 1; in pictures, --pace 0.45.",
)  # fmt: skip
@option(
    "--pace", type=click.FloatRange(min=0), metavar="SECONDS", group="Pace",
    help="Show every pass so long, instead.",
)  # fmt: skip
@option(
    "--step", is_flag=True, group="Pace",
    help="Go from pass to pass by keys: space or → on, ← back, q leaves.",
)  # fmt: skip
@option(
    "--svg", type=_path, metavar="FILE", group="As a file", help="Draw a picture that plays by itself, in pages too.",
)  # fmt: skip
@option("--gif", type=_path, metavar="FILE", group="As a file", help="The same as a GIF; needs dgemma[gif].")
@option(
    "--html", type=_path, metavar="FILE", group="As a file",
    help="Make a page with a slider over the passes; it needs no network and no server.",
)  # fmt: skip
@option(
    "--columns", type=click.IntRange(20, 400), default=72, show_default=True, metavar="N", group="As a file",
    help="Characters in a row of a picture.",
)  # fmt: skip
@option(
    "--rows", type=click.IntRange(8, 400), default=40, show_default=True, metavar="N", group="As a file",
    help="Rows of a picture, at most.",
)  # fmt: skip
@option("--font", type=_path, metavar="FILE", group="As a file", help="The GIF's font, instead of a terminal's.")
@option("--title", metavar="TEXT", group="As a file", help="What stands above, instead of the command.")
@option("--force", is_flag=True, group="As a file", help="Write over files of these names.")
@option("--quiet", "-q", is_flag=True, group="Output", help="Say nothing on stderr but errors.")
def replay(
    record: Path, speed: float | None, pace: float | None, step: bool, svg: Path | None, gif: Path | None,
    html: Path | None, columns: int, rows: int, font: Path | None, title: str | None, force: bool, quiet: bool,
) -> None:  # fmt: skip
    """Draw FILE, which --record made, as if the model wrote it once more; the model is not needed.

    Off a terminal the text alone is written, as dgemma generate does. With --svg, --gif or --html nothing is shown, and
    files are written.

    \b
    dgemma generate '.3.1 .2.. .... ...4' --record run.jsonl
    dgemma replay run.jsonl --step
    dgemma replay run.jsonl --svg run.svg --html run.html
    """
    if sum([speed is not None, pace is not None, step]) > 1:
        raise click.UsageError("--speed, --pace and --step are three ways to go through it: give one")
    wanted = {"svg": svg, "gif": gif, "html": html}
    if step and any(wanted.values()):
        raise click.UsageError("--step goes through it on the terminal: leave --svg, --gif and --html out")
    from ..show.recording import replay as read
    from ..show.recording import retitled
    from .output import consoles, note

    for path in filter(None, wanted.values()):
        _check(path, record, force=force)
    recording = read(record)
    if title is not None:
        recording = retitled(recording, title)
    out, errors = consoles(quiet=quiet)
    moves = out.is_terminal and not out.is_dumb_terminal
    if any(wanted.values()):
        timing = {"speed": speed, "pace": pace}
        _write(errors, recording, wanted, {"columns": columns, "rows": rows, "font": font, **timing})
    elif step:
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


def _check(path: Path, record: Path, *, force: bool) -> None:
    """See, before the work, that a file can be written."""
    from ..checkpoints.files import check_target

    if check_target(path) is None:
        return
    if path.exists() and record.exists() and path.samefile(record):
        raise DgemmaError(f"{shown(path)}: is the recording itself; choose another name")
    if not force:
        raise DgemmaError(f"{shown(path)}: is there already; choose another name, or write over it with --force")


def _write(
    errors: Console, recording: Recording, wanted: dict[str, Path | None], options: dict[str, Any]
) -> None:  # fmt: skip
    """Write the files that are wanted, and say how large they are."""
    from ..checkpoints.files import write_bytes
    from ..show import gif, html, svg
    from ..show.picture import shots
    from .output import Wait, put_words, size

    columns, font = options["columns"], options.pop("font")
    title = recording.turns[0].asked.title or "A canvas being denoised, pass by pass"
    with Wait(errors, "drawing"):
        drawn = [] if wanted["svg"] is wanted["gif"] is None else shots(recording, **options)
        if not drawn and (wanted["svg"] or wanted["gif"]):
            raise DgemmaError(f"{shown(recording.path)}: not one pass in it, so there is nothing to draw")
        made: dict[str, bytes] = {}
        if wanted["svg"] is not None:
            made["svg"] = svg.draw(drawn, columns=columns, title=title).encode()
        if wanted["gif"] is not None:
            made["gif"] = gif.draw(drawn, columns=columns, font=font)
        if wanted["html"] is not None:
            made["html"] = html.page(recording).encode(errors="replace")
    for kind, data in made.items():
        path = cast("Path", wanted[kind])
        write_bytes(path, data)
        frames = "" if kind == "html" else f"{len(drawn)} frames, "
        put_words(errors, f"{path}: {frames}{size(len(data))}")
