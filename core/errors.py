"""The one exception that dgemma raises on purpose, and how names from outside are put into its line."""

from __future__ import annotations

from pathlib import Path


class DgemmaError(ValueError):
    """Bad input, said in one line: which file, key or option, what was expected, what to do."""


def shown(path: str | Path) -> str:
    """Return a path for a message: on one line, printable, and short enough to leave room for the message."""
    text = "".join(c if c.isprintable() else "?" for c in str(path))
    return text if len(text) <= 90 else f"...{text[-87:]}"


def quoted(value: object, limit: int = 70) -> str:
    """Return a name or value from outside for a message: on one line, in ASCII and short."""
    try:
        text = ascii(value)
    except Exception:  # a number of too many digits, or an object that cannot describe itself
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
