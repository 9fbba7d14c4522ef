"""The process around a command: its three streams, the signals that end it, and what the shell hears at the end.

stdout   what was asked for. One that takes nothing ends the command: quietly where its reader has left
stderr   remarks. One that takes nothing loses them, and the command goes on
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn

FAILED = 1
INTERRUPTED = 130  # what shells report of a program that Ctrl-C ended
PIPE = 141  # … and of one that wrote to a pipe without a reader, as head leaves behind
SAID: dict[int, str] = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "terminated",
    signal.SIGHUP: "the terminal went away",
}
"""Signals that end a command, and what is said of each."""


class Unwritable(Exception):
    """stdout takes no more. Not an OSError: code in between would take it for its own file's."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error.strerror or str(error))
        self.left = error.errno == errno.EPIPE
        """Whether its reader went away, which is no error."""


class Terminated(SystemExit):
    """SIGTERM or SIGHUP came; an exception, so that terminals and files are put in order on the way out."""


class _Stdout(io.TextIOWrapper):
    # The layers below stay Python's own: one written in Python can be interrupted between a write and its count, and
    # text then comes twice.
    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self.fail(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self.fail(error)

    def fail(self, error: OSError) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())  # where what is still buffered goes
        raise Unwritable(error) from None


class _Stderr(_Stdout):
    def fail(self, error: OSError) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())


def run(command: Callable[[], Any]) -> NoReturn:
    """Run what ends in SystemExit, in a process of its own."""
    code: Any = None
    try:
        secure()
        for number in SAID:
            if signal.getsignal(number) != signal.SIG_IGN:  # as a shell has it for background jobs, and nohup
                signal.signal(number, _leave)
        sys.unraisablehook = _unraisable(sys.unraisablehook)
        if sys.stdout is None:
            end("error: stdout is closed, so nothing could be written there; `> /dev/null` throws it away", FAILED)
        command()
    except SystemExit as stopped:
        if isinstance(stopped, Terminated):
            say(SAID[int(str(stopped.code)) - 128])
        code = stopped.code
    except KeyboardInterrupt:
        say("interrupted")
        code = INTERRUPTED
    for number in SAID:  # nothing is left to be put in order
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, frame: os._exit(128 + number))
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except Unwritable as lost:
        code = unwritable(lost)
    sys.exit(code)


def secure() -> None:
    """Put something behind each of the three streams.

    The number of a closed one would go to the next file that is opened, and Python has None in its place, for which
    libraries take the other stream: figures would end up in the answer, or either in a file of weights.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - it lasts as long as the process
    elif sys.stderr is sys.__stderr__:
        sys.stderr = _wrapped(_Stderr, sys.stderr)
    if sys.stdout is not None and sys.stdout is sys.__stdout__:
        sys.stdout = _wrapped(_Stdout, sys.stdout)


def say(line: str) -> None:
    """Write one line to stderr; on a terminal below the ^C that is shown there."""
    below = "\n" if line.startswith("interrupted") and sys.stderr.isatty() else ""
    sys.stderr.write(f"{below}dgemma: {line}\n")
    sys.stderr.flush()


def end(line: str, code: int) -> NoReturn:
    say(line)
    sys.exit(code)


def unexpected(error: BaseException) -> str:
    """Return the line for an error that nobody foresaw."""
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"unexpected {' '.join(said.split())} (`dgemma --debug ...` shows where)"


def unwritable(lost: Unwritable) -> int:
    """Say why stdout takes nothing → exit code."""
    if lost.left:
        return PIPE
    say(f"error: stdout: {lost}")
    return FAILED


def write_bytes(data: bytes) -> None:
    """Write bytes to stdout as they are, line ends of other systems too.

    Raises:
        Unwritable: so it is.
    """
    stdout = sys.stdout
    stdout.flush()
    try:
        stdout.buffer.write(data)
        stdout.buffer.flush()
    except OSError as error:
        if isinstance(stdout, _Stdout):
            stdout.fail(error)
        raise Unwritable(error) from None


def _wrapped(kind: type[_Stdout], stream: Any) -> _Stdout:
    number = stream.fileno()
    os.set_blocking(number, True)  # Node and others hand on pipes that do not block, and Python's writing raises there
    # A model may write what an ASCII terminal cannot show.
    return kind(
        open(number, "wb", closefd=False), encoding=stream.encoding, errors="replace",
        line_buffering=stream.line_buffering,
    )  # fmt: skip


def _leave(number: int, frame: FrameType | None) -> None:
    """Leave by an exception; while a module is imported at once, for there libraries swallow or print exceptions."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            shown = "\r\x1b[2K\x1b[?25h" if os.isatty(2) else ""  # what a progress bar may have hidden
            with suppress(OSError):
                os.write(2, f"{shown}dgemma: {SAID[number]}\n".encode())
            os._exit(128 + number)
        frame = frame.f_back
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Terminated(128 + number)


def _unraisable(before: Callable[[Any], Any]) -> Callable[[Any], None]:
    def hook(lost: Any) -> None:
        # Ctrl-C while a destructor ran or a lock of the import system was cleared away, where it is swallowed.
        if lost.exc_type is not None and issubclass(lost.exc_type, KeyboardInterrupt):
            main = threading.main_thread().ident or 0
            again = threading.Timer(0.01, signal.pthread_kill, (main, signal.SIGINT))  # which also ends a system call
            again.daemon = True
            again.start()
        else:
            before(lost)

    return hook
