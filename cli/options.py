"""Options that several commands share, and where a prompt comes from."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import click

from ..backends import DTYPES, MODULES
from ..core.files import read_bytes

Command = TypeVar("Command", bound=Callable[..., Any])

_STREAMS = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")
"""What shells put for `<(command)`: pipes that are being written. Other pipes may have nobody at their other end."""

LARGEST_PROMPT = 64 << 20
"""Bytes read of a file or of stdin: no context holds more, and `< /dev/zero` has to end somewhere."""

FROM_CHECKPOINT: dict[str, Any] = {"show_default": "the checkpoint's"}


def _together(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """One decorator from several; help lists them in the order given."""
    return lambda command: reduce(lambda wrapped, option: option(wrapped), reversed(options), command)


ways_options = _together(
    click.option(
        "--backend", type=click.Choice(["auto", *MODULES]), default="auto", show_default=True,
        help="What computes. auto: mlx on Apple silicon, torch elsewhere.",
    ),
    click.option(
        "--device", default="auto", show_default=True, metavar="NAME",
        help="Where it computes: cpu, cuda, cuda:N (torch) or gpu (mlx). auto: the first GPU, or else the CPU.",
    ),
    click.option(
        "--dtype", type=click.Choice(["auto", *DTYPES]), default="auto", show_default=True,
        help="Width of the arithmetic. auto: float32 for small models, as stored for large ones.",
    ),
)  # fmt: skip

model_options = _together(
    click.option(
        "--model", "-m", default="nano", show_default=True, metavar="NAME",
        help="'nano' (ships with dgemma), a checkpoint folder, or a Hugging Face id, which is downloaded once.",
    ),
    ways_options,
)  # fmt: skip

budget_options = _together(
    click.option(
        "--max-new-tokens", "-n", type=click.IntRange(min=1), default=256, show_default=True, metavar="N",
        help="Write at most N tokens, thinking included.",
    ),
    click.option(
        "--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N",
        help="Same seed, same text: run to run and, in float32, on every backend.",
    ),
)  # fmt: skip

sampling_options = _together(
    budget_options,
    click.option(
        "--steps", type=click.IntRange(min=1), metavar="N", **FROM_CHECKPOINT,
        help="Cap on the denoising passes of one canvas; most stop long before it.",
    ),
    click.option(
        "--schedule-steps", type=click.IntRange(min=1), metavar="N", **FROM_CHECKPOINT,
        help="Passes over which the temperature falls; apart from --steps, so that a lower cap changes nothing else.",
    ),
    click.option(
        "--temperature", "-t", type=click.FloatRange(min=0), metavar="T", show_default="1",
        help="Multiplies the checkpoint's temperature schedule: 1 is as it stands, 0 is --greedy.",
    ),
    click.option(
        "--greedy", is_flag=True,
        help="Accept the most probable token everywhere, instead of one that is drawn.",
    ),
    click.option(
        "--t-max", type=click.FloatRange(min=0), metavar="T", **FROM_CHECKPOINT,
        help="Temperature that the schedule starts from.",
    ),
    click.option(
        "--t-min", type=click.FloatRange(min=0), metavar="T", **FROM_CHECKPOINT,
        help="Temperature that it falls towards. One of the two takes the other with it where they would cross.",
    ),
    click.option(
        "--entropy-bound", type=click.FloatRange(min=0), metavar="NATS", **FROM_CHECKPOINT,
        help="How unsure the tokens accepted in one pass may be, taken together. Higher: fewer passes, more mistakes.",
    ),
    click.option(
        "--confidence", type=click.FloatRange(min=0), metavar="NATS", **FROM_CHECKPOINT,
        help="A canvas that no longer changes is finished once its mean entropy is below this; 0 takes every step.",
    ),
    click.option(
        "--stability", type=click.IntRange(min=0), metavar="N", **FROM_CHECKPOINT,
        help="How many passes in a row must leave a canvas as it was before it is finished.",
    ),
    click.option(
        "--stop", multiple=True, metavar="TEXT",
        help="End the answer where TEXT would begin. May be given several times; in bash $'\\n' is a line break.",
    ),
    click.option(
        "--thinking/--no-thinking", default=False, show_default=True,
        help="Let the model think first. What it thinks is shown apart from the answer.",
    ),
)  # fmt: skip

live_option = click.option(
    "--live/--no-live", default=True, show_default=True,
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
        text = decode(sys.stdin.buffer.read(LARGEST_PROMPT + 1), "stdin")
    if not text.strip():
        raise click.UsageError("the prompt is empty")
    return text


def read_file(file: Path) -> str:
    """Return the text of a file that holds prompts; - is stdin.

    Raises:
        DgemmaError, click.ClickException: not a file, not readable, not UTF-8, or more than any model reads.
    """
    if str(file) == "-":
        return decode(sys.stdin.buffer.read(LARGEST_PROMPT + 1) if sys.stdin else b"", "stdin")
    if not str(file).startswith(_STREAMS):
        return decode(read_bytes(file, LARGEST_PROMPT), str(file))
    try:
        with file.open("rb") as stream:
            return decode(stream.read(LARGEST_PROMPT + 1), str(file))
    except OSError as error:
        raise click.ClickException(f"{file}: {error.strerror or error}") from None


def decode(data: bytes, where: str, *, chop: bool = True) -> str:
    """Return UTF-8 as text, without a byte order mark and, if `chop`, without one line break at its end.

    Raises:
        click.ClickException: not UTF-8, or more than any model reads.
    """
    if len(data) > LARGEST_PROMPT:
        raise click.ClickException(f"{where}: longer than {LARGEST_PROMPT >> 20} MiB; no model reads so much at once")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise click.ClickException(f"{where}: not UTF-8 (byte {error.start} is 0x{data[error.start]:02x})") from None
    if chop:
        text = text.removesuffix("\n").removesuffix("\r")
    return text
