"""Options that several commands share, and where a prompt comes from."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import click

from ..backends import DTYPES, MODULES
from ..checkpoints.files import read_bytes

Command_ = TypeVar("Command_", bound=Callable[..., Any])

_STREAMS = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")
"""What shells put for `<(command)`: pipes that are being written. Other pipes may have nobody at their other end."""

LARGEST_PROMPT = 64 << 20
"""Bytes read of a file or of stdin: no context holds more, and `< /dev/zero` has to end somewhere."""


class Option(click.Option):
    """An option that help lists under a heading."""

    def __init__(self, *names: Any, group: str = "Options", **attributes: Any) -> None:
        super().__init__(*names, **attributes)
        self.group = group


class Command(click.Command):
    """A command whose help lists options by group, in the order in which each group comes first."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        rest: list[tuple[str, str]] = []
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and isinstance(param, click.Option):
                (groups.setdefault(param.group, []) if isinstance(param, Option) else rest).append(record)
        for name, records in [*groups.items(), ("Options", rest)]:
            with formatter.section(name):
                formatter.write_dl(records)


def option(*names: str, group: str, **attributes: Any) -> Callable[[Command_], Command_]:
    return click.option(*names, cls=Option, group=group, **attributes)


SAMPLING = "Sampling (by default as the checkpoint says)"


def _together(*options: Callable[[Any], Any]) -> Callable[[Command_], Command_]:
    """One decorator from several; help lists them in the order given."""
    return lambda command: reduce(lambda wrapped, option: option(wrapped), reversed(options), command)


ways_options = _together(
    option(
        "--backend", type=click.Choice(["auto", *MODULES]), default="auto", show_default=True, group="Model",
        help="What computes. auto: mlx on Apple silicon, torch elsewhere.",
    ),
    option(
        "--device", default="auto", show_default=True, metavar="NAME", group="Model",
        help="Where it computes: cpu, cuda, cuda:N (torch) or gpu (mlx). auto: the first GPU, or else the CPU.",
    ),
    option(
        "--dtype", type=click.Choice(["auto", *DTYPES]), default="auto", show_default=True, group="Model",
        help="Width of the arithmetic. auto: float32 for small models, as stored for large ones.",
    ),
)  # fmt: skip

model_options = _together(
    option(
        "--model", "-m", default="nano", show_default=True, metavar="NAME", group="Model",
        help="'nano' (ships with dgemma), a checkpoint folder, or a Hugging Face id, which is downloaded once.",
    ),
    option(
        "--revision", metavar="NAME", group="Model", help="Branch, tag or commit of a model on the Hugging Face hub.",
    ),
    ways_options,
)  # fmt: skip

budget_options = _together(
    option(
        "--max-new-tokens", "-n", type=click.IntRange(min=1), metavar="N", group="Length and seed",
        show_default="the checkpoint's",
        help="Write at most N tokens, thinking included; 256 where the checkpoint does not say.",
    ),
    option(
        "--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", group="Length and seed",
        help="Same seed, same text: run to run and, in float32, on every backend.",
    ),
)  # fmt: skip

sampling_options = _together(
    budget_options,
    option(
        "--steps", type=click.IntRange(min=1), metavar="N", group=SAMPLING,
        help="Cap on the denoising passes of one canvas; most stop long before it.",
    ),
    option(
        "--schedule-steps", type=click.IntRange(min=1), metavar="N", group=SAMPLING,
        help="Passes over which the temperature falls; apart from --steps, so that a lower cap changes nothing else.",
    ),
    option(
        "--temperature", "-t", type=click.FloatRange(min=0), metavar="T", group=SAMPLING,
        help="Multiplies the checkpoint's temperature schedule: 1 is as it stands, 0 is --greedy.",
    ),
    option(
        "--greedy", is_flag=True, group=SAMPLING,
        help="Accept the most probable token everywhere, instead of one that is drawn.",
    ),
    option(
        "--t-max", type=click.FloatRange(min=0), metavar="T", group=SAMPLING,
        help="Temperature that the schedule starts from.",
    ),
    option(
        "--t-min", type=click.FloatRange(min=0), metavar="T", group=SAMPLING,
        help="Temperature that it falls towards. One of the two takes the other with it where they would cross.",
    ),
    option(
        "--entropy-bound", type=click.FloatRange(min=0), metavar="NATS", group=SAMPLING,
        help="How unsure the tokens accepted in one pass may be, taken together. Higher: fewer passes, more mistakes.",
    ),
    option(
        "--confidence", type=click.FloatRange(min=0), metavar="NATS", group=SAMPLING,
        help="A canvas that no longer changes is finished once its mean entropy is below this; 0 takes every step.",
    ),
    option(
        "--stability", type=click.IntRange(min=0), metavar="N", group=SAMPLING,
        help="How many passes in a row must leave a canvas as it was before it is finished.",
    ),
    option(
        "--stop", multiple=True, metavar="TEXT", group="Length and seed",
        help="End the answer where TEXT would begin. May be given several times; in bash $'\\n' is a line break.",
    ),
    option(
        "--thinking/--no-thinking", default=False, show_default=True, group="Prompt",
        help="Let the model think first. What it thinks is shown apart from the answer.",
    ),
)  # fmt: skip

system_option = option(
    "--system", metavar="TEXT", group="Prompt", help="System prompt: what the model is told before everything else.",
)  # fmt: skip

specials_option = option(
    "--specials", is_flag=True, group="Prompt",
    help="Special tokens spelled out in a message are those tokens. Otherwise nobody can type one.",
)  # fmt: skip

shown_options = _together(
    option("--quiet", "-q", is_flag=True, group="Output", help="Say nothing on stderr but errors."),
    option("--stats", is_flag=True, group="Output", help="Say every figure on stderr, one a line."),
)

live_option = option(
    "--live/--no-live", default=True, show_default=True, group="Output",
    help="Draw the canvas while it is denoised, if stdout is a terminal.",
)  # fmt: skip


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """Return the prompt from the argument, a file, or stdin; one line break at the end of the latter two is dropped."""
    if prompt not in (None, "-") and file is not None:
        raise click.UsageError("give PROMPT or --file, not both")
    if file is not None:
        text = read_file(file)
    elif prompt is not None and prompt != "-":
        text = decode(prompt.encode(errors="surrogateescape"), "PROMPT", chop=False)
    elif sys.stdin is None or (prompt is None and sys.stdin.isatty()):
        raise click.UsageError("no prompt: give PROMPT, --file PATH, or pipe text in")
    else:
        text = read_stdin()
    if not text.strip():
        raise click.UsageError("the prompt is empty")
    return text


def read_file(file: Path) -> str:
    """Return the text of a file that holds prompts; - is stdin.

    Raises:
        DgemmaError, click.ClickException: not a file, not readable, not UTF-8, or more than any model reads.
    """
    if str(file) == "-":
        return read_stdin()
    if not str(file).startswith(_STREAMS):
        return decode(read_bytes(file, LARGEST_PROMPT), str(file))
    try:
        with file.open("rb") as stream:
            return decode(stream.read(LARGEST_PROMPT + 1), str(file))
    except OSError as error:
        raise click.ClickException(f"{file}: {error.strerror or error}") from None


def read_stdin(*, line: bool = False) -> str:
    """Return the text that comes in on stdin, or the next `line` of it, with its end where it has one.

    Raises:
        click.ClickException: not readable, not UTF-8, or more than any model reads.
    """
    if sys.stdin is None:
        return ""
    try:
        read = sys.stdin.buffer.readline if line else sys.stdin.buffer.read
        data = read(LARGEST_PROMPT + 1)
    except OSError as error:  # a terminal that went away, or a stream that was opened for writing alone
        raise click.ClickException(f"stdin: {error.strerror or error}") from None
    return decode(data, "stdin", chop=not line)


def decode(data: bytes, where: str, *, chop: bool = True) -> str:
    """Return UTF-8 as text, without a byte order mark and, if `chop`, without one line break at its end.

    Line ends of other systems become newlines: models were trained on those, and nobody sees which ones a file has.

    Raises:
        click.ClickException: not UTF-8, or more than any model reads.
    """
    if len(data) > LARGEST_PROMPT:
        raise click.ClickException(f"{where}: longer than {LARGEST_PROMPT >> 20} MiB; no model reads so much at once")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise click.ClickException(f"{where}: not UTF-8 (byte {error.start} is 0x{data[error.start]:02x})") from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.removesuffix("\n") if chop else text
