"""The command line: `dgemma`, or `python -m dgemma`.

A command's file is imported when help lists it or it is called, and a framework only inside the command that runs it:
`dgemma --help` answers at once.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any, NoReturn

import click

from ..core.errors import DgemmaError
from .process import INTERRUPTED, Unwritable, say, unexpected, unwritable

COMMANDS = (
    "generate",
    "fill",
    "edit",
    "read",
    "chat",
    "batch",
    "replay",
    "models",
    "convert",
    "export",
    "compare",
    "inspect",
    "bench",
    "doctor",
)
LONGEST = 1000
"""Characters of an error's line."""


class Group(click.Group):
    """Finds commands by file name, and says every error in one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return getattr(import_module(f".{cmd_name}", __name__), cmd_name) if cmd_name in COMMANDS else None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, Unwritable, SystemExit):
            raise
        except KeyboardInterrupt as stopped:
            if ctx.params["debug"]:
                raise
            say("; ".join(["interrupted", *map(str, stopped.args)]))
            raise click.exceptions.Exit(INTERRUPTED) from stopped
        except BaseException as error:  # a panic in a Rust library is no Exception
            if ctx.params["debug"]:
                raise
            if isinstance(error, DgemmaError):
                raise click.ClickException(str(error)) from error
            raise click.ClickException(unexpected(error)) from error

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **extra)
        return self._run(*args, **extra)

    def _run(self, *args: Any, **extra: Any) -> NoReturn:
        try:
            code = super().main(*args, standalone_mode=False, **extra)
            sys.stdout.flush()
        except click.Abort:
            code = INTERRUPTED
        except Unwritable as lost:
            code = unwritable(lost)
        except click.ClickException as error:
            click.echo(f"dgemma: error: {_one_line(error)}", err=True)
            code = error.exit_code
        sys.exit(code if isinstance(code, int) else 0)


def _one_line(error: click.ClickException) -> str:
    text = " ".join(error.format_message().split())
    text = "".join(c if c.isprintable() else "?" for c in text)
    if len(text) > LONGEST:  # it repeats what was typed
        text = f"{text[: LONGEST - 40]} ... {text[-35:]}"
    if isinstance(error, click.UsageError) and error.ctx is not None:
        text = f"{text.rstrip('.')} (see {error.ctx.command_path} --help)"
    return text


@click.group(cls=Group, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dgemma", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="On an error, show the whole stack trace.")
@click.pass_context
def main(ctx: click.Context, debug: bool) -> None:
    """Run DiffusionGemma, Google's text diffusion model, on whatever machine you own.

    It writes a canvas of tokens at once, in a dozen passes, instead of one token after another.

    \b
    dgemma generate '.3.1 .2.. .... ...4'  nano, which ships with it, plays Sudoku
    dgemma chat --model google/diffusiongemma-26B-A4B-it
    dgemma doctor                          what this machine can run
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
