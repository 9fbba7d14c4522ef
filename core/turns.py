"""Whose turn it is: several generations on one model, in one thread or in many, a pass at a time.

A pass reads and writes what belongs to its generation (cache, canvas, decoder) and, while it runs, what belongs to the
model (buffers to work in, compiled functions, sessions). So one lock per model is held from one event to the next, and
never while the reader of the events holds one. Whatever the readers do, each gets what it would get alone.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import DgemmaError
from .events import Done, Event

if TYPE_CHECKING:
    from .ops import Ops

Result = TypeVar("Result")

LAST_PASS = 60.0
"""Seconds that the process's exit waits for a pass that some thread is in."""


class Turns:
    """The lock of one model, and the process that it was loaded in."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops
        self._lock = threading.RLock()
        self._process = os.getpid()
        self._busy = False
        weakref.finalize(self, _keep, self._lock, self._process)

    def take(self, doing: str, work: Callable[[], Result]) -> Result:
        """Wait for a turn, do some work in it, and return what comes of it.

        Raises:
            DgemmaError: in a child that was forked after loading, where the backend's threads are gone; and within
                another turn of the same thread, where a signal handler asked in the middle of a pass.
        """
        self._check_process()
        with self._lock:
            if self._busy:
                raise DgemmaError("a pass of this model is running in this very thread; ask it again when that is over")
            try:
                self._busy = True
                with self._ops.guarded(doing):
                    return self._ops.run(work)
            finally:
                self._busy = False

    def _check_process(self) -> None:
        if os.getpid() == self._process:
            return
        if not self._ops.survives_fork:
            raise DgemmaError(
                f"this model was loaded by process {self._process}, and the {self._ops.name} backend does not work in "
                "a process forked off it; load it again there, or start processes by 'spawn'"
            )
        # Some other thread of the parent may have held the lock: here nobody would ever give it back.
        self._lock, self._process, self._busy = threading.RLock(), os.getpid(), False


def _keep(lock: Any, process: int) -> None:
    """Take a model's lock for good when the process exits: the pass under way ends, and no other thread begins one.

    Python ends daemon threads where they come back from C++, which aborts the process there ("terminate called without
    an active exception"). The thread that exits may go on to generate.
    """
    if os.getpid() == process:
        lock.acquire(timeout=LAST_PASS)


class Stream(Iterator[Event]):
    """The events of one generation, each made in a turn of its own.

    Threads may share it: each event goes to one of them. `close`, from any thread, ends it and frees all that it held,
    once the pass under way is over; so does dropping it.
    """

    def __init__(self, turns: Turns, events: Iterator[Event], absent: Callable[[float], None]) -> None:
        """`absent` is told the seconds that passed between one turn and the next."""
        self._turns = turns
        self._events: Iterator[Event] | None = events
        self._absent = absent
        self._left: float | None = None

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Event:
        if self._events is None:
            raise StopIteration
        event = self._turns.take("generating", self._advance)
        if event is None:
            raise StopIteration
        return event

    def close(self) -> None:
        """End the generation; nothing follows."""
        self._events = None

    def _advance(self) -> Event | None:
        events = self._events
        if events is None:
            return None
        if self._left is not None:
            self._absent(time.perf_counter() - self._left)
        event = next(events, None)  # which also ends it where it raises
        self._left = time.perf_counter()
        if self._events is not events:  # closed meanwhile: not even this one
            return None
        if event is None or isinstance(event, Done):  # what it held is freed here, within the turn
            self._events = None
        return event
