"""`dgemma edit`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..core.errors import DgemmaError, shown
from .exact import Exact, read_exact
from .fill import hole_options
from .keep import record_options
from .options import Command, live_option, model_options, option, shown_options
from .process import write_bytes

if TYPE_CHECKING:
    from ..canvas.edit import Edited


class Range(click.ParamType):
    """Two numbers: 10:24."""

    name = "range"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        first, colon, last = str(value).partition(":")
        if not (first.isdecimal() and (last.isdecimal() or not colon)) or len(str(value)) > 30:
            self.fail(f"{value!r} is not of the form 10:24", param, ctx)
        return int(first), int(last if colon else first)


@click.command(cls=Command, short_help="Rewrite a region of a file.")
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
@option("--lines", type=Range(), metavar="A:B", group="Region", help="From line A to line B, counted from 1.")
@option("--span", type=Range(), metavar="A:B", group="Region", help="From character A up to character B, from 0.")
@option("--instruction", "-i", metavar="TEXT", group="Region", help="How it is to be changed.")
@option(
    "--strength", type=click.FloatRange(0, 1), default=0.8, show_default=True, metavar="S", group="Region",
    help="How much of the old text is lost to noise first: 0 keeps it as it is, 1 forgets it.",
)  # fmt: skip
@hole_options
@model_options
@option("--write", is_flag=True, group="Output", help="Replace the file, whole or not at all.")
@option("--check", is_flag=True, group="Output", help="Show what would change, and exit with 1 if anything would.")
@live_option
@record_options
@shown_options
def edit(
    file: Path, lines: tuple[int, int] | None, span: tuple[int, int] | None, instruction: str | None, strength: float,
    write: bool, check: bool, model: str, revision: str | None, backend: str, device: str, dtype: str, live: bool,
    quiet: bool, stats: bool, **options: Any,
) -> None:  # fmt: skip
    """Rewrite a region of FILE (- is stdin) under an instruction, and show what changes as a unified diff.

    Everything outside the region stays as it is, encoding, byte order mark and line ends included. Without --write
    nothing is written. A file that another process changed meanwhile is left alone.

    \b
    dgemma edit parser.py --lines 10:24 --instruction 'Use a regular expression.' --write
    """
    if write and check:
        raise click.UsageError("--check only shows: leave it out, or --write")
    if write and str(file) == "-":
        raise click.UsageError("--write needs a file, not stdin")
    from ..checkpoints.files import check_target

    if write:
        check_target(_target(file))
    source = read_exact(file)
    from ..canvas.edit import region

    region(source.text, lines, span)  # before a model is loaded
    from .output import consoles, footer, load_model, put

    out, errors = consoles(quiet=quiet)
    loaded = load_model(errors, model, revision=revision, backend=backend, device=device, dtype=dtype)
    result = _edited(
        loaded, source.text, out, errors, live=live, lines=lines, span=span, instruction=instruction, strength=strength,
        **options,
    )  # fmt: skip
    if write and result.changed:
        write_over(file, source, source.encoded(result.text))
    diff = result.diff("stdin" if str(file) == "-" else file.name)
    if out.is_terminal:
        from ..show.frame import printable

        put(out, printable(diff))
    else:
        write_bytes(diff.encode())
    if result.stats is not None:
        from ..core.events import Done

        footer(errors, Done(finish_reason="stop", stats=result.stats), full=stats)
    if check and result.changed:
        raise click.exceptions.Exit(1)


def _edited(model: Any, text: str, out: Any, errors: Any, *, live: bool, **options: Any) -> Edited:
    """Run an edit with its canvases drawn on a terminal."""
    from ..show.asked import known
    from .canvases import canvas_sink
    from .sinks import follow

    events = model.stream_edit(text, **options)
    if events.job is not None:
        follow(events, canvas_sink(out, errors, known(events, "edit"), live=live))
    return events.finished()


def _target(file: Path) -> Path:
    """Return the file that a link leads to: it is replaced, and the link stays."""
    return Path(os.path.realpath(file))


def write_over(file: Path, source: Exact, data: bytes) -> None:
    """Replace a file that still holds what was read from it: in one step, and with its permissions.

    Raises:
        DgemmaError: it was changed meanwhile, or cannot be written.
    """
    from ..checkpoints.files import replace_when_done

    target = _target(file)
    with replace_when_done(target) as new:
        new.write(data)
        with _named(file):  # as late as can be: only the renaming follows
            if read_exact(target).data != source.data:
                raise DgemmaError("it was changed while it was being edited; nothing was written, edit it again")


@contextmanager
def _named(file: Path) -> Iterator[None]:
    try:
        yield
    except (DgemmaError, click.ClickException) as error:
        said = error.message if isinstance(error, click.ClickException) else str(error)
        raise DgemmaError(said if shown(file) in said else f"{shown(file)}: {said}") from None
