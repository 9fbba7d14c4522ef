"""What whoever asks holds of a request in an engine: its events, and the way to end it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator

from .events import Done, Event
from .row import Request, Row
from .tokens import Vocabulary


class Handle:
    """A request that was added to an engine.

    Args:
        row: the request's.
        wait: waits for a row's next event, while the engine's thread runs rounds.
        drop: cancels a row; takes no lock, because whoever collects garbage calls it too, in the middle of anything.
    """

    def __init__(
        self, row: Row, wait: Callable[[Row], Event | BaseException | None], drop: Callable[[Row], None]
    ) -> None:
        self.row, self._wait, self._drop = row, wait, drop
        self._over = False
        # Dropped, it frees its slot as if it were cancelled.
        weakref.finalize(self, drop, row).atexit = False

    def events(self) -> Iterator[Event]:
        """Return the request's events until `Done`, each once, however many iterators and threads ask.

        While somebody reads events, the engine's thread runs rounds until no request is left.

        Raises:
            DgemmaError: what went wrong with this request; others go on.
        """
        return Events(self)

    def cancel(self) -> None:
        """End the request, from any thread; nothing follows, and its slot is free after the pass that is running."""
        self._over = True
        self._drop(self.row)

    def ready(self) -> list[Event]:
        """Return the events that are there, and wait for none.

        Raises:
            DgemmaError: as `events`.
        """
        found: list[Event] = []
        while not self._over and not self.row.events.empty():
            if (event := self.next()) is None:
                break
            found.append(event)
        return found

    def next(self) -> Event | None:
        """Wait for the next event; None where there is none."""
        if self._over:
            return None
        item = self._wait(self.row)
        if item is None or isinstance(item, Done | BaseException):
            self.row.events.put(None)  # nothing follows; for the other threads that wait
        if self._over:
            return None
        if isinstance(item, BaseException):
            self._over = True
            raise item
        return item


class Events(Iterator[Event]):
    """The events of one request. `close` ends it; so does dropping the last reference to it and its handle."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    def __next__(self) -> Event:
        if (event := self._handle.next()) is None:
            raise StopIteration
        return event

    @property
    def request(self) -> Request:
        return self._handle.row.request

    @property
    def tokenizer(self) -> Vocabulary | None:
        return self._handle.row.decoder.tokenizer

    def close(self) -> None:
        """End the generation; nothing follows."""
        self._handle.cancel()
