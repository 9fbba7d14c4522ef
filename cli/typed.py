"""Lines that a user types: edited by readline, and remembered from session to session."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from ..checkpoints import files
from ..core.errors import DgemmaError

KEPT = 1000
"""Lines that are remembered."""
LARGEST = 16 << 20
"""Bytes of the file with them."""


def history_file() -> Path:
    """Where the platform keeps what programs remember of a user."""
    state = os.environ.get("XDG_STATE_HOME", "")
    base = Path(state) if os.path.isabs(state) else Path(os.path.expanduser("~/.local/state"))
    return base / "dgemma" / "chat_history"


class Typed:
    """A terminal that lines come from.

    Args:
        history: the file that they are remembered in, one JSON string a line, for the user's eyes only; or None.
    """

    def __init__(self, history: Path | None) -> None:
        self._history = history
        self._new: list[str] = []
        self.problem: str | None = None
        """Why nothing is remembered, if so."""
        try:
            import readline
        except ImportError:  # a Python built without it
            self._readline: Any = None
        else:
            self._readline = readline
            readline.parse_and_bind("set enable-bracketed-paste on")  # a pasted board is one message, not one per line
            for line in self._remembered():
                readline.add_history(line)
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal's stdin is a TextIOWrapper

    def read(self) -> str | None:
        """Return the next message, None where there is none any more. A backslash at a line's end joins the next."""
        lines: list[str] = []
        while not lines or lines[-1].endswith("\\"):
            try:
                lines.append(input("... " if lines else "> "))
            except EOFError:
                return None
            if lines[-1].strip():
                self._new.append(lines[-1])
        return "\n".join(line.removesuffix("\\") for line in lines)

    def remember(self) -> None:
        """Add what was typed to the file; what another session has put there meanwhile stays."""
        if self._history is None or not self._new or self.problem is not None:
            return
        try:
            self._history.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lines = (self._remembered() + self._new)[-KEPT:]
            self._new = []
            files.write_text(self._history, "".join(json.dumps(line) + "\n" for line in lines), private=True)
        except (DgemmaError, OSError) as error:
            self.problem = str(error)

    def _remembered(self) -> list[str]:
        if self._history is None or not os.path.lexists(self._history):
            return []
        try:
            lines = [json.loads(line) for line in files.read_text(self._history, LARGEST).splitlines()]
        except DgemmaError as error:
            self.problem = str(error)
            return []
        except (ValueError, RecursionError):
            self.problem = f"{self._history}: damaged; remove it"
            return []
        # What cannot be typed, no line editor takes.
        return [line.encode(errors="replace").decode() for line in lines if isinstance(line, str) and "\0" not in line]
