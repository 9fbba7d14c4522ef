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

Result = TypeVar("Result")
_Work = tuple[Callable[[], Any], "Future[Any]"]


class Owner:
    """Runs work in a thread of its own, in the order in which it is asked; the thread starts with the first."""

    def __init__(self, device: mx.Device) -> None:
        self._device = device
        self._queue: SimpleQueue[_Work | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def run(self, work: Callable[[], Result]) -> Result:
        """Return what the work returns, or raise what it raises. An interrupt waits for the work to end."""
        if self._thread is None:
            # A daemon, because ordinary threads are waited for before anybody could tell this one to end.
            self._thread = threading.Thread(
                target=_serve, args=(self._queue, self._device), name="dgemma-mlx", daemon=True
            )
            self._thread.start()
            weakref.finalize(self, _end, self._queue, self._thread, os.getpid())  # and at the process's exit
        if threading.current_thread() is self._thread:
            return work()
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
    if os.getpid() != process:  # forked off: the thread is the parent's
        return
    queue.put(None)
    if threading.current_thread() is not thread:
        thread.join()
