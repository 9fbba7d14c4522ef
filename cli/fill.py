"""`dgemma fill`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .exact import Exact, read_exact
from .generate import messages
from .keep import record_options
from .options import (
    Command,
    generate_option,
    live_option,
    model_options,
    option,
    raw_option,
    shown_options,
    specials_option,
    system_option,
    together,
)
from .process import write_bytes

if TYPE_CHECKING:
    from rich.console import Console

    from ..canvas.candidate import Candidate, Filled
    from ..canvas.holes import Hole

_PATH = click.Path(path_type=Path, allow_dash=True)

hole_options = together(
    option(
        "--max-new-tokens", type=click.IntRange(min=1), metavar="N", group="Length and seed",
        show_default="a quarter of a canvas", help="At most N tokens in a hole of any length.",
    ),
    *(
        generate_option(name)
        for name in (
            "seed", "canvas_length", "steps", "schedule_steps", "temperature", "greedy", "t_max", "t_min",
            "entropy_bound", "confidence", "stability",
        )
    ),
)  # fmt: skip


class Lengths(click.ParamType):
    """Numbers and ranges: 4,8 or 1-12; or none."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if value == "none":
            return []
        found: list[int] = []
        for part in str(value).split(","):
            first, _, last = part.partition("-")
            if not (first.isdecimal() and (last or first).isdecimal()) or len(part) > 12:
                self.fail(f"{value!r} is not of the form 4,8,16 or 1-12", param, ctx)
            found += range(int(first), int(last or first) + 1)
        if not found or min(found) < 1 or len(found) > 1024:
            self.fail(f"{value!r} names no length, or one below 1, or more than 1,024 of them", param, ctx)
        return found


@click.command(cls=Command, short_help="Fill the holes of a text.")
@click.argument("text", required=False)
@option("--file", "-f", type=_PATH, metavar="PATH", group="Text", help="Read TEXT from a file; - is stdin.")
@option(
    "--prefix-file", type=_PATH, metavar="PATH", group="Text", help="What is left of a hole, as it stands; - is stdin."
)
@option(
    "--suffix-file", type=_PATH, metavar="PATH", group="Text", help="What is right of it, as it stands; - is stdin."
)
@option(
    "--marker", metavar="TEXT", default="<fill>", show_default=True, group="Text",
    help="What stands for a hole. Before its last character a colon and a number of tokens may stand.",
)  # fmt: skip
@option(
    "--prompt", "-p", metavar="TEXT", group="Text", help="What TEXT is the answer to. Without it, TEXT is a document."
)
@system_option
@raw_option
@specials_option
@option(
    "--candidates", "-n", "--n", "n", type=click.IntRange(1, 1024), metavar="N", group="Candidates",
    help="Fill N times, of seeds that count up; the likeliest goes to stdout, all of them with their scores to stderr.",
)  # fmt: skip
@option(
    "--lengths", type=Lengths(), metavar="A-B|A,B,..|none", group="Text",
    show_default="up to 32, as far as there is room",
    help="Numbers of tokens that a hole of any length may have: the text behind it tells which. none: left open, and "
    "what remains of it is filled up.",
)  # fmt: skip
@generate_option("stop")
@hole_options
@model_options
@live_option
@record_options
@option(
    "--json", "as_json", is_flag=True, group="Output", help="A line of JSON for each candidate, the likeliest first."
)
@shown_options
def fill(
    text: str | None, file: Path | None, prefix_file: Path | None, suffix_file: Path | None, marker: str,
    prompt: str | None, system: str | None, n: int | None, lengths: list[int] | None, model: str, revision: str | None,
    backend: str, device: str, dtype: str, live: bool, as_json: bool, quiet: bool, stats: bool, **options: Any,
) -> None:  # fmt: skip
    """Fill the holes of TEXT, of --file or of what comes in on stdin: <fill>, or <fill:12> for 12 tokens.

    What goes to stdout is the whole text, byte for byte what was given outside its holes. <fill:> is the text <fill>.

    \b
    dgemma fill --prompt '.3.1 .2.. .... ...4' $'<fill:4>\\n1243\\n<fill:4>\\n2134'
    dgemma fill --file half_written.py > whole.py
    """
    if system is not None and (prompt is None or options["raw"]):
        raise click.UsageError("--system stands before --prompt in the chat template: give --prompt, and no --raw")
    if options["specials"] and prompt is None and options["raw"]:
        raise click.UsageError("--raw is of --prompt; for a document --specials says it all")
    given, source = _given(text, file, prefix_file, suffix_file)
    from .output import consoles, footer, load_model, put_words

    out, errors = consoles(quiet=quiet)
    loaded = load_model(errors, model, revision=revision, backend=backend, device=device, dtype=dtype)
    asked = prompt if prompt is None or system is None else messages(system, prompt)
    if n is None:
        events = loaded.stream_fill(given, asked, marker=marker, lengths=lengths, **options)
        found = [_followed(events, out, errors, live=live)]
    else:
        found = loaded.fill(given, asked, n=n, marker=marker, lengths=lengths, **options)
    if as_json:
        _tell_json(found)
    elif out.is_terminal:
        _show(out, found[0].text)
    else:
        write_bytes(source.encoded(found[0].text))
    if n is not None and not as_json:
        for one in found:
            fillings = " ".join(repr(hole.text) for hole in one.holes)
            put_words(errors, f"{one.score:.3f}  seed {one.seed}  {fillings}")
    if stats or not as_json:
        from ..core.events import Done

        footer(errors, Done(finish_reason="stop", stats=found[0].stats), full=stats)


def _given(
    text: str | None, file: Path | None, prefix: Path | None, suffix: Path | None
) -> tuple[str | list[str | Hole], Exact]:  # fmt: skip
    """Return the text with holes, and how it was written."""
    sides = [one for one in (prefix, suffix) if one is not None]
    if bool(sides) + (text not in (None, "-")) + (file is not None) > 1:
        raise click.UsageError("give TEXT, --file, or --prefix-file and --suffix-file: one of them")
    if sides:
        if [str(one) for one in sides] == ["-", "-"]:
            raise click.UsageError("--prefix-file and --suffix-file cannot both be stdin")
        from ..canvas.holes import Hole

        left, right = (read_exact(one) if one is not None else Exact(text="", data=b"") for one in (prefix, suffix))
        kept = left if prefix is not None else right
        return [left.text, Hole(), right.text], kept
    if file is not None:
        source = read_exact(file)
    elif text is not None and text != "-":
        try:
            typed = text.encode(errors="surrogateescape").decode()
        except UnicodeDecodeError as error:
            raise click.ClickException(f"TEXT: not UTF-8 (byte {error.start})") from None
        source = Exact(text=typed, data=b"")
    elif sys.stdin is None or (text is None and sys.stdin.isatty()):
        raise click.UsageError("no text: give TEXT, --file PATH, or pipe text in")
    else:
        source = read_exact(Path("-"))
    return source.text, source


def _followed(events: Candidate, out: Console, errors: Console, *, live: bool) -> Filled:
    """Run a fill with its canvases drawn on a terminal, and its progress elsewhere."""
    from ..show.asked import known
    from .canvases import canvas_sink
    from .sinks import follow

    follow(events, canvas_sink(out, errors, known(events, "fill"), live=live))
    return events.finished()


def _tell_json(found: list[Filled]) -> None:
    from .sinks import write_line

    for one in found:
        write_line(asdict(one) | {"stats": one.stats.to_dict()})


def _show(out: Console, text: str) -> None:
    from ..show.frame import printable
    from .output import put

    put(out, printable(text) + ("" if text.endswith("\n") else "\n"))
