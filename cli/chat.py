"""`dgemma chat`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from ..core.errors import DgemmaError
from .options import live_option, model_options, sampling_options

if TYPE_CHECKING:
    from rich.console import Console

    from ..core.runtime import DiffusionGemma

HELP = """\
/reset            forget everything said so far
/system [TEXT]    set the system prompt, or take it away
/thinking on|off  let the model think before it answers
/seed N           draw other random numbers
/quit             leave (so does Ctrl-D)
Ctrl-C stops an answer. A line that ends in \\ goes on in the next.
A message that starts with / is written with two.
"""


@dataclass(kw_only=True)
class Conversation:
    """What has been said, and how to go on. Thinking is not kept: the model never sees earlier thoughts."""

    system: str | None
    sampling: dict[str, Any]
    turns: list[dict[str, str]] = field(default_factory=list)

    def messages(self) -> list[dict[str, str]]:
        head = [{"role": "system", "content": self.system}] if self.system else []
        return head + self.turns

    def command(self, line: str) -> str:
        """Carry out a line that starts with a slash → what to tell the user.

        Raises:
            EOFError: the user wants to leave.
            DgemmaError: no such command, or a value it cannot take.
        """
        name, _, value = line.partition(" ")
        value = value.strip()
        match name, value:
            case "/help" | "/?", _:
                return HELP
            case "/quit" | "/exit", _:
                raise EOFError
            case "/reset", _:
                self.turns.clear()
                return "forgotten"
            case "/system", _:
                self.system = value or None
                return "system prompt set" if value else "no system prompt"
            case "/thinking", "on" | "off":
                self.sampling["thinking"] = value == "on"
                return f"thinking {value}"
            case "/seed", _ if value.isascii() and value.isdigit():
                self.sampling["seed"] = int(value)
                return f"seed {value}"
            case "/thinking" | "/seed", _:
                raise DgemmaError(f"{name} needs {'on or off' if name == '/thinking' else 'a whole number'}")
        raise DgemmaError(f"no command {name}; /help lists them")


@click.command(short_help="Talk with a model, turn by turn.")
@click.option("--system", metavar="TEXT", help="System prompt: what the model is told before everything else.")
@model_options
@sampling_options
@live_option
def chat(
    system: str | None,
    model: str,
    backend: str,
    device: str,
    dtype: str,
    live: bool,
    **sampling: Any,
) -> None:
    """Talk with a model, turn by turn; it remembers what was said.

    On a terminal, /help lists what can be changed on the way. Piped in, every line is one message.
    """
    if sys.stdin is None:
        raise click.UsageError("stdin is closed: there is nobody to talk with")
    from .output import consoles, load_model, put, put_words

    out, errors = consoles()
    loaded = load_model(errors, model, backend=backend, device=device, dtype=dtype)
    if not loaded.tokenizer.has_template:
        raise DgemmaError(f"{model} has no chat template, so it cannot chat; use dgemma generate --raw")
    talk = Conversation(system=system, sampling=sampling)
    typed = sys.stdin.isatty() and out.is_terminal
    if typed:
        where = f"{model} on {loaded.backend}, {loaded.device}, {loaded.dtype}"
        put_words(errors, f"{where}. /help lists commands, Ctrl-C stops an answer, Ctrl-D leaves.")
    read = _typed() if typed else _piped
    while True:
        try:
            line = read()
            if line is None:
                break
            if line.startswith("/") and not line.startswith("//"):
                put_words(errors, talk.command(line).rstrip())
            elif line.strip():
                _answer(loaded, talk, line.removeprefix("/"), out, errors, live=live, typed=typed)
        except EOFError:
            break
        except KeyboardInterrupt:
            if not typed:
                raise
            put(errors, "\n(Ctrl-D leaves)\n")
        except DgemmaError as error:
            if not typed:
                raise
            put(errors, f"dgemma: error: {error}\n")
    if typed:
        put(errors, "\n")


def _answer(
    model: DiffusionGemma, talk: Conversation, line: str, out: Console, errors: Console, *, live: bool, typed: bool
) -> None:
    """One turn. A refused or empty one is as if never said; one that is typed can be stopped by Ctrl-C."""
    from .output import follow, footer, open_sink, put_words

    talk.turns.append({"role": "user", "content": line})
    sink = None
    try:
        events = model.stream(talk.messages(), **talk.sampling)
        sink = open_sink(out, errors, model, live=live, budget=talk.sampling["max_new_tokens"])
        footer(errors, follow(events, sink))
    except KeyboardInterrupt:
        if not typed:
            raise
        put_words(errors, "stopped")
    finally:
        if sink is not None and sink.answer:
            talk.turns.append({"role": "assistant", "content": sink.answer})
        else:
            talk.turns.pop()


def _typed() -> Callable[[], str | None]:
    """Lines from a terminal, with editing and history where the platform has readline."""
    try:
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")  # a pasted board is one message, not one per line
    except ImportError:
        pass
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal's stdin is a TextIOWrapper

    def read() -> str | None:
        lines: list[str] = []
        while not lines or lines[-1].endswith("\\"):
            try:
                lines.append(input("... " if lines else "> "))
            except EOFError:
                return None
        return "\n".join(line.removesuffix("\\") for line in lines)

    return read


def _piped() -> str | None:
    from .options import decode

    line = sys.stdin.buffer.readline()
    return decode(line, "stdin") if line else None
