"""The one thread that runs a model's passes.

A pass reads and writes what belongs to the model: its cache, buffers to work in, compiled functions, sessions. So
whoever asks for a pass, one thread runs it. Some runtimes would have it so anyway: MLX's streams and what `mx.compile`
keeps belong to the thread that made them, and OpenMP's workers to the thread that called. Where two threads have
called, there are workers for both, more than processors, and GNU's OpenMP then no longer waits for work in a loop but
sleeps: a pass of a small model takes 2.5 times as long. So models on torch's CPU have one thread together.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

from .errors import DgemmaError
from .passes import Passes

Result = TypeVar("Result")
_Work = Callable[[], None]
Home = Callable[[], AbstractContextManager[None]]

LAST_PASS = 60.0
"""Seconds that the process's exit waits for a pass that is running."""


_shared: weakref.WeakValueDictionary[tuple[str, int], Owner] = weakref.WeakValueDictionary()


def owner_of(passes: Passes) -> Owner:
    """Return the thread for some passes: their own, or that of all in this process with the same workers."""
    if not passes.workers:
        return Owner(passes.home, anywhere=passes.anywhere)
    key = (passes.workers, os.getpid())
    return _shared.get(key) or _shared.setdefault(key, Owner(passes.among_workers, anywhere=passes.anywhere))


class Owner:
    """Runs work in a thread of its own, in the order in which it is asked; the thread starts with the first.

    `home` is what the thread is inside of while it lives. Where the process has begun to exit the thread is over, and
    with `anywhere` work runs in the thread that asks instead.
    """

    def __init__(self, home: Home, *, anywhere: bool) -> None:
        self._home, self._anywhere = home, anywhere
        self._queue: SimpleQueue[_Work | None] = SimpleQueue()
        self._busy = threading.RLock()  # held while work runs
        self._starting, self._launched, self._ready = threading.RLock(), False, threading.Event()
        # A daemon, because ordinary threads are waited for before anybody could tell this one to end.
        self._thread = threading.Thread(
            target=_serve, name="dgemma", daemon=True, args=(self._queue, self._busy, home, self._ready)
        )
        # Python ends daemon threads where they come back from C++, which aborts the process there ("terminate called
        # without an active exception"): at its exit the thread ends by itself, with the pass that is running.
        weakref.finalize(self, _end, self._queue, self._thread, os.getpid())

    def run(self, work: Callable[[], Result]) -> Result:
        """Return what the work returns, or raise what it raises. An interrupt waits for the work to end.

        Raises:
            DgemmaError: the process is exiting, and the runtime has ended.
        """
        if self.here():
            return work()
        if not self._started():
            with self._busy, self._home():
                return work()
        future: Future[Result] = Future()
        self._queue.put(partial(_carry, work, future))
        try:
            return future.result()
        except KeyboardInterrupt:
            future.exception()  # a second interrupt does not wait
            raise
        finally:
            del future  # it holds its error, which holds this frame

    def post(self, work: _Work) -> bool:
        """Ask for work and do not wait; it must not raise. False where the thread has ended."""
        if not self._started():
            return False
        self._queue.put(work)
        return True

    def nudge(self, work: _Work) -> None:
        """Ask for work if the thread is there; takes no lock, so that a finalizer may."""
        if self._thread.is_alive():
            self._queue.put(work)

    def here(self) -> bool:
        """Whether the thread that asks is this one."""
        return threading.current_thread() is self._thread

    def alive(self) -> bool:
        """Whether the thread runs; False where work runs in the thread that asks.

        Raises:
            DgemmaError: the process is exiting, and the runtime has ended.
        """
        return self._started()

    def pause(self) -> None:
        """Wait for the work that is running, and begin no other until `go_on`."""
        self._busy.acquire()

    def go_on(self) -> None:
        with suppress(RuntimeError):  # one that came into being since the others were paused
            self._busy.release()

    def _started(self) -> bool:
        if not self._ready.is_set():
            with self._starting:  # two threads may be the first at once, and one of them be interrupted
                launched, self._launched = self._launched, True
                try:
                    if not launched:
                        self._thread.start()
                    self._ready.wait()
                except RuntimeError:  # no more threads can be had
                    self._launched = False
        if self._thread.is_alive():
            return True
        if not self._anywhere:
            raise DgemmaError("the process is exiting, and the model's thread has ended; generate before that")
        return False


def _carry(work: Callable[[], Result], future: Future[Result]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)


def _serve(queue: SimpleQueue[_Work | None], busy: Any, home: Home, ready: threading.Event) -> None:
    ready.set()
    with home():
        while (work := queue.get()) is not None:
            with busy:
                try:
                    work()
                except Exception:  # a bug: it is told as a thread's end is, and who waits for other work still gets it
                    threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))
            del work  # or what it holds would live until the next work comes


def _end(queue: SimpleQueue[_Work | None], thread: threading.Thread, process: int) -> None:
    if os.getpid() != process or not thread.is_alive():  # forked off: the thread is the parent's
        return
    queue.put(None)
    if threading.current_thread() is not thread:
        thread.join(LAST_PASS)
