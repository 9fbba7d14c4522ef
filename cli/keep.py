"""`--record FILE`: the events of a command, kept for `dgemma replay`.

A command that has `record_options` and reads its events by `follow` needs nothing else: the file is opened with the
first event and closed with the command.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..core.errors import DgemmaError
from .options import TYPED, option, together

if TYPE_CHECKING:
    from ..core.events import Event
    from ..show.asked import Asked
    from ..show.record import Recorder

_FILE, _FORCE, _EXTEND, _RECORDER, _TOLD = (
    f"{__name__}.{name}" for name in ("file", "force", "extend", "recorder", "told")
)


def _take_force(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    ctx.meta[_FORCE] = value


def _take_file(ctx: click.Context, param: click.Parameter, value: Path | None) -> None:
    if value is not None and not ctx.resilient_parsing:
        from ..show.record import check_path

        check_path(value, force=ctx.meta.get(_FORCE, False))
        ctx.meta[_FILE] = value


def _take_longer(ctx: click.Context, param: click.Parameter, value: Path | None) -> None:
    if value is not None and not ctx.resilient_parsing:
        from ..show.record import check_path

        check_path(value, force=True)  # an earlier record is gone on with
        ctx.meta[_FILE], ctx.meta[_EXTEND] = value, True


record_options = together(
    option(
        "--record", type=click.Path(path_type=Path), metavar="FILE", group="Output", expose_value=False,
        callback=_take_file, help="Keep every pass in FILE; dgemma replay FILE draws it again.",
    ),
    option(
        "--force", is_flag=True, group="Output", expose_value=False, is_eager=True, callback=_take_force,
        help="Write over an earlier record in FILE.",
    ),
)  # fmt: skip


extend_option = option(
    "--record", type=click.Path(path_type=Path), metavar="FILE", group="Output", expose_value=False,
    callback=_take_longer, help="Keep every pass in FILE, line by line; dgemma replay FILE draws it again.",
)  # fmt: skip
"""For a command that may go on with what an earlier run of it has left, unless `force` is given."""


def kept(events: Iterator[Event], asked: Asked | None, title: str | None) -> Iterator[Event]:
    """Return the events, which are written down while they are read, if the command was told so.

    Args:
        asked: what they answer, where they do not say it themselves.
        title: what drawings have above them; by default the command line.
    """
    ctx = click.get_current_context(silent=True)
    if ctx is None or _FILE not in ctx.meta:
        return events
    from ..show.asked import asked_of, known
    from ..show.record import Recorder

    asked = asked_of(events) or asked or known(events, "--record")
    asked = replace(asked, title=title or _command(ctx), model=str(ctx.params.get("model") or asked.model))
    recorder: Recorder | None = ctx.meta.get(_RECORDER)
    if recorder is None:
        extend = ctx.meta.get(_EXTEND, False)
        force = ctx.params.get("force", False) if extend else ctx.meta.get(_FORCE, False)
        recorder = Recorder(ctx.meta[_FILE], force=force, extend=extend)
        ctx.meta[_RECORDER] = recorder
        ctx.call_on_close(partial(_close, ctx, recorder))
    recorder.begin(asked)
    return _writing(events, recorder)


def _writing(events: Iterator[Event], recorder: Recorder) -> Iterator[Event]:
    for event in events:
        recorder.add(event)
        yield event


def lost() -> str | None:
    """Return why nothing more is written down, once: for commands that go on, whose error it then is not."""
    ctx = click.get_current_context(silent=True)
    recorder: Recorder | None = None if ctx is None else ctx.meta.get(_RECORDER)
    if ctx is None or recorder is None or recorder.problem is None or ctx.meta.get(_TOLD):
        return None
    ctx.meta[_TOLD] = True
    return recorder.problem


def _close(ctx: click.Context, recorder: Recorder) -> None:
    """Close the file; what kept it from being whole is the command's error, unless it was told or there is another."""
    recorder.close()
    if recorder.problem is not None and not ctx.meta.get(_TOLD) and sys.exception() is None:
        raise DgemmaError(recorder.problem)


def _command(ctx: click.Context) -> str:
    """Return the command as it was typed, without what says where it is recorded."""
    words: list[str] = []
    skip = False
    for word in ctx.meta.get(TYPED, []):
        if not (skip or word == "--force" or word.startswith("--record")):
            words.append(word)
        skip = word == "--record"
    return f"$ {shlex.join([*ctx.command_path.split(), *words])}"
