"""`dgemma chat`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from ..core.errors import DgemmaError
from .conversation import Conversation, settable
from .keep import lost, record_options
from .options import (
    Command,
    live_option,
    model_options,
    option,
    read_stdin,
    sampling_options,
    shown_options,
    specials_option,
    system_option,
)
from .process import Unwritable, unexpected

if TYPE_CHECKING:
    from rich.console import Console

    from ..runtime import DiffusionGemma


@click.command(cls=Command, short_help="Talk with a model, turn by turn.")
@system_option
@specials_option
@model_options
@sampling_options
@live_option
@record_options
@shown_options
@option(
    "--history/--no-history", default=True, show_default=True, group="Output",
    help="Remember what is typed on a terminal, for the arrow keys, from session to session.",
)  # fmt: skip
@click.pass_context
def chat(
    ctx: click.Context,
    system: str | None,
    model: str,
    revision: str | None,
    backend: str,
    device: str,
    dtype: str,
    live: bool,
    quiet: bool,
    stats: bool,
    history: bool,
    **sampling: Any,
) -> None:
    """Talk with a model, turn by turn; it remembers what was said.

    On a terminal, /help lists what can be changed on the way. Piped in, every line is one message.
    """
    if sys.stdin is None:
        raise click.UsageError("stdin is closed: there is nobody to talk with")
    from .output import consoles, load_model

    out, errors = consoles(quiet=quiet)
    loaded = load_model(errors, model, revision=revision, backend=backend, device=device, dtype=dtype)
    if not loaded.tokenizer.has_template:
        raise DgemmaError(f"{model} has no chat template, so it cannot chat; use dgemma generate --raw")
    talk = Conversation(system=system, sampling=sampling, options=settable(ctx.command.params, sampling))
    table = Table(model=loaded, name=model, talk=talk, out=out, errors=errors, live=live, stats=stats)
    if sys.stdin.isatty() and out.is_terminal:
        _on_terminal(table, history=history, debug=ctx.find_root().params.get("debug", False))
    else:
        while line := read_stdin(line=True):
            try:
                table.take(line.removesuffix("\n"))
            except EOFError:
                break


def _on_terminal(table: Table, *, history: bool, debug: bool) -> None:
    """Read lines until the user leaves; what is refused or stopped ends neither the chat nor what was said before."""
    from rich.style import Style

    from .output import consoles, note, put, put_words
    from .typed import Typed, history_file

    _, screen = consoles()
    model = table.model
    where = f"{table.name} on {model.backend}, {model.device}, {model.dtype}"
    put_words(table.errors, f"{where}. /help lists commands, Ctrl-C stops an answer, Ctrl-D leaves.")
    typed = Typed(history_file() if history else None)
    try:
        while True:
            try:
                line = typed.read()
                if line is None:
                    break
                table.take(line, stops=True)
            except EOFError:
                break
            except KeyboardInterrupt:
                put(screen, "\n(Ctrl-D leaves)\n")
            except DgemmaError as error:
                put_words(screen, f"dgemma: error: {error}", Style.null())
            except Unwritable:
                raise
            except Exception as error:  # a fault of ours, or of a library: no reason to lose what was said
                if debug:
                    raise
                put_words(screen, f"dgemma: error: {unexpected(error)}", Style.null())
        put(screen, "\n")
    finally:
        typed.remember()
    if typed.problem is not None:
        note(table.errors, f"what was typed is not remembered: {typed.problem}")


@dataclass(frozen=True, kw_only=True)
class Table:
    """A model and what has been said at it."""

    model: DiffusionGemma
    name: str
    talk: Conversation
    out: Console
    errors: Console
    live: bool
    stats: bool

    def take(self, line: str, *, stops: bool = False) -> None:
        """Carry out a line: a command or a message.

        Raises:
            EOFError: the user wants to leave.
        """
        from .output import put_words

        if line.startswith("/") and not line.startswith("//"):
            if line.strip() != "/retry":
                put_words(self.errors, self.talk.command(line).rstrip())
                return
            line = self.talk.again()
            put_words(self.errors, f"again, with seed {self.talk.sampling['seed']}: {line}")
        else:
            line = line.removeprefix("/")
        if line.strip():
            self.answer(line, stops=stops)

    def answer(self, line: str, *, stops: bool) -> None:
        """One turn. A refused or empty one is as if never said; with `stops` Ctrl-C ends it, and it alone."""
        from . import notes
        from .output import footer, note, put_words
        from .sinks import follow, open_sink

        talk = self.talk
        talk.ask(line)
        sink = open_sink(self.out, self.errors, self.model, live=self.live, budget=talk.sampling["max_new_tokens"])
        try:
            done = follow(self.model.stream(talk.messages(), **talk.sampling), sink, title=f"> {line}")
        except KeyboardInterrupt:
            if not stops:
                raise
            put_words(self.errors, "stopped")
            return
        finally:
            talk.answered(sink.answer)
        if said := notes.about(self.name, line, text=sink.answer, thinking=sink.thinking, done=done):
            note(self.errors, said)
        if said := lost():
            note(self.errors, said)
        footer(self.errors, done, full=self.stats)
