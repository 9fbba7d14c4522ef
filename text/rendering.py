"""Chat templates, rendered in a process of their own, with an end to how long they run and how much they make."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import IO, Any

import psutil

from ..core.errors import DgemmaError
from .template_worker import hidden_by

SECONDS = 5
"""How long one rendering may take. One of a real template takes a few milliseconds."""
MEMORY = 1 << 30
"""Bytes that the process may take, its prompt and the Python in it included."""
LARGEST = 64 << 20
"""Characters that may be given to a template: no context holds more."""
GROWTH = 8
"""How many times as long a prompt may be as what was given for it, and `ROOM` characters more."""
ROOM = 1 << 20

_START = 60  # seconds in which the process has to be there: Python and jinja2, from a slow disk
_GRACE = 3  # seconds after which a process that the system should have ended is ended here
_LOOK = 0.1  # seconds between looks at its memory
_CANNOT = "the process that chat templates run in cannot be started"


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A prompt's text, in which characters from messages may be hidden; see `template_worker.py`."""

    text: str
    show: Mapping[int, int]
    """What each hidden character stands for, as code points."""

    @property
    def plain(self) -> str:
        return self.text.translate(self.show)


def hidden(text: str, guarded: str) -> Rendered:
    """Return text of a user's with the characters `guarded` hidden in it, as in what a template makes of messages."""
    show, hide = hidden_by(guarded, set(text))
    return Rendered(text=text.translate(hide), show=show)


class Renderer:
    """A process that renders templates, started when there is first something to render, and ended with this object.

    A template that runs longer than `SECONDS` or grows beyond `MEMORY` is ended together with its process; the next one
    gets a new process. Linux keeps both limits itself; macOS knows none of memory, so there it is looked at from here.
    Safe for threads, which take turns, and across a fork: the child of a fork starts its own.
    """

    def __init__(
        self, *, seconds: float = SECONDS, memory: int = MEMORY, watch: bool = sys.platform == "darwin"
    ) -> None:
        self.seconds = seconds
        self.memory = memory
        self._watch = watch
        self._owner = os.getpid()
        self._lock = Lock()
        self._process: _Process | None = None

    def render(
        self, template: str, *, trusted: Mapping[str, Any], said: Mapping[str, Any], guarded: str, where: str
    ) -> Rendered:
        """Render a template.

        Args:
            template: its source.
            trusted: variables that may become control tokens.
            said: variables that come from users: JSON's types, keys of text.
            guarded: characters that are hidden in them.
            where: the file that the template is from, for messages.

        Raises:
            DgemmaError: whatever goes wrong with it, in one line.
        """
        request = {"template": template, "trusted": dict(trusted), "said": dict(said), "guarded": guarded}
        request["largest"] = ROOM + GROWTH * len(json.dumps(request))
        if os.getpid() != self._owner:  # another thread may have held the lock when this process was forked off
            self._owner, self._lock, self._process = os.getpid(), Lock(), None
        with self._lock:
            try:
                reply = self._ask(json.dumps(request).encode())
            except BaseException:  # interrupted: an answer to this would be taken for the next one's
                self._drop()
                raise
            if "text" not in reply:
                if not reply.keys() & {"broken", "refused"}:
                    self._drop()
                raise DgemmaError(f"{where}: {self._why(reply)}")
        return Rendered(text=reply["text"], show=dict(reply["show"]))

    def _ask(self, request: bytes) -> dict[str, Any]:
        watched = self.memory if self._watch else None
        if self._process is not None:
            reply = self._process.ask(request, self.seconds + _GRACE, watched)
            if reply.get("ended", -signal.SIGALRM) == -signal.SIGALRM:
                return reply
            self._drop()  # perhaps it ended while nobody looked, by someone else's hand
        self._process = _Process(self.seconds, 0 if self._watch else self.memory)
        return self._process.ask(request, self.seconds + _GRACE, watched)

    def _drop(self) -> None:
        if self._process is not None:
            self._process.end()
            self._process = None

    def _why(self, reply: Mapping[str, Any]) -> str:
        if "broken" in reply:
            return f"not a chat template: {_line(reply['broken'])}"
        if "refused" in reply:
            return f"the chat template refused the messages: {_line(reply['refused'])}"
        if "memory" in reply or reply.get("ended") in (-signal.SIGKILL, -signal.SIGSEGV):
            return f"the chat template was stopped: it needs more than {self.memory >> 20:,} MiB of memory"
        if "late" in reply or reply.get("ended") == -signal.SIGALRM:
            return f"the chat template was stopped: it ran for more than {self.seconds:g} seconds"
        return f"the process of the chat template ended with {reply.get('ended')}"


class _Process:
    """The process, and messages to it: eight bytes of length, then JSON."""

    def __init__(self, seconds: float, memory: int) -> None:
        # -P: not the script's own folder, where a `random.py` lies; -S: the parent's path is taken over instead.
        command = [sys.executable, "-P", "-S", str(Path(__file__).with_name("template_worker.py"))]
        try:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                start_new_session=True,  # Ctrl-C is for the parent
            )
        except (OSError, ValueError) as error:
            said = getattr(error, "strerror", None) or str(error)
            raise DgemmaError(f"{_CANNOT}: {_line(said)}") from None
        self.end = weakref.finalize(self, _end, self._child, os.getpid())
        path = [one or os.getcwd() for one in sys.path if isinstance(one, str)]
        hello = {"path": path, "seconds": seconds, "memory": memory}
        reply = self.ask(json.dumps(hello).encode(), _START)
        if "ready" not in reply:
            self.end()
            ended = f"ended with {reply['ended']}" if "ended" in reply else "does not answer"
            raise DgemmaError(f"{_CANNOT}: {_line(sys.executable or 'no Python', 60)} {ended}")

    def ask(self, request: bytes, seconds: float, memory: int | None = None) -> dict[str, Any]:
        """Send a request → the answer, or how the process ended, or that it is late or too large."""
        stdin, stdout = self._child.stdin, self._child.stdout
        assert stdin is not None and stdout is not None
        try:
            _write(stdin, len(request).to_bytes(8, "little") + request)
        except OSError:  # it has ended
            return {"ended": self._child.wait()}
        deadline = time.monotonic() + seconds
        data = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while len(data) < 8 or len(data) < 8 + int.from_bytes(data[:8], "little"):
                if selector.select(_LOOK):
                    part = stdout.read(1 << 20)
                    if not part:
                        return {"ended": self._child.wait()}
                    data += part
                elif time.monotonic() > deadline:
                    return {"late": True}
                if memory is not None and _resident(self._child.pid) > memory:
                    return {"memory": True}
        return json.loads(data[8:])


def _write(stream: IO[bytes], data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[stream.write(view) :]


def _resident(pid: int) -> int:
    try:
        return psutil.Process(pid).memory_info().rss
    except psutil.Error:
        return 0


def _end(child: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() == owner:
        child.kill()
        child.wait()
    else:  # a fork's copy of this object: the process is its parent's
        child.returncode = 0
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            stream.close()


def _line(text: str, limit: int = 120) -> str:
    """Return text for a message: on one line, printable, and short."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text[: 10 * limit]).split())
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
