"""What is said on stderr beside the answer: progress, notes and figures."""

from __future__ import annotations

import math
import sys
import textwrap
import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.segment import Segment, Segments
from rich.style import Style
from rich.table import Column
from rich.text import Text

from ..core.events import Done
from ..show.frame import printable
from ..show.terminal import FAINT

if TYPE_CHECKING:
    from ..runtime import DiffusionGemma

PATIENCE = 0.4
"""Seconds that work may last before its progress is shown."""


class Wait(AbstractContextManager["Wait"]):
    """A progress bar on stderr that appears only on a terminal, and only if what it stands for lasts."""

    def __init__(self, console: Console, what: str) -> None:
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}", markup=False, table_column=_one_line()),
            BarColumn(bar_width=max(4, min(24, console.width // 4))),
            TextColumn("{task.fields[figure]}", markup=False, table_column=_one_line()),
            console=console, transient=True, redirect_stdout=False,
        )  # fmt: skip
        self._task = self._progress.add_task(printable(what), total=None, figure="")
        self._lock = threading.Lock()
        self._over = not console.is_terminal or console.is_dumb_terminal
        self._timer = threading.Timer(PATIENCE, self._begin)
        self._timer.daemon = True
        if not self._over:
            self._timer.start()

    def _begin(self) -> None:
        with self._lock:
            if not self._over:
                self._progress.start()

    def update(self, done: int, total: int, figure: str = "") -> None:
        self._progress.update(self._task, completed=done, total=total, figure=figure)

    def close(self) -> None:
        self._timer.cancel()
        with self._lock:
            if not self._over:
                self._over = True
                self._progress.stop()

    def __exit__(self, *exc: object) -> None:
        self.close()


def _one_line() -> Column:
    return Column(no_wrap=True, overflow="ellipsis")


def load_model(
    console: Console, name: str, *, revision: str | None = None, backend: str, device: str, dtype: str,
    rows: int | None = None,
) -> DiffusionGemma:  # fmt: skip
    """Load a model with its progress on stderr."""
    import dgemma

    from .. import backends
    from ..checkpoints.checkpoint import resolve

    backends.choose(backend)  # before a download of many gigabytes
    path = resolve(name, revision=revision)  # which draws bars of its own
    with Wait(console, f"loading {name}") as wait:

        def progress(done: int, total: int) -> None:
            wait.update(done, total, f"{size(done)} of {size(total)}")

        return dgemma.load(path, backend=backend, device=device, dtype=dtype, rows=rows, progress=progress)


def consoles(*, quiet: bool = False) -> tuple[Console, Console]:
    """What is written to stdout and to stderr, if not `quiet`; made late, so that redirected streams are found."""
    return Console(file=sys.stdout, highlight=False), Console(file=sys.stderr, highlight=False, quiet=quiet)


def put(console: Console, text: str, style: Style | None = None) -> None:
    """Write text as it stands: no wrapping, no markup."""
    if text:
        console.print(Segments([Segment(text, style)]), crop=False, soft_wrap=True)
        console.file.flush()


def footer(console: Console, done: Done, *, full: bool = False) -> None:
    """Say the figures of one generation: on a terminal the first of them, one line; `full`, all, one a line."""
    if full:
        rows = figures(done)
        for name, value in rows:
            put_words(console, f"{name:<{max(len(name) for name, _ in rows)}}  {value}")
    else:
        put_words(console, summary(done, console.width if console.is_terminal else None))


def put_lines(console: Console, lines: Iterable[str], *, indent: int = 0) -> None:
    """Write lines of a report; on a terminal wrapped between words, what goes on a little to the right."""
    for line in map(printable, lines):
        if console.is_terminal and len(line) > console.width - indent:
            hang = " " * (len(line) - len(line.lstrip()) + 2)
            room = max(20, console.width - indent)
            wrapped = textwrap.wrap(
                line, room, subsequent_indent=hang, break_long_words=False, break_on_hyphens=False,
                drop_whitespace=True, replace_whitespace=False,
            )  # fmt: skip
            line = f"\n{' ' * indent}".join(wrapped)
        console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)


def put_words(console: Console, text: str, style: Style = FAINT) -> None:
    """Write a remark: wrapped between words on a terminal, on one line elsewhere."""
    console.print(Text(printable(text), style), soft_wrap=not console.is_terminal)


def note(console: Console, text: str) -> None:
    """Write what a user might wonder about."""
    put_words(console, f"dgemma: note: {text}")


def summary(done: Done, width: int | None = None) -> str:
    """Return the figures on one line; of those that do not fit the width, the less telling are left out."""
    stats = done.stats
    parts = [  # as they stand, with what is kept longest first
        (5, f"prompt {stats.prompt_tokens:,} tokens{_rate(stats.prefill_tokens_per_second)}"),
        (0, f"wrote {stats.emitted_tokens:,}{_rate(stats.tokens_per_second)}"),
        (2, _figure(stats.steps_per_canvas, "steps/canvas")),
        (3, _figure(stats.tokens_per_forward, "tokens/forward")),
        (4, "" if stats.first_draft_seconds is None else f"first draft {significant(stats.first_draft_seconds)} s"),
        (6, f"peak {size(stats.peak_memory_bytes)}"),
        (1, "" if done.finish_reason == "stop" else "cut at the token budget"),
    ]
    parts = [part for part in parts if part[1]]
    while width is not None and len(parts) > 1 and len(", ".join(text for _, text in parts)) > width:
        parts.remove(max(parts))
    return ", ".join(text for _, text in parts)


def figures(done: Done) -> list[tuple[str, str]]:
    """Return every figure of one generation, named."""
    stats = done.stats
    rows: list[tuple[str, float | None, str]] = [
        ("prompt read in", stats.prefill_seconds, "s"),
        ("first draft after", stats.first_draft_seconds, "s"),
        ("first text after", stats.first_text_seconds, "s"),
        ("all in", stats.seconds, "s"),
        ("prompt tokens/s", stats.prefill_tokens_per_second, ""),
        ("written tokens/s", stats.tokens_per_second, ""),
        ("steps/canvas", stats.steps_per_canvas, ""),
        ("tokens/forward", stats.tokens_per_forward, ""),
    ]
    return [
        ("prompt", f"{stats.prompt_tokens:,} tokens"),
        ("written", f"{stats.emitted_tokens:,} tokens"),
        ("ended by", "end or stop string" if done.finish_reason == "stop" else "the token budget"),
        (
            "passes",
            f"{stats.steps:,} over {_many(stats.canvases, 'canvas', 'canvases')}, {stats.encode_passes:,} to read",
        ),
        *((name, f"{significant(value)} {unit}".rstrip()) for name, value, unit in rows if value is not None),
        ("peak memory", size(stats.peak_memory_bytes)),
    ]


def _many(count: int, one: str, more: str) -> str:
    return f"{count:,} {one if count == 1 else more}"


def _rate(value: float | None) -> str:
    return "" if value is None else f" at {significant(value)}/s"


def _figure(value: float | None, unit: str) -> str:
    return "" if value is None else f"{significant(value)} {unit}"


def significant(value: float) -> str:
    """Three significant digits, and no exponent."""
    if not math.isfinite(value):
        return "?"
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{round(value, digits):,.{max(0, min(digits, 6))}f}"


def size(count: float) -> str:
    """Bytes in the unit that memory is sold in: 1.5 GiB."""
    unit = "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.{0 if unit == 'B' or (unit != 'GiB' and count >= 10) else 1}f} {unit}"
