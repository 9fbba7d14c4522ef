"""Options that several commands share, and where a prompt comes from."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import click

from ..backends import DTYPES, MODULES
from ..checkpoints.files import read_bytes
from ..core.options import DEFAULTS, MOST, SAID

Command_ = TypeVar("Command_", bound=Callable[..., Any])

_STREAMS = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")
"""What shells put for `<(command)`: pipes that are being written. Other pipes may have nobody at their other end."""

LARGEST_PROMPT = 64 << 20
"""Bytes read of a file or of stdin: no context holds more, and `< /dev/zero` has to end somewhere."""


TYPED = f"{__name__}.typed"
"""Where a context keeps the words that its command was given."""


class Option(click.Option):
    """An option that help lists under a heading."""

    def __init__(self, *names: Any, group: str = "Options", **attributes: Any) -> None:
        super().__init__(*names, **attributes)
        self.group = group


class Command(click.Command):
    """A command whose help lists options by group, in the order in which each group comes first."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[TYPED] = [*args]
        return super().parse_args(ctx, args)

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


def together(*options: Callable[[Any], Any]) -> Callable[[Command_], Command_]:
    """One decorator from several; help lists them in the order given."""
    return lambda command: reduce(lambda wrapped, option: option(wrapped), reversed(options), command)


ways_options = together(
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

model_options = together(
    option(
        "--model", "-m", default="nano", show_default=True, metavar="NAME", group="Model",
        help="'nano' (ships with dgemma), a checkpoint folder, or a Hugging Face id, which is downloaded once.",
    ),
    option(
        "--revision", metavar="NAME", group="Model", help="Branch, tag or commit of a model on the Hugging Face hub.",
    ),
    ways_options,
)  # fmt: skip


class Schema(click.ParamType):
    """A file that holds a JSON schema."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        text = read_file(Path(value))
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            self.fail(f"{value} is not JSON: {str(error).splitlines()[0]}", param, ctx)
        if found is None:  # which would be no schema
            self.fail(f"{value} is JSON's null, expected an object, true or false", param, ctx)
        return found


class CanvasLength(click.ParamType):
    """A number of positions, or `fit`."""

    name = "integer or fit"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == "fit":
            return value
        try:
            length = int(value)
        except (TypeError, ValueError):
            self.fail(f"{value!r} is neither a whole number nor fit", param, ctx)
        return click.IntRange(min=1).convert(length, param, ctx)


_GROUPS = {"length": "Length and seed", "sampling": SAMPLING, "prompt": "Prompt", "canvas": "What the answer is"}
_NAMES = {"schema": "--json-schema"}
"""Of options that a command spells otherwise."""
_SHOWN = {"max_new_tokens": "the checkpoint's", "canvas_length": "the checkpoint's", "seed": True}


def generate_option(name: str) -> Callable[[Command_], Command_]:
    """Return the option of a command that one of `GenerateOptions` is."""
    said, group = SAID[name], _GROUPS[SAID[name].group]
    long = _NAMES.get(name, f"--{name.replace('_', '-')}")
    names = [long, *([f"-{said.letter}"] if said.letter else [])]
    valued: dict[str, Any] = {"group": group, "help": said.help, "metavar": said.unit}
    match said.kind:
        case "integer":
            kind = click.IntRange(min=said.least)
            return option(*names, type=kind, default=DEFAULTS[name], show_default=_SHOWN.get(name, False), **valued)
        case "canvas":
            return option(*names, type=CanvasLength(), show_default=_SHOWN[name], **valued)
        case "number":
            most = said.most if said.most < MOST else None
            return option(*names, type=click.FloatRange(min=said.least, max=most), **valued)
        case "text":
            return option(*names, **valued)
        case "schema":
            return option(*names, name, type=Schema(), **valued)
        case "texts":
            return option(*names, name, multiple=True, **valued)
        case "flag" if name == "thinking":
            return option(f"{long}/--no-{name}", default=False, show_default=True, group=group, help=said.help)
        case "flag":
            return option(*names, is_flag=True, group=group, help=said.help)
    raise AssertionError(f"{name}: no option of a command is of kind {said.kind}")


budget_options = together(generate_option("max_new_tokens"), generate_option("seed"))

raw_option, specials_option = generate_option("raw"), generate_option("specials")

UNASKED = ("eos", "dfa", "held")
"""Options that no command has."""

sampling_options = together(*(generate_option(name) for name in SAID if name not in (*UNASKED, "raw", "specials")))

system_option = option(
    "--system", metavar="TEXT", group="Prompt", help="System prompt: what the model is told before everything else.",
)  # fmt: skip

prompt_options = together(
    click.argument("prompt", required=False),
    option(
        "--file", "-f", type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path), metavar="PATH",
        group="Prompt", help="Read the prompt from a UTF-8 file; - is stdin.",
    ),
    system_option, raw_option, specials_option,
)  # fmt: skip

shown_options = together(
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
