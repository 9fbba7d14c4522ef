"""Calls into the Rust library `tokenizers`, whose every failure becomes one line."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from threading import Lock
from typing import Any

from ..core.errors import DgemmaError

_TRIALS = ("a", "\u00e9 b\n<|", "")
_STDERR = Lock()  # of the process, as the file it guards is


def load_tokenizer(data: bytes, where: str) -> Any:
    """Read a tokenizer.json, and try it: some are read without complaint and panic at the first text.

    Raises:
        DgemmaError: it is none.
    """
    from tokenizers import Tokenizer

    def load() -> Any:
        backend = Tokenizer.from_buffer(data)
        with suppress(Exception):  # of one text, not of all: it is said when that text comes
            for text in _TRIALS:
                ids = backend.encode(text, add_special_tokens=False).ids
                backend.decode(ids or [0])
        return backend

    with _panics_unsaid():
        return call(f"{where}: not a tokenizer", load)


def call(what: str, function: Callable[[], Any]) -> Any:
    """Call the library, which raises plain exceptions of every kind, and panics that are not even those.

    Raises:
        DgemmaError: `what` and what the library said.
    """
    try:
        return function()
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise DgemmaError(f"{what}: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    """Return what an exception says, on one line, printable, and short."""
    lines = str(error)[:1000].removeprefix("Cannot instantiate Tokenizer from buffer: ").strip().splitlines()
    text = "".join(c if c.isprintable() else " " for c in lines[0]) if lines else type(error).__name__
    return text if len(text) <= 120 else f"{text[:117]}..."


@contextmanager
def _panics_unsaid() -> Iterator[None]:
    """Keep Rust from writing a panic's trace to the process's stderr; what others write there meanwhile comes late."""
    with _STDERR, ExitStack() as stack:
        try:
            before = os.dup(2)
            stack.callback(os.close, before)
            kept = stack.enter_context(tempfile.TemporaryFile())
        except OSError:  # no stderr, or no place to keep what is written
            yield
            return
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except DgemmaError:
            kept.truncate(0)
            raise
        finally:
            os.dup2(before, 2)
            kept.seek(0)
            with suppress(OSError):
                os.write(2, kept.read())
