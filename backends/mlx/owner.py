"""The one thread that runs MLX for a model.

MLX's streams, its default ones included, belong to the thread that made them, and so does what `mx.compile` keeps: an
array that waits to be computed cannot be computed elsewhere, each thread compiles anew, and a thread that has run a
compiled function and ends without destroying its streams aborts the process when that exits ("terminate called without
an active exception", in MLX 0.32 five times of eight). So whoever asks for a pass, this thread runs it.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

import mlx.core as mx

from ...core.errors import DgemmaError

Result = TypeVar("Result")
_Work = tuple[Callable[[], Any], "Future[Any]"]


class Owner:
    """Runs work in a thread of its own, in the order in which it is asked; the thread starts with the first."""

    def __init__(self, device: mx.Device) -> None:
        self._queue: SimpleQueue[_Work | None] = SimpleQueue()
        # A daemon, because ordinary threads are waited for before anybody could tell this one to end.
        self._thread = threading.Thread(target=_serve, args=(self._queue, device), name="dgemma-mlx", daemon=True)
        # And at the process's exit, behind those of whoever is made later: behind the model's own lock (`core.turns`).
        weakref.finalize(self, _end, self._queue, self._thread, os.getpid())

    def run(self, work: Callable[[], Result]) -> Result:
        """Return what the work returns, or raise what it raises. An interrupt waits for the work to end."""
        if self._thread.ident is None:
            self._thread.start()
        if threading.current_thread() is self._thread:
            return work()
        if not self._thread.is_alive():
            raise DgemmaError("the process is exiting, and MLX has ended; generate before that")
        future: Future[Result] = Future()
        self._queue.put((work, future))
        try:
            return future.result()
        except KeyboardInterrupt:
            # What it works on is the model's, which nobody else may have meanwhile; a second interrupt does not wait.
            future.exception()
            raise
        finally:
            del future  # it holds its error, which holds this frame


def _serve(queue: SimpleQueue[_Work | None], device: mx.Device) -> None:
    mx.set_default_device(device)  # of this thread
    while (item := queue.get()) is not None:
        work, future = item
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)
        del item, work, future  # or the last results would live until the next work comes
    mx.clear_streams()


def _end(queue: SimpleQueue[_Work | None], thread: threading.Thread, process: int) -> None:
    if os.getpid() != process or not thread.is_alive():  # forked off: the thread is the parent's
        return
    queue.put(None)
    if threading.current_thread() is not thread:
        thread.join()
